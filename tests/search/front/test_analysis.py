"""The analysis of a front on a split, against hand computation and brute force."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsnet.routers.base import Router
from dsnet.routers.cascade import CascadeRouter
from dsnet.routers.gate import GateRouter
from dsnet.routing.routing_table import GateColumns, RoutingTable
from search.front.analysis import Bootstrap, analyse_split
from search.front.analysis_records import BudgetPick, Interval, RouterShare, SplitAnalysis, optimism
from search.front.ceiling import RouteForecast
from search.front.pareto import Goal
from search.front.selection import budget_picks, front_slots, spread_along_front
from tests.dsnet.samples import random_table

MADDS = np.array([1_000_000, 2_000_000, 4_000_000])
TRUNK = 500_000
HIDDEN = np.array([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 2.0], [0.0, 3.0]])
CORRECT = np.array([[1, 1, 1], [1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 1, 1], [0, 0, 0]], dtype=bool)
LABELS = np.array([0, 1, 2, 0, 1, 2])


def table_of(**changes: Any) -> RoutingTable:
    """Six images, three routes, three classes; the hidden vector tells the first three from the
    last three."""
    source = random_table(6, 3, hidden=2)
    confidence = np.where(CORRECT, 0.9, 0.4).astype(np.float32)
    fields = {
        "labels": LABELS,
        "madds": MADDS,
        "trunk_madds": TRUNK,
        "correct1": CORRECT,
        "correct5": np.ones_like(CORRECT),
        "confidence": confidence,
        "evidence": HIDDEN.astype(np.float32),
        "gates": (GateColumns(({"hidden": (0, 2)},), (0,)),),
    }
    return replace(source, **{**fields, **changes})


def gate(*routes: int) -> GateRouter:
    """Sends the first three images to its first route and the last three to its second."""
    return GateRouter(torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), routes)


@cache
def forecast_of_table() -> RouteForecast:
    """The forecast of `table_of()`; training one takes most of a second."""
    return RouteForecast.fit(table_of())


@cache
def forecast_of_large_table() -> RouteForecast:
    """The forecast of `large_table(400)`."""
    return RouteForecast.fit(large_table(400))


def analysis_of(routers: Mapping[int, Router], contenders: Mapping[BudgetPick, Router] | None = None) -> SplitAnalysis:
    table = table_of()
    return analyse_split(
        forecast_of_table(), table, table, routers, contenders or {}, num_classes=3, bootstrap=Bootstrap(200)
    )


def decision_m(router: Router) -> float:
    """Millions of MAdds of a gate's decision."""
    return float(router.decision_madds(torch.tensor([0]))[0]) / 1e6


def test_a_point_is_what_one_computes_by_hand() -> None:
    router = gate(0, 2)
    found = analysis_of({5: router})
    (point,) = found.points
    # Routes 0 0 0 2 2 2: right are images 0, 1, 3, 4.
    assert point.slot == 5
    assert point.top1.value == pytest.approx(4 / 6)
    assert point.metrics["top1"] == pytest.approx(4 / 6)
    madds_m = (1 + 4) / 2 + decision_m(router)
    assert point.metrics["madds_m"] == pytest.approx(madds_m)
    assert point.histogram == (0.5, 0.0, 0.5)
    assert point.metrics["max_route_share"] == 0.5
    assert not point.is_collapsed
    # Random: half at route 0 (2/6 right), half at route 2 (5/6 right).
    assert point.random_top1 == pytest.approx(0.5 * 2 / 6 + 0.5 * 5 / 6)
    assert point.gain_over_random.value == pytest.approx(4 / 6 - point.random_top1)
    # The static line: 2/6, 4/6, 5/6 at 1, 2, 4 M; the point lies between the last two.
    static = 4 / 6 + (madds_m - 2) / 2 / 6
    assert point.gain is not None
    assert point.gain.value == pytest.approx(4 / 6 - static)
    # The widest static sub-network has 5 of 6; image 2 is the one that only it gets right, so that
    # a resample never favours the router.
    assert point.over_widest is not None
    assert point.over_widest.value == pytest.approx(4 / 6 - 5 / 6)
    assert point.over_widest.low < point.over_widest.value < point.over_widest.high == 0
    # The oracle: 1 M for all, then images 2 and 4 to route 1 (+1 M each), image 3 to route 2 (+3
    # M): 5 of 6 at 11/6 M.
    assert point.oracle_top1 == pytest.approx(5 / 6)
    assert point.share_of_oracle_gap == pytest.approx((4 / 6 - static) / (5 / 6 - static))
    # The ceiling keeps the static sub-networks within reach, and nothing beats the oracle.
    assert static - 1e-9 <= (point.reachable_top1 or 0.0) <= 5 / 6
    assert point.router == "gate"
    assert point.stability == 1.0


