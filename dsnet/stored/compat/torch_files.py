"""Files of `torch.save`, read without running code from them.

Such a file is a pickle: read in full, it may call anything. Here torch's restricted reader builds plain values and tensors only. What
research code commonly leaves beside its tensors (its command line, NumPy numbers) is stepped over: an inert object takes its place,
so that neither argparse nor NumPy is asked to rebuild it.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch

from dsnet.errors import CheckpointError


class Skipped:
    """Stands where the file holds a value that is not read; it keeps nothing of it."""

    def __init__(self, *args: object) -> None:
        """Takes what the real class would have been built from."""

    def __setstate__(self, state: object) -> None:
        """Takes what the real object would have held."""


SKIPPED_GLOBALS = (
    "argparse.Namespace",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
)
"""Classes and functions that a file may name; `Skipped` answers for each of them. NumPy 2 renamed `numpy.core`."""

WAY_OUT = (
    "If the file is whole and comes from a source you trust, load it with torch.load(weights_only=False) on a machine that may be lost "
    "and store its 'state_dict' (and 'state_dict_ema') alone with torch.save: that file can be read"
)


def read_torch_file(path: Path) -> Any:
    """The object in a file of `torch.save`, zip or legacy, its tensors on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged or truncated, or it needs a class or function that is not allowed.
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
    # torch wraps what its restricted reader says into advice to read the file in full, which is not what to do.
    cause = error.__context__ if isinstance(error, pickle.UnpicklingError) and error.__context__ else error
    refused = re.search(r"GLOBAL (\S*\w)", str(cause))
    if refused is not None:
        return f"it asks to run {refused[1]!r}, which is refused: a checkpoint is read without running code from it. {WAY_OUT}"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror}); check its permissions"
    return f"cannot be read: it {_kind(path)}; fetch it again"


def _kind(path: Path) -> str:
    """What a file is that torch cannot read."""
    with path.open("rb") as stream:
        beginning = stream.read(2)
    if not beginning:
        return "is empty"
    # A file of torch.save is a zip archive, or before torch 1.6 a pickle.
    return "is cut off or damaged" if beginning in (b"PK", b"\x80\x02") else "is no file of torch.save"
