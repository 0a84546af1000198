"""CIFAR-100 (Krizhevsky, 2009) from its official Python batches; `data.name: parquet` reads the
files of the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from dsnet.data.cifar_batches import BatchLayout, read_archive, read_batch_folder
from dsnet.data.images import ImageSet
from dsnet.data.location import data_root
from dsnet.data.settings import FileOptions
from dsnet.errors import DataError
from dsnet.image_size import ImageSize

BATCHES = BatchLayout(
    title="CIFAR-100",
    archive="cifar-100-python.tar.gz",
    folder="cifar-100-python",
    train=("train",),
    test="test",
    meta="meta",
    labels="fine_labels",
    names="fine_label_names",
    class_names=None,
)
"""The official batches; the classes are the 100 fine ones."""
_SUBFOLDERS = ("", BATCHES.folder, "cifar100", f"cifar100/{BATCHES.folder}")


def load(path: str | Path | None, _image_size: ImageSize | None, _options: FileOptions) -> ImageSet:
    """The loader of the registry."""
    return load_cifar100(path)


def load_cifar100(path: str | Path | None = None) -> ImageSet:
    """Load CIFAR-100: uint8 [60000, 3, 32, 32], the official train part first, then the official
    test part.

    Args:
        path: The folder with the files, its parent, or `cifar-100-python.tar.gz`; None: the folder
            in the environment variable DSNET_DATA.

    Raises:
        DataError: Nothing is found, or a file is missing, truncated or mislabelled; the message
            names it.
    """
    train, test, class_names = _read(data_root("cifar100", path))
    pixels, labels = (np.concatenate(pair) for pair in zip(train, test, strict=True))
    is_test = np.repeat([False, True], [len(train[1]), len(test[1])])
    return ImageSet.create("cifar100", torch.from_numpy(pixels), torch.from_numpy(labels), class_names, is_test)


def holds_cifar100(root: Path) -> bool:
    """Whether a folder or an archive holds CIFAR-100, judged by file names only."""
    if root.is_file():
        return root.name == BATCHES.archive
    return any(_is_batch_folder(root / below) or (root / below / BATCHES.archive).exists() for below in _SUBFOLDERS)


def _is_batch_folder(folder: Path) -> bool:
    return all((folder / name).is_file() for name in BATCHES.files)


def _read(root: Path) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray], tuple[str, ...]]:
    if root.is_file():
        return read_archive(root, BATCHES)
    for folder in (root / below for below in _SUBFOLDERS):
        if _is_batch_folder(folder):
            return read_batch_folder(folder, BATCHES)
        if (folder / BATCHES.archive).exists():
            return read_archive(folder / BATCHES.archive, BATCHES)
    raise DataError(
        f"no CIFAR-100 in {root}: looked there and in {', '.join(_SUBFOLDERS[1:])} for the files {', '.join(BATCHES.files)} and for "
        f"{BATCHES.archive}; set data.path or DSNET_DATA to the folder that holds them, or data.name to parquet for parquet files"
    )
