"""Fronts, hypervolume, the knee and the pick language, against brute force, counted cells and
moocore."""

from __future__ import annotations

import itertools
import sys
import time

import moocore
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsnet.errors import ConfigError, NotFoundError
from search.front.pareto import apply_pick, front_mask, hypervolume, hypervolume_trace, knee, parse_pick
from search.front.selection import pickable

MAX_MIN = ("maximize", "minimize")
GOALS = st.sampled_from(["maximize", "minimize"])


def grids(num_objectives, high=5, allow_nan=False):
    """Few small integers as values, so that ties, copies and dominated points are common."""
    cell = st.integers(0, high).map(float)
    if allow_nan:
        cell = st.one_of(cell, cell, cell, st.just(float("nan")))
    return st.lists(st.tuples(*[cell] * num_objectives), max_size=14)


def brute_force_front(values, goals, keep_duplicates):
    signs = [-1 if goal == "maximize" else 1 for goal in goals]
    costs = [tuple(sign * value for sign, value in zip(signs, row, strict=True)) for row in values]
    mask = []
    for index, point in enumerate(costs):
        is_dominated = any(other != point and all(o <= p for o, p in zip(other, point, strict=True)) for other in costs)
        is_copy = point in costs[:index] and not keep_duplicates
        mask.append(not np.isnan(point).any() and not is_dominated and not is_copy)
    return mask


def counted_cells(values, goals, reference):
    """The number of unit cells of an integer grid that some point dominates."""
    signs = np.array([-1 if goal == "maximize" else 1 for goal in goals])
    costs, bound = np.asarray(values, dtype=float).reshape(-1, len(goals)) * signs, np.asarray(reference) * signs
    lowest = costs.min(axis=0, initial=bound.min()).astype(int)
    corners = itertools.product(
        *[range(low, int(high)) for low, high in zip([lowest.min()] * len(goals), bound, strict=True)]
    )
    return sum(bool((costs <= corner).all(axis=1).any()) for corner in corners)


@pytest.mark.parametrize("num_objectives", [2, 3])
@given(data=st.data())
@settings(deadline=None)
def test_front_equals_brute_force_with_ties_copies_and_nan(num_objectives, data):
    values = data.draw(grids(num_objectives, allow_nan=True))
    goals = data.draw(st.tuples(*[GOALS] * num_objectives))
    for keep_duplicates in (True, False):
        expected = brute_force_front(values, goals, keep_duplicates)
        assert front_mask(values, goals, keep_duplicates=keep_duplicates).tolist() == expected


def test_front_of_two_objectives_equals_moocore_on_random_points():
    values = np.random.default_rng(0).normal(size=(2000, 2))
    expected = moocore.is_nondominated(values, maximise=[True, False])
    assert (front_mask(values, MAX_MIN) == expected).all()


def test_infinite_values_are_ordered_like_any_other():
    values = [[0.9, np.inf], [0.9, 5.0], [-np.inf, 1.0], [0.1, 1.0]]
    assert front_mask(values, MAX_MIN).tolist() == [False, True, False, True]


def test_front_of_nothing_is_empty_and_of_nan_alone_too():
    assert front_mask([], MAX_MIN).shape == (0,)
    assert not front_mask([[np.nan, 1.0]], MAX_MIN).any()
    assert not front_mask([[np.nan, 1.0, 2.0]], (*MAX_MIN, "minimize")).any()


@pytest.mark.parametrize("num_objectives", [2, 3])
def test_front_and_hypervolume_of_100000_points_take_less_than_a_second(num_objectives, capsys):
    rng = np.random.default_rng(1)
    values = np.abs(rng.normal(size=(100_000, num_objectives)))
    values /= np.linalg.norm(values, axis=1, keepdims=True)  # on a sphere: all of them are on the front
    goals = ("maximize",) * num_objectives
    start = time.perf_counter()
    mask = front_mask(values, goals)
    front_s = time.perf_counter() - start
    volume = hypervolume(values, goals, [0.0] * num_objectives)
    volume_s = time.perf_counter() - start - front_s
    with capsys.disabled():
        sys.stdout.write(
            f"\n  100,000 points, {num_objectives} objectives, all on the front: front {front_s * 1e3:.0f} ms, "
            f"hypervolume {volume_s * 1e3:.0f} ms"
        )
    assert mask.all()
    # The part of the unit ball with positive coordinates.
    assert volume == pytest.approx(np.pi / 4 if num_objectives == 2 else np.pi / 6, rel=0.01)
    # Some 0.04 s each on an idle core; the bound leaves room for a busy one.
    assert front_s < 1.0
    assert volume_s < 1.0


