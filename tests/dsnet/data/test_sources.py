"""A data set in memory and the same folder streamed give the same run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dsnet.data import sources
from dsnet.data.cache import ImageCache
from dsnet.data.image_folder import decode_images, list_image_folder
from dsnet.data.normalization import Normalization
from dsnet.data.settings import Augmentation, FileOptions
from dsnet.data.sources import ImageSource, StreamedFolder, load_source
from dsnet.data.splits import splits_of
from dsnet.data.training_images import InMemoryImages, StreamedImages
from dsnet.errors import ConfigError, DataError

SIZE = 12
AUGMENTATION = Augmentation(flip=True)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three classes of 12 images each, and a cache of its own."""
    monkeypatch.setenv("DSNET_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "images"
    random = np.random.default_rng(0)
    for name in ("ape", "bee", "cat"):
        (root / name).mkdir(parents=True)
        for number in range(12):
            pixels = random.integers(0, 256, (14 + number, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:02d}.png")
    return root


def both(root: Path) -> tuple[ImageSource, ImageSource]:
    return load_source("image_folder", root, SIZE), load_source("image_folder", root, SIZE, stream=True)


def test_both_kinds_say_the_same_about_the_images(root: Path) -> None:
    whole, streamed = both(root)
    assert torch.equal(whole.labels, streamed.labels)
    for name in ("name", "class_names", "num_classes", "official_test", "image_shape"):
        assert getattr(whole, name) == getattr(streamed, name)
    assert splits_of(whole).hash == splits_of(streamed).hash
    assert Augmentation.for_images(whole) == Augmentation.for_images(streamed)


def test_the_other_splits_are_in_memory_and_the_same(root: Path) -> None:
    whole, streamed = both(root)
    splits = splits_of(whole)
    expected, found = (source.tensor_data(splits, open_test=True) for source in (whole, streamed))
    for name in ("gate", "val", "test"):
        assert torch.equal(found.images(name), expected.images(name))
        assert torch.equal(found.labels(name), expected.labels(name))
        assert torch.equal(found.ids(name), expected.ids(name))
    with pytest.raises(ValueError, match="train"):
        found.images("train")
    with pytest.raises(ValueError, match="sealed"):
        streamed.tensor_data(splits).images("test")


def test_the_training_split_has_the_same_images_and_labels(root: Path) -> None:
    whole, streamed = both(root)
    splits = splits_of(whole)
    expected, found = (source.training_images(splits, AUGMENTATION) for source in (whole, streamed))
    assert isinstance(expected, InMemoryImages)
    assert isinstance(found, StreamedImages)
    assert torch.equal(expected.labels, found.labels)
    rows = [torch.arange(len(expected.labels))]
    clean, again = (next(iter(images.clean(rows, torch.device("cpu")))) for images in (expected, found))
    assert torch.equal(clean, again)
    assert whole.normalization(splits) == streamed.normalization(splits) == Normalization.from_images(clean)


def test_normalisation_of_a_large_set_is_that_of_a_fixed_sample(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, streamed = both(root)
    splits = splits_of(whole)
    monkeypatch.setattr(sources, "NUM_NORMALIZATION_IMAGES", 8)
    sampled = streamed.normalization(splits)
    assert sampled == load_source("image_folder", root, SIZE, stream=True).normalization(splits)
    assert sampled != whole.normalization(splits)
    assert np.allclose(sampled.mean, whole.normalization(splits).mean, atol=10)


def test_streaming_decodes_no_training_image_before_it_is_needed(root: Path) -> None:
    source = load_source("image_folder", root, SIZE, stream=True)
    splits = splits_of(source)
    broken = source.training_images(splits, AUGMENTATION)
    assert isinstance(broken, StreamedImages)
    Path(broken.files[2]).write_bytes(b"no image")
    source.tensor_data(splits, open_test=True)
    with pytest.raises(DataError, match="the image does not decode"):
        list(broken.clean([torch.arange(4)], torch.device("cpu")))


def test_the_fingerprint_follows_the_files_but_not_their_place(root: Path) -> None:
    first = load_source("image_folder", root, SIZE, stream=True).fingerprint
    moved = root.parent / "moved"
    shutil.copytree(root, moved)  # keeps the files' times
    assert load_source("image_folder", moved, SIZE, stream=True).fingerprint == first
    assert load_source("image_folder", root, SIZE + 4, stream=True).fingerprint != first
    assert load_source("image_folder", root, SIZE).fingerprint != first
    os.utime(root / "bee" / "03.png", ns=(1, 1))
    assert load_source("image_folder", root, SIZE, stream=True).fingerprint != first


def test_decoded_images_are_cached_in_the_order_asked_for(root: Path, tmp_path: Path) -> None:
    listing, cache = list_image_folder(root), ImageCache(tmp_path / "own")
    first = decode_images(listing, [30, 2], SIZE, cache)
    assert torch.equal(decode_images(listing, np.array([2, 30]), SIZE, cache, num_threads=1), first.flip(0))
    listing.files[2].unlink()
    assert torch.equal(decode_images(listing, [30, 2], SIZE, cache), first)
    with pytest.raises(DataError, match=r"ape/02\.png: cannot be read"):
        decode_images(listing, [2], SIZE, cache)


def test_train_and_test_folders_give_an_official_test_part(tmp_path: Path) -> None:
    for part, count in (("train", 30), ("test", 2)):
        for name in ("ape", "bee"):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (9, 9), (number, 0, 0)).save(tmp_path / part / name / f"{number:02d}.png")
    source = StreamedFolder(list_image_folder(tmp_path), SIZE, cache=ImageCache(tmp_path / "cache"))
    assert source.official_test is not None
    assert source.official_test.tolist() == [False] * 60 + [True] * 4
    assert source.labels.tolist() == [0] * 30 + [1] * 30 + [0, 0, 1, 1]
    assert source.tensor_data(splits_of(source), open_test=True).num_images("test") == 4


def test_what_cannot_be_streamed_is_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.stream: only an image_folder can be streamed; digits"):
        load_source("digits", stream=True)
    with pytest.raises(ConfigError, match=r"data\.image_size must be set"):
        load_source("image_folder", root, stream=True)
    with pytest.raises(ConfigError, match=r"data\.image_size is 4, but must be the side of a square or"):
        load_source("image_folder", root, 4, stream=True)


@pytest.mark.parametrize("stream", [False, True])
def test_photos_can_be_read_as_one_channel_of_grey(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setenv("DSNET_CACHE", str(tmp_path / "own"))
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 9, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        file = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    grey, coloured = (
        load_source("image_folder", tmp_path / "photos", 9, stream=stream, options=FileOptions(colour=colour))
        for colour in ("grey", None)
    )
    splits = splits_of(grey)
    assert grey.image_shape == (1, 9, 9)
    assert grey.fingerprint != coloured.fingerprint
    weights = np.array([0.299, 0.587, 0.114])  # ITU-R 601
    expected = (np.concatenate([pixels[::2], pixels[1::2]]) @ weights)[splits.val]
    assert np.abs(grey.tensor_data(splits).images("val")[:, 0].numpy() - expected).max() <= 1
    training = grey.training_images(splits, Augmentation())
    images, _ = next(iter(training.augmented([(torch.tensor([0, 1]), 5)], torch.device("cpu"))))
    assert images.shape == (2, 1, 9, 9)
    assert grey.normalization(splits).mean == pytest.approx((127,), abs=10)
