"""Bad input through the real command line: one message that says what is wrong, where, the value
and the way out; and nothing is half-written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.processes import Command
from tests.orchestration.samples import (
    SWEEP,
    TINY,
    WITHOUT_MLFLOW,
    Finished,
    call,
    problems_of_message,
    results_in,
    snapshot,
    write_sweep,
)

REFUSED_SETTINGS = {
    "an unknown key": (["supernet.train.epoch=3"], ["supernet.train.epoch", "did you mean", "epochs"]),
    "a wrong type": (["budget.trials=many"], ["budget.trials", "many", "whole number"]),
    "a range the wrong way round": (
        ["space={gate.target: {uniform: [0.9, 0.05]}}"],
        ["gate.target", "0.9", "0.05"],
    ),
    "a value out of its range": (["gate.target=1.5"], ["gate.target", "1.5", "at most 1"]),
    "a parameter that cannot be swept": (["space={gate.lr: {uniform: [0.1, 0.2]}}"], ["gate.lr", "gate.optimizer.lr"]),
    "an unknown model": (["supernet.model=ds_tinny"], ["ds_tinny", "did you mean 'ds_tiny'", "ds_mbnet"]),
    "an unknown option of the model": (["supernet.options={widht: 0.5}"], ["widht", "width"]),
    "an unknown sampler": (["sampler.name=tpee"], ["sampler.name", "tpee", "random", "nsga2"]),
    "an unknown data set": (["data.name=digit"], ["data.name", "digit", "digits"]),
    "a name with a slash": (["name=a/b"], ["name", "a/b", "letters, digits"]),
    "a name that leaves the folder": (["name=../b"], ["name", "../b"]),
    "start weights that are not there": (["supernet.init_from=no/such"], ["supernet.init_from", "no/such"]),
    "a regime that contradicts itself": (
        ["supernet.regime=ieb", "supernet.bootstrapping.mode=ib"],
        ["supernet.bootstrapping.mode", "contradicts supernet.regime ieb"],
    ),
    "splits larger than the data": (["data.splits.train=5000"], ["5000", "1797"]),
    "two objectives of one kind": (
        ["metrics=[{name: top1, goal: maximize}, {name: top5, goal: maximize}]"],
        ["metrics", "top1", "top5"],
    ),
}


def problems_with_refusal(folder: Path, arguments: list[str], codes: tuple[int, ...], parts: list[str]) -> list[str]:
    """Launch, and list the problems of the refusal."""
    before = snapshot(folder)
    answer = call(folder, *arguments)
    problems = problems_of_message(answer, parts)
    if answer.code not in codes:
        problems.append(f"exit code {answer.code}, expected one of {codes}: {answer.err}")
    if answer.out:
        problems.append(f"stdout: {answer.out}")
    if (changed := snapshot(folder)) != before:
        problems.append(f"half-written: {sorted(changed.keys() ^ before.keys()) or 'changed files'}")
    return problems


@pytest.mark.parametrize(("settings", "parts"), REFUSED_SETTINGS.values(), ids=REFUSED_SETTINGS.keys())
def test_a_bad_setting_is_refused_before_anything_is_written(
    settings: list[str], parts: list[str], tmp_path: Path
) -> None:
    write_sweep(tmp_path)
    arguments = ["launch", SWEEP, *(word for setting in settings for word in ("--set", setting))]
    assert problems_with_refusal(tmp_path, arguments, (2, 3), parts) == []


def test_a_mistake_in_the_file_is_named_with_file_and_line(tmp_path: Path) -> None:
    write_sweep(tmp_path, f"{TINY}bugdet: {{trials: 3}}\n")
    line = TINY.count("\n") + 1
    assert problems_with_refusal(tmp_path, ["launch", SWEEP], (2,), [f"{SWEEP}:{line}", "bugdet", "budget"]) == []


def test_broken_yaml_is_named_with_file_and_line(tmp_path: Path) -> None:
    write_sweep(tmp_path, TINY + "space: {gate.target: [}\n")
    assert problems_with_refusal(tmp_path, ["launch", SWEEP], (2,), [f"{SWEEP}:{TINY.count(chr(10)) + 1}"]) == []


@pytest.mark.parametrize(
    ("arguments", "codes", "parts"),
    [
        (["launch", "other.yaml"], (2, 3, 9), ["other.yaml"]),
        (["launch", SWEEP, "--preset", "smoke"], (2,), ["smoke"]),
        (["launch", SWEEP, "--set", "budget.trials"], (2,), ["budget.trials", "KEY=VALUE"]),
        (["launch", SWEEP, "--frobnicate"], (2,), ["--frobnicate"]),
        (["lanuch", SWEEP], (2,), ["lanuch"]),
        (["status", "nowhere"], (9,), ["nowhere", "runs"]),
        (["pareto", "nowhere"], (9,), ["nowhere"]),
        (["trials", "nowhere"], (9,), ["nowhere"]),
        (["export", "nowhere"], (9,), ["nowhere"]),
        (["report", "nowhere"], (9,), ["nowhere"]),
        (["sync", "nowhere"], (9,), ["nowhere"]),
        (["verify", "nowhere"], (9,), ["nowhere", "dsnet-orch export"]),
        (["ui", "--runs", "nowhere"], (9,), ["nowhere", "--runs"]),
        (["ui", "nowhere"], (9,), ["nowhere", "runs"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_a_thing_that_does_not_exist_is_named(
    arguments: list[str], codes: tuple[int, ...], parts: list[str], tmp_path: Path
) -> None:
    write_sweep(tmp_path)
    assert problems_with_refusal(tmp_path, arguments, codes, parts) == []


def test_a_missing_data_folder_is_named_with_the_way_out(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    arguments = ["launch", SWEEP, "--set", "data.name=cifar10", "--data", "no/such/folder"]
    assert problems_with_refusal(tmp_path, arguments, (3,), ["no/such/folder", "data.path"]) == []


def test_a_corrupt_data_file_is_named(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    folder = tmp_path / "cifar"
    folder.mkdir()
    for name in ("train.parquet", "test.parquet"):
        (folder / name).write_bytes(b"PAR1 and then nothing that makes sense")
    arguments = ["launch", SWEEP, "--set", "data.name=cifar10", "--data", str(folder)]
    assert problems_with_refusal(tmp_path, arguments, (3,), ["train.parquet"]) == []


def test_an_image_that_is_none_is_named(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        (tmp_path / "pets" / name / "one.png").write_bytes(b"no image")
    settings = ["--set", "data.name=image_folder", "--set", "data.image_size=16", "--data", "pets"]
    assert problems_with_refusal(tmp_path, ["launch", SWEEP, *settings], (3,), ["one.png"]) == []


@pytest.mark.parametrize("runs", ["a_file", "a_file/below", "/proc/nothing/here"])
def test_a_runs_folder_that_cannot_be_written_is_named(runs: str, tmp_path: Path) -> None:
    write_sweep(tmp_path)
    (tmp_path / "a_file").write_text("not a folder")
    arguments = ["launch", SWEEP, "--runs", runs]
    assert problems_with_refusal(tmp_path, arguments, (3,), ["storage.runs", runs, "--set storage.runs="]) == []


def test_a_runs_folder_in_which_no_mlflow_store_can_lie_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    arguments = ["launch", SWEEP, "--runs", "100%"]
    assert problems_with_refusal(tmp_path, arguments, (3,), ["100%", "tracking.mlflow"]) == []


def test_a_device_that_is_not_there_is_named(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    write_sweep(tmp_path)
    arguments = ["launch", SWEEP, "--set", "supernet.device=cuda"]
    assert problems_with_refusal(tmp_path, arguments, (3,), ["cuda", "cpu or auto"]) == []


@pytest.mark.slow
def test_a_refusal_in_a_process_of_its_own_looks_the_same(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    answer = Command(tmp_path, "launch", SWEEP, "--set", "sampler.name=tpee").wait()
    assert answer.code == 2
    assert problems_of_message(answer, ["tpee"]) == []


# A finished run, damaged. Its supernet is read by every launch.


def test_a_truncated_final_checkpoint_is_noticed_by_whoever_reads_it(finished: Finished, tmp_path: Path) -> None:
    folder = finished.copy(tmp_path)
    results = results_in(folder)
    path = results.run.stage_dir("supernet", results.done_key("supernet")) / "final.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    plan = call(folder, "plan", SWEEP, "--dry", "--json").json
    assert next(stage for stage in plan["stages"] if stage["stage"] == "supernet")["status"] == "resume"
    answer = call(folder, "export", "tiny")
    assert answer.code == 3
    assert problems_of_message(answer, ["final.safetensors", "launch the sweep again"]) == []


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_checkpoint_with_one_other_byte_is_refused_by_its_hash_and_made_again(
    finished: Finished, tmp_path: Path
) -> None:
    folder = finished.copy(tmp_path)
    results = results_in(folder)
    path = results.run.stage_dir("supernet", results.done_key("supernet")) / "final.safetensors"
    whole = path.read_bytes()
    content = bytearray(whole)
    content[-1] ^= 1
    path.write_bytes(content)
    answer = call(folder, "export", "tiny")
    assert answer.code == 3
    assert problems_of_message(answer, ["final.safetensors", "SHA-256"]) == []
    answer = call(folder, "launch", SWEEP, *WITHOUT_MLFLOW)
    assert answer.code == 0, answer.err
    assert "final.safetensors.damaged-1" in answer.err
    assert path.read_bytes() == whole
    assert path.with_name("final.safetensors.damaged-1").read_bytes() == content


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_corrupt_epoch_checkpoint_is_refused_and_named_when_training_would_continue_from_it(
    finished: Finished, tmp_path: Path
) -> None:
    folder = finished.copy(tmp_path)
    results = results_in(folder)
    stage = results.run.stage_dir("supernet", results.done_key("supernet"))
    for name in ("done", "final.json", "final.safetensors"):
        (stage / name).unlink()
    path = stage / "epoch-00008.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    answer = call(folder, "launch", SWEEP, *WITHOUT_MLFLOW)
    assert answer.code == 3
    assert problems_of_message(answer, ["epoch-00008.safetensors", "SHA-256"]) == []


def test_a_torn_manifest_and_a_damaged_gate_are_named(finished: Finished, tmp_path: Path) -> None:
    folder = finished.copy(tmp_path)
    results = results_in(folder)
    gate = results.run.gate_weights(results.done_key("search"), results.front[0])
    gate.write_bytes(gate.read_bytes()[:40])
    answer = call(folder, "export", "tiny", "--pick", "all")
    assert answer.code == 3
    assert problems_of_message(answer, [gate.name, "launch the sweep again"]) == []
    gate.unlink()
    answer = call(folder, "export", "tiny", "--pick", "all")
    assert answer.code == 3
    assert problems_of_message(answer, [gate.name, "missing"]) == []
    manifest = results.run.manifest_path
    manifest.write_text(manifest.read_text()[:100])
    for arguments in (["status", "tiny"], ["launch", SWEEP, *WITHOUT_MLFLOW]):
        answer = call(folder, *arguments)
        assert answer.code == 3
        assert problems_of_message(answer, ["manifest.json", "torn"]) == []


def test_a_study_that_is_no_journal_is_named(finished: Finished, tmp_path: Path) -> None:
    folder = finished.copy(tmp_path)
    results = results_in(folder)
    journal = results.run.study_journal(results.done_key("search"))
    size = journal.stat().st_size
    journal.write_bytes((b"no record\n" * size)[:size])
    answer = call(folder, "trials", "tiny")
    assert answer.code == 3
    assert problems_of_message(answer, ["study.journal", "journal"]) == []


@contextmanager
def another_driver(runs: Path) -> Iterator[int]:
    """A second process that holds the lock of run `tiny`; yields its pid."""
    code = (
        "import sys; from pathlib import Path; from orchestration.runs.folder import RunDir\n"
        "from orchestration.runs.lock import DriverLock\n"
        "with DriverLock(RunDir(Path(sys.argv[1]), 'tiny'), 'dsnet-orch launch elsewhere.yaml'):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(runs)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process.pid
    finally:
        process.communicate()


def test_a_run_that_another_process_drives_is_refused_to_launch_and_sync_and_can_be_looked_at(
    finished: Finished, tmp_path: Path
) -> None:
    folder = finished.copy(tmp_path)
    with another_driver(folder / "runs") as pid:
        before = snapshot(folder)
        for arguments in (["launch", SWEEP], ["sync", "tiny"]):
            answer = call(folder, *arguments)
            assert answer.code == 8
            assert problems_of_message(answer, ["tiny", str(pid), "elsewhere.yaml", "kill -TERM"]) == []
        assert snapshot(folder) == before
        assert str(pid) in call(folder, "status", "tiny").out
    assert call(folder, "sync", "tiny").code == 0


# Trials and training that fail.


DIVERGING = ("--set", "gate.optimizer.name=sgd", "--set", "gate.losses.quality=1.0")
"""With a large learning rate; Adam's steps stay finite."""


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_trials_that_diverge_fail_with_a_reason_and_the_sweep_goes_on(finished: Finished, tmp_path: Path) -> None:
    folder = finished.copy(tmp_path)
    space = "space={gate.target: {uniform: [0.05, 0.9]}, gate.optimizer.lr: {choice: [0.05, 1.0e6]}}"
    settings = ["--set", space, "--set", "sampler.name=random", *DIVERGING, *WITHOUT_MLFLOW]
    answer = call(folder, "launch", SWEEP, *settings, "--set", "budget.max_failed=0.9")
    assert answer.code == 0, answer.err
    results = results_in(folder)
    failed = [record for record in results.records if record.state == "failed"]
    assert len(results.records) == 12
    assert 0 < len(failed) < 12
    assert {record.params["gate.optimizer.lr"] for record in failed} == {1.0e6}
    assert all("gate.optimizer.lr" in (record.reason or "") for record in failed)
    assert f"{len(failed)} failed" in answer.err
    listed = call(folder, "trials", "tiny", "--json").json
    assert [item["state"] for item in listed] == [record.state for record in results.records]
    assert "failed" in call(folder, "trials", "tiny").out

    answer = call(folder, "launch", SWEEP, *settings, "--set", "budget.max_failed=0.01")
    assert answer.code == 4
    assert problems_of_message(answer, [f"{len(failed)} of 12", "budget.max_failed", "gate.optimizer.lr"]) == []
    assert "gates on the front" in answer.out


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_sweep_in_which_every_trial_fails_says_why_and_never_opens_the_test_split(
    finished: Finished, tmp_path: Path
) -> None:
    folder = finished.copy(tmp_path)
    settings = ["--set", "space={gate.optimizer.lr: 1.0e6}", "--trials", "3", *DIVERGING, *WITHOUT_MLFLOW]
    answer = call(folder, "launch", SWEEP, *settings)
    assert answer.code == 5
    assert problems_of_message(answer, ["none of 3 trials", "gate.optimizer.lr"]) == []
    assert results_in(folder).manifest["test_openings"] == 1  # the one of the sweep that was copied


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_supernet_that_diverges_names_the_step_and_the_subnet(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    answer = call(tmp_path, "launch", SWEEP, "--set", "supernet.train.lr=1.0e6", *WITHOUT_MLFLOW)
    assert answer.code == 5
    assert problems_of_message(answer, ["the loss of ", "at step", "supernet.train.lr"]) == []
    status = json.loads(call(tmp_path, "status", "tiny", "--json").out)
    assert status["stages"]["supernet"]["status"] == "stopped"
    assert status["driver"] is None
