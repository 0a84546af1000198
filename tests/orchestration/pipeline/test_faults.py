"""Faults of Ray under a launch, and stop requests in every stage: the exit code, one message,
nothing left behind, and the same study after the next launch."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dsnet.files import file_sha256
from orchestration.results.run import RunResults
from orchestration.runs.folder import RunDir
from orchestration.supernets.results import SupernetSweepResults, results_at
from orchestration.workers.cluster_processes import command_line
from orchestration.workers.guards import agents_of
from tests.orchestration.pipeline.test_resume import num_trials
from tests.orchestration.pipeline.test_structure import sweep_text
from tests.orchestration.samples import (
    SWEEP,
    TINY,
    WITHOUT_MLFLOW,
    Answer,
    Command,
    Finished,
    results_in,
    study_of,
    write_sweep,
)
from tests.orchestration.supernets.test_supernet_sweep import SUPERNETS

pytestmark = pytest.mark.ray
SOON_S = 10.0
"""Seconds within which a stop request ends a launch, whatever Ray does."""
RAYLET, GCS = "raylet/raylet", "gcs/gcs_server"


def process_of(command: Command, part: str) -> int:
    """Pid of the process of a command whose command line has this part; waits for it."""
    found: list[int] = []

    def is_there() -> bool:
        found[:] = [pid for pid in command.pids() if part in command_line(pid)]
        return bool(found)

    command.wait_for(is_there)
    return found[0]


def assert_one_message(answer: Answer, *parts: str) -> None:
    """What a person sees: what happened, and the command that continues."""
    assert "Traceback" not in answer.err, answer.err
    assert "internal error" not in answer.err, answer.err
    assert answer.out == "", "stdout is for data"
    last = answer.err.strip().splitlines()[-2:]
    assert last[1].startswith("  dsnet-orch launch "), answer.err
    assert answer.err.count("Continue with:") == 1, answer.err
    for part in parts:
        assert part in last[0], answer.err


@pytest.fixture
def longer(finished: Finished, tmp_path: Path) -> Path:
    """A folder with the finished sweep, whose search can go on."""
    return finished.copy(tmp_path)


def goes_on(folder: Path, *further: str, program: Callable[..., Command] = Command) -> Command:
    """A launch that goes on with the search."""
    return program(folder, "launch", SWEEP, "--trials", "400", "--set", "ray.num_cpus=2", *WITHOUT_MLFLOW, *further)


@pytest.mark.parametrize(
    "name",
    [
        "its raylet",
        pytest.param("its dashboard agent", marks=pytest.mark.long),
        pytest.param("its agent for runtime environments", marks=pytest.mark.long),
    ],
)
def test_a_launch_that_loses_a_part_of_ray_ends_with_6_and_one_message(longer: Path, name: str) -> None:
    command = goes_on(longer)
    try:
        command.wait_for(lambda: num_trials(longer / "runs" / "tiny") > 12)
        pid = process_of(command, RAYLET)
        if name != "its raylet":  # the agents have overwritten the environment by which processes are found
            pid = next(each for each, known in agents_of(pid).items() if known == name)
        os.kill(pid, signal.SIGKILL)
        answer = command.wait(60)
        assert answer.code == 6, answer.err
        assert_one_message(answer, f"error: Ray was lost: {name} (process {pid}) has ended. Finished work is kept")
        assert command.left_behind() == []
    finally:
        command.end()
    assert 12 < len(results_in(longer).records) < 400


def lose(folder: Path, part: str, is_time: Callable[[], bool], *further: str) -> Answer:
    """Launch, and kill a process of Ray at a moment."""
    command = Command(folder, "launch", SWEEP, *further, *WITHOUT_MLFLOW)
    try:
        command.wait_for(is_time)
        os.kill(process_of(command, part), signal.SIGKILL)
        answer = command.wait(60)
        assert command.left_behind() == []
    finally:
        command.end()
    return answer


def supernet_sha256(results: RunResults) -> str:
    return file_sha256(results.run.stage_dir("supernet", results.done_key("supernet")) / "final.safetensors")


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("part", "name"), [(RAYLET, "its raylet"), (GCS, "its GCS")])
def test_a_sweep_that_loses_ray_in_training_and_in_search_ends_like_one_that_does_not(
    finished: Finished, tmp_path: Path, part: str, name: str
) -> None:
    write_sweep(tmp_path)
    run = tmp_path / "runs" / "tiny"
    moments: list[Callable[[], bool]] = [
        lambda: any(run.glob("supernet/*/epoch-00002.json")),
        lambda: num_trials(run) >= 1,
    ]
    for moment in moments:
        answer = lose(tmp_path, part, moment)
        assert answer.code == 6, answer.err
        assert_one_message(answer, f"error: Ray was lost: {name} (process ")
    assert 1 <= num_trials(run) < 12
    command = Command(tmp_path, "launch", SWEEP, *WITHOUT_MLFLOW)
    answer = command.wait()
    assert answer.code == 0, answer.err
    results, whole = results_in(tmp_path), finished.results
    assert supernet_sha256(results) == supernet_sha256(whole)
    assert study_of(results) == study_of(whole)
    assert results.front == whole.front


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_lost_controller_of_ray_train_ends_with_6_and_the_next_launch_trains_on(tmp_path: Path) -> None:
    few = ("--set", "supernet.workers=2", "--set", "ray.num_cpus=2", "--set", "budget.trials=4")
    straight, lost = tmp_path / "straight", tmp_path / "lost"
    for folder in (straight, lost):
        write_sweep(folder)
    answer = lose(lost, "ray::TrainController", lambda: any(lost.glob("runs/tiny/supernet/*/epoch-00002.json")), *few)
    assert answer.code == 6, answer.err
    assert_one_message(answer, "error: Ray was lost: the controller of Ray Train has ended")
    for folder in (straight, lost):
        answer = Command(folder, "launch", SWEEP, *few, *WITHOUT_MLFLOW).wait()
        assert answer.code == 0, answer.err
    assert supernet_sha256(results_in(lost)) == supernet_sha256(results_in(straight))
    assert study_of(results_in(lost)) == study_of(results_in(straight))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_sweep_of_supernets_that_loses_its_raylet_ends_with_6_and_goes_on(tmp_path: Path) -> None:
    straight, lost = tmp_path / "straight", tmp_path / "lost"
    for folder in (straight, lost):
        write_sweep(folder, SUPERNETS)
    members = lost / "runs" / "nets" / "supernets"
    for moment in ("*/supernet/*/epoch-00001.json", "*/search/*/gates/slot-00000.safetensors"):
        answer = lose(lost, RAYLET, lambda moment=moment: any(members.glob(moment)))  # type: ignore[misc]
        assert answer.code == 6, answer.err
        assert_one_message(answer, "error: Ray was lost: its raylet (process ")
    fronts = []
    for folder in (straight, lost):
        answer = Command(folder, "launch", SWEEP, *WITHOUT_MLFLOW).wait()
        assert answer.code == 0, answer.err
        results = results_at(RunDir(folder / "runs", "nets"))
        assert isinstance(results, SupernetSweepResults)
        fronts.append((results.front_gates, {name: study_of(own) for name, own in results.supernets.items()}))
    assert fronts[0] == fronts[1]


def stop(command: Command, number: signal.Signals) -> tuple[Answer, float]:
    """Send a signal as a terminal does; returns the answer and the seconds until the end."""
    began_s = time.monotonic()
    os.killpg(command.process.pid, number)
    command.process.wait(60)
    seconds = time.monotonic() - began_s
    # The process that writes to MLflow ends after its present call, and shares stderr.
    return command.wait(60), seconds


@pytest.fixture
def terminal_can_close() -> Iterator[None]:
    """The tests themselves may run under nohup, and what they start would ignore SIGHUP too."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.long
