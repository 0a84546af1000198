"""Atomic writing of files, reading of stored JSON, hashes, and a lock on folders; without torch.

A fault of the disk is a StorageError that names the path, whatever is read or written here.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any, Final, TypeVar

from dsnet.errors import CheckpointError, ConfigError, DsnetError, PreflightError, StorageError
from dsnet.storage_faults import Action, storage_error

T = TypeVar("T")
OWN_SHA256: Final = "sha256"
"""Key under which a sealed JSON file holds the SHA-256 of its other values."""


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data` through a synced temporary file in the same folder.

    Raises:
        StorageError: The disk is full or the folder cannot be written; the old content stays
            unchanged.
    """
    temporary = _draft(path)
    with writing(path):
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except BaseException:
            _discard(temporary)
            raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Context manager for code that writes a file, or files in a folder.

    Raises:
        StorageError: The block raised the system's error, or that of a library about a fault of the
            disk.
    """
    with _naming(path, "write"):
        yield


@contextmanager
def _naming(path: Path, action: Action) -> Iterator[None]:
    try:
        yield
    except DsnetError:
        raise
    except Exception as error:
        fault = storage_error(error, path, action)
        if fault is None:
            raise
        raise fault from error


def append_bytes(path: Path, data: bytes, *, after: int | None = None, is_synced: bool = True) -> None:
    """Add bytes to the end of a file, which is created if it is missing; its folder is not.

    Args:
        path: the file.
        data: whole lines.
        after: size in bytes of the whole lines before; what follows, such as a line that a killed
            process began, is cut off first. None: the file is whole.
        is_synced: whether they are on the disk when this returns.

    Raises:
        StorageError: They cannot be written; the file holds what it held before.
    """
    with writing(path), open(path, "ab", buffering=0) as file:
        held = os.fstat(file.fileno()).st_size if after is None else after
        file.truncate(held)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]
            if is_synced:
                os.fsync(file.fileno())
        except OSError:
            with suppress(
                OSError
            ):  # it fits, being shorter; where not even that works, a reader leaves a torn line out
                file.truncate(held)
            raise


def atomic_write_text(path: Path, text: str) -> None:
    """Like `atomic_write_bytes`, for text in UTF-8."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: Path, value: Any) -> None:
    """Like `atomic_write_text`, for JSON; paths become strings and numpy scalars numbers. NaN and
    infinity raise ValueError."""
    atomic_write_text(path, json.dumps(value, indent=2, allow_nan=False, default=plain_value) + "\n")


def parse_json(text: str | bytes, where: str) -> Any:
    """The JSON value in a stored text.

    Args:
        text: the text, or its bytes in UTF-8.
        where: the beginning of the message: the file, and the line if it has several values.

    Raises:
        CheckpointError: The text is not JSON, not UTF-8, or nested too deeply.
    """
    try:
        return json.loads(text.decode("utf-8") if isinstance(text, bytes) else text)
    except ValueError as error:
        reason = str(error)
    except RecursionError:
        reason = "nested too deeply"
    raise CheckpointError(
        f"{where} is not valid JSON ({reason}): it is incomplete or was edited. Restore it, or delete it and launch again."
    )


def read_json(path: Path) -> Any:
    """The JSON value stored in `path`.

    Raises:
        CheckpointError: The file is missing or incomplete.
        StorageError: It cannot be read.
    """
    return parse_json(_stored_bytes(path), str(path))


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object stored in `path`.

    Raises:
        CheckpointError: as `read_json`, or it holds something else.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} does not hold a JSON object, but {type(content).__name__}: it was edited. Restore it, or delete it "
            "and launch again."
        )
    return content


def read_stored(path: Path, parse: Callable[[dict[str, Any]], T]) -> T:
    """The object stored in `path`, in the form that `parse` gives it.

    Raises:
        CheckpointError: as `read_object`, or `parse` does not understand the content.
    """
    content = read_object(path)
    with understood(path):
        return parse(content)


