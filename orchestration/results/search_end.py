"""The file `end.json`: reason, stop rules and number of trials at the end of a search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsnet.files import read_sealed, understood, write_sealed


@dataclass(frozen=True)
class SearchEnd:
    """Why a search ended, under which rules, and after how many trials."""

    reason: str
    """`trials`, `time`, `plateau`, ..."""
    rules: Mapping[str, Any]
    """The stop rules, in a form that can be compared."""
    trials: int
    """Number of finished trials."""
    enqueued: int = 0
    """Number of enqueued points to which slots were assigned."""


def write_end(path: Path, end: SearchEnd) -> None:
    """Store it."""
    write_sealed(path, asdict(end))


def read_end(path: Path) -> SearchEnd:
    """Read it.

    Raises:
        CheckpointError: the file is damaged.
    """
    content = read_sealed(path)
    with understood(path):
        return SearchEnd(
            str(content["reason"]), dict(content["rules"]), int(content["trials"]), content.get("enqueued", 0)
        )
