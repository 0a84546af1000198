import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from mlflow.entities import LoggedModel, Run
from mlflow.tracking import MlflowClient

from orchestration.runs.curves import CurvePoint, CurveTail
from orchestration.tracking import background
from orchestration.tracking.background import FAILURES_BEFORE_PAUSE, MlflowTracker
from orchestration.tracking.process import MlflowWriter, SharedWriter, is_on_local_disk
from orchestration.tracking.protocol import NullTracker, TrackedBundle, TrackedRun, Tracker, TrackingSummary
from orchestration.tracking.store import NOTE_TAG, MlflowStore, clean_params, mlflow_environment
from orchestration.tracking.view import view_tag
from tests.orchestration.tracking.samples import (
    NOW_MS,
    NUM_TRIALS,
    POINTS,
    parent_run,
    subnet_run,
    supernet_run,
    trial_run,
)

TIMEOUT_S = 60.0

KILLED_DRIVER = """
import os, signal, sys
from pathlib import Path
from orchestration.tracking.background import MlflowTracker
from tests.orchestration.tracking import samples as t
tracker = MlflowTracker(sys.argv[1], sys.argv[2], Path(sys.argv[3]), "digits")
tracker.parent(t.parent_run("digits"))
tracker.supernet(t.supernet_run("digits", "RUNNING"))
tracker.curve(t.POINTS[:3])
tracker.trial(t.trial_run("digits", 0))
while tracker.summary.num_written < 5:
    pass
print(tracker._store._child.process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


class Database:
    """One MLflow database for the whole module: creating one takes seconds. Every test has its own
    experiment."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "mlflow.db"
        self.uri = f"sqlite:///{self.path}"
        self.artifacts = folder / "mlruns artifacts"

    def tracker(self, experiment: str) -> MlflowTracker:
        """A tracker that writes in this process, because another process takes a second to
        start."""
        store = MlflowStore(self.uri, experiment, self.artifacts)
        return MlflowTracker(self.uri, experiment, self.artifacts, "digits", warn=pytest.fail, store=store)

    def tracker_with_process(self, experiment: str) -> MlflowTracker:
        """A tracker that writes through a child process, as in the driver."""
        return MlflowTracker(self.uri, experiment, self.artifacts, "digits", warn=pytest.fail)

    def runs(self, experiment: str) -> dict[str, Run]:
        client = MlflowClient(self.uri)
        found = client.get_experiment_by_name(experiment)
        assert found is not None
        runs = client.search_runs([found.experiment_id])
        by_uid = {run.data.tags["uid"]: run for run in runs}
        assert len(by_uid) == len(runs), "a uid twice"
        return by_uid

    def rows(self) -> dict[str, list[Any]]:
        """Everything in the tables that hold runs."""
        tables = ("experiments", "experiment_tags", "runs", "metrics", "latest_metrics", "params", "tags")
        with closing(sqlite3.connect(self.path)) as connection:
            return {table: sorted(connection.execute(f"SELECT * FROM {table}"), key=repr) for table in tables}

    def history(self, run: Run, metric: str) -> list[tuple[int, int, float]]:
        points = MlflowClient(self.uri).get_metric_history(run.info.run_id, metric)
        return [(point.step, point.timestamp, point.value) for point in points]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Database:
    return Database(tmp_path_factory.mktemp("runs folder"))


@pytest.fixture
def experiment(request: pytest.FixtureRequest) -> str:
    return str(request.node.name)


def vanishes(pid: int) -> bool:
    """Whether a process that is nobody's child here ends soon."""
    deadline = time.monotonic() + TIMEOUT_S
    while (stat := Path(f"/proc/{pid}/stat")).exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def play(tracker: Tracker, sweep: str, artifact: Path, under: TrackedRun | None = None) -> TrackingSummary:
    """A whole sweep, as the driver or `sync` writes it."""
    tracker.parent(replace(parent_run(sweep), under=under))
    tracker.supernet(supernet_run(sweep, "RUNNING"))
    tracker.curve(POINTS[:2])
    tracker.curve(POINTS[2:])
    tracker.supernet(supernet_run(sweep, "FINISHED"))
    for index in range(2):
        tracker.subnet(subnet_run(sweep, index))
    widths = [subnet_run(sweep, index).metrics for index in range(2)]
    tracker.series(
        [
            CurvePoint(step, NOW_MS + 250, {f"width/{name}": value for name, value in metrics.items()})
            for step, metrics in enumerate(widths)
        ]
    )
    for slot in range(NUM_TRIALS):
        tracker.trial(trial_run(sweep, slot))
    tracker.artifact(artifact)
    return tracker.close("FINISHED", NOW_MS + 1000, TIMEOUT_S)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    path = tmp_path / "sweep.yaml"
    path.write_text("version: 1\n")
    return path


def facts(run: Run) -> dict[str, Any]:
    """The content of a run, without ids."""
    hidden = ("mlflow.parentRunId", "mlflow.runName")
    tags = {name: value for name, value in run.data.tags.items() if name not in hidden}
    times = (run.info.start_time, run.info.end_time)
    return {"status": run.info.status, "times": times, **run.data.params, **run.data.metrics, **tags}


