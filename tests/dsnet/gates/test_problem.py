"""The training problem of a router: targets, costs, routing spaces, beams and features, against
loops and brute force."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsnet.gates.problem import (
    Scaling,
    beam,
    costs_of,
    node_features,
    problem_of,
    routing_space,
    sgs_targets,
    stored_answer,
)
from dsnet.gates.settings import GateSettings
from dsnet.routers.cascade import answer_features, num_answer_features
from dsnet.routers.kinds import router_kind
from dsnet.routing.routing_table import RoutingTable
from tests.dsnet.samples import random_table


def looped_targets(table: RoutingTable, routes: tuple[int, ...], gate: GateSettings) -> list[int]:
    """Sandwich gate sparsification image by image.

    It is defined in docs/methods.md, section 5, and docs/definitions.md, Target.
    """
    by_cost = sorted(range(len(routes)), key=lambda column: table.madds[routes[column]])
    smallest, largest = by_cost[0], by_cost[-1]
    targets = []
    for row in range(table.num_images):
        given_up = largest if gate.strategy == "try_best" else smallest
        right = [column for column in by_cost if table.correct1[row, routes[column]]]
        if gate.sgs_target == "cheapest":
            targets.append(routes[right[0] if right else given_up])
            continue
        p_small = float(np.exp(-table.ce[row, routes[smallest]]))
        p_large = float(np.exp(-table.ce[row, routes[largest]]))
        if smallest in right and p_small >= gate.t_easy:
            targets.append(routes[smallest])
        elif largest not in right or p_large < gate.t_hard:
            targets.append(routes[given_up])
        else:
            targets.append(routes[largest])
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


def test_smallest_and_largest_are_by_the_cost_that_is_paid() -> None:
    """A learned cascade's first route is its cheapest, though its tail alone may cost more than
    another's."""
    table = random_table(30, 3)
    paid = np.array([9.0, 1.0, 5.0])
    met = sgs_targets(table, (0, 1, 2), GateSettings(), paid)
    assert met.tolist() == sgs_targets(replace(table, madds=paid.astype(np.int64)), (0, 1, 2), GateSettings()).tolist()
    easy = table.correct1[:, 1]
    assert (met[easy] == 1).all()
    assert (met[~easy] == 0).all()


NO_DECISION = np.zeros(4, dtype=np.int64)


def test_the_target_spans_the_whole_set_and_costs_include_the_decision() -> None:
    table = random_table()  # 1000, 1700, 3800, 7300 MAdds
    costs = costs_of(table, GateSettings(target=0.5), (0, 2, 3), NO_DECISION + 18, None)
    assert costs.madds[[0, 2, 3]].tolist() == [1018.0, 3818.0, 7318.0]
    assert costs.target == 1000 + 0.5 * 6300
    assert not costs.is_clamped
    assert costs.widest == 7300.0


@pytest.mark.parametrize(
    ("routes", "target", "expected", "is_clamped"),
    [
        ((0, 1), 0.9, 1712.0, True),
        ((2, 3), 0.1, 3812.0, True),
        ((1,), 0.5, 1712.0, True),
        ((0, 1, 2, 3), 1.0, 7300.0, False),
        ((0, 1, 2, 3), 0.0, 1012.0, True),  # below the cheapest route and the head itself
    ],
)
def test_a_target_outside_the_routing_space_is_clamped_and_said_so(
    routes: tuple[int, ...], target: float, expected: float, is_clamped: bool
) -> None:
    costs = costs_of(random_table(), GateSettings(target=target), routes, NO_DECISION + 12, None)
    assert (costs.target, costs.is_clamped) == (expected, is_clamped)


def test_a_target_may_be_given_in_madds() -> None:
    table = random_table()
    for million, expected, is_clamped in ((0.002, 2000.0, False), (0.5, 7300.0, True), (0.0001, 1000.0, True)):
        costs = costs_of(table, GateSettings(target=0.9, target_madds_m=million), (0, 1, 2, 3), NO_DECISION, None)
        assert (costs.target, costs.is_clamped) == (pytest.approx(expected), is_clamped)