@pytest.mark.parametrize(
    ("values", "goals", "message"),
    [
        ([[1.0, 2.0]], ("maximize", "down"), "'down' is unknown"),
        ([[1.0, 2.0]], ("maximize",), "number of goals is 1"),
        ([[1.0, 2.0, 3.0]], MAX_MIN, r"\(1, 3\), but must be \[n, 2\]"),
    ],
)
def test_wrong_shapes_and_goals_are_named(values, goals, message):
    with pytest.raises(ValueError, match=message):
        front_mask(values, goals)


@pytest.mark.parametrize("num_objectives", [2, 3])
@given(data=st.data())
@settings(deadline=None)
def test_hypervolume_equals_counted_cells(num_objectives, data):
    values = data.draw(grids(num_objectives))
    goals = data.draw(st.tuples(*[GOALS] * num_objectives))
    reference = [0.0 if goal == "maximize" else 5.0 for goal in goals]
    assert hypervolume(values, goals, reference) == pytest.approx(counted_cells(values, goals, reference), abs=1e-9)


@pytest.mark.parametrize("num_objectives", [2, 3])
def test_hypervolume_equals_moocore_on_random_points(num_objectives):
    values = np.random.default_rng(2).random((500, num_objectives))
    goals = ("maximize", "minimize", "minimize")[:num_objectives]
    reference = np.array([0.2, 0.9, 0.8])[:num_objectives]
    expected = moocore.hypervolume(values, ref=reference, maximise=[goal == "maximize" for goal in goals])
    assert hypervolume(values, goals, reference) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("num_objectives", [2, 3])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_trace_is_the_hypervolume_after_each_point_and_never_falls(num_objectives, data):
    values = data.draw(grids(num_objectives, allow_nan=True))
    goals = data.draw(st.tuples(*[GOALS] * num_objectives))
    reference = [0.0 if goal == "maximize" else 5.0 for goal in goals]
    trace = hypervolume_trace(values, goals, reference)
    expected = [hypervolume(values[: n + 1], goals, reference) for n in range(len(values))]
    assert trace == pytest.approx(expected, abs=1e-9)
    assert (np.diff(trace) >= 0).all()


@pytest.mark.parametrize("num_objectives", [2, 3])
def test_trace_of_random_points_ends_at_the_whole_hypervolume(num_objectives):
    values = np.random.default_rng(3).random((10_000, num_objectives))
    goals = ("maximize", "minimize", "maximize")[:num_objectives]
    reference = [0.0, 1.0, 0.0][:num_objectives]
    trace = hypervolume_trace(values, goals, reference)
    assert trace[-1] == pytest.approx(hypervolume(values, goals, reference), rel=1e-9)


@pytest.mark.slow
def test_the_trace_stays_fast_where_every_point_joins_the_front(capsys):
    x = np.random.default_rng(4).permutation(10_000) / 10_000
    start = time.perf_counter()
    trace = hypervolume_trace(np.column_stack([x, x**2]), MAX_MIN, [0.0, 1.0])
    seconds = time.perf_counter() - start
    with capsys.disabled():
        sys.stdout.write(f"\n  trace of 10,000 trials, all on the front: {seconds * 1e3:.0f} ms\n")
    assert trace[-1] == pytest.approx(2 / 3, abs=1e-3)
    assert seconds < 5.0


def test_an_infinitely_good_point_and_an_infinite_reference_are_refused():
    with pytest.raises(ValueError, match="infinitely good"):
        hypervolume([[np.inf, 1.0]], MAX_MIN, [0.0, 2.0])
    with pytest.raises(ValueError, match="infinitely good"):
        hypervolume_trace([[np.inf, 1.0]], MAX_MIN, [0.0, 2.0])
    with pytest.raises(ValueError, match="must be finite"):
        hypervolume([[1.0, 1.0]], MAX_MIN, [0.0, np.inf])


def test_knee_is_the_corner_of_an_elbow():
    values = [[0.5, 10.0], [0.9, 20.0], [0.95, 100.0], [0.6, 90.0]]
    assert knee(values, MAX_MIN) == 1