@pytest.mark.slow
def test_a_sweep_is_a_parent_with_its_supernet_subnets_and_trials(
    database: Database, experiment: str, artifact: Path
) -> None:
    summary = play(database.tracker(experiment), "digits", artifact)
    runs = database.runs(experiment)
    parent = runs.pop("digits")
    assert (summary.num_unsent, summary.first_error) == (0, None)
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    assert sorted(run.data.tags["kind"] for run in runs.values()) == ["subnet"] * 2 + ["supernet"] + ["trial"] * 4
    assert parent.info.run_name == "digits"
    assert parent.data.params == {"seed": "0", "budget.trials": "64"}
    assert facts(parent)["times"] == (NOW_MS, NOW_MS + 1000)
    assert facts(runs["digits/cccc/trial-0001"])["times"] == (NOW_MS + 310, NOW_MS + 319)
    files = MlflowClient(database.uri).list_artifacts(parent.info.run_id)
    assert [file.path for file in files] == ["sweep.yaml"]


@pytest.mark.slow
def test_one_chart_can_hold_subnets_and_trials_since_their_metrics_have_the_same_names(
    database: Database, experiment: str, artifact: Path
) -> None:
    play(database.tracker(experiment), "digits", artifact)
    runs = database.runs(experiment)
    assert set(runs["digits/cccc/trial-0001"].data.metrics) == {"top1", "madds_m", "params_m", "latency_ms"}
    assert set(runs["digits/bbbb/subnet-01"].data.metrics) == {"top1", "madds_m", "params_m"}


@pytest.mark.slow
def test_curves_and_widths_carry_our_steps_and_times(database: Database, experiment: str, artifact: Path) -> None:
    play(database.tracker(experiment), "digits", artifact)
    runs = database.runs(experiment)
    losses = database.history(runs["digits/aaaa/supernet"], "loss/largest")
    assert losses == [(step, NOW_MS + step, 2.0 / step) for step in range(1, 6)]
    assert database.history(runs["digits"], "width/madds_m") == [(0, NOW_MS + 250, 1.0), (1, NOW_MS + 250, 2.0)]


def test_a_failed_trial_says_why(database: Database, experiment: str, artifact: Path) -> None:
    play(database.tracker(experiment), "digits", artifact)
    failed = database.runs(experiment)["digits/cccc/trial-0002"]
    assert failed.info.status == "FAILED"
    assert failed.data.tags["reason"] == "the loss became NaN at step 7"
    assert failed.data.params["gate.target"] == "0.2"


def test_a_second_sync_changes_no_row(database: Database, experiment: str, artifact: Path) -> None:
    play(database.tracker(experiment), "digits", artifact)
    before = database.rows()
    summary = play(database.tracker(experiment), "digits", artifact)
    assert summary.num_unsent == 0
    assert database.rows() == before


def test_a_finished_row_keeps_its_values_and_gets_what_is_known_later(database: Database, experiment: str) -> None:
    first = replace(trial_run("digits", 0), metrics={"latency_ms": 3.0}, first_tags={"on_front": "false"}, note="good")
    judged = {**first.tags, "on_front": "true"}
    later = replace(first, metrics={"latency_ms": 4.0, "test/top1": 0.5}, tags=judged, note="good on val, bad on test")
    found = []
    for row in (first, first, later, first):  # a launch, its relaunch, its end, and a relaunch of what is finished
        tracker = database.tracker(experiment)
        tracker.parent(parent_run("digits"))
        tracker.trial(row)
        tracker.close("FINISHED", NOW_MS + 1000, TIMEOUT_S)
        found.append(database.runs(experiment)["digits/cccc/trial-0000"])
    assert [run.data.tags["on_front"] for run in found] == ["false", "false", "true", "true"]
    assert [run.data.metrics.get("test/top1") for run in found] == [None, None, 0.5, 0.5]
    assert database.history(found[-1], "latency_ms") == [(0, NOW_MS + 309, 3.0)]
    assert {run.data.tags["root"] for run in found} == {"digits"}
    notes = [run.data.tags[NOTE_TAG] for run in found]
    assert notes == ["good", "good", "good on val, bad on test", "good on val, bad on test"]
    MlflowClient(database.uri).set_tag(found[0].info.run_id, NOTE_TAG, "my words")
    tracker = database.tracker(experiment)
    tracker.parent(parent_run("digits"))
    tracker.trial(later)
    tracker.close("FINISHED", NOW_MS + 1000, TIMEOUT_S)
    assert database.runs(experiment)["digits/cccc/trial-0000"].data.tags[NOTE_TAG] == "my words"