@pytest.mark.usefixtures("terminal_can_close")
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_search_soon(longer: Path, number: signal.Signals) -> None:
    command = goes_on(longer)
    try:
        command.wait_for(lambda: num_trials(longer / "runs" / "tiny") > 12)
        answer, seconds = stop(command, number)
        assert answer.code == (130 if number is signal.SIGINT else 6), answer.err
        assert seconds < SOON_S
        assert_one_message(answer, "stopped; finished work is kept")
        assert command.left_behind() == []
    finally:
        command.end()


@pytest.mark.long
@pytest.mark.parametrize("part", [RAYLET, GCS, "ray::TrialWorker"])
def test_ctrl_c_is_heard_although_a_process_of_ray_is_stopped(longer: Path, part: str) -> None:
    command = goes_on(longer, "--set", "gate.optimizer.steps=60")
    try:
        command.wait_for(lambda: num_trials(longer / "runs" / "tiny") > 12)
        os.kill(process_of(command, part), signal.SIGSTOP)
        time.sleep(1.0)
        answer, seconds = stop(command, signal.SIGINT)
        assert answer.code == 130, answer.err
        assert seconds < SOON_S
        assert_one_message(answer, "stopped; finished work is kept")
        assert command.left_behind() == []
    finally:
        command.end()


END_TO_END = TINY.replace("  router: gate\n", "  router: gate\n  trainer: end_to_end\n  end_to_end: {epochs: 500}\n")
MOMENTS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "start of Ray": (TINY, (), "manifest.json"),
    "training": (TINY, (), "supernet/*/epoch-00001.json"),
    "training by two": (
        TINY,
        ("--set", "supernet.workers=2", "--set", "ray.num_cpus=2"),
        "supernet/*/epoch-00001.json",
    ),
    "measure": (TINY, ("--set", "measure.repeats=4000"), "measure/*/train_sample.json"),
    "end to end": (END_TO_END, (), "search/*/study.journal"),
    "verify": (TINY, ("--set", "measure.repeats=300"), "verify/*/stage.json"),
    "export": (TINY, ("--set", "export.formats=[bundle,onnx]"), "verify/*/done"),
    "structure": (sweep_text(), (), "structure/*/trace.jsonl"),
    "training of supernets": (SUPERNETS, (), "supernets/*/supernet/*/epoch-00001.json"),
    "search for supernets": (SUPERNETS, (), "supernets/*/search/*/study.journal"),
}
"""Sweep, options, and the file whose appearance is the moment of the stop, by the stage in which it
falls."""


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", list(MOMENTS))
def test_ctrl_c_ends_every_stage_with_130_soon(tmp_path: Path, stage: str) -> None:
    text, further, moment = MOMENTS[stage]
    write_sweep(tmp_path, text)
    command = Command(tmp_path, "launch", SWEEP, *further)
    try:
        command.wait_for(lambda: any((tmp_path / "runs").glob(f"[nt]*/{moment}")))
        time.sleep(0.5)
        answer, seconds = stop(command, signal.SIGINT)
        assert seconds < SOON_S
        if stage == "export" and answer.code == 0:  # it was complete before it could stop
            assert (tmp_path / "runs" / "tiny" / "report.html").is_file()
        else:
            assert answer.code == 130, answer.err
            assert_one_message(answer, "stopped; finished work is kept")
        assert command.left_behind() == []
    finally:
        command.end()
