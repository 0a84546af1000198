"""Decoding of image files to RGB, and centred crops of a given size.

One rule holds wherever an image is read: in training, in evaluation, for photos at prediction and
in a server. The file may be in any format that Pillow reads, whatever its suffix. The first frame
counts, turned upright (EXIF). Transparency is dropped, so that the stored colours count, as in
torchvision. Of 16 bits a channel the upper eight count, in grey as in colour; images of 32-bit
integers or floating-point numbers have no stated range and are refused.
"""

from __future__ import annotations

import io
import os
import re
import stat
import struct
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from dsnet.errors import DataError
from dsnet.image_size import ImageSize, height_and_width, shorter_side
from dsnet.wording import size as size_text

MAX_PIXELS = 2**27
"""Largest width x height of an image that is decoded, 134 million pixels: 400 MB as RGB."""
MAX_SIDE = 2**16
"""Largest width or height of an image that is decoded, 65,536 pixels (a JPEG has at most 65,535).
Pillow needs additional memory for each row and for the pixels of one row."""
MAX_FILE_BYTES = 2**29
"""Largest file that is read as a whole, 512 MiB."""
_LARGE_PIXELS = 2**25
"""Images above this are decoded one at a time, so that the memory does not grow with the
threads."""
_one_large_image = threading.Lock()
_own_limit = threading.Lock()
"""Held while Pillow's limit on the number of pixels is replaced by `MAX_PIXELS`."""
_WARNING = re.compile(rf"Image size \(\d+ pixels\) exceeds limit of {MAX_PIXELS} pixels", re.IGNORECASE)
"""Pillow's warning about an image above `MAX_PIXELS`, which is refused with a `DataError`."""
_ICONS = ("ICO", "ICNS")
"""Formats that hold other images, whose sizes Pillow reads only when it decodes them."""

_UNREADABLE = ("EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF")
"""Formats that are refused: for EPS Pillow starts Ghostscript, which runs the file as a program;
for the others it only knows the file's header."""

# Errors that Pillow raises on broken files: they share no base class (a bad PNG chunk is a
# SyntaxError). The warning is an error where the host program has made it one.
_BROKEN_FILE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    MemoryError,
    struct.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
_WIDE_GREY = ("I;16", "I;16L", "I;16B", "I;16N")
"""Pillow's modes of 16-bit grey images; those of PNG and PGM may also have mode I."""
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
"""Chunks of a PNG that hold text or a colour profile, which decoding does not need."""


@cache
def image_formats() -> tuple[str, ...]:
    """Pillow's names of the image formats that are read."""
    Image.init()
    return tuple(sorted(Image.OPEN.keys() - set(_UNREADABLE)))


@cache
def image_suffixes() -> frozenset[str]:
    """Suffixes of the files that count as images in a folder, in small letters: `.jpg`, ..."""
    formats = image_formats()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def decode_rgb(data: bytes, where: str, formats: Sequence[str] | None = None) -> Image.Image:
    """Decode a whole image file to upright 8-bit RGB.

    Args:
        data: The file's bytes.
        where: The image's name in error messages: a file, or a file and a row.
        formats: Pillow's names of the formats that are accepted; None: `image_formats()`.

    Raises:
        DataError: The bytes are in none of these formats, are truncated, are larger than
            `MAX_PIXELS` or `MAX_SIDE`, need more memory than there is, or hold numbers of 32 bits.
            The message says which.
    """
    formats = image_formats() if formats is None else tuple(formats)
    try:
        return _decode(data, where, formats)
    except UnidentifiedImageError as error:  # Pillow's text names only the buffer in memory
        raise DataError(f"{where}: the image does not decode: {_what_it_is(data)}; replace or remove it") from error
    except _BROKEN_FILE as error:
        if _is_about_texts(error) and (shorter := _without_texts(data)) != data:
            return decode_rgb(shorter, where, formats)
        raise DataError(f"{where}: the image does not decode: {_reason(error)}; replace or remove it") from error


