"""The sections `metrics` and `constraints`: what a sweep optimises, and the conditions that its
trials have to meet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import (
    JsonValue,
    PlainSerializer,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)

from dsnet.metrics import find_metric, metrics
from dsnet.wording import shown, way_out
from orchestration.config.section import BrokenRule, Section, Text, refuse


def objective_names() -> tuple[str, ...]:
    """Metrics that a sweep can optimise; `latency_ms` stands for all latencies."""
    return (*metrics(), "latency_ms")


def goal_of(metric: str) -> str | None:
    """The goal of a metric, maximize or minimize; None if no sweep has such a metric."""
    found = find_metric(metric)
    return None if found is None else found.goal


class MetricConfig(Section):
    """One objective of the sweep."""

    name: Text
    """One of top1, top5, madds_m, p95_madds_m, params_m, latency_ms, latency_ms_batchN, N > 1 of
    measure.batch_sizes; latencies also with `.NAME` of measure.devices at the end."""
    goal: Literal["maximize", "minimize"]
    """maximize (accuracies) | minimize (costs)."""
    ref: float | None = None
    """Coordinate of the hypervolume's reference point; null = 1.05 x the value of the widest
    sub-network."""

    @model_validator(mode="after")
    def _is_known(self) -> MetricConfig:
        wanted = goal_of(self.name)
        if wanted is None:
            message = f"unknown metric '{self.name}'{way_out(self.name, objective_names())}"
            refuse(BrokenRule(("name",), message))
        if self.goal != wanted:
            refuse(BrokenRule(("goal",), f"{self.name} is a metric to {wanted}; got '{self.goal}'"))
        if self.goal == "maximize" and self.ref is not None and not 0 <= self.ref <= 1:
            refuse(BrokenRule(("ref",), f"{self.name} is a fraction from 0 to 1; got {shown(self.ref)}"))
        if self.goal == "minimize" and self.ref is not None and self.ref <= 0:
            message = f"no {self.name} is better than {shown(self.ref)}, so every hypervolume would be 0; write a worse value, or null"
            refuse(BrokenRule(("ref",), message))
        return self


class HardConstraint(Section):
    """A condition that ends a trial as soon as it is violated."""

    hard: Text
    """An expression, written like the others of `constraints`."""


def _constraint(written: object) -> str | HardConstraint:
    if isinstance(written, HardConstraint) or (isinstance(written, str) and written):
        return written
    if isinstance(written, Mapping) and list(written) == ["hard"] and isinstance(written["hard"], str):
        return HardConstraint(hard=written["hard"])
    raise ValueError(f'expected a condition such as "madds_m <= 180", or {{hard: "..."}}; got {shown(written)}')


def _written_constraint(constraint: str | HardConstraint) -> JsonValue:
    return constraint if isinstance(constraint, str) else {"hard": constraint.hard}


Constraint = Annotated[
    str | HardConstraint,
    PlainValidator(_constraint),
    PlainSerializer(_written_constraint),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {
                    "type": "object",
                    "required": ["hard"],
                    "additionalProperties": False,
                    "properties": {"hard": {"type": "string", "minLength": 1}},
                },
            ]
        }
    ),
]
