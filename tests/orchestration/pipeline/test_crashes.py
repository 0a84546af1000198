"""Sweeps whose processes are killed at random moments end like one that nobody disturbed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmarks.crash_test import VICTIMS, Contents, Difference, Outcome, Whole, crash
from tests.orchestration.samples import TINY, Finished

pytestmark = [pytest.mark.ray, pytest.mark.timeout(3600)]
LAUNCH_S = 22.0
"""An unhurried launch takes about this long: kills fall on every stage."""
NUM_KILLS = 20


def whole(finished: Finished) -> Whole:
    return Whole(TINY, finished.run, LAUNCH_S, {"supernet": 1.0})


def assert_equal(outcome: Outcome) -> None:
    assert [outcome.count(what) for what in ("lost", "duplicated", "changed")] == [0, 0, 0], outcome


def test_a_sweep_whose_workers_writer_and_cluster_are_killed_ends_like_one_that_nobody_disturbed(
    finished: Finished, tmp_path: Path
) -> None:
    others = [victim for victim in VICTIMS if victim.name != "driver"]  # its kill is tested with each resume
    outcome = crash(tmp_path, whole(finished), 2, random.Random(0), others)
    assert len(outcome.kills) == 2
    assert_equal(outcome)


@pytest.mark.long
def test_twenty_kills_lose_duplicate_and_change_nothing(finished: Finished, tmp_path: Path) -> None:
    assert_equal(crash(tmp_path, whole(finished), NUM_KILLS, random.Random(0)))


def test_what_is_lost_stored_twice_or_changed_is_counted(finished: Finished) -> None:
    right = Contents.of(finished.run)
    assert right.duplicates == ()
    names = sorted(right.values)
    for part in ("final.safetensors", "trial 0", "front", "verified", "curves.jsonl", "mlflow"):
        assert any(part in name for name in names), part
    own = Contents({name: right.values[name] for name in names[1:]} | {names[1]: "another", "new": 1}, (names[2],))
    assert Difference.between(own, right) == Difference((names[0],), (names[2],), tuple(sorted([names[1], "new"])))
