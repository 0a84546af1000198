"""Faults of storage as one error of ours: a full or read-only disk, a quota, a device that fails, a
file or folder that was deleted or may not be used.

Code that writes need not handle them: the system's error is recognised wherever it is caught, also
inside the errors of other libraries and of Ray's workers.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal, NamedTuple

from dsnet.disk_room import MIB, free_bytes
from dsnet.errors import DsnetError, StorageError

Action = Literal["read", "write", "use"]


class _Fault(NamedTuple):
    """Description of a fault, and the way out."""

    what: str
    way_out: str


_ANOTHER = "or use a folder on another disk"
_OF_THE_DISK: Final[dict[int, _Fault]] = {
    errno.ENOSPC: _Fault("the disk is full", f"make room there, {_ANOTHER}"),
    errno.EDQUOT: _Fault("the disk quota is used up", f"remove files there, ask for a larger quota, {_ANOTHER}"),
    errno.EROFS: _Fault("the file system is read-only", f"mount it for writing, {_ANOTHER}"),
    errno.EIO: _Fault("the disk reports an error", f"look at the messages of the kernel (dmesg), {_ANOTHER}"),
    errno.EFBIG: _Fault("the file would be larger than is allowed", "raise the limit (ulimit -f)"),
    errno.ESTALE: _Fault("the file system is no longer there", "mount it again"),
    errno.ENODEV: _Fault("the device is no longer there", "mount it again"),
}
"""Faults of a whole disk, by errno: whatever is written or read there next meets them too."""
_OF_A_PATH: Final[dict[int, _Fault]] = {
    errno.EACCES: _Fault("this user may not", "change its permissions, or use another folder"),
    errno.EPERM: _Fault("this user may not", "change its permissions, or use another folder"),
    errno.ENOENT: _Fault("it, or its folder, is not there", "restore it if it was deleted or moved"),
    errno.ENOTDIR: _Fault("a part of its path is not a folder", "use another folder"),
    errno.EISDIR: _Fault("it is a folder", "use another name"),
    errno.ENAMETOOLONG: _Fault("its path is too long", "use a folder with a shorter path"),
    errno.ELOOP: _Fault("its symbolic links lead in a circle", "remove them"),
    errno.EMFILE: _Fault("too many files are open", "raise the limit (ulimit -n)"),
    errno.ENFILE: _Fault("too many files are open on this machine", "end other programs"),
}
"""Faults of one path, by errno."""
_IN_WORDS: Final = {
    "database or disk is full": errno.ENOSPC,  # SQLite's
    "disk I/O error": errno.EIO,
    "attempt to write a readonly database": errno.EROFS,
    **{os.strerror(code): code for code in _OF_THE_DISK},
}
"""Texts by which other libraries report a fault of the disk without its errno."""
_NUMBERED = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")


def storage_error(
    error: BaseException, path: Path | None = None, action: Action = "use", *, near: Path | None = None
) -> StorageError | None:
    """The fault of storage behind an error, as an error of ours; None if it has another cause.

    An error of ours has said its cause already, and is returned only if it is a StorageError. A
    fault of a path (a missing file, a permission) counts if the path is known.

    Args:
        error: the error as it was caught; it may be one of another library or of a Ray worker.
        path: the file or folder that was used, if the caller knows it; any OSError then is one of
            storage.
        action: what was done with it.
        near: a folder that the message names where no path is known.
    """
    found = tuple(_chain(error))
    ours = next((each for each in found if isinstance(each, DsnetError)), None)
    if ours is not None:
        return ours if isinstance(ours, StorageError) else None
    for each in found:
        if isinstance(each, FileNotFoundError) and each.filename is None and (told := _of_a_common_folder(each)):
            return StorageError(told)
        if isinstance(each, OSError) and each.errno is not None:
            named = Path(os.fsdecode(each.filename)) if isinstance(each.filename, str | bytes) else None
            if each.errno in _OF_THE_DISK or (each.errno in _OF_A_PATH and (path or named)) or path:
                return _error(each.errno, path or named, action, each.strerror, near)
    for each in (error, *found):
        code = _told_in_words(each)
        if code is not None:
            return _error(code, path, action, None, near)
    return None


def disk_error(error: BaseException) -> StorageError | None:
    """Like `storage_error`, for a full, read-only or failing disk only.

    A missing file may be the fault of the code that reads it, a full disk never is.
    """
    codes = [each.errno for each in _chain(error) if isinstance(each, OSError)]
    if any(code not in _OF_THE_DISK for code in codes):
        return None
    return storage_error(error)


def _error(code: int, path: Path | None, action: Action, told: str | None, near: Path | None) -> StorageError:
    reason = told or os.strerror(code)
    fault = _OF_THE_DISK.get(code) or _OF_A_PATH.get(code)
    where = str(path) if path is not None else "a file" if near is None else f"a file, probably below {near}"
    if fault is None:
        return StorageError(f"cannot {action} {where}: {reason}. Correct that, or use another folder.")
    place = path or near
    free = free_bytes(place) if place is not None and code in (errno.ENOSPC, errno.EDQUOT) else None
    room = "" if free is None else f", {free / MIB:,.0f} MiB free"
    way_out = fault.way_out[0].upper() + fault.way_out[1:]
    return StorageError(f"cannot {action} {where}: {fault.what} ({reason}{room}). {way_out}.")


def _of_a_common_folder(error: FileNotFoundError) -> str | None:
    """The message for an error about the folder of temporary files or the working directory, which
    the system's error does not name; None if it is about neither."""
    if "No usable temporary directory" in str(error):  # the text of Python's tempfile
        return f"no temporary file can be written: {error.strerror}. Make room there, or set TMPDIR to a folder on another disk."
    try:
        os.getcwd()
    except FileNotFoundError:
        return "the working directory was deleted. Change to a folder that exists, and use absolute paths."
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and its causes, those of a Ray worker included.

    A fault of the disk is also looked for in the error during whose handling another was raised; a
    missing file there may have been expected.
    """
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        each = waiting.pop(0)
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        remote = getattr(each, "cause", None)  # Ray's error of a task is also an instance of its cause's class
        if isinstance(remote, BaseException):
            waiting.append(remote)
            continue
        yield each
        waiting.extend(dict(getattr(each, "worker_failures", None) or {}).values())
        waiting.append(each.__cause__)
        context = each.__context__
        if each.__cause__ is None and isinstance(context, OSError) and context.errno in _OF_THE_DISK:
            waiting.append(context)


def _told_in_words(error: BaseException) -> int | None:
    """The errno of a fault of the disk that an error of another library tells in its text."""
    if isinstance(error, DsnetError):
        return None
    if type(error).__name__ == "OutOfDiskError":  # Ray's
        return errno.ENOSPC
    text = str(error)
    for match in _NUMBERED.finditer(text):
        code = int(match[1] or match[2])
        if code in _OF_THE_DISK:
            return code
    return next((code for words, code in _IN_WORDS.items() if words in text), None)
