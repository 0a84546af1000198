"""The structure stage in a launch: its keys, its rows in MLflow, the report, and continuing it."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlflow
import pytest

from benchmarks.processes import Answer, Command
from dsnet.errors import StoppedError
from dsnet.files import file_sha256
from dsnet.space.entry_gate import differs_before_gates
from dsnet.structure.search import scored_candidates
from orchestration.config.loading import load_config
from orchestration.pipeline import placement as placement_module
from orchestration.pipeline import structure as structure_module
from orchestration.prepare.preparation import prepare, stage_definitions, supernet_record
from orchestration.results.run import RunResults
from orchestration.results.structure import structure_of, training_cost
from orchestration.results.training_review import facts_of
from orchestration.runs.folder import RunDir
from orchestration.runs.stages import StageDir, plan_stages
from orchestration.workers.nodes import Node
from orchestration.workers.supernet import SupernetJob
from tests.orchestration.samples import SWEEP, TINY, WITHOUT_MLFLOW, call, results_in, snapshot, write_sweep

STRUCTURE = "{method: greedy, targets: [0.4, 0.7, 1.0], pin: gate, step: 16, levels: 4, holdout: 0.2, epochs: 2}"


def sweep_text(structure: str = STRUCTURE) -> str:
    text = TINY.replace("  options: {num_routes: 3}\n", f"  options: {{num_routes: 3}}\n  structure: {structure}\n")
    return text.replace("epochs: 8", "epochs: 4").replace("trials: 12", "trials: 4")


@dataclass(frozen=True)
class Found:
    """A finished launch whose sub-networks were searched; only to be read."""

    folder: Path
    answer: Answer

    @property
    def results(self) -> RunResults:
        return results_in(self.folder)

    @property
    def stage(self) -> Path:
        """The folder of the structure stage."""
        return self.results.run.stage_dir("structure", self.results.done_key("structure"))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Found:
    folder = tmp_path_factory.mktemp("found")
    write_sweep(folder, sweep_text())
    return Found(folder, call(folder, "launch", SWEEP))


def trace(stage: Path) -> list[Mapping[str, Any]]:
    lines = [json.loads(line) for line in (stage / "trace.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.mark.ray
def test_the_supernet_has_the_sub_networks_that_were_found(found: Found) -> None:
    assert found.answer.code == 0, found.answer.err
    results = found.results
    assert [subnet.name for subnet in results.members] == ["0.4", "0.7", "1"]
    shares = [subnet.madds / results.widest.madds for subnet in results.members]
    assert shares == pytest.approx([0.4, 0.7, 1.0], abs=0.1)
    info = structure_of(results)
    assert info is not None
    assert info.subnets == ("0.4", "0.7", "1")
    assert info.widths[-1] == info.max_widths
    assert {row[:2] for row in info.widths} == {info.max_widths[:2]}, "pinned up to the gate"
    assert len(info.candidates) == len(scored_candidates(found.stage / "trace.jsonl")) > 3
    assert info.num_images == 40
    origin = json.loads((results.run.stage_dir("supernet", results.done_key("supernet")) / "final.json").read_text())
    assert origin["run"]["origin"]["sha256"] == file_sha256(found.stage / "structure.safetensors")
    assert facts_of(results).is_from_scratch
    made = results.supernet
    assert made is not None
    assert dict(made.lines(None))["start weights"] == "those of the choice of sub-networks"


@pytest.mark.ray
def test_a_pipe_gets_lines_about_the_candidates_and_the_hold_out_is_not_kept(found: Found) -> None:
    lines = found.answer.err.splitlines()
    assert any(re.match(r"structure: candidates: \d+ of \d+ candidates", line) for line in lines)
    assert not list(found.stage.glob("*held-out*"))


@pytest.mark.ray
def test_a_hold_out_that_is_too_small_is_named_once_before_anything_is_trained(found: Found) -> None:
    (warning,) = [line for line in found.answer.err.splitlines() if "the hold-out of the structure search" in line]
    assert "has 40 images" in warning
    assert "supernet.structure.holdout" in warning


@pytest.mark.ray
def test_status_and_report_show_the_choice_and_what_it_has_cost(found: Found) -> None:
    stages = call(found.folder, "status", "tiny", "--json").json["stages"]
    assert list(stages) == ["structure", "supernet", "measure", "table", "search", "verify"]
    assert {stage["status"] for stage in stages.values()} == {"done"}
    page = found.results.run.report_html.read_text()
    assert "Choice of sub-networks" in page
    cost = training_cost(found.results)
    assert cost is not None
    assert str(cost) in page
    assert 0 < cost.search < cost.bases < cost.joint
    assert cost.total == pytest.approx(cost.search + cost.bases + cost.joint)


@pytest.mark.ray
def test_mlflow_has_the_trained_network_the_trace_and_a_curve_over_cost(found: Found) -> None:
    client = mlflow.MlflowClient(f"sqlite:///{found.folder}/runs/mlflow.db")
    (experiment,) = [each for each in client.search_experiments() if each.name == "tiny"]
    rows = {row.info.run_name: row for row in client.search_runs([experiment.experiment_id])}
    base, sweep = rows["structure us_net"], rows["tiny"]
    assert base.info.status == "FINISHED"
    assert base.data.params["base.name"] == "us_net"
    assert client.get_metric_history(base.info.run_id, "loss/largest")
    assert "trace.jsonl" in {file.path for file in client.list_artifacts(sweep.info.run_id)}
    history = client.get_metric_history(sweep.info.run_id, "holdout/top1_by_kmadds")
    assert {point.step for point in history} == {
        round(candidate.madds / 1000) for candidate, _ in scored_candidates(found.stage / "trace.jsonl")
    }


@pytest.mark.ray
@pytest.mark.long
def test_bases_that_are_trained_at_the_same_time_are_pruned_and_have_rows(tmp_path: Path, ray_cluster: None) -> None:
    structure = "{method: multi_base, targets: [0.5, 1.0], pin: gate, step: 4, epochs: 1, concurrent: 2, bases: {widths: [0.75, 1.0]}}"
    write_sweep(tmp_path, sweep_text(structure))
    answer = call(tmp_path, "launch", SWEEP)
    assert answer.code == 0, answer.err
    results = results_in(tmp_path)
    assert [subnet.name for subnet in results.members] == ["0.5", "1"]
    info, cost = structure_of(results), training_cost(results)
    assert info is not None
    assert info.method == "multi_base, channels sorted by bn_gamma"
    assert not info.candidates
    assert cost is not None
    assert cost.search == 0 < cost.bases < cost.joint
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    (experiment,) = [each for each in client.search_experiments() if each.name == "tiny"]
    rows = {row.info.run_name: row for row in client.search_runs([experiment.experiment_id])}
    for name, subnet in (("base_0.75", "0.75"), ("base_1", "1")):
        row = rows[f"structure {name}"]
        assert row.info.status == "FINISHED"
        assert client.get_metric_history(row.info.run_id, f"loss/{subnet}")


BESIDE = "{method: multi_base, targets: [0.4, 1.0], pin: gate, step: 4, epochs: 80, concurrent: 2, bases: {widths: [0.75, 1.0], rounds: 2}}"


@pytest.mark.ray
@pytest.mark.long
def test_bases_that_were_killed_while_both_were_trained_end_with_the_same_bits(
    tmp_path: Path, ray_cluster: None
) -> None:
    """Also if they are trained one after another: the threads are given."""
    text = sweep_text(BESIDE).replace("  train:", "  threads: 1\n  train:")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        write_sweep(folder, text)
    answer = call(whole, "launch", SWEEP, "--set", "supernet.structure.concurrent=1", *WITHOUT_MLFLOW)
    assert answer.code == 0, answer.err

    def begun(pattern: str) -> set[str]:
        return {file.parent.name for file in killed.glob(f"runs/tiny/structure/*/bases/*/{pattern}")}

    command = Command(killed, "launch", SWEEP, *WITHOUT_MLFLOW)
    try:
        command.wait_for(lambda: len(begun("epoch-*.json")) == 2)
        command.process.send_signal(signal.SIGKILL)
        assert command.wait().code == -signal.SIGKILL
    finally:
        command.end()
    assert not begun("final.json"), "both were at work"
    again = call(killed, "launch", SWEEP, *WITHOUT_MLFLOW)
    assert again.code == 0, again.err
    assert begun("final.json") == {"base_0.75", "base_1", "base_0.75_round_1"}
    stages = [
        results.run.stage_dir("structure", results.done_key("structure"))
        for results in (results_in(whole), results_in(killed))
    ]
    assert trace(stages[1]) == trace(stages[0])
    for name in ("structure.safetensors", "bases/base_0.75_round_1/final.safetensors"):
        assert file_sha256(stages[1] / name) == file_sha256(stages[0] / name)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("settings", "threads"),
    [((), 4), (("supernet.structure.concurrent=1",), 8), (("supernet.threads=3",), 3)],
)
def test_networks_that_are_trained_side_by_side_share_the_cores(
    settings: tuple[str, ...], threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: None
) -> None:
    jobs: list[SupernetJob] = []

    def stop(job: SupernetJob, *data: object, **callbacks: object) -> Path:
        jobs.append(job)
        raise StoppedError("stopped by the test")

    monkeypatch.setattr(structure_module, "train_on_ray", stop)
    for module in (structure_module, placement_module):
        monkeypatch.setattr(module, "cluster_nodes", lambda: [Node("a", {"CPU": 8.0})])
    write_sweep(tmp_path, sweep_text(BESIDE))
    call(tmp_path, "launch", SWEEP, *WITHOUT_MLFLOW, *(part for setting in settings for part in ("--set", setting)))
    assert {job.threads for job in jobs} == {threads}


@pytest.mark.ray
@pytest.mark.long
def test_networks_that_a_search_asks_for_are_trained_have_rows_and_score(tmp_path: Path, ray_cluster: None) -> None:
    own = "progressive: {ranking: weight_l1, threshold: 0}"
    structure = (
        f"{{method: progressive, targets: [0.5, 1.0], pin: gate, step: 16, levels: 4, holdout: 0.2, epochs: 2, {own}}}"
    )
    write_sweep(tmp_path, sweep_text(structure))
    lines = call(tmp_path, "plan", SWEEP, "--dry").out
    assert "further trainings of 1 epoch during the search" in " ".join(lines.split())
    answer = call(tmp_path, "launch", SWEEP)
    assert answer.code == 0, answer.err
    results = results_in(tmp_path)
    stage = results.run.stage_dir("structure", results.done_key("structure"))
    asked = [name for line in trace(stage) if line["kind"] == "trainings" for name in line["starts"]]
    assert asked
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    (experiment,) = [each for each in client.search_experiments() if each.name == "tiny"]
    rows = {row.info.run_name: row for row in client.search_runs([experiment.experiment_id])}
    assert {rows[f"structure {name}"].info.status for name in asked} == {"FINISHED"}
    info, cost = structure_of(results), training_cost(results)
    assert info is not None
    assert info.method == "progressive, channels sorted by weight_l1"
    assert len(info.candidates) > len(asked)
    assert cost is not None
    assert cost.bases > 0
    for name in ("done", "structure.json", "structure.safetensors"):
        (stage / name).unlink()
    kept, before = (stage / "trace.jsonl").read_bytes(), trace(stage)
    (stage / "trace.jsonl").write_bytes(kept[: len(kept) // 2])
    shutil.rmtree(stage / "bases" / asked[-1])
    again = call(tmp_path, "launch", SWEEP, *WITHOUT_MLFLOW)
    assert again.code == 0, again.err
    assert trace(stage) == before


@pytest.mark.ray
def test_a_second_launch_chooses_nothing_again(found: Found) -> None:
    before = snapshot(found.folder / "runs" / "tiny" / "structure")
    again = call(found.folder, "launch", SWEEP, *WITHOUT_MLFLOW)
    assert again.code == 0, again.err
    assert "structure: already done" in again.err
    assert snapshot(found.folder / "runs" / "tiny" / "structure") == before


@pytest.mark.ray
def test_a_search_that_was_ended_goes_on_to_the_same_result_with_another_number_of_scorers(
    found: Found, tmp_path: Path
) -> None:
    write_sweep(tmp_path, sweep_text())
    run = tmp_path / "runs" / "tiny"
    shutil.copytree(found.folder / "runs" / "tiny", run, ignore=shutil.ignore_patterns("mlruns", "driver.lock"))
    stage = run / found.stage.relative_to(found.folder / "runs" / "tiny")
    for name in ("done", "structure.json", "structure.safetensors"):
        (stage / name).unlink()
    lines = (stage / "trace.jsonl").read_bytes()
    (stage / "trace.jsonl").write_bytes(lines[: 2 * len(lines) // 3])  # in the middle of a line
    weights = snapshot(stage / "bases")
    one = ("--set", "supernet.structure.concurrent=1")
    assert {
        item["stage"]: item["status"] for item in call(tmp_path, "plan", SWEEP, "--dry", "--json", *one).json["stages"]
    }["structure"] == "resume"
    answer = call(tmp_path, "launch", SWEEP, *WITHOUT_MLFLOW, *one)
    assert answer.code == 0, answer.err
    assert trace(stage) == trace(found.stage)
    assert file_sha256(stage / "structure.safetensors") == file_sha256(found.stage / "structure.safetensors")
    assert snapshot(stage / "bases") == weights, "its network is not trained again"


def keys_of(folder: Path, structure: str, *settings: str) -> dict[str, str]:
    """The stages' keys of a sweep."""
    path = write_sweep(folder, sweep_text(structure))
    definitions = stage_definitions(prepare(load_config(path, overrides=settings).config))
    return {plan.name: plan.key for plan in plan_stages(RunDir(folder / "runs", "tiny"), definitions)}


