"""Trainings that run on two nodes at the same time, and a driver that is on no node, in network
namespaces that do not share the run folder: weights and results are those of one machine."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.processes import PROGRAM, Answer, Command
from dsnet.files import file_sha256
from orchestration.results.run import RunResults
from orchestration.runs.folder import RunDir
from orchestration.supernets.results import SupernetSweepResults
from tests.orchestration.cluster.machines import PORT, Machine, machines, newest_epoch, why_not
from tests.orchestration.samples import SWEEP, TINY, WITHOUT_MLFLOW, results_in, study_of, write_sweep

TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
GROUP, MEMBER = "RayTrainWorker", "ImplicitFunc"
"""Parts of the process titles of the workers of Ray Train, and of the supernets of Ray Tune."""
CLIENT_PORT = 10001
"""Port at which a head waits for clients, by Ray's default."""
LIMIT_S = 500.0
BY_TWO = ("--set", "supernet.workers=2", "--set", "supernet.threads=1")
TWO_WORKERS = (
    TINY.replace("ray: {trial_actors: 1}\n", "")
    .replace("budget: {trials: 12}", "budget: {trials: 8}")
    .replace("startup: 8", "startup: 4")
)
SEARCHED = (
    TWO_WORKERS.replace(
        "  options: {num_routes: 3}\n",
        "  options: {num_routes: 3}\n"
        "  structure: {method: greedy, targets: [0.4, 0.7, 1.0], pin: gate, step: 16, levels: 4, holdout: 0.2, epochs: 2}\n",
    )
    .replace("epochs: 8", "epochs: 4")
    .replace("trials: 8", "trials: 4")
)
SUPERNETS = """\
version: 1
name: nets
data: {name: digits, limit: 150}
supernet:
  model: ds_tiny
  options: {num_routes: 3}
  threads: 1
  train: {epochs: 20, batch_size: 30, warmup_epochs: 0.5}
  bootstrapping: {teacher_min_updates: 2}
space:
  supernet.options.width: {choice: [1.0, 0.5, 2.0]}
  gate.target: {uniform: [0.05, 0.9]}
supernets: {number: 3, sampler: grid, scheduler: none, concurrent: 2}
measure: {batch_sizes: [1, 8], group_sizes: [1, 8], repeats: 2, warmup: 1}
gate: {optimizer: {steps: 40, batch_size: 100}}
sampler: {cohort: 4, startup: 4, enqueue: []}
budget: {trials: 4}
export: {picks: [knee], formats: [bundle]}
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home folder of its own, and the token of the cluster."""
    if reason := why_not():
        pytest.skip(reason)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name, value in TOKEN.items():
        monkeypatch.setenv(name, value)


@contextmanager
def two_nodes(folder: Path) -> Iterator[tuple[Machine, Sequence[Machine]]]:
    """A head without a CPU, and two nodes of one CPU each that do not see the folder."""
    logs = folder / "logs"
    logs.mkdir()
    with machines(3, TOKEN, hidden=folder) as (head, *nodes):
        head.start(0, head=None, log=logs / "head")
        for number, node in enumerate(nodes):
            node.start(1, head=head, log=logs / f"{number}")
        yield head, nodes


def launch(folder: Path, *further: str, program: tuple[str, ...] = PROGRAM) -> Command:
    return Command(folder, "launch", SWEEP, *further, *WITHOUT_MLFLOW, program=program)


def answer_of(command: Command) -> Answer:
    """The answer of a launch that ends well."""
    try:
        answer = command.wait(LIMIT_S)
    finally:
        command.end()
    assert answer.code == 0, answer.err
    return answer


def launched_alone(folder: Path, text: str, *further: str) -> tuple[Path, Path]:
    """Folders of a sweep that was launched on this machine alone, and of one that was not launched
    yet."""
    alone, joined = folder / "alone", folder / "joined"
    for each in (alone, joined):
        write_sweep(each, text)
    answer_of(launch(alone, *further, "--set", "ray.num_cpus=2"))
    return alone, joined


def launched_on(head: Machine, nodes: Sequence[Machine], title: str, folder: Path, *further: str) -> None:
    """Launch on the head's machine until the end; processes of this title must run on every node at
    the same time."""
    command = launch(
        folder, "--set", f"ray.address={head.address}:{PORT}", *further, program=(*head.within(), *PROGRAM)
    )
    deadline, is_on_all = time.monotonic() + LIMIT_S, False
    while not is_on_all and command.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.3)
        is_on_all = all(node.runs(title) for node in nodes)
    answer_of(command)
    assert is_on_all, f"{title} on every node at the same time"


