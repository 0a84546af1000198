"""A sweep of supernets in MLflow, as one tree: the sweep, its members, and below each its supernet,
sub-networks and trials."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from dashboards.supernets import supernets_front
from orchestration.config.sweep import SweepConfig
from orchestration.pipeline.context import Launch
from orchestration.results.exported import exported_bundles
from orchestration.results.mlflow_store import store_uri
from orchestration.results.protocol import Results
from orchestration.results.run import RunResults
from orchestration.runs.curves import CurvePoint, counted_points
from orchestration.runs.folder import RunDir, mlflow_artifact_root
from orchestration.runs.manifest import Manifest
from orchestration.supernets.entries import MemberEntry
from orchestration.supernets.report import global_headline, supernets_info, sweep_training_notes
from orchestration.supernets.results import SupernetSweepResults
from orchestration.tracking.background import MlflowTracker
from orchestration.tracking.note import attach_front
from orchestration.tracking.process import SharedWriter
from orchestration.tracking.protocol import NullTracker, Status, TrackedRun, Tracker
from orchestration.tracking.rows import (
    Standing,
    by_cost,
    data_rows,
    replay,
    supernet_row,
    sweep_end_ms,
    sweep_row,
    sweep_uid,
    test_metrics,
    unix_ms,
    write_artifacts,
    write_bundles,
)

HYPERVOLUME = "static_hypervolume"
"""Metric by epoch in a supernet's row."""


class TreeTrackers:
    """Makes the trackers of a sweep and of its members: each has its own rows; all write through
    one process.

    Args:
        config: configuration of the sweep.
        run: the sweep's run folder.
    """

    def __init__(self, config: SweepConfig, run: RunDir) -> None:
        self._run = run
        self._where = (
            store_uri(config, run),
            config.tracking.experiment or config.name,
            mlflow_artifact_root(run.root),
        )
        self._writer = SharedWriter(*self._where) if config.tracking.mlflow else None

    def make(self, warn: Callable[[str], None]) -> Tracker:
        """A tracker for the sweep or a member; `warn` is called if the store cannot be written."""
        if self._writer is None:
            return NullTracker()
        return MlflowTracker(*self._where, self._run.name, warn, store=self._writer)

    def end(self) -> None:
        """End the writing process; all trackers are closed by then."""
        if self._writer is not None:
            self._writer.end()


def running_row(run: RunDir, manifest: Manifest, config: SweepConfig) -> TrackedRun:
    """The row of a member's supernet while it trains."""
    return supernet_row(manifest.read(), run, config, is_done=False)


def fate_row(entry: MemberEntry, run: RunDir, manifest: Manifest, config: SweepConfig) -> TrackedRun | None:
    """The row of a member's supernet after its training; None if its training never began."""
    content = manifest.read()
    if "supernet" not in content["stages"]:
        return None
    if entry.state == "trained":
        return replace(supernet_row(content, run, config, is_done=True), tags={"state": "trained"})
    return replace(
        supernet_row(content, run, config, is_done=False),
        status="FAILED" if entry.state == "failed" else "FINISHED",
        end_ms=entry.end_ms,
        reason=entry.reason,
        tags={"state": entry.state},
    )


def reports_as_points(entry: MemberEntry) -> list[CurvePoint]:
    """The reports of a supernet as points; the step is the epoch."""
    return [CurvePoint(epoch, entry.end_ms, {HYPERVOLUME: value}) for epoch, value in entry.reports]


def track_fate(tracker: Tracker, entry: MemberEntry, work: Launch) -> None:
    """Write the outcome of a member's supernet and its reports."""
    row = fate_row(entry, work.run, work.manifest, work.config)
    if row is not None:
        _write_supernet(tracker, row, entry)
        # Also of an earlier launch: the store may be a new one.
        tracker.curve(counted_points(work.run.curves_jsonl(work.manifest.read()["stages"]["supernet"]["key"])))


def _write_supernet(tracker: Tracker, row: TrackedRun, entry: MemberEntry) -> None:
    tracker.supernet(replace(row, status="RUNNING", end_ms=None))
    tracker.curve(reports_as_points(entry))
    tracker.supernet(row)


def standing_of(results: SupernetSweepResults, name: str) -> Standing:
    """The role of a supernet's trials on the front over all supernets, and their metrics on
    `test`."""
    member, knee = results.supernets[name], results.knee
    return Standing(
        front=frozenset(gate.slot for gate in results.front_gates if gate.supernet == name),
        knee=knee.slot if knee is not None and knee.supernet == name else None,
        test=test_metrics(member),
    )