def test_keys_know_what_the_choice_depends_on(tmp_path: Path) -> None:
    greedy = keys_of(tmp_path, STRUCTURE)
    assert next(iter(greedy)) == "structure"
    uniform = STRUCTURE.replace("greedy", "uniform")
    keys = keys_of(tmp_path, uniform)
    assert all(keys[name] != greedy[name] for name in greedy)
    with_rate = keys_of(tmp_path, uniform, "supernet.train.lr=0.01")
    assert with_rate["structure"] == keys["structure"], "nothing is trained before"
    assert with_rate["supernet"] != keys["supernet"]
    assert keys_of(tmp_path, STRUCTURE, "supernet.train.lr=0.01")["structure"] != greedy["structure"]
    for setting in (
        "supernet.structure.concurrent=3",
        "supernet.keep_checkpoints=7",
        "supernet.train.checkpoint_every=3",
    ):
        assert keys_of(tmp_path, STRUCTURE, setting) == greedy
    for setting in ("supernet.structure.holdout=0.3", "seed=5", "supernet.structure.order=random"):
        assert keys_of(tmp_path, STRUCTURE, setting)["structure"] != greedy["structure"]


def test_declared_sub_networks_need_no_stage_and_keep_their_keys(tmp_path: Path) -> None:
    plain = prepare(load_config(write_sweep(tmp_path)).config)
    assert next(definition.name for definition in stage_definitions(plain)) == "supernet"
    text = TINY.replace(
        "options: {num_routes: 3}", "options: {num_routes: 3}\n  structure: {method: declared, step: 4}"
    )
    declared = prepare(load_config(write_sweep(tmp_path, text)).config)
    assert supernet_record(declared).key == supernet_record(plain).key
    ordered = text.replace("step: 4", "order: weight_l1")
    prepared = prepare(load_config(write_sweep(tmp_path, ordered)).config)
    assert next(definition.name for definition in stage_definitions(prepared)) == "structure"
    assert prepared.subnets == plain.subnets