def weights(results: RunResults) -> str:
    """SHA-256 of the trained weights."""
    folder = results.run.stage_dir("supernet", results.done_key("supernet"))
    return file_sha256(folder / "final.safetensors")


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(1100)
@pytest.mark.usefixtures("home")
def test_two_workers_of_a_training_on_two_nodes_give_the_weights_of_one_node(tmp_path: Path) -> None:
    alone, joined = launched_alone(tmp_path, TWO_WORKERS, *BY_TWO)
    with two_nodes(tmp_path) as (head, nodes):
        launched_on(head, nodes, GROUP, joined, *BY_TWO)
    one, other = results_in(alone), results_in(joined)
    assert weights(one) == weights(other), "a sum of two numbers has the same bits on any network"
    assert study_of(one) == study_of(other) != []


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(1100)
@pytest.mark.usefixtures("home")
def test_a_training_of_two_workers_outlives_one_of_their_nodes(tmp_path: Path) -> None:
    alone, joined = launched_alone(tmp_path, TWO_WORKERS.replace("epochs: 8", "epochs: 25"), *BY_TWO)
    with two_nodes(tmp_path) as (head, nodes):
        address = ("--set", f"ray.address={head.address}:{PORT}")
        command = launch(joined, *BY_TWO, *address, program=(*head.within(), *PROGRAM))
        try:
            command.wait_for(lambda: newest_epoch(joined) >= 3)
            assert all(node.runs(GROUP) for node in nodes)
            nodes[1].kill()
            nodes[1].start(1, head=head, log=tmp_path / "logs" / "again")
        finally:
            answer_of(command)
    one, other = results_in(alone), results_in(joined)
    assert weights(one) == weights(other)
    assert study_of(one) == study_of(other) != []


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(1100)
@pytest.mark.usefixtures("home")
def test_a_sweep_of_supernets_trains_on_two_nodes_and_gives_the_results_of_one_machine(tmp_path: Path) -> None:
    alone, joined = launched_alone(tmp_path, SUPERNETS)
    with two_nodes(tmp_path) as (head, nodes):
        launched_on(head, nodes, MEMBER, joined)
    one, other = (SupernetSweepResults(RunDir(folder / "runs", "nets")) for folder in (alone, joined))
    assert list(one.supernets) == list(other.supernets)
    assert len(one.supernets) == 3
    for name, own in one.supernets.items():
        assert weights(own) == weights(other.supernets[name]), name
        assert study_of(own) == study_of(other.supernets[name]) != [], name
    assert len({weights(own) for own in one.supernets.values()}) == 3


def alone_and_as_client(folder: Path, text: str) -> tuple[RunResults, RunResults, Answer]:
    """A sweep on one machine, and one whose driver is on no node of the cluster, with what the
    latter said."""
    alone, desk, logs = (folder / name for name in ("alone", "desk", "logs"))
    for each in (alone, desk):
        write_sweep(each, text)
    logs.mkdir()
    threads = ("--set", "supernet.threads=1")
    answer_of(launch(alone, *threads, "--set", "ray.num_cpus=1"))
    with machines(3, TOKEN, hidden=desk) as (driver, head, node):
        head.start(0, head=None, log=logs / "head")
        node.start(1, head=head, log=logs / "node")
        address = ("--set", f"ray.address=ray://{head.address}:{CLIENT_PORT}")
        kept = ("--set", f"storage.artifacts={(folder / 'store').as_uri()}")
        answer = answer_of(launch(desk, *threads, *address, *kept, program=(*driver.within(), *PROGRAM)))
    return results_in(alone), results_in(desk), answer


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(1100)
@pytest.mark.usefixtures("home")
def test_a_client_of_a_cluster_launches_to_the_end_with_the_results_of_one_machine(tmp_path: Path) -> None:
    one, other, answer = alone_and_as_client(tmp_path, TWO_WORKERS)
    assert "1 node with 1 CPU and no GPU" in answer.err
    assert weights(one) == weights(other)
    assert study_of(one) == study_of(other) != []
    assert any(tmp_path.glob("store/tiny/supernet/*/epoch-*.safetensors")), "checkpoints stay at the URL"


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(1100)
@pytest.mark.usefixtures("home")
def test_a_client_of_a_cluster_searches_sub_networks_as_one_machine_does(tmp_path: Path) -> None:
    one, other, _ = alone_and_as_client(tmp_path, SEARCHED)
    chosen = [results.run.stage_dir("structure", results.done_key("structure")) for results in (one, other)]
    assert file_sha256(chosen[0] / "structure.safetensors") == file_sha256(chosen[1] / "structure.safetensors")
    assert weights(one) == weights(other)
    assert study_of(one) == study_of(other) != []