def write_global_front(tracker: Tracker, results: SupernetSweepResults) -> None:
    """Write the front over all supernets as curves of the sweep's row; on `test` too, once
    verified."""
    end_ms = supernets_end_ms(results)
    tracker.series(by_cost("front_val", [results.feasible[gate].metrics for gate in results.front_gates], end_ms))
    if results.is_verified:
        rows = [standing_of(results, gate.supernet).test[gate.slot] for gate in results.frozen]
        tracker.series(by_cost("front_test", rows, end_ms))


def write_global_overview(tracker: Tracker, results: SupernetSweepResults, *, redraw: bool) -> None:
    """Put a picture and a table of the front over all supernets into the description of the sweep's
    row."""
    if results.front_gates:
        uid, info = sweep_uid(results.manifest, results.run), supernets_front(supernets_info(results))
        warnings = sweep_training_notes(results)
        attach_front(tracker, results.run, uid, info, global_headline(results), redraw=redraw, warnings=warnings)


def member_end(entry: MemberEntry, member: RunResults) -> tuple[Status, int]:
    """Final status of a member's row, and its end in ms."""
    if entry.state in ("stopped", "failed"):
        return "FAILED" if entry.state == "failed" else "FINISHED", entry.end_ms
    is_finished = entry.state == "trained" and member.is_done("search")
    return "FINISHED" if is_finished else "KILLED", sweep_end_ms(member.manifest)


def supernets_end_ms(results: SupernetSweepResults) -> int:
    """End of the last stage of any member, Unix time in ms; not the time of writing, because rows
    repeat."""
    ends = [entry.end_ms for entry in results.entries]
    ends += [sweep_end_ms(member.manifest) for member in results.supernets.values()]
    return max([*ends, unix_ms(results.manifest["created_at"])])


def row_of(results: Results) -> TrackedRun:
    """The row of a sweep of either kind, with the status and end that its results say."""
    several = results if isinstance(results, SupernetSweepResults) else None
    end_ms = sweep_end_ms(results.manifest) if several is None else supernets_end_ms(several)
    row = sweep_row(results.manifest, results.run, results.config)
    return replace(row, status="FINISHED" if results.is_verified else "KILLED", end_ms=end_ms)


def replay_sweep(results: Results, make: Callable[[str], Tracker]) -> list[tuple[Tracker, Status, int]]:
    """Write all rows of a sweep of one supernet or of several, as its launch would; arguments and
    result are those of `replay_supernets`."""
    if isinstance(results, SupernetSweepResults):
        return replay_supernets(results, make)
    assert isinstance(results, RunResults)
    tracker = make("")
    replay(results, tracker)
    return [(tracker, "FINISHED" if results.is_verified else "KILLED", sweep_end_ms(results.manifest))]


def replay_supernets(
    results: SupernetSweepResults, make: Callable[[str], Tracker]
) -> list[tuple[Tracker, Status, int]]:
    """Write all rows of a sweep of supernets, as its launch would.

    Args:
        results: results of the sweep.
        make: gives the tracker of a member by its name, and that of the sweep by the empty name.

    Returns:
        the trackers, each with the status and the time to close it with; the sweep's own last.
    """
    run, config, tracker = results.run, results.config, make("")
    parent = sweep_row(results.manifest, run, config)
    tracker.parent(parent)
    tracker.datasets(data_rows(results.manifest))
    members = [results.member(entry.name) for entry in results.entries]
    tracker.supersede([sweep_uid(member.manifest, member.run) for member in members if member is not None])
    trackers: list[tuple[Tracker, Status, int]] = []
    for entry in results.entries:
        member = results.member(entry.name)
        if member is None:
            continue
        own = make(entry.name)
        replay(
            member,
            own,
            under=parent,
            standing=standing_of(results, entry.name) if entry.name in results.supernets else None,
        )
        row = fate_row(entry, member.run, Manifest(member.run.manifest_path), member.config)
        if row is not None and entry.state != "waiting":
            _write_supernet(own, row, entry)
        trackers.append((own, *member_end(entry, member)))
    if results.front_gates:
        write_global_front(tracker, results)
    write_artifacts(tracker, run)
    write_global_overview(tracker, results, redraw=False)
    write_bundles(tracker, exported_bundles(run), run.export_dir, config.export.register_as)
    trackers.append((tracker, "FINISHED" if results.is_verified else "KILLED", supernets_end_ms(results)))
    return trackers
