"""A tracker that writes to MLflow in a background thread, so that tracking never delays a
launch."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from dsnet.wording import first_line
from orchestration.config.store_uri import shown_uri
from orchestration.runs.curves import CurvePoint
from orchestration.tracking.protocol import (
    LostWriterError,
    RowStore,
    Status,
    TrackedBundle,
    TrackedData,
    TrackedRun,
    TrackingSummary,
)
from orchestration.tracking.store import logger

FAILURES_BEFORE_PAUSE = 3
PAUSE_S = 30.0
MAX_KEPT = 10_000
"""Number of failed writes that are kept to be repeated at the end."""


class MlflowTracker:
    """Queues rows, and writes them through a process in one background thread.

    After three failures in a row it puts writes off for 30 s, so that they do not queue behind
    time-outs. It warns once. What failed, or was put off, is written at the end, as far as the
    store answers then; the rest is counted.

    Args:
        store_uri: `sqlite:///...` or the URI of a server.
        experiment: Name of the experiment: one per sweep family.
        artifact_root: Folder for artifacts of a database store; a server decides for itself.
        run_name: The run's name, for the command in the warning.
        warn: Receives the one warning; called in the background thread.
        store: Makes the store that receives the rows; None = MLflow in a process of its own.
    """

    def __init__(
        self,
        store_uri: str,
        experiment: str,
        artifact_root: Path,
        run_name: str,
        warn: Callable[[str], None] = logger.warning,
        *,
        store: RowStore | None = None,
    ) -> None:
        self._store = store or _own_process(store_uri, experiment, artifact_root)
        self._store_uri = store_uri
        self._run_name = run_name
        self._warn = warn
        self._parent: TrackedRun | None = None
        self._supernet: TrackedRun | None = None
        self._summary = TrackingSummary()
        self._is_attached = False
        self._closed = False
        self._given_up = False
        self._num_failures = 0
        self._is_writer_lost = False
        self._last_job: Callable[[], None] | None = None
        self._kept: list[Callable[[], None]] = []
        self._retry_at = 0.0
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        if store_uri.startswith("sqlite"):
            # A missing database is created at once, not with the first row.
            self._jobs.put(self._store.connect)
        self._thread = threading.Thread(target=self._drain, name="mlflow-tracker", daemon=True)
        self._thread.start()

    @property
    def summary(self) -> TrackingSummary:
        """Counts of written and dropped rows so far."""
        return self._summary

    def parent(self, run: TrackedRun) -> None:
        self._parent = run
        self._jobs.put(lambda: self._store.open_sweep(run))

    def attach(self, run: TrackedRun) -> None:
        self._parent, self._is_attached = run, True
        self._jobs.put(lambda: self._store.attach(run))

    def supernet(self, run: TrackedRun) -> None:
        parent, self._supernet = self._opened_parent(), run
        self._jobs.put(lambda: self._store.write(run, parent))

    def curve(self, points: Sequence[CurvePoint]) -> None:
        parent, supernet = self._opened_parent(), self._supernet
        assert supernet is not None, "curve() before supernet()"
        if points:
            kept = tuple(points)
            self._jobs.put(lambda: self._store.add_points(supernet, parent, kept))

    def subnet(self, run: TrackedRun) -> None:
        self._write_child(run)

    def trial(self, run: TrackedRun) -> None:
        self._write_child(run)

    def supersede(self, current: Sequence[str]) -> None:
        parent, kept = self._opened_parent(), tuple(current)
        self._jobs.put(lambda: self._store.supersede(parent, kept))

    def series(self, points: Sequence[CurvePoint]) -> None:
        parent, kept = self._opened_parent(), tuple(points)
        self._jobs.put(lambda: self._store.add_points(parent, parent, kept))

    def artifact(self, path: Path) -> None:
        parent = self._opened_parent()
        self._jobs.put(lambda: self._store.add_artifact(parent, path))

    def datasets(self, datasets: Sequence[TrackedData]) -> None:
        parent, kept = self._opened_parent(), tuple(datasets)
        if kept:
            self._jobs.put(lambda: self._store.add_datasets(parent, kept))

    def bundle(self, bundle: TrackedBundle) -> None:
        parent = self._opened_parent()
        self._jobs.put(lambda: self._store.add_bundle(parent, bundle))

    def describe(self, text: str) -> None:
        parent = self._opened_parent()
        self._jobs.put(lambda: self._store.describe(parent, text))

    def close(self, status: Status, end_ms: int, timeout_s: float) -> TrackingSummary:
        if self._closed:
            return self._summary
        self._closed = True
        if self._parent is not None and not self._is_attached:
            parent = replace(self._parent, status=status, end_ms=end_ms)
            self._last_job = lambda: self._store.close_sweep(parent)
            self._jobs.put(self._last_job)
        self._jobs.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._given_up = True
            self._count_unsent(f"no answer within {timeout_s:g} s", max(1, self._jobs.qsize() - 1))
        self._store.stop(at_once=self._given_up)
        return self._summary

    def _opened_parent(self) -> TrackedRun:
        assert self._parent is not None, "parent() comes first"
        return self._parent

    def _write_child(self, run: TrackedRun) -> None:
        parent = self._opened_parent()
        self._jobs.put(lambda: self._store.write(run, parent))

    def _drain(self) -> None:
        while (job := self._jobs.get()) is not None and not self._given_up:
            if job is self._last_job:
                self._repeat_kept()
            if not self._may_try(job):
                self._put_off(job, "paused after failures")
            elif (why := self._attempt(job)) is not None:
                self._put_off(job, why)
        if self._is_attached:
            self._repeat_kept()

    def _may_try(self, job: Callable[[], None]) -> bool:
        """Whether there is no pause. It is for stores that do not answer; a new process may write
        how the sweep ended."""
        return time.monotonic() >= self._retry_at or (self._is_writer_lost and job is self._last_job)

    def _repeat_kept(self) -> None:
        """Try once more what failed, until the store fails again: a database may have been locked
        for a moment, and a write that was done in part is completed."""
        kept, self._kept = self._kept, []
        for job in kept:
            if self._given_up or not self._may_try(job) or self._attempt(job) is not None:
                return
            self._summary = replace(self._summary, num_unsent=self._summary.num_unsent - 1)

    def _attempt(self, job: Callable[[], None]) -> str | None:
        """Write; returns why it failed, or None."""
        try:
            job()
        except Exception as error:  # noqa: BLE001 - whatever MLflow, SQLAlchemy or a server raise must not end a sweep
            self._num_failures += 1
            self._is_writer_lost = isinstance(error, LostWriterError)
            if self._num_failures >= FAILURES_BEFORE_PAUSE:
                self._retry_at = time.monotonic() + PAUSE_S
            return first_line(error)
        self._num_failures = 0
        self._summary = replace(self._summary, num_written=self._summary.num_written + 1)
        return None

    def _put_off(self, job: Callable[[], None], why: str) -> None:
        if self._given_up:
            return  # counted
        if len(self._kept) < MAX_KEPT:
            self._kept.append(job)
        self._count_unsent(why, 1)

    def _count_unsent(self, why: str, count: int) -> None:
        before = self._summary
        self._summary = replace(before, num_unsent=before.num_unsent + count, first_error=before.first_error or why)
        if before.first_error is None:
            self._warn(
                f"MLflow at {shown_uri(self._store_uri)} cannot be written ({why}). The sweep continues, and its results "
                f"are kept in the run folder; write them later with: dsnet-orch sync {self._run_name}"
            )


def _own_process(store_uri: str, experiment: str, artifact_root: Path) -> RowStore:
    from orchestration.tracking.process import MlflowWriter  # it imports this module

    return MlflowWriter(store_uri, experiment, artifact_root)