def test_the_split_as_a_whole_is_what_one_computes_by_hand() -> None:
    found = analysis_of({5: gate(0, 2), 9: gate(1, 2)})
    assert found.num_images == 6
    assert found.static_madds_m == (1.0, 2.0, 4.0)
    assert [interval.value for interval in found.static_top1] == pytest.approx([2 / 6, 4 / 6, 5 / 6])
    assert found.line_madds_m == (1.0, 2.0, 4.0)
    assert found.line_top1 == pytest.approx((2 / 6, 4 / 6, 5 / 6))
    assert found.budgets_m == pytest.approx((1.75, 2.5, 3.25))
    # [gate][class][route]: class 0 holds images 0 and 3, one on each of the gate's routes, and so
    # on.
    assert found.class_counts[0] == ((1, 0, 1),) * 3
    assert found.class_counts[1] == ((0, 1, 1),) * 3
    assert found.oracle_top1[-1] == pytest.approx(5 / 6)
    assert found.oracle_madds_m[-1] == pytest.approx((6 + 1 + 1 + 3) / 6)


@pytest.mark.slow
def test_static_subnetworks_have_the_mean_over_classes_of_their_accuracy() -> None:
    labels = np.array([0, 0, 0, 0, 1, 2])  # uneven, so that the mean over classes is not top-1
    table = table_of(labels=labels)
    found = analyse_split(forecast_of_table(), table, table, {}, {}, num_classes=3, bootstrap=Bootstrap(50))
    for route, name in enumerate(found.routes):
        by_class = [CORRECT[labels == label, route].mean() for label in (0, 1, 2)]
        metrics = found.static_metrics(name)
        assert metrics["balanced_top1"] == pytest.approx(np.mean(by_class))
        assert metrics["top1"] == pytest.approx(CORRECT[:, route].mean()) != metrics["balanced_top1"]
        assert metrics["madds_m"] == metrics["p95_madds_m"] == MADDS[route] / 1e6
    stored = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert SplitAnalysis.from_json(stored) == found
    del stored["static_added"]  # as earlier releases wrote it
    old = SplitAnalysis.from_json(stored)
    assert {"top1", "top5", "madds_m", "p95_madds_m"} == old.static_metrics(found.routes[0]).keys()


def test_the_cascade_beside_a_point_spends_no_more_than_the_point() -> None:
    found = analysis_of({5: gate(0, 2)})
    (point,) = found.points
    # Confidence tells right from wrong here: 0 -> 1 escalates 4 images at 1.5 M each: 2 M a mean,
    # right like route 1 or better.
    assert point.cascade_top1 == pytest.approx(4 / 6)
    assert point.cascade_top1 is not None
    assert point.oracle_top1 is not None
    assert point.cascade_top1 <= point.oracle_top1


def test_a_gate_that_always_takes_one_route_is_collapsed_and_gains_nothing_over_random() -> None:
    router = GateRouter(torch.zeros(2, 2, dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64), (0, 2))
    (point,) = analysis_of({1: router}).points
    assert point.is_collapsed
    assert point.gain_over_random.value == pytest.approx(0.0)
    assert point.histogram == (0.0, 0.0, 1.0)


