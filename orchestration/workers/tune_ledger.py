"""The ledger of a sweep of supernets: reports and ends so far, one line per event, written by the
driver alone.

The scheduler may depend on the order in which reports arrive, and with several supernets at a time
that order depends on their speed. Therefore the order is stored, with the decision on every report,
and a later launch of the sweep uses it again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dsnet.errors import CheckpointError
from dsnet.files import append_bytes, parse_json, sealed, unsealed, writing

FateState = Literal["trained", "stopped", "failed"]
_STATES = ("trained", "stopped", "failed")


@dataclass(frozen=True)
class TuneRules:
    """Rules by which the supernets of a sweep are scheduled."""

    scheduler: str = "asha"
    """`none`, `asha`, `median`, `hyperband`, or the import path of a Ray Tune scheduler."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the scheduler; times in epochs."""
    concurrent: int = 1
    """Supernets trained at the same time, >= 1."""
    report_every: int = 1
    """Epochs between reports, >= 1; the last epoch is always reported."""
    seed: int = 0

    def digest(self) -> str:
        """Digest of the rules by which decisions are made; `concurrent` is left out, as it only
        changes the order in which reports arrive."""
        content = [self.scheduler, dict(self.options), self.report_every, self.seed]
        text = json.dumps(content, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class MemberFate:
    """The outcome of a supernet's training."""

    name: str
    state: FateState
    reports: tuple[tuple[int, float], ...]
    """(epochs done, static hypervolume on val in [0, 1]) by ascending epoch."""
    reason: str | None = None
    """Why it was stopped, or failed."""


LEDGER_FILE = "reports.jsonl"


@dataclass(frozen=True)
class Report:
    """A reported value and the scheduler's decision on it."""

    key: str
    epoch: int
    value: float
    decision: str
    """Decision of a Ray Tune scheduler: CONTINUE, PAUSE, STOP or NOOP."""


@dataclass(frozen=True)
class End:
    """The end of a supernet's training."""

    key: str
    state: FateState
    reason: str | None
    is_lasting: bool
    """Whether it holds in later launches; False if the machine was the cause, so that the next
    launch tries again."""


def ledger_folder(folder: Path, rules: TuneRules) -> Path:
    """Folder of the ledger of some rules, below the folder of all ledgers of a sweep."""
    return folder / rules.digest()


class Ledger:
    """The events of a sweep in their order; each is on disk before it takes effect."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._events: list[Report | End] = []
        self._num_whole_bytes = 0
        self._read()

    @classmethod
    def of(cls, folder: Path, rules: TuneRules) -> Ledger:
        """The ledger of these rules; other rules have their own beside it."""
        return cls(ledger_folder(folder, rules) / LEDGER_FILE)

    def events(self) -> Iterator[Report | End]:
        """All events, oldest first."""
        return iter(tuple(self._events))

    def reports(self, key: str) -> tuple[tuple[int, float], ...]:
        """(epoch, value) of one supernet by ascending epoch."""
        return tuple(sorted((event.epoch, event.value) for event in self._of(key, Report)))

    def end(self, key: str) -> End | None:
        """The lasting end of one supernet; None if there is none."""
        ends = [event for event in self._of(key, End) if event.is_lasting]
        return ends[-1] if ends else None

    def append(self, event: Report | End) -> None:
        """Store an event; it is on the disk when this returns.

        Raises:
            StorageError: the disk is full, or the folder cannot be written.
        """
        line = (json.dumps(sealed({"event": type(event).__name__.lower(), **vars(event)})) + "\n").encode()
        with writing(self.path):
            self.path.parent.mkdir(exist_ok=True)
        append_bytes(self.path, line, after=self._num_whole_bytes)  # a kill may have torn the last line
        self._num_whole_bytes += len(line)
        self._events.append(event)

    def _of(self, key: str, kind: type) -> list[Any]:
        return [event for event in self._events if event.key == key and isinstance(event, kind)]

    def _read(self) -> None:
        if not self.path.exists():
            return
        lines = self.path.read_bytes().split(b"\n")[:-1]  # without an unfinished last line
        for number, line in enumerate(lines, start=1):
            self._events.append(self._parsed(line, number))
            self._num_whole_bytes += len(line) + 1

    def _parsed(self, line: bytes, number: int) -> Report | End:
        try:
            fields = unsealed(parse_json(line, "it"), "it")
            kind = {"report": Report, "end": End}[fields.pop("event")]
            event: Report | End = kind(**fields)
        except (CheckpointError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{self.path}: line {number} is no report of a supernet ({error}); the file was edited. "
                "Restore it, or remove it; the scheduler then decides again"
            ) from error
        if isinstance(event, End) and event.state not in _STATES:
            raise CheckpointError(
                f"{self.path}: line {number} has the unknown state {event.state!r}; known: {', '.join(_STATES)}"
            )
        return event


def known_fates(ledger: Ledger, keys: Mapping[str, str], finished: Sequence[str]) -> dict[str, MemberFate]:
    """Outcomes of the supernets that need no further training, by name.

    Args:
        ledger: ledger of the sweep.
        keys: member name to key.
        finished: names of those whose final checkpoint is there.
    """
    fates = {}
    for name, key in keys.items():
        end, reports = ledger.end(key), ledger.reports(key)
        if name in finished:
            # A stopped supernet may have a final checkpoint from a training under other rules;
            # under these rules it counts as stopped.
            is_stopped = end is not None and end.state == "stopped"
            reason = end.reason if end is not None and is_stopped else None
            fates[name] = MemberFate(name, "stopped" if is_stopped else "trained", reports, reason)
        elif end is not None and end.state != "trained":
            fates[name] = MemberFate(name, end.state, reports, end.reason)
    return fates
