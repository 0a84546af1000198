"""What every router is: it maps the evidence of an image, and what routes that already ran have
said, to the next route."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dsnet.routers.head import Head
from dsnet.space.route_tree import RouteTree

STOP = -1
"""The route that means: enough, answer with what the last executed route said."""


@dataclass(frozen=True)
class Evidence:
    """What a router may read of a batch at one gate."""

    parts: Mapping[str, Tensor]
    """The parts that the router needs, float [B, d] each; names as in
    `dsnet.network.supernet.EVIDENCE_PARTS`."""
    num_images: int
    """B."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    gate: int = 0
    """Which gate decides."""
    route: int = STOP
    """At a gate after the first, one of the router's routes through the node where all images of
    the batch are; nodes have numbers only within one tree, and a router's need not be the
    network's."""

    def same(self, value: int) -> Tensor:
        """One route for all images, int64 [B]."""
        return torch.full((self.num_images,), value, dtype=torch.int64, device=self.device)

    @property
    def no_choice(self) -> Tensor:
        """The margin where there is nothing to decide: inf, float64 [B]."""
        return torch.full((self.num_images,), torch.inf, dtype=torch.float64, device=self.device)

    def __getitem__(self, part: str) -> Tensor:
        return self.parts[part]


@dataclass(frozen=True)
class Executed:
    """What the routes that ran in one round have said, for all images of a batch (rows that ran
    none are not read)."""

    routes: Tensor
    """int64 [B] the route each image ran in this round, or STOP where it ran none."""
    logits: Tensor
    """[B, L] the newest logits of each image; on a routing table the stored half-precision ones."""
    stored: Mapping[str, Tensor] | None = None
    """A routing table's own `confidence`, `margin` and `entropy`, [B] each, where the logits are
    not all there."""

    @cached_property
    def summary(self) -> Mapping[str, Tensor]:
        """Float32 [B] each: `confidence` (largest probability), `margin` (to the second), `entropy`
        (nats)."""
        return summary_of(self.logits) if self.stored is None else self.stored


def summary_of(logits: Tensor) -> dict[str, Tensor]:
    """Largest probability, its lead over the second, and entropy in nats of logits [B, C]; float32
    [B] each."""
    log_p = F.log_softmax(logits.float(), dim=1)
    p = log_p.exp()
    top2 = p.topk(2, dim=1).values
    return {"confidence": top2[:, 0], "margin": top2[:, 0] - top2[:, 1], "entropy": -(p * log_p).sum(1)}


@dataclass(frozen=True, kw_only=True)
class NetworkShape:
    """What a router has to know of a network to be built for it with weights of zero."""

    tree: RouteTree
    num_classes: int
    hidden: tuple[int, ...]
    """For each gate, the length of the hidden vector."""
    rich: tuple[int, ...]
    """For each gate, the length of the richer evidence."""

    @property
    def routes(self) -> tuple[int, ...]:
        """All routes of the tree."""
        return tuple(range(self.tree.num_routes))

    @property
    def no_offset(self) -> Tensor:
        """An offset of zero for each route, float64 [R]."""
        return torch.zeros(self.tree.num_routes, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class CalibratedHead:
    """A trained and calibrated head of a router that decides once, with what its class needs beside
    it."""

    head: Head
    offset: Tensor
    """float64 [R]: beta * cost of each route of the routing space."""
    routes: tuple[int, ...]
    """The routing space."""
    first: int | None
    """The route that runs first, for a kind that reads its answer."""
    num_classes: int
    pooling_madds: int
    """MAdds of the poolings of richer evidence that the attention does not make anyhow."""


class Router(Protocol):
    """Maps evidence to routes, batched (docs/definitions.md, Router)."""

    @property
    def kind(self) -> str:
        """Its name in `gate.router` and in stored files."""
        ...

    @property
    def needs(self) -> tuple[str, ...]:
        """The parts of the evidence that `step` reads."""
        ...

    @property
    def num_gates(self) -> int:
        """It decides at so many gates, from the first on; 1 = once, for the whole route."""
        ...

    @property
    def max_runs(self) -> int:
        """It runs at most so many routes for an image, one after the other; after that many it is
        not asked again."""
        ...

    @property
    def routes(self) -> tuple[int, ...]:
        """Every route that it may run, rising."""
        ...

    def decision_madds(self, routes: Tensor) -> Tensor:
        """MAdds of all its decisions for images that end on `routes` (int64 [B] -> int64 [B])."""
        ...

    def step(self, evidence: Evidence, executed: Sequence[Executed]) -> Tensor:
        """The next route of every image (int64 [B]), or STOP; the first one is never STOP.

        At a gate after the first (`evidence.gate`) the answer is a route through the node of
        `evidence.route`; what earlier gates answered only fixed the path up to here.

        Args:
            evidence: of the gate that asks.
            executed: the rounds that have run, oldest first.
        """
        ...

    @property
    def tie(self) -> float:
        """A `margin` below this is a numerical tie: another processor, or a table's half-precision
        logits, may decide otherwise."""
        ...

    def margin(self, evidence: Evidence, executed: Sequence[Executed]) -> Tensor:
        """By how much all that it reads would have to be off, relatively, for `step` to answer
        otherwise; inf where it has no choice.

        Float64 [B]; to first order, and for errors that are independent of each other. It does not
        depend on the rest of the batch.
        """
        ...

    def over(self, position: Mapping[int, int]) -> Router:
        """The same router over other route ids: `position` maps each of `routes` to its new id."""
        ...

    def facts(self, names: Sequence[str]) -> dict[str, Any]:
        """How it decides, for people: JSON-able facts beside its kind; `names` are those of the
        routes."""
        ...

    def to_arrays(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, JSON values) from which `router_from_arrays` rebuilds it."""
        ...
