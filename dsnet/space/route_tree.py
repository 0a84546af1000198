"""The routes of a set of sub-networks as a decision tree over the gates.

A route is a path through the gates. A *node* of a gate stands for the choices made before it; the
gate then chooses the widths of the channel groups up to the next gate. Routes that agree before a
gate pass the same node and share all computation up to it. This module needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dsnet.space.subnet_set import SubnetSet


@dataclass(frozen=True)
class GateBranches:
    """The nodes of one gate and the choices of the K routes there."""

    node_of: tuple[int, ...]
    """[K] node that each route passes, numbered from 0 in order of first appearance."""
    choice_of: tuple[int, ...]
    """[K] choice of each route: a number that stands for the same widths at every node of the gate;
    narrow widths first."""

    def __post_init__(self) -> None:
        if not self.node_of or len(self.node_of) != len(self.choice_of):
            raise ValueError(
                f"a gate needs a node and a choice for every route, but has {len(self.node_of)} and {len(self.choice_of)}"
            )

    @cached_property
    def num_nodes(self) -> int:
        """Number of nodes of this gate."""
        return max(self.node_of) + 1

    @cached_property
    def num_choices(self) -> int:
        """Number of different choices over all nodes; not every node offers all of them."""
        return max(self.choice_of) + 1

    def first_routes(self, node: int) -> dict[int, int]:
        """Choice -> the first route that takes it at a node, in order of first appearance."""
        found: dict[int, int] = {}
        for route, (met, choice) in enumerate(zip(self.node_of, self.choice_of, strict=True)):
            if met == node:
                found.setdefault(choice, route)
        return found

    def routes_at(self, node: int) -> tuple[int, ...]:
        """The routes that pass a node."""
        return tuple(route for route, met in enumerate(self.node_of) if met == node)


@dataclass(frozen=True)
class RouteTree:
    """The decision tree of all gates of a set, in order; gate 0 has one node."""

    gates: tuple[GateBranches, ...]

    def __post_init__(self) -> None:
        if len({len(gate.node_of) for gate in self.gates}) != 1 or self.gates[0].num_nodes != 1:
            raise ValueError(
                "a tree needs at least one gate, one node at the first, and the same routes at all of them"
            )

    @classmethod
    def of(cls, subnets: SubnetSet) -> RouteTree:
        """The tree of a set's members.

        Raises:
            ValueError: the supernet has no gate, its members differ before the first gate, or two
                of them have the same widths, so that no gate could tell them apart.
        """
        spec = subnets.spec
        if not spec.gates:
            raise ValueError(f"{spec.family} has no gate, so that no router can choose between its sub-networks")
        subnets.prefix_upto(0)
        widths = [subnet.widths for subnet in subnets]
        if len(set(widths)) < len(widths):
            twins = next(name for name in subnets if widths.count(name.widths) > 1)
            raise ValueError(f"sub-network {twins.name!r} has the widths of another one: no gate could tell them apart")
        gates = []
        for number in range(len(spec.gates)):
            start, stop = spec.num_prefix_groups(number), spec.num_prefix_groups(number + 1)
            nodes = _numbered([own[:start] for own in widths])
            kinds = sorted({own[start:stop] for own in widths})
            gates.append(GateBranches(nodes, tuple(kinds.index(own[start:stop]) for own in widths)))
        return cls(tuple(gates))

    @property
    def num_routes(self) -> int:
        """Number of routes, K."""
        return len(self.gates[0].node_of)

    def subset(self, routes: Sequence[int]) -> RouteTree:
        """The tree of some of the routes, renumbered in the order given; choices keep their
        numbers."""
        return RouteTree(
            tuple(
                GateBranches(
                    _numbered([gate.node_of[route] for route in routes]),
                    tuple(gate.choice_of[route] for route in routes),
                )
                for gate in self.gates
            )
        )

    def to_json(self) -> list[dict[str, Any]]:
        """A JSON-able list with one mapping per gate."""
        return [{"node_of": list(gate.node_of), "choice_of": list(gate.choice_of)} for gate in self.gates]

    @classmethod
    def from_json(cls, data: Sequence[Mapping[str, Any]]) -> RouteTree:
        """Rebuild a tree from the result of `to_json`."""
        return cls(tuple(GateBranches(tuple(gate["node_of"]), tuple(gate["choice_of"])) for gate in data))


def _numbered(items: Sequence[Any]) -> tuple[int, ...]:
    """The number of each item; equal items share a number, counted from 0 in order of first
    appearance."""
    numbers: dict[Any, int] = {}
    return tuple(numbers.setdefault(item, len(numbers)) for item in items)
