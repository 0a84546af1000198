"""Rows of MLflow from the results of a run: the same rows while it runs and when `dsnet-orch sync`
writes them again."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from dashboards.theme import BLUE, INK, MUTED, SKY, VERMILION, percent, router_name, significant
from dsnet.files import read_stored
from dsnet.metrics import added_metrics
from dsnet.stored.names import FINAL
from dsnet.structure.search import TRACE, scored_candidates
from dsnet.structure.stage import BASES
from dsnet.training.supernet_run import SupernetRun
from orchestration.config.resolve import supernet_space
from orchestration.config.sweep import SweepConfig
from orchestration.results.exported import exported_bundles
from orchestration.results.measured import MeasuredSubnet
from orchestration.results.mlflow_store import store_uri, whole_sweep
from orchestration.results.report import front_info, headline, training_notes
from orchestration.results.run import RunResults
from orchestration.results.supernet_facts import SupernetFacts, resolved_settings
from orchestration.runs.curves import CurvePoint, counted_points
from orchestration.runs.folder import CURVES, RunDir, mlflow_artifact_root
from orchestration.runs.stages import canonical_settings
from orchestration.tracking.background import MlflowTracker
from orchestration.tracking.note import attach_front
from orchestration.tracking.protocol import NullTracker, TrackedBundle, TrackedData, TrackedRun, Tracker
from search.front.points import trial_name
from search.study.study import TrialRecord


def row_name(run: RunDir, name: str) -> str:
    """The name of a point's row; in a member of a sweep of supernets it begins with the supernet's
    name, as in every table."""
    return name if whole_sweep(run) is run else f"{run.name}/{name}"


def make_tracker(config: SweepConfig, run: RunDir, warn: Any) -> Tracker:
    """The tracker that the configuration asks for."""
    if not config.tracking.mlflow:
        return NullTracker()
    return MlflowTracker(
        store_uri(config, run),
        config.tracking.experiment or config.name,
        mlflow_artifact_root(whole_sweep(run).root),
        run.name,
        warn,
    )


def sweep_uid(manifest: Mapping[str, Any], run: RunDir) -> str:
    """The uid of a run's parent row."""
    return f"{run.name}/{manifest['run_id'][:12]}"


def stage_uid(manifest: Mapping[str, Any], run: RunDir, key: str) -> str:
    """The uid above the rows of one result of a stage.

    Args:
        manifest: manifest of the run.
        run: the run.
        key: the stage's key.
    """
    return f"{sweep_uid(manifest, run)}/{key[:12]}"


def current_uids(results: RunResults) -> list[str]:
    """The uids above the rows of a run's present results, for `Tracker.supersede`."""
    stages = results.manifest["stages"]
    return [
        stage_uid(results.manifest, results.run, stages[name]["key"]) for name in stages if results.is_current(name)
    ]


def unix_ms(iso: str) -> int:
    """Milliseconds since 1970 of an ISO 8601 time."""
    return int(datetime.fromisoformat(iso).timestamp() * 1000)


def sweep_end_ms(manifest: Mapping[str, Any]) -> int:
    """End of the last finished stage, Unix time in ms, or the run's creation if none has finished;
    not the time of writing, because rows repeat."""
    ends = [
        unix_ms(stage["started_at"]) + round(1000 * stage["seconds"])
        for stage in manifest["stages"].values()
        if stage["seconds"] is not None
    ]
    return max(ends, default=unix_ms(manifest["created_at"]))


def sweep_row(manifest: Mapping[str, Any], run: RunDir, config: SweepConfig) -> TrackedRun:
    """The parent row: the whole configuration as parameters, with the regime resolved unless the
    space varies the supernet."""
    written = config.model_dump(mode="json", exclude={"presets"})
    params = canonical_settings(
        written if supernet_space(config) else {**written, "supernet": resolved_settings(config)}
    )
    tags = {
        "run": run.name,
        "hardware": str(manifest["hardware"].get("cpu", "")),
        "gpu": str(manifest["hardware"].get("gpu") or "none"),
    }
    return TrackedRun(
        sweep_uid(manifest, run), run.name, "sweep", unix_ms(manifest["created_at"]), params=params, tags=tags
    )


