"""The members of a sweep of supernets as its folder records them: readable without their data and
without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dashboards.supernet_names import with_settings
from dsnet.errors import CheckpointError
from dsnet.files import read_sealed, understood, write_sealed
from orchestration.runs.folder import RunDir
from search.suggest.space import Scalar

_SCHEMA = 1


@dataclass(frozen=True)
class MemberEntry:
    """Record of a member in the sweep's folder, readable without loading its data."""

    name: str
    key: str
    settings: Mapping[str, Scalar]
    state: str = "waiting"
    """waiting | trained | stopped | failed."""
    reason: str | None = None
    reports: tuple[tuple[int, float], ...] = ()
    """(epoch, static hypervolume on `val`), as reported while it trained."""
    epochs: int = 0
    """Number of epochs of its whole training."""
    start_ms: int = 0
    end_ms: int = 0
    """Start (`start_ms`) and end of its training, Unix time in ms; 0 if it has not begun or
    ended."""

    @property
    def label(self) -> str:
        """Its name with its settings, where they are short: `s0-3fa29c01 (uniform)`."""
        return with_settings(self.name, self.settings)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MemberEntry:
        """Build it from its JSON."""
        reports = tuple((int(epoch), float(value)) for epoch, value in data["reports"])
        return cls(**{**data, "reports": reports})


def read_entries(run: RunDir, *, everything: bool = False) -> tuple[MemberEntry, ...]:
    """The members recorded in the run folder, in order; empty if the run is no sweep of supernets.

    Args:
        run: the parent.
        everything: include members of earlier launches with another space.
    """
    if not run.supernets_json.is_file():
        return ()
    content = read_sealed(run.supernets_json)
    if content.get("schema") != _SCHEMA:
        raise CheckpointError(
            f"{run.supernets_json}: not the members of a sweep of supernets as this release writes them; launch again under another name"
        )
    with understood(run.supernets_json):
        entries = [MemberEntry.from_json(item) for item in content["members"]]
        if everything:
            entries += [MemberEntry.from_json(item) for item in content["earlier"]]
        return tuple(entries)


def write_entries(run: RunDir, entries: Sequence[MemberEntry]) -> None:
    """Record the members; earlier members that are no longer among them are kept in a list of their
    own."""
    current = {entry.key for entry in entries}
    earlier = [entry for entry in read_entries(run, everything=True) if entry.key not in current]
    content = {
        "schema": _SCHEMA,
        "members": [asdict(entry) for entry in entries],
        "earlier": [asdict(entry) for entry in earlier],
    }
    text = json.loads(json.dumps(content, default=list))
    if not run.supernets_json.is_file() or read_sealed(run.supernets_json) != text:
        write_sealed(run.supernets_json, text)
