"""Decoding of photo files to network inputs, as the network's data set was decoded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from dsnet.data.decoding import centre_crop, decode_rgb, image_suffixes, planes, read_rgb
from dsnet.data.images import resize_images
from dsnet.data.registry import native_image_size
from dsnet.errors import DataError
from dsnet.image_size import ImageSize, image_size_of, normal_size


@dataclass(frozen=True)
class PhotoDecoder:
    """Decodes photo files of any size to images of one size.

    A photo is turned upright (EXIF) and converted to RGB, and its centre is resized to
    `native_size` (`centre_crop`); it becomes grey where the network takes one channel. If the run
    resized a data set whose images have a fixed size, the photo is resized from `native_size` to
    `image_size` in a second step, as those images were.
    """

    channels: int
    """3: RGB; 1: grey."""
    native_size: ImageSize
    """Size of the data set's images before any resizing."""
    image_size: ImageSize
    """Size of the network's input."""
    crop_fraction: float = 1.0
    """See `centre_crop`."""

    @classmethod
    def of_data(cls, name: str, image_shape: tuple[int, int, int], crop_fraction: float = 1.0) -> PhotoDecoder:
        """The decoder that processes photos as the images of a data set were processed.

        Args:
            name: The data set's name.
            image_shape: (channels, height, width) of the images that the network was trained on.
            crop_fraction: `data.crop_fraction` of the run.

        Raises:
            DataError: The images are neither RGB nor grey.
        """
        channels, image_size = image_shape[0], image_size_of(image_shape)
        if channels not in (1, 3):
            raise DataError(f"{name}: its images have {channels} channels; photos are decoded to 3 (RGB) or 1 (grey)")
        return cls(channels, native_image_size(name) or image_size, image_size, crop_fraction)

    def __call__(self, file: Path) -> UInt8[Tensor, "channels height width"]:
        """Decode one photo to uint8 [channels, height, width].

        Raises:
            DataError: The file cannot be read or is no image that Pillow reads; the message names
                it.
        """
        return self.of_photo(read_rgb(file))

    def decode(self, content: bytes, where: str) -> UInt8[Tensor, "channels height width"]:
        """Decode the bytes of one photo file, as a call does for a file.

        Args:
            content: The whole file.
            where: The photo's name in messages.

        Raises:
            DataError: The bytes are no image that Pillow reads.
        """
        return self.of_photo(decode_rgb(content, where))

    def of_photo(self, photo: Image.Image) -> UInt8[Tensor, "channels height width"]:
        """The input of an upright RGB photo of any size."""
        pixels = planes(centre_crop(photo, self.native_size, self.crop_fraction), self.channels)
        decoded = torch.from_numpy(pixels.copy())
        return decoded if self.native_size == self.image_size else resize_images(decoded[None], self.image_size)[0]

    def to_json(self) -> dict[str, Any]:
        """A mapping for `json.dump`."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> PhotoDecoder:
        """Rebuild a decoder from the result of `to_json`, whose sizes JSON may have made lists."""
        sizes = {name: normal_size(record[name]) for name in ("native_size", "image_size")}
        return cls(**{**record, **sizes})


def photo_files(paths: Iterable[Path]) -> list[Path]:
    """Expand files and folders to a list of photo files, in order.

    A folder stands for the images in it and below it, sorted by name: the files with the suffix of
    an image format whose names do not begin with a dot. A path that is not a folder is kept,
    whatever its name and whether or not it exists.

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
    return not file.name.startswith(".") and file.suffix.lower() in image_suffixes() and file.is_file()
