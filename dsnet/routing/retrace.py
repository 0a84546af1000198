"""Taking a recorded route again: where a router's own decision is a numerical tie, what was recorded decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dsnet.routers.base import STOP, Evidence, Executed, Router
from dsnet.space.route_tree import RouteTree


@dataclass(frozen=True)
class Retrace:
    """A router that ends on `recorded` wherever rounding alone speaks against it; its clear decisions stay.

    It holds one route for all images, because a later gate is asked for the images at one node, and not told which those are.
    """

    inner: Router
    recorded: int
    tree: RouteTree
    """Of the network or table that it runs on: tells which nodes the recorded route passes."""

    @property
    def kind(self) -> str:
        """The inner router's."""
        return self.inner.kind

    @property
    def needs(self) -> tuple[str, ...]:
        """The inner router's."""
        return self.inner.needs

    @property
    def num_gates(self) -> int:
        """The inner router's."""
        return self.inner.num_gates

    @property
    def max_runs(self) -> int:
        """The inner router's."""
        return self.inner.max_runs

    @property
    def routes(self) -> tuple[int, ...]:
        """The inner router's."""
        return self.inner.routes

    @property
    def tie(self) -> float:
        """The inner router's."""
        return self.inner.tie

    def decision_madds(self, routes: Tensor) -> Tensor:
        """The inner router's."""
        return self.inner.decision_madds(routes)

    def step(self, evidence: Evidence, executed: Sequence[Executed]) -> Tensor:
        """The inner router's answer, or the recorded route (STOP once that has run) where its margin is a tie."""
        chosen = self.inner.step(evidence, executed)
        if not self._is_open(evidence):
            return chosen
        has_run = torch.zeros(evidence.num_images, dtype=torch.bool, device=evidence.device)
        for round_ in executed:
            has_run |= round_.routes == self.recorded
        wanted = torch.where(has_run, STOP, self.recorded)
        return torch.where(self.margin(evidence, executed) < self.tie, wanted, chosen)

    def _is_open(self, evidence: Evidence) -> bool:
        """Whether the recorded route passes the node that asks."""
        node_of = self.tree.gates[evidence.gate].node_of
        return evidence.gate == 0 or node_of[self.recorded] == node_of[evidence.route]

    def margin(self, evidence: Evidence, executed: Sequence[Executed]) -> Tensor:
        """The inner router's."""
        return self.inner.margin(evidence, executed)

    def over(self, position: Mapping[int, int]) -> Retrace:
        """The same over other route ids; the new ids must keep the order of the tree's routes."""
        old_ids = sorted(position, key=position.__getitem__)
        return replace(
            self,
            inner=self.inner.over(position),
            recorded=position[self.recorded],
            tree=self.tree.subset(old_ids),
        )

    def facts(self, names: Sequence[str]) -> dict[str, Any]:
        """Those of the router."""
        return self.inner.facts(names)

    def to_arrays(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The inner router's: what was recorded is no part of it."""
        return self.inner.to_arrays()
