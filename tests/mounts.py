"""Small and read-only file systems for tests, where this user may mount."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def _mount(*arguments: str) -> None:
    """Mount, or skip the test with the reason why that is not possible."""
    try:
        done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no program `mount`")
    if done.returncode:
        pytest.skip(f"this user may not mount: {done.stderr.strip()}")


def _unmount(folder: Path) -> None:
    """Unmount, also while a program still has files open there."""
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own with a size such as "4m", mounted on a folder, which is created."""
    folder.mkdir(parents=True)
    _mount("-t", "tmpfs", "-o", f"size={size}", "none", str(folder))
    try:
        yield folder
    finally:
        _unmount(folder)


def resize(folder: Path, size: str) -> None:
    """Change the size of a small disk."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)


@contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """Make a folder read-only for everybody, root included."""
    _mount("--bind", str(folder), str(folder))
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        yield folder
    finally:
        _unmount(folder)


def fill(folder: Path, name: str = "filler", *, leave: int = 0) -> Path:
    """Fill a disk with a file, except for some bytes."""
    path = folder / name
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 4096)
        except OSError:
            pass
        file.truncate(max(0, file.seek(0, 2) - leave))
    return path
