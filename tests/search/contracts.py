"""The contract of every runner of trials, and the staged trial function that it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from search.study.runner import (
    PROGRESS,
    Runner,
    TrialOutcome,
    TrialSpec,
    outcome_from,
)


def specs(number: int) -> list[TrialSpec]:
    return [TrialSpec(slot, seed=slot, params={}) for slot in range(number)]


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
    """Contract of every runner, tested with `Walks`. A subclass has a fixture `walking` that gives
    a runner."""

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


def make_walks(arrays: Mapping[str, Any]) -> Walks:
    """For runners that build their function elsewhere."""
    return Walks()
