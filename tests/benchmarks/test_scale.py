"""The simulated workers of the benchmark of large sweeps: bounds that any schedule keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.scale import Plan, Simulated, SimulatedWorkers, simulate
from search.study.runner import TrialSpec

PLAN = Plan("a plan", trials=60, workers=10, cohort=20, trial_s=600.0)


def course(folder: Path, plan: Plan) -> Simulated:
    folder.mkdir()
    return simulate(plan, 0, folder)


def test_no_sweep_is_faster_than_its_work_or_its_longest_chain(tmp_path: Path) -> None:
    found = course(tmp_path / "a", PLAN)
    assert found.ideal_hours <= found.hours
    assert found.busy_share == pytest.approx(found.ideal_hours / found.hours, rel=1e-6)
    assert found.ideal_hours == pytest.approx(60 * 600 / 10 / 3600, rel=0.2)
    single = course(tmp_path / "b", replace(PLAN, cohort=1))
    assert single.busy_share <= 0.1, "one trial at a time keeps one of ten workers busy"
    assert single.limit.startswith("the cohort")


def test_more_trials_at_a_time_waste_less(tmp_path: Path) -> None:
    shares = [
        course(tmp_path / name, replace(PLAN, **changes)).busy_share
        for name, changes in (
            ("few", {"cohort": 5}),
            ("as many as workers", {"cohort": 10}),
            ("many", {"cohort": 60}),
        )
    ]
    assert shares == sorted(shares)
    free = course(tmp_path / "free", replace(PLAN, cohort=10, order="asynchronous"))
    assert free.busy_share > shares[1]


def test_short_trials_are_limited_by_the_driver(tmp_path: Path) -> None:
    found = course(tmp_path / "short", replace(PLAN, trial_s=0.001, cohort=60))
    assert found.limit.startswith("the driver")
    assert found.driver_share > 0.3


@pytest.mark.parametrize("lanes", [1, 4])
def test_every_trial_is_answered_once_and_workers_never_do_two_things(lanes: int) -> None:
    workers = SimulatedWorkers(replace(PLAN, lanes=lanes), 0)
    specs = [TrialSpec(slot, slot, {"gate.target": 0.5}) for slot in range(33)]
    assert sorted(outcome.slot for outcome in workers.run(specs)) == list(range(33))
    assert workers.busy_s <= 10 * workers.now_s
    left = list(specs)
    assert sorted(outcome.slot for outcome in workers.stream(lambda: [left.pop() for _ in left[:2]])) == list(range(33))
