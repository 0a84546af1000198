"""Gates that decide once, before the rest of the network has run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Float64, Int64, Shaped
from torch import Tensor

from dsnet.routers.base import STOP, CalibratedHead, Evidence, Executed, NetworkShape
from dsnet.routers.head import TIMED_UNITS, Head
from dsnet.routers.kinds import RouterKind
from dsnet.space.cost import gate_madds

ROUNDING_TIE = 1e-5
"""Relative difference of float32 features between processors and batch sizes."""


@dataclass(frozen=True)
class GateRouter:
    """The published gate: a bias-free slimming head on the attention's hidden vector; the largest
    calibrated logit wins.

    It is described in docs/methods.md, section 4. Decisions are computed in float64 from float32
    inputs, so that the same hidden vector gives the same route wherever it is evaluated.
    """

    weight: Float64[Tensor, "routes hidden"]
    """float64 [R, hidden]: a row per route of the routing space."""
    offset: Float64[Tensor, " routes"]
    """float64 [R]: beta * cost, subtracted from the logits (calibration to the target MAdds)."""
    routes: tuple[int, ...]
    """The routing space: ids in the SubnetSet, one per row."""

    kind = "gate"
    num_gates = 1
    max_runs = 1
    tie = ROUNDING_TIE

    @cached_property
    def _route_ids(self) -> Tensor:
        return torch.tensor(self.routes, device="cpu")  # whatever the default device is

    @property
    def needs(self) -> tuple[str, ...]:
        """Only the hidden vector."""
        return ("hidden",)

    def decision_madds(self, routes: Int64[Tensor, " batch"]) -> Int64[Tensor, " batch"]:
        """MAdds of the head, the same for every route."""
        return torch.full_like(routes, gate_madds(self.weight.shape[1], self.weight.shape[0]))

    def scores(self, hidden: Float[Tensor, "batch hidden"]) -> Float64[Tensor, "batch routes"]:
        """Calibrated logits, float64 [B, R]."""
        device = hidden.device
        return hidden.double() @ self.weight.to(device).T - self.offset.to(device)

    def step(self, evidence: Evidence, executed: Sequence[Executed]) -> Int64[Tensor, " batch"]:
        """Decide once, then stop."""
        if executed:
            return evidence.same(STOP)
        return self._route_ids.to(evidence.device)[self.scores(evidence["hidden"]).argmax(1)]

    def margin(self, evidence: Evidence, executed: Sequence[Executed]) -> Float64[Tensor, " batch"]:
        """Lead of the best score over the second, relative to the errors of the features
        (`Head.lead`)."""
        if executed:
            return evidence.no_choice
        return Head(self.weight).lead(evidence["hidden"], self.offset)

    def over(self, position: Mapping[int, int]) -> GateRouter:
        """The same gate over other ids."""
        return replace(self, routes=tuple(position[route] for route in self.routes))

    def to_arrays(self) -> tuple[dict[str, Shaped[Tensor, "*_"]], dict[str, Any]]:
        """Weight and offset as tensors; the routing space as a JSON value."""
        return {"weight": self.weight, "offset": self.offset}, {"kind": self.kind, "routes": list(self.routes)}

    def facts(self, names: Sequence[str]) -> dict[str, Any]:
        """The number of gates at which it decides."""
        return {"gates": self.num_gates}

    @classmethod
    def from_head(cls, trained: CalibratedHead) -> GateRouter:
        """Build it from a trained linear head."""
        return cls(trained.head.weight, trained.offset, trained.routes)

    @classmethod
    def untrained(cls, kind: RouterKind, shape: NetworkShape) -> GateRouter:
        """A gate over all routes with weights of zero, for timing."""
        head = Head.zeros(shape.tree.num_routes, shape.hidden[0])
        return cls(head.weight, shape.no_offset, shape.routes)

    @classmethod
    def from_arrays(cls, tensors: Mapping[str, Shaped[Tensor, "*_"]], values: Mapping[str, Any]) -> GateRouter:
        """Rebuild it."""
        return cls(tensors["weight"].double(), tensors["offset"].double(), tuple(values["routes"]))


RICH_EVIDENCE = ("mean", "deviation", "maximum", "hidden")
"""Parts of the evidence that a gate with richer evidence reads: three poolings of the gate's input,
and the hidden vector."""


@dataclass(frozen=True)
class EvidenceGateRouter:
    """A gate at the published place with richer evidence: mean, deviation and maximum of each
    channel and the hidden vector are the input of a small perceptron (ours)."""

    head: Head
    """Head on the concatenated parts of `RICH_EVIDENCE`."""
    offset: Float64[Tensor, " routes"]
    """float64 [R]: beta * cost, subtracted from the scores."""
    routes: tuple[int, ...]
    pooling_madds: int
    """MAdds of the poolings that the attention does not compute already: deviation and maximum."""

    kind = "evidence_gate"
    num_gates = 1
    max_runs = 1
    tie = ROUNDING_TIE
    needs = RICH_EVIDENCE

    def decision_madds(self, routes: Int64[Tensor, " batch"]) -> Int64[Tensor, " batch"]:
        """MAdds of poolings and head, the same for every route."""
        return torch.full_like(routes, self.pooling_madds + self.head.madds)

    def _features(self, evidence: Evidence) -> Tensor:
        return torch.cat([evidence[part] for part in self.needs], dim=1)

    def step(self, evidence: Evidence, executed: Sequence[Executed]) -> Int64[Tensor, " batch"]:
        """Decide once, then stop."""
        if executed:
            return evidence.same(STOP)
        scores = self.head(self._features(evidence)) - self.offset.to(evidence.device)
        return torch.tensor(self.routes, device=evidence.device)[scores.argmax(1)]

    def margin(self, evidence: Evidence, executed: Sequence[Executed]) -> Float64[Tensor, " batch"]:
        """Lead of the best score over the second, relative to the errors of the features
        (`Head.lead`)."""
        if executed:
            return evidence.no_choice
        return self.head.lead(self._features(evidence), self.offset)

    def over(self, position: Mapping[int, int]) -> EvidenceGateRouter:
        """The same gate over other ids."""
        return replace(self, routes=tuple(position[route] for route in self.routes))

    def to_arrays(self) -> tuple[dict[str, Shaped[Tensor, "*_"]], dict[str, Any]]:
        """Head and offset as tensors; the routing space and the MAdds of poolings as JSON
        values."""
        values = {"kind": self.kind, "routes": list(self.routes), "pooling_madds": self.pooling_madds}
        return {**self.head.tensors("head."), "offset": self.offset}, values

    def facts(self, names: Sequence[str]) -> dict[str, Any]:
        """The number of gates at which it decides."""
        return {"gates": self.num_gates}

    @classmethod
    def from_head(cls, trained: CalibratedHead) -> EvidenceGateRouter:
        """Build it from a trained perceptron."""
        return cls(trained.head, trained.offset, trained.routes, trained.pooling_madds)

    @classmethod
    def untrained(cls, kind: RouterKind, shape: NetworkShape) -> EvidenceGateRouter:
        """A gate over all routes with weights of zero, for timing."""
        return cls(Head.zeros(shape.tree.num_routes, shape.rich[0], TIMED_UNITS), shape.no_offset, shape.routes, 0)

    @classmethod
    def from_arrays(cls, tensors: Mapping[str, Shaped[Tensor, "*_"]], values: Mapping[str, Any]) -> EvidenceGateRouter:
        """Rebuild it."""
        head = Head.from_tensors(tensors, "head.")
        return cls(head, tensors["offset"].double(), tuple(values["routes"]), values["pooling_madds"])