def test_a_gate_that_always_takes_the_cheapest_route_still_pays_for_its_decision() -> None:
    router = GateRouter(torch.zeros(2, 2, dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64), (0, 1))
    (point,) = analysis_of({1: router}).points
    assert point.histogram == (1.0, 0.0, 0.0)
    assert point.metrics["madds_m"] == pytest.approx(1.0 + decision_m(router))
    assert point.gain is not None
    assert point.gain.value < 0


@pytest.mark.slow
def test_intervals_hold_their_values_and_shrink_with_more_images() -> None:
    widths = []
    for num_images in (50, 800):
        table = random_table(num_images, 3, split="val", hidden=4)
        router = GateRouter(torch.randn(3, 4, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), (0, 1, 2))
        forecast = RouteForecast.fit(table)
        found = analyse_split(forecast, table, table, {0: router}, {}, num_classes=7, bootstrap=Bootstrap(300))
        for interval in (found.points[0].top1, *found.static_top1):
            assert interval.low <= interval.value <= interval.high
        widths.append(found.points[0].top1.high - found.points[0].top1.low)
    assert widths[1] < widths[0] / 2


def test_a_cascade_pays_for_all_that_ran_and_answers_with_the_last() -> None:
    # Confidence below 0.5 sends images 2 to 5 on to route 2: right are 0, 1, 2, 3, 4, as route 2
    # alone.
    (point,) = analysis_of({3: CascadeRouter(0, 2, 0.5)}).points
    assert point.router == "cascade"
    assert point.top1.value == pytest.approx(5 / 6)
    assert point.metrics["madds_m"] == pytest.approx(1.0 + 4 / 6 * (4.0 - 0.5))
    assert point.histogram == pytest.approx((2 / 6, 0.0, 4 / 6))
    assert point.runs == pytest.approx((1.0, 0.0, 4 / 6))
    # The same share sent on at random: a third at route 0 (2/6 right), two thirds at route 2 (5/6
    # right).
    assert point.random_top1 == pytest.approx(1 / 3 * 2 / 6 + 2 / 3 * 5 / 6)
    assert point.gain_over_random.value == pytest.approx(5 / 6 - point.random_top1)
    assert not point.is_collapsed


def test_random_routing_beside_a_cascade_is_that_cascade_with_images_drawn_at_random() -> None:
    table, rng = table_of(), np.random.default_rng(0)
    drawn = np.array([rng.permutation([True] * 4 + [False] * 2) for _ in range(20_000)])
    top1 = np.where(drawn, table.correct1[:, 2], table.correct1[:, 0]).mean()
    (point,) = analysis_of({3: CascadeRouter(0, 2, 0.5)}).points
    assert point.random_top1 == pytest.approx(top1, abs=0.005)


def test_a_cascade_that_always_goes_on_is_collapsed() -> None:
    (point,) = analysis_of({3: CascadeRouter(0, 2, float("inf"))}).points
    assert point.is_collapsed
    assert point.histogram == (0.0, 0.0, 1.0)


def test_a_gate_and_a_cascade_that_answer_alike_but_pay_differently_are_two_points() -> None:
    # Both answer 0 0 0 2 2 2; the cascade also ran route 0 for the last three, and so is dominated.
    confidence = np.array([0.9, 0.9, 0.9, 0.4, 0.4, 0.4], dtype=np.float32)[:, None].repeat(3, axis=1)
    table = table_of(confidence=confidence)
    routers: dict[int, Router] = {1: gate(0, 2), 2: CascadeRouter(0, 2, 0.5)}
    found = analyse_split(RouteForecast.fit(table), table, table, routers, {}, num_classes=3, bootstrap=Bootstrap(100))
    first, second = found.points
    assert first.histogram == second.histogram
    assert second.metrics["madds_m"] > first.metrics["madds_m"]
    assert second.stability < 0.1
    assert first.stability > 0.9


def always(position: int) -> GateRouter:
    """Sends every image to one of routes 0, 1, 2."""
    price = torch.ones(3, dtype=torch.float64)
    price[position] = 0.0
    return GateRouter(torch.zeros(3, 2, dtype=torch.float64), price, (0, 1, 2))


