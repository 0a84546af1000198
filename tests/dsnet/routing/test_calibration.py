"""Calibration to a target against every achievable mean cost."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dsnet.routing.calibration import calibrate, confidence_threshold, nearest_price


def steps_of(scores: NDArray[np.float64], cost: NDArray[np.float64]) -> list[tuple[float, float, float]]:
    """(low, high, mean cost) of every interval of beta on which no image changes its cost, from all
    breakpoints."""
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


@pytest.mark.slow
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


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 1000), exponent=st.integers(-12, 12), share=st.floats(-0.5, 1.5))
def test_scores_of_any_size_are_calibrated_as_well(seed: int, exponent: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(15, 4)) * 10.0**exponent
    madds = np.array([4e8, 1e8, 2e8, 9e8])
    target = 1e8 + share * 8e8
    beta = calibrate(scores, madds, target)
    plain = calibrate(scores / 10.0**exponent, madds, target)
    means = [
        madds[np.argmax(own - price * madds / 9e8, axis=1)].mean()
        for own, price in ((scores, beta), (scores / 10.0**exponent, plain))
    ]
    assert abs(means[0] - target) == pytest.approx(abs(means[1] - target))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000), num_images=st.integers(1, 12), num_routes=st.integers(1, 5))
def test_the_mean_cost_falls_as_the_price_rises(seed: int, num_images: int, num_routes: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(-3, 4, size=(num_images, num_routes)).astype(np.float64)
    madds = rng.integers(1, 6, num_routes).astype(np.float64)
    prices = np.sort(rng.normal(size=30) * 10)
    means = [madds[np.argmax(scores - beta * madds / madds.max(), axis=1)].mean() for beta in prices]
    assert all(after <= before + 1e-12 for before, after in pairwise(means))
    reached = madds[np.argmax(scores - calibrate(scores, madds, 3.0) * madds / madds.max(), axis=1)].mean()
    assert abs(reached - 3.0) <= min(abs(mean - 3.0) for mean in means) + 1e-9


def test_a_target_out_of_reach_gives_the_nearest_end() -> None:
    scores = np.random.default_rng(3).normal(size=(20, 3))
    madds = np.array([1.0, 2.0, 4.0])
    for target, route in ((-5.0, 0), (50.0, 2)):
        beta = calibrate(scores, madds, target)
        assert np.isfinite(beta)
        assert set(np.argmax(scores - beta * madds / 4.0, axis=1)) == {route}


confidences = st.lists(st.one_of(st.sampled_from([0.25, 0.5, 1.0]), st.floats(0, 1, width=32)), min_size=1, max_size=20)


@settings(max_examples=200, deadline=None)
@given(values=confidences, first=st.floats(1, 50), extra=st.floats(0.5, 50), share=st.floats(-0.3, 1.3))
def test_no_confidence_threshold_comes_nearer_to_the_target(
    values: list[float], first: float, extra: float, share: float
) -> None:
    confidence = np.array(values, dtype=np.float32).astype(
        np.float64
    )  # routers compare in float64: there is room between two
    target = first + share * extra

    def distance(threshold: float) -> float:
        return abs(first + float((confidence < threshold).mean()) * extra - target)

    met = confidence_threshold(confidence.astype(np.float32), first, extra, target)
    between = [*np.unique(confidence.astype(np.float64)), -np.inf, np.inf]  # below each value, below all, above all
    assert distance(met) <= min(distance(threshold) for threshold in between) + 1e-9
    assert met not in confidence


def test_the_threshold_is_infinite_where_all_or_none_go_on() -> None:
    confidence = np.array([0.3, 0.9], dtype=np.float32)
    assert confidence_threshold(confidence, 10.0, 5.0, 10.0) == -np.inf
    assert confidence_threshold(confidence, 10.0, 5.0, 15.0) == np.inf
    assert confidence_threshold(confidence, 10.0, 5.0, 12.5) == pytest.approx(0.6)


@settings(max_examples=60, deadline=None)
@given(edges=st.lists(st.floats(-50, 50), min_size=1, max_size=12, unique=True), share=st.floats(-0.2, 1.2))
def test_the_nearest_step_of_a_falling_function_is_found(edges: list[float], share: float) -> None:
    ordered = np.sort(edges)

    def steps(beta: float) -> float:
        return float(len(ordered) - np.searchsorted(ordered, beta, side="right"))

    target = share * len(ordered)
    beta = nearest_price(steps, target, 100.0)
    reachable = [step for step in range(len(ordered) + 1) if _width(ordered, step) > 1e-9]
    assert -100.0 <= beta <= 100.0
    assert abs(steps(beta) - target) <= min(abs(step - target) for step in reachable)


def _width(ordered: NDArray[np.float64], step: int) -> float:
    """Width of the interval above which `step` edges lie."""
    index = len(ordered) - step
    return float(ordered[index] - ordered[index - 1]) if 0 < index < len(ordered) else np.inf


def test_a_function_that_rises_here_and_there_is_still_met_at_its_crossing() -> None:
    def bumpy(beta: float) -> float:
        return 50.0 - 10.0 * beta + 2.0 * np.sin(20.0 * beta)

    for target in (10.0, 33.0, 52.0, 88.0):
        assert bumpy(nearest_price(bumpy, target, 5.0)) == pytest.approx(target, abs=1e-6)


def test_the_best_of_all_prices_met_is_kept_though_the_crossing_is_a_jump() -> None:
    def jump(beta: float) -> float:
        return 10.0 if beta < 1.0 else 4.0

    assert jump(nearest_price(jump, 8.0, 16.0)) == 10.0
    assert jump(nearest_price(jump, 5.0, 16.0)) == 4.0
    assert nearest_price(lambda beta: 3.0, 7.0, 16.0) == 0.0
