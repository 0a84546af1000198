"""One file outside of the packages that adds a network family, a kind of router, a metric and an
exporter.

The recipes of CONTRIBUTING.md follow it. It is found by `DSNET_PLUGINS=my_extension`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsnet import families
from dsnet.deploy import exporters
from dsnet.families import Family, Task, get_family
from dsnet.gates.fit import GateFit, score_run
from dsnet.gates.problem import costs_of, routing_space
from dsnet.gates.settings import GateSettings
from dsnet.metrics import Metric
from dsnet.metrics import register as register_metric
from dsnet.routers.base import STOP, Evidence, Executed, NetworkShape
from dsnet.routers.kinds import RouterKind
from dsnet.routers.kinds import register as register_router
from dsnet.routing.routing_table import RoutingTable
from dsnet.routing.table_routing import run_on_table
from dsnet.routing.table_run import TableRun
from dsnet.space.subnet_set import SubnetSet

# A family: DS-Tiny with another default.
TINY = get_family("ds_tiny")


def _layout(task: Task, options: Mapping[str, Any]) -> SubnetSet:
    subnets = TINY.layout(task, options)
    return replace(subnets, spec=replace(subnets.spec, family="my_tiny"))


families.register(Family("my_tiny", {**TINY.defaults, "num_routes": 3}, _layout, TINY.build))


# A kind of router: the sum of the hidden vector decides between two routes.
@dataclass(frozen=True)
class SumRouter:
    """Images whose hidden vector sums to less than the threshold take the first route, the others
    the second."""

    first: int
    second: int
    threshold: float

    kind = "sum"
    num_gates = 1
    max_runs = 1
    needs = ("hidden",)
    tie = 1e-5

    @property
    def routes(self) -> tuple[int, ...]:
        return tuple(sorted({self.first, self.second}))

    def decision_madds(self, routes: Tensor) -> Tensor:
        return torch.zeros_like(routes)

    def step(self, evidence: Evidence, executed: Sequence[Executed]) -> Tensor:
        if executed:
            return evidence.same(STOP)
        is_less = evidence["hidden"].double().sum(1) < self.threshold
        return torch.where(is_less, self.first, self.second)

    def margin(self, evidence: Evidence, executed: Sequence[Executed]) -> Tensor:
        if executed or self.first == self.second:
            return evidence.no_choice
        hidden = evidence["hidden"].double()
        return (hidden.sum(1) - self.threshold).abs() / hidden.square().sum(1).sqrt().clamp(min=1e-12)

    def over(self, position: Mapping[int, int]) -> SumRouter:
        return replace(self, first=position[self.first], second=position[self.second])

    def facts(self, names: Sequence[str]) -> dict[str, Any]:
        return {"below": names[self.first], "above": names[self.second]}

    def to_arrays(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        threshold = torch.tensor([self.threshold], dtype=torch.float64)
        return {"threshold": threshold}, {"kind": self.kind, "first": self.first, "second": self.second}

    @classmethod
    def from_arrays(cls, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> SumRouter:
        return cls(values["first"], values["second"], float(tensors["threshold"][0]))

    @classmethod
    def untrained(cls, kind: RouterKind, shape: NetworkShape) -> SumRouter:
        return cls(shape.routes[0], shape.routes[-1], 0.0)


def fit_sum(gate_table: RoutingTable, val_table: RoutingTable, settings: GateSettings) -> GateFit:
    """The threshold sends as many images to the widest route as the target pays for."""
    routes = routing_space(gate_table, settings)
    free = np.zeros(gate_table.num_routes, dtype=np.int64)
    target = costs_of(val_table, settings, routes, free, None).target
    first, second = routes[0], routes[-1]
    low, high = float(val_table.madds[first]), float(val_table.madds[second])
    share = (target - low) / (high - low)
    sums = np.sort(np.asarray(val_table.part("hidden", 0, 0), dtype=np.float64).sum(1))
    place = min(round((1.0 - share) * len(sums)), len(sums) - 1)
    router = SumRouter(first, second, float(sums[place]))
    run = run_on_table(router, val_table)
    return GateFit(router, score_run(run, val_table) | {"target_madds_m": target / 1e6, "target_clamped": 0.0}, run)


register_router(RouterKind(name="sum", label="sum of the hidden vector", router=SumRouter, head="own", fit=fit_sum))


# A metric: accuracy of the class that fares worst.
def worst_class(run: TableRun, table: RoutingTable) -> float:
    """The smallest top-1 within a class."""
    correct = table.correct1[np.arange(table.num_images), run.routes]
    return float(min(correct[table.labels == label].mean() for label in np.unique(table.labels)))


register_metric(Metric(name="worst_class", label="worst class %", goal="maximize", is_share=True, of_run=worst_class))


# An exporter: one page of facts.
class FactSheet:
    """Writes what the bundle claims as one JSON file."""

    name = "facts"

    def write(self, bundle: Path, folder: Path) -> None:
        content = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
        (folder / "facts.json").write_text(json.dumps(content["claims"]), encoding="utf-8")


exporters.register(FactSheet())
