"""Calibration to a target against every achievable mean cost."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dsnet.training.gate import calibrate


def steps_of(scores: NDArray[np.float64], cost: NDArray[np.float64]) -> list[tuple[float, float, float]]:
    """(low, high, mean cost) of every interval of beta on which no image changes its cost, from all breakpoints."""
    num_images, num_routes = scores.shape
    points = {
        float((scores[i, k] - scores[i, j]) / (cost[k] - cost[j]))
        for i in range(num_images)
        for k in range(num_routes)
        for j in range(k)
        if cost[k] != cost[j]
    }
    ends = [-np.inf, *sorted(points), np.inf]
    steps: list[tuple[float, float, float]] = []
    for low, high in pairwise(ends):
        if high - low < 1e-9:
            continue
        beta = high - 1.0 if low == -np.inf else low + 1.0 if high == np.inf else 0.5 * (low + high)
        mean = float(cost[np.argmax(scores - beta * cost, axis=1)].mean())
        if steps and abs(steps[-1][2] - mean) < 1e-12:
            steps[-1] = (steps[-1][0], high, mean)
        else:
            steps.append((low, high, mean))
    return steps


numbers = st.one_of(st.integers(-4, 4).map(lambda value: value / 4), st.floats(-5, 5, width=32))
problems = st.tuples(st.integers(1, 9), st.integers(2, 4)).flatmap(
    lambda shape: st.tuples(
        st.lists(st.lists(numbers, min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0]),
        st.lists(st.integers(1, 40), min_size=shape[1], max_size=shape[1]),
        st.floats(-0.2, 1.2),
    )
)


@settings(max_examples=250, deadline=None)
@given(problem=problems)
@example(problem=([[0.0, 0.0], [0.0, 0.0]], [1, 2], 0.5))
@example(problem=([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], [3, 1, 2], 0.5))
@example(problem=([[1.0, 0.0]], [5, 5], 0.5))
@example(problem=([[0.0, 0.0, 0.0]], [2, 1, 3], 0.5))  # three routes tie at one beta: a step of no width
def test_the_nearest_achievable_mean_is_reached_from_the_middle_of_its_step(
    problem: tuple[list[list[float]], list[int], float],
) -> None:
    rows, costs, position = problem
    scores, madds = np.array(rows, dtype=np.float64), np.array(costs, dtype=np.float64) * 1e6
    target = madds.min() + position * (madds.max() - madds.min())
    cost = madds / madds.max()
    wanted = target / madds.max()
    beta = calibrate(scores, madds, float(target))
    reached = float(cost[np.argmax(scores - beta * cost, axis=1)].mean())
    steps = steps_of(scores, cost)
    best = min(abs(mean - wanted) for _, _, mean in steps)
    assert abs(reached - wanted) <= best + 1e-9
    fits = [step for step in steps if step[0] - 1e-9 <= beta <= step[1] + 1e-9 and abs(step[2] - reached) < 1e-9]
    assert fits, "the answer lies in no step of its own mean"
    low, high, _ = fits[0]
    width = min(high - low, 1.0)
    if width > 1e-6:
        assert beta - low > 0.2 * width
        assert high - beta > 0.2 * width


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000), low=st.floats(0.0, 1.0), high=st.floats(0.0, 1.0), num_routes=st.integers(2, 14))
def test_beta_falls_as_the_target_rises(seed: int, low: float, high: float, num_routes: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(40, num_routes))
    madds = np.cumsum(rng.integers(1, 100, num_routes)).astype(np.float64)
    betas = [
        calibrate(scores, madds, madds[0] + share * (madds[-1] - madds[0]))
        for share in (min(low, high), max(low, high))
    ]
    assert betas[0] >= betas[1] - 1e-9


def test_the_extremes_send_everything_one_way() -> None:
    scores = np.random.default_rng(0).normal(size=(30, 3))
    madds = np.array([100.0, 150.0, 900.0])
    cost = madds / 900.0
    for target, route in ((100.0, 0), (900.0, 2)):
        beta = calibrate(scores, madds, target)
        assert set(np.argmax(scores - beta * cost, axis=1)) == {route}


def test_the_mean_is_exact_to_half_an_image_with_two_routes() -> None:
    scores = np.random.default_rng(1).normal(size=(100, 2))
    madds = np.array([1.0, 3.0])
    for target in np.linspace(1.0, 3.0, 41):
        beta = calibrate(scores, madds, float(target))
        share = Fraction(int((np.argmax(scores - beta * madds / 3.0, axis=1) == 1).sum()), 100)
        assert abs(1 + 2 * float(share) - target) <= 0.01 + 1e-12


def test_adding_a_constant_to_an_images_scores_changes_nothing() -> None:
    rng = np.random.default_rng(2)
    scores, madds = rng.normal(size=(50, 4)), np.array([10.0, 20.0, 40.0, 70.0])
    shifted = scores + rng.normal(size=(50, 1))
    assert calibrate(scores, madds, 33.0) == pytest.approx(calibrate(shifted, madds, 33.0), abs=1e-6)


def test_one_route_needs_no_calibration() -> None:
    assert calibrate(np.zeros((3, 1)), np.array([5.0]), 5.0) == 0.0
