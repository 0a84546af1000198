"""Image folders made in a temporary folder, whole and broken."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dsnet.data.cache import ImageCache
from dsnet.data.decoding import decode_rgb
from dsnet.data.image_folder import decode_file, list_image_folder, load_image_folder
from dsnet.data.images import ImageSet
from dsnet.data.normalization import Normalization
from dsnet.data.registry import load_images
from dsnet.data.settings import Augmentation
from dsnet.data.sources import load_source
from dsnet.data.splits import Splits
from dsnet.errors import ConfigError, DataError

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def save(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (12, 12)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, quality=95)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with two classes, three kinds of file names, and files to ignore."""
    root = tmp_path / "images"
    save(root / "cats" / "b.png", GREEN)
    save(root / "cats" / "a.JPG", RED)
    save(root / "dogs" / "c.jpeg", BLUE, (30, 20))
    (root / "cats" / "notes.txt").write_text("not an image")
    (root / "cats" / ".a.png").write_text("not an image either")
    (root / ".git").mkdir()
    (root / "README.md").write_text("read me")
    return root


def load(root: Path, image_size: int = 8) -> ImageSet:
    return load_image_folder(root, image_size, ImageCache(root.parent / "cache"))


def colours(image_set: ImageSet) -> list[tuple[int, ...]]:
    """The mean colour of each image, rounded to 0 or 255 (JPEG is lossy)."""
    means = image_set.images.float().mean(dim=(2, 3))
    return [tuple(int(value > 128) * 255 for value in mean) for mean in means]


def test_classes_and_files_are_read_in_the_order_of_their_names(root: Path) -> None:
    image_set = load(root)
    assert image_set.class_names == ("cats", "dogs")
    assert image_set.labels.tolist() == [0, 0, 1]
    assert colours(image_set) == [RED, GREEN, BLUE]
    assert image_set.image_shape == (3, 8, 8)
    assert image_set.official_test is None


def test_an_image_is_resized_by_its_shorter_side_and_its_centre_cut_out(root: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 60, 3), dtype=np.uint8)
    wide = Image.fromarray(noise)
    wide.save(root / "cats" / "b.png")
    expected = np.asarray(wide.resize((30, 10), Image.Resampling.BILINEAR))[:, 10:20]
    assert np.array_equal(load(root, 10).images[1].permute(1, 2, 0).numpy(), expected)


def noise_files(root: Path) -> list[Image.Image]:
    """Noise of several shapes in place of the folder's images, in its order."""
    shutil.rmtree(root)
    rng = np.random.default_rng(1)
    shapes = [(32, 64), (64, 32), (48, 48), (32, 32)]
    images = [Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in shapes]
    for number, image in enumerate(images):
        file = root / ("cats" if number < 2 else "dogs") / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file)
    return images


