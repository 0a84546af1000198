"""A sweep of supernets through the real pipeline: each distinct one trained once, one front over
all, one study, one tree in MLflow."""

from __future__ import annotations

import html
import json
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from benchmarks.processes import Answer, Command
from dsnet.deploy.bundle import load_bundle
from dsnet.files import file_sha256
from dsnet.measure.latency_table import MachineLoad
from orchestration.commands.supernet_tables import state_and_epochs
from orchestration.config.loading import load_config
from orchestration.config.sweep import SweepConfig
from orchestration.pipeline.launch import anchored
from orchestration.prepare.preparation import load_images
from orchestration.runs.folder import RunDir, mlflow_store_uri
from orchestration.runs.lock import DriverLock
from orchestration.runs.manifest import Manifest, now_iso
from orchestration.supernets.entries import MemberEntry
from orchestration.supernets.members import Member, draw_members
from orchestration.supernets.report import report_data, sweep_warnings
from orchestration.supernets.results import GateId, SupernetSweepResults
from orchestration.supernets.study import SupernetStudy
from search.front.points import trial_name
from search.front.points_file import load_points
from search.study.study import TrialRecord
from tests.orchestration.samples import TIMES, WITHOUT_MLFLOW, call, record_config, snapshot, write_sweep

SUPERNETS = """\
version: 1
name: nets
data: {name: digits, limit: 150}
supernet:
  model: ds_tiny
  options: {num_routes: 3}
  train: {epochs: 3, batch_size: 30, warmup_epochs: 0.5}
  bootstrapping: {teacher_min_updates: 2}
space:
  supernet.options.width: {choice: [1.0, 0.5, 8.0]}
  gate.target: {uniform: [0.05, 0.9]}
  gate.router: {choice: [gate, cascade]}
constraints: [{hard: "madds_m <= 1"}]
supernets: {number: 3, sampler: grid, scheduler: none}
measure: {batch_sizes: [1, 8], group_sizes: [1, 8], repeats: 2, warmup: 1}
gate: {optimizer: {steps: 40, batch_size: 100}}
sampler: {cohort: 4, startup: 4, enqueue: []}
budget: {trials: 8}
export: {picks: [knee], formats: [bundle]}
"""
SWEEP = "nets.yaml"
TRIALS = 8
PATHS = ("storage.runs", "tracking.uri")
"""Parameters that say where a run lies."""


def sweep_in(folder: Path) -> SupernetSweepResults:
    """The results of the sweep below `folder`/runs."""
    return SupernetSweepResults(RunDir(folder / "runs", "nets"))


def merged_study(path: Path) -> optuna.Study:
    """The merged study as anybody's Optuna opens it."""
    storage = JournalStorage(JournalFileBackend(str(path)))
    (summary,) = storage.get_all_studies()
    return optuna.load_study(study_name=summary.study_name, storage=storage)


def timeless(trial: FrozenTrial) -> tuple[Any, ...]:
    """What no clock is in."""
    metrics = {name: value for name, value in trial.user_attrs["metrics"].items() if not name.startswith(TIMES)}
    return trial.user_attrs["origin"], trial.state, trial.params, trial.values, trial.constraints, metrics


@dataclass(frozen=True)
class Swept:
    """A finished sweep of two supernets, and a third that cannot hold the constraint; only to be
    read."""

    folder: Path
    answer: Answer

    @property
    def results(self) -> SupernetSweepResults:
        return sweep_in(self.folder)

    @property
    def impossible(self) -> str:
        """The member that cannot be."""
        (name,) = [entry.name for entry in self.results.entries if entry.state == "failed"]
        return name


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Swept:
    """Launched once, in this process, for all tests that only look at it."""
    folder = tmp_path_factory.mktemp("nets")
    write_sweep(folder, SUPERNETS, SWEEP)
    return Swept(folder, call(folder, "launch", SWEEP))


