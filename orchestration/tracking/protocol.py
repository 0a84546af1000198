"""What a launch tells a tracker: rows of MLflow and their values, whoever writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from orchestration.runs.curves import CurvePoint

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class TrackedRun:
    """One row of MLflow's run table."""

    uid: str
    """Deterministic, e.g. "digits/3f0c2b6a9d11/trial-0042": a second write with the same uid is the
    same row."""
    name: str
    kind: Kind
    start_ms: int
    """Unix time in milliseconds, from the run folder, never the time of writing."""
    end_ms: int | None = None
    """None while it runs."""
    status: Status = "FINISHED"
    reason: str | None = None
    """Why it failed."""
    params: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    """The names of the interface: top1, madds_m, ...; None, NaN and infinity are left out of
    MLflow."""
    tags: Mapping[str, str] = field(default_factory=dict)
    first_tags: Mapping[str, str] = field(default_factory=dict)
    """Tags of a new row. A row that has them keeps its own: a later write with `tags` may have
    changed them."""
    under: TrackedRun | None = None
    """Of a sweep's own row, where it is part of a larger one: the row below which it hangs. It is
    created where it is missing, and written and closed by the larger sweep's own tracker."""

    @property
    def root_uid(self) -> str:
        """Of a sweep's own row: the uid of the outermost sweep."""
        return self.uid if self.under is None else self.under.uid


@dataclass(frozen=True)
class TrackingSummary:
    """What became of a tracker's writes."""

    num_written: int = 0
    num_unsent: int = 0
    first_error: str | None = None


class Tracker(Protocol):
    """Where a sweep shows its results. No method raises because of the store, none waits for it but
    `close`."""

    def parent(self, run: TrackedRun) -> None:
        """Open the sweep's own run, or go on with it. Comes first."""

    def supernet(self, run: TrackedRun) -> None:
        """Open the supernet's run (status RUNNING); called again with its final status, close
        it."""

    def curve(self, points: Sequence[CurvePoint]) -> None:
        """Add training curves to the supernet's run."""

    def subnet(self, run: TrackedRun) -> None:
        """Write the finished run of one static sub-network; written again, it gets the tags that
        differ and the metrics that it lacks."""

    def trial(self, run: TrackedRun) -> None:
        """Write the finished run of one trial; written again, it gets the tags that differ and the
        metrics that it lacks."""

    def series(self, points: Sequence[CurvePoint]) -> None:
        """Add metrics by step to the parent: accuracy by MAdds, for example."""

    def artifact(self, path: Path) -> None:
        """Attach a file to the parent."""

    def describe(self, text: str) -> None:
        """Give the parent a description, in Markdown; `RUN_ID` and `EXPERIMENT_ID` in it stand for
        the parent's own ids."""

    def close(self, status: Status, end_ms: int, timeout_s: float) -> TrackingSummary:
        """End the parent and whatever still runs below it; wait at most `timeout_s` for what is
        unwritten."""


class NullTracker:
    """Tracks nothing (`tracking.mlflow: false`)."""

    def parent(self, run: TrackedRun) -> None: ...

    def supernet(self, run: TrackedRun) -> None: ...

    def curve(self, points: Sequence[CurvePoint]) -> None: ...

    def subnet(self, run: TrackedRun) -> None: ...

    def trial(self, run: TrackedRun) -> None: ...

    def series(self, points: Sequence[CurvePoint]) -> None: ...

    def artifact(self, path: Path) -> None: ...

    def describe(self, text: str) -> None: ...

    def close(self, status: Status, end_ms: int, timeout_s: float) -> TrackingSummary:
        return TrackingSummary()


class RowStore(Protocol):
    """Takes rows, one call after the other, each of them repeatable; raises where the store does.
    See `MlflowStore`."""

    def connect(self) -> None: ...

    def open_sweep(self, parent: TrackedRun) -> None: ...

    def write(self, run: TrackedRun, parent: TrackedRun) -> None: ...

    def add_points(self, run: TrackedRun, parent: TrackedRun, points: Sequence[CurvePoint]) -> None: ...

    def add_artifact(self, parent: TrackedRun, path: Path) -> None: ...

    def describe(self, parent: TrackedRun, text: str) -> None: ...

    def close_sweep(self, parent: TrackedRun) -> None: ...

    def stop(self, *, at_once: bool) -> None: ...


Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]


Kind = Literal["sweep", "supernet", "subnet", "trial"]


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