def test_sub_networks_that_share_nothing_have_an_entry_gate(tmp_path: Path) -> None:
    text = sweep_text("{method: uniform, targets: [0.4, 1.0], step: 2}")
    prepared = prepare(load_config(write_sweep(tmp_path, text)).config)
    assert [gate.name for gate in prepared.subnets.spec.gates] == ["entry"]
    assert differs_before_gates(prepared.subnets) is False
    narrow, wide = prepared.subnets
    assert narrow.widths[0] < wide.widths[0]
    own = prepare(load_config(write_sweep(tmp_path, sweep_text())).config)
    assert [gate.name for gate in own.subnets.spec.gates] != ["entry"]
    listed = "{method: list, widths: {a: [12, 24, 40, 50], b: [12, 24, 96, 192]}}"
    together = prepare(load_config(write_sweep(tmp_path, sweep_text(listed))).config)
    assert together.subnets.spec.gates == own.subnets.spec.gates
    apart = prepare(load_config(write_sweep(tmp_path, sweep_text(listed.replace("[12, 24, 40", "[6, 24, 40")))).config)
    assert [gate.name for gate in apart.subnets.spec.gates] == ["entry"]


def test_routing_is_checked_against_the_names_that_are_expected(tmp_path: Path) -> None:
    write_sweep(tmp_path, sweep_text(STRUCTURE.replace("greedy", "uniform")))
    answer = call(tmp_path, "plan", SWEEP, "--dry", "--set", "gate.routing.last=-5")
    assert answer.code == 2
    assert "has 3 here" in answer.err