@pytest.mark.ray
def test_each_distinct_supernet_is_trained_once_and_is_a_run_of_its_own(swept: Swept) -> None:
    assert swept.answer.code == 0, swept.answer.err
    results = swept.results
    assert sorted(float(entry.settings["supernet.options.width"]) for entry in results.entries) == [0.5, 1.0, 8.0]
    assert len({entry.key for entry in results.entries}) == 3
    assert list(results.supernets) == [entry.name for entry in results.entries if entry.state == "trained"]
    assert len(results.supernets) == 2
    weights = set()
    for name, member in results.supernets.items():
        entry = results.entry(name)
        assert member.done_key("supernet") == entry.key
        assert entry.name.endswith(entry.key[:8])
        folder = member.run.stage_dir("supernet", entry.key)
        assert json.loads((folder / "stage.json").read_text())["num_starts"] == 1
        weights.add(file_sha256(folder / "final.safetensors"))
        assert [epoch for epoch, _ in entry.reports] == [1, 2, 3]
        assert len(member.records) == TRIALS
        assert set(member.config.space) == {"gate.target", "gate.router"}
        assert member.run.report_html.is_file()
    assert len(weights) == 2


@pytest.mark.ray
def test_a_supernet_whose_gates_cannot_hold_a_hard_constraint_fails_before_it_is_trained(swept: Swept) -> None:
    entry = swept.results.entry(swept.impossible)
    assert entry.settings["supernet.options.width"] == 8.0
    assert "madds_m <= 1" in str(entry.reason)
    assert entry.name in swept.answer.err
    assert not (swept.results.run.supernets_dir / entry.name).exists()


@pytest.mark.ray
def test_the_front_is_that_of_all_gates_of_all_supernets_together(swept: Swept) -> None:
    results = swept.results
    points = {
        GateId(name, record.slot): (record.metrics["top1"], record.metrics["madds_m"])
        for name, member in results.supernets.items()
        for record in member.records
    }
    assert len(points) == 2 * TRIALS

    def is_beaten(top1: float, madds_m: float) -> bool:
        return any(a >= top1 and b <= madds_m and (a, b) != (top1, madds_m) for a, b in points.values())

    expected = {value for value in points.values() if not is_beaten(*value)}
    assert {points[gate] for gate in results.front_gates} == expected
    assert len(results.front_gates) == len(expected)  # of copies one
    narrow = next(name for name in results.supernets if results.entry(name).settings["supernet.options.width"] == 0.5)
    assert narrow in {gate.supernet for gate in results.front_gates}, "it reaches costs that the other cannot"


@pytest.mark.ray
def test_points_say_where_each_comes_from_and_only_the_front_over_all_is_marked(swept: Swept) -> None:
    results = swept.results
    rows = load_points(results.run.points_parquet)
    gates = [row for row in rows if row["kind"] == "gate" and row["split"] == "val"]
    assert Counter(row["supernet"] for row in gates) == dict.fromkeys(results.supernets, TRIALS)
    marked = {GateId(row["supernet"], row["slot"]) for row in gates if row["is_front"]}
    assert marked == set(results.front_gates)
    assert Counter(
        row["supernet"] for row in rows if row["kind"] == "subnet" and row["split"] == "val"
    ) == dict.fromkeys(results.supernets, 3)
    reported = {
        GateId(row["supernet"], row["slot"]) for row in rows if row["kind"] == "gate" and row["split"] == "test"
    }
    assert reported == set(results.front_sample)


@pytest.mark.ray
def test_the_merged_study_opens_in_optuna_and_has_the_numbers_of_the_members(swept: Swept) -> None:
    results = swept.results
    study = merged_study(results.run.merged_journal)
    assert study.metric_names == ["top1", "madds_m"]
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    trials = {trial.user_attrs["origin"]: trial for trial in study.get_trials()}
    assert len(trials) == len(study.get_trials()) == 2 * TRIALS + 1
    for name, member in results.supernets.items():
        for record in member.records:
            trial = trials.pop(GateId(name, record.slot).name)
            assert trial.state == TrialState.COMPLETE
            assert tuple(trial.values) == record.values
            assert trial.constraints == record.constraints
            assert trial.params == {"supernet": name, **results.entry(name).settings, **record.params}
            assert trial.user_attrs["metrics"] == record.metrics
    failed = trials.pop(swept.impossible)
    assert failed.state == TrialState.FAIL
    assert "madds_m <= 1" in failed.user_attrs["reason"]
    assert trials == {}
    best = {(value[0], value[1]) for value in (trial.values for trial in study.best_trials)}
    assert best == {tuple(results.feasible[gate].values or ()) for gate in results.front_gates}


