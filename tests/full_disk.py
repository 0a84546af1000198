"""A disk that fills up, without one: the calls of the system with which every writer ends."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class FullDisk:
    """Lets the first writes below a folder pass and fails the later ones, as a full disk does: what
    was appended last is cut short, and nothing can be created."""

    CALLS = ("fsync", "replace", "rename", "mkdir", "symlink", "link")

    def __init__(self, folder: Path, num_good: int, code: int = errno.ENOSPC) -> None:
        self._folder = str(folder)
        self._num_good = num_good
        self._code = code
        self.num_writes = 0
        self.failed: list[str] = []

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Take the place of the system's calls for the length of a block."""
        real = {name: getattr(os, name) for name in self.CALLS}
        try:
            for name in self.CALLS:
                setattr(os, name, self._instead_of(name, real[name]))
            yield
        finally:
            for name in self.CALLS:
                setattr(os, name, real[name])

    def _instead_of(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def act(*arguments: Any, **options: Any) -> Any:
            target = arguments[1] if name in ("replace", "rename", "symlink", "link") else arguments[0]
            path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else os.fspath(target)
            if not path.startswith(self._folder):
                return real(*arguments, **options)
            self.num_writes += 1
            if self.num_writes <= self._num_good or (name == "rename" and path.endswith(".rename")):
                return real(*arguments, **options)
            self.failed.append(f"{name} {path}")
            if name == "fsync" and stat.S_ISREG(os.fstat(target).st_mode):
                os.truncate(path, max(0, os.path.getsize(path) - 5))
            raise OSError(self._code, os.strerror(self._code), path)

        return act
