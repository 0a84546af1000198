"""Routers: what maps an image's evidence to a route. One interface for gates and cascades (CONTRACTS, Router)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dsnet.cost import gate_madds
from dsnet.errors import CheckpointError

STOP = -1
"""The route that means: enough, answer with what the last executed route said."""


@dataclass(frozen=True)
class Executed:
    """What a route that has run said, for all images of a batch (rows it did not run on are not read)."""

    routes: Tensor
    """[B] the route each image ran in this round, or STOP where it ran none."""
    logits: Tensor
    """[B, C] the newest logits of each image."""


class Router(Protocol):
    """Maps evidence to routes, batched."""

    @property
    def needs(self) -> tuple[str, ...]:
        """The parts of the evidence that `step` reads."""
        ...

    @property
    def decision_madds(self) -> int:
        """MAdds of the decision itself, an image."""
        ...

    def step(self, evidence: Mapping[str, Tensor], executed: Sequence[Executed]) -> Tensor:
        """The next route of every image (int64 [B]), or STOP.

        Args:
            evidence: the parts named in `needs`, [B, ...] each.
            executed: the rounds that have run, oldest first.
        """
        ...

    def to_arrays(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, JSON values) from which `router_from_arrays` rebuilds it."""
        ...


@dataclass(frozen=True)
class GateRouter:
    """The published gate: a bias-free slimming head on the attention's hidden vector; the largest calibrated logit wins (METHODS 4).

    Decisions are taken in float64, from float32 inputs, so that the same hidden vector gives the same route on every path.
    """

    weight: Tensor
    """float64 [R, hidden]: a row per route of the routing space."""
    offset: Tensor
    """float64 [R]: beta * cost, subtracted from the logits (calibration to the target MAdds)."""
    routes: tuple[int, ...]
    """The routing space: ids in the SubnetSet, one per row."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Only the hidden vector."""
        return ("hidden",)

    @property
    def decision_madds(self) -> int:
        """One product with the head."""
        return gate_madds(self.weight.shape[1], self.weight.shape[0])

    def scores(self, hidden: Tensor) -> Tensor:
        """Calibrated logits, float64 [B, R]."""
        device = hidden.device
        return hidden.double() @ self.weight.to(device).T - self.offset.to(device)

    def step(self, evidence: Mapping[str, Tensor], executed: Sequence[Executed]) -> Tensor:
        """Decide once, then stop."""
        hidden = evidence["hidden"]
        if executed:
            return torch.full((len(hidden),), STOP, dtype=torch.int64, device=hidden.device)
        routes = torch.tensor(self.routes, device=hidden.device)
        return routes[self.scores(hidden).argmax(1)]

    def margin(self, hidden: Tensor) -> Tensor:
        """[B] how far the winning score is ahead of the next: near zero the route is a numerical tie."""
        if len(self.routes) == 1:
            return torch.full((len(hidden),), torch.inf, dtype=torch.float64)
        best = self.scores(hidden).topk(2, dim=1).values
        return best[:, 0] - best[:, 1]

    def to_arrays(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weight and offset; the routing space."""
        return {"weight": self.weight, "offset": self.offset}, {"kind": "gate", "routes": list(self.routes)}


@dataclass(frozen=True)
class CascadeRouter:
    """Run the first route; where its largest probability is below the threshold, run the second too (pays for both, trunk once)."""

    first: int
    second: int
    threshold: float
    """In [0, 1]."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Nothing but the first route's answer (the hidden vector only tells the batch's size)."""
        return ("hidden",)

    @property
    def decision_madds(self) -> int:
        """A comparison: none."""
        return 0

    def step(self, evidence: Mapping[str, Tensor], executed: Sequence[Executed]) -> Tensor:
        """First, then second or STOP, then STOP."""
        hidden = evidence["hidden"]
        size = (len(hidden),)
        if not executed:
            return torch.full(size, self.first, dtype=torch.int64, device=hidden.device)
        if len(executed) == 1:
            confident = executed[0].logits.softmax(1).amax(1) >= self.threshold
            return torch.where(confident, STOP, self.second)
        return torch.full(size, STOP, dtype=torch.int64, device=hidden.device)

    def to_arrays(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Three numbers."""
        values = {"kind": "cascade", "first": self.first, "second": self.second, "threshold": self.threshold}
        return {}, values


def _gate(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> Router:
    return GateRouter(tensors["weight"].double(), tensors["offset"].double(), tuple(values["routes"]))


def _cascade(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> Router:
    return CascadeRouter(values["first"], values["second"], values["threshold"])


_KINDS: dict[str, Callable[[Mapping[str, Tensor], Mapping[str, Any]], Router]] = {"gate": _gate, "cascade": _cascade}


def router_from_arrays(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> Router:
    """Rebuild a router.

    Raises:
        CheckpointError: unknown kind or missing parts.
    """
    try:
        return _KINDS[values["kind"]](tensors, values)
    except KeyError as error:
        raise CheckpointError(
            f"the stored router {dict(values)} cannot be rebuilt: {error} is unknown or missing"
        ) from error
