"""The search loop makes the same study after any interruption, and loses no trial."""

from __future__ import annotations

import json
import math
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsnet.errors import ConfigError
from search.conditions.constraints import ConstraintSet
from search.front.pareto import hypervolume
from search.study.engine import Budget, Search
from search.study.journal_chain import _whole_lines, _write_chain, running_hashes
from search.study.runner import OneByOne, SerialRunner, TrialFunction, TrialOutcome, TrialSpec, outcome_from
from search.study.stopping import Plateau, StopRules
from search.study.study import StudyJournal, TrialRecord, load_records
from search.suggest.samplers import KNOWN_SAMPLERS, SamplerSettings
from search.suggest.space import parse_space
from tests.search.study.samples import (
    POINT,
    SLACK,
    SPACE,
    TRIALS_IN_KILLS,
    comparison,
    essence,
    sampler_settings,
    sometimes_broken,
    study_settings,
    sweep,
    trade_off,
)

COARSE: dict[str, Any] = {
    "gate.target": {"step": [0.0, 1.0, 0.25]},
    "gate.optimizer.lr": 0.01,
    "gate.routing.first": {"int": [0, 3]},
    "gate.sgs.strategy": {"choice": ["try_best", "give_up"]},
}


class ThreadedRunner:
    """Runs trials on threads and yields them as they come, in an order that changes from run to
    run."""

    def __init__(self, function: TrialFunction, num_workers: int) -> None:
        self._function = function
        self._num_workers = num_workers

    def run(self, specs: Sequence[TrialSpec]) -> Generator[TrialOutcome, None, None]:
        todo: queue.SimpleQueue[TrialSpec] = queue.SimpleQueue()
        done: queue.SimpleQueue[TrialOutcome] = queue.SimpleQueue()
        for spec in random.Random().sample(list(specs), len(specs)):
            todo.put(spec)

        def work() -> None:
            while not todo.empty():
                try:
                    spec = todo.get_nowait()
                except queue.Empty:
                    return
                time.sleep(random.random() * 0.002)
                done.put(outcome_from(self._function, spec))

        threads = [threading.Thread(target=work) for _ in range(self._num_workers)]
        for thread in threads:
            thread.start()
        for _ in specs:
            yield done.get()
        for thread in threads:
            thread.join()

    def stream(self, take: Callable[[], Sequence[TrialSpec]]) -> Generator[TrialOutcome, None, None]:
        """Keeps all workers busy, and ends a trial of a random one at a time."""
        running: list[TrialSpec] = []
        while True:
            while len(running) < self._num_workers and (specs := take()):
                running.extend(specs)
            if not running:
                return
            yield outcome_from(self._function, running.pop(random.randrange(len(running))))

    def close(self) -> None:
        pass


class ListRunner:
    """Returns given outcomes, whatever trials it is given."""

    def __init__(self, outcomes: Sequence[TrialOutcome]) -> None:
        self._outcomes = outcomes

    def run(self, specs: Sequence[TrialSpec]) -> Generator[TrialOutcome, None, None]:
        yield from self._outcomes

    def stream(self, take: Callable[[], Sequence[TrialSpec]]) -> Generator[TrialOutcome, None, None]:
        while take():
            yield from self._outcomes

    def close(self) -> None:
        pass


@dataclass
class Notebook:
    """An observer that records trials, and requests a stop after a number of them."""

    stop_after: float = math.inf
    records: list[TrialRecord] = field(default_factory=list)

    def on_trial(self, record: TrialRecord) -> None:
        self.records.append(record)

    def is_full(self) -> bool:
        return len(self.records) >= self.stop_after


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [name for name in KNOWN_SAMPLERS if name != "gp"])
@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_the_number_of_workers_changes_nothing(tmp_path: Path, sampler: str, num_workers: int) -> None:
    settings = study_settings(sampler)
    alone = sweep(tmp_path / "alone", settings=settings)
    crowd = sweep(tmp_path / "crowd", settings=settings, runner=ThreadedRunner(sometimes_broken, num_workers))
    assert essence(crowd) == essence(alone)
    assert [record.slot for record in alone] == list(range(20))


@pytest.mark.slow
def test_the_number_of_workers_changes_nothing_for_the_slow_sampler_either(tmp_path: Path) -> None:
    settings = study_settings("gp")
    alone = sweep(tmp_path / "alone", 11, settings=settings)
    assert essence(
        sweep(tmp_path / "crowd", 11, settings=settings, runner=ThreadedRunner(sometimes_broken, 2))
    ) == essence(alone)


