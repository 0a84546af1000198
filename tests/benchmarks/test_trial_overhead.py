"""The counts of the benchmark of trial overhead, and its sweeps of real gate trials."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.gate_trials import DIGITS, LARGE, Workload
from benchmarks.trial_overhead import (
    EXAMPLE,
    OBJECTIVES,
    SPACE,
    Load,
    Stopwatch,
    Swept,
    Timed,
    by_optuna,
    gate_trials,
    make_sleep,
    sweep_settings,
    timed_asking,
)
from orchestration.config.loading import load_config
from orchestration.pipeline.search import gate_defaults
from search.study import engine
from search.study.engine import Budget, Search
from search.study.runner import SerialRunner
from search.study.study import StudyJournal, StudySettings
from search.suggest.space import parse_space


def test_overhead_is_what_neither_work_nor_asking_explains() -> None:
    timed = Timed(Load(0.2, 20), cold_s=9.0, wall_s=3.0, ask_s=0.5)
    assert timed.overhead_ms(workers=2) == pytest.approx(25.0)
    assert replace(timed, load=Load(0.0, 20)).overhead_ms(workers=1) == pytest.approx(125.0)


def test_a_sweep_lasts_until_mlflow_has_it() -> None:
    swept = Swept("digits", "tpe", 1000, 3, search_s=30.0, recorded_s=50.0, ask_s=9.0, work_s=20.0, driver_cpu_s=9.0)
    assert swept.per_second == 20.0


def test_a_stopwatch_adds_up_its_calls_and_nothing_else() -> None:
    watch = Stopwatch()
    nap = watch.timing(lambda seconds: time.sleep(seconds) or seconds)
    assert [nap(0.02), nap(0.01)] == [0.02, 0.01]
    time.sleep(0.05)
    assert watch.total_s >= 0.03
    before = watch.total_s
    with pytest.raises(ValueError, match="negative"):
        nap(-1)
    assert watch.total_s >= before


def test_the_asking_of_a_search_is_timed_and_its_trials_are_not(tmp_path: Path) -> None:
    mirror = engine.Mirror
    space = parse_space({**SPACE, "work_s": {"choice": [0.03]}})
    settings = StudySettings(name="x", space=space, objectives=OBJECTIVES, cohort=4)
    journal = StudyJournal.open(tmp_path / "study.log", settings)
    with timed_asking() as asking:
        start = time.perf_counter()
        Search(journal=journal, runner=SerialRunner(make_sleep({}))).run(Budget(8))
        wall_s = time.perf_counter() - start
    assert 0 < asking.total_s <= wall_s - 8 * 0.03
    assert engine.Mirror is mirror


def test_plain_optuna_runs_what_it_says() -> None:
    loads = [Load(0.0, 3), Load(0.01, 5)]
    idle, sleeping = by_optuna(loads)
    assert [idle.load, sleeping.load] == loads
    assert idle.cold_s == sleeping.cold_s
    assert sleeping.overhead_ms(workers=1) > 0
    assert sleeping.wall_s >= 5 * 0.01 + sleeping.ask_s


@pytest.mark.slow
@pytest.mark.parametrize("workload", [DIGITS, replace(LARGE, num_images=200)], ids=lambda workload: workload.name)
def test_the_sweeps_are_of_real_gate_trials_over_the_examples_space(workload: Workload, tmp_path: Path) -> None:
    config = load_config(EXAMPLE, overrides=["sampler.name=random", "sampler.cohort=null"]).config
    make, arrays = gate_trials(workload, {**gate_defaults(config), "gate.optimizer.steps": 5})
    settings = sweep_settings(config, len(make.subnets))
    assert (settings.sampler.name, settings.cohort) == ("random", 64)
    journal = StudyJournal.open(tmp_path / "study.log", settings)
    records = Search(journal=journal, runner=SerialRunner(make(arrays))).run(Budget(40)).records
    assert [record.reason for record in records if record.state != "complete"] == [], "failing is quicker than training"
    assert {"top1", "madds_m", "latency_ms", "params_m"} <= set(records[0].metrics)
    assert {record.params["gate.router"] for record in records} == {"gate", "cascade", "learned_cascade"}