def data_rows(manifest: Mapping[str, Any]) -> list[TrackedData]:
    """The splits of a run's images as its manifest describes them; none for a run of a release
    that did not record them."""
    facts = manifest.get("data")
    if facts is None:
        return []
    return [
        TrackedData(
            split=split,
            source=facts["name"],
            path=facts["path"],
            digest=facts["fingerprint"],
            image_shape=tuple(facts["image_shape"]),
            num_images=num_images,
            num_classes=facts["num_classes"],
        )
        for split, num_images in facts["num_images"].items()
    ]


def supernet_row(manifest: Mapping[str, Any], run: RunDir, config: SweepConfig, *, is_done: bool) -> TrackedRun:
    """The row of the supernet's training; its curves are added by step. Once done, it also holds
    network and start weights."""
    stage = manifest["stages"]["supernet"]
    start = unix_ms(stage["started_at"])
    end = start + int(1000 * stage["seconds"]) if is_done and stage["seconds"] is not None else None
    settings = resolved_settings(config)
    facts = SupernetFacts.of_stage(run.stage_dir("supernet", stage["key"])) if is_done else None
    return TrackedRun(
        f"{stage_uid(manifest, run, stage['key'])}/supernet",
        "supernet",
        "supernet",
        start,
        end,
        "FINISHED" if is_done else "RUNNING",
        params=canonical_settings(
            {
                "supernet": settings | ({} if facts is None else facts.params()),
                "data": config.data.model_dump(mode="json"),
            }
        ),
    )


def base_row(
    manifest: Mapping[str, Any], run: RunDir, name: str, training: SupernetRun, *, is_done: bool = False
) -> TrackedRun:
    """The row of a network that the structure stage trains; its curves are added by step.

    Args:
        manifest: manifest of the run.
        run: the run.
        name: the network's name.
        training: its settings.
        is_done: whether the stage is done.
    """
    stage = manifest["stages"]["structure"]
    start = unix_ms(stage["started_at"])
    return TrackedRun(
        f"{stage_uid(manifest, run, stage['key'])}/{name}",
        row_name(run, f"structure {name}"),
        "supernet",
        start,
        start + int(1000 * (stage["seconds"] or 0)) if is_done else None,
        "FINISHED" if is_done else "RUNNING",
        params=canonical_settings({"base": {"name": name, "run": training.to_json()}}),
    )


def write_structure(tracker: Tracker, results: RunResults) -> None:
    """Write what the finished structure stage holds: a row with curves for each network that it
    trained, the trace, and accuracies on the hold-out over MAdds; nothing where there is no such
    stage."""
    folder = results.structure_dir
    if folder is None:
        return
    for meta in sorted((folder / BASES).glob(f"*/{FINAL}.json")):
        training = read_stored(meta, lambda content: SupernetRun.from_json(content["run"]))
        for is_done in (False, True):
            row = base_row(results.manifest, results.run, meta.parent.name, training, is_done=is_done)
            tracker.supernet(row)
            if not is_done:
                tracker.curve(counted_points(meta.parent / CURVES))
    tracker.artifact(folder / TRACE)
    tracker.series(_holdout_curve(folder / TRACE, unix_ms(results.manifest["stages"]["structure"]["started_at"])))


def _holdout_curve(trace: Path, time_ms: int) -> list[CurvePoint]:
    """Accuracies on the hold-out as a curve over cost; of equally expensive candidates the best."""
    best: dict[int, float] = {}
    for candidate, score in scored_candidates(trace):
        best[candidate.madds] = max(best.get(candidate.madds, 0.0), score.accuracy)
    return by_cost("holdout", [{"madds_m": madds / 1e6, "top1": top1} for madds, top1 in best.items()], time_ms)


@dataclass(frozen=True)
class Standing:
    """The front, its knee and the results on `test`; known when all trials are done."""

    front: frozenset[int] = frozenset()
    """Slots on the front of the run, or on the front over all supernets if the run is part of such
    a sweep."""
    knee: int | None = None
    """The slot of the front's knee."""
    test: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    """Metrics on `test` by slot, of the gates that ran there."""

    @classmethod
    def of(cls, results: RunResults) -> Standing:
        """The standing of the trials in a run by itself."""
        return cls(frozenset(results.front), results.knee, test_metrics(results))

    def tags(self, slot: int) -> dict[str, str]:
        """Tags of a trial's row."""
        is_on_front, is_knee = slot in self.front, slot == self.knee
        role = "knee" if is_knee else "front" if is_on_front else "trial"
        return {"on_front": str(is_on_front).lower(), "is_knee": str(is_knee).lower(), **_role_tags(role)}