@dataclass(frozen=True)
class ManyAtOnce:
    """`sometimes_broken` in batches."""

    lanes: int

    def __call__(self, specs: Sequence[TrialSpec]) -> list[TrialOutcome]:
        assert 1 <= len(specs) <= self.lanes
        return [outcome_from(sometimes_broken, spec) for spec in reversed(specs)]


@pytest.mark.slow
@pytest.mark.parametrize("lanes", [2, 3, 8, 20])
def test_the_number_of_lanes_changes_nothing(tmp_path: Path, lanes: int) -> None:
    alone = sweep(tmp_path / "alone")
    assert essence(sweep(tmp_path / "batches", runner=SerialRunner(ManyAtOnce(lanes)))) == essence(alone)


# 40 trials in cohorts of 8: generations of 6 begin anew with each cohort, generations of 12 span
# two, so that a resume falls into the middle of one.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "startup"),
    [
        *((name, 6) for name in KNOWN_SAMPLERS if name != "gp"),
        ("nsga2", 12),
        ("nsga3", 12),
        ("optuna.samplers.TPESampler", 6),
        ("optuna.samplers.NSGAIIISampler", 6),
    ],
)
def test_a_sweep_stopped_after_any_number_of_trials_resumes_to_the_same_study(
    tmp_path: Path, sampler: str, startup: int
) -> None:
    settings = study_settings(sampler_settings(sampler, startup))
    whole = sweep(tmp_path / "whole", 40, settings=settings, constraints=SLACK)
    for pace in (3, 11):
        path = tmp_path / f"pieces-{pace}"
        told: list[TrialRecord] = []
        while len(told) < 40:
            notebook = Notebook(stop_after=pace)
            pieces = sweep(
                path, 40, settings=settings, constraints=SLACK, observer=notebook, should_stop=notebook.is_full
            )
            told += notebook.records
        assert essence(pieces) == essence(whole)
        assert essence(told) == essence(whole)


def test_another_seed_makes_another_sweep(tmp_path: Path) -> None:
    params = [
        [record.params for record in sweep(tmp_path / str(seed), 8, settings=study_settings(seed=seed))]
        for seed in (0, 1)
    ]
    assert params[0] != params[1]


def test_a_sweep_extended_later_equals_one_that_was_long_from_the_start(tmp_path: Path) -> None:
    whole = sweep(tmp_path / "whole", 27)
    for trials in (5, 13, 27):
        extended = sweep(tmp_path / "extended", trials)
        assert essence(extended) == essence(whole[:trials])


def test_tpe_learns_from_earlier_cohorts(tmp_path: Path) -> None:
    def suggested(name: str, function: TrialFunction) -> list[Any]:
        return [record.params for record in sweep(tmp_path / name, 24, function=function)]

    def opposite(spec: TrialSpec) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        metrics, arrays = trade_off(spec)
        return {name: -value for name, value in metrics.items()}, arrays

    straight, reversed_ = suggested("straight", trade_off), suggested("reversed", opposite)
    assert straight[:8] == reversed_[:8]
    assert straight[8:] != reversed_[8:]


def test_a_failed_trial_keeps_its_slot_and_says_why(tmp_path: Path) -> None:
    records = sweep(tmp_path / "study", 9)
    failed = [record for record in records if record.state == "failed"]
    assert [record.slot for record in failed] == [3, 8]
    assert {record.reason for record in failed} == {"ValueError: the gate collapsed"}
    assert all(record.values is None and not record.metrics for record in failed)


@pytest.mark.parametrize(
    ("metrics", "reason"),
    [
        ({"top1": math.nan, "madds_m": 1.0}, "top1 is nan"),
        ({"top1": 0.5, "madds_m": math.inf}, "madds_m is inf"),
        ({"top1": 0.5, "ce": 1.0}, "madds_m is missing; the trial returned ce, top1"),
        ({}, "top1 is missing; the trial returned nothing"),
    ],
)
def test_a_trial_without_finite_objectives_fails_and_the_metric_is_named(
    tmp_path: Path, metrics: dict[str, float], reason: str
) -> None:
    records = sweep(tmp_path / "study", 3, function=lambda spec: (metrics, {}))
    assert [(record.state, record.reason, record.values) for record in records] == [("failed", reason, None)] * 3