def test_rows_of_earlier_settings_are_marked_once_and_shown_again_after_the_way_back(
    database: Database, experiment: str
) -> None:
    rated = {"role": "knee", "on_front": "true", "is_knee": "true"}
    old = replace(trial_run("digits", 0), uid="digits/old/trial-0000", tags=rated)
    new = replace(trial_run("digits", 1), tags=rated)
    lone = replace(new, uid="gone/cccc/trial-0001")  # of a supernet that is no longer part of the sweep

    def launch(row: TrackedRun, current: str) -> dict[str, dict[str, str]]:
        tracker = database.tracker(experiment)
        tracker.parent(parent_run("digits"))
        tracker.supersede([current])
        tracker.trial(row)
        tracker.close("FINISHED", NOW_MS + 1000, TIMEOUT_S)
        return {uid: dict(run.data.tags) for uid, run in database.runs(experiment).items()}

    def shown() -> set[str]:
        client = MlflowClient(database.uri)
        found = client.get_experiment_by_name(experiment)
        assert found is not None
        view = json.loads(found.tags[view_tag("digits")])
        return {run.data.tags["uid"] for run in client.search_runs([found.experiment_id], view["searchFilter"])}

    tracker = database.tracker(experiment)
    tracker.parent(replace(parent_run("gone"), under=parent_run("digits")))
    tracker.trial(lone)
    tracker.close("FINISHED", NOW_MS + 1000, TIMEOUT_S)
    first = launch(old, "digits/old")
    assert shown() == {old.uid}
    assert "superseded" not in first[old.uid]
    second = launch(new, "digits/cccc")
    for uid in (old.uid, lone.uid):
        assert {"superseded": "true", "role": "superseded", "on_front": "false", "is_knee": "false"}.items() <= second[
            uid
        ].items()
    assert second["gone"]["superseded"] == "true"
    assert rated.items() <= second[new.uid].items()
    assert shown() == {new.uid}
    before = database.rows()
    assert launch(new, "digits/cccc") == second
    assert database.rows() == before
    back = launch(old, "digits/old")
    assert back[old.uid] == first[old.uid]
    assert (shown(), back[new.uid]["role"]) == ({old.uid}, "superseded")


def test_one_of_several_supernets_that_is_launched_by_itself_stays_in_its_sweep(
    database: Database, experiment: str
) -> None:
    own = parent_run("digits")
    for parent in (own, replace(own, under=parent_run("whole")), own):
        tracker = database.tracker(experiment)
        tracker.parent(parent)
        tracker.trial(trial_run("digits", 0))
        tracker.close("FINISHED", NOW_MS + 1000, TIMEOUT_S)
        roots = {database.runs(experiment)[uid].data.tags["root"] for uid in ("digits", "digits/cccc/trial-0000")}
        assert roots == {"digits" if parent is own and "whole" not in database.runs(experiment) else "whole"}
    found = MlflowClient(database.uri).get_experiment_by_name(experiment)
    assert found is not None
    assert "tags.sweep = 'digits'" in found.tags[view_tag("digits")]


@pytest.mark.slow
def test_a_killed_driver_is_resumed_and_ends_like_one_that_was_not(
    database: Database, experiment: str, artifact: Path
) -> None:
    command = [sys.executable, "-c", KILLED_DRIVER, database.uri, experiment, str(database.artifacts)]
    ended = subprocess.run(command, timeout=TIMEOUT_S, capture_output=True, text=True)
    assert ended.returncode == -9, ended.stderr
    assert vanishes(int(ended.stdout)), "the process that writes outlived its driver"
    killed = database.runs(experiment)
    assert {uid: run.info.status for uid, run in killed.items()} == {
        "digits": "RUNNING",
        "digits/aaaa/supernet": "RUNNING",
        "digits/cccc/trial-0000": "FINISHED",
    }
    play(database.tracker(experiment), "digits", artifact)
    play(database.tracker(f"{experiment}-undisturbed"), "digits", artifact)
    resumed, undisturbed = database.runs(experiment), database.runs(f"{experiment}-undisturbed")
    assert {uid: facts(run) for uid, run in resumed.items()} == {uid: facts(run) for uid, run in undisturbed.items()}
    assert resumed["digits"].info.run_id == killed["digits"].info.run_id
    losses = [database.history(runs["digits/aaaa/supernet"], "loss/largest") for runs in (resumed, undisturbed)]
    assert losses[0] == losses[1]


class Dying:
    """A client whose process is killed when it calls one method."""

    def __init__(self, client: MlflowClient, method: str) -> None:
        self._client = client
        self._method = method

    def __getattr__(self, name: str) -> Any:
        if name == self._method:
            raise KeyboardInterrupt
        return getattr(self._client, name)