@contextmanager
def understood(path: Path, way_out: str = "delete it and launch again") -> Iterator[None]:
    """Context manager for code that reads stored values; it turns the errors of values that are
    missing or of another form into one that names the file.

    Args:
        path: the file that holds the values.
        way_out: what to do if it cannot be restored, as the end of a sentence.

    Raises:
        CheckpointError: The values of the file are not those that this release writes.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, AssertionError, ConfigError) as error:
        raise CheckpointError(
            f"{path} does not hold what this release writes there ({type(error).__name__}: {error}): it is damaged, was "
            f"edited, or is of another release. Restore it, or {way_out}."
        ) from error


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects in a file with one per line, which may still be written; an incomplete last
    line is left out. Empty if there is no file.

    Raises:
        CheckpointError: The file cannot be read, or a complete line is not a JSON object.
    """
    if not path.exists():
        return []
    text = _stored_bytes(path)
    lines = []
    for number, line in enumerate(text[: text.rfind(b"\n") + 1].splitlines(), start=1):
        value = parse_json(line, f"{path}, line {number},")
        if not isinstance(value, dict):
            raise CheckpointError(f"{path}, line {number} is not a JSON object: it was edited. Restore the file.")
        lines.append(value)
    return lines


def _stored_bytes(path: Path) -> bytes:
    with reading(path):
        return path.read_bytes()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Context manager for code that reads a stored file.

    Raises:
        CheckpointError: There is no such file.
        StorageError: The disk fails, or this user may not read it: the file may be undamaged.
    """
    try:
        with _naming(path, "read"):
            yield
    except StorageError as error:
        cause = error.__cause__
        if isinstance(cause, FileNotFoundError | NotADirectoryError):
            raise CheckpointError(f"{path} is missing; launch the sweep again, or restore the file.") from cause
        if isinstance(cause, IsADirectoryError):
            raise CheckpointError(f"{path} cannot be read: {cause.strerror}.") from cause
        raise


def own_digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of the values of a JSON object without the digest itself, in hex."""
    values = {name: value for name, value in content.items() if name != OWN_SHA256}
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), default=plain_value)
    return hashlib.sha256(text.encode()).hexdigest()


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The object as JSON, with its own SHA-256 added, by which `unsealed` notices a change."""
    plain = json.loads(json.dumps(content, allow_nan=False, default=plain_value))  # keys as they are read again
    return {**plain, OWN_SHA256: own_digest(plain)}


def unsealed(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """An object of `sealed` without its SHA-256; one of an earlier release, which has none, is
    taken as it is.

    Args:
        content: the stored object.
        where: the beginning of the message: the file, and the line if it has several objects.

    Raises:
        CheckpointError: The object has changed since it was stored.
    """
    plain = dict(content)
    recorded = plain.pop(OWN_SHA256, None)
    if recorded is not None and recorded != own_digest(plain):
        raise CheckpointError(
            f"{where} has changed since it was written (its own SHA-256 differs): it is damaged or was edited. Restore it, "
            "or delete it and launch again."
        )
    return plain


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Like `atomic_write_json`, for an object, with its own SHA-256 (`sealed`)."""
    atomic_write_json(path, sealed(content))


