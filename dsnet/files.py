"""Atomic writing of files, hashes, and a lock on folders. Needs no torch."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dsnet.errors import CheckpointError, PreflightError


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data` through a synced temporary file in the same folder.

    Raises:
        CheckpointError: The disk is full or the folder cannot be written; the old content stays
            unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise CheckpointError(_write_failure(path, error)) from error


def atomic_write_text(path: Path, text: str) -> None:
    """Like `atomic_write_bytes`, for text in UTF-8."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: Path, value: Any) -> None:
    """Like `atomic_write_text`, for JSON; paths become strings and numpy scalars numbers. NaN and
    infinity raise ValueError."""
    atomic_write_text(path, json.dumps(value, indent=2, allow_nan=False, default=plain_value) + "\n")


def read_json(path: Path) -> Any:
    """The JSON value stored in `path`.

    Raises:
        CheckpointError: The file is missing, unreadable or incomplete.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; launch the sweep again, or restore the file.") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not valid JSON ({error}): it is incomplete or was edited. Restore it, or delete it and launch again."
        ) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Context manager that replaces a file atomically; it yields a temporary path to write.

    At the end of the block the temporary file is synced and renamed to `path`; on any error it is
    removed. The file has the permissions that the process's umask gives.

    Raises:
        CheckpointError: as `atomic_write_bytes`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = _usual_mode(temporary)
        yield temporary
        os.chmod(temporary, mode)  # safetensors makes files that only their owner may read
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(_write_failure(path, error)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _usual_mode(path: Path) -> int:
    """The permissions that a new file at this path gets from the process's umask."""
    with open(path, "xb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    path.unlink()
    return mode


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex.

    Raises:
        CheckpointError: The file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error


def plain_value(value: Any) -> Any:
    """Convert paths and numpy scalars for `json.dumps(default=...)`, without importing numpy."""
    if isinstance(value, Path):
        return str(value)
    if callable(item := getattr(value, "item", None)):
        return item()
    raise TypeError(f"{type(value).__name__} {value!r} has no JSON form")


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Context manager that locks a folder against other processes of this host; the kernel releases
    it when a process dies.

    It is meant for short read-modify-write operations, not for long work. It waits for the lock and
    is not re-entrant.

    Raises:
        PreflightError: The folder is missing, or its file system has no locks.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise PreflightError(f"cannot open the folder {folder}: {error.strerror}.") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            raise PreflightError(
                f"{folder} is on a file system without file locks ({error.strerror}); "
                "set storage.runs to a folder on a local disk."
            ) from error
        yield
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Sync a folder, so that a rename in it survives a power failure."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a folder; the file's content is already synced.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _write_failure(path: Path, error: OSError) -> str:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"cannot write {path}: {reason}. Free some space and launch again; an earlier version of the file is unchanged."
    return f"cannot write {path}: {reason}. An earlier version of the file is unchanged."
