"""Image folders: `root/class/*.png|jpg|jpeg`, or the same below `root/train` and `root/test`.

A folder is first listed and then decoded: as a whole (`load_image_folder`) or selected images
(`decode_images`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import PIL
import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from dsnet.data.cache import ImageCache, default_cache_folder
from dsnet.data.decoding import centre_square, read_rgb
from dsnet.data.images import ImageSet
from dsnet.data.location import data_root
from dsnet.data.prefetch import in_order
from dsnet.errors import ConfigError, DataError

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg")
_KEY_VERSION = "1"  # raise it when the decoding below changes what it returns
_NAME = "image_folder"
_NUM_AHEAD = 64  # maximum number of decoded images that wait to be collected
_NUM_NAMED = 3  # maximum number of broken files that a message names


@dataclass(frozen=True)
class FolderListing:
    """The files of an image folder in their final order, not decoded; an image's position is its
    permanent id."""

    root: Path
    files: tuple[Path, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...]
    stats: tuple[tuple[int, int], ...]
    """Size in bytes and modification time in ns of each file."""
    num_test: int | None
    """Number of files of the official test part, which come last; None where there is none."""

    @property
    def official_test(self) -> Bool[np.ndarray, " images"] | None:
        """bool [N]: the images of the official test part; None where there is none."""
        num_images = len(self.files)
        return None if self.num_test is None else np.arange(num_images) >= num_images - self.num_test

    @cached_property
    def names(self) -> list[str]:
        """The files' paths relative to the root, with `/` as the separator."""
        return [file.relative_to(self.root).as_posix() for file in self.files]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names, sizes and modification times; hashing the content would mean reading
        every file.

        The root's own path is not included: a folder that is moved with its times preserved counts
        as the same data.
        """
        return _digest([_KEY_VERSION, list(self.class_names), self.num_test, self.names, self.stats])


def load_image_folder(
    path: str | Path | None = None,
    image_size: int | None = None,
    cache: ImageCache | None = None,
    crop_fraction: float = 1.0,
) -> ImageSet:
    """Load a folder of images as uint8 [N, 3, image_size, image_size], RGB.

    Classes are the sub-folders, sorted by name; the images of a class are sorted by name too and
    decoded as by `decode_file`. Where `root/train` and `root/test` both exist, `test` is the
    official test part. Hidden folders and other files are ignored.

    Args:
        path: The root folder; None: the folder in the environment variable DSNET_DATA.
        image_size: Height and width in pixels; required, since the files vary in size.
        cache: Cache of decoded pixels; None: the user's cache folder.
        crop_fraction: As for `decode_file`.

    Raises:
        ConfigError: No image_size is given.
        DataError: A folder is missing or empty, train and test differ in their classes, or a file
            does not decode.
    """
    image_size = required_size(image_size)
    listing = list_image_folder(path)
    ids = np.arange(len(listing.files))
    cache = cache or ImageCache(default_cache_folder())
    content: list[object] = [listing.num_test, listing.names, listing.stats]
    return cache.load_or_make(
        _NAME,
        _cache_key(listing, image_size, crop_fraction, content),
        lambda: _decode(listing, ids, image_size, crop_fraction, num_threads=2),
    )


def required_size(image_size: int | None) -> int:
    """Return `image_size`, which an image folder requires.

    Raises:
        ConfigError: It is None.
    """
    if image_size is None:
        raise ConfigError(
            "data.image_size must be set for the data set 'image_folder' (e.g. 32): its files vary in size"
        )
    return image_size


def list_image_folder(path: str | Path | None = None) -> FolderListing:
    """List a folder of images without decoding any.

    Args:
        path: The root folder; None: the folder in the environment variable DSNET_DATA.

    Raises:
        DataError: A folder is missing or empty, or train and test differ in their classes.
    """
    root = data_root(_NAME, path)
    if not root.is_dir():
        raise DataError(f"{root}: not a folder; data.path must be the folder that holds one folder per class")
    train, test = root / "train", root / "test"
    if not (train.is_dir() and test.is_dir()):
        return _listing(root, _classes(root))
    train_classes, test_classes = _classes(train), _classes(test)
    differing = sorted(train_classes.keys() ^ test_classes.keys())
    if differing:
        present, absent = (train, test) if differing[0] in train_classes else (test, train)
        raise DataError(
            f"{present / differing[0]}: this class is missing in {absent}; both need the same class folders"
        )
    return _listing(root, train_classes, test_classes)


def _listing(
    root: Path, classes: dict[str, list[Path]], test_classes: dict[str, list[Path]] | None = None
) -> FolderListing:
    parts = [classes] if test_classes is None else [classes, test_classes]
    files = tuple(file for part in parts for members in part.values() for file in members)
    labels = tuple(label for part in parts for label, members in enumerate(part.values()) for _ in members)
    num_test = None if test_classes is None else sum(map(len, test_classes.values()))
    return FolderListing(root, files, labels, tuple(classes), tuple(map(_stat, files)), num_test)


def _classes(folder: Path) -> dict[str, list[Path]]:
    """Class name -> its image files, both sorted by name."""
    classes: dict[str, list[Path]] = {}
    for class_folder in sorted(_entries(folder), key=lambda entry: entry.name):
        if not class_folder.is_dir() or class_folder.name.startswith("."):
            continue
        files = [entry for entry in _entries(class_folder) if _is_image(entry)]
        if not files:
            below = [
                entry
                for entry in sorted(_entries(class_folder))
                if entry.is_dir() and any(map(_is_image, _entries(entry)))
            ]
            if len(below) > 1:
                raise DataError(
                    f"{class_folder}: holds no images but class folders ({below[0].name}, ...); "
                    f"pass --data {class_folder} (data.path) if these are the classes"
                )
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
    return entry.suffix.lower() in IMAGE_EXTENSIONS and not entry.name.startswith(".")


def _stat(file: Path) -> tuple[int, int]:
    try:
        status = file.stat()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); replace or remove it") from error
    return status.st_size, status.st_mtime_ns


def decode_images(
    listing: FolderListing,
    ids: Sequence[int] | Int64[np.ndarray, " images"],
    image_size: int,
    cache: ImageCache | None = None,
    num_threads: int = 2,
    crop_fraction: float = 1.0,
) -> UInt8[Tensor, "images 3 size size"]:
    """Decode selected images of a folder for evaluation; the result is cached.

    Args:
        listing: The folder.
        ids: Ids of the images, at least one.
        image_size: Height and width in pixels.
        cache: Cache of decoded pixels; None: the user's cache folder.
        num_threads: Decoding threads, >= 1.
        crop_fraction: As for `decode_file`.

    Returns:
        uint8 [len(ids), 3, image_size, image_size], in the order of `ids`.

    Raises:
        DataError: A file does not decode; the message names it.
    """
    ids = np.asarray(ids, dtype=np.int64)
    cache = cache or ImageCache(default_cache_folder())
    content = [[listing.names[row], listing.stats[row]] for row in ids.tolist()]
    key = _cache_key(listing, image_size, crop_fraction, ["some images", content])
    return cache.load_or_make(_NAME, key, lambda: _decode(listing, ids, image_size, crop_fraction, num_threads)).images


def decode_file(file: Path, image_size: int, crop_fraction: float = 1.0) -> UInt8[np.ndarray, "3 size size"]:
    """Decode one image for evaluation: uint8 [3, image_size, image_size], RGB, cropped by
    `centre_square`.

    Args:
        file: A PNG or JPEG file.
        image_size: Height and width in pixels.
        crop_fraction: Share of the shorter side that is kept, (0, 1].

    Raises:
        DataError: The file cannot be read or does not decode; the message names it.
    """
    return np.asarray(centre_square(read_rgb(file), image_size, crop_fraction)).transpose(2, 0, 1)


def _cache_key(listing: FolderListing, image_size: int, crop_fraction: float, content: list[object]) -> str:
    crop: list[object] = [] if crop_fraction == 1 else ["crop_fraction", crop_fraction]
    return _digest([_KEY_VERSION, PIL.__version__, str(listing.root.resolve()), image_size, *crop, *content])


def _digest(content: list[object]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _decode(
    listing: FolderListing, ids: np.ndarray, image_size: int, crop_fraction: float, num_threads: int
) -> ImageSet:
    pixels = np.empty((len(ids), 3, image_size, image_size), dtype=np.uint8)
    files = [listing.files[row] for row in ids.tolist()]
    decode = partial(_decoded_or_error, image_size=image_size, crop_fraction=crop_fraction)
    broken: list[DataError] = []
    with closing(in_order(decode, files, num_threads=num_threads, num_ahead=_NUM_AHEAD)) as decoded:
        for row, image in enumerate(decoded):
            if isinstance(image, DataError):
                broken.append(image)
            else:
                pixels[row] = image
    if broken:
        raise _all_broken(broken, len(files))
    labels = torch.tensor(listing.labels, dtype=torch.int64)[torch.tensor(ids)]
    official_test = listing.official_test
    is_test = None if official_test is None else official_test[ids]
    return ImageSet.create(_NAME, torch.from_numpy(pixels), labels, listing.class_names, is_test)


def _decoded_or_error(file: Path, image_size: int, crop_fraction: float) -> np.ndarray | DataError:
    """The decoded image, or the error as a value, so that one message can list all broken files."""
    try:
        return decode_file(file, image_size, crop_fraction)
    except DataError as error:
        return error


def _all_broken(errors: Sequence[DataError], num_files: int) -> DataError:
    if len(errors) == 1:
        return errors[0]
    more = f"; and {len(errors) - _NUM_NAMED} more" if len(errors) > _NUM_NAMED else ""
    return DataError(
        f"{len(errors)} of {num_files} images cannot be used: " + "; ".join(map(str, errors[:_NUM_NAMED])) + more
    )
