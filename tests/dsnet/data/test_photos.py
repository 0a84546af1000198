"""Photos become the very pixels that the data pipeline makes of the same files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dsnet.data.cache import ImageCache
from dsnet.data.image_folder import load_image_folder
from dsnet.data.images import resize_images
from dsnet.data.photos import PhotoDecoder, photo_files
from dsnet.errors import DataError
from dsnet.image_size import ImageSize, height_and_width

RGB = PhotoDecoder(channels=3, native_size=16, image_size=16)
ORIENTATION = 0x0112


def picture(height: int = 40, width: int = 24, channels: int = 3, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze())


def save(image: Image.Image, path: Path, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize(("size", "crop_fraction"), [(16, 1.0), (16, 0.875), ((12, 20), 0.875)])
def test_a_photo_is_decoded_to_the_bits_that_training_sees(
    tmp_path: Path, size: ImageSize, crop_fraction: float
) -> None:
    turned = Image.Exif()
    turned[ORIENTATION] = 6
    save(picture(seed=1), tmp_path / "data/a/tall.jpg", exif=turned)
    save(picture(20, 90, seed=2), tmp_path / "data/a/wide.png")
    save(picture(channels=1, seed=3), tmp_path / "data/b/grey.png")
    save(picture(channels=4, seed=4), tmp_path / "data/b/with-alpha.png")
    save(picture(seed=5).convert("P"), tmp_path / "data/b/palette.png")
    save(picture(5, 7, seed=6), tmp_path / "data/b/tiny.png")
    images = load_image_folder(tmp_path / "data", size, ImageCache(tmp_path / "cache"), crop_fraction).images
    decode = PhotoDecoder.of_data("image_folder", (3, *height_and_width(size)), crop_fraction)
    files = photo_files([tmp_path / "data"])
    assert [file.name for file in files] == [
        "tall.jpg",
        "wide.png",
        "grey.png",
        "palette.png",
        "tiny.png",
        "with-alpha.png",
    ]
    assert torch.equal(torch.stack([decode(file) for file in files]), images)


@pytest.mark.parametrize(("name", "mode", "native"), [("cifar10", "RGB", 32), ("digits", "L", 8)])
def test_a_file_with_an_image_of_a_data_set_of_fixed_size_gives_that_image(
    tmp_path: Path, name: str, mode: str, native: int
) -> None:
    channels = len(mode)
    image = picture(native, native, channels)
    own = torch.from_numpy(np.asarray(image).copy().reshape(native, native, channels).transpose(2, 0, 1))
    file = save(image, tmp_path / "image.png")
    assert torch.equal(PhotoDecoder.of_data(name, (channels, native, native))(file), own)
    enlarged = PhotoDecoder.of_data(name, (channels, 3 * native, 3 * native))
    assert torch.equal(enlarged(file), resize_images(own[None], 3 * native)[0])
    oblong = PhotoDecoder.of_data(name, (channels, native, 2 * native))
    assert torch.equal(oblong(file), resize_images(own[None], (native, 2 * native))[0])


@pytest.mark.parametrize("suffix", ["bmp", "gif", "webp", "tiff"])
def test_formats_that_training_does_not_read_are_read_too(tmp_path: Path, suffix: str) -> None:
    image = Image.new("RGB", (30, 20), (200, 10, 60))
    pixels = RGB(save(image, tmp_path / f"photo.{suffix}", **({"lossless": True} if suffix == "webp" else {})))
    assert torch.equal(pixels, torch.tensor([200, 10, 60], dtype=torch.uint8)[:, None, None].expand(3, 16, 16))


def test_the_suffix_does_not_matter_for_a_file_that_is_named(tmp_path: Path) -> None:
    file = save(picture(), tmp_path / "photo.png")
    other = file.rename(tmp_path / "photo")
    assert photo_files([other]) == [other]
    assert RGB(other).shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"no picture", "is no image"), (b"", "the file is empty"), (b"%!PS-Adobe-3.0 EPSF-3.0\n", "is no image")],
)
def test_a_file_that_is_no_image_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "note.jpg"
    file.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        RGB(file)
    assert str(file) in str(caught.value)


def test_a_truncated_file_and_a_missing_one_are_named(tmp_path: Path) -> None:
    whole = save(picture(200, 200), tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"half\.jpg.*truncated"):
        RGB(tmp_path / "half.jpg")
    with pytest.raises(DataError, match=r"gone\.jpg: cannot be read"):
        RGB(tmp_path / "gone.jpg")


def test_a_folder_stands_for_its_images_by_name_and_without_hidden_or_other_files(tmp_path: Path) -> None:
    for name in ("b.png", "a.PNG", "below/c.jpg", ".hidden.png"):
        save(picture(), tmp_path / name, format="png")
    (tmp_path / "notes.txt").write_text("not a photo")
    assert [file.relative_to(tmp_path).as_posix() for file in photo_files([tmp_path])] == [
        "a.PNG",
        "b.png",
        "below/c.jpg",
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        photo_files([tmp_path / "empty"])


def test_a_decoder_survives_json() -> None:
    for shape in ((3, 64, 64), (3, 24, 48)):
        decoder = PhotoDecoder.of_data("image_folder", shape, 0.875)
        assert PhotoDecoder.from_json(json.loads(json.dumps(decoder.to_json()))) == decoder


def test_images_of_other_channels_are_refused() -> None:
    with pytest.raises(DataError, match="have 4 channels"):
        PhotoDecoder.of_data("image_folder", (4, 16, 16))
