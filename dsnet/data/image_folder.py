"""Image folders: a folder for each class, or such folders for each part, or a table of labels.

A folder is first listed (`dsnet.data.layouts` says which layouts are understood) and then decoded:
as a whole (`load_image_folder`) or selected images (`decode_images`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path, PurePosixPath

import numpy as np
import PIL
import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from dsnet.data.cache import ImageCache, default_cache_folder
from dsnet.data.decoding import centre_crop, check_regular, planes, read_rgb
from dsnet.data.images import ImageSet
from dsnet.data.label_tables import layout_of_table
from dsnet.data.layouts import Layout, find_layout
from dsnet.data.location import data_root
from dsnet.data.prefetch import in_order
from dsnet.data.registry import DEFAULT_OPTIONS, IMAGE_FOLDER
from dsnet.data.settings import CHANNELS, FileOptions
from dsnet.errors import ConfigError, DataError
from dsnet.image_size import ImageSize, height_and_width

_KEY_VERSION = "1"  # raise it when the decoding below changes what it returns
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
    num_val: int | None = None
    """Number of files of the official validation part, which come before those of the test part;
    None where there is none."""
    notes: tuple[str, ...] = ()
    """Sentences about the layout and about files that are not used."""
    skipped: tuple[tuple[str, str], ...] = ()
    """Name and reason of each broken image that was left out (`data.skip_broken`)."""
    channels: int = 3
    """Channels to which images are decoded: 3 is RGB, 1 grey."""

    @property
    def official_test(self) -> Bool[np.ndarray, " images"] | None:
        """bool [N]: the images of the official test part; None where there is none."""
        num_images = len(self.files)
        return None if self.num_test is None else np.arange(num_images) >= num_images - self.num_test

    @property
    def official_val(self) -> Bool[np.ndarray, " images"] | None:
        """bool [N]: the images of the official validation part; None where there is none."""
        if self.num_val is None:
            return None
        end = len(self.files) - (self.num_test or 0)
        ids = np.arange(len(self.files))
        return (ids >= end - self.num_val) & (ids < end)

    @cached_property
    def names(self) -> list[str]:
        """The files' paths relative to the root, with `/` as the separator."""
        return [file.relative_to(self.root).as_posix() for file in self.files]

    @cached_property
    def further_content(self) -> list[object]:
        """The parts, labels and channels that do not follow from the names of the images; empty
        for class folders of RGB images with or without a test part."""
        own: list[object] = [] if self.num_val is None else ["val", self.num_val]
        own += [] if self.channels == 3 else ["channels", self.channels]
        labelled = zip(self.names, self.labels, strict=True)
        if not all(self.class_names[label] in PurePosixPath(name).parts for name, label in labelled):
            own += ["labels", list(self.labels), list(self.class_names)]
        return own

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names, sizes and modification times; hashing the content would mean reading
        every file.

        The root's own path is not included: a folder that is moved with its times preserved counts
        as the same data.
        """
        content = [list(self.class_names), self.num_test, self.names, self.stats]
        return _digest([_KEY_VERSION, *content, *self.further_content])

    def without(self, broken: Mapping[int, str]) -> FolderListing:
        """The listing without some images.

        Args:
            broken: Position -> reason.
        """
        kept = [row for row in range(len(self.files)) if row not in broken]
        total, num_test, num_val = len(self.files), self.num_test or 0, self.num_val or 0
        fewer_test = sum(row >= total - num_test for row in broken)
        fewer_val = sum(total - num_test - num_val <= row < total - num_test for row in broken)
        return replace(
            self,
            files=tuple(self.files[row] for row in kept),
            labels=tuple(self.labels[row] for row in kept),
            stats=tuple(self.stats[row] for row in kept),
            num_test=None if self.num_test is None else num_test - fewer_test,
            num_val=None if self.num_val is None else num_val - fewer_val,
            skipped=(*self.skipped, *((self.names[row], reason) for row, reason in sorted(broken.items()))),
        )

    def in_words(self) -> tuple[str, ...]:
        """Sentences about the layout, what becomes of each part, and files that are not used."""
        notes = list(self.notes)
        num_train = len(self.files) - (self.num_val or 0) - (self.num_test or 0)
        if self.num_val is not None:
            use = (
                f"gives val; test ({self.num_test:,}) gives test"
                if self.num_test is not None
                else "is divided into val and test, because there is no test part with labels"
            )
            notes.insert(
                0,
                f"The data has parts: train ({num_train:,}) is divided into train and gate; validation ({self.num_val:,}) {use}.",
            )
        elif self.num_test is not None:
            notes.insert(
                0,
                f"The data has parts: train ({num_train:,}) is divided into train, gate and val; test ({self.num_test:,}) gives test.",
            )
        if self.skipped:
            named = "; ".join(f"{name}: {reason}" for name, reason in self.skipped)
            notes.append(f"Skipped, because broken ({len(self.skipped)}): {named}.")
        return tuple(notes)


def load_image_folder(
    path: str | Path | None = None,
    image_size: ImageSize | None = None,
    cache: ImageCache | None = None,
    crop_fraction: float = 1.0,
    options: FileOptions = DEFAULT_OPTIONS,
) -> ImageSet:
    """Load a folder of images as uint8 [N, channels, height, width].

    Classes are sorted by name, and so are the images of a class; parts follow each other in the
    order train, val, test. Images are decoded as by `decode_file`.

    Args:
        path: The root folder; None: the folder in the environment variable DSNET_DATA.
        image_size: Size of the decoded images; required, since the files vary in size.
        cache: Cache of decoded pixels; None: the user's cache folder.
        crop_fraction: As for `decode_file`.
        options: Which files are images, and how many may be broken.

    Raises:
        ConfigError: No image_size is given.
        DataError: As `list_image_folder`, or a file does not decode.
    """
    image_size = required_size(image_size)
    cache = cache or ImageCache(default_cache_folder())
    listing = list_image_folder(path, options, cache)
    ids = np.arange(len(listing.files))
    content: list[object] = [listing.num_test, listing.names, listing.stats, *listing.further_content]
    images = cache.load_or_make(
        IMAGE_FOLDER,
        _cache_key(listing, image_size, crop_fraction, content),
        lambda: _decode(listing, ids, image_size, crop_fraction, num_threads=2),
    )
    return replace(images, notes=listing.in_words())


def load(path: str | Path | None, image_size: ImageSize | None, options: FileOptions) -> ImageSet:
    """The loader of the registry."""
    return load_image_folder(path, image_size, options=options)


def required_size(image_size: ImageSize | None) -> ImageSize:
    """Return `image_size`, which an image folder requires.

    Raises:
        ConfigError: It is None.
    """
    if image_size is None:
        raise ConfigError(
            "data.image_size must be set for the data set 'image_folder' (e.g. 32, or [24, 48] for height and width): its files vary in "
            "size"
        )
    return image_size


def list_image_folder(
    path: str | Path | None = None, options: FileOptions = DEFAULT_OPTIONS, cache: ImageCache | None = None
) -> FolderListing:
    """List a folder of images; none is decoded, unless broken ones are to be skipped.

    Args:
        path: The root folder; None: the folder in the environment variable DSNET_DATA.
        options: Which files are images, and how many may be broken.
        cache: Keeps the list of broken images; None: the user's cache folder.

    Raises:
        DataError: A folder is missing or empty, the classes or labels cannot be told, the parts
            differ in their classes, or more images are broken than may be.
    """
    root = data_root(IMAGE_FOLDER, path)
    if not root.is_dir():
        raise DataError(f"{root}: not a folder; data.path must be the folder that holds one folder per class")
    if options.labels is None:
        layout = find_layout(root, options.include)
    else:
        layout = layout_of_table(root, options.labels, options.columns, options.include)
    listing, broken = _listing(root, layout)
    listing = replace(listing, channels=CHANNELS[options.colour or "rgb"])
    if options.skip_broken:
        return _without_broken(listing, broken, options.skip_broken, cache or ImageCache(default_cache_folder()))
    if broken:
        raise next(iter(broken.values()))
    return listing


def _listing(root: Path, layout: Layout) -> tuple[FolderListing, dict[int, DataError]]:
    """The listing, and the position of each file that cannot be read, with the error."""
    parts = layout.parts
    files = tuple(file for classes in parts.values() for members in classes.values() for file in members)
    labels = tuple(
        label for classes in parts.values() for label, members in enumerate(classes.values()) for _ in members
    )
    sizes = {part: sum(map(len, classes.values())) for part, classes in parts.items()}
    broken: dict[int, DataError] = {}
    stats = []
    for row, file in enumerate(files):
        try:
            stats.append(_stat(file))
        except DataError as error:
            stats.append((0, 0))
            broken[row] = error
    listing = FolderListing(
        root,
        files,
        labels,
        tuple(parts["train"]),
        tuple(stats),
        sizes.get("test"),
        sizes.get("val"),
        layout.notes,
    )
    return listing, broken


def _stat(file: Path) -> tuple[int, int]:
    try:
        status = file.stat()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); replace or remove it") from error
    check_regular(file, status)
    return status.st_size, status.st_mtime_ns


def _without_broken(
    listing: FolderListing, unreadable: Mapping[int, DataError], limit: int, cache: ImageCache
) -> FolderListing:
    """The listing without the images that do not decode, of which there may be `limit`.

    Every image is decoded once for that; the result is kept in the cache.
    """
    key = _digest(["broken", PIL.__version__, str(listing.root.resolve()), listing.names, listing.stats])
    found = cache.load_or_make_json(f"{IMAGE_FOLDER}-broken", key, lambda: _broken_images(listing, unreadable))
    broken = {int(row): str(reason) for row, reason in found.items()}
    if len(broken) > limit:
        errors = [DataError(reason) for reason in broken.values()]
        more = f"data.skip_broken is {limit}; make it larger, or replace or remove them"
        raise DataError(f"{_all_broken(errors, len(listing.files))}; {more}")
    reasons = {row: text.removeprefix(f"{listing.files[row]}: ") for row, text in broken.items()}
    return listing.without({row: text.partition("; ")[0] for row, text in reasons.items()})


def _broken_images(listing: FolderListing, unreadable: Mapping[int, DataError]) -> dict[str, str]:
    """Position -> message of each image that cannot be read or does not decode."""
    attempt = partial(_decoded_or_error, image_size=8, crop_fraction=1.0, channels=3)
    with closing(in_order(attempt, listing.files, num_threads=2, num_ahead=_NUM_AHEAD)) as decoded:
        return {
            str(row): str(unreadable.get(row, image))
            for row, image in enumerate(decoded)
            if row in unreadable or isinstance(image, DataError)
        }


def decode_images(
    listing: FolderListing,
    ids: Sequence[int] | Int64[np.ndarray, " images"],
    image_size: ImageSize,
    cache: ImageCache | None = None,
    num_threads: int = 2,
    crop_fraction: float = 1.0,
) -> UInt8[Tensor, "images channels height width"]:
    """Decode selected images of a folder for evaluation; the result is cached.

    Args:
        listing: The folder.
        ids: Ids of the images, at least one.
        image_size: Size of the decoded images.
        cache: Cache of decoded pixels; None: the user's cache folder.
        num_threads: Decoding threads, >= 1.
        crop_fraction: As for `decode_file`.

    Returns:
        uint8 [len(ids), channels, height, width], in the order of `ids`.

    Raises:
        DataError: A file does not decode; the message names it.
    """
    ids = np.asarray(ids, dtype=np.int64)
    cache = cache or ImageCache(default_cache_folder())
    content = [[listing.names[row], listing.stats[row]] for row in ids.tolist()]
    key = _cache_key(listing, image_size, crop_fraction, ["some images", content, *listing.further_content])
    return cache.load_or_make(
        IMAGE_FOLDER, key, lambda: _decode(listing, ids, image_size, crop_fraction, num_threads)
    ).images


def decode_file(
    file: Path, image_size: ImageSize, crop_fraction: float = 1.0, channels: int = 3
) -> UInt8[np.ndarray, "channels height width"]:
    """Decode one image for evaluation: uint8 [channels, height, width], cropped by `centre_crop`.

    Args:
        file: An image file in any format that Pillow reads.
        image_size: Size of the decoded images.
        crop_fraction: As for `centre_crop`.
        channels: 3: RGB; 1: grey.

    Raises:
        DataError: The file cannot be read or does not decode; the message names it.
    """
    return planes(centre_crop(read_rgb(file), image_size, crop_fraction), channels)


def _cache_key(listing: FolderListing, image_size: ImageSize, crop_fraction: float, content: list[object]) -> str:
    crop: list[object] = [] if crop_fraction == 1 else ["crop_fraction", crop_fraction]
    return _digest([_KEY_VERSION, PIL.__version__, str(listing.root.resolve()), image_size, *crop, *content])


def _digest(content: list[object]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _decode(
    listing: FolderListing, ids: np.ndarray, image_size: ImageSize, crop_fraction: float, num_threads: int
) -> ImageSet:
    pixels = np.empty((len(ids), listing.channels, *height_and_width(image_size)), dtype=np.uint8)
    files = [listing.files[row] for row in ids.tolist()]
    decode = partial(_decoded_or_error, image_size=image_size, crop_fraction=crop_fraction, channels=listing.channels)
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
    parts = [None if part is None else part[ids] for part in (listing.official_test, listing.official_val)]
    return ImageSet.create(IMAGE_FOLDER, torch.from_numpy(pixels), labels, listing.class_names, *parts)


def _decoded_or_error(file: Path, image_size: ImageSize, crop_fraction: float, channels: int) -> np.ndarray | DataError:
    """The decoded image, or the error as a value, so that one message can list all broken files."""
    try:
        return decode_file(file, image_size, crop_fraction, channels)
    except DataError as error:
        return error


def _all_broken(errors: Sequence[DataError], num_files: int) -> DataError:
    if len(errors) == 1:
        return errors[0]
    more = f"; and {len(errors) - _NUM_NAMED} more" if len(errors) > _NUM_NAMED else ""
    return DataError(
        f"{len(errors)} of {num_files} images cannot be used: " + "; ".join(map(str, errors[:_NUM_NAMED])) + more
    )
