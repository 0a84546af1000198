"""The interface of routers: a router maps the evidence of an image, and the answers of the routes
that have run, to the next route."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Float64, Int64, Shaped
from torch import Tensor

from dsnet.routers.head import Head
from dsnet.space.route_tree import RouteTree

STOP = -1
"""Value in place of a route: run no further route and answer with the output of the last one."""


@dataclass(frozen=True)
class Evidence:
    """Input features of a router for a batch at one gate."""

    parts: Mapping[str, Float[Tensor, "batch _features"]]
    """The parts that the router needs, float [B, d] each; names as in
    `dsnet.network.supernet.EVIDENCE_PARTS`."""
    num_images: int
    """Number of images, B."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    gate: int = 0
    """Number of the gate that decides."""
    route: int = STOP
    """At a gate after the first, one of the router's routes through the node where all images of
    the batch are. It stands for the node, because nodes have numbers only within one tree, and the
    router's tree may differ from the network's."""

    def same(self, value: int) -> Int64[Tensor, " batch"]:
        """The same route for all images, int64 [B]."""
        return torch.full((self.num_images,), value, dtype=torch.int64, device=self.device)

    @property
    def no_choice(self) -> Float64[Tensor, " batch"]:
        """Margins where there is nothing to decide: inf, float64 [B]."""
        return torch.full((self.num_images,), torch.inf, dtype=torch.float64, device=self.device)

    def __getitem__(self, part: str) -> Float[Tensor, "batch features"]:
        return self.parts[part]


@dataclass(frozen=True)
class Executed:
    """Routes that ran in one round, and their logits, for all images of a batch; rows of images
    that ran no route in it are not used."""

    routes: Int64[Tensor, " batch"]
    """int64 [B]: the route that each image ran in this round, or STOP where it ran none."""
    logits: Float[Tensor, "batch classes"]
    """[B, L]: the latest logits of each image; on a routing table those stored in half
    precision."""
    stored: Mapping[str, Float[Tensor, " batch"]] | None = None
    """`confidence`, `margin` and `entropy` from a routing table, [B] each, because its logits are
    rounded and may be only the largest."""

    @cached_property
    def summary(self) -> Mapping[str, Float[Tensor, " batch"]]:
        """`confidence` (largest probability), `margin` (its lead over the second) and `entropy`
        (nats), float32 [B] each."""
        return summary_of(self.logits) if self.stored is None else self.stored


def summary_of(logits: Float[Tensor, "batch classes"]) -> dict[str, Float32[Tensor, " batch"]]:
    """`confidence` (largest probability), `margin` (its lead over the second) and `entropy` (nats)
    of logits [B, C], float32 [B] each."""
    log_p = F.log_softmax(logits.float(), dim=1)
    p = log_p.exp()
    top2 = p.topk(2, dim=1).values
    return {"confidence": top2[:, 0], "margin": top2[:, 0] - top2[:, 1], "entropy": -(p * log_p).sum(1)}


@dataclass(frozen=True, kw_only=True)
class NetworkShape:
    """Sizes of a network from which an untrained router is built for it."""

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
    def no_offset(self) -> Float64[Tensor, " routes"]:
        """An offset of zero for each route, float64 [R]."""
        return torch.zeros(self.tree.num_routes, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class CalibratedHead:
    """A trained and calibrated head of a router that decides once, with the other facts from which
    its class is built."""

    head: Head
    offset: Float64[Tensor, " routes"]
    """float64 [R]: beta * cost of each route of the routing space."""
    routes: tuple[int, ...]
    """The routing space."""
    first: int | None
    """The route that runs first, for a kind that reads its answer; None for other kinds."""
    num_classes: int
    pooling_madds: int
    """MAdds of the poolings of richer evidence that the attention does not compute already."""


class Router(Protocol):
    """Interface of a router, which maps the evidence of a batch to routes (docs/definitions.md,
    Router)."""

    @property
    def kind(self) -> str:
        """Name of its kind in `gate.router` and in stored files."""
        ...

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the parts of the evidence that `step` reads."""
        ...

    @property
    def num_gates(self) -> int:
        """Number of gates at which it decides, from the first on; 1 = it decides once, for the
        whole route."""
        ...

    @property
    def max_runs(self) -> int:
        """Largest number of routes that it runs for an image, one after the other; after so many
        `step` is not called again."""
        ...

    @property
    def routes(self) -> tuple[int, ...]:
        """All routes that it may run, in increasing order."""
        ...

    def decision_madds(self, routes: Int64[Tensor, " batch"]) -> Int64[Tensor, " batch"]:
        """MAdds of all its decisions for images that end on `routes` (int64 [B] -> int64 [B])."""
        ...

    def step(self, evidence: Evidence, executed: Sequence[Executed]) -> Int64[Tensor, " batch"]:
        """The next route of every image (int64 [B]), or STOP; the first one is never STOP.

        At a gate after the first (`evidence.gate`) the result is a route through the node of
        `evidence.route`; the routes returned at earlier gates only fix the path up to this gate.

        Args:
            evidence: the evidence at the gate that decides.
            executed: the rounds that have run, oldest first.
        """
        ...

    @property
    def tie(self) -> float:
        """Threshold of `margin` below which a decision is a numerical tie: it may differ on another
        processor, or with the half-precision logits of a table."""
        ...

    def margin(self, evidence: Evidence, executed: Sequence[Executed]) -> Float64[Tensor, " batch"]:
        """Error of the router's inputs that would change the result of `step`, compared with
        `tie`; inf where it has no choice.

        Float64 [B]. For a head it is a relative error of all features, to first order, with errors
        that are independent of each other; for a plain cascade, a difference of probability. It
        does not depend on the rest of the batch.
        """
        ...

    def over(self, position: Mapping[int, int]) -> Router:
        """The same router over other route ids: `position` maps each of `routes` to its new id."""
        ...

    def facts(self, names: Sequence[str]) -> dict[str, Any]:
        """Description of how it decides, for reports: JSON-able values beside its kind; `names` are
        those of the routes."""
        ...

    def to_arrays(self) -> tuple[dict[str, Shaped[Tensor, "*_"]], dict[str, Any]]:
        """(tensors, JSON values) from which `router_from_arrays` rebuilds it."""
        ...