COLOURS: Final = {"front": BLUE, "knee": VERMILION, "route": INK, "teacher": MUTED, "trial": SKY}
"""Colour of a row's mark on MLflow's page, by role. The page sorts by role and shows 100 rows at
first: by the names of the roles, the front comes first, then the static sub-networks."""
COLOUR_TAG: Final = "mlflow.runColor"


def test_metrics(results: RunResults) -> dict[int, Mapping[str, float]]:
    """Metrics by slot of the gates that ran on `test`; empty before the verify stage."""
    verified = results.verified
    return {} if verified is None else {point.slot: point.metrics for point in verified.test.points}


def subnet_rows(manifest: Mapping[str, Any], run: RunDir, results: RunResults) -> list[TrackedRun]:
    """One row per static sub-network, including the teacher; with metrics on `test` once they are
    known."""
    stage = manifest["stages"]["measure"]
    start = unix_ms(stage["started_at"])
    end = start + int(1000 * (stage["seconds"] or 0))
    on_test = _static_on_test(results)
    return [
        TrackedRun(
            f"{stage_uid(manifest, run, stage['key'])}/{subnet.name}",
            row_name(run, subnet.name),
            "subnet",
            start,
            end,
            params={"subnet": subnet.name},
            metrics={**subnet_metrics(subnet, results), **_prefixed("test", on_test.get(subnet.name, {}))},
            tags=_role_tags("teacher" if subnet.is_teacher else "route"),
            note=_described("Static sub-network", subnet_metrics(subnet, results), on_test.get(subnet.name, {})),
        )
        for subnet in results.subnets
    ]


def _role_tags(role: str) -> dict[str, str]:
    return {"role": role, COLOUR_TAG: COLOURS[role]}


def _static_on_test(results: RunResults) -> dict[str, dict[str, float]]:
    if results.verified is None:
        return {}
    test = results.verified.test
    return {name: test.static_metrics(name) for name in test.routes}


def subnet_metrics(subnet: MeasuredSubnet, results: RunResults) -> Mapping[str, float | None]:
    """The metrics of a static sub-network, under the names that trials use."""
    return results.static_metrics(subnet)


def trial_row(
    manifest: Mapping[str, Any], run: RunDir, record: TrialRecord, router: str, standing: Standing | None = None
) -> TrackedRun:
    """The row of a trial; a failed or pruned one has its reason.

    Args:
        manifest: manifest of the run.
        run: the run.
        record: the trial.
        router: the kind of its router (`RunResults.kind_of`).
        standing: standing of all trials; None while there may be more trials.
    """
    stage = manifest["stages"]["search"]
    tags = {"state": record.state} | ({"feasible": str(record.is_feasible).lower()} if record.constraints else {})
    judged = (standing or Standing()).tags(record.slot)
    on_test = {} if standing is None else standing.test.get(record.slot, {})
    return TrackedRun(
        f"{stage_uid(manifest, run, stage['key'])}/{trial_name(record.slot)}",
        row_name(run, trial_name(record.slot)),
        "trial",
        record.start_ms,
        record.finished_ms,
        "FAILED" if record.state == "failed" else "FINISHED",
        record.reason,
        params=record.params,
        metrics={**record.metrics, **_prefixed("test", on_test)},
        tags=tags if standing is None else {**tags, **judged},
        first_tags=judged,
        note=_described(f"Router: {router_name(router)}", record.metrics, on_test),
    )


def _described(what: str, metrics: Mapping[str, float | None], on_test: Mapping[str, float]) -> str:
    """The description of a row: its cost and accuracies in one line; empty without a result."""
    top1, madds_m = metrics.get("top1"), metrics.get("madds_m")
    if top1 is None or madds_m is None:
        return ""
    text = f"{what}, {significant(madds_m)} M MAdds, top-1 {percent(top1)} on val"
    return text + (f", {percent(on_test['top1'])} on test" if "top1" in on_test else "")


def _prefixed(prefix: str, metrics: Mapping[str, float]) -> dict[str, float]:
    names = ("top1", "top5", "madds_m", "p95_madds_m", *added_metrics())
    return {f"{prefix}/{name}": metrics[name] for name in names if name in metrics}