def write_bundle(folder: Path, digest: str, *formats: str) -> Path:
    """The folder of a bundle, with as much content as MLflow is told."""
    for name in formats:
        (folder / name).mkdir(parents=True)
        (folder / name / "trunk.onnx").touch()
    folder.mkdir(parents=True, exist_ok=True)
    content = {"spec": {"family": "ds_tiny"}, "router": {"kind": "gate"}, "claims": {"val": {"top1": 0.5}}}
    manifest = {**content, "image_shape": [1, 8, 8], "sha256": digest}
    (folder / "bundle.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.slow
def test_a_bundle_has_one_model_and_one_version_whenever_a_process_was_killed(
    database: Database, experiment: str, tmp_path: Path
) -> None:
    parent, name, client = parent_run("digits"), "killed.gates", MlflowClient(database.uri)
    bundle = TrackedBundle(write_bundle(tmp_path / "trial-0007", "ab12"), "trial-0007", name)

    def store(dies_in: str | None = None) -> MlflowStore:
        new = MlflowStore(database.uri, experiment, database.artifacts)
        new.connect()
        assert new._client is not None
        new._client = new._client if dies_in is None else Dying(new._client, dies_in)  # type: ignore[assignment]
        return new

    def models() -> list[LoggedModel]:
        found = client.get_experiment_by_name(experiment)
        assert found is not None
        return list(client.search_logged_models([found.experiment_id]))

    statuses = []
    for method in ("log_outputs", "log_model_artifacts", "finalize_logged_model", "create_model_version"):
        with pytest.raises(KeyboardInterrupt):
            store(method).add_bundle(parent, bundle)
        statuses.append([str(model.status) for model in models()])
    assert statuses == [["PENDING"], ["PENDING"], ["PENDING"], ["READY"]]
    for _ in range(2):
        store().add_bundle(parent, bundle)
    (model,) = models()
    (version,) = client.search_model_versions(f"name = '{name}'")
    assert version.source == model.artifact_location
    assert version.tags["bundle"] == model.tags["bundle"] == "ab12"
    assert model.params == {"family": "ds_tiny", "router": "gate", "val.top1": "0.5"}
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": name, "version": version.version}]
    run = database.runs(experiment)["digits"]
    assert [output.model_id for output in run.outputs.model_outputs] == [model.model_id]

    again = write_bundle(tmp_path / "with a further format" / "trial-0007", "ab12", "onnx")
    store().add_bundle(parent, replace(bundle, path=again))
    (same,) = models()
    assert (same.model_id, same.tags["formats"]) == (model.model_id, "onnx")
    files = Path(unquote(model.artifact_location.removeprefix("file://")))
    assert (files / "artifacts" / "trial-0007" / "onnx" / "trunk.onnx").is_file()
    assert len(client.search_model_versions(f"name = '{name}'")) == 1

    other = write_bundle(tmp_path / "another" / "trial-0007", "cd34")
    store().add_bundle(parent, replace(bundle, path=other))
    assert (len(models()), len(client.search_model_versions(f"name = '{name}'"))) == (2, 2)


def test_whoever_adds_a_bundle_while_a_launch_works_leaves_its_rows_alone(
    database: Database, experiment: str, tmp_path: Path
) -> None:
    launch = database.tracker(experiment)
    launch.parent(parent_run("digits"))
    launch.supernet(supernet_run("digits", "RUNNING"))
    written(launch, 3)
    export = database.tracker(experiment)
    export.attach(replace(parent_run("digits"), status="FINISHED", end_ms=NOW_MS))
    export.bundle(TrackedBundle(write_bundle(tmp_path / "trial-0001", "ef56"), "trial-0001"))
    assert export.close("FINISHED", NOW_MS, TIMEOUT_S) == TrackingSummary(num_written=3)
    runs = database.runs(experiment)
    assert {run.info.status for run in runs.values()} == {"RUNNING"}
    assert len(runs["digits"].outputs.model_outputs) == 1
    launch.close("FINISHED", NOW_MS + 1000, TIMEOUT_S)


def test_what_a_killed_driver_left_running_is_closed_at_start_up(database: Database, experiment: str) -> None:
    first = database.tracker(experiment)
    first.parent(parent_run("digits"))
    client = MlflowClient(database.uri)
    while (found := client.get_experiment_by_name(experiment)) is None or not database.runs(experiment):
        time.sleep(0.01)
    half_written = {"uid": "digits/cccc/trial-0001", "sweep": "digits", "kind": "trial"}
    client.create_run(found.experiment_id, start_time=NOW_MS, tags=half_written)
    client.create_run(found.experiment_id, start_time=NOW_MS, tags={"uid": "digits/old/trial-0009", "sweep": "digits"})
    client.create_run(found.experiment_id, start_time=NOW_MS, tags={"uid": "another", "sweep": "another"})

    second = database.tracker(experiment)
    second.parent(parent_run("digits"))
    deadline = time.monotonic() + TIMEOUT_S
    while database.runs(experiment)["digits/old/trial-0009"].info.status == "RUNNING":
        assert time.monotonic() < deadline
    second.trial(trial_run("digits", 1))
    second.close("KILLED", NOW_MS + 1000, TIMEOUT_S)
    runs = database.runs(experiment)
    assert {uid: run.info.status for uid, run in runs.items()} == {
        "digits": "KILLED",
        "digits/cccc/trial-0001": "FINISHED",
        "digits/old/trial-0009": "KILLED",
        "another": "RUNNING",
    }
    assert runs["digits/cccc/trial-0001"].data.metrics["top1"] == 0.95


@pytest.mark.slow
def test_a_process_of_its_own_writes_what_a_thread_would(
    database: Database, experiment: str, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mlflow.py").write_text("raise SystemExit('the user has a file of this name')")
    monkeypatch.chdir(tmp_path)
    summary = play(database.tracker_with_process(experiment), "digits", Path(artifact.name))
    assert summary == play(database.tracker(f"{experiment}-thread"), "digits", artifact)
    runs, threads = (database.runs(name) for name in (experiment, f"{experiment}-thread"))
    assert {uid: facts(run) for uid, run in runs.items()} == {uid: facts(run) for uid, run in threads.items()}
    files = MlflowClient(database.uri).list_artifacts(runs["digits"].info.run_id)
    assert [file.path for file in files] == ["sweep.yaml"]


@pytest.mark.slow
def test_a_writing_process_that_dies_is_replaced_and_costs_no_row(database: Database, experiment: str) -> None:
    warnings: list[str] = []
    tracker = MlflowTracker(database.uri, experiment, database.artifacts, "digits", warn=warnings.append)
    tracker.parent(parent_run("digits"))
    tracker.trial(trial_run("digits", 0))
    written(tracker, 3)
    os.kill(writer_pid(tracker), signal.SIGKILL)
    assert vanishes(writer_pid(tracker))
    tracker.trial(trial_run("digits", 1))
    tracker.trial(trial_run("digits", 2))
    summary = tracker.close("FINISHED", NOW_MS + 1000, TIMEOUT_S)
    assert (summary.num_unsent, warnings) == (0, [])
    runs = database.runs(experiment)
    assert sorted(runs) == ["digits", *(f"digits/cccc/trial-000{slot}" for slot in range(3))]
    assert "RUNNING" not in {run.info.status for run in runs.values()}


@pytest.mark.slow
def test_the_driver_itself_does_without_mlflow(database: Database, experiment: str) -> None:
    script = (
        "import sys; from pathlib import Path; from orchestration.tracking.background import MlflowTracker\n"
        "from orchestration.tracking.protocol import TrackedRun\n"
        "tracker = MlflowTracker(sys.argv[1], sys.argv[2], Path(sys.argv[3]), 'digits')\n"
        "tracker.parent(TrackedRun('digits', 'digits', 'sweep', 1))\n"
        "assert tracker.close('FINISHED', 2, 60).num_written == 3\n"
        "assert not {'mlflow', 'sqlalchemy'}.intersection(sys.modules)\n"
    )
    command = [sys.executable, "-c", script, database.uri, experiment, str(database.artifacts)]
    subprocess.run(command, cwd=Path(__file__).parents[3], check=True)
    assert database.runs(experiment)["digits"].info.status == "FINISHED"


@pytest.mark.slow
def test_a_database_is_one_plain_file_again_when_the_sweep_is_over(tmp_path: Path, artifact: Path) -> None:
    assert is_on_local_disk(tmp_path / "mlflow.db"), "elsewhere it stays one plain file throughout"
    own = Database(tmp_path)
    own.artifacts.mkdir()
    tracker = own.tracker_with_process("digits")
    tracker.parent(parent_run("digits"))
    written(tracker, 2)
    assert own.path.with_name("mlflow.db-wal").exists(), "rows are appended to a log meanwhile"
    os.kill(writer_pid(tracker), signal.SIGKILL)  # what was answered outlives the process that wrote it
    tracker = own.tracker_with_process("digits")
    assert play(tracker, "digits", artifact).num_unsent == 0
    assert [path.name for path in tmp_path.glob("mlflow.db*")] == ["mlflow.db"]
    copy = Database(tmp_path / "copy")
    copy.path.parent.mkdir()
    shutil.copy(own.path, copy.path)
    assert len(copy.runs("digits")) == 1 + 1 + 2 + NUM_TRIALS


def test_a_database_that_machines_may_share_is_left_as_it_is(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    (tmp_path / "home of all" / "runs").mkdir(parents=True)
    shared = str(tmp_path / "home of all").replace(" ", "\\040")
    mounts.write_text(f"/dev/sda1 / ext4 rw 0 0\nserver:/home {shared} nfs4 rw 0 0\n")
    assert is_on_local_disk(tmp_path / "mlflow.db", mounts)
    assert not is_on_local_disk(tmp_path / "home of all" / "runs" / "mlflow.db", mounts)
    mounts.write_text(f"{mounts.read_text()}tmpfs {shared}/runs tmpfs rw 0 0\n")
    assert is_on_local_disk(tmp_path / "home of all" / "runs" / "mlflow.db", mounts)
    (tmp_path / "link").symlink_to(tmp_path / "home of all")
    assert not is_on_local_disk(tmp_path / "link" / "mlflow.db", mounts)
    assert not is_on_local_disk(tmp_path / "mlflow.db", tmp_path / "another system has none")


@pytest.mark.slow
def test_a_closed_tracker_leaves_no_process(database: Database, experiment: str) -> None:
    tracker = database.tracker_with_process(experiment)
    tracker.parent(parent_run("digits"))
    written(tracker, 2)
    pid = writer_pid(tracker)
    tracker.close("FINISHED", NOW_MS + 1000, TIMEOUT_S)
    assert not Path(f"/proc/{pid}").exists()


def written(tracker: MlflowTracker, number: int) -> None:
    """Wait for some writes."""
    deadline = time.monotonic() + TIMEOUT_S
    while tracker.summary.num_written < number:
        assert time.monotonic() < deadline, tracker.summary
        time.sleep(0.01)


def writer_pid(tracker: MlflowTracker) -> int:
    store = tracker._store
    assert isinstance(store, MlflowWriter)
    assert store._child is not None
    return store._child.process.pid


def test_a_writer_that_is_stopped_while_it_starts_leaves_no_process_behind(tmp_path: Path) -> None:
    for delay_us in range(0, 4000, 200):
        writer = MlflowWriter(f"sqlite:///{tmp_path}/mlflow.db", "stopped", tmp_path)

        def connect(writer: MlflowWriter = writer) -> None:
            with suppress(RuntimeError):
                writer.connect()

        thread = threading.Thread(target=connect)
        thread.start()
        time.sleep(1e-6 * delay_us)
        writer.stop(at_once=True)
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()
        assert writer._child is None, "a process that nobody ends"


@pytest.mark.slow
@pytest.mark.parametrize("is_shared", [False, True])
def test_a_sweep_of_a_larger_sweep_hangs_below_its_row(
    database: Database, experiment: str, artifact: Path, is_shared: bool
) -> None:
    outer = replace(parent_run("family"), params={"supernets.number": 2})
    shared = SharedWriter(database.uri, experiment, database.artifacts) if is_shared else None

    def make() -> MlflowTracker:
        store = shared or MlflowStore(database.uri, experiment, database.artifacts)
        return MlflowTracker(database.uri, experiment, database.artifacts, "family", warn=pytest.fail, store=store)

    all_of_it, members = make(), [make(), make()]
    all_of_it.parent(outer)
    for number, member in enumerate(members):  # the first may be there before the row above it
        member.parent(replace(parent_run(f"family/{number}"), under=outer))
    for number, member in enumerate(members):
        assert play(member, f"family/{number}", artifact, outer).num_unsent == 0
    assert all_of_it.close("FINISHED", NOW_MS + 2000, TIMEOUT_S).num_unsent == 0
    runs = database.runs(experiment)
    ids = {uid: run.info.run_id for uid, run in runs.items()}
    above = {uid: run.data.tags.get("mlflow.parentRunId") for uid, run in runs.items()}
    assert above["family"] is None
    assert above["family/0"] == above["family/1"] == ids["family"]
    assert above["family/1/cccc/trial-0003"] == ids["family/1"]
    assert runs["family"].data.params == {"supernets.number": "2"}
    assert "RUNNING" not in {run.info.status for run in runs.values()}
    before = database.rows()
    assert play(make(), "family/1", artifact, outer).num_unsent == 0
    assert database.rows() == before
    if shared is not None:
        assert shared._child is not None, "one tracker's end is not that of the others"
        child = shared._child.process
        shared.end()
        assert child.returncode is not None


def test_a_sweep_that_was_launched_alone_moves_below_the_larger_one(
    database: Database, experiment: str, artifact: Path
) -> None:
    play(database.tracker(experiment), "digits", artifact)
    play(database.tracker(experiment), "digits", artifact, under=parent_run("family"))
    runs = database.runs(experiment)
    assert runs["digits"].data.tags["mlflow.parentRunId"] == runs["family"].info.run_id
    assert runs["family"].info.status == "RUNNING", "it is not the member's to close"


def test_stopping_ends_the_supernet_too(database: Database, experiment: str) -> None:
    tracker = database.tracker(experiment)
    tracker.parent(parent_run("digits"))
    tracker.supernet(supernet_run("digits", "RUNNING"))
    tracker.curve(POINTS)
    tracker.close("KILLED", NOW_MS + 50, TIMEOUT_S)
    assert {run.info.status for run in database.runs(experiment).values()} == {"KILLED"}


def test_changed_parameters_of_a_resumed_sweep_do_not_stop_it(database: Database, experiment: str) -> None:
    for trials in (64, 128):
        tracker = database.tracker(experiment)
        tracker.parent(replace(parent_run("digits"), params={"budget.trials": trials, f"new.{trials}": 1}))
        assert tracker.close("FINISHED", NOW_MS + 1000, TIMEOUT_S).num_unsent == 0
    params = database.runs(experiment)["digits"].data.params
    assert params == {"budget.trials": "64", "new.64": "1", "new.128": "1"}


def test_a_row_deleted_by_the_user_and_then_synced_is_there_again(
    database: Database, experiment: str, artifact: Path
) -> None:
    play(database.tracker(experiment), "digits", artifact)
    client = MlflowClient(database.uri)
    before = database.runs(experiment)
    client.delete_run(before["digits/cccc/trial-0001"].info.run_id)
    client.delete_experiment(before["digits"].info.experiment_id)
    play(database.tracker(experiment), "digits", artifact)
    assert len(database.runs(experiment)) == len(before)


def test_values_that_mlflow_refuses_or_falsifies_do_not_reach_it(database: Database, experiment: str) -> None:
    tracker = database.tracker(experiment)
    tracker.parent(parent_run("digits"))
    metrics = {"top1": 0.5, "nan": float("nan"), "inf": float("inf"), "none": None, "a|b": 1.0, "../up": 2.0}
    params = {"long": "x" * 10_000, "a,b": [1, 2], "n" * 400: None}
    tracker.trial(TrackedRun("odd", "odd", "trial", NOW_MS, NOW_MS, metrics=metrics, params=params))
    assert tracker.close("FINISHED", NOW_MS, TIMEOUT_S).num_unsent == 0
    data = database.runs(experiment)["odd"].data
    assert data.metrics == {"top1": 0.5, "a_b": 1.0, "up": 2.0}
    assert data.params == {"long": "x" * 6000, "a_b": "[1, 2]", "n" * 250: "null"}


def test_more_values_than_a_batch_holds_are_all_written(database: Database, experiment: str) -> None:
    tracker = database.tracker(experiment)
    tracker.parent(replace(parent_run("digits"), params={f"p{index}": index for index in range(250)}))
    tracker.supernet(supernet_run("digits", "RUNNING"))
    tracker.curve([CurvePoint(step, NOW_MS, {"loss": float(step)}) for step in range(2500)])
    tracker.close("FINISHED", NOW_MS, TIMEOUT_S)
    runs = database.runs(experiment)
    assert len(runs["digits"].data.params) == 250
    assert [step for step, _, _ in database.history(runs["digits/aaaa/supernet"], "loss")] == list(range(2500))


@pytest.mark.slow
def test_a_dead_server_costs_one_warning_and_nothing_else(
    tmp_path: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    warnings: list[str] = []
    start = time.monotonic()
    tracker = MlflowTracker("http://127.0.0.1:1", "digits", tmp_path, "digits", warn=warnings.append)
    summary = play(tracker, "digits", artifact)
    assert time.monotonic() - start < 10
    assert summary.num_written == 0
    assert summary.num_unsent == 5 + 2 + 1 + NUM_TRIALS + 1 + 1
    assert len(warnings) == 1
    assert "dsnet-orch sync digits" in warnings[0]
    assert "http://127.0.0.1:1" in warnings[0]


@pytest.mark.slow
def test_a_failing_server_is_left_alone_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    num_calls = 0

    def hang_up() -> None:
        nonlocal num_calls
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            num_calls += 1
            connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        answering = threading.Thread(target=hang_up, daemon=True)
        answering.start()
        uri = f"http://127.0.0.1:{listener.getsockname()[1]}"
        store = MlflowStore(uri, "digits", tmp_path)
        tracker = MlflowTracker(uri, "digits", tmp_path, "digits", warn=lambda text: None, store=store)
        tracker.parent(parent_run("digits"))
        for slot in range(50):
            tracker.trial(trial_run("digits", slot))
        assert tracker.close("FINISHED", NOW_MS, TIMEOUT_S).num_unsent == 52
        listener.shutdown(socket.SHUT_RDWR)
    answering.join(TIMEOUT_S)
    assert num_calls == FAILURES_BEFORE_PAUSE


@pytest.mark.slow
def test_a_store_that_comes_back_is_written_to_again(
    database: Database, experiment: str, tmp_path: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(database.tracker(experiment), "before", artifact)
    monkeypatch.setattr(background, "PAUSE_S", 0.05)
    warnings: list[str] = []
    away = Database(tmp_path)
    away.path.mkdir()
    tracker = MlflowTracker(away.uri, experiment, away.artifacts, "digits", warn=warnings.append)
    tracker.parent(parent_run("digits"))
    for slot in range(3):
        tracker.trial(trial_run("digits", slot))
    deadline = time.monotonic() + TIMEOUT_S
    while tracker.summary.num_unsent < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    away.path.rmdir()
    # Not as a file: to open and close one that SQLite has open in this process would take its locks
    # away.
    with closing(sqlite3.connect(database.path)) as source, closing(sqlite3.connect(away.path)) as target:
        source.backup(target)
    tracker.trial(trial_run("digits", 3))
    summary = tracker.close("FINISHED", NOW_MS + 1000, TIMEOUT_S)
    assert summary.num_unsent == 0, "what failed is written at the end"
    assert len(warnings) == 1
    assert {"digits", *(f"digits/cccc/trial-000{slot}" for slot in range(4))} <= set(away.runs(experiment))
    assert play(away.tracker(experiment), "digits", artifact).num_unsent == 0
    assert "digits/aaaa/supernet" in away.runs(experiment)


def test_a_server_that_never_answers_does_not_hold_the_driver(tmp_path: Path) -> None:
    warnings: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        start = time.monotonic()
        tracker = MlflowTracker(uri, "digits", tmp_path, "digits", warn=warnings.append)
        tracker.parent(parent_run("digits"))
        tracker.trial(trial_run("digits", 0))
        summary = tracker.close("FINISHED", NOW_MS, timeout_s=0.5)
        assert time.monotonic() - start < 5
    assert summary.num_unsent >= 2
    assert len(warnings) == 1
    tracker._thread.join(TIMEOUT_S)
    assert tracker.summary == summary, "what was given up is counted once"


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.write_bytes(b"not a database" * 100)])
def test_a_database_that_cannot_be_opened_is_reported_at_once(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "mlflow.db")
    warnings: list[str] = []
    start = time.monotonic()
    tracker = MlflowTracker(f"sqlite:///{tmp_path}/mlflow.db", "x", tmp_path, "digits", warn=warnings.append)
    tracker.parent(parent_run("digits"))
    summary = tracker.close("FINISHED", NOW_MS, TIMEOUT_S)
    assert time.monotonic() - start < 30, "MLflow itself tries for 100 s"
    assert summary.num_unsent == 3
    assert len(warnings) == 1


@pytest.mark.slow
def test_one_row_that_cannot_be_written_does_not_stop_the_others(
    database: Database, experiment: str, tmp_path: Path
) -> None:
    warnings: list[str] = []
    store = MlflowStore(database.uri, experiment, database.artifacts)
    tracker = MlflowTracker(database.uri, experiment, database.artifacts, "digits", warn=warnings.append, store=store)
    tracker.parent(parent_run("digits"))
    tracker.artifact(tmp_path / "no such file")
    tracker.trial(trial_run("digits", 0))
    summary = tracker.close("FINISHED", NOW_MS, TIMEOUT_S)
    assert (summary.num_unsent, len(warnings)) == (1, 1)
    assert database.runs(experiment)["digits/cccc/trial-0000"].info.status == "FINISHED"


def test_closing_twice_is_closing_once(database: Database, experiment: str) -> None:
    tracker = database.tracker(experiment)
    tracker.parent(parent_run("digits"))
    first = tracker.close("FINISHED", NOW_MS, TIMEOUT_S)
    assert tracker.close("FAILED", NOW_MS + 1, TIMEOUT_S) == first
    assert database.runs(experiment)["digits"].info.status == "FINISHED"


def test_the_null_tracker_takes_a_whole_sweep(artifact: Path) -> None:
    assert play(NullTracker(), "digits", artifact) == TrackingSummary(0, 0, None)


@pytest.mark.slow
def test_importing_the_module_does_not_import_mlflow_and_using_it_sends_nothing_home(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from orchestration.tracking import background, store as stores\n"
        "assert 'mlflow' not in sys.modules\n"
        "store = stores.MlflowStore('http://127.0.0.1:1', 'x', Path('.'))\n"
        "print(background.MlflowTracker('http://127.0.0.1:1', 'x', Path('.'), 'x', store=store)._attempt(store.connect))\n"
        "from mlflow.telemetry import get_telemetry_client\n"
        "assert get_telemetry_client() is None\n"
    )
    # A bare environment: MLflow is silent under pytest and CI anyhow, which would prove nothing.
    environment = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "127.0.0.1" in done.stdout, "it was tried"


def test_time_outs_of_the_user_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "false")
    environment = mlflow_environment()
    assert environment["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    assert environment["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_parameters_read_like_the_yaml_they_came_from() -> None:
    params = {"lr": 0.1, "flip": True, "path": None, "mode": "ib", "sizes": (1, 2), "where": Path("a")}
    expected = {"lr": "0.1", "flip": "true", "path": "null", "mode": "ib", "sizes": "[1, 2]", "where": '"a"'}
    assert clean_params(params) == expected


def line(step: int) -> str:
    return json.dumps({"step": step, "epoch": step / 10, "time_ms": NOW_MS + step, "metrics": {"lr": 0.1}}) + "\n"


@pytest.fixture
def curves(tmp_path: Path) -> Path:
    return tmp_path / "curves.jsonl"


def steps(points: list[CurvePoint]) -> list[int]:
    return [point.step for point in points]


def test_a_tail_reads_each_line_once_and_leaves_an_unfinished_one(curves: Path) -> None:
    tail = CurveTail(curves)
    assert tail.read() == []
    whole = line(1) + line(2) + line(3)
    seen: list[int] = []
    for size in range(len(whole) + 1):
        curves.write_text(whole[:size])
        seen += steps(tail.read())
    assert seen == [1, 2, 3]


def test_a_tail_skips_a_line_torn_by_a_kill(curves: Path) -> None:
    curves.write_text(line(1) + '{"step": 2, "ti\n' + line(3) + "[]\n")
    assert steps(CurveTail(curves).read()) == [1, 3]


def test_a_tail_starts_again_when_a_resumed_training_cut_the_file_back(curves: Path) -> None:
    tail = CurveTail(curves)
    curves.write_text(line(1) + line(2) + line(3))
    assert steps(tail.read()) == [1, 2, 3]
    curves.write_text(line(1) + line(2))
    assert steps(tail.read()) == [1, 2]
