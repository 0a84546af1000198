"""Many kills at random moments: run by `make test-long` only."""

from __future__ import annotations

import random
import signal
import subprocess
from pathlib import Path

import pytest

from dsnet.files import file_sha256
from tests.orchestration.samples import SWEEP, Command, Finished, results_in, study_of, write_sweep

pytestmark = [pytest.mark.long, pytest.mark.ray, pytest.mark.timeout(1800)]
NUM_KILLS = 20
LONGEST_S = 22.0
"""An unhurried launch takes about this long: kills fall on every stage."""


def launch_or_kill(folder: Path, after_s: float) -> bool:
    """Launch, and kill the driver after a while; True where it had ended well before that."""
    command = Command(folder, "launch", SWEEP)
    try:
        assert command.process.wait(timeout=after_s) == 0, command.process.communicate()
    except subprocess.TimeoutExpired:
        command.process.send_signal(signal.SIGKILL)
        return False
    finally:
        command.end()
    return True


def test_sweeps_killed_twenty_times_in_all_end_like_one_that_was_not(finished: Finished, tmp_path: Path) -> None:
    moments = random.Random(0)
    whole, num_kills, num_sweeps = finished.results, 0, 0
    final = whole.run.stage_dir("supernet", whole.done_key("supernet")) / "final.safetensors"
    while num_kills < NUM_KILLS:
        folder = tmp_path / f"sweep-{num_sweeps}"
        write_sweep(folder)
        num_sweeps += 1
        while not launch_or_kill(folder, moments.uniform(2.0, LONGEST_S)):
            num_kills += 1
        results = results_in(folder)
        own = results.run.stage_dir("supernet", results.done_key("supernet")) / "final.safetensors"
        assert file_sha256(own) == file_sha256(final)
        assert study_of(results) == study_of(whole)
        assert results.verified is not None
        assert whole.verified is not None
        assert results.verified.test == whole.verified.test
    print(f"\n{num_kills} kills in {num_sweeps} sweeps")  # noqa: T201 - what the long run reports