def by_cost(prefix: str, rows: Iterable[Mapping[str, float | None]], time_ms: int) -> list[CurvePoint]:
    """Accuracies as curves of the parent over cost. MLflow draws metrics over an integer step; here
    it is the cost in thousands of MAdds."""
    points = [
        CurvePoint(
            round(1000 * row["madds_m"]),
            time_ms,
            {f"{prefix}/{name}_by_kmadds": row.get(name) for name in ("top1", "top5")},
        )
        for row in rows
        if row["madds_m"] is not None
    ]
    return sorted(points, key=lambda point: point.step)


def write_subnets(tracker: Tracker, results: RunResults) -> None:
    """Write the static sub-networks' rows, and their accuracies as a curve of the parent."""
    rows = subnet_rows(results.manifest, results.run, results)
    for row in rows:
        tracker.subnet(row)
    costs = [subnet_metrics(subnet, results) for subnet in results.members]
    tracker.series(by_cost("width", costs, rows[0].end_ms or rows[0].start_ms))


def write_front(tracker: Tracker, results: RunResults, standing: Standing, time_ms: int) -> None:
    """Write the trials' rows, now with their place on the front and metrics on `test`, and the
    front as curves.

    Args:
        tracker: receives the rows.
        results: results of the run.
        standing: standing of the run's trials.
        time_ms: time of the curves' points, Unix time in ms.
    """
    for record in results.records:
        tracker.trial(trial_row(results.manifest, results.run, record, results.kind_of(record), standing))
    tracker.series(by_cost("front_val", [results.record(slot).metrics for slot in results.front], time_ms))
    tracker.series(by_cost("front_test", test_metrics(results).values(), time_ms))


def write_artifacts(tracker: Tracker, run: RunDir) -> None:
    """Attach the configuration, the points and the report of a run to its row, as far as they are
    written."""
    for path in (run.sweep_yaml, run.points_parquet, run.report_html):
        if path.exists():
            tracker.artifact(path)


def write_bundles(tracker: Tracker, paths: Iterable[Path], folder: Path, register: str | None) -> None:
    """Make bundles logged models of a run.

    Args:
        tracker: receives the bundles.
        paths: the bundles' folders.
        folder: a folder above them; the models' names are the paths from there.
        register: name of a registered model of which each becomes a version; None = none.
    """
    for path in paths:
        name = re.sub(r"[^\w-]", "-", str(path.relative_to(folder)))  # MLflow takes no dots and slashes here
        tracker.bundle(TrackedBundle(path, name, register))


def write_overview(tracker: Tracker, results: RunResults, *, redraw: bool) -> None:
    """Put a picture and a table of the front into the parent's description; does nothing without a
    front."""
    info = front_info(results)
    if results.front and info is not None:
        uid = sweep_uid(results.manifest, results.run)
        warnings = training_notes(results)
        attach_front(tracker, results.run, uid, info, headline(results), redraw=redraw, warnings=warnings)


def replay(
    results: RunResults, tracker: Tracker, under: TrackedRun | None = None, standing: Standing | None = None
) -> None:
    """Write all rows of a run, as its launch would; rows that MLflow has already are not written
    twice.

    Args:
        results: results of the run.
        tracker: receives the rows.
        under: the row below which the run's own row is nested, if it is part of a larger sweep.
        standing: standing of the run's trials in the larger sweep.
    """
    run, manifest = results.run, results.manifest
    tracker.parent(replace(sweep_row(manifest, run, results.config), under=under))
    tracker.datasets(data_rows(manifest))
    tracker.supersede(current_uids(results))
    write_structure(tracker, results)
    if results.stage_key("supernet") is not None:
        write_supernet(tracker, results)
    if results.is_done("measure"):
        write_subnets(tracker, results)
    if results.records:
        write_front(tracker, results, standing or Standing.of(results), results.finished_ms)
    write_artifacts(tracker, run)
    write_overview(tracker, results, redraw=False)
    write_bundles(tracker, exported_bundles(run), run.export_dir, results.config.export.register_as)


def write_supernet(tracker: Tracker, results: RunResults) -> None:
    """Write the row of the supernet's training, with its curves as far as they count."""
    run, manifest, config = results.run, results.manifest, results.config
    tracker.supernet(supernet_row(manifest, run, config, is_done=False))
    tracker.curve(counted_points(run.curves_jsonl(results.stage_key("supernet") or "")))
    if results.is_done("supernet"):
        tracker.supernet(supernet_row(manifest, run, config, is_done=True))