def test_a_metric_that_is_no_objective_may_be_nan(tmp_path: Path) -> None:
    records = sweep(tmp_path / "study", 1, function=lambda spec: ({"top1": 1, "madds_m": 2, "ce": math.nan}, {}))
    assert records[0].state == "complete"
    assert math.isnan(records[0].metrics["ce"])


def test_a_constraint_that_cannot_be_computed_fails_the_trial(tmp_path: Path) -> None:
    def without_clock(spec: TrialSpec) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        metrics, arrays = trade_off(spec)
        return metrics | {"latency_ms": math.nan}, arrays

    quick = ConstraintSet(soft=(comparison("latency_ms <= 3"),))
    records = sweep(tmp_path / "study", 2, function=without_clock, constraints=quick)
    assert [record.reason for record in records] == ["constraint latency_ms <= 3 is nan"] * 2


def test_a_runner_that_loses_trials_leaves_no_hole(tmp_path: Path) -> None:
    metrics = {"top1": 0.5, "madds_m": 1.0}
    kept = [TrialOutcome(slot, "complete", metrics) for slot in (2, 0)]
    records = sweep(tmp_path / "study", 4, runner=ListRunner(kept))
    assert [record.state for record in records] == ["complete", "failed", "complete", "failed"]
    assert records[1].reason == "the runner returned no outcome for this trial"


def test_arrays_are_kept_before_the_trial_is_recorded(tmp_path: Path) -> None:
    path = tmp_path / "study"
    kept: dict[int, float] = {}

    def keep(slot: int, arrays: Mapping[str, np.ndarray]) -> None:
        assert [record.slot for record in load_records(path)] == list(range(slot))
        kept[slot] = arrays["weight"][0]

    records = sweep(path, 5, function=trade_off, save_arrays=keep)
    assert kept == {record.slot: record.params["gate.target"] for record in records}


def test_a_trial_whose_arrays_cannot_be_kept_is_not_recorded(tmp_path: Path) -> None:
    def keep(slot: int, arrays: Mapping[str, np.ndarray]) -> None:
        if slot == 2:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        sweep(tmp_path / "study", 5, function=trade_off, save_arrays=keep)
    assert [record.slot for record in load_records(tmp_path / "study")] == [0, 1]
    assert essence(sweep(tmp_path / "study", 5, function=trade_off)) == essence(
        sweep(tmp_path / "other", 5, function=trade_off)
    )


def test_a_stop_or_the_end_of_the_time_ends_the_search_between_trials(tmp_path: Path) -> None:
    journal = StudyJournal.open(tmp_path / "study", study_settings())
    notebook = Notebook(stop_after=3)
    search = Search(
        journal=journal, runner=SerialRunner(OneByOne(trade_off)), observer=notebook, should_stop=notebook.is_full
    )
    stopped = search.run(Budget(20))
    assert (stopped.stop_reason, len(stopped.records)) == ("stop", 3)
    late = Search(journal=journal, runner=SerialRunner(OneByOne(trade_off))).run(Budget(20, time_s=0.0))
    assert (late.stop_reason, len(late.records)) == ("time", 3)
    done = Search(journal=journal, runner=SerialRunner(OneByOne(sometimes_broken))).run(Budget(10))
    assert (done.stop_reason, len(done.records), done.num_failed) == ("trials", 10, 2)


def test_a_finished_sweep_runs_nothing(tmp_path: Path) -> None:
    def never_called(spec: TrialSpec) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        raise AssertionError(f"slot {spec.slot} was run again")

    before = sweep(tmp_path / "study", 10)
    notebook = Notebook()
    assert sweep(tmp_path / "study", 10, function=never_called, observer=notebook) == before
    assert notebook.records == []


def test_an_interrupt_passes_through_and_the_sweep_resumes(tmp_path: Path) -> None:
    def interrupted(spec: TrialSpec) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        if spec.slot == 5:
            raise KeyboardInterrupt
        return sometimes_broken(spec)

    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path / "study", function=interrupted)
    assert len(load_records(tmp_path / "study")) == 5
    assert essence(sweep(tmp_path / "study")) == essence(sweep(tmp_path / "whole"))