def resized_and_cut(image: Image.Image, covered: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Resize until `covered` (height, width) is covered, and cut, in two steps, for shapes without
    rounding."""
    factor = max(covered[0] / image.height, covered[1] / image.width)
    whole = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BILINEAR)
    height, width = size
    left, top = (whole.width - width) // 2, (whole.height - height) // 2
    return np.asarray(whole.crop((left, top, left + width, top + height))).transpose(2, 0, 1)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("size", "covered"), [((14, 14), (16, 16)), ((14, 28), (16, 32)), ((28, 14), (32, 16))])
def test_a_smaller_crop_is_the_centre_of_the_image_resized_to_cover_its_size(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stream: bool,
    size: tuple[int, int],
    covered: tuple[int, int],
) -> None:
    monkeypatch.setenv("DSNET_CACHE", str(tmp_path / "own"))
    expected = np.stack([resized_and_cut(image, covered, size) for image in noise_files(root)])
    source = load_source("image_folder", root, size, stream=stream, crop_fraction=0.875)
    assert source.image_shape == (3, *size)
    ids = np.arange(4)
    splits = Splits(train=ids, gate=ids, val=ids, test=ids)
    val = source.tensor_data(splits).images("val")
    assert np.abs(val.numpy() - expected.astype(int)).max() <= 1  # the order of the two passes rounds once more
    clean = source.training_images(splits, Augmentation()).clean([torch.tensor([2, 0])], torch.device("cpu"))
    assert torch.equal(next(iter(clean)), val[[2, 0]])
    assert source.normalization(splits) == Normalization.from_images(val)


def test_the_resized_side_is_rounded_and_the_centre_exact(root: Path) -> None:
    image = noise_files(root)[0]
    cut = (64 - 32) / 2, 0.0
    inside = 32 * (1 - 10 / 11) / 2  # 10 / 0.875 = 11.43 pixels
    box = (cut[0] + inside, inside, 64 - cut[0] - inside, 32 - inside)
    expected = np.asarray(image.resize((10, 10), Image.Resampling.BILINEAR, box=box), dtype=int).transpose(2, 0, 1)
    assert np.abs(decode_file(root / "cats" / "0.png", 10, 0.875) - expected).max() <= 1


def test_only_another_crop_has_another_key(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSNET_CACHE", str(tmp_path / "own"))
    noise_files(root)
    for stream in (False, True):
        plain, whole, half = (
            load_source("image_folder", root, 8, stream=stream, **crop)
            for crop in ({}, {"crop_fraction": 1}, {"crop_fraction": 0.5})
        )
        assert plain.fingerprint == whole.fingerprint != half.fingerprint
    listing = list_image_folder(root)
    content = [listing.num_test, listing.names, listing.stats]
    before = hashlib.sha256(json.dumps(["1", PIL.__version__, str(root.resolve()), 8, *content]).encode()).hexdigest()
    names = {file.name for file in (tmp_path / "own").rglob("*.safetensors")}
    assert len(names) == 2
    assert any(before[:16] in name for name in names)


@pytest.mark.parametrize("crop_fraction", [0, -0.5, 1.1, float("nan"), True])
def test_a_crop_outside_the_image_is_refused(root: Path, crop_fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"data\.crop_fraction is .*, but must be "):
        load_source("image_folder", root, 8, crop_fraction=crop_fraction)


def test_other_data_is_not_cropped() -> None:
    with pytest.raises(ConfigError, match=r"data\.crop_fraction: only an image_folder is cropped; remove 0\.5"):
        load_source("digits", crop_fraction=0.5)


def test_train_and_test_folders_give_an_official_test_part(tmp_path: Path) -> None:
    root = tmp_path / "images"
    save(root / "train" / "cats" / "1.png", RED)
    save(root / "train" / "dogs" / "1.png", GREEN)
    save(root / "test" / "cats" / "1.png", BLUE)
    save(root / "test" / "dogs" / "2.png", RED)
    image_set = load(root)
    assert image_set.labels.tolist() == [0, 1, 0, 1]
    assert image_set.official_test is not None
    assert image_set.official_test.tolist() == [False, False, True, True]
    assert colours(image_set) == [RED, GREEN, BLUE, RED]


def test_grey_transparent_and_palette_images_become_rgb(root: Path) -> None:
    Image.new("L", (9, 9), 77).save(root / "cats" / "b.png")
    Image.new("RGBA", (9, 9), (*BLUE, 255)).save(root / "dogs" / "d.png")
    Image.new("RGB", (9, 9), GREEN).convert("P").save(root / "dogs" / "e.png")
    image_set = load(root)
    assert image_set.images[1].unique().tolist() == [77]
    assert colours(image_set)[3:] == [BLUE, GREEN]


def test_a_photograph_taken_sideways_is_turned_upright(root: Path) -> None:
    image = Image.new("RGB", (20, 20), RED)
    image.paste(Image.new("RGB", (20, 10), BLUE), (0, 0))  # blue above red
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(root / "cats" / "a.JPG", quality=95, exif=exif)
    upright = load(root, 20).images[0]
    assert upright[:, 2:8].float().mean(dim=(1, 2)).argmax() == 0  # red above
    assert upright[:, 12:18].float().mean(dim=(1, 2)).argmax() == 2


def test_a_folder_is_decoded_once_and_again_when_a_file_changes(root: Path) -> None:
    first = load(root)
    (root / "cats" / "a.JPG").chmod(0o644)
    assert load(root).fingerprint == first.fingerprint
    assert len(list((root.parent / "cache").rglob("*.safetensors"))) == 1
    save(root / "cats" / "a.JPG", BLUE)
    os.utime(root / "cats" / "a.JPG", ns=(1, 1))
    assert colours(load(root))[0] == BLUE
    assert load(root, 16).image_shape == (3, 16, 16)


def test_the_folder_may_come_from_the_environment(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSNET_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("DSNET_DATA", str(root))
    assert load_images("image_folder", image_size=8).fingerprint == load(root).fingerprint
    monkeypatch.setenv("IMAGES_HERE", str(root))
    assert load_images("image_folder", "$IMAGES_HERE", image_size=8).fingerprint == load(root).fingerprint


def test_the_image_size_must_be_given(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.image_size must be set"):
        load_images("image_folder", root)


def test_a_truncated_jpeg_is_named(root: Path) -> None:
    file = root / "dogs" / "c.jpeg"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(
        DataError, match=r"dogs/c\.jpeg: the image does not decode: the file is truncated; replace or remove it"
    ):
        load(root)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", b"GIF89a\x01\x00\x01\x00"])
def test_a_file_that_is_no_image_is_named(root: Path, content: bytes) -> None:
    (root / "cats" / "b.png").write_bytes(content)
    with pytest.raises(DataError, match=r"cats/b\.png: the image does not decode") as told:
        load(root)
    assert "object at 0x" not in str(told.value)


def test_all_broken_images_are_counted_and_the_first_ones_named(root: Path) -> None:
    broken = [root / "cats" / f"broken{number}.png" for number in range(5)]
    for file in broken:
        file.write_bytes(b"not an image")
    listing = list_image_folder(root)
    with pytest.raises(DataError) as told:
        load(root)
    message = str(told.value)
    assert message.startswith(
        f"5 of {len(listing.files)} images cannot be used: {broken[0]}: the image does not decode"
    )
    assert [str(file) in message for file in broken] == [True, True, True, False, False]
    assert message.endswith("; and 2 more")


def test_a_broken_link_is_named(root: Path) -> None:
    (root / "cats" / "z.png").symlink_to(root / "gone.png")
    with pytest.raises(DataError, match=r"cats/z\.png: cannot be read"):
        load(root)


def test_an_empty_class_folder_is_named(root: Path) -> None:
    (root / "mice").mkdir()
    with pytest.raises(DataError, match=r"mice: this class folder holds no images; put images of the class there"):
        load(root)


def test_a_folder_with_one_class_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "images" / "cats" / "a.png", RED)
    with pytest.raises(DataError, match=r"found 1 class folder\(s\) \(cats\), at least 2 are needed"):
        load(tmp_path / "images")


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_class_that_only_one_part_has_is_named(tmp_path: Path, part: str) -> None:
    root = tmp_path / "images"
    for folder in ("train", "test"):
        for name in ("cats", "dogs"):
            save(root / folder / name / "1.png", RED)
    save(root / part / "mice" / "1.png", RED)
    with pytest.raises(DataError, match=f"{part}/mice: this class is missing in"):
        load(root)


def test_a_path_to_a_file_is_refused(root: Path) -> None:
    with pytest.raises(DataError, match=r"README\.md: not a folder"):
        load(root / "README.md")


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


@settings(max_examples=150, deadline=None)
@given(content=st.sampled_from([encoded("PNG"), encoded("JPEG")]), data=st.data())
def test_a_damaged_image_decodes_or_is_a_data_error_and_nothing_else(content: bytes, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(content) - 1))
    end = data.draw(st.integers(position, len(content)))
    damaged = content[:position] + data.draw(st.binary(max_size=8)) + content[end:]
    try:
        image = decode_rgb(damaged, "damaged.png")
    except DataError as error:
        assert str(error).startswith("damaged.png: the image")  # noqa: PT017 (either outcome is right)
    else:
        assert image.mode == "RGB"