def read_rgb(file: Path, formats: Sequence[str] | None = None) -> Image.Image:
    """Read and decode a whole image file to upright 8-bit RGB.

    Raises:
        DataError: The file cannot be read or does not decode; the message names it.
    """
    return decode_rgb(read_regular_file(file), str(file), formats)


def read_regular_file(file: Path) -> bytes:
    """The bytes of a file.

    Named pipes and devices are never read, because they may not end.

    Raises:
        DataError: The file cannot be read, is no regular file, or is larger than `MAX_FILE_BYTES`;
            the message names it.
    """
    try:
        # Without blocking: opening a named pipe would wait for somebody who writes to it.
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as opened:
            status = os.fstat(descriptor)
            check_regular(file, status)
            return opened.read(status.st_size)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); replace or remove it") from error


def check_regular(file: Path, status: os.stat_result) -> None:
    """Check that a file can be read to its end.

    Raises:
        DataError: It is a named pipe, a device or a folder, or larger than `MAX_FILE_BYTES`.
    """
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFIFO: "a named pipe", stat.S_IFDIR: "a folder", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(status.st_mode), "a device")
        raise DataError(f"{file}: cannot be read (it is {kind}, not a file); replace or remove it")
    if status.st_size > MAX_FILE_BYTES:
        raise DataError(
            f"{file}: cannot be read (it has {size_text(status.st_size)}, more than the limit of {size_text(MAX_FILE_BYTES)}); "
            "replace or remove it"
        )


def _decode(data: bytes, where: str, formats: Sequence[str]) -> Image.Image:
    with _open(data, formats) as image:
        _check_size(image, where)
        with _one_large_image if image.width * image.height > _LARGE_PIXELS else nullcontext():
            with _pillow_limit() if image.format in _ICONS else nullcontext():
                image.load()
            _check_size(image, where)  # of an icon, which may hold a larger image than its header says
            upright = ImageOps.exif_transpose(image)
            wide = upright.mode[0] in "IF"
            return (_upper_eight_bits(upright, image.format, where) if wide else upright).convert("RGB")


def _open(data: bytes, formats: Sequence[str]) -> Image.Image:
    """Read the header of an image file."""
    with _pillow_limit():
        return Image.open(io.BytesIO(data), formats=tuple(formats))


@contextmanager
def _pillow_limit() -> Iterator[None]:
    """Replace Pillow's limit on the number of pixels, from which on it warns, by `MAX_PIXELS`.

    Pillow raises an error above twice its limit. Its warning between the two is not shown, because
    `_check_size` refuses these images. `warnings.catch_warnings` is not used: it changes the
    filters of all threads, and warnings of other code that were shown once would be shown again.
    """
    with _own_limit:
        known = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = MAX_PIXELS
        try:
            if ("ignore", _WARNING, Image.DecompressionBombWarning, None, 0) not in warnings.filters:
                warnings.filterwarnings("ignore", _WARNING.pattern, Image.DecompressionBombWarning)
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = known


def _check_size(image: Image.Image, where: str) -> None:
    """Check that an image is not too large to be decoded.

    Raises:
        DataError: It has more than `MAX_PIXELS` pixels, or a side of more than `MAX_SIDE`.
    """
    width, height = image.size
    num_pixels = width * height
    if num_pixels > MAX_PIXELS:
        raise DataError(
            f"{where}: the image has {width} x {height} pixels, {num_pixels / 1e6:.0f} million, more than the limit of "
            f"{MAX_PIXELS / 1e6:.0f} million; store it smaller or remove it"
        )
    if max(width, height) > MAX_SIDE:
        raise DataError(
            f"{where}: the image has {width} x {height} pixels, but each side may have at most {MAX_SIDE:,}; store it smaller or remove it"
        )


def _upper_eight_bits(image: Image.Image, file_format: str | None, where: str) -> Image.Image:
    """A 16-bit grey image as 8-bit grey: whole numbers 0..65535 divided by 256, rounded down, which
    is what Pillow does with 16-bit colours."""
    if image.mode not in _WIDE_GREY and not (image.mode == "I" and file_format in ("PNG", "PPM")):
        raise DataError(
            f"{where}: the image holds {'floating-point numbers' if image.mode[0] == 'F' else '32-bit whole numbers'}, whose range is "
            "unknown; convert it to 8 or 16 bits a channel"
        )
    return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))