def large_table(num_images: int, *, seed: int = 0, split: str = "val") -> RoutingTable:
    """Routes 0 and 1 cost nearly the same and are right on 80 %; route 2 costs that too and is
    right on 40 %."""
    rng = np.random.default_rng(seed)
    right = rng.random((num_images, 3)) < [0.8, 0.8, 0.4]
    right[:, 1] = right[:, 0]
    right[:2, 1] ^= True
    return replace(
        random_table(num_images, 3, split=split, hidden=2, seed=seed),
        madds=np.array([10_000_000, 10_050_000, 10_060_000]),
        trunk_madds=TRUNK,
        correct1=right,
    )


@pytest.mark.slow
def test_points_that_the_images_cannot_tell_apart_are_tied_and_others_at_that_cost_are_not() -> None:
    table, forecast = large_table(400), forecast_of_large_table()
    contenders: dict[BudgetPick, Router] = {
        BudgetPick("gate", 0.5, 7): always(1),
        BudgetPick("gate", 0.75, 9): always(2),
    }
    found = analyse_split(forecast, table, table, {3: always(0)}, contenders, num_classes=7, bootstrap=Bootstrap(200))
    assert found.points[0].ties == (7,)
    both = analyse_split(
        forecast, table, table, {3: always(0), 7: always(1)}, contenders, num_classes=7, bootstrap=Bootstrap(200)
    )
    assert [point.ties for point in both.points] == [(7,), (3,)]


def test_points_at_other_costs_are_never_tied() -> None:
    found = analysis_of({5: gate(0, 1), 9: gate(1, 2)}, {BudgetPick("cascade", 0.25, 4): CascadeRouter(0, 1, 0.5)})
    assert [point.ties for point in found.points] == [(), ()]


@pytest.mark.slow
def test_the_fronts_optimism_is_its_mean_loss_of_top1_between_the_splits() -> None:
    val, test = large_table(400), large_table(500, seed=1, split="test")
    forecast = forecast_of_large_table()
    routers: dict[int, Router] = {0: always(0), 2: always(2)}
    chosen, reported = (
        analyse_split(forecast, val, table, routers, {}, num_classes=7, bootstrap=Bootstrap(300))
        for table in (val, test)
    )
    found = optimism(chosen, reported)
    assert found is not None
    means = [table.correct1[:, [0, 2]].mean() for table in (val, test)]
    assert found.value == pytest.approx(means[0] - means[1])
    # Against the textbook: the means of both points over independent images.
    errors = [table.correct1[:, [0, 2]].mean(axis=1).std() / np.sqrt(table.num_images) for table in (val, test)]
    assert found.high - found.low == pytest.approx(2 * 1.96 * np.hypot(*errors), rel=0.15)
    assert optimism(analysis_of({}), analysis_of({})) is None


@pytest.mark.slow
def test_stability_is_judged_in_the_objectives_of_the_sweep() -> None:
    table, forecast = table_of(), forecast_of_table()
    routers: dict[int, Router] = {1: always(2), 2: always(1)}  # route 1 is cheaper, and as good but for one image

    def stability(*objectives: tuple[str, Goal], latency_ms: tuple[float, float] = (1.0, 1.0)) -> list[float]:
        measured = {slot: {"latency_ms": value} for slot, value in zip((1, 2), latency_ms, strict=True)}
        found = analyse_split(
            forecast, table, table, routers, {}, num_classes=3, bootstrap=Bootstrap(200, objectives, measured)
        )
        return [point.stability for point in found.points]

    by_cost = stability(("top1", "maximize"), ("madds_m", "minimize"))
    assert by_cost[1] == 1.0
    assert 0.4 < by_cost[0] < 0.9  # only where the one image is drawn: 1 - (5/6)^6 = 0.67
    assert stability(("top1", "maximize"), ("madds_m", "minimize"), ("latency_ms", "minimize")) == by_cost
    third = (("top1", "maximize"), ("madds_m", "minimize"), ("latency_ms", "minimize"))
    assert stability(*third, latency_ms=(1.0, 2.0)) == [1.0, 1.0]
    # All sub-networks have top-5 1: the cheaper wins everywhere.
    assert stability(("top5", "maximize"), ("madds_m", "minimize")) == [0.0, 1.0]