def test_a_cascade_pays_for_its_first_route_and_for_the_trunk_once() -> None:
    table = random_table()  # a trunk of 500
    costs = costs_of(table, GateSettings(), (1, 2, 3), NO_DECISION + 7, 1)
    assert costs.madds[1:].tolist() == [1707.0, 3807.0 + 1200.0, 7307.0 + 1200.0]


@pytest.mark.parametrize("routes", [(1, 0), (0, 0), (0, 4), (-1, 2)])
def test_a_routing_space_must_be_increasing_ids_of_the_table(routes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"gate\.routing.*must be increasing ids in 0\.\.3"):
        routing_space(random_table(), GateSettings(routes=routes))


def test_an_empty_routing_space_means_all_routes() -> None:
    assert routing_space(random_table(), GateSettings()) == (0, 1, 2, 3)


def below_envelope(table: RoutingTable) -> list[float]:
    """How far each route lies below every chord between two routes that spans its cost, by brute
    force."""
    cost, top1 = table.madds, table.top1()
    depth = [max(top1[cost == cost[k]]) - top1[k] for k in range(table.num_routes)]
    for i, j in combinations(range(table.num_routes), 2):
        low, high = sorted((i, j), key=lambda route: cost[route])
        for k in range(table.num_routes):
            if cost[low] < cost[k] < cost[high]:
                chord = top1[low] + (top1[high] - top1[low]) * (cost[k] - cost[low]) / (cost[high] - cost[low])
                depth[k] = max(depth[k], chord - top1[k])
    return depth


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 500), size=st.integers(2, 9), costs=st.lists(st.integers(5, 12), min_size=8, max_size=8))
def test_a_beam_keeps_both_extremes_and_what_lies_nearest_to_the_envelope(
    seed: int, size: int, costs: list[int]
) -> None:
    table = replace(random_table(20, 8, seed=seed), madds=np.array(costs, dtype=np.int64))
    kept = beam(table, size)
    assert len(kept) == len(set(kept)) == min(size, 8)
    kept_costs = [costs[route] for route in kept]
    assert kept_costs == sorted(kept_costs)
    depth = below_envelope(table)
    extremes = {min(costs), max(costs)}
    assert extremes <= set(kept_costs)
    others = [depth[route] for route in range(8) if route not in kept]
    inner = [depth[route] for route in kept if costs[route] not in extremes]
    if others and inner:
        assert max(inner) <= min(others) + 1e-9


def test_a_beam_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gate\.routing\.beam is 1, but must be at least 2"):
        beam(random_table(), 1)


@pytest.mark.parametrize("is_centred", [False, True])
def test_features_come_out_at_unit_size_and_constant_ones_at_zero(is_centred: bool) -> None:
    features = torch.randn((200, 4), generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-9, 1.0, 30.0, 0.0])
    features += torch.tensor([0.0, 5.0, 0.0, 0.0])
    constant = torch.full((200, 1), 1000.1 if is_centred else 0.0)
    features = torch.cat([features, constant], dim=1)
    scaling = Scaling.of(features, is_centred=is_centred)
    met = scaling.apply(features)
    assert met.square().mean(0)[:3].tolist() == pytest.approx([1.0, 1.0, 1.0], rel=1e-4)
    assert met[:, 3:].tolist() == torch.zeros(200, 2).tolist()
    assert scaling.apply(features + 7.0)[:, 3:].tolist() == torch.zeros(200, 2).tolist()
    assert torch.equal(scaling.mean, torch.zeros(5)) is not is_centred