@pytest.mark.ray
def test_test_is_opened_after_the_front_is_frozen_and_only_for_gates_on_it(swept: Swept) -> None:
    results = swept.results
    frozen_s = results.run.front_json.stat().st_mtime
    assert results.manifest["test_openings"] == 1
    opened_s = datetime.fromisoformat(results.manifest["test_opened_by"][0]["at"]).timestamp()
    assert frozen_s <= opened_s + 0.001
    for name, member in results.supernets.items():
        own = {gate.slot for gate in results.front_sample if gate.supernet == name}
        sealed = member.run.sealed_table(member.done_key("table"))
        assert sealed.exists() == bool(own)
        assert member.manifest["test_openings"] == bool(own)
        if own:
            assert sealed.stat().st_mtime >= frozen_s
            assert member.verified is not None
            assert set(member.verified.front) == own
    assert results.is_verified
    content = json.loads(results.run.front_json.read_text())
    assert [GateId(item["supernet"], item["slot"]) for item in content["front"]] == list(results.front_gates)


def _tree(client: MlflowClient) -> list[Run]:
    experiment = client.get_experiment_by_name("nets")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id], max_results=1000))


def _comparable(rows: list[Run]) -> list[tuple[Any, ...]]:
    return sorted(
        (
            row.info.run_name,
            row.data.tags["uid"],
            row.info.status,
            row.info.start_time,
            row.info.end_time,
            sorted((key, value) for key, value in row.data.params.items() if key not in PATHS),
            sorted(row.data.metrics.items()),
            sorted((used.dataset.name, used.dataset.digest) for used in row.inputs.dataset_inputs),
            len(row.outputs.model_outputs),
            sorted(
                (key, value) for key, value in row.data.tags.items() if not key.startswith("mlflow.") and key != "root"
            ),
        )
        for row in rows
    )


@pytest.mark.ray
def test_mlflow_has_one_tree_and_sync_builds_the_same(swept: Swept, tmp_path: Path) -> None:
    results = swept.results
    rows = _tree(MlflowClient(mlflow_store_uri(swept.folder / "runs")))
    by_id = {row.info.run_id: row for row in rows}

    def above(row: Run) -> list[str]:
        parent = row.data.tags.get("mlflow.parentRunId")
        return [] if parent is None else [by_id[parent].info.run_name, *above(by_id[parent])]

    places = Counter((row.data.tags["kind"], tuple(above(row))) for row in rows)
    expected = Counter({("sweep", ()): 1})
    for name in results.supernets:
        expected[("sweep", ("nets",))] += 1
        expected[("supernet", (name, "nets"))] = 1
        expected[("subnet", (name, "nets"))] = 4
        expected[("trial", (name, "nets"))] = TRIALS
    assert places == expected
    assert {row.info.status for row in rows} == {"FINISHED"}
    assert len({row.data.tags["root"] for row in rows}) == 1
    for row in rows:  # the splits are those of every supernet; the knee of all is exported from the sweep's folder
        assert len(row.inputs.dataset_inputs) == (4 if row.data.tags["kind"] == "sweep" else 0)
        assert len(row.outputs.model_outputs) == (1 if row.data.tags["uid"] == row.data.tags["root"] else 0)
    on_front = {row.info.run_name for row in rows if row.data.tags.get("on_front") == "true"}
    assert on_front == {gate.name for gate in results.front_gates}
    for row in rows:
        if row.data.tags["kind"] == "supernet":
            entry = results.entry(above(row)[0])
            history = MlflowClient(mlflow_store_uri(swept.folder / "runs")).get_metric_history(
                row.info.run_id, "static_hypervolume"
            )
            assert [(point.step, point.value) for point in history] == list(entry.reports)

    shutil.copytree(results.run.path, tmp_path / "runs" / "nets")
    for config in (tmp_path / "runs" / "nets").rglob("sweep.yaml"):  # the copy is tracked beside it
        config.write_text(config.read_text().replace(str(swept.folder), str(tmp_path)))
        record_config(config)
    answer = call(tmp_path, "sync", "nets")
    assert answer.code == 0, answer.err
    again = _tree(MlflowClient(mlflow_store_uri(tmp_path / "runs")))
    assert _comparable(again) == _comparable(rows)


@pytest.mark.ray
def test_a_second_launch_does_nothing_and_says_so(swept: Swept) -> None:
    results = swept.results
    folders = [
        results.run.supernets_dir / name / stage
        for name in results.supernets
        for stage in ("supernet", "table", "search", "verify")
    ]
    before = [snapshot(folder) for folder in folders]
    journal, manifest = results.run.merged_journal.read_bytes(), results.manifest
    again = call(swept.folder, "launch", SWEEP, *WITHOUT_MLFLOW)
    assert again.code == 0, again.err
    assert "nothing is left to do" in again.err
    assert "starting Ray" not in again.err
    assert [snapshot(folder) for folder in folders] == before
    assert swept.results.run.merged_journal.read_bytes() == journal
    assert swept.results.manifest["test_openings"] == manifest["test_openings"]


