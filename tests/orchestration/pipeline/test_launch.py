"""One command from a sweep file to a verified front: the files that it leaves, and the effect of
launching again."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from mlflow.tracking import MlflowClient

from dsnet.arithmetic import arithmetic_facts
from dsnet.deploy.bundle import load_bundle
from dsnet.deploy.engines import graph_engines
from dsnet.errors import StoppedError
from dsnet.gates.fit import score_run
from dsnet.measure.latency import device_name
from dsnet.routing.routing_table import RoutingTable
from dsnet.routing.table_routing import run_on_table
from orchestration.commands.planning import prepare_again
from orchestration.pipeline.claims import bundle_claims
from orchestration.pipeline.context import Launch
from orchestration.progress import read_task_state
from orchestration.runs.folder import mlflow_store_uri
from orchestration.runs.manifest import Manifest
from orchestration.tracking.rows import current_uids, trial_row
from search.front.points import trial_name
from search.front.points_file import load_points
from search.front.selection import front_slots
from tests.dsnet.samples import batch1_ms
from tests.orchestration.samples import (
    LOOPBACK,
    ONLY_BUNDLES,
    SWEEP,
    TINY,
    WITHOUT_MLFLOW,
    Finished,
    call,
    results_in,
    snapshot,
    write_sweep,
)

pytestmark = pytest.mark.ray


def test_a_sweep_ends_well_and_leaves_every_file_of_the_run_folder(finished: Finished) -> None:
    assert finished.answer.code == 0, finished.answer.err
    run, results = finished.run, finished.results
    keys = {stage: results.done_key(stage) for stage in ("supernet", "measure", "table", "search", "verify")}
    expected = [
        run.sweep_yaml,
        run.manifest_path,
        run.splits_json,
        run.stage_dir("supernet", keys["supernet"]) / "final.safetensors",
        run.curves_jsonl(keys["supernet"]),
        run.subnets_json(keys["measure"]),
        run.latency_json(keys["measure"]),
        run.table(keys["table"], "gate"),
        run.table(keys["table"], "val"),
        run.sealed_table(keys["table"]),
        run.study_journal(keys["search"]),
        run.stage_dir("search", keys["search"]) / "arithmetic.json",
        *(run.gate_weights(keys["search"], slot) for slot in range(12)),
        run.verify_json(keys["verify"]),
        run.points_parquet,
        run.report_html,
        run.root / "mlflow.db",
    ]
    assert [path for path in expected if not path.is_file()] == []
    assert not run.lock_path.exists()
    assert not run.stop_path.exists()
    assert len(list(run.export_dir.iterdir())) == 2, "a bundle, and the link to it"
    assert "in its last bits" not in finished.answer.err, "trials are the same alone and in company here"
    assert results.manifest["hardware"]["mkl_cbwr"] == arithmetic_facts()["mkl_cbwr"]


def test_the_front_and_the_way_to_everything_stand_on_stdout_and_progress_on_stderr(finished: Finished) -> None:
    out, err = finished.answer.out, finished.answer.err
    run = finished.run
    for slot in finished.results.front:
        assert trial_name(slot) in out
    for said in (
        str(run.report_html),
        str(run.points_parquet),
        "dsnet.load_bundle(",
        f"dsnet-orch ui {shlex.quote(str(run.path))}",
    ):
        assert said in out
    for stage in ("supernet:", "measure:", "search:", "verify:"):
        assert stage in err
        assert stage not in out
    assert "supernet: 8 of 8 epochs" in err
    for done in (4, 8, 12):
        assert f"search: {done} of 12 trials" in err
    assert read_task_state(run.progress_json) is not None
    assert "Traceback" not in err


def test_it_listens_on_the_loopback_only_and_leaves_no_process_behind(finished: Finished) -> None:
    assert finished.listeners, "Ray listens while a sweep runs; seeing nothing means that this test is blind"
    assert finished.listeners <= set(LOOPBACK)
    assert finished.remotes, "its processes talk to each other"
    assert finished.remotes <= set(LOOPBACK)
    assert finished.left_behind == ()


def test_points_are_what_the_tables_say(finished: Finished) -> None:
    results, run = finished.results, finished.run
    rows = load_points(run.points_parquet)
    assert {(row["kind"], row["split"]) for row in rows} == {
        (kind, split) for kind in ("subnet", "gate", "control") for split in ("val", "test")
    }
    key = results.done_key("table")
    tables = {"val": RoutingTable.load(run.table(key, "val")), "test": RoutingTable.load(run.sealed_table(key))}
    for row in rows:
        table = tables[row["split"]]
        if row["kind"] == "subnet":
            route = table.routes.index(row["name"])
            assert row["top1"] == pytest.approx(table.top1()[route], abs=1e-12)
            assert row["madds_m"] == pytest.approx(table.madds[route] / 1e6)
        elif row["kind"] == "gate":
            router = results.router(row["slot"])
            scores = score_run(run_on_table(router, table), table)
            assert {name: row[name] for name in ("top1", "top5", "madds_m", "p95_madds_m")} == pytest.approx(
                {name: scores[name] for name in ("top1", "top5", "madds_m", "p95_madds_m")}
            )
            assert row["is_front"] == (row["slot"] in results.front)
    gates = Counter(row["split"] for row in rows if row["kind"] == "gate")
    assert gates == {"val": 12, "test": len(results.front)}
    assert {row["name"] for row in rows if row["kind"] == "control"} == {"cascade", "reachable", "oracle"}


def test_the_front_is_that_of_val_and_verify_ran_what_the_table_said(finished: Finished) -> None:
    results = finished.results
    verified = results.verified
    assert verified is not None
    values = np.array([[record.metrics["top1"], record.metrics["madds_m"]] for record in results.completed])
    slots = [record.slot for record in results.completed]
    assert verified.front == front_slots(slots, values, ("maximize", "minimize"))
    assert verified.num_openings == results.manifest["test_openings"] == 1
    for point, agreement in zip(verified.test.points, verified.agreements, strict=True):
        assert point.slot == agreement.slot
        assert agreement.num_images == verified.test.num_images
        assert agreement.top1 == pytest.approx(point.metrics["top1"], abs=agreement.num_ties / agreement.num_images)
        if agreement.num_ties == 0:
            assert agreement.madds_m == pytest.approx(point.metrics["madds_m"])


def test_everything_is_timed_on_every_device_and_trials_are_scored_with_their_tables(finished: Finished) -> None:
    results, run = finished.results, finished.run
    assert {name: table.threads for name, table in results.latencies.items()} == {"": 1, "two": 2}
    assert run.latency_json(results.done_key("measure"), "two").is_file()
    val = RoutingTable.load(run.table(results.done_key("table"), "val"))
    for record in results.completed:
        shares = run_on_table(results.router(record.slot), val).runs
        kind = results.router_kind(record.slot)
        for name, table in results.latencies.items():
            suffix = f".{name}" if name else ""
            assert record.metrics[f"latency_ms{suffix}"] == pytest.approx(batch1_ms(table, shares, val.routes, kind))
            ideal_ms = table.ideal_ms(8, shares, val.routes, kind)
            assert record.metrics[f"latency_ms_batch8{suffix}"] == pytest.approx(ideal_ms)
            assert results.baseline[f"latency_ms_batch8{suffix}"] == table.subnets[8][results.widest.name].median_ms
    assert results.verified is not None
    assert {name: own.threads for name, own in results.verified.latencies.items()} == {"": 1, "two": 2}
    ranges = results.metric_ranges
    for record in results.completed:
        assert all(low <= record.metrics[name] <= high for name, (low, high) in ranges.items())


def test_mlflow_holds_the_sweep_its_supernet_every_subnet_and_every_trial_under_the_same_metric_names(
    finished: Finished,
) -> None:
    results = finished.results
    client = MlflowClient(mlflow_store_uri(finished.run.root))
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    rows = client.search_runs([experiment.experiment_id], max_results=1000)
    kinds = Counter(row.data.tags["kind"] for row in rows)
    assert kinds == {"sweep": 1, "supernet": 1, "subnet": len(results.subnets), "trial": 12}
    assert {row.info.status for row in rows} == {"FINISHED"}
    parent = next(row for row in rows if row.data.tags["kind"] == "sweep")
    children = [row for row in rows if row is not parent]
    assert {row.data.tags["mlflow.parentRunId"] for row in children} == {parent.info.run_id}
    shared = {"top1", "top5", "madds_m", "p95_madds_m", "params_m", "latency_ms"}
    for row in children:
        if row.data.tags["kind"] == "trial" or row.data.tags.get("role") == "route":
            assert shared <= row.data.metrics.keys()
    for record in results.records:
        row = next(row for row in children if row.info.run_name == trial_name(record.slot))
        assert row.data.metrics["top1"] == record.metrics["top1"]
        assert float(row.data.params["gate.target"]) == pytest.approx(record.params["gate.target"])
    supernet = next(row for row in children if row.data.tags["kind"] == "supernet")
    curves = {name for name in supernet.data.metrics if name.startswith("loss/")}
    assert len(curves) >= 3
    steps = [point.step for point in client.get_metric_history(supernet.info.run_id, sorted(curves)[0])]
    assert len(steps) >= 8
    assert steps == sorted(set(steps))
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} >= {"report.html", "points.parquet"}


def _mlflow_rows(finished: Finished) -> list[tuple[object, ...]]:
    client = MlflowClient(mlflow_store_uri(finished.run.root))
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    rows = client.search_runs([experiment.experiment_id], max_results=1000)
    return sorted(
        (
            row.info.run_id,
            row.info.status,
            row.info.start_time,
            row.info.end_time,
            sorted(row.data.params.items()),
            sorted(row.data.tags.items()),
            [
                (name, point.step, point.timestamp, point.value)
                for name in sorted(row.data.metrics)
                for point in client.get_metric_history(row.info.run_id, name)
            ],
        )
        for row in rows
    )


def test_a_second_launch_runs_nothing_again_and_changes_no_row_of_mlflow(finished: Finished) -> None:
    # On the shared sweep itself: that nothing changes is the claim.
    stages = ("supernet", "measure", "table", "search", "verify")
    before = {stage: snapshot(finished.run.path / stage) for stage in stages}
    manifest, rows = finished.results.manifest, _mlflow_rows(finished)
    again = call(finished.folder, "launch", SWEEP)
    assert again.code == 0, again.err
    assert "starting Ray" not in again.err
    assert {stage: snapshot(finished.run.path / stage) for stage in stages} == before
    assert finished.results.manifest == manifest
    assert _mlflow_rows(finished) == rows
    assert again.out == finished.answer.out


@pytest.mark.usefixtures("ray_cluster")
def test_a_larger_budget_continues_the_same_study_and_verifies_the_new_front(
    finished: Finished, tmp_path: Path
) -> None:
    folder = finished.copy(tmp_path)
    read_before = results_in(folder)
    assert read_before.records == finished.results.records
    answer = call(folder, "launch", SWEEP, "--trials", "20", *WITHOUT_MLFLOW)
    assert answer.code == 0, answer.err
    old, new = finished.results, results_in(folder)
    assert len(read_before.records) == 12, "what was read stays until it is refreshed"
    read_before.refresh()
    assert (read_before.records, read_before.front, read_before.verified) == (new.records, new.front, new.verified)
    assert new.records[:12] == old.records
    assert len(new.records) == 20
    assert new.stage_key("search") == old.stage_key("search")
    assert new.stage_key("supernet") == old.stage_key("supernet")
    assert new.verified is not None
    assert new.verified.front == new.front
    num_openings = 1 + (new.front != old.front)
    assert new.manifest["test_openings"] == new.verified.num_openings == num_openings
    assert (f"test was read {num_openings} times" in answer.out) == (num_openings > 1)


@pytest.mark.usefixtures("ray_cluster")
def test_another_space_starts_a_new_study_beside_the_old_one_and_the_way_back_finds_the_old_one(
    finished: Finished, tmp_path: Path
) -> None:
    folder = finished.copy(tmp_path)
    old = finished.results
    write_sweep(folder, TINY + "space: {gate.target: {uniform: [0.2, 0.6]}}\n", "narrow.yaml")
    answer = call(folder, "launch", "narrow.yaml", "--trials", "4", *WITHOUT_MLFLOW)
    assert answer.code == 0, answer.err
    new = results_in(folder)
    assert new.stage_key("search") != old.stage_key("search")
    assert [set(record.params) for record in new.records] == [{"gate.target"}] * 4
    assert all(0.2 <= float(record.params["gate.target"]) <= 0.6 for record in new.records)
    assert {stage: new.stage_key(stage) for stage in ("supernet", "measure", "table")} == {
        stage: old.stage_key(stage) for stage in ("supernet", "measure", "table")
    }
    assert len(list((folder / "runs" / "tiny" / "search").iterdir())) == 2
    studies = [trial_row(at.manifest, at.run, at.records[0], "gate").uid.rpartition("/")[0] for at in (old, new)]
    assert [uid in current_uids(new) for uid in studies] == [False, True], "rows of the old study are superseded"
    assert call(folder, "launch", SWEEP, *WITHOUT_MLFLOW).code == 0
    back = results_in(folder)
    assert back.records == old.records
    assert back.verified == old.verified


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_device_with_an_engine_says_so_in_tables_report_and_claims(finished: Finished, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="extra deploy is not installed")
    pytest.importorskip("onnxscript", reason="extra deploy is not installed")
    folder = finished.copy(tmp_path)
    text = TINY.replace("measure: {", "measure: {engine: onnxruntime, ").replace(ONLY_BUNDLES, "")
    write_sweep(folder, text, "engine.yaml")
    answer = call(folder, "launch", "engine.yaml", "--trials", "4", *WITHOUT_MLFLOW)
    assert answer.code == 0, answer.err
    new, old = results_in(folder), finished.results
    assert new.stage_key("supernet") == old.stage_key("supernet")
    assert new.stage_key("measure") != old.stage_key("measure")
    (engine,) = (engine for engine in graph_engines() if engine.name == "onnxruntime")
    named = {"": f"{device_name('cpu')}, {engine.title}", "two": device_name("cpu")}
    assert {name: table.device for name, table in new.latencies.items()} == named
    assert new.verified is not None
    assert {name: latency.device for name, latency in new.verified.latencies.items()} == named
    assert f"latency_ms: {named['']}, 1 thread" in " ".join(call(folder, "pareto", "tiny").out.split())
    assert engine.title in new.run.report_html.read_text(encoding="utf-8")
    claims = bundle_claims(prepare_again(new), new, new.front[0])
    assert claims["latency"]["device"] == named[""]
    assert load_bundle(folder / "runs" / "tiny" / "export" / "knee").engine == "onnxruntime", "the default format"
    assert call(folder, "launch", SWEEP, *WITHOUT_MLFLOW).code == 0
    assert results_in(folder).verified == old.verified


def test_results_below_a_stage_that_is_being_redone_are_not_shown_as_current(
    finished: Finished, tmp_path: Path
) -> None:
    folder = finished.copy(tmp_path)
    manifest = Manifest(folder / "runs" / "tiny" / "manifest.json")
    stage = manifest.read()["stages"]["supernet"]
    manifest.record_stage("supernet", {**stage, "key": "0" * 64})  # as after a changed setting, while it trains
    results = results_in(folder)
    assert results.records == []
    assert results.subnets == ()
    assert results.verified is None


def test_the_stored_sweep_file_continues_the_same_run_from_any_folder(finished: Finished, tmp_path: Path) -> None:
    answer = call(tmp_path, "plan", finished.run.sweep_yaml, "--dry", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["run"] == str(finished.run.path)
    assert {stage["status"] for stage in answer.json["stages"]} == {"done"}


@pytest.mark.usefixtures("ray_cluster")
def test_two_ray_workers_train_the_supernet_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def enough(work: Launch, *_: object) -> None:
        raise StoppedError("the other stages know nothing of workers")

    monkeypatch.setattr("orchestration.pipeline.launch.measure_stage", enough)
    write_sweep(tmp_path)
    few = ("--set", "supernet.workers=2", "--set", "supernet.train.epochs=2")
    answer = call(tmp_path, "launch", SWEEP, *few, *WITHOUT_MLFLOW)
    assert answer.code == 6, answer.err
    results = results_in(tmp_path)
    curves = results.run.curves_jsonl(results.done_key("supernet")).read_text().splitlines()
    assert [json.loads(line)["step"] for line in curves] == sorted({json.loads(line)["step"] for line in curves})
    assert json.loads(curves[-1])["step"] == json.loads(curves[-1])["num_steps"]


def test_the_splits_are_recorded_and_disjoint(finished: Finished) -> None:
    content = json.loads(finished.run.splits_json.read_text())
    parts = {name: content["ids"][name] for name in ("train", "gate", "val", "test")}
    everything = [index for part in parts.values() for index in part]
    assert len(everything) == len(set(everything))
    assert max(map(len, parts.values())) == 200


def test_verified_results_survive_json(finished: Finished) -> None:
    verified = finished.results.verified
    assert verified is not None
    assert type(verified).from_json(json.loads(json.dumps(asdict(verified)))) == verified
