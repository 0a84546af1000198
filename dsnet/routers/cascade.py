"""Cascades: run a cheap route, read its answer, then stop or run a wider route too. An image that
runs both routes costs both tails, and the trunk once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64, Shaped
from numpy.typing import NDArray
from torch import Tensor

from dsnet.routers.base import STOP, CalibratedHead, Evidence, Executed, NetworkShape
from dsnet.routers.gate import ROUNDING_TIE
from dsnet.routers.head import TIMED_UNITS, Head
from dsnet.routers.kinds import RouterKind

Values = TypeVar("Values", Tensor, NDArray[np.float64])


PROBABILITY_TIE = 1e-4
"""Largest difference of probabilities between processors and batch sizes where logits are large."""


@dataclass(frozen=True)
class CascadeRouter:
    """Run the first route; where its largest probability is below the threshold, run the second
    too.

    If both are the same route, it runs only once.
    """

    first: int
    second: int
    threshold: float
    """In [0, 1]; -inf never runs the second route, +inf always does."""

    kind = "cascade"
    num_gates = 1
    max_runs = 2
    needs = ()
    tie = PROBABILITY_TIE

    @property
    def routes(self) -> tuple[int, ...]:
        """Both routes, in increasing order."""
        return tuple(sorted({self.first, self.second}))

    def decision_madds(self, routes: Int64[Tensor, " batch"]) -> Int64[Tensor, " batch"]:
        """Zero: a comparison has no MAdds."""
        return torch.zeros_like(routes)

    def step(self, evidence: Evidence, executed: Sequence[Executed]) -> Int64[Tensor, " batch"]:
        """The first route, then the second or STOP, then STOP."""
        if not executed:
            return evidence.same(self.first)
        if len(executed) == 1 and self.first != self.second:
            confidence = executed[0].summary["confidence"].double()
            return torch.where(self.goes_on(confidence), self.second, STOP)
        return evidence.same(STOP)

    def goes_on(self, confidence: Values) -> Values:
        """Whether the second route runs too, for float64 confidences of the first: a tensor or an
        array."""
        return confidence < self.threshold  # type: ignore[return-value]

    def margin(self, evidence: Evidence, executed: Sequence[Executed]) -> Float64[Tensor, " batch"]:
        """Distance of the first route's confidence to the threshold, in units of probability."""
        if len(executed) == 1 and self.first != self.second:
            return (executed[0].summary["confidence"].double() - self.threshold).abs()
        return evidence.no_choice

    def over(self, position: Mapping[int, int]) -> CascadeRouter:
        """The same cascade over other ids."""
        return replace(self, first=position[self.first], second=position[self.second])

    def to_arrays(self) -> tuple[dict[str, Shaped[Tensor, "*_"]], dict[str, Any]]:
        """The two routes, and the threshold as a tensor, because JSON cannot hold an infinity."""
        threshold = torch.tensor([self.threshold], dtype=torch.float64)
        return {"threshold": threshold}, {"kind": self.kind, "first": self.first, "second": self.second}

    def facts(self, names: Sequence[str]) -> dict[str, Any]:
        """Names of both routes, and the threshold."""
        return {"first": names[self.first], "second": names[self.second], "threshold": self.threshold}

    @classmethod
    def untrained(cls, kind: RouterKind, shape: NetworkShape) -> CascadeRouter:
        """A cascade from the first route to the last, for timing."""
        return cls(shape.routes[0], shape.routes[-1], 0.5)

    @classmethod
    def from_arrays(cls, tensors: Mapping[str, Shaped[Tensor, "*_"]], values: Mapping[str, Any]) -> CascadeRouter:
        """Rebuild it."""
        return cls(values["first"], values["second"], float(tensors["threshold"][0]))


CASCADE_EVIDENCE = ("hidden",)
"""Evidence that a learned cascade reads beside the first route's answer: the hidden vector, which
the trunk computes in any case."""
NUM_SORTED = 10
"""Number of the largest logits that a learned cascade reads, in falling order."""
MAX_NAMED_CLASSES = 100
"""A learned cascade also reads the logits by class if there are at most so many classes, because
some classes are harder than others."""
HALF_TIE = 2e-3
"""Margin below which a decision from half-precision logits is a tie. Rounding to half precision has
a relative error of 2 ** -11; this allows for logits that are rounded to neighbouring values."""
EXACT_SHARE = ROUNDING_TIE / HALF_TIE
"""Relative rounding error of values stored in float32, in units of `HALF_TIE`."""


def answer_features(executed: Executed, num_classes: int) -> Float32[Tensor, "batch features"]:
    """Features of a route's answer for a learned cascade: float32 [B, D].

    They are confidence, margin and entropy; the largest logits by rank, relative to the largest;
    and, if there are few classes, the centred logits by class. Logits are rounded to half precision
    first, as a routing table stores them.
    """
    logits = executed.logits.half().float()
    summary = executed.summary
    ranked = logits.topk(min(NUM_SORTED, logits.shape[1]), dim=1).values
    parts = [
        torch.stack([summary[name].float() for name in ("confidence", "margin", "entropy")], dim=1),
        ranked[:, 1:] - ranked[:, :1],
    ]
    if num_classes <= MAX_NAMED_CLASSES:
        parts.append(logits - logits.mean(1, keepdim=True))
    return torch.cat(parts, dim=1)


def num_answer_features(num_classes: int) -> int:
    """Number of columns of `answer_features`."""
    return 3 + min(NUM_SORTED, num_classes) - 1 + (num_classes if num_classes <= MAX_NAMED_CLASSES else 0)