def weights_of(results: SupernetSweepResults, name: str) -> str:
    folder = results.supernets[name].run.stage_dir("supernet", results.entry(name).key)
    return file_sha256(folder / "final.safetensors")


def same_sweeps(ours: SupernetSweepResults, theirs: SupernetSweepResults) -> bool:
    """Whether two sweeps have the same supernets to the bit, the same front and the same trials."""
    names = list(ours.supernets)
    trials = [merged_study(results.run.merged_journal).get_trials() for results in (ours, theirs)]
    return (
        names == list(theirs.supernets)
        and ours.front_gates == theirs.front_gates
        and [weights_of(ours, name) for name in names] == [weights_of(theirs, name) for name in names]
        and [timeless(trial) for trial in trials[0]] == [timeless(trial) for trial in trials[1]]
    )


@pytest.mark.slow
@pytest.mark.ray
def test_a_finished_sweep_is_continued_on_another_machine_from_its_copies(swept: Swept, tmp_path: Path) -> None:
    shutil.copytree(swept.folder, tmp_path / "first")
    url = (tmp_path / "bucket").as_uri()
    options = ("launch", SWEEP, "--set", f"storage.artifacts={url}", *WITHOUT_MLFLOW)
    first = call(tmp_path / "first", *options)
    assert first.code == 0, first.err
    copied = Counter(path.name.partition("-")[0] for path in (tmp_path / "bucket").rglob("*.tar"))
    assert copied == {"tune": 1} | dict.fromkeys(("supernet", "measure", "table", "search", "verify"), 2)
    write_sweep(tmp_path / "second", SUPERNETS, SWEEP)
    second = call(tmp_path / "second", *options)
    assert second.code == 0, second.err
    assert second.err.count("continues the run of which") == 3
    assert "starting Ray" not in second.err
    moved = sweep_in(tmp_path / "second")
    assert same_sweeps(moved, swept.results)
    assert moved.manifest["test_openings"] == swept.results.manifest["test_openings"], "test was not read again"


