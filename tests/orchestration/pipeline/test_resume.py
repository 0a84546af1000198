"""Interrupting a sweep loses nothing: by Ctrl-C, `kill -9` or a stop file, it ends as if it had not
been interrupted. For SIGTERM see the sweep of supernets."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.processes import Answer, Command
from dsnet.files import file_sha256
from tests.orchestration.samples import SWEEP, WITHOUT_MLFLOW, Finished, call, results_in, study_of, write_sweep

pytestmark = pytest.mark.ray
SEARCH_JOURNAL = "search/*/study.journal"
HEADER_LINES = 3
"""Records of a study before its first trial."""


def num_trials(run: Path) -> int:
    """Whole trial records on disk, read as bytes: it must not slow the driver down."""
    lines = sum(path.read_bytes().count(b"\n") for path in run.glob(SEARCH_JOURNAL))
    return max(0, lines - HEADER_LINES)


@contextmanager
def launched(folder: Path, *further: str) -> Iterator[Command]:
    command = Command(folder, "launch", SWEEP, "--set", "ray.trial_actors=2", *further)
    try:
        yield command
    finally:
        command.end()


def interrupt_training(folder: Path) -> Answer:
    with launched(folder) as command:
        command.wait_for(lambda: any(folder.glob("runs/tiny/supernet/*/epoch-00001.json")))
        command.interrupt()
        answer = command.wait()
        assert command.left_behind() == []
    return answer


def kill_search(folder: Path, trials: int) -> Answer:
    with launched(folder, *WITHOUT_MLFLOW) as command:
        command.wait_for(lambda: num_trials(folder / "runs" / "tiny") >= trials)
        command.process.send_signal(signal.SIGKILL)
        answer = command.wait()
        # Ray's own agents look for their lost parent for up to a minute; everything else is gone at
        # once.
        left = command.left_behind(patience_s=3.0)
        assert [name for name in left if "Agent" not in name] == []
    return answer


def test_a_sweep_stopped_by_ctrl_c_and_kill_9_ends_like_an_uninterrupted_one_with_fewer_actors(
    finished: Finished, tmp_path: Path
) -> None:
    write_sweep(tmp_path)
    run = tmp_path / "runs" / "tiny"

    answer = interrupt_training(tmp_path)
    assert answer.code == 130, answer.err
    assert f"dsnet-orch launch {SWEEP}" in answer.err
    assert "Traceback" not in answer.err
    assert any(run.glob("supernet/*/epoch-*.json"))
    assert not any(run.glob("supernet/*/final.safetensors"))
    assert not (run / "driver.lock").exists()
    half = call(tmp_path, "status", "tiny", "--json").json
    assert half["stages"]["supernet"]["status"] == "stopped"
    assert half["trials"] == {"completed": 0, "infeasible": 0, "pruned": 0, "failed": 0, "enqueued": 0, "budget": 12}
    assert half["driver"] is None

    answer = kill_search(tmp_path, 1)
    assert answer.code == -signal.SIGKILL
    done = num_trials(run)
    assert 1 <= done < 12
    half = call(tmp_path, "status", "tiny", "--json").json
    assert half["trials"]["completed"] == done
    assert half["stages"]["search"]["status"] == "stopped"
    assert not half["is_verified"]
    assert (run / "driver.lock").exists()
    assert "which no longer runs" in call(tmp_path, "status", "tiny").out

    answer = call(tmp_path, "launch", SWEEP, "--set", "ray.trial_actors=2", *WITHOUT_MLFLOW)
    assert answer.code == 0, answer.err
    assert "continuing the run of" in answer.err
    results, whole = results_in(tmp_path), finished.results
    supernets = [item.run.stage_dir("supernet", item.done_key("supernet")) for item in (results, whole)]
    assert file_sha256(supernets[0] / "final.safetensors") == file_sha256(supernets[1] / "final.safetensors")
    assert study_of(results) == study_of(whole)
    assert results.front == whole.front
    assert results.verified is not None
    assert whole.verified is not None
    assert (results.verified.val, results.verified.test) == (whole.verified.val, whole.verified.test)
    assert results.manifest["test_openings"] == 1


@pytest.mark.usefixtures("ray_cluster")
def test_a_stop_file_ends_the_search_at_a_trial_boundary_and_the_next_launch_forgets_it(
    finished: Finished, tmp_path: Path
) -> None:
    folder = finished.copy(tmp_path)
    run = folder / "runs" / "tiny"

    def stop_soon() -> None:
        deadline = time.monotonic() + 60
        while num_trials(run) < 13 and time.monotonic() < deadline:
            time.sleep(0.002)
        (run / "stop").touch()

    thread = threading.Thread(target=stop_soon)
    thread.start()
    answer = call(folder, "launch", SWEEP, "--trials", "60", *WITHOUT_MLFLOW)
    thread.join()
    assert answer.code == 6, answer.err
    stopped = results_in(folder)
    assert 13 <= len(stopped.records) < 60
    assert stopped.records[:12] == finished.results.records
    again = call(folder, "launch", SWEEP, "--trials", str(len(stopped.records) + 1), *WITHOUT_MLFLOW)
    assert again.code == 0, again.err
    assert results_in(folder).records[:-1] == stopped.records
