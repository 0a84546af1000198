"""Data sets of the hub in parquet files, written as `datasets` writes them: CIFAR-100,
Fashion-MNIST, MNIST, SVHN."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dsnet.data.cache import ImageCache
from dsnet.data.cifar10 import CLASS_NAMES, holds_cifar10, load_cifar10
from dsnet.data.hub_parquet import load_parquet
from dsnet.data.images import ImageSet
from dsnet.data.photos import PhotoDecoder
from dsnet.data.settings import Augmentation, Columns, FileOptions
from dsnet.errors import ConfigError, DataError
from dsnet.image_size import ImageSize, height_and_width

DIGITS = tuple("0123456789")


def pixels(seed: int, size: ImageSize = 28, channels: int = 1) -> np.ndarray:
    shape = height_and_width(size) if channels == 1 else (*height_and_width(size), channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def write(
    file: Path,
    images: Sequence[np.ndarray],
    labels: Mapping[str, Sequence[Any]],
    names: Mapping[str, Sequence[str]] | None = None,
    image: str = "image",
) -> None:
    """A shard with the metadata of `datasets`."""
    columns: dict[str, Any] = {image: [{"bytes": encoded(each), "path": f"{n}.png"} for n, each in enumerate(images)]}
    table = pa.table(columns | dict(labels))
    if names is not None:
        features: dict[str, Any] = {image: {"_type": "Image"}}
        features |= {column: {"names": list(each), "_type": "ClassLabel"} for column, each in names.items()}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file)


def load(folder: Path, size: ImageSize | None = None, cache: Path | None = None, **options: Any) -> ImageSet:
    return load_parquet(folder, size, FileOptions(**options), ImageCache(cache or folder / "cache"))


def mnist(root: Path) -> Path:
    write(
        root / "mnist/train-00000-of-00002.parquet",
        [pixels(n) for n in range(3)],
        {"label": [0, 1, 2]},
        {"label": DIGITS},
    )
    write(
        root / "mnist/train-00001-of-00002.parquet",
        [pixels(n) for n in range(3, 5)],
        {"label": [3, 4]},
        {"label": DIGITS},
    )
    write(root / "mnist/test-00000-of-00001.parquet", [pixels(9)], {"label": [9]}, {"label": DIGITS})
    (root / "README.md").touch()
    return root


def test_mnist_has_one_channel_the_names_of_its_metadata_and_its_test_part(tmp_path: Path) -> None:
    images = load(mnist(tmp_path))
    assert images.class_names == DIGITS
    assert images.image_shape == (1, 28, 28)
    assert np.array_equal(images.images[:, 0].numpy(), np.stack([pixels(n) for n in (0, 1, 2, 3, 4, 9)]))
    assert images.labels.tolist() == [0, 1, 2, 3, 4, 9]
    assert images.official_test is not None
    assert images.official_test.tolist() == [False] * 5 + [True]
    assert images.notes[0] == "The files give train 5, test 1 images; the columns are image and label."
    assert not Augmentation.for_images(images).flip, "mirrored digits are no digits"
    assert load(tmp_path).fingerprint == images.fingerprint  # from the cache


def test_colour_and_size_can_be_chosen_and_a_photo_is_read_the_same_way(tmp_path: Path) -> None:
    mnist(tmp_path)
    coloured = load(tmp_path, 16, colour="rgb")
    assert coloured.image_shape == (3, 16, 16)
    file = tmp_path / "digit.png"
    Image.fromarray(pixels(4)).save(file)
    for images in (coloured, load(tmp_path, 16), load(tmp_path)):
        assert torch.equal(PhotoDecoder.of_data("parquet", images.image_shape)(file), images.images[4])


def test_cifar100_has_fine_labels_or_those_that_are_named(tmp_path: Path) -> None:
    names = {"fine_label": ("apple", "bee", "cup"), "coarse_label": ("food", "animals")}
    labels = {"fine_label": [2, 0], "coarse_label": [1, 0]}
    for part in ("train", "test"):
        write(tmp_path / f"{part}.parquet", [pixels(n, 32, 3) for n in range(2)], labels, names, image="img")
    fine = load(tmp_path)
    assert (fine.class_names, fine.labels.tolist(), fine.image_shape) == (
        names["fine_label"],
        [2, 0, 2, 0],
        (3, 32, 32),
    )
    assert "Other labels (data.columns.label): coarse_label." in fine.notes
    coarse = load(tmp_path, columns=Columns(label="coarse_label"))
    assert (coarse.class_names, coarse.labels.tolist()) == (("food", "animals"), [1, 0, 1, 0])


def svhn(root: Path, names: Mapping[str, Sequence[str]] | None) -> Path:
    for split in ("train", "test", "extra"):
        images = [pixels(n, 32, 3) for n in range(10)]
        write(root / f"cropped_digits/{split}-00000-of-00001.parquet", images, {"label": range(10)}, names)
    return root / "cropped_digits"


@pytest.mark.parametrize("names", [{"label": DIGITS}, None])
def test_svhn_is_not_called_cifar10(tmp_path: Path, names: Mapping[str, Sequence[str]] | None) -> None:
    folder = svhn(tmp_path, names)
    assert not holds_cifar10(folder)
    images = load(folder, cache=tmp_path / "cache")
    assert images.class_names == DIGITS
    assert images.num_images == 20
    assert images.notes[-1] == "Not used: extra."
    if names is not None:
        with pytest.raises(
            DataError, match=r"not CIFAR-10: its 10 classes are 0, 1, 2, \.\.\.; set data\.name to parquet"
        ):
            load_cifar10(folder, ImageCache(tmp_path / "cache"))


def test_cifar10_is_known_by_its_class_names_or_the_paths_of_its_images(tmp_path: Path) -> None:
    write(tmp_path / "a/train.parquet", [pixels(0, 32, 3)], {"label": [0]}, {"label": CLASS_NAMES})
    assert holds_cifar10(tmp_path / "a")
    table = pa.table({"img": [{"bytes": encoded(pixels(0, 32, 3)), "path": "frog/1.png"}], "label": [6]})
    (tmp_path / "b").mkdir()
    pq.write_table(table, tmp_path / "b" / "train.parquet")
    assert holds_cifar10(tmp_path / "b")


def test_folders_of_parts_other_names_and_texts_as_labels(tmp_path: Path) -> None:
    for part, count in (("train", 4), ("validation", 2)):
        table = pa.table(
            {
                "photo": [encoded(pixels(n, 9, 3)) for n in range(count)],
                "id": range(count),
                "species": ["oak", "elm"] * (count // 2),
            }
        )
        (tmp_path / "default" / part).mkdir(parents=True)
        pq.write_table(table, tmp_path / "default" / part / "0000.parquet")
    with pytest.raises(
        DataError, match=r"which column is the label\? .*species \(string\); name it with data\.columns\.label"
    ):
        load(tmp_path)
    images = load(tmp_path, columns=Columns(label="species"))
    assert (images.class_names, images.labels.tolist()) == (("elm", "oak"), [1, 0, 1, 0, 1, 0])
    assert images.official_val is not None
    assert images.official_val.tolist() == [False] * 4 + [True] * 2
    assert images.official_test is None


def test_a_part_without_labels_is_said_and_not_used(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [pixels(n) for n in range(2)], {"label": [0, 1]}, {"label": ("a", "b")})
    write(tmp_path / "test.parquet", [pixels(5)], {"label": [-1]}, {"label": ("a", "b")})
    images = load(tmp_path)
    assert (images.num_images, images.official_test) == (2, None)
    assert images.notes[-1] == "Not used: test (no labels)."


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no parquet files in it or below it"),
        (
            {"a/train.parquet": 1, "b/train.parquet": 1},
            r"several folders hold parquet files.*set data\.path to one of .*/a, .*/b",
        ),
        ({"train-00000-of-00002.parquet": 1}, r"shard 00001 of the train split is missing"),
        ({"test.parquet": 1, "extra.parquet": 1}, r"no train\*\.parquet \(found extra\.parquet, test\.parquet\)"),
        ({"train.parquet": 1, "val.parquet": 1, "validation.parquet": 1}, r"the val part is there more than once"),
    ],
)
def test_files_that_make_no_data_set_are_told(tmp_path: Path, files: dict[str, int], message: str) -> None:
    for name in files:
        write(tmp_path / name, [pixels(0)], {"label": [0]})
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_images_that_are_no_squares_are_read_as_they_are_or_cut_to_a_size(tmp_path: Path) -> None:
    file = tmp_path / "train.parquet"
    write(file, [pixels(n, (20, 30)) for n in range(3)], {"label": [0, 1, 1]})
    whole = load(tmp_path)
    assert whole.image_shape == (1, 20, 30)
    assert np.array_equal(whole.images[:, 0].numpy(), np.stack([pixels(n, (20, 30)) for n in range(3)]))
    photo = tmp_path / "photo.png"
    Image.fromarray(pixels(2, (20, 30))).save(photo)
    for size, shape in ((None, (1, 20, 30)), (10, (1, 10, 10)), ((20, 10), (1, 20, 10))):
        images = load(tmp_path, size)
        assert images.image_shape == shape
        assert torch.equal(PhotoDecoder.of_data("parquet", shape)(photo), images.images[2])
    assert np.array_equal(images.images[2, 0].numpy(), pixels(2, (20, 30))[:, 10:20]), "the centre, not squeezed"
    write(file, [pixels(0, (20, 30)), pixels(1, (30, 20))], {"label": [0, 1]})
    with pytest.raises(
        ConfigError, match=r"row 1: the image has 30 x 20 pixels \(height x width\), the first one 20 x 30"
    ):
        load(tmp_path)


def test_damage_is_told_with_its_file_and_row(tmp_path: Path) -> None:
    file = tmp_path / "train.parquet"
    write(file, [pixels(0), pixels(1)], {"label": [0, 7]}, {"label": ("a", "b")})
    with pytest.raises(DataError, match=r"train\.parquet, row 1: label 7 is outside 0\.\.1"):
        load(tmp_path)
    write(file, [pixels(0), pixels(1, 20)], {"label": [0, 1]})
    with pytest.raises(ConfigError, match=r"data\.image_size must be set .*row 1: the image has 20 x 20 pixels"):
        load(tmp_path)
    assert load(tmp_path, 16).image_shape == (1, 16, 16)
    pq.write_table(pa.table({"image": [b"text", b"more"], "label": [0, 1]}), file)
    with pytest.raises(
        DataError, match=r"train\.parquet, row 0: the image does not decode: it is no image .* but text"
    ):
        load(tmp_path)
    file.write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"train\.parquet: not a whole parquet file"):
        load(tmp_path)
    write(file, [pixels(0)], {"label": [0]})
    with pytest.raises(DataError, match=r"data\.columns\.image: no column 'imag'; did you mean 'image'\?"):
        load(tmp_path, columns=Columns(image="imag"))
