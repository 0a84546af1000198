"""The tree of routes against the widths of the sub-networks that it stands for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsnet.families import layout
from dsnet.space.route_tree import GateBranches, RouteTree
from dsnet.space.spec import Subnet
from dsnet.space.subnet_set import SubnetSet
from tests.dsnet.cases import CASES, Case
from tests.dsnet.samples import THREE_GATES, random_tree, small_set, task

THREE_RATIOS = (0.5, 0.75, 1.0)


def three_gates(**options: Any) -> SubnetSet:
    return layout("ds_resnet", task(), {**THREE_GATES, "width": 1.0, **options})


def between_gates(subnets: SubnetSet, route: int, gate: int) -> tuple[int, ...]:
    """The widths that a gate chooses."""
    spec = subnets.spec
    return subnets[route].widths[spec.num_prefix_groups(gate) : spec.num_prefix_groups(gate + 1)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nodes_are_prefixes_and_choices_are_what_follows(case: Case) -> None:
    subnets = case.subnets()
    tree = RouteTree.of(subnets)
    assert tree.num_routes == len(subnets)
    assert len(tree.gates) == len(subnets.spec.gates)
    for number, gate in enumerate(tree.gates):
        prefix = subnets.spec.num_prefix_groups(number)
        for one in range(len(subnets)):
            for other in range(len(subnets)):
                is_same_node = subnets[one].widths[:prefix] == subnets[other].widths[:prefix]
                assert (gate.node_of[one] == gate.node_of[other]) == is_same_node
                own, others = between_gates(subnets, one, number), between_gates(subnets, other, number)
                assert (gate.choice_of[one] < gate.choice_of[other]) == (own < others)
        assert sorted(set(gate.node_of), key=gate.node_of.index) == list(range(gate.num_nodes))
        assert set(gate.choice_of) == set(range(gate.num_choices))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_route_is_found_by_walking_its_choices(case: Case) -> None:
    tree = RouteTree.of(case.subnets())
    for route in range(tree.num_routes):
        left = set(range(tree.num_routes))
        for gate in tree.gates:
            assert left == set(gate.routes_at(gate.node_of[route]))
            left = {other for other in left if gate.choice_of[other] == gate.choice_of[route]}
        assert left == {route}


def test_all_paths_are_a_full_tree() -> None:
    tree = RouteTree.of(three_gates())
    assert [gate.num_nodes for gate in tree.gates] == [1, 2, 4]
    assert [gate.num_choices for gate in tree.gates] == [2, 2, 2]
    assert tree == random_tree(8, 3)


def test_uniform_paths_decide_at_the_first_gate_and_then_have_no_choice() -> None:
    tree = RouteTree.of(three_gates(paths="uniform", ratios=THREE_RATIOS))
    assert [gate.node_of for gate in tree.gates] == [(0, 0, 0), (0, 1, 2), (0, 1, 2)]
    assert [gate.choice_of for gate in tree.gates] == [(0, 1, 2)] * 3


def test_a_list_of_paths_numbers_nodes_as_they_appear_and_choices_by_width() -> None:
    tree = RouteTree.of(three_gates(paths=[[1, 1, 0], [0, 1, 1], [1, 0, 1], [1, 1, 1]]))
    assert [gate.node_of for gate in tree.gates] == [(0, 0, 0, 0), (0, 1, 0, 0), (0, 1, 2, 0)]
    assert [gate.choice_of for gate in tree.gates] == [(1, 0, 1, 1), (1, 1, 0, 1), (0, 1, 1, 1)]


def test_one_gate_has_one_node_and_a_choice_per_route() -> None:
    subnets = small_set("ds_mbnet")
    assert RouteTree.of(subnets) == RouteTree((GateBranches((0,) * len(subnets), tuple(range(len(subnets)))),))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_tree_survives_json(case: Case) -> None:
    tree = RouteTree.of(case.subnets())
    assert RouteTree.from_json(json.loads(json.dumps(tree.to_json()))) == tree


@given(st.data())
def test_a_subset_keeps_what_nodes_and_choices_mean(data: st.DataObject) -> None:
    subnets = three_gates(ratios=THREE_RATIOS)
    tree = RouteTree.of(subnets)
    kept = data.draw(st.lists(st.sampled_from(range(len(subnets))), min_size=1, unique=True))
    small = tree.subset(kept)
    fresh = RouteTree.of(subnets.subset(kept))
    for gate, own, new in zip(tree.gates, small.gates, fresh.gates, strict=True):
        assert own.choice_of == tuple(gate.choice_of[route] for route in kept)
        assert own.node_of == new.node_of


def twins() -> SubnetSet:
    subnets = small_set("ds_tiny")
    return SubnetSet(subnets.spec, (*subnets.members, Subnet("twin", subnets[1].widths)))


def without_gates() -> SubnetSet:
    subnets = small_set("ds_tiny")
    return SubnetSet(replace(subnets.spec, gates=()), subnets.members)


def parting_before_the_gate() -> SubnetSet:
    subnets = small_set("ds_tiny")
    first, *rest = subnets[0].widths
    return SubnetSet(subnets.spec, (*subnets.members, Subnet("early", (first - 1, *rest))))


@pytest.mark.parametrize(
    ("subnets", "message"),
    [
        (twins(), r"has the widths of another one"),
        (without_gates(), "ds_tiny has no gate"),
        (parting_before_the_gate(), "must agree on the .* channel groups before gate"),
    ],
)
def test_a_set_that_no_gate_can_choose_from_is_refused(subnets: SubnetSet, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RouteTree.of(subnets)


@pytest.mark.parametrize(
    "data",
    [
        [],
        [{"node_of": [], "choice_of": []}],
        [{"node_of": [0, 0], "choice_of": [0]}],
        [{"node_of": [0, 1], "choice_of": [0, 1]}],
        [{"node_of": [0, 0], "choice_of": [0, 1]}, {"node_of": [0], "choice_of": [0]}],
    ],
)
def test_gates_that_do_not_fit_each_other_are_refused(data: list[Mapping[str, Any]]) -> None:
    with pytest.raises(ValueError, match="needs"):
        RouteTree.from_json(data)
