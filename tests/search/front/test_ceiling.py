"""The reachable ceiling: against tables whose best router is known, and the path of routes against
a search for beta."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsnet.routing.routing_table import NUM_TOP_LOGITS, RoutingTable
from search.front.ceiling import RouteForecast, RoutingPath, own_features
from search.front.controls import StaticLine, budgets, oracle_curve
from tests.dsnet.samples import random_table

MADDS = np.array([1000, 1700, 3800, 7300])


def table_of(right: np.ndarray, seed: int, *, is_readable: bool) -> RoutingTable:
    """Four routes of which `right` [N, 4] are; their confidence tells it, or nothing tells
    anything."""
    rng = np.random.default_rng(seed + 100)
    num_images = len(right)
    source = random_table(num_images, 4, seed=seed)
    told = right if is_readable else rng.random(right.shape) < 0.5
    confidence = np.clip(np.where(told, 0.9, 0.5) + 0.05 * rng.random(right.shape), 0, 1).astype(np.float32)
    logits = rng.normal(size=source.logits.shape).astype(np.float16)
    return replace(
        source,
        madds=MADDS,
        correct1=right,
        confidence=confidence,
        margin=(confidence / 2).astype(np.float32),
        entropy=1 - confidence,
        predicted=rng.integers(0, 7, right.shape),
        logits=logits,
    )


def tables(is_readable: bool, num_images: int) -> list[RoutingTable]:
    """Tables of gate, val and test whose routes are right independently, costly ones more often."""
    found = []
    for seed in (1, 2, 3):
        rng = np.random.default_rng(seed)
        right = rng.random((num_images, 4)) < np.array([0.45, 0.6, 0.7, 0.8])
        found.append(table_of(right, seed, is_readable=is_readable))
    return found


@pytest.mark.slow
def test_where_the_logits_tell_which_route_is_right_the_ceiling_is_near_the_oracle() -> None:
    gate, val, test = tables(is_readable=True, num_images=800)
    wanted = budgets(MADDS)
    oracle = oracle_curve(test.correct1, MADDS).at(wanted)
    found = RouteForecast.fit(gate).curve(val, test).at(wanted)
    assert (found <= oracle + 1e-9).all()
    assert found == pytest.approx(oracle, abs=0.01)


@pytest.mark.slow
def test_where_the_logits_tell_nothing_the_ceiling_falls_to_the_static_line() -> None:
    gate, val, test = tables(is_readable=False, num_images=800)
    wanted = budgets(MADDS)
    line = StaticLine.fit(MADDS, val.correct1).value_at(wanted, test.correct1)
    found = RouteForecast.fit(gate).curve(val, test).at(wanted)
    # Three standard errors of a difference of two accuracies of 800 images.
    assert found == pytest.approx(line, abs=3 * (0.5 / 800) ** 0.5)
    assert (found < oracle_curve(test.correct1, MADDS).at(wanted) - 0.1).all()


def test_on_the_split_that_chooses_the_ceiling_is_never_below_the_static_line() -> None:
    gate, val, _ = tables(is_readable=False, num_images=200)
    wanted = np.linspace(MADDS.min(), 2 * MADDS.max(), 50)
    line = StaticLine.fit(MADDS, val.correct1).value_at(wanted, val.correct1)
    curve = RouteForecast.fit(gate).curve(val, val)
    assert (curve.at(wanted) >= line - 1e-12).all()
    assert (np.diff(curve.top1) >= 0).all()


@pytest.mark.slow
def test_fitting_twice_gives_the_same_bits_and_another_seed_does_not() -> None:
    gate = random_table(120, 4)
    first, second, other = (RouteForecast.fit(gate, seed).probabilities(gate) for seed in (0, 0, 5))
    assert (first == second).all()
    assert (first != other).any()


def test_the_labels_of_the_reported_split_do_not_change_any_choice() -> None:
    gate, val, test = random_table(120, 4), random_table(90, 4, seed=1), random_table(90, 4, seed=2)
    forecast = RouteForecast.fit(gate)
    costs = forecast.curve(val, test).madds
    assert (forecast.curve(val, replace(test, correct1=~test.correct1)).madds == costs).all()


def top_logits_only(table: RoutingTable, num_kept: int) -> RoutingTable:
    order = np.argsort(-table.logits.astype(np.float64), axis=2)[:, :, :num_kept]
    return replace(table, logits=np.take_along_axis(table.logits, order, axis=2), logit_classes=order.astype(np.int32))


def test_a_table_that_keeps_all_logits_as_its_largest_has_the_same_own_features() -> None:
    table = random_table(60, 4)
    assert own_features(top_logits_only(table, 7)).numpy() == pytest.approx(own_features(table).numpy(), abs=1e-4)


def test_the_largest_logits_alone_are_enough_for_a_ceiling() -> None:
    gate, val, test = (top_logits_only(random_table(300, 4, seed=seed), 3) for seed in (1, 2, 3))
    assert gate.logits.shape[2] <= NUM_TOP_LOGITS
    wanted = budgets(gate.madds)
    line = StaticLine.fit(gate.madds, val.correct1).value_at(wanted, test.correct1)
    assert (RouteForecast.fit(gate).curve(val, test).at(wanted) > line + 0.02).all()


def test_too_few_images_are_refused_with_their_number() -> None:
    with pytest.raises(ValueError, match="holds 4 images, but must hold at least 5"):
        RouteForecast.fit(random_table(4, 3))


SCORES = st.tuples(st.integers(1, 5), st.integers(1, 4)).flatmap(
    lambda shape: st.tuples(
        st.lists(
            st.lists(st.floats(0, 1, width=16), min_size=shape[1], max_size=shape[1]),
            min_size=shape[0],
            max_size=shape[0],
        ),
        st.lists(st.integers(1, 40), min_size=shape[1], max_size=shape[1], unique=True),
    )
)


@given(SCORES, st.lists(st.floats(0.0001, 1.0), min_size=1, max_size=5))
@settings(max_examples=150, deadline=None)
def test_the_path_stands_where_the_argmax_stands_at_any_beta(
    case: tuple[list[list[float]], list[int]], betas: list[float]
) -> None:
    scores, costs = np.array(case[0]), np.array(case[1], dtype=float)
    correct = np.random.default_rng(0).random(scores.shape) < 0.5
    path = RoutingPath.of(scores, costs)
    # A beta away from every tie of an image's scores: there the argmax is one, whatever the
    # rounding.
    clear = np.array([beta for beta in betas if np.abs(path.slope - beta).min(initial=1.0) > 1e-9])
    madds, top1 = path.run(clear, correct)
    for beta, cost, accuracy in zip(clear, madds, top1, strict=True):
        routes = np.argmax(scores - beta * costs, axis=1)
        assert cost == pytest.approx(costs[routes].mean())
        assert accuracy == pytest.approx(correct[np.arange(len(routes)), routes].mean())


@pytest.mark.parametrize("num_routes", [1, 4])
def test_a_calibrated_beta_spends_the_budget_to_the_last_affordable_move(num_routes: int) -> None:
    rng = np.random.default_rng(4)
    scores, costs = rng.random((50, num_routes)), 10.0 + 7 * np.arange(num_routes) ** 2
    path = RoutingPath.of(scores, costs)
    spent, _ = path.curve(np.zeros(scores.shape, dtype=bool))
    for wanted in np.linspace(costs.min(), costs.max(), 9):
        (beta,) = path.betas_at(np.array([wanted]))
        mean_cost = costs[np.argmax(scores - beta * costs, axis=1)].mean()
        assert mean_cost == pytest.approx(spent[spent <= wanted + 1e-9].max())
