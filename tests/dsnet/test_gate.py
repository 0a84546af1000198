"""Stage II against enumeration and loops."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dsnet.cost import gate_madds
from dsnet.errors import NonFiniteLossError
from dsnet.routers import GateRouter
from dsnet.routing_table import RoutingTable
from dsnet.training.gate import (
    COLLAPSE_SHARE,
    GateSettings,
    calibrated_router,
    choose_routes,
    expected_loss,
    fit_gate,
    gate_data,
    route_costs,
    routing_space,
    score_routes,
    sgs_targets,
    train_gate,
)
from tests.dsnet.samples import random_table

QUICK = GateSettings(steps=40, batch_size=32)


def enumerated_loss(
    logits: NDArray[np.float64], table: RoutingTable, rows: list[int], gate: GateSettings, temperature: float
) -> float:
    """METHODS 5 as sums over images and routes."""
    routes = list(gate.routes)
    head = gate_madds(table.part("hidden").shape[1], len(routes))
    targets = sgs_targets(table, routes, gate)
    cls = sgs = madds = 0.0
    for index, row in enumerate(rows):
        weights = [np.exp(value / temperature) for value in logits[index]]
        for column, route in enumerate(routes):
            p = weights[column] / sum(weights)
            cls += p * float(table.ce[row, route]) / len(rows)
            madds += p * (int(table.madds[route]) + head) / len(rows)
        sgs -= (logits[index][targets[row]] - np.log(sum(np.exp(value) for value in logits[index]))) / len(rows)
    ratio = madds / route_costs(table, gate).target
    cost = {
        "hinge": max(ratio - 1, 0) ** 2,
        "quadratic": (ratio - 1) ** 2,
        "paper": (madds / (1e9 * int(table.madds.max()) / 565.4e6)) ** 2,
        "paper_raw": (madds / 1e9) ** 2,
    }[gate.complexity_form]
    return gate.lambda_cls * cls + gate.lambda_sgs * sgs + gate.lambda_complexity * cost


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("form", ["hinge", "quadratic", "paper", "paper_raw"])
def test_expected_loss_and_its_gradient_equal_enumeration(form: str, temperature: float) -> None:
    table = random_table()
    gate = GateSettings(
        routes=(0, 1, 3), target=0.1, complexity_form=form, lambda_cls=0.7, lambda_sgs=0.4, lambda_complexity=1.5
    )
    costs = route_costs(table, gate)
    rows = [3, 1, 40, 7]
    values = np.random.default_rng(0).normal(size=(4, 3))
    logits = torch.tensor(values, requires_grad=True)
    data = gate_data(table, gate, costs)
    data = replace(data, ce=data.ce.double(), madds=torch.from_numpy(costs.madds / costs.widest))
    loss = expected_loss(logits, data, torch.tensor(rows), gate, costs, temperature)
    loss.backward()
    assert loss.item() == pytest.approx(enumerated_loss(values, table, rows, gate, temperature), rel=1e-6)
    assert logits.grad is not None
    step = 1e-5
    for index, column in product(range(4), range(3)):
        low, high = values.copy(), values.copy()
        low[index, column] -= step
        high[index, column] += step
        slope = enumerated_loss(high, table, rows, gate, temperature) - enumerated_loss(
            low, table, rows, gate, temperature
        )
        assert float(logits.grad[index, column]) == pytest.approx(slope / (2 * step), rel=1e-4, abs=1e-7)


def test_expected_cross_entropy_is_the_mean_over_sampled_routes() -> None:
    table = random_table()
    gate = GateSettings(lambda_sgs=0.0, lambda_complexity=0.0)
    costs = route_costs(table, gate)
    logits = torch.randn((5, 4), generator=torch.Generator().manual_seed(0))
    rows = torch.arange(5)
    met = expected_loss(logits, gate_data(table, gate, costs), rows, gate, costs, 1.0)
    generator = torch.Generator().manual_seed(1)
    drawn = torch.multinomial(logits.softmax(1), 40_000, replacement=True, generator=generator)
    sampled = torch.from_numpy(table.ce[:5].copy()).gather(1, drawn)
    assert float(met) == pytest.approx(float(sampled.mean()), abs=4 * float(sampled.std(1).mean()) / 200)


def looped_targets(table: RoutingTable, routes: tuple[int, ...], gate: GateSettings) -> list[int]:
    """Sandwich gate sparsification image by image, as METHODS 5 and CONTRACTS say it."""
    by_cost = sorted(range(len(routes)), key=lambda column: table.madds[routes[column]])
    smallest, largest = by_cost[0], by_cost[-1]
    targets = []
    for row in range(table.num_images):
        given_up = largest if gate.strategy == "try_best" else smallest
        right = [column for column in by_cost if table.correct1[row, routes[column]]]
        if gate.sgs_target == "cheapest":
            targets.append(right[0] if right else given_up)
            continue
        p_small = float(np.exp(-table.ce[row, routes[smallest]]))
        p_large = float(np.exp(-table.ce[row, routes[largest]]))
        if smallest in right and p_small >= gate.t_easy:
            targets.append(smallest)
        elif largest not in right or p_large < gate.t_hard:
            targets.append(given_up)
        else:
            targets.append(largest)
    return targets


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 50),
    routes=st.sets(st.integers(0, 4), min_size=1).map(lambda ids: tuple(sorted(ids))),
    t_easy=st.sampled_from([0.0, 0.2, 0.55, 0.9, 1.0]),
    t_hard=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    strategy=st.sampled_from(["try_best", "give_up"]),
    target=st.sampled_from(["extremes", "cheapest"]),
    is_shuffled=st.booleans(),
)
def test_sgs_targets_equal_a_loop_over_images(
    seed: int, routes: tuple[int, ...], t_easy: float, t_hard: float, strategy: str, target: str, is_shuffled: bool
) -> None:
    table = random_table(25, 5, seed=seed)
    if is_shuffled:  # declared order is not the order of cost
        table = replace(table, madds=np.random.default_rng(seed).permutation(table.madds))
    gate = GateSettings(t_easy=t_easy, t_hard=t_hard, strategy=strategy, sgs_target=target)
    assert sgs_targets(table, routes, gate).tolist() == looped_targets(table, routes, gate)


def test_thresholds_are_inclusive_where_the_contract_says_so() -> None:
    """Easy iff p_S(y) >= t_easy, hard iff p_L(y) < t_hard: equality is easy, and is not hard."""
    table = random_table(40)
    row = int(np.flatnonzero(table.correct1[:, 0] & table.correct1[:, 3])[0])
    p_small, p_large = (float(np.exp(-table.ce[row, route])) for route in (0, 3))
    equal = GateSettings(t_easy=p_small, strategy="give_up")
    above = replace(equal, t_easy=float(np.nextafter(np.float32(p_small), np.float32(2.0))))
    assert sgs_targets(table, range(4), equal)[row] == 0
    assert sgs_targets(table, range(4), above)[row] == 3
    not_hard = replace(above, t_hard=p_large)
    hard = replace(above, t_hard=float(np.nextafter(np.float32(p_large), np.float32(2.0))))
    assert sgs_targets(table, range(4), not_hard)[row] == 3
    assert sgs_targets(table, range(4), hard)[row] == 0


def test_costs_include_the_decision_and_the_target_spans_the_whole_set() -> None:
    table = random_table()  # 1000, 1700, 3800, 7300 MAdds, 6 hidden
    costs = route_costs(table, GateSettings(routes=(0, 2, 3), target=0.5))
    assert costs.decision == 18
    assert costs.madds.tolist() == [1018.0, 3818.0, 7318.0]
    assert costs.target == 1000 + 0.5 * 6300
    assert not costs.is_clamped
    assert costs.widest == 7300.0


@pytest.mark.parametrize(
    ("routes", "target", "expected", "is_clamped"),
    [
        ((0, 1), 0.9, 1712.0, True),
        ((2, 3), 0.1, 3812.0, True),
        ((1,), 0.5, 1706.0, True),
        ((0, 1, 2, 3), 1.0, 7300.0, False),
        ((0, 1, 2, 3), 0.0, 1024.0, True),  # below the cheapest route and the head itself
    ],
)
def test_a_target_outside_the_routing_space_is_clamped_and_said_so(
    routes: tuple[int, ...], target: float, expected: float, is_clamped: bool
) -> None:
    costs = route_costs(random_table(), GateSettings(routes=routes, target=target))
    assert (costs.target, costs.is_clamped) == (expected, is_clamped)


@pytest.mark.parametrize("routes", [(1, 0), (0, 0), (0, 4), (-1, 2)])
def test_a_routing_space_must_be_increasing_ids_of_the_table(routes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be increasing ids in 0\.\.3"):
        routing_space(random_table(), GateSettings(routes=routes))


def test_an_empty_routing_space_means_all_routes() -> None:
    assert routing_space(random_table(), GateSettings()) == (0, 1, 2, 3)


def test_scores_equal_a_loop() -> None:
    table = random_table()
    routes = np.random.default_rng(0).integers(0, 3, table.num_images)
    met = score_routes(routes, table, 24)
    picked = [
        (table.correct1[i, k], table.correct5[i, k], table.ce[i, k], table.madds[k] + 24) for i, k in enumerate(routes)
    ]
    shares = [np.mean(routes == k) for k in range(3)]
    assert met["top1"] == pytest.approx(np.mean([row[0] for row in picked]))
    assert met["top5"] == pytest.approx(np.mean([row[1] for row in picked]))
    assert met["ce"] == pytest.approx(np.mean([row[2] for row in picked]), rel=1e-6)
    assert met["madds_m"] == pytest.approx(np.mean([row[3] for row in picked]) / 1e6)
    assert met["p95_madds_m"] == pytest.approx(np.percentile([row[3] for row in picked], 95) / 1e6)
    assert met["route_entropy"] == pytest.approx(-sum(share * np.log(share) for share in shares))
    assert met["max_route_share"] == max(shares)


def test_one_route_for_all_scores_as_that_sub_network() -> None:
    table = random_table()
    met = score_routes(np.full(table.num_images, 2), table, 0)
    assert met["top1"] == table.top1()[2]
    assert met["madds_m"] == table.madds[2] / 1e6
    assert met["route_entropy"] == 0.0
    assert met["max_route_share"] == 1.0


def test_equal_seeds_give_bit_equal_gates_and_others_do_not() -> None:
    table = random_table(200)
    first, second = train_gate(table, QUICK), train_gate(table, QUICK)
    assert torch.equal(first, second)
    assert first.dtype == torch.float64
    assert not torch.equal(first, train_gate(table, replace(QUICK, seed=1)))


def test_training_neither_reads_nor_moves_the_global_generator() -> None:
    before = torch.random.get_rng_state()
    train_gate(random_table(), QUICK)
    assert torch.equal(before, torch.random.get_rng_state())


def test_training_lowers_the_expected_loss() -> None:
    table = random_table(300)
    gate = replace(QUICK, steps=150, temperature_end=1.0)
    costs = route_costs(table, gate)
    data = gate_data(table, gate, costs)
    rows = torch.arange(300)
    weight = train_gate(table, gate)
    raw = torch.from_numpy(table.part("hidden").copy()).double()
    trained = expected_loss((raw @ weight.T).float(), data, rows, gate, costs, 1.0)
    untrained = expected_loss(torch.zeros(300, 4), data, rows, gate, costs, 1.0)
    assert float(trained) < 0.95 * float(untrained)


def test_scaling_the_evidence_folds_exactly_into_the_head() -> None:
    table = random_table(100)
    scaled = replace(table, evidence=table.evidence * np.float32(8.0))
    weight, scaled_weight = train_gate(table, QUICK), train_gate(scaled, QUICK)
    assert torch.equal(weight, scaled_weight * 8.0)
    first, _ = calibrated_router(weight, table, QUICK)
    second, _ = calibrated_router(scaled_weight, scaled, QUICK)
    np.testing.assert_array_equal(choose_routes(first, table), choose_routes(second, scaled))


def test_a_dead_hidden_channel_does_no_harm() -> None:
    table = random_table(100)
    table.evidence[:, :, 2] = 0.0
    assert torch.isfinite(train_gate(table, QUICK)).all()


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_non_finite_loss_is_an_error_that_says_what_to_lower(optimizer: str) -> None:
    table = random_table()
    with pytest.raises(NonFiniteLossError, match=r"gate\.optimizer\.lr \(now 2e\+37\)"):
        train_gate(table, replace(QUICK, optimizer=optimizer, lr=2e37))
    table.ce[0, 0] = np.nan
    with pytest.raises(NonFiniteLossError, match="loss is nan at step"):
        train_gate(table, replace(QUICK, batch_size=60))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown gate optimizer 'lion'"):
        train_gate(random_table(), replace(QUICK, optimizer="lion"))
    with pytest.raises(ValueError, match="unknown complexity form"):
        train_gate(random_table(), replace(QUICK, complexity_form="cubic"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategy": "give-up"}, "unknown gate.sgs.strategy 'give-up'; known: try_best, give_up"),
        ({"sgs_target": "best"}, "unknown gate.sgs.target 'best'"),
        ({"target": 1.1}, "gate.target is 1.1, but must lie in 0..1"),
        ({"temperature_end": 0.0}, "gate.temperature must be above 0"),
    ],
)
def test_settings_out_of_range_are_refused_when_built(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GateSettings(**change)


def test_a_fitted_gate_reaches_its_target_and_reports_the_soft_hard_gap() -> None:
    gate_table, val_table = random_table(300, seed=1), random_table(400, seed=2, split="val")
    gate = replace(QUICK, target=0.3)
    result = fit_gate(gate_table, val_table, gate)
    again = fit_gate(gate_table, val_table, gate)
    assert again.metrics == result.metrics
    assert torch.equal(again.router.weight, result.router.weight)
    routes = choose_routes(result.router, val_table)
    assert result.metrics["madds_m"] == pytest.approx(result.metrics["target_madds_m"], rel=0.02)
    assert result.metrics["top1"] == pytest.approx(val_table.correct1[np.arange(400), routes].mean())
    assert result.histogram.tolist() == [np.mean(routes == k) for k in range(4)]
    scores = result.router.scores(torch.from_numpy(val_table.part("hidden").copy())).numpy() / gate.temperature_end
    p = np.exp(scores - scores.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    assert result.metrics["soft_top1"] == pytest.approx((p * val_table.correct1).sum(1).mean())
    assert result.metrics["soft_madds_m"] == pytest.approx((p @ (val_table.madds + 24)).mean() / 1e6)
    assert result.metrics["target_clamped"] == 0.0


def test_a_fitted_gate_uses_only_its_routing_space() -> None:
    result = fit_gate(random_table(200), random_table(200, seed=5), replace(QUICK, routes=(1, 3), target=0.6))
    assert result.router.routes == (1, 3)
    assert result.histogram[[0, 2]].tolist() == [0.0, 0.0]
    assert result.router.decision_madds == 12


def test_a_single_route_is_a_static_network_with_a_head() -> None:
    table = random_table(50)
    result = fit_gate(table, table, replace(QUICK, routes=(2,)))
    assert result.metrics["top1"] == table.top1()[2]
    assert result.metrics["beta"] == 0.0
    assert result.metrics["target_clamped"] == 1.0


def test_a_gate_that_sees_nothing_collapses_and_its_share_says_so() -> None:
    table = random_table(80)
    table.evidence[:] = 0.0
    result = fit_gate(table, table, QUICK)
    assert result.metrics["max_route_share"] == 1.0 > COLLAPSE_SHARE
    assert result.metrics["route_entropy"] == 0.0


def test_the_calibrated_router_decides_as_the_calibration_did() -> None:
    table = random_table(120)
    weight = torch.randn((4, 6), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    router, beta = calibrated_router(weight, table, GateSettings(target=0.4))
    assert isinstance(router, GateRouter)
    cost = (table.madds + 24) / (table.madds.max() + 24)
    scores = table.part("hidden").astype(np.float64) @ weight.numpy().T
    np.testing.assert_array_equal(choose_routes(router, table), np.argmax(scores - beta * cost, axis=1))