def trial(slot: int, kind: str, top1: float, madds_m: float) -> tuple[int, str, dict[str, float]]:
    return slot, kind, {"top1": top1, "madds_m": madds_m}


def test_the_best_trial_within_each_budget_speaks_for_its_kind() -> None:
    # Budgets of a range of 1..5 M: 2, 3, 4 M.
    trials = [
        trial(0, "gate", 0.7, 1.9),
        trial(1, "gate", 0.8, 2.009),  # 0.45 % above 2 M: a step of the calibration
        trial(2, "gate", 0.8, 3.5),  # as good, but dearer
        trial(3, "gate", 0.9, 5.0),  # above every budget
        trial(4, "cascade", 0.6, 2.5),
        trial(5, "cascade", 0.6, 2.5),  # its twin comes first
    ]
    found = budget_picks(trials, np.array([1_000_000, 5_000_000]))
    assert found == (
        BudgetPick("cascade", 0.5, 4),
        BudgetPick("cascade", 0.75, 4),
        BudgetPick("gate", 0.25, 1),
        BudgetPick("gate", 0.5, 1),
        BudgetPick("gate", 0.75, 1),
    )


def test_without_a_trial_there_is_no_pick() -> None:
    assert budget_picks([], np.array([1, 5])) == ()


@pytest.mark.slow
def test_a_kinds_share_is_taken_at_what_its_trial_really_spends() -> None:
    pick = BudgetPick("gate", 0.5, 5)
    found = analysis_of({}, {pick: gate(0, 2)})
    (share,) = found.routers
    (point,) = analysis_of({5: gate(0, 2)}).points
    assert (share.router, share.slot, share.budget_share, share.budget_m) == ("gate", 5, 0.5, 2.5)
    assert share.madds_m == pytest.approx(point.metrics["madds_m"])
    assert share.top1 == point.top1.value
    assert share.gain == point.gain
    assert share.share_of_oracle_gap == point.share_of_oracle_gap
    assert share.reachable_top1 == point.reachable_top1
    assert share.static_top1 is not None
    assert share.gain is not None
    assert share.top1 - share.static_top1 == pytest.approx(share.gain.value)


@pytest.mark.slow
def test_equal_inputs_give_equal_results_and_json_gives_them_back() -> None:
    contenders = {BudgetPick("cascade", 0.25, 4): CascadeRouter(0, 1, 0.5)}
    found = analysis_of({5: gate(0, 2), 9: gate(1, 2)}, contenders)
    assert analysis_of({5: gate(0, 2), 9: gate(1, 2)}, contenders) == found
    assert SplitAnalysis.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))) == found


def test_a_front_without_gates_still_has_its_controls() -> None:
    found = analysis_of({})
    assert found.points == ()
    assert found.class_counts == ()
    assert len(found.cascade_top1) > 10
    assert SplitAnalysis.from_json(json.loads(json.dumps(found.to_json()))) == found


def brute_force_front(values: np.ndarray, signs: tuple[int, ...]) -> set[int]:
    points = values * np.array(signs)
    front = set()
    for i, point in enumerate(points):
        beaten = any((other >= point).all() and (other > point).any() for other in points)
        repeated = any((points[j] == point).all() for j in range(i))
        if not beaten and not repeated:
            front.add(i)
    return front


@given(
    st.lists(st.tuples(*[st.integers(0, 4)] * 3), max_size=14),
    st.tuples(*[st.sampled_from(("maximize", "minimize"))] * 3),
)
def test_front_slots_of_three_objectives_equal_brute_force_and_ties_follow_the_second_and_third(
    points: list[tuple[int, int, int]], goals: tuple[Goal, ...]
) -> None:
    values = np.array(points, dtype=float).reshape(-1, 3)
    signs = np.array([1 if goal == "maximize" else -1 for goal in goals])
    found = front_slots(range(len(points)), values, goals)
    assert set(found) == brute_force_front(values, tuple(signs))
    ranked = [tuple(signs * values[slot]) for slot in found]
    assert ranked == sorted(ranked)


