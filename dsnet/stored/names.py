"""Names of stored supernets and checkpoints, without an ending. Needs no torch."""

from __future__ import annotations

from pathlib import Path

FINAL = "final"
STRUCTURE = "structure"
"""Name of the checkpoint that a structure search leaves in its folder."""


def checkpoint_stems(folder: Path) -> list[Path]:
    """Stems of the training checkpoints in a folder, oldest first."""
    return sorted(path.with_suffix("") for path in folder.glob("epoch-*.json"))
