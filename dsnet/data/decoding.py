"""Decoding of image files to RGB, and centred square crops of a given size."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from dsnet.errors import DataError

# Errors that Pillow raises on broken files: they share no base class (a bad PNG chunk is a
# SyntaxError).
_BROKEN_FILE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)

DATA_FORMATS = ("PNG", "JPEG")
"""File formats of data sets."""


def decode_rgb(data: bytes, where: str, formats: Sequence[str] = DATA_FORMATS) -> Image.Image:
    """Decode a whole image file to 8-bit RGB, upright (EXIF orientation applied).

    Args:
        data: The file's bytes.
        where: The image's name in error messages: a file, or a file and a row.
        formats: Pillow's names of the formats that are accepted.

    Raises:
        DataError: The bytes are in none of these formats, are truncated, or hold more than 8 bits a
            channel.
    """
    expected = " or ".join(formats) if len(formats) <= 2 else "image in a format that Pillow reads"
    try:
        with Image.open(io.BytesIO(data), formats=tuple(formats)) as image:
            if image.mode.startswith(("I", "F")):
                # Pillow would silently clip these to white.
                raise DataError(f"{where}: the image has more than 8 bits a channel; convert it to 8-bit PNG or JPEG")
            image.load()
            return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError as error:  # Pillow's text names only the buffer in memory
        raise DataError(f"{where}: the image does not decode: it is no {expected}; replace or remove it") from error
    except _BROKEN_FILE as error:
        raise DataError(
            f"{where}: the image does not decode ({error}); it is truncated or no {expected}: replace or remove it"
        ) from error


def read_rgb(file: Path, formats: Sequence[str] = DATA_FORMATS) -> Image.Image:
    """Read and decode a whole image file to upright 8-bit RGB.

    Raises:
        DataError: The file cannot be read or does not decode; the message names it.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); replace or remove it") from error
    return decode_rgb(content, str(file), formats)


def centre_square(image: Image.Image, image_size: int, crop_fraction: float = 1.0) -> Image.Image:
    """The centre crop that evaluation uses, `image_size` pixels high and wide.

    The shorter side is resized (antialiased bilinear) to image_size / crop_fraction pixels,
    rounded, and a square of `image_size` is cut out of the centre, both in one step: the centre may
    lie between two pixels.

    Args:
        image: The image, of any size.
        image_size: Height and width in pixels.
        crop_fraction: The share of the shorter side that is kept, (0, 1]; models for ImageNet are
            often evaluated with 0.875.
    """
    cut_off = (1 - image_size / round(image_size / crop_fraction)) / 2  # at each edge
    return ImageOps.fit(image, (image_size, image_size), method=Image.Resampling.BILINEAR, bleed=cut_off)