def test_a_half_cohort_that_the_sampler_would_not_suggest_again_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "study"
    sweep(path, 3)
    lines = path.read_text().splitlines()
    last = json.loads(lines[-1])
    last["params"]["gate.target"] = 0.123456
    path.write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")
    _write_chain(path, running_hashes(_whole_lines(path.read_bytes())))  # as if it had been written so
    with pytest.raises(ConfigError, match=r"slot 2 of the study .*0\.123456.*other versions of Optuna or NumPy"):
        sweep(path, 5)


# --- points that come first ---


def test_enqueued_points_come_first_and_the_sampler_draws_what_they_leave_out(tmp_path: Path) -> None:
    records = sweep(tmp_path / "study", 12, settings=study_settings(enqueue=[POINT, {"gate.routing.first": 3}]))
    assert POINT.items() <= records[0].params.items()
    assert records[1].params["gate.routing.first"] == 3
    assert all(set(record.params) == set(SPACE) for record in records)
    free = sweep(tmp_path / "free", 12, settings=study_settings())
    assert [record.params for record in records[2:8]] == [record.params for record in free[2:8]]


def test_a_point_outside_the_space_is_refused_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match=r"gate\.target"):
        study_settings(enqueue=[{"gate.target": 2.0}])


def test_points_added_in_the_middle_get_the_next_slots_that_nobody_has_and_keep_them(tmp_path: Path) -> None:
    path = tmp_path / "study"
    added: list[Mapping[str, Any]] = []
    notebook = Notebook(stop_after=10)
    sweep(path, 24, observer=notebook, should_stop=notebook.is_full, queue=lambda: added)
    added.append(POINT)
    again = Notebook(stop_after=1)
    sweep(path, 24, observer=again, should_stop=again.is_full, queue=lambda: added)
    assert POINT.items() <= load_records(path)[10].params.items(), "slot 10 was the first that had not been recorded"
    added.append({"gate.target": 0.25})
    resumed = sweep(path, 24, queue=lambda: added)
    assert resumed[11].params["gate.target"] == 0.25
    assert [record.params["gate.target"] for record in resumed].count(0.5) == 1
    assert len(resumed) == 24


def test_every_queued_point_is_tried_once_however_often_the_sweep_is_stopped(tmp_path: Path) -> None:
    added = [{"gate.target": 0.1 + 0.01 * number} for number in range(11)]
    path = tmp_path / "study"
    for _ in range(30):
        notebook = Notebook(stop_after=3)
        records = sweep(path, 26, observer=notebook, should_stop=notebook.is_full, queue=lambda: added)
    found = [record.params["gate.target"] for record in records]
    assert [found.count(point["gate.target"]) for point in added] == [1] * 11
    assert essence(records) == essence(sweep(tmp_path / "whole", 26, queue=lambda: added))


def test_a_grid_is_tried_once_and_then_the_sweep_ends(tmp_path: Path) -> None:
    settings = study_settings(sampler=SamplerSettings("grid"), space=parse_space(COARSE), enqueue=[POINT])
    journal = StudyJournal.open(tmp_path / "study", settings)
    result = Search(journal=journal, runner=SerialRunner(OneByOne(trade_off))).run(Budget(100))
    assert (result.stop_reason, len(result.records)) == ("space", 41)
    points = {tuple(sorted(record.params.items())) for record in result.records[1:]}
    assert len(points) == 40, "the enqueued point takes none of the grid"


def test_a_point_enqueued_when_a_grid_is_at_its_end_is_tried_and_the_sweep_ends_again(tmp_path: Path) -> None:
    settings = study_settings(sampler=SamplerSettings("grid"), space=parse_space(COARSE))
    path, added = tmp_path / "study", list[Mapping[str, Any]]()
    assert len(sweep(path, 100, settings=settings, queue=lambda: added)) == 40
    added.append(POINT)
    records = sweep(path, 100, settings=settings, queue=lambda: added)
    assert [record.params["gate.target"] for record in records[40:]] == [0.5]
    assert len(sweep(path, 100, settings=settings, queue=lambda: added)) == 41


