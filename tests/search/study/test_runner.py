"""Batches of trials: every trial has one outcome, whatever other trials its batch has."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsnet.errors import StorageError
from search.study.runner import (
    CohortFunction,
    OneByOne,
    Runner,
    SerialRunner,
    TrialFunction,
    TrialOutcome,
    TrialSpec,
    divide,
    run_batch,
)
from tests.search.contracts import RunnerContract, Walks, specs


@dataclass
class Recorded:
    """Returns outcomes in reverse order, raises for any batch with a broken slot, and omits or adds
    others."""

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


@dataclass
class Batched:
    """Calls a trial function for each trial and lets its errors end the batch."""

    function: TrialFunction
    lanes: int = 2

    def __call__(self, specs: Sequence[TrialSpec]) -> list[TrialOutcome]:
        return [TrialOutcome(spec.slot, "complete", *self.function(spec)) for spec in specs]


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
    assert outcomes[1].reason == "RuntimeError: trials of slots [1] gave outcomes for slots []"


def test_a_function_that_answers_twice_fails_the_trial() -> None:
    class Twice:
        lanes = 1

        def __call__(self, specs: Sequence[TrialSpec]) -> list[TrialOutcome]:
            return [TrialOutcome(spec.slot, "complete") for spec in specs] * 2

    (outcome,) = run_batch(Twice(), specs(1)) or []
    assert (outcome.state, outcome.reason) == (
        "failed",
        "RuntimeError: trials of slots [0] gave outcomes for slots [0, 0]",
    )


def test_an_interrupt_is_no_failure_of_a_trial() -> None:
    class Interrupted:
        lanes = 2

        def __call__(self, specs: Sequence[TrialSpec]) -> list[TrialOutcome]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_batch(Interrupted(), specs(2))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_full_or_failing_disk_is_no_failure_of_a_trial(code: int) -> None:
    def failing(spec: TrialSpec) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        raise OSError(code, os.strerror(code), "/tmp/spilled")

    for function in (OneByOne(failing), Batched(failing)):
        with pytest.raises(StorageError, match="/tmp/spilled"):
            run_batch(function, specs(2))


def test_a_file_that_a_trial_does_not_find_is_a_failure_of_the_trial() -> None:
    def failing(spec: TrialSpec) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        raise FileNotFoundError(errno.ENOENT, "No such file", "/own/file")

    outcomes = run_batch(OneByOne(failing), specs(1)) or []
    assert [outcome.state for outcome in outcomes] == ["failed"]


def test_batches_run_when_their_outcomes_are_asked_for() -> None:
    function = Recorded(lanes=2)
    outcomes = SerialRunner(function).run(specs(6))
    assert {next(outcomes).slot, next(outcomes).slot} == {0, 1}
    outcomes.close()
    assert function.batches == [[0, 1]]


class TestSerialRunner(RunnerContract):
    @pytest.fixture
    def walking(self) -> Iterator[Runner]:
        made = SerialRunner(Walks())
        yield made
        made.close()
