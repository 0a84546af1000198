"""Reproduction of a recorded route: where a router's decision is a numerical tie, the recorded
route is taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float64, Int64, Shaped
from torch import Tensor

from dsnet.routers.base import STOP, Evidence, Executed, Router
from dsnet.space.route_tree import RouteTree


@dataclass(frozen=True)
class Retrace:
    """A router that takes the route `recorded` where the inner router's decision is a tie, and
    otherwise decides like it.

    It holds one route for all images, because a later gate gets only the images at one node,
    without their positions in the batch.
    """

    inner: Router
    recorded: int
    tree: RouteTree
    """The tree of the network or table on which it runs; it says which nodes the recorded route
    passes."""

    @property
    def kind(self) -> str:
        """The inner router's kind."""
        return self.inner.kind

    @property
    def needs(self) -> tuple[str, ...]:
        """The parts of the evidence that the inner router reads."""
        return self.inner.needs

    @property
    def num_gates(self) -> int:
        """Number of gates at which the inner router decides."""
        return self.inner.num_gates

    @property
    def max_runs(self) -> int:
        """Largest number of routes that the inner router runs for an image."""
        return self.inner.max_runs

    @property
    def routes(self) -> tuple[int, ...]:
        """The routes that the inner router may choose."""
        return self.inner.routes

    @property
    def tie(self) -> float:
        """The inner router's margin below which a decision counts as a tie."""
        return self.inner.tie

    def decision_madds(self, routes: Int64[Tensor, " batch"]) -> Int64[Tensor, " batch"]:
        """MAdds of the inner router's decisions."""
        return self.inner.decision_madds(routes)

    def step(self, evidence: Evidence, executed: Sequence[Executed]) -> Int64[Tensor, " batch"]:
        """The inner router's decision, or the recorded route (STOP once it has run) where the
        decision is a tie."""
        chosen = self.inner.step(evidence, executed)
        if not self._is_open(evidence):
            return chosen
        has_run = torch.zeros(evidence.num_images, dtype=torch.bool, device=evidence.device)
        for round_ in executed:
            has_run |= round_.routes == self.recorded
        wanted = torch.where(has_run, STOP, self.recorded)
        return torch.where(self.margin(evidence, executed) < self.tie, wanted, chosen)

    def _is_open(self, evidence: Evidence) -> bool:
        """Whether the recorded route passes the node for which the decision is made."""
        node_of = self.tree.gates[evidence.gate].node_of
        return evidence.gate == 0 or node_of[self.recorded] == node_of[evidence.route]

    def margin(self, evidence: Evidence, executed: Sequence[Executed]) -> Float64[Tensor, " batch"]:
        """The margins of the inner router's decisions."""
        return self.inner.margin(evidence, executed)

    def over(self, position: Mapping[int, int]) -> Retrace:
        """The same router with renumbered routes; the ids must keep the order of the tree."""
        old_ids = sorted(position, key=position.__getitem__)
        return replace(
            self,
            inner=self.inner.over(position),
            recorded=position[self.recorded],
            tree=self.tree.subset(old_ids),
        )

    def facts(self, names: Sequence[str]) -> dict[str, Any]:
        """Facts of the inner router."""
        return self.inner.facts(names)

    def to_arrays(self) -> tuple[dict[str, Shaped[Tensor, "*_"]], dict[str, Any]]:
        """The inner router's arrays and metadata; the recorded route is not included."""
        return self.inner.to_arrays()
