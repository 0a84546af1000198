"""From the file of a photo to the pixels that a network takes, as the images of its data set were decoded and resized."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dsnet.data.decoding import centre_square, read_rgb
from dsnet.data.images import resize_images
from dsnet.data.registry import native_image_size
from dsnet.errors import DataError

_UNSAFE_FORMATS = ("EPS",)
"""To read EPS Pillow starts Ghostscript, which runs the file as a program."""


@dataclass(frozen=True)
class PhotoDecoder:
    """Decodes photo files of any size to images of one size.

    A photo is turned upright (EXIF), made RGB, and the centre of it resized to `native_size`, in grey where the network takes one
    channel. Where the run's data set has images of a fixed size and was enlarged or reduced, the photo is resized from `native_size`
    to `image_size` in the same second step.
    """

    channels: int
    """3: RGB; 1: grey."""
    native_size: int
    """Height and width in pixels, as the data set's own images have before they are resized."""
    image_size: int
    """Height and width in pixels that the network takes."""
    crop_fraction: float = 1.0
    """The share of the shorter side that is kept, (0, 1]."""

    @classmethod
    def of_data(cls, name: str, image_shape: tuple[int, int, int], crop_fraction: float = 1.0) -> PhotoDecoder:
        """The decoder that treats photos as a data set's images were treated.

        Args:
            name: Of the data set.
            image_shape: (channels, height, width) of the images that the network was trained on.
            crop_fraction: `data.crop_fraction` of the run.

        Raises:
            DataError: The images are neither RGB nor grey.
        """
        channels, image_size, _ = image_shape
        if channels not in (1, 3):
            raise DataError(f"{name}: its images have {channels} channels; photos are decoded to 3 (RGB) or 1 (grey)")
        return cls(channels, native_image_size(name) or image_size, image_size, crop_fraction)

    def __call__(self, file: Path) -> Tensor:
        """One photo as uint8 [channels, image_size, image_size].

        Raises:
            DataError: The file cannot be read or is no image that Pillow reads; the message names it.
        """
        image = centre_square(read_rgb(file, photo_formats()), self.native_size, self.crop_fraction)
        pixels = np.asarray(image.convert("L"))[None] if self.channels == 1 else np.asarray(image).transpose(2, 0, 1)
        photo = torch.from_numpy(pixels.copy())
        return photo if self.native_size == self.image_size else resize_images(photo[None], self.image_size)[0]

    def to_json(self) -> dict[str, Any]:
        """A mapping for `json.dump`."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> PhotoDecoder:
        """The inverse of `to_json`."""
        return cls(**record)


@cache
def photo_formats() -> tuple[str, ...]:
    """Pillow's names of the image formats that photos may have."""
    Image.init()
    return tuple(sorted(Image.OPEN.keys() - set(_UNSAFE_FORMATS)))


def photo_files(paths: Iterable[Path]) -> list[Path]:
    """The photos among files and folders, in order; a folder stands for the images in it and below it, by name.

    Files are taken whatever their name is, whether they exist or not; in folders those whose suffix is one of an image format and
    whose name does not begin with a dot.

    Raises:
        DataError: A folder holds no image.
    """
    files: list[Path] = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        found = [file for file in sorted(path.rglob("*")) if _is_photo(file)]
        if not found:
            raise DataError(f"{path}: the folder holds no image (.jpg, .png, ...); name a folder or a file with photos")
        files += found
    return files


def _is_photo(file: Path) -> bool:
    formats = Image.registered_extensions()
    return not file.name.startswith(".") and formats.get(file.suffix.lower()) in photo_formats() and file.is_file()
