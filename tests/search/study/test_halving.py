"""Non-dominated sorting and crowding against brute force, and properties of Pareto halving for any
trials."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.front.pareto import Goal
from search.study.halving import ParetoHalving, crowding_distances, halving_order, pareto_ranks

GOALS: dict[int, tuple[Goal, ...]] = {
    2: ("maximize", "minimize"),
    3: ("maximize", "minimize", "minimize"),
}
Point = tuple[float, ...]


def points_of(num_objectives: int, *, max_size: int = 24, min_size: int = 0) -> st.SearchStrategy[list[Point]]:
    """Few distinct values, so that ties and copies are common."""
    value = st.integers(0, 5).map(float)
    return st.lists(st.tuples(*[value] * num_objectives), max_size=max_size, min_size=min_size)


some_points = st.sampled_from([2, 3]).flatmap(lambda d: st.tuples(st.just(GOALS[d]), points_of(d)))
halvings = st.builds(
    lambda factor, keeps_front: ParetoHalving(factor, (1,), keeps_front), st.integers(2, 5), st.booleans()
)


@st.composite
def rungs(draw: st.DrawFn) -> tuple[tuple[Goal, ...], dict[int, Point], list[Point]]:
    """Goals, candidates by slot, and those that were there before."""
    num_objectives = draw(st.sampled_from([2, 3]))
    candidates = draw(points_of(num_objectives, max_size=10, min_size=1))
    slots = draw(st.permutations(range(len(candidates))))
    return GOALS[num_objectives], dict(zip(slots, candidates, strict=True)), draw(points_of(num_objectives))


def dominates(one: Point, other: Point, goals: Sequence[Goal]) -> bool:
    """By the definition, objective by objective."""
    signed = [(a, b) if goal == "maximize" else (-a, -b) for a, b, goal in zip(one, other, goals, strict=True)]
    return all(a >= b for a, b in signed) and any(a > b for a, b in signed)


# ---- ranks


@pytest.mark.slow
@given(some_points)
@settings(max_examples=200, deadline=None)
def test_ranks_are_the_longest_chain_of_dominating_points(case: tuple[tuple[Goal, ...], list[Point]]) -> None:
    goals, points = case

    def depth(point: Point) -> int:
        return max((1 + depth(other) for other in set(points) if dominates(other, point, goals)), default=0)

    assert pareto_ranks(np.array(points), goals).tolist() == [depth(point) for point in points]


def test_ranks_of_random_points_with_three_objectives_peel_front_after_front() -> None:
    values = np.random.default_rng(0).normal(size=(60, 3))
    ranks = pareto_ranks(values, GOALS[3])
    left = {row: tuple(point) for row, point in enumerate(values.tolist())}
    for rank in range(ranks.max() + 1):
        front = {
            row for row, point in left.items() if not any(dominates(other, point, GOALS[3]) for other in left.values())
        }
        assert set(np.flatnonzero(ranks == rank).tolist()) == front
        left = {row: point for row, point in left.items() if row not in front}
    assert not left


def test_a_nan_has_no_rank() -> None:
    with pytest.raises(ValueError, match="NaN has no Pareto rank"):
        pareto_ranks([(0.5, 1.0), (math.nan, 2.0)], GOALS[2])


# ---- crowding


@pytest.mark.slow
@given(st.sampled_from([2, 3]).flatmap(lambda d: points_of(d, min_size=1)), st.randoms())
@settings(max_examples=150, deadline=None)
def test_the_distance_of_a_point_does_not_depend_on_the_order_of_the_rows(points: list[Point], rng: object) -> None:
    shuffled = list(points)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]

    def by_point(rows: list[Point]) -> dict[Point, float]:
        return dict(zip(rows[::-1], crowding_distances(rows)[::-1].tolist(), strict=True))  # the first copy wins

    assert by_point(points) == by_point(shuffled)


def test_distances_are_the_gaps_between_neighbours_in_shares_of_the_range() -> None:
    points = [(0.0, 0.0), (0.1, 3.0), (0.4, 5.0), (1.0, 10.0)]
    middle = [(0.4 - 0.0) / 1.0 + (5.0 - 0.0) / 10.0, (1.0 - 0.1) / 1.0 + (10.0 - 3.0) / 10.0]
    assert crowding_distances(points).tolist() == pytest.approx([math.inf, *middle, math.inf])


def test_scale_and_direction_of_an_objective_do_not_matter() -> None:
    rng = np.random.default_rng(1)
    points = np.column_stack([np.sort(rng.random(9)), np.sort(rng.random(9))])
    assert np.allclose(crowding_distances(points), crowding_distances(points * [1000.0, -0.001]))


def test_copies_of_a_point_stand_behind_the_first() -> None:
    assert crowding_distances([(1.0, 1.0), (0.0, 0.0), (0.0, 0.0)]).tolist() == [math.inf, math.inf, 0.0]
    assert crowding_distances([(1.0, 1.0)] * 3).tolist() == [math.inf, 0.0, 0.0]
    assert crowding_distances(np.empty((0, 2))).tolist() == []


def test_an_objective_in_which_all_agree_says_nothing() -> None:
    assert crowding_distances([(0.0, 7.0), (0.5, 7.0), (1.0, 7.0)]).tolist() == [math.inf, 1.0, math.inf]


def test_the_order_is_by_rank_then_by_distance_then_as_the_rows_stand() -> None:
    values = [(0.5, 9.0), (0.7, 5.0), (0.6, 4.9), (0.5, 1.0), (0.9, 9.0), (0.4, 2.0)]
    # On the front 3 and 4 are the ends; 1 has the wider gap to its neighbours than 2; 5 and 0 are
    # dominated, in this order.
    ranks = pareto_ranks(values, GOALS[2]).tolist()
    assert ranks == [1, 0, 0, 0, 0, 1]
    assert halving_order(values, GOALS[2]).tolist() == [3, 4, 1, 2, 0, 5]


# ---- the trials that continue


@pytest.mark.slow
@given(rungs(), halvings, st.randoms())
@settings(max_examples=150, deadline=None)
def test_the_order_of_candidates_and_of_earlier_trials_does_not_matter(
    rung: tuple[tuple[Goal, ...], dict[int, Point], list[Point]], halving: ParetoHalving, rng: object
) -> None:
    goals, candidates, earlier = rung
    items, others = list(candidates.items()), list(earlier)
    rng.shuffle(items)  # type: ignore[attr-defined]
    rng.shuffle(others)  # type: ignore[attr-defined]
    assert halving.survivors(candidates, earlier, goals) == halving.survivors(dict(items), others, goals)


@pytest.mark.slow
@given(rungs(), halvings)
@settings(max_examples=200, deadline=None)
def test_nobody_on_the_front_is_pruned_while_the_front_has_room(
    rung: tuple[tuple[Goal, ...], dict[int, Point], list[Point]], halving: ParetoHalving
) -> None:
    goals, candidates, earlier = rung
    everyone = [*candidates.values(), *earlier]
    going_on = halving.survivors(candidates, earlier, goals)
    quota = math.ceil(len(everyone) / halving.factor)
    is_front = {slot: not any(dominates(o, point, goals) for o in everyone) for slot, point in candidates.items()}
    num_front = sum(not any(dominates(o, point, goals) for o in everyone) for point in everyone)
    on_front = {point for point in everyone if not any(dominates(o, point, goals) for o in everyone)}
    if halving.keeps_front:
        quota = max(quota, len(on_front))
        assert on_front <= {*earlier, *(candidates[slot] for slot in going_on)}, "of copies one stands for all"
    if num_front <= quota:
        assert {slot for slot, front in is_front.items() if front} <= going_on
    assert 1 <= len(going_on) <= quota
    assert going_on <= candidates.keys()


@pytest.mark.slow
@given(rungs(), halvings)
@settings(max_examples=200, deadline=None)
def test_who_is_pruned_dominates_nobody_who_goes_on(
    rung: tuple[tuple[Goal, ...], dict[int, Point], list[Point]], halving: ParetoHalving
) -> None:
    goals, candidates, earlier = rung
    going_on = halving.survivors(candidates, earlier, goals)
    for pruned in candidates.keys() - going_on:
        assert not any(dominates(candidates[pruned], candidates[slot], goals) for slot in going_on)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20, unique=True), halvings)
def test_where_one_objective_is_the_same_for_all_the_best_go_on(top1: list[float], halving: ParetoHalving) -> None:
    candidates = {slot: (value, 3.0) for slot, value in enumerate(top1)}
    best = sorted(candidates, key=lambda slot: -top1[slot])[: math.ceil(len(top1) / halving.factor)]
    assert halving.survivors(candidates, [], GOALS[2]) == set(best)


def test_a_cohort_worse_than_all_before_it_sends_its_best_alone() -> None:
    earlier = [(0.9, 1.0 + number) for number in range(20)]
    candidates = {30: (0.1, 50.0), 31: (0.2, 50.0), 32: (0.2, 50.0)}
    assert ParetoHalving(3, (3,)).survivors(candidates, earlier, GOALS[2]) == {31}


def test_a_cohort_better_than_all_before_it_goes_on_as_far_as_there_is_room() -> None:
    earlier = [(0.1, 90.0 + number) for number in range(20)]
    candidates = {slot: (0.5 + 0.05 * slot, 10.0 + slot) for slot in range(8)}
    assert ParetoHalving(3, (3,)).survivors(candidates, earlier, GOALS[2]) == set(range(8))


def test_on_a_crowded_front_both_ends_go_on_or_all_where_the_front_is_kept() -> None:
    candidates = {slot: (0.5 + 0.01 * slot, 10.0 + slot) for slot in range(9)}
    going_on = ParetoHalving(3, (3,), keeps_front=False).survivors(candidates, [], GOALS[2])
    assert going_on > {0, 8}
    assert len(going_on) == 3
    assert ParetoHalving(3, (3,), keeps_front=True).survivors(candidates, [], GOALS[2]) == candidates.keys()


def test_without_candidates_nobody_goes_on() -> None:
    assert ParetoHalving(3, (3,)).survivors({}, [(0.5, 1.0)], GOALS[2]) == frozenset()


@pytest.mark.parametrize("bad", [(math.nan, 1.0), (0.5, math.inf), (0.5,)])
def test_values_that_cannot_be_compared_are_refused(bad: Point) -> None:
    with pytest.raises(ValueError, match=r"has 2 finite objective values; got \("):
        ParetoHalving(3, (3,)).survivors({0: bad, 1: (0.5, 1.0)}, [], GOALS[2])


# ---- rungs


@pytest.mark.parametrize(
    ("factor", "first", "epochs", "rungs"),
    [(3, 3, 30, (3, 9, 27)), (2, 3, 30, (3, 6, 12, 24)), (3, 3, 27, (3, 9)), (4, 1, 2, (1,)), (3, 3, 10, (3, 9))],
)
def test_rungs_multiply_up_to_below_the_full_length(
    factor: int, first: int, epochs: int, rungs: tuple[int, ...]
) -> None:
    assert ParetoHalving.geometric(factor, first, epochs) == ParetoHalving(factor, rungs)


def test_impossible_rules_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"pruner\.first_epochs is 30, but must lie in 1\.\.29.*takes 30 epochs"):
        ParetoHalving.geometric(3, 30, 30)
    with pytest.raises(ValueError, match=r"pruner\.factor is 1"):
        ParetoHalving.geometric(1, 3, 30)
    with pytest.raises(ValueError, match=r"pruner\.factor is 1"):
        ParetoHalving(1, (3,))
    for rungs in ((), (3, 3), (9, 3), (0, 3)):
        with pytest.raises(ValueError, match="must be rising epochs"):
            ParetoHalving(3, rungs)


def test_the_rule_needs_neither_torch_nor_optuna() -> None:
    command = "import sys, search.study.halving; sys.exit(bool({'torch', 'optuna'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0


def test_what_breaks_constraints_stands_behind_what_holds_them_and_the_least_broken_first() -> None:
    candidates = {0: (0.9, 1.0), 1: (0.8, 2.0), 2: (0.7, 3.0), 3: (0.6, 4.0)}
    rule = ParetoHalving(2, (1,))
    goals = ("maximize", "minimize")
    assert rule.survivors(candidates, [], goals) == {0, 1}
    assert rule.survivors(candidates, [], goals, {0: 0.5, 1: 0.1, 2: 0.0, 3: 0.0}) == {2, 3}
    assert rule.survivors(candidates, [], goals, {0: 0.5, 1: 0.1, 2: 0.3, 3: 0.2}) == {1, 3}
    earlier = [(0.5, 5.0), (0.4, 6.0), (0.3, 7.0), (0.2, 8.0)]
    assert rule.survivors(candidates, earlier, goals, dict.fromkeys(candidates, 1.0), [2.0, 2.0, 0.0, 0.0]) == {0, 1}
    assert rule.survivors(candidates, earlier, goals, dict.fromkeys(candidates, 1.0), [0.0] * 4) == {0}
