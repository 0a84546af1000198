"""The metrics that a sweep may optimise, constrain and show, by name. Needs no torch.

A new metric is one call of `register`, from inside or outside of this package (`dsnet.plugins`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dsnet.plugins import load_plugins

Goal = Literal["maximize", "minimize"]
DEVICE_NAME_PATTERN = r"[A-Za-z_][A-Za-z0-9_]{0,31}"
"""Names of `measure.devices`: they are part of metric names, which are used in expressions."""
LATENCY_NAME = re.compile(rf"latency_ms(_batch[1-9]\d*)?(\.{DEVICE_NAME_PATTERN})?")
"""Latency has a name for each batch size and device: `latency_ms`, `latency_ms_batch64.server`."""

PERCENT = "\u00a0%"
"""End of the labels of metrics that are shown in percent."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """Description of a metric: its name, its goal and how it is computed."""

    name: str
    """A Python identifier, used in expressions such as `top1 >= 0.9`."""
    label: str
    """Header of its column in tables."""
    goal: Goal
    """Whether more is better."""
    is_share: bool = False
    """Whether it is a fraction from 0 to 1, shown in percent; otherwise any number from 0 on."""
    of_run: Callable[[Any, Any], float] | None = None
    """`of_run(run, table)`: its value for a `dsnet.routing.table_run.TableRun` on the
    `dsnet.routing.routing_table.RoutingTable` of a split. A static sub-network is the run in which
    every image takes its route. None for metrics that the program computes elsewhere."""

    @property
    def noun(self) -> str:
        """The label without the unit, for texts in which the number has the unit."""
        return self.label.removesuffix(PERCENT)

    @property
    def range(self) -> tuple[float, float]:
        """The interval in which it can lie for any router on any network."""
        return (0.0, 1.0) if self.is_share else (0.0, math.inf)


_METRICS: dict[str, Metric] = {}


def register(metric: Metric) -> Metric:
    """Register a metric under its name; returns it.

    Raises:
        ValueError: the name is taken, or cannot be used in an expression.
    """
    if not metric.name.isidentifier() or LATENCY_NAME.fullmatch(metric.name):
        raise ValueError(
            f"a metric cannot be called {metric.name!r}; choose a Python identifier other than latency_ms..."
        )
    known = _METRICS.setdefault(metric.name, metric)
    if known != metric:
        raise ValueError(f"there is a metric {metric.name!r} already; choose another name")
    return metric


def metrics() -> Mapping[str, Metric]:
    """All metrics except latencies, by name; those of plugins come last."""
    load_plugins()
    return _METRICS


def find_metric(name: str) -> Metric | None:
    """The metric of this name, latencies included; None where there is none."""
    if LATENCY_NAME.fullmatch(name):
        return Metric(name=name, label=name, goal="minimize")
    return metrics().get(name)


def metric_label(name: str) -> str:
    """Header of a metric's column, with its unit; the name where no such metric is registered, as
    for a run of a plugin that is not loaded."""
    found = find_metric(name)
    return name if found is None else found.label


def metric_noun(name: str) -> str:
    """The label of a metric without its unit: "balanced top-1"; the name where no such metric is
    registered."""
    found = find_metric(name)
    return name if found is None else found.noun


def is_share(name: str) -> bool:
    """Whether a metric is a fraction from 0 to 1, shown in percent."""
    found = find_metric(name)
    return found is not None and found.is_share


def share_names() -> frozenset[str]:
    """Names of the metrics that are fractions from 0 to 1."""
    return frozenset(name for name, metric in metrics().items() if metric.is_share)


def added_metrics() -> Mapping[str, Callable[[Any, Any], float]]:
    """Name -> `of_run` of the metrics that plugins add."""
    return {name: metric.of_run for name, metric in metrics().items() if metric.of_run is not None}


def added_values(run: Any, table: Any) -> dict[str, float]:
    """The values of `added_metrics` for a `dsnet.routing.table_run.TableRun`, of a router or of a
    static sub-network, on its `dsnet.routing.routing_table.RoutingTable`."""
    return {name: float(of_run(run, table)) for name, of_run in added_metrics().items()}


for _metric in (
    Metric(name="top1", label="top-1\u00a0%", goal="maximize", is_share=True),
    Metric(name="top5", label="top-5\u00a0%", goal="maximize", is_share=True),
    Metric(name="madds_m", label="MAdds M", goal="minimize"),
    Metric(name="p95_madds_m", label="p95_madds_m", goal="minimize"),
    Metric(name="params_m", label="params_m", goal="minimize"),
):
    register(_metric)


def balanced_top1(run: Any, table: Any) -> float:
    """Mean over the classes of the top-1 within each class; classes without images do not count."""
    found = [accuracy for _, accuracy in top1_by_class(run, table).values()]
    return sum(found) / len(found)


def top1_by_class(run: Any, table: Any) -> dict[int, tuple[int, float]]:
    """Label -> (number of images, top-1) of the classes that have images in the table.

    Args:
        run: A `dsnet.routing.table_run.TableRun`.
        table: The `dsnet.routing.routing_table.RoutingTable` that was routed.
    """
    import numpy as np  # here: commands that compute nothing read this module too

    correct = table.correct1[np.arange(table.num_images), run.routes]
    counts = np.bincount(table.labels)
    right = np.bincount(table.labels, weights=correct)
    return {label: (int(count), float(right[label] / count)) for label, count in enumerate(counts.tolist()) if count}


register(
    Metric(
        name="balanced_top1",
        label="balanced top-1\u00a0%",
        goal="maximize",
        is_share=True,
        of_run=balanced_top1,
    )
)
