"""A sweep on a cluster of three machines that share no disk, of which two are lost: the study is
that of one machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.processes import PROGRAM, Command
from dsnet.files import file_sha256
from orchestration.results.run import RunResults
from orchestration.runs.folder import RunDir
from search.study.study import load_records
from tests.orchestration.cluster.machines import PORT, Machine, machines, newest_epoch, wait_until, why_not
from tests.orchestration.samples import SWEEP, TINY, WITHOUT_MLFLOW, write_sweep

TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
TRAINING, TRIALS = "ray::_train_loop", "ray::TrialWorker"
SLOW = ("--set", "supernet.train.epochs=25", "--set", "supernet.threads=1")
TEXT = TINY.replace("ray: {trial_actors: 1}\n", "").replace("budget: {trials: 12}", "budget: {trials: 40}")


def launch(folder: Path, *further: str, program: tuple[str, ...] = PROGRAM) -> Command:
    return Command(folder, "launch", SWEEP, *SLOW, *further, *WITHOUT_MLFLOW, program=program)


def of_run(folder: Path) -> RunResults:
    return RunResults(RunDir(folder / "runs", "tiny"))


def journal(folder: Path) -> Path:
    return next(iter(folder.glob("runs/tiny/search/*/study.journal")), folder / "none")


def num_trials(folder: Path) -> int:
    path = journal(folder)
    return len(load_records(path)) if path.exists() else 0


def the_one_that_runs(title: str, nodes: list[Machine]) -> Machine:
    wait_until(lambda: any(node.runs(title) for node in nodes), f"{title} on a node")
    return next(node for node in nodes if node.runs(title))


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_sweep_outlives_the_machines_of_its_training_and_of_its_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason := why_not():
        pytest.skip(reason)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name, value in TOKEN.items():
        monkeypatch.setenv(name, value)
    alone, joined, logs = tmp_path / "alone", tmp_path / "joined", tmp_path / "logs"
    for folder in (alone, joined):
        write_sweep(folder, TEXT)
    logs.mkdir()
    command = launch(alone)
    assert command.wait().code == 0
    with machines(3, TOKEN, hidden=tmp_path) as (head, *nodes):
        head.start(0, head=None, log=logs / "head")
        for number, node in enumerate(nodes):
            node.start(1, head=head, log=logs / f"{number}")
        address = ("--set", f"ray.address={head.address}:{PORT}")
        command = launch(joined, *address, program=(*head.within(), *PROGRAM))
        try:
            trains = the_one_that_runs(TRAINING, nodes)
            command.wait_for(lambda: newest_epoch(joined) >= 3)
            trains.kill()
            trains.start(1, head=head, log=logs / "again")
            command.wait_for(lambda: num_trials(joined) >= 4)
            the_one_that_runs(TRIALS, nodes).kill()
            answer = command.wait()
        finally:
            command.end()
    assert answer.code == 0, answer.err
    one, other = of_run(alone), of_run(joined)
    for results in (one, other):
        assert len(results.records) == 40
        assert not results.failed
    assert [(record.slot, record.params, record.state) for record in other.records] == [
        (record.slot, record.params, record.state) for record in one.records
    ]
    for first, second in zip(one.records, other.records, strict=True):
        exact = {name: value for name, value in first.metrics.items() if not name.startswith("latency")}
        assert {name: second.metrics[name] for name in exact} == exact
    folders = [results.run.stage_dir("supernet", results.done_key("supernet")) for results in (one, other)]
    assert file_sha256(folders[0] / "final.safetensors") == file_sha256(folders[1] / "final.safetensors")


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(300)
def test_without_the_token_of_the_cluster_the_message_says_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason := why_not():
        pytest.skip(reason)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write_sweep(tmp_path)
    with machines(1, TOKEN, hidden=tmp_path) as (head,):
        head.start(1, head=None, log=tmp_path / "log")
        for given, said in (
            ({}, "set RAY_AUTH_MODE=token: it is not set"),
            ({"RAY_AUTH_MODE": "token"}, "RAY_AUTH_MODE is token, but no token is there"),
            (
                {**TOKEN, "RAY_AUTH_TOKEN": "f" * 64},
                "the token of this machine (RAY_AUTH_TOKEN) is not that of the cluster",
            ),
        ):
            for name in TOKEN:
                monkeypatch.delenv(name, raising=False)
            for name, value in given.items():
                monkeypatch.setenv(name, value)
            address = ("--set", f"ray.address={head.address}:{PORT}")
            answer = Command(
                tmp_path, "launch", SWEEP, *address, *WITHOUT_MLFLOW, program=(*head.within(), *PROGRAM)
            ).wait()
            assert answer.code == 3, answer.err
            assert said in " ".join(answer.err.split())
            assert "ffffffff" not in answer.err