def test_a_tree_of_decisions_leads_every_route_to_its_own_leaf() -> None:
    table = random_table(10, 27, num_gates=3)
    for kind, num_heads in (("gates", 3), ("evidence_gates", 13)):
        problem = problem_of(table, router_kind(kind))
        assert (len(problem.nodes), problem.num_heads) == (13, num_heads)
        assert {node.head for node in problem.nodes} == set(range(num_heads))
        for route in range(27):
            position = 0
            for gate, branches in enumerate(table.tree.gates):
                node = problem.nodes[position]
                assert (node.gate, node.node) == (gate, branches.node_of[route])
                ends = dict(node.leaves) | dict(node.children)
                position = ends[branches.choice_of[route]]
            assert position == route
        assert sorted(route for routes in problem.routes_behind(problem.nodes[0]).values() for route in routes) == list(
            range(27)
        )


def test_features_are_those_of_the_nodes_and_of_the_first_answer() -> None:
    table = random_table(10, 8, num_gates=3)
    problem = problem_of(table, router_kind("evidence_gates"))
    for node, met in zip(problem.nodes, node_features(table, problem), strict=True):
        parts = [table.part(name, node.gate, node.node) for name in ("mean", "deviation", "maximum", "hidden")]
        np.testing.assert_array_equal(met.numpy(), np.concatenate(parts, axis=1))
    cascade = problem_of(table, router_kind("learned_cascade"), first=2)
    (met,) = node_features(table, cascade)
    size = num_answer_features(table.num_classes)
    assert torch.equal(met[:, :size], answer_features(stored_answer(table, 2), table.num_classes))
    np.testing.assert_array_equal(met[:, size:].numpy(), table.part("hidden"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"router": "gatte"}, r"gate.router is 'gatte'; did you mean 'gate'\? known: gate, "),
        ({"strategy": "give-up"}, r"gate.sgs.strategy is 'give-up'; did you mean 'give_up'\? known: try_best, give_up"),
        ({"sgs_target": "best"}, "gate.sgs.target is 'best'; known"),
        ({"quality_of": "luck"}, "gate.losses.quality_of is 'luck'; known"),
        ({"complexity_form": "cubic"}, "gate.losses.form is 'cubic'; known"),
        ({"optimizer": "lion"}, "gate.optimizer.name is 'lion'; known"),
        ({"target": 1.1}, "gate.target is 1.1, but must be at least 0 and at most 1"),
        ({"target": float("nan")}, "gate.target is nan"),
        ({"target_madds_m": 0.0}, "gate.target_madds_m is 0.0, but must be"),
        ({"target_madds_m": float("inf")}, "gate.target_madds_m is inf, but must be"),
        ({"t_easy": -0.1}, "gate.sgs.t_easy is -0.1"),
        ({"t_hard": 2.0}, "gate.sgs.t_hard is 2.0"),
        ({"temperature_start": -1.0}, "gate.temperature.start is -1.0"),
        ({"temperature_end": 0.0}, "gate.temperature.end is 0.0"),
        ({"steps": 0}, "gate.optimizer.steps is 0, but must be at least 1"),
        ({"batch_size": 0}, "gate.optimizer.batch_size is 0"),
        ({"hidden_units": 0}, "gate.perceptron.hidden_units is 0"),
        ({"lambda_cls": -1.0}, "gate.losses.cls is -1.0"),
        ({"lambda_sgs": float("nan")}, "gate.losses.sgs is nan"),
        ({"lambda_complexity": float("inf")}, "gate.losses.complexity is inf"),
        ({"lambda_quality": -0.5}, "gate.losses.quality is -0.5"),
        ({"lr": 0.0}, r"gate.optimizer.lr is 0.0, but must be above 0 and at most 1e\+06"),
        ({"lr": 1e7}, "gate.optimizer.lr is 10000000.0"),
        ({"weight_decay": -0.1}, "gate.optimizer.weight_decay is -0.1"),
    ],
)
def test_settings_out_of_range_are_refused_with_their_configuration_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GateSettings(**change)


def test_the_temperature_falls_geometrically_from_start_to_end() -> None:
    gate = GateSettings(steps=5, temperature_start=2.0, temperature_end=0.125)
    assert [gate.temperature(step) for step in range(5)] == pytest.approx([2.0, 1.0, 0.5, 0.25, 0.125])
    assert GateSettings(steps=1).temperature(0) == 1.0
