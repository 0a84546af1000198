"""Batches of trials: every trial is answered once, whoever shares its batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.study.runner import (
    PROGRESS,
    CohortFunction,
    OneByOne,
    Runner,
    SerialRunner,
    TrialOutcome,
    TrialSpec,
    divide,
    outcome_from,
    run_batch,
)


def specs(number: int) -> list[TrialSpec]:
    return [TrialSpec(slot, seed=slot, params={}) for slot in range(number)]


@dataclass
class Recorded:
    """Answers in reverse order, raises for any batch that holds a broken slot, and forgets or
    invents others."""

    lanes: int
    broken: frozenset[int] = frozenset()
    forgotten: frozenset[int] = frozenset()
    batches: list[list[int]] = field(default_factory=list)

    def __call__(self, specs: Sequence[TrialSpec]) -> list[TrialOutcome]:
        slots = [spec.slot for spec in specs]
        self.batches.append(slots)
        if self.broken.intersection(slots):
            raise ValueError("no route is right")
        return [
            TrialOutcome(slot, "complete", {"top1": slot}) for slot in reversed(slots) if slot not in self.forgotten
        ]


@given(st.integers(0, 200), st.integers(1, 9), st.integers(1, 17))
def test_batches_hold_every_trial_once_in_order_and_share_the_work_evenly(
    number: int, workers: int, lanes: int
) -> None:
    batches = divide(specs(number), workers, lanes)
    assert [spec.slot for batch in batches for spec in batch] == list(range(number))
    sizes = [len(batch) for batch in batches]
    assert all(1 <= size <= lanes for size in sizes)
    assert max(sizes, default=0) - min(sizes, default=0) <= 1
    fullest = -(-number // workers)  # trials of the busiest worker, could they be shared one by one
    rounds = -(-len(batches) // workers)
    assert rounds == -(-fullest // lanes)


@pytest.mark.parametrize(
    ("number", "workers", "lanes", "sizes"),
    [
        (64, 2, 8, [8] * 8),
        (8, 2, 8, [4, 4]),
        (20, 2, 8, [5] * 4),
        (3, 4, 8, [1] * 3),
        (3, 1, 1, [1] * 3),
        (0, 2, 8, []),
    ],
)
def test_a_cohort_is_divided_over_the_workers(number: int, workers: int, lanes: int, sizes: list[int]) -> None:
    assert [len(batch) for batch in divide(specs(number), workers, lanes)] == sizes


def test_one_by_one_makes_a_trial_function_a_cohort_function() -> None:
    def function(spec: TrialSpec) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        if spec.slot == 1:
            raise ValueError("no route is right")
        return {"top1": spec.slot}, {"weight": np.full(2, spec.slot)}

    single: CohortFunction = OneByOne(function)
    assert single.lanes == 1
    outcomes = single(specs(3))
    assert [outcome.state for outcome in outcomes] == ["complete", "failed", "complete"]
    assert outcomes[1].reason == "ValueError: no route is right"
    assert outcomes[2].arrays["weight"].tolist() == [2, 2]


def test_the_culprit_of_a_failed_batch_fails_alone() -> None:
    function = Recorded(lanes=4, broken=frozenset({2}))
    outcomes = {outcome.slot: outcome for outcome in SerialRunner(function).run(specs(8))}
    assert [slot for slot, outcome in outcomes.items() if outcome.state == "failed"] == [2]
    assert outcomes[2].reason == "ValueError: no route is right"
    assert sorted(outcomes) == list(range(8))
    assert function.batches == [[0, 1, 2, 3], [0], [1], [2], [3], [4, 5, 6, 7]]


def test_a_function_that_forgets_a_trial_fails_that_trial_alone() -> None:
    function = Recorded(lanes=3, forgotten=frozenset({1}))
    outcomes = {outcome.slot: outcome for outcome in SerialRunner(function).run(specs(3))}
    assert [outcomes[slot].state for slot in range(3)] == ["complete", "failed", "complete"]
    assert outcomes[1].reason == "RuntimeError: asked for slots [1], the trials answered for []"


def test_a_function_that_answers_twice_fails_the_trial() -> None:
    class Twice:
        lanes = 1

        def __call__(self, specs: Sequence[TrialSpec]) -> list[TrialOutcome]:
            return [TrialOutcome(spec.slot, "complete") for spec in specs] * 2

    (outcome,) = run_batch(Twice(), specs(1)) or []
    assert (outcome.state, outcome.reason) == (
        "failed",
        "RuntimeError: asked for slots [0], the trials answered for [0, 0]",
    )


def test_an_interrupt_is_no_failure_of_a_trial() -> None:
    class Interrupted:
        lanes = 2

        def __call__(self, specs: Sequence[TrialSpec]) -> list[TrialOutcome]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_batch(Interrupted(), specs(2))


def test_batches_run_when_their_outcomes_are_asked_for() -> None:
    function = Recorded(lanes=2)
    outcomes = SerialRunner(function).run(specs(6))
    assert {next(outcomes).slot, next(outcomes).slot} == {0, 1}
    outcomes.close()
    assert function.batches == [[0, 1]]


NUM_STEPS = 6
POINT = PROGRESS + "point"


class Walks:
    """Random walks in steps, two of them in one program: what a staged trial function looks like.

    `do: raise` is a trial's own failure, `do: spoil` raises out of the whole program.
    """

    lanes = 2

    def __call__(self, specs: Sequence[TrialSpec]) -> list[TrialOutcome]:
        if any(spec.params.get("do") == "spoil" for spec in specs):
            raise RuntimeError("the program ended")
        return [outcome_from(_walk, spec) for spec in specs]


def _walk(spec: TrialSpec) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    if spec.params.get("do") == "raise":
        raise ValueError("no route is right")
    start, at = (spec.progress[POINT][:2], int(spec.progress[POINT][2])) if spec.progress else (np.zeros(2), 0)
    until = NUM_STEPS if spec.until is None else spec.until
    steps = np.random.default_rng(spec.seed).normal(size=(NUM_STEPS, 2))
    point = np.cumsum([start, *steps[at:until]], axis=0)[-1]  # added in order: not the sum of a sum
    metrics = {"top1": float(point[0]), "began": float(at), "madds_m": float(np.exp(point[1]))}
    return metrics, {POINT: np.append(point, until), "weight": point}


class RunnerContract:
    """What every runner does with `Walks`. A subclass has a fixture `walking` that gives one."""

    @staticmethod
    def taking(batches: Sequence[Sequence[TrialSpec]]) -> Callable[[], Sequence[TrialSpec]]:
        left = iter(batches)
        return lambda: next(left, ())

    def test_a_stream_answers_each_trial_once_as_a_run_does(self, walking: Runner) -> None:
        wanted = {outcome.slot: outcome for outcome in walking.run(specs(11))}
        batches = [specs(11)[:1], specs(11)[1:3], specs(11)[3:10], specs(11)[10:]]
        outcomes = list(walking.stream(self.taking(batches)))
        assert sorted(outcome.slot for outcome in outcomes) == list(range(11)) == sorted(wanted)
        for outcome in outcomes:
            assert outcome.metrics == wanted[outcome.slot].metrics
            assert np.array_equal(outcome.arrays["weight"], wanted[outcome.slot].arrays["weight"])

    def test_a_stream_that_is_given_nothing_ends(self, walking: Runner) -> None:
        assert list(walking.stream(lambda: ())) == []
        assert list(walking.run([])) == []

    def test_a_stream_asks_for_more_only_between_outcomes_and_can_learn_from_them(self, walking: Runner) -> None:
        seen: list[int] = []
        asked_after: list[int] = []

        def take() -> Sequence[TrialSpec]:
            asked_after.append(len(seen))
            slot = len(asked_after) - 1
            return [TrialSpec(slot, slot, {})] if slot < 7 else ()

        for outcome in walking.stream(take):
            seen.append(outcome.slot)
        assert sorted(seen) == list(range(7))
        assert asked_after == sorted(asked_after)
        assert asked_after[6] >= 4, "a trial is asked for when a worker is free, not before"

    def test_failures_in_a_stream_are_those_of_their_trials_alone(self, walking: Runner) -> None:
        actions = ["walk", "spoil", "raise", "walk", "walk"]
        scripted = [TrialSpec(slot, slot, {"do": action}) for slot, action in enumerate(actions)]
        outcomes = {o.slot: o for o in walking.stream(self.taking([scripted[:2], scripted[2:4], scripted[4:]]))}
        assert {slot: outcome.reason for slot, outcome in outcomes.items() if outcome.reason} == {
            1: "RuntimeError: the program ended",
            2: "ValueError: no route is right",
        }
        assert len(outcomes) == 5

    def test_stages_of_a_trial_come_to_the_same_bits_as_the_whole(self, walking: Runner) -> None:
        whole = {outcome.slot: outcome for outcome in walking.run(specs(5))}
        staged = [replace(spec, until=2) for spec in specs(5)]
        for until in (5, None):
            rungs = {outcome.slot: outcome for outcome in walking.run(staged)}
            kept = {slot: {POINT: outcome.arrays[POINT]} for slot, outcome in rungs.items()}
            staged = [replace(spec, until=until, progress=kept[spec.slot]) for spec in staged]
        last = {outcome.slot: outcome for outcome in walking.stream(self.taking([staged]))}
        for slot, outcome in last.items():
            assert outcome.metrics["began"] == 5, "the progress did not reach the trial"
            assert outcome.arrays["weight"].tobytes() == whole[slot].arrays["weight"].tobytes()

    def test_a_runner_can_be_used_after_its_outcomes_were_left_unread(self, walking: Runner) -> None:
        for outcomes in (walking.run(specs(9)), walking.stream(self.taking([specs(9)]))):
            next(outcomes)
            outcomes.close()
        assert sorted(outcome.slot for outcome in walking.run(specs(3))) == [0, 1, 2]


class TestSerialRunner(RunnerContract):
    @pytest.fixture
    def walking(self) -> Iterator[Runner]:
        made = SerialRunner(Walks())
        yield made
        made.close()


def make_walks(arrays: Mapping[str, Any]) -> Walks:
    """For runners that build their function elsewhere."""
    return Walks()
