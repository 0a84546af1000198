"""The training split on its way to workers: images in memory through the object store; files of a
streamed folder are looked up on the worker's machine and compared with the driver's."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsnet.data.location import DATA_VARIABLE, data_root
from dsnet.data.registry import IMAGE_FOLDER
from dsnet.data.settings import Augmentation
from dsnet.data.training_images import InMemoryImages, StreamedImages, TrainingImages
from dsnet.errors import DataError


@dataclass(frozen=True)
class SentFiles:
    """A streamed training split, with its files relative to the folder of the data."""

    images: StreamedImages
    """Its `files` are relative to the folder; a file outside the folder has its whole path."""
    path: str | None
    """`data.path`; None: the value of the environment variable DSNET_DATA."""
    digest: str
    """Of the names and sizes of the files on the driver's machine."""

    @classmethod
    def of(cls, images: StreamedImages, path: str | None) -> SentFiles:
        """Describe a split of this machine."""
        root = data_root(IMAGE_FOLDER, path).absolute()
        names = tuple(_below(file, root) for file in images.files)
        return cls(replace(images, files=names), path, _digest(names, root))

    def found_here(self) -> StreamedImages:
        """The split with the files of this machine.

        The folder is `data.path`, or that of this machine's DSNET_DATA if there is no such folder
        here.

        Raises:
            DataError: there is no folder, or its files are others; the message names the machine.
        """
        is_here = self.path is not None and Path(os.path.expandvars(self.path)).expanduser().exists()
        machine = socket.gethostname()
        try:
            root = data_root(IMAGE_FOLDER, self.path if is_here else None).absolute()
            digest = _digest(self.images.files, root)
        except (DataError, OSError) as error:
            raise DataError(
                f"data.path: the machine {machine} of the Ray cluster does not have the images of the driver's machine ({error}); copy "
                f"them to the same path there, or set {DATA_VARIABLE} in the environment of its Ray, or set data.stream: false, so that "
                "they are sent"
            ) from error
        if digest != self.digest:
            raise DataError(
                f"data.path: {root} on the machine {machine} of the Ray cluster has other files than on the driver's machine (their "
                "names or sizes differ); copy the data again, or set data.stream: false, so that it is sent"
            )
        return replace(self.images, files=tuple(str(root / name) for name in self.images.files))


def _below(file: str, root: Path) -> str:
    path = Path(file)
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else file


def _digest(names: Sequence[str], root: Path) -> str:
    """SHA-256 over names and sizes. Times are left out: a copy may have others."""
    facts = "\n".join(f"{(root / name).stat().st_size} {name}" for name in names)
    return hashlib.sha256(facts.encode("utf-8", "surrogateescape")).hexdigest()


def send_images(data: TrainingImages, path: str | None) -> dict[str, Any]:
    """Convert the training split to a form that Ray can send to workers; `receive_images` reverses
    it.

    Args:
        data: the split.
        path: `data.path`, for a split that is streamed.
    """
    import ray

    if isinstance(data, StreamedImages):
        return {"files": SentFiles.of(data, path)}
    if not isinstance(data, InMemoryImages):
        return {"data": data}
    # numpy arrays are shared through the object store without a copy; tensors are not.
    return {"images": ray.put(data.images.numpy()), "labels": ray.put(data.labels.numpy())}


def receive_images(sent: Mapping[str, Any], augmentation: Augmentation) -> TrainingImages:
    """The training split on a worker; images in memory are augmented by `augmentation`.

    Raises:
        DataError: a streamed split is not on this machine as on the driver's.
    """
    import ray
    import torch

    if "files" in sent:
        files: SentFiles = sent["files"]
        return files.found_here()
    if "data" in sent:
        other: TrainingImages = sent["data"]
        return other
    images, labels = (torch.from_numpy(ray.get(sent[name]).copy()) for name in ("images", "labels"))
    return InMemoryImages(images, labels, augmentation)
