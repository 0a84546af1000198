"""The router of a static sub-network: it takes the same route for every image, without evidence and
without a decision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64, Int64, Shaped
from torch import Tensor

from dsnet.routers.base import STOP, Evidence, Executed


@dataclass(frozen=True)
class FixedRouter:
    """Run one route and stop."""

    route: int
    """Id of the route in the SubnetSet."""

    kind = "fixed"
    num_gates = 1
    max_runs = 1
    needs = ()
    tie = 1.0

    @property
    def routes(self) -> tuple[int, ...]:
        """The only route."""
        return (self.route,)

    def decision_madds(self, routes: Int64[Tensor, " batch"]) -> Int64[Tensor, " batch"]:
        """Zero: nothing is decided."""
        return torch.zeros_like(routes)

    def step(self, evidence: Evidence, executed: Sequence[Executed]) -> Int64[Tensor, " batch"]:
        """The route, then STOP."""
        return evidence.same(STOP if executed else self.route)

    def margin(self, evidence: Evidence, executed: Sequence[Executed]) -> Float64[Tensor, " batch"]:
        """Infinite: there is no choice, so that no decision is a tie."""
        return evidence.no_choice

    def over(self, position: Mapping[int, int]) -> FixedRouter:
        """The same route under another id."""
        return FixedRouter(position[self.route])

    def to_arrays(self) -> tuple[dict[str, Shaped[Tensor, "*_"]], dict[str, Any]]:
        """No tensors; the route as a JSON value."""
        return {}, {"kind": self.kind, "route": self.route}

    def facts(self, names: Sequence[str]) -> dict[str, Any]:
        """Name of the route."""
        return {"route": names[self.route]}

    @classmethod
    def from_arrays(cls, tensors: Mapping[str, Shaped[Tensor, "*_"]], values: Mapping[str, Any]) -> FixedRouter:
        """Rebuild it."""
        return cls(values["route"])
