"""CIFAR-10 (Krizhevsky, 2009) from local parquet files or official Python batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dsnet.data.cache import ImageCache, default_cache_folder
from dsnet.data.cifar10_parquet import is_cifar10, read_parquet_split
from dsnet.data.cifar_batches import BatchLayout, Split, read_archive, read_batch_folder
from dsnet.data.images import ImageSet
from dsnet.data.location import data_root
from dsnet.data.parquet_files import find_parquet_files, parquet_key
from dsnet.data.settings import FileOptions
from dsnet.errors import DataError
from dsnet.image_size import ImageSize

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""Class names in label order."""

IMAGE_SIZE = 32
BATCHES = BatchLayout(
    title="CIFAR-10",
    archive="cifar-10-python.tar.gz",
    folder="cifar-10-batches-py",
    train=tuple(f"data_batch_{number}" for number in range(1, 6)),
    test="test_batch",
    meta="batches.meta",
    labels="labels",
    names="label_names",
    class_names=CLASS_NAMES,
)
"""The official batches."""

# Subfolders to search: as unpacked, as cloned from the hub (`plain_text` or `data`), or in a folder
# of its own.
_SUBFOLDERS = (
    "",
    "cifar10",
    BATCHES.folder,
    "plain_text",
    "data",
    f"cifar10/{BATCHES.folder}",
    "cifar10/plain_text",
    "cifar10/data",
)


def load(path: str | Path | None, _image_size: ImageSize | None, _options: FileOptions) -> ImageSet:
    """The loader of the registry."""
    return load_cifar10(path)


def load_cifar10(path: str | Path | None = None, cache: ImageCache | None = None) -> ImageSet:
    """Load CIFAR-10: uint8 [60000, 3, 32, 32], the official train part first, then the official
    test part.

    Args:
        path: The folder with the files, its parent, or `cifar-10-python.tar.gz`; None: the folder
            in the environment variable DSNET_DATA.
        cache: Cache of decoded pixels; None: the user's cache folder.

    Raises:
        DataError: Nothing is found, or a file is missing, truncated or mislabelled; the message
            names it.
    """
    root = data_root("cifar10", path)
    if root.is_file():
        if not root.name.endswith((".tar.gz", ".tgz")):
            raise DataError(
                f"{root}: neither a folder nor {BATCHES.archive}; set data.path to the folder with the files"
            )
        return _of_batches(*read_archive(root, BATCHES))
    cache = cache or ImageCache(default_cache_folder())
    for subfolder in _SUBFOLDERS:
        read = _reader(root / subfolder, cache)
        if read is not None:
            return read()
    raise DataError(
        f"no CIFAR-10 in {root}: looked there and in {', '.join(_SUBFOLDERS[1:])} for train*.parquet "
        f"and test*.parquet, for data_batch_1..5 and for {BATCHES.archive}; set data.path or DSNET_DATA to the folder "
        "that holds one of them"
    )


def holds_cifar10(root: Path) -> bool:
    """Whether a folder or an archive holds CIFAR-10: its official batches, or parquet files that
    say so by their class names or the folders in the paths of their images."""
    if root.is_file():
        return root.name == BATCHES.archive
    names = (*BATCHES.train, BATCHES.meta, BATCHES.archive)
    for below in _SUBFOLDERS:
        if any((root / below / name).exists() for name in names):
            return True
        files = find_parquet_files(root / below, "train")
        if files and is_cifar10(files[0], CLASS_NAMES):
            return True
    return False


def _reader(folder: Path, cache: ImageCache) -> Callable[[], ImageSet] | None:
    """A function that loads CIFAR-10 from the folder, or None if the folder holds none of its
    files.

    Raises:
        DataError: The folder holds the parquet files of only one of the two parts.
    """
    train, test = find_parquet_files(folder, "train"), find_parquet_files(folder, "test")
    if train and test:
        return lambda: _load_parquet(train, test, cache)
    if train or test:
        missing, found = ("test", train) if train else ("train", test)
        raise DataError(f"{folder}: {found[0].name} is there, but {missing}*.parquet is missing; fetch it again")
    if any((folder / name).exists() for name in (*BATCHES.train, BATCHES.test, BATCHES.meta)):
        return lambda: _of_batches(*read_batch_folder(folder, BATCHES))
    archive = folder / BATCHES.archive
    if archive.exists():
        return lambda: _of_batches(*read_archive(archive, BATCHES))
    return None


def _load_parquet(train: list[Path], test: list[Path], cache: ImageCache) -> ImageSet:
    def decode() -> ImageSet:
        return _image_set(
            read_parquet_split(train, CLASS_NAMES, IMAGE_SIZE), read_parquet_split(test, CLASS_NAMES, IMAGE_SIZE)
        )

    images = cache.load_or_make("cifar10", parquet_key({"train": train, "test": test}), decode)
    unnamed = [file for file in (*train, *test) if not is_cifar10(file, CLASS_NAMES)]
    return replace(images, notes=(_about_names(unnamed),)) if unnamed else images


def _about_names(files: Sequence[Path]) -> str:
    """A sentence about parquet files that do not say that they are CIFAR-10."""
    names = ", ".join(f"{label} {name}" for label, name in enumerate(CLASS_NAMES))
    which = ", ".join(file.name for file in files)
    return (
        f"{which}: no names of classes, neither in the metadata nor in the paths of the images; those of CIFAR-10 are assumed ({names}). "
        "For other data, set data.name to parquet."
    )


def _of_batches(train: Split, test: Split, _names: object) -> ImageSet:
    return _image_set(train, test)


def _image_set(train: Split, test: Split) -> ImageSet:
    pixels = np.concatenate([train[0], test[0]])
    labels = np.concatenate([train[1], test[1]])
    is_test = np.repeat([False, True], [len(train[1]), len(test[1])])
    return ImageSet.create("cifar10", torch.from_numpy(pixels), torch.from_numpy(labels), CLASS_NAMES, is_test)