def test_knee_does_not_depend_on_units_or_on_the_direction_of_goals():
    values = np.array([[0.5, 10.0], [0.8, 15.0], [0.9, 30.0], [0.95, 100.0]])
    expected = knee(values, MAX_MIN)
    assert knee(values * [100.0, 1e6], MAX_MIN) == expected
    assert knee(values * [-1.0, -1.0], ("minimize", "maximize")) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[0.7, 3.0]], 0),
        ([[np.nan, 1.0], [0.7, 3.0], [np.inf, 0.0]], 1),
        ([[0.5, 1.0], [0.9, 2.0]], 1),  # two ends: the more accurate
        ([[0.0, 0.0], [0.5, 0.5], [1.0, 1.0]], 2),  # a straight front: all at distance 0
        ([[0.0, 0.0], [0.1, 0.5], [1.0, 1.0]], 2),  # bends the other way: an end
        ([[0.5, 0.0], [0.8, 0.25], [0.8, 0.25], [1.0, 1.0]], 1),  # copies: the first
        ([[0.0, 0.0], [0.5, 0.25], [0.75, 0.5], [1.0, 1.0]], 2),  # equally far: the more accurate
    ],
)
def test_knee_of_degenerate_fronts_is_defined(values, expected):
    assert knee(values, MAX_MIN) == expected


@given(values=st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6)), min_size=1, max_size=30))
@settings(deadline=None)
def test_knee_is_always_on_the_front(values):
    assert front_mask(values, MAX_MIN, keep_duplicates=False)[knee(values, MAX_MIN)]


def test_rounding_does_not_invent_a_knee_on_a_straight_front():
    top1 = np.linspace(0.1, 0.7, 11)
    assert knee(np.column_stack([top1, 3 * top1 + 0.1]), MAX_MIN) == 10


MAX_MIN_MIN = ("maximize", "minimize", "minimize")


def summed_costs(values, goals):
    """Scaled costs over a brute-force front, summed: {row: sum}."""
    kept = [row for row, is_kept in enumerate(brute_force_front(values, goals, keep_duplicates=False)) if is_kept]
    sums = dict.fromkeys(kept, 0.0)
    for column, goal in enumerate(goals):
        own = [values[row][column] for row in kept]
        best, worst = (max(own), min(own)) if goal == "maximize" else (min(own), max(own))
        for row in kept:
            sums[row] += 0.0 if best == worst else (values[row][column] - best) / (worst - best)
    return sums


@pytest.mark.parametrize("num_objectives", [2, 3])
@given(data=st.data())
@settings(deadline=None)
def test_knee_has_the_least_sum_of_scaled_costs_of_a_brute_force_front(num_objectives, data):
    values = data.draw(grids(num_objectives).filter(len))
    goals = data.draw(st.tuples(*[GOALS] * num_objectives))
    sums = summed_costs(values, goals)
    assert sums[knee(values, goals)] == pytest.approx(min(sums.values()), abs=1e-9)


def test_knee_of_three_objectives_is_the_corner_in_all_of_them():
    values = [[0.5, 10.0, 1.0], [0.9, 20.0, 1.2], [0.95, 100.0, 5.0], [0.92, 15.0, 9.0]]
    assert knee(values, MAX_MIN_MIN) == 1


@given(values=grids(2).filter(len), position=st.integers(0, 2), constant=st.floats(-1e3, 1e3))
@settings(deadline=None)
def test_an_objective_in_which_all_are_equal_does_not_move_the_knee(values, position, constant):
    goals = [*MAX_MIN[:position], "minimize", *MAX_MIN[position:]] if position < 2 else [*MAX_MIN, "minimize"]
    with_constant = np.insert(np.asarray(values), position, constant, axis=1)
    assert knee(with_constant, goals) == knee(values, MAX_MIN)


def test_of_equally_good_knees_of_three_objectives_the_first_two_objectives_decide():
    values = [[0.0, 1.0, 0.0], [1.0, 1.0, 1.0], [1.0, 0.0, 2.0], [0.5, 0.0, 1.0]]
    # Sums of scaled costs: 2, 1.5, 1, 1: of the last two the more accurate wins.
    assert knee(values, MAX_MIN_MIN) == 2
    # Equal sums and equal in the first: the better in the second.
    assert knee([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0]], ("minimize", "maximize", "maximize")) == 1


def test_knee_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one finite point"):
        knee([[np.nan, 1.0]], MAX_MIN)


