"""The interface between a launch and a tracker: rows of MLflow and their values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from orchestration.runs.curves import CurvePoint


class LostWriterError(RuntimeError):
    """The process that writes to the store ended during a call."""


@dataclass(frozen=True)
class TrackedRun:
    """One row of MLflow's run table."""

    uid: str
    """Deterministic identity, e.g. "digits/3f0c2b6a9d11/trial-0042"; a second write with the same
    uid updates the same row."""
    name: str
    kind: Kind
    start_ms: int
    """Start, Unix time in milliseconds, taken from the run folder, never the time of writing."""
    end_ms: int | None = None
    """End, Unix time in milliseconds; None while it runs."""
    status: Status = "FINISHED"
    reason: str | None = None
    """Why it failed."""
    params: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    """Values by public name: top1, madds_m, ...; None, NaN and infinity are not written to
    MLflow."""
    tags: Mapping[str, str] = field(default_factory=dict)
    first_tags: Mapping[str, str] = field(default_factory=dict)
    """Tags that are set only when the row is created; `tags` of a later write may change them."""
    note: str = ""
    """Description of the row, in one line. It replaces an earlier one only if it begins with it, so
    that what a user has written stays."""
    under: TrackedRun | None = None
    """For the row of a sweep that is part of a larger one: the row below which it is nested. It is
    created if it is missing; the larger sweep's own tracker writes and closes it."""

    @property
    def root_uid(self) -> str:
        """For the row of a sweep: the uid of the outermost sweep."""
        return self.uid if self.under is None else self.under.uid


@dataclass(frozen=True)
class TrackedBundle:
    """An exported bundle, which becomes a logged model of the sweep's run."""

    path: Path
    """Its folder."""
    name: str
    """The logged model's name, e.g. "trial-0042"."""
    register: str | None = None
    """Name of a registered model of which it becomes a version; None = none."""


@dataclass(frozen=True)
class TrackedData:
    """A split of the images, which becomes a dataset of the sweep's run."""

    split: str
    """train, gate, val or test."""
    source: str
    """Name of the data set, e.g. "cifar10"."""
    path: str | None
    """Its file or folder, if the settings name one."""
    digest: str
    """Hexadecimal digest of images and splits."""
    image_shape: tuple[int, ...]
    """(channels, height, width)."""
    num_images: int
    num_classes: int


@dataclass(frozen=True)
class TrackingSummary:
    """Counts of a tracker's writes, and the first error."""

    num_written: int = 0
    num_unsent: int = 0
    first_error: str | None = None


class Tracker(Protocol):
    """Interface to which a sweep writes its results. No method raises because of the store, and
    only `close` waits for it."""

    def parent(self, run: TrackedRun) -> None:
        """Open the sweep's own run, or reopen it; must be called first, or else `attach`."""

    def attach(self, run: TrackedRun) -> None:
        """Take the sweep's own run as it is, whether a launch still writes it or not, and write it
        only if it is missing; `close` does not end it then."""

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

    def supersede(self, current: Sequence[str]) -> None:
        """Mark the sweep's rows that belong to results of other settings than the present ones, and
        take the mark from those that belong to the present ones again.

        Args:
            current: uids of the present results (`stage_uid`), and of the present supernets of a
                sweep of several; a row belongs to them if its uid is one of these or lies below
                one.
        """

    def series(self, points: Sequence[CurvePoint]) -> None:
        """Add metrics by step to the parent: accuracy by MAdds, for example."""

    def artifact(self, path: Path) -> None:
        """Attach a file to the parent."""

    def datasets(self, datasets: Sequence[TrackedData]) -> None:
        """Record the images of the sweep as datasets of the parent."""

    def bundle(self, bundle: TrackedBundle) -> None:
        """Make a bundle a logged model of the parent, unless it is one."""

    def describe(self, text: str) -> None:
        """Give the parent a description, in Markdown; `RUN_ID` and `EXPERIMENT_ID` in it stand for
        the parent's own ids."""

    def close(self, status: Status, end_ms: int, timeout_s: float) -> TrackingSummary:
        """End the parent and all runs below it that still run; wait at most `timeout_s` for
        unwritten rows."""


class NullTracker:
    """A tracker that does nothing (`tracking.mlflow: false`)."""

    def parent(self, run: TrackedRun) -> None: ...

    def attach(self, run: TrackedRun) -> None: ...

    def supernet(self, run: TrackedRun) -> None: ...

    def curve(self, points: Sequence[CurvePoint]) -> None: ...

    def subnet(self, run: TrackedRun) -> None: ...

    def trial(self, run: TrackedRun) -> None: ...

    def supersede(self, current: Sequence[str]) -> None: ...

    def series(self, points: Sequence[CurvePoint]) -> None: ...

    def artifact(self, path: Path) -> None: ...

    def datasets(self, datasets: Sequence[TrackedData]) -> None: ...

    def bundle(self, bundle: TrackedBundle) -> None: ...

    def describe(self, text: str) -> None: ...

    def close(self, status: Status, end_ms: int, timeout_s: float) -> TrackingSummary:
        return TrackingSummary()


class RowStore(Protocol):
    """A store of rows, called from one thread at a time. Every call may be repeated, and raises if
    the store fails. See `MlflowStore`."""

    def connect(self) -> None: ...

    def open_sweep(self, parent: TrackedRun) -> None: ...

    def attach(self, parent: TrackedRun) -> None: ...

    def write(self, run: TrackedRun, parent: TrackedRun) -> None: ...

    def supersede(self, parent: TrackedRun, current: Sequence[str]) -> None: ...

    def add_points(self, run: TrackedRun, parent: TrackedRun, points: Sequence[CurvePoint]) -> None: ...

    def add_artifact(self, parent: TrackedRun, path: Path) -> None: ...

    def add_datasets(self, parent: TrackedRun, datasets: Sequence[TrackedData]) -> None: ...

    def add_bundle(self, parent: TrackedRun, bundle: TrackedBundle) -> None: ...

    def describe(self, parent: TrackedRun, text: str) -> None: ...

    def close_sweep(self, parent: TrackedRun) -> None: ...

    def stop(self, *, at_once: bool) -> None: ...


Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]
Kind = Literal["sweep", "supernet", "subnet", "trial"]
