"""Reader of `torch.save` files that runs no code from them.

Such a file is a pickle, and unpickling can call any function. torch's restricted unpickler builds
only plain values and tensors. Other objects that research code commonly stores beside its tensors
(its command line, NumPy numbers) are skipped: an inert object takes their place, so that neither
argparse nor NumPy rebuilds them.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch

from dsnet.errors import CheckpointError


class Skipped:
    """Placeholder for a value in the file that is not read; it stores nothing."""

    def __init__(self, *args: object) -> None:
        """Ignore the arguments of the real class."""

    def __setstate__(self, state: object) -> None:
        """Ignore the state of the real object."""


SKIPPED_GLOBALS = (
    "argparse.Namespace",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
)
"""Classes and functions that a file may name and that `Skipped` replaces. NumPy 2 renamed
`numpy.core`."""

WAY_OUT = (
    "If the file is whole and comes from a source you trust, load it with torch.load(weights_only=False) on an isolated machine "
    "and store its 'state_dict' (and 'state_dict_ema') alone with torch.save: that file can be read"
)


def read_torch_file(path: Path) -> Any:
    """Read the object in a file of `torch.save` (zip or legacy); tensors on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged or truncated, or it needs a class or function
            that is not allowed.
    """
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; name the file in it")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with torch.serialization.safe_globals([(Skipped, name) for name in SKIPPED_GLOBALS]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle fails in any step of its rebuilding, with whatever that step raises
        raise CheckpointError(f"{path}: {_reason(path, error)}") from error


def _reason(path: Path, error: Exception) -> str:
    # torch wraps the restricted unpickler's message in the advice to load the file unrestricted,
    # which would be unsafe.
    cause = error.__context__ if isinstance(error, pickle.UnpicklingError) and error.__context__ else error
    refused = re.search(r"GLOBAL (\S*\w)", str(cause))
    if refused is not None:
        return f"it asks to run {refused[1]!r}, which is refused: a checkpoint is read without running code from it. {WAY_OUT}"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror}); check its permissions"
    return f"cannot be read: it {_kind(path)}; fetch it again"


def _kind(path: Path) -> str:
    """The kind of a file that torch cannot read, as a phrase for a message."""
    with path.open("rb") as stream:
        beginning = stream.read(2)
    if not beginning:
        return "is empty"
    # A file of torch.save is a zip archive, or before torch 1.6 a pickle.
    return "is cut off or damaged" if beginning in (b"PK", b"\x80\x02") else "is not a file of torch.save"