@pytest.mark.parametrize("order", ["cohorts", "asynchronous"])
def test_a_point_enqueued_during_the_last_trials_of_a_grid_is_tried_in_the_same_launch(
    tmp_path: Path, order: str
) -> None:
    settings = study_settings(sampler=SamplerSettings("grid"), space=parse_space(COARSE), order=order, cohort=7)
    notebook = Notebook()

    def queue() -> list[Mapping[str, Any]]:
        return [POINT, POINT][: max(0, len(notebook.records) - 38)]  # one comes after each of the last two trials

    records = sweep(tmp_path / "study", 100, settings=settings, observer=notebook, queue=queue)
    assert [record.slot for record in records] == list(range(42))
    assert len({tuple(sorted(record.params.items())) for record in records}) == 40, "every point of the grid"
    assert sum(POINT.items() <= record.params.items() for record in records) == 4 + 2
    resumed = sweep(tmp_path / "study", 100, settings=settings, queue=queue)
    assert essence(resumed) == essence(records)


# --- constraints ---


def test_infeasible_trials_are_kept_with_their_values_and_are_not_feasible(tmp_path: Path) -> None:
    records = sweep(tmp_path / "study", 16, function=trade_off, constraints=SLACK)
    assert {record.state for record in records} == {"complete"}
    assert {record.is_feasible for record in records} == {True, False}
    for record in records:
        assert record.is_feasible == (record.metrics["madds_m"] <= 6)
        assert record.values is not None


def test_a_broken_hard_constraint_prunes_the_trial_with_the_number(tmp_path: Path) -> None:
    hard = ConstraintSet(hard=(comparison("madds_m <= 6"),))
    records = sweep(tmp_path / "study", 16, function=trade_off, constraints=hard)
    assert {record.state for record in records} == {"complete", "pruned"}
    for record in records:
        assert (record.state == "pruned") == (record.metrics["madds_m"] > 6)
        if record.state == "pruned":
            assert record.reason is not None
            assert "madds_m <= 6" in record.reason
            assert not record.is_feasible
            assert record.values is None


# --- stop rules ---


def searched(path: Path, rules: StopRules, trials: int = 200, **options: Any) -> tuple[str, int]:
    journal = StudyJournal.open(path, study_settings())
    search = Search(journal=journal, runner=SerialRunner(OneByOne(sometimes_broken)), **options)
    result = search.run(Budget(trials, rules=rules))
    return result.stop_reason, len(result.records)


def test_a_target_ends_the_sweep_at_the_first_trial_that_meets_all_of_it(tmp_path: Path) -> None:
    target = StopRules(target=ConstraintSet((comparison("top1 >= 0.7"), comparison("madds_m <= 6"))))
    reason, count = searched(tmp_path / "study", target)
    meets = [
        r.is_feasible and r.metrics["top1"] >= 0.7 and r.metrics["madds_m"] <= 6
        for r in load_records(tmp_path / "study")
    ]
    assert (reason, meets.index(True)) == ("target", count - 1)
    assert searched(tmp_path / "study", target) == (reason, count), "launched again it runs nothing"
    assert searched(tmp_path / "study", StopRules(), count + 3) == ("trials", count + 3)


def test_a_plateau_ends_the_sweep_where_the_front_has_not_grown(tmp_path: Path) -> None:
    rules = StopRules(plateau=Plateau(trials=20, gain=0.01, reference=(0.0, 15.0)))
    reason, count = searched(tmp_path / "study", rules)
    records = load_records(tmp_path / "study")
    volumes = [
        hypervolume([r.values for r in records[:end] if r.values], ("maximize", "minimize"), (0.0, 15.0))
        for end in range(count + 1)
    ]
    is_flat = [end >= 20 and volumes[end] - volumes[end - 20] < 0.01 * volumes[end] for end in range(count + 1)]
    assert (reason, is_flat.index(True)) == ("plateau", count)
    assert 20 < count < 200


@pytest.mark.slow
def test_a_sweep_stopped_and_resumed_meets_its_plateau_at_the_same_trial(tmp_path: Path) -> None:
    rules = StopRules(plateau=Plateau(trials=20, gain=0.01, reference=(0.0, 15.0)))
    whole = searched(tmp_path / "whole", rules)
    pieces = ("stop", 0)
    while pieces[0] == "stop":
        notebook = Notebook(stop_after=7)
        pieces = searched(tmp_path / "pieces", rules, observer=notebook, should_stop=notebook.is_full)
    assert pieces == whole


def test_nothing_feasible_is_no_plateau(tmp_path: Path) -> None:
    rules = StopRules(plateau=Plateau(trials=3, gain=0.5, reference=(0.0, 15.0)))
    never_met = ConstraintSet(soft=(comparison("madds_m <= -1"),))
    assert searched(tmp_path / "study", rules, 12, constraints=never_met) == ("trials", 12)