ROWS = [
    {"name": "trial-0001", "top1": 0.80, "madds_m": 100.0, "latency_ms": 2.0, "latency_ms_batch64.server": 30.0},
    {"name": "trial-0002", "top1": 0.90, "madds_m": 200.0, "latency_ms": None},
    {"name": "trial-0003", "top1": 0.92, "madds_m": 400.0, "latency_ms": 3.0},
    {"name": "trial-0004", "top1": 0.70, "madds_m": 300.0, "latency_ms": 1.0},
    {"name": "trial-0005", "top1": float("nan"), "madds_m": 1.0, "latency_ms": 9.0},
]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("knee", ["trial-0002"]),
        ("all", ["trial-0001", "trial-0002", "trial-0003"]),
        (" max:top1 ", ["trial-0003"]),
        ("max:top1 where madds_m<=200", ["trial-0002"]),
        ("max:top1 where madds_m < 200", ["trial-0001"]),
        ("min:madds_m where top1>=0.9", ["trial-0002"]),
        ("min:madds_m where top1>=.85 and madds_m>2e2", ["trial-0003"]),
        ("min:latency_ms where top1 > 0.75", ["trial-0001"]),
        ("max:top1 where latency_ms_batch64.server<=30.5 and madds_m<=300", ["trial-0001"]),
        ("trial-0004", ["trial-0004"]),
    ],
)
def test_picks_mean_what_they_say(text, expected):
    assert [row["name"] for row in apply_pick(parse_pick(text), ROWS)] == expected


def test_the_knee_is_a_gate_that_is_not_collapsed_if_the_front_has_one():
    shares = {"trial-0001": 0.5, "trial-0002": 0.995, "trial-0003": 0.9}
    on_front = [{**row, "max_route_share": shares[row["name"]]} for row in ROWS if row["name"] in shares]
    knee_of, everything = parse_pick("knee"), parse_pick("all")
    assert [row["name"] for row in pickable(knee_of, ROWS, on_front)] == ["trial-0001", "trial-0003"]
    assert apply_pick(knee_of, pickable(knee_of, ROWS, on_front))[0]["name"] != "trial-0002"
    assert pickable(everything, ROWS, on_front) == on_front
    assert pickable(parse_pick("max:top1"), ROWS, on_front) == ROWS
    collapsed = [{**row, "max_route_share": 1.0} for row in on_front]
    assert apply_pick(knee_of, pickable(knee_of, ROWS, collapsed))[0]["name"] == "trial-0002"


def test_equally_good_rows_are_told_apart_by_the_other_objective():
    rows = [{"name": "a", "top1": 0.9, "madds_m": 3.0}, {"name": "b", "top1": 0.9, "madds_m": 2.0}]
    assert apply_pick(parse_pick("max:top1"), rows)[0]["name"] == "b"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "'' is neither"),
        ("trial 42", "'trial 42' is neither"),
        ("best:top1", "'best' before the colon"),
        ("max:", "'' is not the name of a metric"),
        ("max:top-1", "'top-1' is not the name"),
        ("max:top1 where", "'' is not a condition"),
        ("max:top1 where madds_m=<200", "'madds_m=<200' is not a condition"),
        ("max:top1 where madds_m<=200 and top1>=many", "'top1>=many' is not a condition"),
        ("max:top1 where madds_m<=1e999", "'1e999' is too large"),
        ("max:__import__('os').getcwd()", "is not the name of a metric"),
    ],
)
def test_a_malformed_pick_names_the_bad_part(text, part):
    with pytest.raises(ConfigError) as caught:
        parse_pick(text)
    assert part in str(caught.value)


def test_an_unknown_metric_is_refused_early_when_the_known_ones_are_given():
    with pytest.raises(ConfigError, match="unknown metric 'madd_m'; did you mean 'madds_m'"):
        parse_pick("max:top1 where madd_m<=3", metrics=("top1", "madds_m"))


@given(text=st.text(max_size=30))
@settings(deadline=None)
def test_any_text_gives_a_pick_or_a_config_error(text):
    try:
        outcome = parse_pick(text).text
    except ConfigError as error:
        outcome = str(error)
    assert outcome == text.strip() or outcome.startswith(f"pick {text!r}: ")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("max:top1 where madds_m<=50", "the nearest is trial-0001 with madds_m=100, top1=0.8"),
        ("trial-0042", "did you mean 'trial-0004'?"),
        ("max:top7", "no point has a value of 'top7'; did you mean 'top1'?"),
    ],
)
def test_a_pick_that_matches_nothing_says_what_comes_nearest(text, part):
    with pytest.raises(NotFoundError) as caught:
        apply_pick(parse_pick(text), ROWS)
    assert part in str(caught.value)


def test_picking_from_nothing_is_an_error():
    with pytest.raises(NotFoundError, match="no points to pick from"):
        apply_pick(parse_pick("knee"), [])
    with pytest.raises(NotFoundError, match="finite values of top1 and madds_m"):
        apply_pick(parse_pick("knee"), ROWS[4:])
