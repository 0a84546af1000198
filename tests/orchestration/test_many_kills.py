"""Many kills at random moments: run by `make test-long` only."""

from __future__ import annotations

import random
import signal
import subprocess
from pathlib import Path

import pytest

from dsnet.files import file_sha256
from tests.orchestration.samples import SWEEP, Command, Finished, call, results_in, study_of, write_sweep

pytestmark = [pytest.mark.long, pytest.mark.ray, pytest.mark.timeout(1800)]
NUM_KILLS = 20
LONGEST_S = 25.0
"""A launch that is not killed takes about this long: kills fall on every stage."""


def test_a_sweep_killed_twenty_times_at_random_ends_like_one_that_was_not(finished: Finished, tmp_path: Path) -> None:
    write_sweep(tmp_path)
    moments = random.Random(0)
    for _ in range(NUM_KILLS):
        command = Command(tmp_path, "launch", SWEEP)
        try:
            code = command.process.wait(timeout=moments.uniform(2.0, LONGEST_S))
            assert code == 0, command.process.communicate()
        except subprocess.TimeoutExpired:
            command.process.send_signal(signal.SIGKILL)
        finally:
            command.end()
    answer = call(tmp_path, "launch", SWEEP)
    assert answer.code == 0, answer.err
    results, whole = results_in(tmp_path), finished.results
    supernets = [item.run.stage_dir("supernet", item.done_key("supernet")) for item in (results, whole)]
    assert file_sha256(supernets[0] / "final.safetensors") == file_sha256(supernets[1] / "final.safetensors")
    assert study_of(results) == study_of(whole)
    assert results.verified is not None
    assert whole.verified is not None
    assert results.verified.test == whole.verified.test