@pytest.mark.ray
def test_a_constraint_that_a_trained_supernet_cannot_hold_leaves_it_and_all_earlier_trials_out(
    swept: Swept, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(swept.folder, folder)
    names = {entry.settings["supernet.options.width"]: entry.name for entry in swept.results.entries}
    narrow, wide = names[0.5], names[1.0]

    def launch_with(*changes: tuple[str, str]) -> Answer:
        text = SUPERNETS
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        write_sweep(folder, text, SWEEP)
        return call(folder, "launch", SWEEP, *WITHOUT_MLFLOW)

    refused = launch_with(('{hard: "madds_m <= 1"}', '{hard: "madds_m <= 1"}, {hard: "latency_ms <= 1e-6"}'))
    assert refused.code == 5, refused.err
    assert "no gate of 2 supernets was tried" in refused.err
    assert "no router of this network can satisfy latency_ms <= 1e-6" in refused.err
    assert sweep_in(folder).num_trials == 0
    assert sweep_in(folder).front_gates == ()

    costs = {name: swept.results.supernets[name].members[0].madds / 1e6 for name in (narrow, wide)}
    assert costs[narrow] < costs[wide]
    answer = launch_with(
        ("madds_m <= 1", f"madds_m <= {costs[wide] * 0.99:.4f}"),
        ("[0.05, 0.9]", "[0.05, 0.3]"),
        ("trials: 8", "trials: 5"),
    )
    assert answer.code == 0, answer.err
    results = sweep_in(folder)
    assert results.entry(wide).state == "failed"
    assert list(results.supernets) == [narrow]
    assert {gate.supernet for gate in results.front_gates} == {narrow}
    assert call(folder, "status", "nets", "--json").json["front"] == [gate.name for gate in results.front_gates]

    again = launch_with()
    assert again.code == 0, again.err
    assert "starting Ray" not in again.err
    assert sweep_in(folder).front_gates == swept.results.front_gates
    assert sweep_in(folder).num_trials == 2 * TRIALS


@pytest.mark.slow
def test_a_plan_forecasts_the_supernets_that_can_be_all_together(tmp_path: Path) -> None:
    write_sweep(tmp_path, SUPERNETS, SWEEP)
    answer = call(tmp_path, "plan", SWEEP, "--json")
    assert [stage["stage"] for stage in answer.json["forecast"]["stages"]] == [
        "supernet",
        "measure",
        "table",
        "search",
        "verify",
    ]
    assert "2 supernets" in answer.json["forecast"]["timed"]
    assert "forecast  at most " in call(tmp_path, "plan", SWEEP).out
    assert call(tmp_path, "plan", SWEEP, "--dry", "--json").json["forecast"] is None


@pytest.mark.ray
def test_commands_on_the_sweep_show_origins_and_take_its_members_as_runs(swept: Swept, tmp_path: Path) -> None:
    results, folder = swept.results, swept.folder
    first = next(iter(results.supernets))
    status = call(folder, "status", "nets", "--json").json
    assert Counter(item["state"] for item in status["supernets"]) == {"trained": 2, "failed": 1}
    assert status["front"] == [gate.name for gate in results.front_gates]
    trials = call(folder, "trials", "nets", "--json").json
    assert Counter(trial["supernet"] for trial in trials) == dict.fromkeys(results.supernets, TRIALS)
    assert {trial["name"] for trial in trials if trial["is_front"]} == {gate.name for gate in results.front_gates}
    front = call(folder, "pareto", "nets", "--json", "--figure", tmp_path / "front.html").json["front"]
    assert {row["name"] for row in front} == {gate.name for gate in results.front_gates}
    assert (tmp_path / "front.html").stat().st_size > 1_000_000
    own = call(folder, "pareto", f"nets/supernets/{first}", "--json").json["front"]
    assert {row["slot"] for row in own} == set(results.supernets[first].front)
    plan = call(folder, "plan", SWEEP, "--json").json
    assert [item["name"] for item in plan["supernets"] if item["known"]] == list(results.supernets)
    assert plan["forecast"] is None, "nothing is left to do"
    lr = plan["settings"]["supernet.train.lr"]
    assert (lr["origin"], lr["value"]) == ("data", results.supernets[first].config.supernet.train.lr)
    brief = call(folder, "plan", SWEEP).out
    assert brief.splitlines()[1].startswith("data      digits, 8 x 8 pixels")
    assert lr["reason"] in brief
    assert "other settings at their defaults; --all shows them" in brief
    assert "gate.temperature.start" not in brief
    assert "None" not in brief
    assert "up to 3 supernets" in call(folder, "validate", SWEEP).out


@pytest.mark.ray
@pytest.mark.parametrize(
    "command",
    [
        ("measure", "nets"),
        ("enqueue", "nets", "--set", "gate.target=0.3"),
        ("pareto", "nets", "--routers-figure", "r.html"),
    ],
)
def test_commands_about_one_supernet_name_one_and_do_nothing(swept: Swept, command: tuple[str, ...]) -> None:
    answer = call(swept.folder, *command)
    assert (answer.code, answer.out) == (2, "")
    first = swept.results.run.supernets_dir / swept.results.entries[0].name
    assert "nets is a sweep of several supernets, but " in answer.err
    assert str(first.name) in answer.err


@pytest.mark.ray
def test_a_gate_of_any_supernet_is_exported_by_its_whole_name_and_an_ambiguous_one_is_refused(
    swept: Swept, tmp_path: Path
) -> None:
    gate = swept.results.front_gates[0]
    answer = call(swept.folder, "export", "nets", "--pick", gate.name, "--out", tmp_path)
    assert answer.code == 0, answer.err
    (path,) = answer.out.split()
    assert Path(path) == tmp_path / gate.supernet / f"trial-{gate.slot:04d}"
    claims = json.loads((Path(path) / "bundle.json").read_text())["claims"]
    assert claims["val"]["top1"] == swept.results.feasible[gate].metrics["top1"]
    assert load_bundle(path) is not None
    refused = call(swept.folder, "export", "nets", "--pick", "trial-0001", "--out", tmp_path)
    assert refused.code == 9
    assert "2 supernets have such a trial" in refused.err


@pytest.mark.ray
def test_operating_points_are_exported_for_each_supernet_with_a_gate_on_the_front(swept: Swept, tmp_path: Path) -> None:
    results = swept.results
    answer = call(swept.folder, "export", "nets", "--pick", "members", "--pick", "front", "--out", tmp_path)
    assert answer.code == 0, answer.err
    names = list(dict.fromkeys(gate.supernet for gate in results.front_gates))
    wanted = [tmp_path / name / each for name in names for each in ("members", "front")]
    assert sorted(map(Path, answer.out.split())) == sorted(wanted)
    for name in names:
        front, members = (load_bundle(tmp_path / name / each).operating_points for each in ("front", "members"))
        own = {trial_name(gate.slot): results.feasible[gate] for gate in results.front_gates if gate.supernet == name}
        assert {point.name: point.top1 for point in front} == {k: record.metrics["top1"] for k, record in own.items()}
        assert [point.name for point in members] == [subnet.name for subnet in results.supernets[name].members]


def test_a_supernet_that_is_at_work_is_training_and_its_newest_checkpoint_says_how_far_it_is(tmp_path: Path) -> None:
    run = RunDir(tmp_path, "nets")
    entry = MemberEntry("s0-a", "a", {}, epochs=9)
    own = RunDir(run.supernets_dir, entry.name)
    run.create()
    own.create()
    stage = {"dir": "supernet/a", "status": "running"}
    manifest = Manifest(own.manifest_path)
    manifest.create(seed=0, hardware={})
    manifest.record_stage("supernet", {"key": "a", "started_at": now_iso(), "seconds": None, **stage})
    (own.path / stage["dir"]).mkdir(parents=True)
    for epoch in (3, 4):
        (own.path / stage["dir"] / f"epoch-{epoch:05d}.json").touch()
    with DriverLock(run, "test"):
        assert state_and_epochs(run, entry) == ("training", 4)
    assert state_and_epochs(run, entry) == ("waiting", 0), "nobody trains it"


@pytest.mark.ray
def test_the_report_holds_the_front_over_all_and_a_way_to_each_supernet(swept: Swept) -> None:
    results = swept.results
    text = results.run.report_html.read_text()
    for name in results.supernets:
        assert f'href="supernets/{name}/report.html"' in text
        assert (results.run.path / "supernets" / name / "report.html").is_file()
    for gate in results.front_gates:
        assert gate.name in text
    assert "One front over all supernets" in text
    warnings = sweep_warnings(results)
    several = [whose for whose, _ in warnings if "(numbers of" in whose]
    assert several, "each supernet is trained for so few steps that it is warned about"
    assert len({warning.code for _, warning in warnings}) == len(warnings)
    assert all(text.count(f"<li>{html.escape(whose)}") == 1 for whose in several)
    results = SupernetSweepResults(results.run)
    name, own = next(iter(results.supernets.items()))
    own.__dict__["newest_latencies"] = {"": replace(own.latencies[""], load=MachineLoad(40.0, 2))}
    (note,) = [note for note in report_data(results, (), "complete").notes if "latencies" in note]
    assert name in note
    assert "load average 40.0 on 2 cores" in note


@contextmanager
def launched(folder: Path) -> Iterator[Command]:
    command = Command(folder, "launch", SWEEP, *WITHOUT_MLFLOW)
    try:
        yield command
    finally:
        command.end()


@pytest.mark.long  # a single sweep is killed, and the training of several, in every run of the tests
@pytest.mark.ray
def test_a_sweep_killed_in_its_second_training_and_terminated_in_its_second_search_ends_like_an_uninterrupted_one(
    swept: Swept, tmp_path: Path
) -> None:
    write_sweep(tmp_path, SUPERNETS, SWEEP)
    names = list(swept.results.supernets)
    members = tmp_path / "runs" / "nets" / "supernets"
    with launched(tmp_path) as command:
        command.wait_for(lambda: any((members / names[1]).glob("supernet/*/epoch-00001.json")))
        command.process.send_signal(signal.SIGKILL)
        command.wait()
    assert not any(members.glob("*/search"))
    with launched(tmp_path) as command:
        command.wait_for(lambda: any((members / names[1]).glob("search/*/gates/slot-00000.safetensors")))
        command.process.send_signal(signal.SIGTERM)
        answer = command.wait()
        assert answer.code == 6, answer.err
        assert f"dsnet-orch launch {SWEEP}" in answer.err
        assert "received at time" not in answer.err, "the handler of Ray, which aborts after 3 s"
        assert command.left_behind() == []
    assert not any(members.glob("*/table/*/sealed"))
    assert json.loads((tmp_path / "runs" / "nets" / "manifest.json").read_text())["test_openings"] == 0
    answer = call(tmp_path, "launch", SWEEP, *WITHOUT_MLFLOW)
    assert answer.code == 0, answer.err
    assert same_sweeps(sweep_in(tmp_path), swept.results)


@pytest.mark.long
@pytest.mark.ray
def test_a_sweep_whose_machine_is_lost_in_its_second_training_is_continued_on_another(
    swept: Swept, tmp_path: Path
) -> None:
    names = list(swept.results.supernets)
    artifacts = ("--set", f"storage.artifacts={(tmp_path / 'bucket').as_uri()}")
    write_sweep(tmp_path / "first", SUPERNETS, SWEEP)
    command = Command(tmp_path / "first", "launch", SWEEP, *WITHOUT_MLFLOW, *artifacts)
    try:
        command.wait_for(
            lambda: any((tmp_path / "bucket/nets/supernets" / names[1]).glob("supernet/*/epoch-00001.json"))
        )
        command.process.send_signal(signal.SIGKILL)
        command.wait()
    finally:
        command.end()
    shutil.rmtree(tmp_path / "first")
    write_sweep(tmp_path / "second", SUPERNETS, SWEEP)
    answer = call(tmp_path / "second", "launch", SWEEP, *WITHOUT_MLFLOW, *artifacts)
    assert answer.code == 0, answer.err
    assert answer.err.count("continues the run of which") == 2, "of the sweep, and of its first supernet"
    resumed = sweep_in(tmp_path / "second")
    assert same_sweeps(resumed, swept.results)
    for name in names:
        assert resumed.entry(name).reports == swept.results.entry(name).reports


# ---- the merged study


def drawn_config(tmp_path: Path) -> SweepConfig:
    return anchored(load_config(write_sweep(tmp_path, SUPERNETS, SWEEP)).config)


def record(slot: int, **changes: Any) -> TrialRecord:
    made = TrialRecord(
        slot=slot,
        number=slot,
        state="complete",
        params={"gate.target": 0.3, "gate.router": "gate"},
        values=(0.8, 0.1),
        metrics={"top1": 0.8, "madds_m": 0.1},
        reason=None,
        duration_s=0.5,
        constraints={"madds_m <= 1": -0.9},
        finished_ms=1_700_000_000_000,
    )
    return replace(made, **changes)


def test_a_stopped_supernet_is_a_pruned_trial_with_its_reports_and_a_failed_one_a_failed_trial(tmp_path: Path) -> None:
    config, run = drawn_config(tmp_path), RunDir(tmp_path / "runs", "nets")
    run.create()
    entries = [
        MemberEntry("s0-aaaaaaaa", "a" * 64, {"supernet.options.width": 1.0}, "trained", epochs=3),
        MemberEntry(
            "s1-bbbbbbbb",
            "b" * 64,
            {"supernet.options.width": 0.5},
            "stopped",
            "behind at epoch 2",
            ((1, 0.2), (2, 0.25)),
            3,
            1_700_000_000_000,
            1_700_000_009_000,
        ),
        MemberEntry(
            "s2-cccccccc", "c" * 64, {"supernet.options.width": 8.0}, "failed", "the loss is not finite", epochs=3
        ),
    ]
    for _ in range(2):  # a second launch adds nothing
        study = SupernetStudy.open(run, config, entries)
        for entry in entries:
            study.add_supernet(entry)
        study.add_gate("s0-aaaaaaaa", record(0))
        study.add_gate(
            "s0-aaaaaaaa", record(1, state="failed", values=None, metrics={}, reason="ValueError: no", constraints={})
        )
    trials = merged_study(run.merged_journal).get_trials()
    assert [trial.user_attrs["origin"] for trial in trials] == [
        "s1-bbbbbbbb",
        "s2-cccccccc",
        "s0-aaaaaaaa/trial-0000",
        "s0-aaaaaaaa/trial-0001",
    ]
    stopped, failed, gate, broken = trials
    assert (stopped.state, failed.state) == (TrialState.PRUNED, TrialState.FAIL)
    assert (gate.state, broken.state) == (TrialState.COMPLETE, TrialState.FAIL)
    assert stopped.intermediate_values == {1: 0.2, 2: 0.25}
    assert stopped.params == {"supernet": "s1-bbbbbbbb", "supernet.options.width": 0.5}
    assert stopped.duration is not None
    assert stopped.duration.total_seconds() == 9.0
    assert [trial.user_attrs["reason"] for trial in (stopped, failed, broken)] == [
        "behind at epoch 2",
        "the loss is not finite",
        "ValueError: no",
    ]


def test_a_torn_merged_study_is_mended_and_one_of_other_members_is_made_anew(tmp_path: Path) -> None:
    config, run = drawn_config(tmp_path), RunDir(tmp_path / "runs", "nets")
    run.create()
    first = MemberEntry("s0-aaaaaaaa", "a" * 64, {"supernet.options.width": 1.0}, "trained")
    study = SupernetStudy.open(run, config, [first])
    for slot in range(3):
        study.add_gate(first.name, record(slot))
    whole = run.merged_journal.read_bytes()
    run.merged_journal.write_bytes(whole[:-20])
    mended = SupernetStudy.open(run, config, [first])
    for slot in range(3):
        mended.add_gate(first.name, record(slot))
    origins = [f"{first.name}/trial-{slot:04d}" for slot in range(3)]
    assert [trial.user_attrs["origin"] for trial in merged_study(run.merged_journal).get_trials()] == origins
    second = MemberEntry("s1-bbbbbbbb", "b" * 64, {"supernet.options.width": 0.5}, "trained")
    wider = SupernetStudy.open(run, config, [first, second])
    assert merged_study(run.merged_journal).get_trials() == []
    wider.add_gate(second.name, record(0))
    (trial,) = merged_study(run.merged_journal).get_trials()
    assert trial.params["supernet"] == second.name


# ---- which supernets there are


def members_of(tmp_path: Path, space: str, supernets: str) -> tuple[Member, ...]:
    """The supernets of a sweep over this space, drawn without running anything."""
    head, _, rest = SUPERNETS.partition("space:")
    rest = rest[rest.index("constraints:") :]
    text = f"{head}space: {{{space}, gate.target: {{uniform: [0.05, 0.9]}}}}\n{rest}"
    text = text.replace("supernets: {number: 3, sampler: grid, scheduler: none}", f"supernets: {supernets}")
    config = anchored(load_config(write_sweep(tmp_path, text, "drawn.yaml")).config)
    return draw_members(config, RunDir(tmp_path / "runs", "nets"), load_images(config), pytest.fail)


def test_settings_that_come_to_the_same_supernet_are_trained_once(tmp_path: Path) -> None:
    # With all widths in every step nothing is drawn, so that num_random changes nothing.
    space = "supernet.train.widths: all, supernet.train.num_random: {choice: [1, 2, 3]}, supernet.train.teacher: {choice: [none, ema]}"
    members = members_of(tmp_path, space, "{number: 6, sampler: grid}")
    assert [member.settings["supernet.train.teacher"] for member in members] == ["none", "ema"]
    assert len({member.key for member in members}) == 2


@pytest.mark.parametrize("sampler", ["random", "qmc"])
def test_distinct_supernets_are_drawn_until_there_are_enough_and_the_first_stay_when_more_are_asked_for(
    tmp_path: Path, sampler: str
) -> None:
    space = "supernet.train.lr: {loguniform: [0.01, 0.3]}"
    few = members_of(tmp_path, space, f"{{number: 3, sampler: {sampler}}}")
    many = members_of(tmp_path, space, f"{{number: 5, sampler: {sampler}}}")
    assert len({member.key for member in many}) == 5
    assert [(member.name, member.settings) for member in many[:3]] == [(member.name, member.settings) for member in few]
    assert [member.name.partition("-")[0] for member in many] == ["s0", "s1", "s2", "s3", "s4"]
    rates = np.array([float(member.settings["supernet.train.lr"]) for member in many])
    assert ((rates >= 0.01) & (rates <= 0.3)).all()
    assert [member.config.supernet.train.lr for member in many] == rates.tolist()


def test_a_space_with_fewer_supernets_than_asked_for_gives_all_it_has(tmp_path: Path) -> None:
    members = members_of(tmp_path, "supernet.regime: {choice: [ib, ce]}", "{number: 7, sampler: random}")
    assert {member.settings["supernet.regime"] for member in members} == {"ib", "ce"}


def test_width_lists_are_settings_like_others(tmp_path: Path) -> None:
    space = "supernet.options.gated_widths: {choice: [[[8, 16], [16, 32]], [[8, 12, 16], [16, 24, 32]]]}"
    members = members_of(tmp_path, space, "{number: 2, sampler: grid}")
    assert [member.problem for member in members] == [None, None]
    assert [len(member.prepared.subnets) for member in members if member.prepared] == [2, 3]