@pytest.mark.parametrize(
    ("structure", "parts"),
    [
        ("{method: gredy, targets: [0.5]}", ["supernet.structure.method", "gredy", "did you mean 'greedy'"]),
        ("{method: greedy}", ["there is none", "supernet.structure.targets"]),
        (
            "{method: uniform, targets: [0.5], targets_m: [1.0]}",
            ["supernet.structure.targets_m is set", "alternatives to each other"],
        ),
        ("{method: uniform, targets: [0.01, 1.0], pin: gate}", ["no sub-network has", "the nearest"]),
        ("{method: uniform, targets: [0.5, 1.0], step: 500, pin: gate}", ["step is 500", "has only"]),
        ("{method: list, widths: {a: [1, 2]}}", ["has 2 widths"]),
        ("{method: uniform, targets: [0.5, 0.501], pin: gate}", ["are the same sub-network"]),
        ("{method: uniform, targets: [1.5]}", ["targets", "at most 1"]),
    ],
)
def test_bad_settings_are_one_clear_error_before_anything_is_written(
    tmp_path: Path, structure: str, parts: list[str]
) -> None:
    write_sweep(tmp_path, sweep_text(structure))
    before = snapshot(tmp_path)
    answer = call(tmp_path, "launch", SWEEP)
    assert answer.code == 2, answer.err
    assert [part for part in parts if part not in answer.err] == []
    assert "Traceback" not in answer.err
    assert snapshot(tmp_path) == before


def test_a_found_structure_takes_the_place_of_the_expected_one(found: Found) -> None:
    config = load_config(found.folder / SWEEP, overrides=(f"storage.runs={found.folder / 'runs'}",)).config
    expected = prepare(config)
    prepared = prepare(config, found.results.run)
    assert prepared.start is not None
    assert prepared.subnets != expected.subnets
    assert [subnet.name for subnet in prepared.subnets] == [subnet.name for subnet in expected.subnets]
    assert supernet_record(prepared).key == supernet_record(expected).key == found.results.done_key("supernet")
    assert StageDir(found.stage).is_done()
    assert replace(prepared, subnets=expected.subnets, start=None).structure == expected.structure
