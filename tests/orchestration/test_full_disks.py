"""Real disks that are full: a launch with Ray and MLflow, MLflow's database, and stdout."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from benchmarks.processes import PROGRAM, Command
from dsnet.files import file_sha256
from tests.hostile import REPOSITORY
from tests.mounts import fill, resize, small_disk
from tests.orchestration.launch_here import SMALL, launch_without_ray
from tests.orchestration.samples import (
    HOME,
    SWEEP,
    WITHOUT_MLFLOW,
    Finished,
    call,
    problems_of_message,
    results_in,
    study_of,
    write_sweep,
)


@pytest.mark.slow
@pytest.mark.ray
def test_stdout_on_a_full_disk_is_said(finished: Finished) -> None:
    for arguments in (("trials", "tiny", "--json"), ("pareto", "tiny"), ("schema",)):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [*PROGRAM, *arguments],
                cwd=finished.folder,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
        assert done.returncode == 3, (arguments, done)
        assert "cannot write /dev/stdout: the disk is full" in done.stderr
        assert "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr


@pytest.mark.slow
def test_the_loss_of_mlflows_database_does_not_end_a_sweep_and_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch_without_ray(monkeypatch)
    write_sweep(tmp_path, SMALL.replace("tracking: {mlflow: false}\n", ""))
    with small_disk(tmp_path / "d", "1m") as disk:
        fill(disk)
        answer = call(tmp_path, "launch", SWEEP, "--set", f"tracking.uri=sqlite:///{disk}/mlflow.db")
    assert answer.code == 0, answer.err
    assert "MLflow" in answer.err
    assert "cannot be written" in answer.err
    assert "dsnet-orch sync" in answer.err
    assert "Traceback" not in answer.err
    assert results_in(tmp_path).verified is not None


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_launches_on_a_disk_that_grows_end_as_on_a_large_one(finished: Finished, tmp_path: Path) -> None:
    write_sweep(tmp_path)
    options = (*WITHOUT_MLFLOW, "--set", "storage.min_free_mib=0", "--runs", "d/runs")
    with small_disk(tmp_path / "d", "8k") as disk:
        codes = []
        for size in ("8k", "64k", "256k", "700k", "1200k", "2m", "4m", "7m", "64m"):
            resize(disk, size)
            command = Command(tmp_path, "launch", SWEEP, *options)
            try:
                answer = command.wait()
                assert command.left_behind() == []
            finally:
                command.end()
            codes.append(answer.code)
            if answer.code == 0:
                break
            assert problems_of_message(answer, ("the disk is full", "No space left on device", "/d/")) == [], (
                size,
                answer.err,
            )
        print(f"\nexit codes {codes}")  # noqa: T201 - what the long run reports
        assert set(codes[:-1]) <= {3, 6}, "3 where nothing had begun yet"
        assert 6 in codes
        assert codes[-1] == 0
        own, whole = results_in(tmp_path / "d"), finished.results
        assert study_of(own) == study_of(whole)
        final = [
            each.run.stage_dir("supernet", each.done_key("supernet")) / "final.safetensors" for each in (own, whole)
        ]
        assert file_sha256(final[0]) == file_sha256(final[1])
        assert own.verified is not None
        assert whole.verified is not None
        assert own.verified.test == whole.verified.test


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_full_disk_of_ray_stops_the_launch_before_it_starts_ray(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    write_sweep(tmp_path)
    with small_disk(tmp_path_factory.mktemp("r") / "d", "300m") as disk:
        fill(disk, leave=20 * 2**20)
        for reserve, told in (("256", "storage.min_free_mib asks for 256 MiB"), ("0", "it needs 32 MiB for sockets")):
            options = (*WITHOUT_MLFLOW, "--set", f"storage.min_free_mib={reserve}")
            command = Command(tmp_path, "launch", SWEEP, *options, variables={"RAY_TMPDIR": str(disk)})
            try:
                answer = command.wait(120)
            finally:
                command.end()
            assert answer.code == 3
            assert problems_of_message(answer, (f"{disk}/ray", "MiB free", told, "RAY_TMPDIR")) == []


@pytest.mark.ray
def test_a_whole_sweep_writes_nothing_to_the_home_folder(finished: Finished) -> None:
    """Ray's token, matplotlib's fonts, torch's and MLflow's files are elsewhere, or not made."""
    home = finished.folder / HOME
    assert finished.answer.code == 0
    assert home.is_dir()
    assert list(home.rglob("*")) == []
