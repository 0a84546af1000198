"""Controls against enumeration, simulation image by image, and scipy's convex hull."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import ConvexHull

from dsnet.routers.cascade import CascadeRouter
from search.front.controls import (
    StaticLine,
    budgets,
    cascade_curve,
    oracle_curve,
    random_routing,
    run_cascade,
    share_of_gap,
)


@dataclass(frozen=True)
class FakeScores:
    """The part of a routing table that cascades read."""

    correct1: np.ndarray
    confidence: np.ndarray


def make_scores(seed, num_images=60, num_routes=4, num_levels=None):
    """Scores in which wider routes are more often right, with a confidence that is related to it;
    `num_levels` makes confidences equal."""
    rng = np.random.default_rng(seed)
    ability = np.linspace(0.55, 0.8, num_routes)
    difficulty = rng.random((num_images, 1))
    correct = difficulty + 0.3 * rng.normal(size=(num_images, num_routes)) < ability
    confidence = np.clip(1 - difficulty + 0.2 * rng.normal(size=(num_images, num_routes)), 0.1, 1.0)
    if num_levels:
        confidence = np.ceil(confidence * num_levels) / num_levels
    return FakeScores(correct, confidence.astype(np.float32))


TABLES = st.tuples(st.integers(1, 6), st.integers(1, 3)).flatmap(
    lambda shape: st.tuples(
        st.lists(st.lists(st.booleans(), min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0]),
        st.lists(st.integers(1, 6), min_size=shape[1], max_size=shape[1]),
    )
)


def all_routings(correct, madds):
    """(total MAdds, number right) of each of the K^N assignments of images to routes."""
    rows = range(len(correct))
    for routes in itertools.product(range(len(madds)), repeat=len(correct)):
        yield sum(madds[k] for k in routes), sum(correct[n][k] for n, k in zip(rows, routes, strict=True))


@given(table=TABLES)
@settings(max_examples=60, deadline=None)
def test_oracle_equals_the_best_of_all_routings_at_every_budget(table):
    correct, madds = table
    num_images = len(correct)
    best: dict[int, int] = {}
    for total, right in all_routings(correct, madds):
        best[total] = max(best.get(total, 0), right)
    for budget in range(num_images * min(madds), num_images * max(madds) + 1):
        expected = max(right for total, right in best.items() if total <= budget) / num_images
        assert oracle_curve(correct, madds).at(budget / num_images) == pytest.approx(expected)


def test_oracle_curve_starts_at_the_cheapest_route_and_ends_where_some_route_is_right():
    scores = make_scores(0)
    madds = np.array([10, 20, 40, 80])
    curve_madds, top1 = oracle_curve(scores.correct1, madds)
    assert curve_madds[0] == 10
    assert top1[0] == pytest.approx(scores.correct1[:, 0].mean())
    assert top1[-1] == pytest.approx(scores.correct1.any(axis=1).mean())
    assert (np.diff(curve_madds) > 0).all()
    assert np.diff(top1) == pytest.approx(1 / 60)


def test_oracle_below_the_cheapest_route_is_nan_and_above_the_widest_is_flat():
    curve = oracle_curve([[False, True], [True, True]], [2, 5])
    assert np.isnan(curve.at(1.9))
    assert curve.at([2.0, 3.4, 3.5, 99.0]).tolist() == [0.5, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("seed", range(8))
def test_static_line_equals_the_upper_hull_of_scipy(seed):
    rng = np.random.default_rng(seed)
    madds = rng.choice(np.arange(10, 1000), size=12, replace=False)
    correct = rng.random((200, 12)) < 0.4 + 0.5 * np.sqrt(madds / 1000) * rng.uniform(0.7, 1.0, size=12)
    points = np.column_stack([madds, correct.sum(axis=0)]).astype(float)
    cheapest, best = np.argmin(madds), np.lexsort((madds, -points[:, 1]))[0]
    on_hull = ConvexHull(points).vertices
    between = [k for k in on_hull if madds[cheapest] <= madds[k] <= madds[best]]
    chord = np.interp(madds[between], madds[[cheapest, best]], points[[cheapest, best], 1])
    upper = {int(k) for k, height in zip(between, chord, strict=True) if points[k, 1] > height} | {cheapest, best}
    line = StaticLine.fit(madds, correct)
    assert set(line.vertices) == upper
    assert (np.diff(line.madds) > 0).all()


@given(table=TABLES)
@settings(deadline=None)
def test_static_line_is_above_every_sub_network_and_concave_on_its_own_split(table):
    correct, madds = np.array(table[0], dtype=bool), np.array(table[1])
    line = StaticLine.fit(madds, correct)
    assert (line.value_at(madds, correct) >= correct.mean(axis=0) - 1e-12).all()
    grid = np.linspace(madds.min(), madds.max(), 25)
    heights = line.value_at(grid, correct)
    assert (np.diff(heights) >= -1e-12).all()
    assert (np.diff(heights, 2) <= 1e-12).all()


def test_static_line_mixes_the_vertices_of_val_on_the_reported_split():
    madds = [10, 20, 30]
    val = np.array([[0, 1, 1], [0, 1, 1], [1, 0, 1], [0, 0, 0]], dtype=bool)  # 1/4, 2/4, 3/4: a straight line
    test = np.array([[1, 0, 1], [0, 0, 1], [0, 0, 1], [1, 0, 1]], dtype=bool)  # 2/4, 0, 4/4
    line = StaticLine.fit(madds, val)
    assert line.vertices == (0, 2)
    assert line.value_at([10, 15, 20, 30], test) == pytest.approx([0.5, 0.625, 0.75, 1.0])


def test_static_line_is_nan_below_the_cheapest_and_flat_above_the_last_vertex():
    val = np.array([[0, 1, 0], [1, 1, 1]], dtype=bool)  # the widest is worse than the middle one: not a vertex
    line = StaticLine.fit([10, 20, 30], val)
    assert line.vertices == (0, 1)
    values = line.value_at([9.9, 20.0, 25.0, 99.0], val)
    assert np.isnan(values[0])
    assert values[1:].tolist() == [1.0, 1.0, 1.0]


def test_static_line_of_one_sub_network_is_flat():
    line = StaticLine.fit([10, 20], np.array([[True, False]]))
    assert line.vertices == (0,)
    assert line.value_at([10.0, 15.0, 30.0], np.array([[True, False]])).tolist() == [1.0, 1.0, 1.0]


def test_random_routing_is_the_mean_of_simulated_deals():
    scores, rng = make_scores(1), np.random.default_rng(7)
    histogram = np.array([30, 15, 10, 5])
    routes = np.repeat(np.arange(4), histogram)
    deals = [scores.correct1[np.arange(60), rng.permutation(routes)].mean() for _ in range(4000)]
    assert random_routing(scores.correct1, histogram) == pytest.approx(
        np.mean(deals), abs=4 * np.std(deals) / 4000**0.5
    )
    assert random_routing(scores.correct1, histogram / 60) == pytest.approx(random_routing(scores.correct1, histogram))


@pytest.mark.parametrize("histogram", [[0, 0], [-1, 2]])
def test_an_impossible_histogram_is_refused(histogram):
    with pytest.raises(ValueError, match="histogram"):
        random_routing([[True, False]], histogram)


def simulate_cascade(scores, first, second, threshold, madds, trunk_madds):
    """One image after the other, as a device would run it."""
    right, spent = 0, 0.0
    for image in range(len(scores.correct1)):
        spent += trunk_madds + (madds[first] - trunk_madds)
        answered_by = first
        if not scores.confidence[image, first] >= threshold:
            spent += madds[second] - trunk_madds
            answered_by = second
        right += int(scores.correct1[image, answered_by])
    return right / len(scores.correct1), spent / len(scores.correct1)


@pytest.mark.parametrize(("seed", "num_levels"), [(0, None), (1, 8), (2, 3)])
def test_cascade_reports_what_running_it_image_by_image_gives(seed, num_levels):
    val, test = make_scores(seed, num_levels=num_levels), make_scores(seed + 100, num_levels=num_levels)
    madds, trunk = [10, 22, 45, 80], 4
    for point in cascade_curve(val, test, madds, trunk, [12, 30, 60, 200]):
        on_val = simulate_cascade(val, point.first, point.second, point.threshold, madds, trunk)
        on_test = simulate_cascade(test, point.first, point.second, point.threshold, madds, trunk)
        assert (point.val_top1, point.val_madds) == pytest.approx(on_val)
        assert (point.top1, point.madds) == pytest.approx(on_test)
        assert point.val_madds <= point.budget * (1 + 1e-9)


@pytest.mark.parametrize(("seed", "num_levels"), [(3, None), (4, 6)])
def test_cascade_is_the_best_of_all_pairs_and_thresholds_on_val(seed, num_levels):
    val = make_scores(seed, num_images=25, num_levels=num_levels)
    madds, trunk, limits = [10, 22, 45, 80], 4, [15.0, 25.0, 50.0]
    curve = cascade_curve(val, val, madds, trunk, limits)
    for limit, point in zip(limits, curve, strict=True):
        best = max(
            (top1, -spent)
            for first, second in itertools.combinations(range(4), 2)
            for threshold in [-np.inf, np.inf, *val.confidence[:, first]]
            for top1, spent in [simulate_cascade(val, first, second, threshold, madds, trunk)]
            if spent <= limit
        )
        assert (point.val_top1, -point.val_madds) == pytest.approx(best)


def test_the_choice_of_a_cascade_does_not_see_the_reported_split():
    val = make_scores(5)
    choices = [
        [(p.first, p.second, p.threshold) for p in cascade_curve(val, make_scores(seed), [10, 22, 45, 80], 4, [20, 40])]
        for seed in (6, 7)
    ]
    assert choices[0] == choices[1]


def test_budgets_below_the_cheapest_route_have_no_cascade():
    scores = make_scores(8)
    assert [p.budget for p in cascade_curve(scores, scores, [10, 22, 45, 80], 4, [9, 10, 30])] == [10, 30]


def test_a_threshold_above_every_confidence_runs_both_routes_on_all_images():
    scores = make_scores(9)
    correct, spent, escalated = run_cascade(CascadeRouter(0, 3, np.inf), scores, [10, 22, 45, 80], 4)
    assert escalated.all()
    assert (correct == scores.correct1[:, 3]).all()
    assert (spent == 86).all()


def test_the_share_of_a_gap_is_nan_without_a_gap():
    shares = share_of_gap([0.8, 0.7, 0.8, 0.8], [0.7, 0.75, 0.9, np.nan], [0.9, 0.95, 0.9, 0.95])
    assert shares[:2] == pytest.approx([0.5, -0.25])
    assert np.isnan(shares[2:]).all()


def test_a_gap_of_one_image_is_no_gap_at_the_resolution_of_one_image():
    assert np.isnan(share_of_gap(0.72, 0.70, 0.71, resolution=0.01))
    assert share_of_gap(0.72, 0.70, 0.72, resolution=0.01) == pytest.approx(1.0)


def test_budgets_are_fractions_of_the_range_of_routes():
    assert budgets([40, 10, 30]).tolist() == [17.5, 25.0, 32.5]