def read_sealed(path: Path) -> dict[str, Any]:
    """The object that `write_sealed` stored; see `unsealed`.

    Raises:
        CheckpointError: as `read_object`, or the object has changed since it was written.
    """
    return unsealed(read_object(path), str(path))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Context manager that replaces a file atomically; it yields a temporary path to write.

    At the end of the block the temporary file is synced and renamed to `path`; on any error it is
    removed. The file has the permissions that the process's umask gives. A missing folder is
    created, but not the folder above it.

    Raises:
        StorageError: as `atomic_write_bytes`.
    """
    temporary = _draft(path)
    with writing(path):
        try:
            path.parent.mkdir(exist_ok=True)  # no further: the folder of a run that was deleted stays deleted
            mode = _usual_mode(temporary)
            yield temporary
            os.chmod(temporary, mode)  # safetensors makes files that only their owner may read
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        finally:
            _discard(temporary)


def replace_link(path: Path, target: Path) -> bool:
    """Replace `path`, which is a symbolic link or missing, by one to `target`.

    Returns:
        whether the file system has symbolic links; without them nothing is changed.

    Raises:
        StorageError: as `atomic_write_bytes`.
    """
    temporary = _draft(path)
    with writing(path):
        try:
            os.symlink(target, temporary)
        except OSError:  # also the answer of file systems without links, by several error numbers
            atomic_write_bytes(temporary, b"")  # a disk that fails does not take a file either
            _discard(temporary)
            return False
        try:
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except BaseException:
            _discard(temporary)
            raise
    return True


def _discard(temporary: Path) -> None:
    """Remove a temporary file. What keeps it from being removed has been reported by then: the
    folder is gone or became read-only."""
    with suppress(OSError):
        temporary.unlink(missing_ok=True)


def _draft(path: Path) -> Path:
    """A new name for a file that replaces `path` when it is complete."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def remove_drafts(folder: Path, min_age_s: float = 0.0, *, is_deep: bool = True) -> list[Path]:
    """Remove what killed processes of this program were writing: files and folders below `folder`
    whose names hold the id of a process that no longer runs here. Symbolic links are not followed.

    Args:
        folder: a folder that no other driver works in.
        min_age_s: age from which they are removed; more than 0 where processes of other machines,
            whose ids say nothing here, may be writing.
        is_deep: whether those in folders below it are removed too.

    Returns:
        the removed paths.
    """
    removed = []
    for parent, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(parent, name)
            found = _DRAFT.fullmatch(name) or (_DRAFT_FOLDER.fullmatch(name) if name in folders else None)
            if found is None or _is_alive(int(found["pid"])) or _age_s(path) < min_age_s:
                continue
            with suppress(OSError):  # it stays: nothing reads it
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
                removed.append(path)
        folders[:] = [name for name in folders if is_deep and not _DRAFT_FOLDER.fullmatch(name)]
    return removed


_DRAFT_END = r"(?:-[0-9a-f]{8}\.tmp(?:-journal|-wal|-shm)?|\.partial)"
_DRAFT = re.compile(rf"\.(?:.+\.(?=\d+{_DRAFT_END}$)|driver\.lock\.(?=\d+$))(?P<pid>\d+){_DRAFT_END}?")
_DRAFT_FOLDER = re.compile(r"\..+\.(?P<pid>\d+)\.tmp")
"""Names of unfinished files, of SQLite's files beside them, and of unfinished folders, with the id
of the process that writes them."""


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.lstat().st_mtime
    except OSError:
        return math.inf  # it is gone


def _usual_mode(path: Path) -> int:
    """The permissions that a new file at this path gets from the process's umask."""
    with open(path, "xb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    path.unlink()
    return mode


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex.

    Raises:
        CheckpointError, StorageError: as `reading`.
    """
    with reading(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_sha256(path: Path) -> str:
    """Like `file_sha256`, but a file is read once per process: again only when its size, its
    modification time or the file itself has changed.

    Raises:
        CheckpointError, StorageError: as `reading`.
    """
    with reading(path):
        facts = path.stat()
    return _sha256_of(path, facts.st_size, facts.st_mtime_ns, facts.st_ino)


@lru_cache(maxsize=100_000)
def _sha256_of(path: Path, size: int, mtime_ns: int, inode: int) -> str:
    """SHA-256 of the file that has these facts."""
    return file_sha256(path)


def set_aside(path: Path) -> Path:
    """Rename a damaged file to `NAME.damaged-1`, or the next free number; returns the new path.

    Raises:
        StorageError: It cannot be renamed.
    """
    kept = damaged_name(path)
    with writing(kept):
        path.rename(kept)
    return kept


def damaged_name(path: Path) -> Path:
    """The path under which a damaged file is kept: the first free `NAME.damaged-N`."""
    names = (path.with_name(f"{path.name}.damaged-{number}") for number in count(1))
    return next(name for name in names if not os.path.lexists(name))


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
        StorageError: The folder is missing or cannot be opened.
        PreflightError: Its file system has no locks.
    """
    with _naming(folder, "use"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
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