# --- the asynchronous order ---


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["random", "grid", "qmc", "tpe", "nsga2", "nsga3"])
@pytest.mark.parametrize("num_workers", [1, 3])
def test_the_asynchronous_order_leaves_no_hole_and_repeats_nothing(
    tmp_path: Path, sampler: str, num_workers: int
) -> None:
    path = tmp_path / "study"
    settings = study_settings(sampler, order="asynchronous", enqueue=[POINT])
    runs: list[int] = []

    def counted(spec: TrialSpec) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        runs.append(spec.slot)
        return sometimes_broken(spec)

    for _ in range(12):
        notebook = Notebook(stop_after=5)
        runner = ThreadedRunner(counted, num_workers)
        records = sweep(path, 30, settings=settings, runner=runner, observer=notebook, should_stop=notebook.is_full)
    assert [record.slot for record in records] == list(range(30))
    assert sorted(record.number for record in records) == list(range(30))
    assert POINT.items() <= records[0].params.items()
    assert len(runs) == len(set(runs)) == 30, "a stopped trial may run again, a finished one may not"
    assert sweep(path, 30, settings=settings, runner=ListRunner([])) == records


def test_a_killed_asynchronous_sweep_fills_its_holes_first(tmp_path: Path) -> None:
    path = tmp_path / "study"
    settings = study_settings(order="asynchronous", cohort=1)

    def dies_in_slot_2(spec: TrialSpec) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        if spec.slot == 2:
            raise KeyboardInterrupt
        return trade_off(spec)

    class LastFirst:
        """Runs whatever was taken last first: slot 2 comes after slots 3 and 4."""

        def run(self, specs: Sequence[TrialSpec]) -> Generator[TrialOutcome, None, None]:
            raise AssertionError("the asynchronous order streams")
            yield

        def stream(self, take: Callable[[], Sequence[TrialSpec]]) -> Generator[TrialOutcome, None, None]:
            taken = [*take(), *take(), *take(), *take(), *take()]
            for place in (0, 1, 4, 3, 2):
                yield outcome_from(dies_in_slot_2, taken[place])

        def close(self) -> None:
            pass

    with pytest.raises(KeyboardInterrupt):
        sweep(path, 8, settings=settings, runner=LastFirst())
    assert [record.slot for record in load_records(path)] == [0, 1, 3, 4]
    resumed = sweep(path, 8, settings=settings, function=trade_off)
    assert [record.slot for record in resumed] == list(range(8))
    assert resumed[2].number == 4, "the hole was filled first"


# --- kills: the sweep runs in a process of its own and is ended by SIGKILL ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("slots", "where"),
    [((0,), "run"), ((5, 6), "keep"), ((8,), "torn"), ((3, 11), "torn"), ((0, 7), "chain"), ((5, 13), "torn chain")],
    ids=str,
)
def test_a_killed_sweep_resumes_to_the_same_study(tmp_path: Path, slots: tuple[int, ...], where: str) -> None:
    path = tmp_path / "study"
    for slot in slots:
        code = "import sys, pathlib; from tests.search.study.samples import die_in_slot as d; "
        code += f"d(pathlib.Path(sys.argv[1]), {slot}, {where!r})"
        died = subprocess.run([sys.executable, "-c", code, str(path)], cwd=Path(__file__).parents[3], check=False)
        assert died.returncode == -signal.SIGKILL
        is_recorded = "chain" in where
        assert [record.slot for record in load_records(path)] == list(range(slot + is_recorded))
    start = time.monotonic()
    resumed = sweep(path, TRIALS_IN_KILLS)
    assert time.monotonic() - start < 15, "the dead writer's lock was waited for"
    assert essence(resumed) == essence(sweep(tmp_path / "whole", TRIALS_IN_KILLS))


def test_no_trial_is_run_twice_in_one_launch(tmp_path: Path) -> None:
    ran: list[int] = []

    def counted(spec: TrialSpec) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        ran.append(spec.slot)
        return trade_off(spec)

    sweep(tmp_path / "study", 11, function=counted)
    assert ran == list(range(11))


def test_the_loop_needs_no_ray() -> None:
    code = "import sys, search.study.engine; sys.exit('ray' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=False).returncode == 0
