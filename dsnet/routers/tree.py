"""Routers with a gate at every stage: each chooses the widths of the next stage from the features
of the stages before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float64, Int64, Shaped
from torch import Tensor

from dsnet.routers.base import STOP, Evidence, Executed, NetworkShape
from dsnet.routers.gate import RICH_EVIDENCE, ROUNDING_TIE
from dsnet.routers.head import TIMED_UNITS, Head
from dsnet.routers.kinds import RouterKind
from dsnet.space.route_tree import RouteTree


@dataclass(frozen=True)
class GatesRouter:
    """A router with a head at every node of every gate; an image takes the branch with the largest
    calibrated score.

    The published DS-ResNet has one slimming head per gate, on the hidden vector, which all nodes of
    the gate share; with richer evidence, whose length depends on the widths so far, each node has
    its own small perceptron (ours).
    """

    tree: RouteTree
    """Tree of `routes`, in their order."""
    routes: tuple[int, ...]
    """The routing space: a route id per column of the tree."""
    heads: tuple[tuple[Head, ...], ...]
    """[gate][node] heads, which score the choices of the gate in their order; nodes may share one
    head."""
    offsets: tuple[tuple[Float64[Tensor, " _choices"], ...], ...]
    """[gate][node] float64 [choices]: beta * cost of the branch; +inf for a choice that the node
    does not have."""
    needs: tuple[str, ...] = ("hidden",)
    """`("hidden",)` as published, or `RICH_EVIDENCE`."""
    pooling_madds: tuple[tuple[int, ...], ...] = ()
    """[gate][node] MAdds of the poolings that the attention does not compute already; empty if
    there are none."""

    tie = ROUNDING_TIE
    max_runs = 1

    @property
    def kind(self) -> str:
        """`gates`, or `evidence_gates` if it reads richer evidence."""
        return "evidence_gates" if self.needs == RICH_EVIDENCE else "gates"

    @property
    def num_gates(self) -> int:
        """Number of gates, which is that of the network."""
        return len(self.tree.gates)

    def decision_madds(self, routes: Int64[Tensor, " batch"]) -> Int64[Tensor, " batch"]:
        """MAdds of all decisions on the way to each route: heads and poolings of the nodes
        passed."""
        by_route = torch.zeros(max(self.routes) + 1, dtype=torch.int64)
        for column, route in enumerate(self.routes):
            by_route[route] = sum(
                self._node_madds(gate, nodes.node_of[column]) for gate, nodes in enumerate(self.tree.gates)
            )
        return by_route.to(routes.device)[routes]

    def _node_madds(self, gate: int, node: int) -> int:
        pooling = self.pooling_madds[gate][node] if self.pooling_madds else 0
        return self.heads[gate][node].madds + pooling

    @cached_property
    def _column_of(self) -> Mapping[int, int]:
        return {route: column for column, route in enumerate(self.routes)}

    @cached_property
    def _first_routes(self) -> tuple[tuple[Tensor, ...], ...]:
        """[gate][node] int64 [choices]: the first route of each branch; STOP for a choice that the
        node does not have."""
        found = []
        for branches in self.tree.gates:
            firsts = [
                torch.full((branches.num_choices,), STOP, dtype=torch.int64, device="cpu")
                for _ in range(branches.num_nodes)
            ]
            for node, first in enumerate(firsts):
                for choice, column in branches.first_routes(node).items():
                    first[choice] = self.routes[column]
            found.append(tuple(firsts))
        return tuple(found)

    def _node(self, evidence: Evidence) -> int:
        """Node of `evidence` in this router's own tree."""
        return self.tree.gates[evidence.gate].node_of[self._column_of[evidence.route]] if evidence.gate > 0 else 0

    def _features(self, evidence: Evidence) -> Tensor:
        return torch.cat([evidence[part] for part in self.needs], dim=1)

    def step(self, evidence: Evidence, executed: Sequence[Executed]) -> Int64[Tensor, " batch"]:
        """The first route of the best branch (any route of the branch fixes the path up to the next
        gate); STOP once a route has run."""
        if executed:
            return evidence.same(STOP)
        node = self._node(evidence)
        offset = self.offsets[evidence.gate][node].to(evidence.device)
        scores = self.heads[evidence.gate][node](self._features(evidence)) - offset
        return self._first_routes[evidence.gate][node].to(evidence.device)[scores.argmax(1)]

    def margin(self, evidence: Evidence, executed: Sequence[Executed]) -> Float64[Tensor, " batch"]:
        """Lead of the best branch over the second, relative to the errors of the features
        (`Head.lead`)."""
        if executed:
            return evidence.no_choice
        node = self._node(evidence)
        return self.heads[evidence.gate][node].lead(self._features(evidence), self.offsets[evidence.gate][node])

    def over(self, position: Mapping[int, int]) -> GatesRouter:
        """The same gates over other ids."""
        return replace(self, routes=tuple(position[route] for route in self.routes))

    def to_arrays(self) -> tuple[dict[str, Shaped[Tensor, "*_"]], dict[str, Any]]:
        """Heads and offsets by gate and node as tensors, a shared head once; the rest as JSON
        values."""
        tensors: dict[str, Tensor] = {}
        owners: list[list[int]] = []
        for gate, heads in enumerate(self.heads):
            owners.append([])
            for node, head in enumerate(heads):
                owner = next(index for index, other in enumerate(heads) if other is head)
                owners[-1].append(owner)
                if owner == node:
                    tensors |= head.tensors(f"head.{gate}.{node}.")
                tensors[f"offset.{gate}.{node}"] = self.offsets[gate][node]
        values = {
            "kind": self.kind,
            "routes": list(self.routes),
            "tree": self.tree.to_json(),
            "owners": owners,
            "pooling_madds": [list(row) for row in self.pooling_madds],
        }
        return tensors, values

    def facts(self, names: Sequence[str]) -> dict[str, Any]:
        """The number of gates at which it decides."""
        return {"gates": self.num_gates}

    @classmethod
    def untrained(cls, kind: RouterKind, shape: NetworkShape) -> GatesRouter:
        """Gates over all routes with weights of zero, for timing; the nodes of a gate share a
        head."""
        is_rich = kind.head == "perceptron"
        sizes = shape.rich if is_rich else shape.hidden
        units = TIMED_UNITS if is_rich else None
        gates = shape.tree.gates
        heads = [Head.zeros(gate.num_choices, size, units) for gate, size in zip(gates, sizes, strict=True)]
        return cls(
            shape.tree,
            shape.routes,
            tuple((head,) * gate.num_nodes for head, gate in zip(heads, gates, strict=True)),
            tuple((torch.zeros(gate.num_choices, dtype=torch.float64),) * gate.num_nodes for gate in gates),
            RICH_EVIDENCE if is_rich else ("hidden",),
        )

    @classmethod
    def from_arrays(cls, tensors: Mapping[str, Shaped[Tensor, "*_"]], values: Mapping[str, Any]) -> GatesRouter:
        """Rebuild it."""
        heads, offsets = [], []
        for gate, owners in enumerate(values["owners"]):
            own = {owner: Head.from_tensors(tensors, f"head.{gate}.{owner}.") for owner in set(owners)}
            heads.append(tuple(own[owner] for owner in owners))
            offsets.append(tuple(tensors[f"offset.{gate}.{node}"].double() for node in range(len(owners))))
        return cls(
            tree=RouteTree.from_json(values["tree"]),
            routes=tuple(values["routes"]),
            heads=tuple(heads),
            offsets=tuple(offsets),
            needs=("hidden",) if values["kind"] == "gates" else RICH_EVIDENCE,
            pooling_madds=tuple(tuple(row) for row in values["pooling_madds"]),
        )
