"""Cache of decoded images in the user's cache folder; decoding CIFAR-10 takes seconds.

The cache is neither trusted nor required: its files are checked against their fingerprints, a file
that fails the check is written again, and if the folder cannot be written, images are merely
decoded again at the next start.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dsnet.data.images import ImageSet
from dsnet.errors import StorageError
from dsnet.files import atomic_write_text

CACHE_VARIABLE = "DSNET_CACHE"

_log = logging.getLogger(__name__)


def default_cache_folder() -> Path:
    """The user's cache folder: DSNET_CACHE, else XDG_CACHE_HOME/dsnet-orch, else
    ~/.cache/dsnet-orch."""
    own = os.environ.get(CACHE_VARIABLE)
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(shared) / "dsnet-orch"


@dataclass(frozen=True)
class ImageCache:
    """Cache with one safetensors file per decoded data set; its folder may be deleted."""

    folder: Path

    def load_or_make(self, name: str, key: str, make: Callable[[], ImageSet]) -> ImageSet:
        """Return the cached set, or call `make()` and cache its result.

        Args:
            name: The data set's name, with which the file's name begins.
            key: Hex digest of everything that the decoded pixels depend on.
            make: Decodes the set; its errors are passed on, and nothing is cached then.
        """
        path = self.folder / "data" / f"{name}-{key[:24]}.safetensors"
        image_set = _read(path)
        if image_set is None:
            image_set = make()
            _write(path, image_set)
        return image_set

    def load_or_make_json(self, name: str, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a cached JSON object, or call `make()` and cache its result.

        Args:
            name: The name with which the file's name begins.
            key: Hex digest of everything that the result depends on.
            make: Computes it; its errors are passed on, and nothing is cached then.
        """
        path = self.folder / "data" / f"{name}-{key[:24]}.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(found, dict):
                return found
        except (OSError, ValueError) as error:
            if os.path.exists(path):  # unlike Path.exists it is False where this user may not look
                _log.info("%s cannot be read and is made again: %s", path, error)
        made = make()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(path, json.dumps(made))
        except (OSError, StorageError) as error:
            _log.warning("not cached, the next start computes it again: %s: %s", path, error)
        return made


def _read(path: Path) -> ImageSet | None:
    if not os.path.exists(path):  # unlike Path.exists it is False where this user may not look
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads(file.metadata()["image_set"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (a safe_open is no mapping)
        parts = [tensors[part].numpy() if part in tensors else None for part in ("official_test", "official_val")]
        image_set = ImageSet.create(
            metadata["name"], tensors["images"], tensors["labels"], metadata["class_names"], *parts
        )
    except (
        SafetensorError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        AssertionError,
        RuntimeError,
    ) as error:
        _log.info("the cached images in %s cannot be read and are decoded again: %s", path, error)
        return None
    if image_set.fingerprint != metadata.get("fingerprint"):
        _log.info("the cached images in %s are damaged and are decoded again", path)
        return None
    return image_set


def _write(path: Path, image_set: ImageSet) -> None:
    tensors = {"images": image_set.images, "labels": image_set.labels}
    for name, part in (("official_test", image_set.official_test), ("official_val", image_set.official_val)):
        if part is not None:
            tensors[name] = torch.from_numpy(part)
    metadata = {
        "name": image_set.name,
        "class_names": list(image_set.class_names),
        "fingerprint": image_set.fingerprint,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as scratch:
            unfinished = Path(scratch) / path.name
            save_file(tensors, unfinished, metadata={"image_set": json.dumps(metadata)})
            os.replace(unfinished, path)  # atomic: another process sees the old file, none, or the whole new one
    except (OSError, SafetensorError) as error:
        _log.warning("decoded images are not cached, the next start decodes them again: %s: %s", path, error)