def _reason(error: Exception) -> str:
    """The reason for which an image of a known format does not decode, as a phrase."""
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"it has more than the limit of {MAX_PIXELS / 1e6:.0f} million pixels"
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    text = str(error) or type(error).__name__
    return "the file is truncated" if "truncated" in text.lower() or isinstance(error, EOFError) else text


def _what_it_is(data: bytes) -> str:
    """A phrase about bytes that are no image."""
    if not data:
        return "the file is empty"
    if data[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1", b"ftyphevc"):
        return "it is a HEIC photo, which Pillow does not read"
    if data.startswith((b"version https://git-lfs", b"version https://git-annex")):
        return "it is a pointer of Git LFS, not the file itself (fetch the files with `git lfs pull`)"
    beginning = data[:200]
    try:
        text = beginning.decode("utf-8", errors="strict" if len(data) <= len(beginning) else "ignore")
    except UnicodeDecodeError:
        text = ""
    if text and all(letter.isprintable() or letter.isspace() for letter in text):
        return f"it is no image in a format that Pillow reads, but text ({' '.join(text.split())[:40]!r})"
    return "it is no image in a format that Pillow reads, or its beginning is damaged"


def _is_about_texts(error: Exception) -> bool:
    """Whether Pillow refused a PNG because of the size of its text chunks."""
    text = str(error)
    return "Decompressed data too large" in text or "memory used in text chunks" in text


def _without_texts(data: bytes) -> bytes:
    """A PNG without the chunks that hold texts; other bytes as they are."""
    if not data.startswith(_PNG):
        return data
    kept, position = [_PNG], len(_PNG)
    while position + 12 <= len(data):
        (length,) = struct.unpack(">I", data[position : position + 4])
        end = position + 12 + length
        if data[position + 4 : position + 8] not in _PNG_TEXTS:
            kept.append(data[position:end])
        position = end
    return b"".join(kept)


def is_stored_grey(data: bytes) -> bool:
    """Whether an image file stores one channel, judged by its header; False where it has none."""
    try:
        with _open(data, image_formats()) as image:
            return image.mode in ("1", "L", "I", *_WIDE_GREY)
    except (UnidentifiedImageError, *_BROKEN_FILE):
        return False


def planes(image: Image.Image, channels: int) -> UInt8[np.ndarray, "channels height width"]:
    """The pixels of an RGB image: three planes, or one of grey (ITU-R 601)."""
    if channels == 1:
        return np.asarray(image.convert("L"))[None]
    return np.asarray(image).transpose(2, 0, 1)


def centre_crop(image: Image.Image, image_size: ImageSize, crop_fraction: float = 1.0) -> Image.Image:
    """The centre crop that evaluation uses, of the size `image_size`.

    The image is resized (antialiased bilinear), with its shape kept, until it just covers
    `image_size` / crop_fraction, and `image_size` is cut out of the centre, both in one step: the
    centre may lie between two pixels. For a square that means that the shorter side is resized to
    image_size / crop_fraction pixels, rounded; else the shorter side of `image_size` is what is
    divided and rounded.

    Args:
        image: The image, of any size.
        image_size: The size of the result.
        crop_fraction: The share that is kept of the side that just fits, (0, 1]; models for
            ImageNet are often evaluated with 0.875.
    """
    cut_off = (1 - kept_share(image_size, crop_fraction)) / 2  # at each edge
    height, width = height_and_width(image_size)
    return ImageOps.fit(image, (width, height), method=Image.Resampling.BILINEAR, bleed=cut_off)


def kept_share(image_size: ImageSize, crop_fraction: float) -> float:
    """The share that `centre_crop` keeps of the side that just fits: about `crop_fraction`, so that
    whole pixels are cut off."""
    side = shorter_side(image_size)
    return side / round(side / crop_fraction)
