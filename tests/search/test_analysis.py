"""What a front is worth on a split: against hand computation and brute force."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsnet.routers import GateRouter
from dsnet.routing_table import RoutingTable
from search.analysis import SplitAnalysis, analyse_split, front_slots
from tests.dsnet.samples import random_table

MADDS = np.array([1_000_000, 2_000_000, 4_000_000])
TRUNK = 500_000
HIDDEN = np.array([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 2.0], [0.0, 3.0]])
CORRECT = np.array([[1, 1, 1], [1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 1, 1], [0, 0, 0]], dtype=bool)
LABELS = np.array([0, 1, 2, 0, 1, 2])


def table_of(**changes: Any) -> RoutingTable:
    """Six images, three routes, three classes; the hidden vector tells the first three from the last three."""
    source = random_table(6, 3, hidden=2)
    confidence = np.where(CORRECT, 0.9, 0.4).astype(np.float32)
    fields = {
        "labels": LABELS,
        "madds": MADDS,
        "trunk_madds": TRUNK,
        "correct1": CORRECT,
        "correct5": np.ones_like(CORRECT),
        "confidence": confidence,
        "evidence": HIDDEN.astype(np.float32)[:, None, :],
        "layout": {"hidden": (0, 2)},
    }
    return replace(source, **{**fields, **changes})


def gate(*routes: int) -> GateRouter:
    """Sends the first three images to its first route and the last three to its second."""
    return GateRouter(torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), routes)


def analysis_of(routers: dict[int, GateRouter]) -> SplitAnalysis:
    table = table_of()
    return analyse_split(table, table, routers, num_classes=3, num_resamples=200)


def test_a_point_is_what_one_computes_by_hand() -> None:
    router = gate(0, 2)
    found = analysis_of({5: router})
    (point,) = found.points
    # Routes 0 0 0 2 2 2: right are images 0, 1, 3, 4.
    assert point.slot == 5
    assert point.top1.value == pytest.approx(4 / 6)
    assert point.metrics["top1"] == pytest.approx(4 / 6)
    madds_m = (1 + 4) / 2 + router.decision_madds / 1e6
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
    # The oracle: 1 M for all, then images 2 and 4 to route 1 (+1 M each), image 3 to route 2 (+3 M): 5 of 6 at 11/6 M.
    assert point.oracle_top1 == pytest.approx(5 / 6)
    assert point.share_of_oracle_gap == pytest.approx((4 / 6 - static) / (5 / 6 - static))
    assert point.stability == 1.0


def test_the_split_as_a_whole_is_what_one_computes_by_hand() -> None:
    found = analysis_of({5: gate(0, 2), 9: gate(1, 2)})
    assert found.num_images == 6
    assert found.static_madds_m == (1.0, 2.0, 4.0)
    assert [interval.value for interval in found.static_top1] == pytest.approx([2 / 6, 4 / 6, 5 / 6])
    assert found.line_madds_m == (1.0, 2.0, 4.0)
    assert found.line_top1 == pytest.approx((2 / 6, 4 / 6, 5 / 6))
    assert found.budgets_m == pytest.approx((1.75, 2.5, 3.25))
    # [gate][class][route]: class 0 holds images 0 and 3, one on each of the gate's routes, and so on.
    assert found.class_counts[0] == ((1, 0, 1),) * 3
    assert found.class_counts[1] == ((0, 1, 1),) * 3
    assert found.oracle_top1[-1] == pytest.approx(5 / 6)
    assert found.oracle_madds_m[-1] == pytest.approx((6 + 1 + 1 + 3) / 6)


def test_the_cascade_beside_a_point_spends_no_more_than_the_point() -> None:
    found = analysis_of({5: gate(0, 2)})
    (point,) = found.points
    # Confidence tells right from wrong here: 0 -> 1 escalates 4 images at 1.5 M each: 2 M a mean, right like route 1 or better.
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
    assert point.metrics["madds_m"] == pytest.approx(1.0 + router.decision_madds / 1e6)
    assert point.gain is not None
    assert point.gain.value < 0


def test_intervals_hold_their_values_and_shrink_with_more_images() -> None:
    widths = []
    for num_images in (50, 800):
        table = random_table(num_images, 3, split="val", hidden=4)
        router = GateRouter(torch.randn(3, 4, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), (0, 1, 2))
        found = analyse_split(table, table, {0: router}, num_classes=7, num_resamples=300)
        for interval in (found.points[0].top1, *found.static_top1):
            assert interval.low <= interval.value <= interval.high
        widths.append(found.points[0].top1.high - found.points[0].top1.low)
    assert widths[1] < widths[0] / 2


def test_equal_inputs_give_equal_results_and_json_gives_them_back() -> None:
    found = analysis_of({5: gate(0, 2), 9: gate(1, 2)})
    assert analysis_of({5: gate(0, 2), 9: gate(1, 2)}) == found
    assert SplitAnalysis.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))) == found


def test_a_front_without_gates_still_has_its_controls() -> None:
    found = analysis_of({})
    assert found.points == ()
    assert found.class_counts == ()
    assert len(found.cascade_top1) > 10
    assert SplitAnalysis.from_json(json.loads(json.dumps(found.to_json()))) == found


def brute_force_front(values: np.ndarray, signs: tuple[int, int]) -> set[int]:
    points = values * np.array(signs)
    front = set()
    for i, point in enumerate(points):
        beaten = any((other >= point).all() and (other > point).any() for other in points)
        repeated = any((points[j] == point).all() for j in range(i))
        if not beaten and not repeated:
            front.add(i)
    return front


GRID = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=0, max_size=12)


@given(GRID, st.sampled_from(list(itertools.permutations(("maximize", "minimize")))))
def test_front_slots_equal_brute_force_and_end_with_the_best_of_the_first_objective(
    points: list[tuple[int, int]], goals: tuple[str, str]
) -> None:
    values = np.array(points, dtype=float).reshape(-1, 2)
    signs = tuple(1 if goal == "maximize" else -1 for goal in goals)
    slots = [10 + 3 * index for index in range(len(points))]
    found = front_slots(slots, values, goals)
    assert {(slot - 10) // 3 for slot in found} == brute_force_front(values, (signs[0], signs[1]))
    firsts = [signs[0] * values[(slot - 10) // 3, 0] for slot in found]
    assert firsts == sorted(firsts)
