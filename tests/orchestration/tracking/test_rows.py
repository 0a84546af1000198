"""MLflow is a projection: written while a sweep runs, or from its folder afterwards, the rows are
the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from dsnet.files import read_json
from orchestration.runs.curves import CurvePoint
from orchestration.runs.folder import mlflow_store_uri
from orchestration.runs.manifest import Manifest
from orchestration.tracking.protocol import NullTracker, TrackedBundle, TrackedData, TrackedRun
from orchestration.tracking.rows import (
    Standing,
    replay,
    subnet_rows,
    supernet_row,
    sweep_end_ms,
    sweep_row,
    sweep_uid,
    trial_row,
    unix_ms,
)
from search.front.points import trial_name
from tests.orchestration.samples import Finished, call, problems_of_message, record_config, results_in


class Recorder(NullTracker):
    """A tracker that records its calls in order."""

    def __init__(self) -> None:
        self.rows: list[TrackedRun] = []
        self.points: list[CurvePoint] = []
        self.series_points: list[CurvePoint] = []
        self.files: list[str] = []
        self.current: list[str] = []
        self.splits: list[str] = []
        self.bundles: list[TrackedBundle] = []

    def parent(self, run: TrackedRun) -> None:
        self.rows.append(run)

    def supernet(self, run: TrackedRun) -> None:
        self.rows.append(run)

    def supersede(self, current: Sequence[str]) -> None:
        self.current += current

    def curve(self, points: Sequence[CurvePoint]) -> None:
        self.points += points

    def subnet(self, run: TrackedRun) -> None:
        self.rows.append(run)

    def trial(self, run: TrackedRun) -> None:
        self.rows.append(run)

    def series(self, points: Sequence[CurvePoint]) -> None:
        self.series_points += points

    def artifact(self, path: Path) -> None:
        self.files.append(path.name)

    def datasets(self, datasets: Sequence[TrackedData]) -> None:
        self.splits += [data.split for data in datasets]

    def bundle(self, bundle: TrackedBundle) -> None:
        self.bundles.append(bundle)


def rows_of(runs: Path) -> dict[str, Any]:
    """Everything in a store that is ours, by uid; ids and MLflow's own tags left out."""
    client = MlflowClient(mlflow_store_uri(runs))
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], max_results=1000)
    return {
        row.data.tags["uid"]: {
            "name": row.info.run_name,
            "status": row.info.status,
            "times": (row.info.start_time, row.info.end_time),
            "params": row.data.params,
            "datasets": sorted((used.dataset.name, used.dataset.digest) for used in row.inputs.dataset_inputs),
            "models": [_model_facts(client, output.model_id) for output in row.outputs.model_outputs],
            "tags": {name: value for name, value in row.data.tags.items() if not name.startswith("mlflow.")},
            "metrics": {
                name: sorted((p.step, p.timestamp, p.value) for p in client.get_metric_history(row.info.run_id, name))
                for name in row.data.metrics
            },
        }
        for row in found
    }


def _model_facts(client: MlflowClient, model_id: str) -> tuple[object, ...]:
    model = client.get_logged_model(model_id)
    tags = {name: value for name, value in model.tags.items() if not name.startswith("mlflow.")}
    return model.name, str(model.status), model.params, tags


def test_syncing_into_an_empty_store_writes_the_rows_of_the_launch_and_doing_it_again_changes_nothing(
    finished: Finished, tmp_path: Path
) -> None:
    folder = finished.copy(tmp_path)
    answer = call(folder, "sync", "tiny")
    assert answer.code == 0, answer.err
    assert "12 trials" in answer.out
    once = rows_of(folder / "runs")
    live = rows_of(finished.run.root)
    assert once.keys() == live.keys()
    for uid, row in once.items():
        assert row == live[uid], uid
    assert len(once[sweep_uid(finished.results.manifest, finished.run)]["models"]) == 1
    assert call(folder, "export", "tiny", "--register", "digits.gates").code == 0
    assert call(folder, "sync", "tiny").code == 0
    assert rows_of(folder / "runs") == once
    (version,) = MlflowClient(mlflow_store_uri(folder / "runs")).search_model_versions("name = 'digits.gates'")
    assert version.tags == {"bundle": read_json(finished.run.export_dir / "knee" / "bundle.json")["sha256"]}
    results = finished.results
    trials = {row["name"]: row for row in once.values() if row["tags"]["kind"] == "trial"}
    for tag, slots in (("on_front", set(results.front)), ("is_knee", {results.knee})):
        expected = {trial_name(slot): str(slot in slots).lower() for slot in range(12)}
        assert {name: row["tags"][tag] for name, row in trials.items()} == expected
    with_test = {name for name, row in trials.items() if "test/top1" in row["metrics"]}
    assert with_test == {trial_name(slot) for slot in results.front}


def test_a_sweep_that_tracks_nothing_cannot_be_synced_and_says_how_it_could(finished: Finished, tmp_path: Path) -> None:
    folder = finished.copy(tmp_path)
    path = folder / "runs" / "tiny" / "sweep.yaml"
    path.write_text(path.read_text().replace("mlflow: true", "mlflow: false"))
    record_config(path)
    answer = call(folder, "sync", "tiny")
    assert answer.code == 3
    assert problems_of_message(answer, ["tracking.mlflow", "--set tracking.mlflow=true"]) == []


