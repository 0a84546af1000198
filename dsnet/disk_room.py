"""Free room on a disk, and the reserve that a run leaves there. Needs no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

MIB = 2**20
DEFAULT_RESERVE_MIB = 256
"""Enough for a stopping run to write its last checkpoint, and for other programs to go on."""


def free_bytes(path: Path) -> int | None:
    """Bytes that this user may still write at a path, which need not exist; None if its file system
    cannot be asked, or has no blocks."""
    for folder in (path, *path.absolute().parents):
        try:
            facts = os.statvfs(folder)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            return None
        if facts.f_blocks == 0:  # no disk, but a view of the system, such as /proc
            return None
        return facts.f_bavail * facts.f_frsize
    return None


@dataclass(frozen=True)
class DiskReserve:
    """Room that must stay free at a folder.

    Attributes:
        folder: the folder, which need not exist yet.
        min_free_mib: MiB that must be free, >= 0; 0 asks for nothing.
        setting: name of the setting that holds this number, for the message.
        ways_out: further things to do than to make room or to lower the setting, for the message.
    """

    folder: Path
    min_free_mib: int
    setting: str
    ways_out: str = ""

    def problem(self) -> str | None:
        """An error message if too little is free; else None."""
        free = free_bytes(self.folder)
        if free is None or free >= self.min_free_mib * MIB:
            return None
        further = f"{self.ways_out}, " if self.ways_out else ""
        return (
            f"{self.folder} has {free // MIB:,} MiB free, but {self.setting} asks for {self.min_free_mib:,} MiB. "
            f"Make room there, {further}or lower {self.setting} (0 asks for nothing)."
        )
