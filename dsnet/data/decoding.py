"""From the bytes of a PNG or JPEG file to an RGB image, or one clear error."""

from __future__ import annotations

import io
import struct

from PIL import Image, ImageOps, UnidentifiedImageError

from dsnet.errors import DataError

# What Pillow raises on broken files: it has no common base class for them (a bad PNG chunk is a SyntaxError).
_BROKEN_FILE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def decode_rgb(data: bytes, where: str) -> Image.Image:
    """Decode a whole PNG or JPEG file to 8-bit RGB, upright (EXIF orientation applied).

    Args:
        data: The file's bytes.
        where: What the error message calls the image: a file, or a file and a row.

    Raises:
        DataError: The bytes are no PNG or JPEG, are truncated, or hold more than 8 bits a channel.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            if image.mode.startswith(("I", "F")):
                # Pillow would clip these to white in silence.
                raise DataError(f"{where}: the image has more than 8 bits a channel; convert it to 8-bit PNG or JPEG")
            image.load()
            return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError as error:  # Pillow names the memory that holds the bytes
        raise DataError(f"{where}: the image does not decode: it is no PNG or JPEG; replace or remove it") from error
    except _BROKEN_FILE as error:
        raise DataError(
            f"{where}: the image does not decode ({error}); it is truncated or no PNG or JPEG: replace or remove it"
        ) from error