def test_a_replay_tells_parent_supernet_subnets_and_trials_in_this_order(finished: Finished) -> None:
    recorder = Recorder()
    results = finished.results
    replay(results, recorder)
    kinds = [row.kind for row in recorder.rows]
    assert kinds == ["sweep", "supernet", "supernet", *["subnet"] * len(results.subnets), *["trial"] * 12]
    assert len({row.uid for row in recorder.rows}) == len(recorder.rows) - 1  # the supernet opens and closes
    below = [row for row in recorder.rows[1:] if any(row.uid.startswith(f"{uid}/") for uid in recorder.current)]
    assert below == recorder.rows[1:], "no row that is written is marked as one of earlier settings"
    assert recorder.points[-1].metrics["epoch"] == pytest.approx(8.0)
    curves = {
        prefix: [point for point in recorder.series_points if f"{prefix}/top1_by_kmadds" in point.metrics]
        for prefix in ("width", "front_val", "front_test")
    }
    assert sum(map(len, curves.values())) == len(recorder.series_points)
    assert len(curves["front_val"]) == len(curves["front_test"]) == len(results.front)
    widths = {round(subnet.madds / 1000): subnet.top1 for subnet in results.members}
    assert {point.step: point.metrics["width/top1_by_kmadds"] for point in curves["width"]} == widths
    for points in curves.values():
        assert [point.step for point in points] == sorted(
            point.step for point in points
        )  # from left to right, no zigzag
    assert recorder.splits == ["train", "gate", "val", "test"]
    exported = (results.run.export_dir / "knee").resolve()
    assert [(bundle.path.resolve(), bundle.name, bundle.register) for bundle in recorder.bundles] == [
        (exported, exported.name, None)
    ], "the link to it is not another bundle"
    assert recorder.files == ["sweep.yaml", "points.parquet", "report.html", "front.png"]


def test_a_replay_of_a_run_that_has_only_begun_tells_what_there_is(finished: Finished, tmp_path: Path) -> None:
    folder = finished.copy(tmp_path)
    Manifest(folder / "runs" / "tiny" / "manifest.json").update(stages={})
    recorder = Recorder()
    replay(results_in(folder), recorder)
    assert [row.kind for row in recorder.rows] == ["sweep"]
    assert recorder.points == []


def test_rows_carry_the_times_of_the_run_folder_and_not_of_the_writing(finished: Finished) -> None:
    results = finished.results
    manifest, run = results.manifest, results.run
    stage = manifest["stages"]["measure"]
    for row in subnet_rows(manifest, run, results):
        assert row.start_ms == unix_ms(stage["started_at"])
        assert row.end_ms == row.start_ms + int(1000 * stage["seconds"])
    record = results.records[3]
    row = trial_row(manifest, run, record, results.router_kind(3))
    assert (row.start_ms, row.end_ms) == (record.start_ms, record.finished_ms)
    assert row.name == trial_name(3)
    expected = f"{record.metrics['madds_m']:.3g} M MAdds, top-1 {100 * record.metrics['top1']:.1f} % on val"
    assert row.note.startswith("Router: ")
    assert row.note.endswith(expected)
    verify = manifest["stages"]["verify"]
    assert sweep_end_ms(manifest) == unix_ms(verify["started_at"]) + round(1000 * verify["seconds"])
    assert sweep_end_ms({**manifest, "stages": {}}) == unix_ms(manifest["created_at"])


def test_rows_of_static_subnetworks_and_gates_have_balanced_top1_on_both_splits(finished: Finished) -> None:
    results = finished.results
    verified = results.verified
    assert verified is not None
    rows = {row.params["subnet"]: row.metrics for row in subnet_rows(results.manifest, results.run, results)}
    for subnet in results.subnets:
        names = {name for name in rows[subnet.name] if name.endswith("balanced_top1")}
        assert names == (set() if subnet.is_teacher else {"balanced_top1", "test/balanced_top1"})
    for name in verified.test.routes:
        assert rows[name]["test/balanced_top1"] == verified.test.static_metrics(name)["balanced_top1"]
    point = verified.test.points[0]
    row = trial_row(
        results.manifest, results.run, results.record(point.slot), point.router, standing=Standing.of(results)
    )
    assert row.metrics["test/balanced_top1"] == point.metrics["balanced_top1"]


def test_an_unfinished_supernet_has_no_end(finished: Finished) -> None:
    results = finished.results
    row = supernet_row(results.manifest, results.run, results.config, is_done=False)
    assert (row.status, row.end_ms) == ("RUNNING", None)
    done = supernet_row(results.manifest, results.run, results.config, is_done=True)
    assert done.status == "FINISHED"
    assert done.end_ms is not None
    assert done.uid == row.uid
    # A parameter that is written is never written again: what both rows tell must be the same.
    assert {name: done.params[name] for name in row.params} == row.params
    assert done.params["supernet.network.family"] == "ds_tiny"


def test_the_parent_carries_the_whole_configuration(finished: Finished) -> None:
    results = finished.results
    params = sweep_row(results.manifest, results.run, results.config).params
    assert params["supernet.train.epochs"] == 8
    assert params["budget.trials"] == 12
    assert params["data.limit"] == 200
    regime = ("widths", "num_random", "teacher", "bn")
    assert [params[f"supernet.train.{name}"] for name in regime] == ["sandwich", 3, "ema", "private_stats"]
