"""Images in one folder per class: `root/class/*.png|jpg|jpeg`, or the same below `root/train` and `root/test`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps

from dsnet.data.cache import ImageCache, default_cache_folder
from dsnet.data.decoding import decode_rgb
from dsnet.data.images import ImageSet
from dsnet.data.location import data_root
from dsnet.errors import ConfigError, DataError

_EXTENSIONS = (".png", ".jpg", ".jpeg")
_KEY_VERSION = "1"  # raise it when the decoding below changes what it returns


@dataclass(frozen=True)
class _Listing:
    """The files of a set in their final order."""

    files: tuple[Path, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...]
    num_test: int | None
    """How many of the last files are the official test part; None where there is none."""


def load_image_folder(
    path: str | Path | None = None, image_size: int | None = None, cache: ImageCache | None = None
) -> ImageSet:
    """Load a folder of images as uint8 [N, 3, image_size, image_size], RGB.

    Classes are the sub-folders in the order of their names, images are in the order of theirs. An image is decoded
    once, its shorter side resized to `image_size` (antialiased bilinear), and the centre cut out. Where `root/train`
    and `root/test` both exist, `test` is the official test part. Hidden folders and other files are passed over.

    Args:
        path: The root folder; None: DSNET_DATA.
        image_size: Height and width in pixels; the files have no size in common, so it must be given.
        cache: Where decoded pixels are kept; None: the user's cache folder.

    Raises:
        ConfigError: No image_size.
        DataError: A folder is missing or empty, train and test differ in their classes, or a file does not decode.
    """
    if image_size is None:
        raise ConfigError(
            "data.image_size must be set for the data set 'image_folder' (e.g. 32): its files vary in size"
        )
    root = data_root("image_folder", path)
    if not root.is_dir():
        raise DataError(f"{root}: not a folder; data.path must be the folder that holds one folder per class")
    listing = _list_images(root)
    cache = cache or ImageCache(default_cache_folder())
    key = _listing_key(root, listing, image_size)
    return cache.load_or_make("image_folder", key, lambda: _decode(listing, image_size))


def _list_images(root: Path) -> _Listing:
    train, test = root / "train", root / "test"
    if not (train.is_dir() and test.is_dir()):
        return _listing(_classes(root), num_test=None)
    train_classes, test_classes = _classes(train), _classes(test)
    differing = sorted(train_classes.keys() ^ test_classes.keys())
    if differing:
        present, absent = (train, test) if differing[0] in train_classes else (test, train)
        raise DataError(
            f"{present / differing[0]}: this class is missing in {absent}; both need the same class folders"
        )
    listing = _listing(train_classes, num_test=None)
    tests = _listing(test_classes, num_test=None)
    return _Listing(
        listing.files + tests.files, listing.labels + tests.labels, listing.class_names, num_test=len(tests.files)
    )


def _listing(classes: dict[str, list[Path]], num_test: int | None) -> _Listing:
    files = [file for members in classes.values() for file in members]
    labels = [label for label, members in enumerate(classes.values()) for _ in members]
    return _Listing(tuple(files), tuple(labels), tuple(classes), num_test)


def _classes(folder: Path) -> dict[str, list[Path]]:
    """Class name -> its image files, both in order."""
    classes: dict[str, list[Path]] = {}
    for class_folder in sorted(_entries(folder), key=lambda entry: entry.name):
        if not class_folder.is_dir() or class_folder.name.startswith("."):
            continue
        files = [entry for entry in _entries(class_folder) if _is_image(entry)]
        if not files:
            raise DataError(f"{class_folder}: this class folder holds no .png, .jpg or .jpeg; fill or remove it")
        classes[class_folder.name] = sorted(files, key=lambda entry: entry.name)
    if len(classes) < 2:
        raise DataError(
            f"{folder}: found {len(classes)} class folder(s) ({', '.join(classes) or 'none'}), at least 2 are needed: "
            "lay the images out as root/class/*.png"
        )
    return classes


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}); check its permissions") from error


def _is_image(entry: Path) -> bool:
    return entry.suffix.lower() in _EXTENSIONS and not entry.name.startswith(".")


def _listing_key(root: Path, listing: _Listing, image_size: int) -> str:
    """sha256 over names, sizes and modification times: hashing the content would cost as much as reading it all."""
    stats = [_stat(file) for file in listing.files]
    names = [file.relative_to(root).as_posix() for file in listing.files]
    content = [_KEY_VERSION, PIL.__version__, str(root.resolve()), image_size, listing.num_test, names, stats]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _stat(file: Path) -> tuple[int, int]:
    try:
        status = file.stat()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); replace or remove it") from error
    return status.st_size, status.st_mtime_ns


def _decode(listing: _Listing, image_size: int) -> ImageSet:
    num_images = len(listing.files)
    pixels = np.empty((num_images, 3, image_size, image_size), dtype=np.uint8)
    for row, file in enumerate(listing.files):
        pixels[row] = _decode_file(file, image_size)
    labels = torch.tensor(listing.labels, dtype=torch.int64)
    is_test = None if listing.num_test is None else np.arange(num_images) >= num_images - listing.num_test
    return ImageSet.create("image_folder", torch.from_numpy(pixels), labels, listing.class_names, is_test)


def _decode_file(file: Path, image_size: int) -> np.ndarray:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); replace or remove it") from error
    image = ImageOps.fit(decode_rgb(content, str(file)), (image_size, image_size), method=Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1)
