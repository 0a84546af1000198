"""Registry of data sets by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dsnet.data import cifar10, digits
from dsnet.data.cifar10 import load_cifar10
from dsnet.data.digits import load_digits
from dsnet.data.image_folder import load_image_folder
from dsnet.data.images import ImageSet
from dsnet.data.settings import ImageSize
from dsnet.errors import ConfigError
from dsnet.settings import check_value
from dsnet.wording import way_out

Loader = Callable[[str | Path | None, int | None], ImageSet]
"""Function (path, image_size) -> image set; it may leave the resizing to `load_images`."""

_LOADERS: dict[str, Loader] = {}
_NATIVE_SIZES: dict[str, int] = {}


def register_data_set(name: str, loader: Loader, native_size: int | None = None) -> None:
    """Register a data set under the name that `data.name` may give; to be called at import.

    Args:
        name: The data set's name.
        loader: Function that reads it.
        native_size: Height and width of its images before any resizing; None: the loader decodes
            files at the requested size.

    Raises:
        ConfigError: The name is taken.
    """
    if name in _LOADERS:
        raise ConfigError(f"data set {name!r} is registered already; choose another name")
    _LOADERS[name] = loader
    if native_size is not None:
        _NATIVE_SIZES[name] = native_size


def native_image_size(name: str) -> int | None:
    """Height and width of a data set's images before any resizing.

    None where its files are decoded at the requested size.
    """
    return _NATIVE_SIZES.get(name)


def data_set_names() -> tuple[str, ...]:
    """All registered names, sorted."""
    return tuple(sorted(_LOADERS))


def load_images(name: str, path: str | Path | None = None, image_size: int | None = None) -> ImageSet:
    """Load a data set into memory, decoded.

    Args:
        name: A registered name: digits, cifar10, image_folder, ...
        path: The folder that holds the data; None: the folder in the environment variable
            DSNET_DATA (digits needs none).
        image_size: Height and width in pixels, 8..512, to which the images are resized once, here;
            None: the data's own size.

    Raises:
        ConfigError: The name is unknown, or the size is out of range.
        DataError: A file is missing, truncated or mislabelled; the message names it.
    """
    if name not in _LOADERS:
        raise ConfigError(f"unknown data set {name!r}{way_out(name, data_set_names())}")
    if image_size is not None:
        check_image_size(image_size)
    image_set = _LOADERS[name](path, image_size)
    return image_set if image_size is None else image_set.resized(image_size)


def check_image_size(image_size: int) -> None:
    """Check that an image size lies in the range that networks accept, 8..512 pixels.

    Raises:
        ConfigError: The size is out of range.
    """
    check_value("data.image_size", image_size, ImageSize)


register_data_set("digits", lambda path, _image_size: load_digits(path), digits.IMAGE_SIZE)
register_data_set("cifar10", lambda path, _image_size: load_cifar10(path), cifar10.IMAGE_SIZE)
register_data_set("image_folder", load_image_folder)
