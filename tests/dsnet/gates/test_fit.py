"""Stage II as a whole: decisions of trained, calibrated routers against known optima, targets and
independent sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsnet.errors import NonFiniteLossError
from dsnet.gates.fit import GateFit, best_pair, calibrate_heads, fit_gate, fit_gates, score_run
from dsnet.gates.settings import COLLAPSE_SHARE, GateSettings
from dsnet.routers.cascade import CascadeRouter, LearnedCascadeRouter
from dsnet.routers.gate import GateRouter
from dsnet.routers.tree import GatesRouter
from dsnet.routing.routing_table import GateColumns, RoutingTable
from dsnet.routing.table_routing import run_on_table
from dsnet.routing.table_run import TableRun
from tests.dsnet.samples import ROUTER_KINDS, random_head, random_table

QUICK = GateSettings(steps=40, batch_size=32, hidden_units=5)
TRAINED = ("gate", "evidence_gate", "gates", "evidence_gates", "learned_cascade")
ONCE = ("gate", "evidence_gate", "learned_cascade")
"""Kinds of router that are trained and decide once."""


def with_hidden(table: RoutingTable, hidden: np.ndarray[Any, Any]) -> RoutingTable:
    """The table with the same hidden vector at every node."""
    evidence = table.evidence.copy()
    for gate in table.gates:
        for layout in gate.layouts:
            start, stop = layout["hidden"]
            evidence[:, start:stop] = hidden
    return replace(table, evidence=evidence)


def telling_table(seed: int, *, is_monotone: bool, easy_share: float = 0.0) -> RoutingTable:
    """240 images by 8 routes: each image has one cheapest right route, which the hidden vector
    names; wider ones are right too, or none is.

    The confidence of every route tells exactly whether it is right.
    """
    num_images, num_routes = 240, 8
    table = random_table(num_images, num_routes, seed=seed, hidden=num_routes, num_gates=3)
    rng = np.random.default_rng(seed + 100)
    wanted = rng.integers(0, num_routes, num_images) * (rng.random(num_images) >= easy_share)
    routes = np.arange(num_routes)
    correct = routes >= wanted[:, None] if is_monotone else routes == wanted[:, None]
    table = with_hidden(table, np.eye(num_routes, dtype=np.float32)[wanted])
    spread = np.linspace(0.0, 0.1, num_images, dtype=np.float32)[:, None]  # no two images are alike
    confidence = np.where(correct, 0.9, 0.4).astype(np.float32) + spread
    ce = np.where(correct, 0.1, 3.0).astype(np.float32)
    logits = table.logits.copy()
    logits[:, :, 0] = np.where(correct, 8.0, -8.0)
    return replace(table, correct1=correct, ce=ce, confidence=confidence, logits=logits)


def wanted_routes(table: RoutingTable) -> np.ndarray[Any, Any]:
    return table.correct1.argmax(1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gate", "evidence_gate", "gates", "evidence_gates"])
@pytest.mark.parametrize("loss", ["cls", "quality", "sgs"])
def test_a_gate_that_is_told_the_right_route_takes_it(kind: str, loss: str) -> None:
    gate, val = telling_table(1, is_monotone=False), telling_table(2, is_monotone=False)
    target = float(val.madds[wanted_routes(val)].mean())
    weights: dict[str, Any] = {f"lambda_{name}": float(name == loss) for name in ("cls", "sgs", "quality")}
    own = replace(
        QUICK,
        router=kind,
        sgs_target="cheapest",
        lambda_complexity=0.0,
        lr=0.05,
        steps=150,
        batch_size=80,
        hidden_units=20,
        **weights,
    )
    probe = fit_gate(gate, val, own)
    decision = float(probe.router.decision_madds(torch.from_numpy(wanted_routes(val))).double().mean())
    fit = fit_gate(gate, val, replace(own, target_madds_m=(target + decision) / 1e6))
    assert fit.metrics["top1"] >= 0.97
    assert fit.metrics["madds_m"] == pytest.approx((target + decision) / 1e6, rel=0.02)


def test_a_learned_cascade_that_is_told_the_right_route_runs_it_next() -> None:
    space = (0, 5, 7)
    gate, val = (telling_table(seed, is_monotone=True, easy_share=0.5) for seed in (1, 2))
    cheapest = np.array(space)[val.correct1[:, list(space)].argmax(1)]
    head = 12 * (3 + 6 + 7 + 8) + 12 * 3
    tails = np.where(cheapest > 0, val.madds[cheapest] - val.trunk_madds, 0)
    target = float(val.madds[0] + head + tails.mean())
    own = replace(QUICK, router="learned_cascade", sgs_target="cheapest", routes=space, hidden_units=12)
    fit = fit_gate(gate, val, replace(own, target_madds_m=target / 1e6, steps=200, batch_size=120))
    assert isinstance(fit.router, LearnedCascadeRouter)
    assert fit.router.first == 0
    assert fit.router.head.madds == head
    assert fit.metrics["top1"] >= 0.97
    assert np.mean(fit.run.routes == cheapest) >= 0.97


def test_a_cascade_whose_confidence_is_right_goes_on_exactly_where_it_was_wrong() -> None:
    gate, val = telling_table(1, is_monotone=True), telling_table(2, is_monotone=True)
    wrong = ~val.correct1[:, 0]
    target = float(val.madds[0] + wrong.mean() * (val.madds[7] - val.trunk_madds))
    fit = fit_gate(gate, val, replace(QUICK, router="cascade", target_madds_m=target / 1e6))
    router = fit.router
    assert isinstance(router, CascadeRouter)
    assert (router.first, router.second) == (0, 7)
    np.testing.assert_array_equal(fit.run.ran[:, 7], wrong)
    assert fit.metrics["top1"] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gate", "evidence_gate", "gates"])
def test_evidence_that_is_noise_leaves_a_gate_on_the_static_line(kind: str) -> None:
    tables = []
    for seed in (1, 2):
        table = random_table(1500, 4, seed=seed)
        order = np.random.default_rng(seed).permutation(1500)
        tables.append(replace(table, evidence=table.evidence[order]))
    gate, val = tables
    own = replace(QUICK, router=kind, lambda_cls=0.0, lambda_sgs=0.0, lambda_quality=1.0, steps=150, batch_size=500)
    for target in (0.2, 0.6):
        fit = fit_gate(gate, val, replace(own, target=target))
        static = np.interp(fit.metrics["madds_m"] * 1e6, val.madds, val.top1())
        assert fit.metrics["top1"] == pytest.approx(static, abs=4 * 0.5 / 1500**0.5)


def test_equal_evidence_for_all_collapses_and_the_share_says_so() -> None:
    table = random_table(80)
    table.evidence[:] = 0.0
    metrics = fit_gate(table, table, QUICK).metrics
    assert metrics["max_route_share"] == 1.0 > COLLAPSE_SHARE
    assert metrics["route_entropy"] == 0.0


def step_size(fit: GateFit, table: RoutingTable) -> float:
    """The most that one image can move the mean cost, in MAdds."""
    decisions = fit.router.decision_madds(torch.arange(table.num_routes)).numpy()
    dearest = table.madds.max() + table.madds.max() + decisions.max()
    return float(dearest - table.madds.min()) / table.num_images


@pytest.mark.slow
@pytest.mark.parametrize("num_gates", [1, 3])
@pytest.mark.parametrize("kind", ROUTER_KINDS)
def test_the_mean_cost_on_val_meets_the_target_to_a_step_and_is_what_the_table_run_counts(
    kind: str, num_gates: int
) -> None:
    gate, val = (random_table(150, 8, seed=seed, num_gates=num_gates) for seed in (1, 2))
    lanes = [
        replace(QUICK, router=kind, target=target, routes=routes, hidden_units=24, lr=0.01)
        for target in (0.1, 0.3, 0.62)
        for routes in ((), (0, 1, 3, 6, 7))
    ]
    for fit in fit_gates(gate, val, lanes):
        assert isinstance(fit, GateFit), fit
        again = run_on_table(fit.router, val)
        assert fit.metrics["madds_m"] == again.madds.mean() / 1e6
        np.testing.assert_array_equal(fit.run.routes, again.routes)
        off = abs(fit.metrics["madds_m"] - fit.metrics["target_madds_m"]) * 1e6
        assert off <= 0.5 * step_size(fit, val)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ONCE)
def test_no_other_price_brings_a_router_that_decides_once_nearer_to_its_target(kind: str) -> None:
    gate, val = (random_table(60, 4, seed=seed) for seed in (1, 2))
    fit = fit_gate(gate, val, replace(QUICK, router=kind, target=0.45))
    target = fit.metrics["target_madds_m"] * 1e6
    router: Any = fit.router
    cost = (router.offset / fit.metrics["beta"]).numpy()
    for beta in np.linspace(-20, 20, 801):
        other = run_on_table(replace(router, offset=torch.from_numpy(beta * cost)), val)
        assert abs(other.madds.mean() - target) >= abs(fit.run.madds.mean() - target) - 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gates", "evidence_gates"])
def test_no_other_price_brings_gates_nearer_to_their_target_by_more_than_an_image(kind: str) -> None:
    """Few hidden units leave many images alike, which then move together: the nearest step may be
    far, but it is found."""
    gate, val = (random_table(100, 8, seed=seed, num_gates=3) for seed in (1, 2))
    for target in (0.1, 0.5):
        fit = fit_gate(gate, val, replace(QUICK, router=kind, target=target))
        router: Any = fit.router
        for beta in np.linspace(-10, 10, 201):
            offsets = tuple(tuple(own * (beta / fit.metrics["beta"]) for own in row) for row in router.offsets)
            other = run_on_table(replace(router, offsets=offsets), val)
            nearer = abs(fit.run.madds.mean() - target_of(fit)) - abs(other.madds.mean() - target_of(fit))
            assert nearer <= step_size(fit, val)


def target_of(fit: GateFit) -> float:
    """The target in MAdds."""
    return fit.metrics["target_madds_m"] * 1e6


@pytest.mark.parametrize(
    ("kind", "num_gates"), [("gate", 1), ("evidence_gate", 1), ("gates", 3), ("learned_cascade", 1)]
)
def test_the_soft_metrics_are_the_expectation_under_the_deployed_scores(kind: str, num_gates: int) -> None:
    gate, val = (random_table(70, 8, seed=seed, num_gates=num_gates) for seed in (1, 2))
    fit = fit_gate(gate, val, replace(QUICK, router=kind, routes=(0, 1, 3, 5, 6), target=0.3, temperature_end=0.5))
    top1 = madds = 0.0
    for image in range(val.num_images):
        for route, p in path_probabilities(fit, val, image).items():
            top1 += p * bool(val.correct1[image, route]) / val.num_images
            madds += p * ending_cost(fit, val, route) / val.num_images
    assert fit.metrics["soft_top1"] == pytest.approx(top1)
    assert fit.metrics["soft_madds_m"] == pytest.approx(madds / 1e6)


def ending_cost(fit: GateFit, table: RoutingTable, route: int) -> float:
    """MAdds of an image that ends on a route."""
    total = float(table.madds[route]) + int(fit.router.decision_madds(torch.tensor([route]))[0])
    if isinstance(fit.router, LearnedCascadeRouter) and route != fit.router.first:
        total += float(table.madds[fit.router.first]) - table.trunk_madds
    return total


def path_probabilities(fit: GateFit, table: RoutingTable, image: int) -> dict[int, float]:
    """Probability of each route if every decision drew from the softmax of its calibrated scores at
    temperature 0.5."""
    router: Any = fit.router
    if isinstance(router, GatesRouter):
        result = dict.fromkeys(router.routes, 1.0)
        for number, gate in enumerate(router.tree.gates):
            for column, route in enumerate(router.routes):
                whole = table.tree.gates[number].node_of[route]
                x = torch.from_numpy(table.part("hidden", number, whole)[image : image + 1])
                scores = router.heads[number][gate.node_of[column]](x) - router.offsets[number][gate.node_of[column]]
                result[route] *= float((scores[0] / 0.5).softmax(0)[gate.choice_of[column]])
        return result
    if isinstance(router, GateRouter):
        scores = router.scores(torch.from_numpy(table.part("hidden")[image : image + 1]))
    else:
        parts = {name: torch.from_numpy(table.part(name)[image : image + 1]) for name in router.needs}
        x = torch.cat([parts[name] for name in router.needs], dim=1)
        if isinstance(router, LearnedCascadeRouter):
            x = torch.cat([cascade_features(table, router.first, image), x], dim=1)
        scores = router.head(x) - router.offset
    return dict(zip(router.routes, (scores[0] / 0.5).softmax(0).tolist(), strict=True))


def cascade_features(table: RoutingTable, first: int, image: int) -> torch.Tensor:
    logits = torch.from_numpy(table.logits[image, first]).float()
    ranked = logits.sort(descending=True).values
    summary = [float(getattr(table, name)[image, first]) for name in ("confidence", "margin", "entropy")]
    return torch.cat([torch.tensor(summary), ranked[1:] - ranked[0], logits - logits.mean()])[None]


def test_scores_equal_a_loop() -> None:
    table = random_table()
    fit = fit_gate(table, table, replace(QUICK, target=0.4))
    met = score_run(fit.run, table)
    picked = [
        (table.correct1[i, k], table.correct5[i, k], table.ce[i, k], table.madds[k] + 24)
        for i, k in enumerate(fit.run.routes)
    ]
    shares = [np.mean(fit.run.routes == k) for k in range(4)]
    assert met["top1"] == pytest.approx(np.mean([row[0] for row in picked]))
    assert met["top5"] == pytest.approx(np.mean([row[1] for row in picked]))
    assert met["ce"] == pytest.approx(np.mean([row[2] for row in picked]), rel=1e-6)
    assert met["madds_m"] == pytest.approx(np.mean([row[3] for row in picked]) / 1e6)
    assert met["p95_madds_m"] == pytest.approx(np.percentile([row[3] for row in picked], 95) / 1e6)
    assert met["route_entropy"] == pytest.approx(-sum(share * np.log(share) for share in shares if share))
    assert met["max_route_share"] == max(shares)
    assert {name: fit.metrics[name] for name in met} == met


def test_one_route_for_all_scores_as_that_sub_network() -> None:
    table = random_table()
    routes, zeros = np.full(60, 2), np.zeros(60)
    ran = np.zeros((60, 4), dtype=bool)
    met = score_run(TableRun(routes, ran, table.madds[routes], zeros > 0, zeros), table)
    assert (met["top1"], met["madds_m"]) == (table.top1()[2], table.madds[2] / 1e6)
    assert (met["route_entropy"], met["max_route_share"]) == (0.0, 1.0)


@pytest.mark.parametrize("kind", ["gate", "evidence_gate", "gates", "evidence_gates"])
def test_a_single_route_is_a_static_network_with_a_head(kind: str) -> None:
    table = random_table(50, 8, num_gates=3)
    fit = fit_gate(table, table, replace(QUICK, router=kind, routes=(2,)))
    assert fit.metrics["top1"] == table.top1()[2]
    assert fit.metrics["beta"] == 0.0
    assert fit.metrics["target_clamped"] == 1.0
    assert fit.run.histogram.tolist() == [0, 0, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("kind", ROUTER_KINDS)
def test_a_fitted_router_uses_only_its_routing_space(kind: str) -> None:
    gate, val = (random_table(100, 8, seed=seed, num_gates=3) for seed in (1, 2))
    fit = fit_gate(gate, val, replace(QUICK, router=kind, routes=(1, 3, 6), target=0.4))
    assert set(fit.router.routes) <= {1, 3, 6}
    assert fit.run.runs[[0, 2, 4, 5, 7]].tolist() == [0.0] * 5


@pytest.mark.parametrize("kind", ["cascade", "learned_cascade"])
def test_a_cascade_of_one_route_is_refused_alone(kind: str) -> None:
    table = random_table()
    single = replace(QUICK, router=kind, routes=(2,))
    fits = fit_gates(table, table, [QUICK, single, replace(QUICK, router=kind)])
    assert [type(fit) for fit in fits] == [GateFit, ValueError, GateFit]
    assert "two routes of different cost, but gate.routing leaves [2]; widen it" in str(fits[1])
    with pytest.raises(ValueError, match="two routes"):
        fit_gate(table, table, single)


def test_impossible_routes_fail_alone_with_their_key() -> None:
    table = random_table()
    fits = fit_gates(table, table, [replace(QUICK, routes=(0, 9)), QUICK])
    assert "gate.routing" in str(fits[0])
    assert isinstance(fits[1], GateFit)


def test_a_table_without_poolings_at_later_gates_refuses_the_routers_that_read_them_and_no_others() -> None:
    table = random_table(40, 8, num_gates=3)
    bare = tuple(
        GateColumns(tuple({"hidden": layout["hidden"]} for layout in gate.layouts), gate.pooling_madds)
        for gate in table.gates[1:]
    )
    start = table.gates[-1].layouts[-1]["hidden"][1]
    table = replace(table, gates=(table.gates[0], *bare), evidence=table.evidence[:, :start])
    fits = dict(
        zip(ROUTER_KINDS, fit_gates(table, table, [replace(QUICK, router=k) for k in ROUTER_KINDS]), strict=True)
    )
    assert isinstance(fits["evidence_gates"], ValueError)
    assert "holds no mean at gate 1" in str(fits["evidence_gates"])
    assert all(isinstance(fits[kind], GateFit) for kind in ROUTER_KINDS if kind != "evidence_gates")


@pytest.mark.parametrize("kind", TRAINED)
def test_a_loss_that_is_nan_is_an_error_that_says_what_to_lower(kind: str) -> None:
    table = random_table(60, 8, num_gates=3)
    broken = replace(table, ce=np.full_like(table.ce, np.nan))
    with pytest.raises(NonFiniteLossError, match=r"gate\.optimizer\.lr \(now 0\.05\)"):
        fit_gate(broken, table, replace(QUICK, router=kind))


def test_scaling_the_evidence_folds_exactly_into_the_head() -> None:
    table = random_table(100)
    scaled = replace(table, evidence=table.evidence * np.float32(8.0))
    first, second = fit_gate(table, table, QUICK), fit_gate(scaled, scaled, QUICK)
    assert isinstance(first.router, GateRouter)
    assert isinstance(second.router, GateRouter)
    assert torch.equal(first.router.weight, second.router.weight * 8.0)
    np.testing.assert_array_equal(first.run.routes, second.run.routes)


@pytest.mark.parametrize("kind", TRAINED)
def test_features_that_are_dead_on_the_gate_split_count_for_nothing_on_val(kind: str) -> None:
    gate, val = (random_table(80, 8, seed=seed, num_gates=3) for seed in (1, 2))
    columns = [layout[part][0] for own in gate.gates for layout in own.layouts for part in ("hidden", "mean")]
    dead = gate.evidence.copy()
    dead[:, columns] = 0.0
    other = val.evidence.copy()
    other[:, columns] += 100.0
    own = replace(QUICK, router=kind)
    fits = [fit_gate(replace(gate, evidence=dead), replace(val, evidence=e), own) for e in (val.evidence, other)]
    np.testing.assert_array_equal(fits[0].run.routes, fits[1].run.routes)


def right_answers(table: RoutingTable, first: int, second: int, target: float) -> int:
    """Number of right answers of a cascade that sends on as many images as the target allows, the
    least confident first."""
    share = min(max((target - table.madds[first]) / (table.madds[second] - table.trunk_madds), 0.0), 1.0)
    order = sorted(range(table.num_images), key=lambda image: table.confidence[image, first])
    going = set(order[: round(share * table.num_images)])
    return sum(int(table.correct1[image, second if image in going else first]) for image in range(table.num_images))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 200),
    target=st.floats(900.0, 9000.0),
    routes=st.sets(st.integers(0, 4), min_size=2).map(sorted),
    is_shuffled=st.booleans(),
)
def test_the_chosen_pair_has_the_most_right_answers_of_all_pairs(
    seed: int, target: float, routes: Sequence[int], is_shuffled: bool
) -> None:
    table = random_table(20, 5, seed=seed)
    if is_shuffled:
        table = replace(table, madds=np.random.default_rng(seed).permutation(table.madds))
    target = max(target, float(table.madds[list(routes)].min()))  # as a clamped one
    pairs = [(a, b) for a in routes for b in routes if table.madds[a] < table.madds[b] and table.madds[a] <= target]
    first, second = best_pair(table, routes, target)
    assert (first, second) in pairs
    assert right_answers(table, first, second, target) == max(right_answers(table, *pair, target) for pair in pairs)


def test_heads_trained_elsewhere_are_calibrated_and_scored_as_any_others() -> None:
    val = random_table(90, 8, num_gates=3)
    generator = torch.Generator().manual_seed(0)
    flat = random_head(generator, 6, 3).weight
    fit = calibrate_heads(val, replace(QUICK, routes=(1, 4, 6), target=0.4), [flat])
    assert isinstance(fit.router, GateRouter)
    assert torch.equal(fit.router.weight, flat)
    stages = [random_head(generator, 6, 2).weight for _ in range(3)]
    tree = calibrate_heads(val, replace(QUICK, router="gates", target=0.4), stages)
    assert isinstance(tree.router, GatesRouter)
    assert all(
        torch.equal(head.weight, own) for own, heads in zip(stages, tree.router.heads, strict=True) for head in heads
    )
    for own in (fit, tree):
        assert own.metrics["madds_m"] == pytest.approx(own.metrics["target_madds_m"], rel=0.05)
    with pytest.raises(NonFiniteLossError):
        calibrate_heads(val, replace(QUICK, routes=(1, 4, 6)), [flat * torch.nan])
    with pytest.raises(ValueError, match="cannot be trained end to end; use gate or gates"):
        calibrate_heads(val, replace(QUICK, router="cascade"), [flat])