@given(st.integers(1, 60), st.integers(2, 20), st.integers(0, 2**16))
def test_points_over_a_surface_keep_both_ends_the_kept_one_and_the_size(count: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.random((count, 3))
    values = values[np.argsort(values[:, 0])]
    kept = int(rng.integers(count))
    chosen = spread_along_front(values, size, [kept])
    assert list(chosen) == sorted(set(chosen))
    assert {0, kept, count - 1} <= set(chosen)
    assert len(chosen) == min(count, max(size, len({0, kept, count - 1})))
    if size >= 7:
        extremes = {int(find(values[:, column])) for column in range(3) for find in (np.argmin, np.argmax)}
        assert extremes <= set(chosen)


def test_points_over_a_surface_leave_no_part_of_it_far_from_a_chosen_one_whatever_the_units() -> None:
    grid = np.array([(x, y, x * y) for x in range(11) for y in range(11)], dtype=float)
    for units in ([1.0, 1.0, 1.0], [1e-3, 1.0, 1e6]):
        chosen = list(spread_along_front(grid * units, 30))
        scaled = grid / np.ptp(grid, axis=0)
        away = np.linalg.norm(scaled[:, None] - scaled[None, chosen], axis=2).min(axis=1)
        assert away.max() < 0.25  # 30 discs over an area of a little more than 1


GRID = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=0, max_size=12)


@given(GRID, st.sampled_from(list(itertools.permutations(("maximize", "minimize")))))
def test_front_slots_equal_brute_force_and_end_with_the_best_of_the_first_objective(
    points: list[tuple[int, int]], goals: tuple[Goal, Goal]
) -> None:
    values = np.array(points, dtype=float).reshape(-1, 2)
    signs = tuple(1 if goal == "maximize" else -1 for goal in goals)
    slots = [10 + 3 * index for index in range(len(points))]
    found = front_slots(slots, values, goals)
    assert {(slot - 10) // 3 for slot in found} == brute_force_front(values, (signs[0], signs[1]))
    firsts = [signs[0] * values[(slot - 10) // 3, 0] for slot in found]
    assert firsts == sorted(firsts)


@given(st.integers(1, 60), st.integers(2, 20), st.integers(0, 2**16))
def test_points_along_a_front_are_spread_with_both_ends_and_the_kept_one(count: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = np.sort(rng.random((count, 2)), axis=0)
    kept = int(rng.integers(count))
    chosen = spread_along_front(values, size, [kept])
    assert list(chosen) == sorted(set(chosen))
    assert {0, kept, count - 1} <= set(chosen)
    assert len(chosen) <= max(size, 3)
    if count <= size:
        assert chosen == tuple(range(count))


def test_points_along_a_front_are_evenly_far_apart_whatever_the_units() -> None:
    cost = np.linspace(0.0, 1.0, 101)
    values = np.column_stack([1e6 * cost, 1e-3 * cost])
    assert spread_along_front(values, 5) == (0, 25, 50, 75, 100)


@pytest.mark.parametrize(
    ("reachable", "gain", "shown"),
    [
        (0.85, Interval(0.02, 0.01, 0.03), 0.4),
        (0.805, Interval(0.02, 0.01, 0.03), None),  # half a point, known to a point
        (0.85, Interval(0.02, -0.04, 0.08), None),  # five points, known to six
        (0.8104, Interval(0.02, 0.01, 0.03), None),  # [0.0, 2.0] as shown
        (None, Interval(0.02, 0.01, 0.03), None),
    ],
)
def test_a_share_of_a_gap_is_clear_where_the_gap_is_larger_than_its_noise(
    reachable: float | None, gain: Interval, shown: float | None
) -> None:
    own = RouterShare("cascade", 0.5, 20.0, 3, 19.0, 0.82, 0.80, 0.9, reachable, gain, 0.2, 0.4, False)
    assert own.clear_share_of_reachable_gap == shown
    assert replace(own, gain=None).clear_share_of_reachable_gap is None
    oracle = replace(own, oracle_top1=reachable, share_of_oracle_gap=0.4, reachable_top1=None)
    assert oracle.clear_share_of_oracle_gap == shown
