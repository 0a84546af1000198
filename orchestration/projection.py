"""Rows of MLflow from the results of a run: the same rows while it runs and when `dsnet-orch sync` writes them again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

from orchestration.baseline import static_metrics
from orchestration.config import SweepConfig
from orchestration.results import MeasuredSubnet, RunResults
from orchestration.rundir import RunDir, mlflow_artifact_root, mlflow_store_uri
from orchestration.stages import flatten
from orchestration.supernet_facts import SupernetFacts, resolved_settings
from orchestration.tracking import CurveTail, MlflowTracker, NullTracker, TrackedRun, Tracker
from search.points import trial_name
from search.study import TrialRecord


def store_uri(config: SweepConfig, run: RunDir) -> str:
    """The MLflow store of a run: as configured, or the database in the runs folder."""
    return config.tracking.uri or mlflow_store_uri(run.root)


def make_tracker(config: SweepConfig, run: RunDir, warn: Any) -> Tracker:
    """The tracker that the configuration asks for."""
    if not config.tracking.mlflow:
        return NullTracker()
    return MlflowTracker(
        store_uri(config, run),
        config.tracking.experiment or config.name,
        mlflow_artifact_root(run.root),
        run.name,
        warn,
    )


def sweep_uid(manifest: Mapping[str, Any], run: RunDir) -> str:
    """The uid of a run's parent row."""
    return f"{run.name}/{manifest['run_id'][:12]}"


def unix_ms(iso: str) -> int:
    """Milliseconds since 1970 of an ISO 8601 time."""
    return int(datetime.fromisoformat(iso).timestamp() * 1000)


def sweep_end_ms(manifest: Mapping[str, Any]) -> int:
    """When the last finished stage ended; the run's creation where none has. Not the time of writing: rows repeat."""
    ends = [
        unix_ms(stage["started_at"]) + round(1000 * stage["seconds"])
        for stage in manifest["stages"].values()
        if stage["seconds"] is not None
    ]
    return max(ends, default=unix_ms(manifest["created_at"]))


def sweep_row(manifest: Mapping[str, Any], run: RunDir, config: SweepConfig) -> TrackedRun:
    """The parent: the whole configuration as parameters, with the regime resolved."""
    params = flatten({**config.model_dump(mode="json", exclude={"presets"}), "supernet": resolved_settings(config)})
    tags = {
        "run": run.name,
        "hardware": str(manifest["hardware"].get("cpu", "")),
        "gpu": str(manifest["hardware"].get("gpu") or "none"),
    }
    return TrackedRun(
        sweep_uid(manifest, run), run.name, "sweep", unix_ms(manifest["created_at"]), params=params, tags=tags
    )


def supernet_row(manifest: Mapping[str, Any], run: RunDir, config: SweepConfig, *, is_done: bool) -> TrackedRun:
    """The supernet's training; its curves are added by step. Once done, it also tells network and start weights."""
    stage = manifest["stages"]["supernet"]
    start = unix_ms(stage["started_at"])
    end = start + int(1000 * stage["seconds"]) if is_done and stage["seconds"] is not None else None
    settings = resolved_settings(config)
    facts = SupernetFacts.of_stage(run.stage_dir("supernet", stage["key"])) if is_done else None
    return TrackedRun(
        f"{sweep_uid(manifest, run)}/{stage['key'][:12]}/supernet",
        "supernet",
        "supernet",
        start,
        end,
        "FINISHED" if is_done else "RUNNING",
        params=flatten(
            {
                "supernet": settings | ({} if facts is None else facts.params()),
                "data": config.data.model_dump(mode="json"),
            }
        ),
    )


def subnet_rows(manifest: Mapping[str, Any], run: RunDir, results: RunResults) -> list[TrackedRun]:
    """One row per static sub-network, the teacher included."""
    stage = manifest["stages"]["measure"]
    start = unix_ms(stage["started_at"])
    end = start + int(1000 * (stage["seconds"] or 0))
    return [
        TrackedRun(
            f"{sweep_uid(manifest, run)}/{stage['key'][:12]}/{subnet.name}",
            subnet.name,
            "subnet",
            start,
            end,
            params={"subnet": subnet.name},
            metrics=subnet_metrics(subnet, results),
            tags={"role": "teacher" if subnet.is_teacher else "route"},
        )
        for subnet in results.subnets
    ]


def subnet_metrics(subnet: MeasuredSubnet, results: RunResults) -> Mapping[str, float | None]:
    """The metrics of a static sub-network, under the names that trials use."""
    return static_metrics(subnet, results.latencies)


def trial_row(manifest: Mapping[str, Any], run: RunDir, record: TrialRecord) -> TrackedRun:
    """One row per trial; a failed or pruned one carries its reason."""
    stage = manifest["stages"]["search"]
    tags = {"state": record.state} | ({"feasible": str(record.is_feasible).lower()} if record.constraints else {})
    return TrackedRun(
        f"{sweep_uid(manifest, run)}/{stage['key'][:12]}/{trial_name(record.slot)}",
        trial_name(record.slot),
        "trial",
        record.start_ms,
        record.finished_ms,
        "FAILED" if record.state == "failed" else "FINISHED",
        record.reason,
        params=record.params,
        metrics=record.metrics,
        tags=tags,
    )


def write_widths(tracker: Tracker, results: RunResults, time_ms: int) -> None:
    """Repeat the sub-networks' values as steps of the parent, cheapest first."""
    members = results.members
    tracker.series("width", [subnet_metrics(subnet, results) for subnet in members], time_ms)


def write_front(tracker: Tracker, results: RunResults, time_ms: int) -> None:
    """Repeat the front's values as steps of the parent, cheapest first; those on test where they are verified."""
    rows = [dict(results.record(slot).metrics) for slot in results.front]
    tracker.series("front_val", [_few(row) for row in rows], time_ms)
    if results.verified is not None:
        tracker.series("front_test", [_few(point.metrics) for point in results.verified.test.points], time_ms)


def _few(metrics: Mapping[str, float]) -> dict[str, float | None]:
    return {name: metrics.get(name) for name in ("top1", "top5", "madds_m", "p95_madds_m")}


def replay(results: RunResults, tracker: Tracker, under: TrackedRun | None = None) -> None:
    """Write everything that a run has, as if it happened again; what MLflow has already is not written twice.

    Args:
        results: of the run.
        tracker: takes it.
        under: the row below which the run's own row hangs, where it is part of a larger sweep.
    """
    run, manifest = results.run, results.manifest
    tracker.parent(replace(sweep_row(manifest, run, results.config), under=under))
    if results.stage_key("supernet") is not None:
        _replay_supernet(results, tracker)
    if results.is_done("measure"):
        rows = subnet_rows(manifest, run, results)
        for row in rows:
            tracker.subnet(row)
        write_widths(tracker, results, rows[0].end_ms or rows[0].start_ms)
    for record in results.records:
        tracker.trial(trial_row(manifest, run, record))
    if results.records:
        write_front(tracker, results, results.finished_ms)
    for path in (run.sweep_yaml, run.points_parquet, run.report_html):
        if path.exists():
            tracker.artifact(path)


def _replay_supernet(results: RunResults, tracker: Tracker) -> None:
    run, manifest, config = results.run, results.manifest, results.config
    tracker.supernet(supernet_row(manifest, run, config, is_done=False))
    tracker.curve(CurveTail(run.curves_jsonl(results.stage_key("supernet") or "")).read())
    if results.is_done("supernet"):
        tracker.supernet(supernet_row(manifest, run, config, is_done=True))