def answer_error_sizes(executed: Executed, num_classes: int) -> Float32[Tensor, "batch features"]:
    """Error sizes of the features of an answer, [B, D] in units of `HALF_TIE`: logits are rounded
    to half precision, the summary is computed from exact ones."""
    logits = executed.logits.half().float().abs()
    ranked = executed.logits.half().float().topk(min(NUM_SORTED, logits.shape[1]), dim=1).values.abs()
    summary = torch.stack([executed.summary[name].float() for name in ("confidence", "margin", "entropy")], dim=1)
    parts = [summary.abs() * EXACT_SHARE, ranked[:, 1:] + ranked[:, :1]]
    if num_classes <= MAX_NAMED_CLASSES:
        parts.append(logits)
    return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class LearnedCascadeRouter:
    """Run the first route; from its answer and the gate's evidence, decide whether to stop or which
    wider route to run too (ours)."""

    first: int
    head: Head
    """Head that scores `options`, in their order, from the features of the answer and the
    evidence."""
    offset: Float64[Tensor, " routes"]
    """float64 [R]: beta * cost, subtracted from the scores."""
    options: tuple[int, ...]
    """The wider routes, and the first route itself, which means to stop."""
    num_classes: int
    evidence_parts: tuple[str, ...] = ()
    """Names of the parts of the evidence that it reads beside the answer."""
    pooling_madds: int = 0

    kind = "learned_cascade"
    num_gates = 1
    max_runs = 2
    tie = HALF_TIE

    def __post_init__(self) -> None:
        if self.first not in self.options:
            raise ValueError(
                f"the first route {self.first} must be among the options {self.options}: taking it means to stop"
            )

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the parts of the evidence that it reads beside the first route's answer."""
        return self.evidence_parts

    @property
    def routes(self) -> tuple[int, ...]:
        """All options, in increasing order."""
        return tuple(sorted(self.options))

    def decision_madds(self, routes: Int64[Tensor, " batch"]) -> Int64[Tensor, " batch"]:
        """MAdds of poolings and head; every image decides once, after the first route."""
        return torch.full_like(routes, self.pooling_madds + self.head.madds)

    def _features(self, evidence: Evidence, answer: Executed) -> Tensor:
        parts = [answer_features(answer, self.num_classes), *(evidence[part] for part in self.evidence_parts)]
        return torch.cat(parts, dim=1)

    def step(self, evidence: Evidence, executed: Sequence[Executed]) -> Int64[Tensor, " batch"]:
        """The first route, then one of the wider routes or STOP, then STOP."""
        if not executed:
            return evidence.same(self.first)
        if len(executed) > 1:
            return evidence.same(STOP)
        scores = self.head(self._features(evidence, executed[0])) - self.offset.to(evidence.device)
        answers = [STOP if option == self.first else option for option in self.options]
        return torch.tensor(answers, device=evidence.device)[scores.argmax(1)]

    def margin(self, evidence: Evidence, executed: Sequence[Executed]) -> Float64[Tensor, " batch"]:
        """Lead of the best score over the second, relative to the errors of its features
        (`Head.lead`)."""
        if len(executed) != 1:
            return evidence.no_choice
        answer = executed[0]
        known = [evidence[part].abs() * EXACT_SHARE for part in self.evidence_parts]
        sizes = torch.cat([answer_error_sizes(answer, self.num_classes), *known], dim=1)
        return self.head.lead(self._features(evidence, answer), self.offset, sizes)

    def over(self, position: Mapping[int, int]) -> LearnedCascadeRouter:
        """The same cascade over other ids."""
        return replace(self, first=position[self.first], options=tuple(position[option] for option in self.options))

    def to_arrays(self) -> tuple[dict[str, Shaped[Tensor, "*_"]], dict[str, Any]]:
        """Head and offset as tensors; routes and names of the evidence as JSON values."""
        values = {
            "kind": self.kind,
            "first": self.first,
            "options": list(self.options),
            "num_classes": self.num_classes,
            "evidence_parts": list(self.evidence_parts),
            "pooling_madds": self.pooling_madds,
        }
        return {**self.head.tensors("head."), "offset": self.offset}, values

    def facts(self, names: Sequence[str]) -> dict[str, Any]:
        """Names of the first route and of the wider routes, one of which may run after it."""
        wider = [names[option] for option in self.options if option != self.first]
        return {"first": names[self.first], "then_one_of": wider}

    @classmethod
    def from_head(cls, trained: CalibratedHead) -> LearnedCascadeRouter:
        """Build it from a trained perceptron."""
        assert trained.first is not None, "a learned cascade has a first route"
        return cls(trained.first, trained.head, trained.offset, trained.routes, trained.num_classes, CASCADE_EVIDENCE)

    @classmethod
    def untrained(cls, kind: RouterKind, shape: NetworkShape) -> LearnedCascadeRouter:
        """A cascade over all routes with weights of zero, for timing."""
        size = num_answer_features(shape.num_classes) + shape.hidden[0]
        head = Head.zeros(shape.tree.num_routes, size, TIMED_UNITS)
        return cls(shape.routes[0], head, shape.no_offset, shape.routes, shape.num_classes, CASCADE_EVIDENCE)

    @classmethod
    def from_arrays(
        cls, tensors: Mapping[str, Shaped[Tensor, "*_"]], values: Mapping[str, Any]
    ) -> LearnedCascadeRouter:
        """Rebuild it."""
        return cls(
            first=values["first"],
            head=Head.from_tensors(tensors, "head."),
            offset=tensors["offset"].double(),
            options=tuple(values["options"]),
            num_classes=values["num_classes"],
            evidence_parts=tuple(values["evidence_parts"]),
            pooling_madds=values["pooling_madds"],
        )
