"""One rule for every image file: formats, transparency, 16 bits, limits, and the true reason of a
refusal."""

from __future__ import annotations

import io
import os
import struct
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from dsnet.data.cache import ImageCache
from dsnet.data.decoding import decode_rgb, image_suffixes, is_stored_grey, read_rgb
from dsnet.data.image_folder import list_image_folder, load_image_folder
from dsnet.data.photos import PhotoDecoder
from dsnet.data.settings import FileOptions
from dsnet.data.sources import load_source
from dsnet.errors import DataError

COLOUR = (200, 10, 60)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


@pytest.mark.parametrize(
    "suffix", ["webp", "tif", "tiff", "bmp", "gif", "jfif", "jp2", "ppm", "tga", "ico", "apng", "avif"]
)
def test_images_of_every_format_are_read_from_a_folder_and_at_prediction(tmp_path: Path, suffix: str) -> None:
    if f".{suffix}" not in image_suffixes():
        pytest.skip(f"this Pillow does not read .{suffix}")
    image = Image.new("RGB", (16, 16), COLOUR)
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        kind = {"jfif": "JPEG", "apng": "PNG"}.get(suffix)
        image.save(
            tmp_path / "photos" / name / f"1.{suffix.upper()}", kind, **({"lossless": True} if suffix == "webp" else {})
        )
    images = load_image_folder(tmp_path / "photos", 16, ImageCache(tmp_path / "cache")).images
    assert np.abs(images.numpy().astype(int) - np.array(COLOUR)[:, None, None]).max() <= 3
    photo = PhotoDecoder.of_data("image_folder", (3, 16, 16))(tmp_path / "photos" / "a" / f"1.{suffix.upper()}")
    assert np.array_equal(photo.numpy(), images[0].numpy())


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_of_sixteen_bits_the_upper_eight_count(kind: str) -> None:
    values = np.arange(0, 65536, 257, dtype=np.uint16)[:256].reshape(16, 16)
    pixels = np.asarray(decode_rgb(encoded(Image.fromarray(values), kind), "grey"))
    assert np.array_equal(pixels, np.repeat((values // 256)[:, :, None], 3, axis=2))


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG written by hand."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_sixteen_bits_of_a_colour_are_reduced_as_those_of_grey() -> None:
    values = np.random.default_rng(0).integers(0, 65536, (4, 5), dtype=np.uint16)
    grey = png(5, 4, 16, 0, b"".join(b"\0" + row.astype(">u2").tobytes() for row in values))
    colour = png(5, 4, 16, 2, b"".join(b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in values))
    assert np.array_equal(np.asarray(decode_rgb(grey, "grey")), np.asarray(decode_rgb(colour, "colour")))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_without_a_range_are_refused(mode: str) -> None:
    with pytest.raises(
        DataError, match=r"a\.tif: the image holds .* whose range is unknown; convert it to 8 or 16 bits"
    ):
        decode_rgb(encoded(Image.new(mode, (4, 4), 3), "TIFF"), "a.tif")


def test_transparency_is_dropped_and_the_stored_colour_counts() -> None:
    clear = encoded(Image.new("RGBA", (3, 3), (*COLOUR, 0)), "PNG")
    palette = Image.new("P", (3, 3), 1)
    palette.putpalette([0, 0, 0, *COLOUR])
    for content in (clear, encoded(palette, "PNG", transparency=1)):
        assert np.unique(np.asarray(decode_rgb(content, "a")).reshape(-1, 3), axis=0).tolist() == [list(COLOUR)]


@pytest.mark.parametrize("number", [1, 70])
def test_large_texts_in_a_png_do_no_harm(number: int) -> None:
    texts = PngImagePlugin.PngInfo()
    for index in range(number):
        texts.add_text(f"note {index}", "x" * (2_000_000 if number == 1 else 1_000_000), zip=True)
    image = decode_rgb(encoded(Image.new("RGB", (3, 3), COLOUR), "PNG", pnginfo=texts), "a.png")
    assert image.getpixel((1, 1)) == COLOUR


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (encoded(Image.effect_noise((64, 64), 50), "JPEG")[:900], "the file is truncated"),
        (encoded(Image.effect_noise((64, 64), 50), "PNG")[:900], "the file is truncated"),
        (b"", "the file is empty"),
        (
            b"<!DOCTYPE html>\n<html><body>404 Not Found",
            r"it is no image in a format that Pillow reads, but text \('<!DOCTYPE html> <html><body>404",
        ),
        (b"version https://git-lfs.github.com/spec/v1\noid", "it is a pointer of Git LFS"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "it is a HEIC photo"),
        (bytes(range(256)), "it is no image in a format that Pillow reads"),
    ],
)
def test_a_broken_file_is_told_by_its_true_reason(content: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=rf"x\.jpg: the image does not decode: {reason}.*; replace or remove it"):
        decode_rgb(content, "x.jpg")


class TestHostileFiles:
    """Refused within a second, without much memory."""

    @pytest.fixture(autouse=True)
    def _within_a_second(self) -> object:
        start = time.monotonic()
        yield
        assert time.monotonic() - start < 5

    def test_a_named_pipe_and_a_device_are_refused(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            Image.new("RGB", (9, 9)).save(tmp_path / name / "1.png")
        pipe, device = tmp_path / "a" / "2.png", tmp_path / "b" / "2.png"
        os.mkfifo(pipe)
        with pytest.raises(DataError, match=r"a/2\.png: cannot be read \(it is a named pipe, not a file\)"):
            list_image_folder(tmp_path)
        with pytest.raises(DataError, match=r"a/2\.png: cannot be read \(it is a named pipe"):
            read_rgb(pipe)
        device.symlink_to("/dev/zero")
        with pytest.raises(DataError, match=r"b/2\.png: cannot be read \(it is a device, not a file\)"):
            read_rgb(device)
        cache = ImageCache(tmp_path / "cache")
        images = load_image_folder(tmp_path, 8, cache, options=FileOptions(skip_broken=2))
        assert images.num_images == 2
        assert any("a/2.png: cannot be read (it is a named pipe, not a file)" in note for note in images.notes)

    def test_a_file_of_many_gigabytes_is_not_read(self, tmp_path: Path) -> None:
        file = tmp_path / "1.png"
        with file.open("wb") as opened:
            opened.truncate(2**35)
        with pytest.raises(DataError, match=r"it has 32 GiB, more than the limit of 512 MiB"):
            read_rgb(file)

    def test_an_image_of_164_megapixels_is_refused_by_its_header(self) -> None:
        content = png(12_800, 12_800, 8, 2, b"\0")
        with pytest.raises(DataError, match=r"12800 x 12800 pixels, 164 million, more than the limit of 134 million"):
            decode_rgb(content, "large.png")

    @pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
    @pytest.mark.parametrize("side", [12_800, 60_000])
    def test_a_bomb_is_refused_whatever_the_host_program_makes_of_warnings(self, side: int) -> None:
        with pytest.raises(DataError, match=r"more than the limit of 134 million"):
            decode_rgb(png(side, side, 8, 2, b"\0"), "large.png")

    @pytest.mark.parametrize(("width", "height"), [(100_000_000, 1), (1, 100_000_000), (65_537, 9)])
    def test_an_image_with_a_very_long_side_is_refused_by_its_header(self, width: int, height: int) -> None:
        content = png(width, height, 8, 2, b"\0")
        with pytest.raises(
            DataError, match=rf"x\.png: the image has {width} x {height} pixels, but each side may have at most 65,536;"
        ):
            decode_rgb(content, "x.png")

    @pytest.mark.parametrize("reason", ["", "out of memory"])
    def test_a_lack_of_memory_is_an_error_of_the_file(self, monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
        def load(_image: object) -> None:
            raise MemoryError(reason)

        monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
        with pytest.raises(
            DataError,
            match=r"x\.png: the image does not decode: it needs more memory than there is; replace or remove it",
        ):
            decode_rgb(png(3, 3, 8, 2, b"\0"), "x.png")

    def test_a_file_with_a_very_long_side_counts_as_broken(self, tmp_path: Path) -> None:
        root = broken_folder(tmp_path / "photos")
        (root / "a" / "03.png").write_bytes(png(100_000_000, 1, 8, 2, b"\0"))
        listing = list_image_folder(root, FileOptions(skip_broken=2), ImageCache(tmp_path / "cache"))
        assert dict(listing.skipped)["a/03.png"].startswith("the image has 100000000 x 1 pixels")


@pytest.mark.parametrize("host", ["error", "always"])
@pytest.mark.parametrize(("width", "height"), [(10_000, 9_500), (12_800, 12_800)])
def test_pillow_does_not_warn_of_large_images(width: int, height: int, host: str) -> None:
    """Both images are above Pillow's own limit; ours admits the first, which is cut off here."""
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter(host, Image.DecompressionBombWarning)  # type: ignore[arg-type]
        content = png(width, height, 1, 0, b"\0")
        reason = "the file is truncated" if width == 10_000 else "more than the limit of 134 million"
        with pytest.raises(DataError, match=reason):
            decode_rgb(content, "large.png")
        assert is_stored_grey(content)
        assert not shown
        with (
            pytest.warns(Image.DecompressionBombWarning)
            if host == "always"
            else pytest.raises(  # the program's own
                Image.DecompressionBombWarning
            )
        ):
            Image.open(io.BytesIO(png(10_000, 9_500, 1, 0, b"\0")))
    assert limit == Image.MAX_IMAGE_PIXELS


def test_a_large_image_in_an_icon_is_refused_without_a_warning() -> None:
    inner = png(12_800, 12_800, 1, 0, bytes(1601 * 12_800))
    icon = struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22) + inner
    with warnings.catch_warnings(record=True) as shown, pytest.raises(DataError, match=r"does not decode|134 million"):
        decode_rgb(icon, "large.ico")
    assert not [each for each in shown if issubclass(each.category, Image.DecompressionBombWarning)]


def broken_folder(root: Path) -> Path:
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for number in range(12):
            Image.new("RGB", (9, 9), (number, 0, 0)).save(root / name / f"{number:02d}.png")
    (root / "a" / "03.png").write_bytes(b"")
    whole = (root / "b" / "05.png").read_bytes()
    (root / "b" / "05.png").write_bytes(whole[:-25])
    return root


@pytest.mark.parametrize("stream", [False, True])
def test_a_few_broken_images_may_be_skipped_and_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setenv("DSNET_CACHE", str(tmp_path / "own"))
    root = broken_folder(tmp_path / "photos")
    for _ in range(2):  # the second time the list of broken images comes from the cache
        source = load_source("image_folder", root, 8, stream=stream, options=FileOptions(skip_broken=2))
        assert source.labels.tolist() == [0] * 11 + [1] * 11
        assert source.notes[-1] == (
            "Skipped, because broken (2): a/03.png: the image does not decode: the file is empty; "
            "b/05.png: the image does not decode: the file is truncated."
        )
    with pytest.raises(
        DataError, match=r"2 of 24 images cannot be used: .*a/03\.png.*; data\.skip_broken is 1; make it larger"
    ):
        load_source("image_folder", root, 8, stream=stream, options=FileOptions(skip_broken=1))


def test_a_skipped_image_leaves_its_part_smaller(tmp_path: Path) -> None:
    for part in ("train", "val", "test"):
        broken_folder(tmp_path / "photos" / part)
    options = FileOptions(skip_broken=6)
    listing = list_image_folder(tmp_path / "photos", options, ImageCache(tmp_path / "cache"))
    assert (len(listing.files), listing.num_val, listing.num_test) == (66, 22, 22)
    assert listing.official_val is not None
    assert {name.split("/")[0] for name, is_val in zip(listing.names, listing.official_val, strict=True) if is_val} == {
        "val"
    }
