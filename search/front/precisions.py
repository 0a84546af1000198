"""The same router over the same network in two precisions, on the same images, beside the controls
of its own precision.

Pure functions from routing tables to numbers: the accuracies, intervals and controls are those of
`statistics` and `controls`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from dsnet.gates.fit import score_run
from dsnet.routing.routing_table import RoutingTable
from dsnet.routing.table_run import TableRun
from search.front.analysis import NUM_RESAMPLES, interval_at
from search.front.analysis_records import Interval
from search.front.controls import StaticLine, random_routing
from search.front.statistics import (
    bootstrap_interval,
    gain_over_one,
    gain_over_random,
    gain_over_static,
    resample_points,
)


@dataclass(frozen=True)
class RunOnTable:
    """A run over the images of a table."""

    table: RoutingTable
    run: TableRun

    @property
    def correct(self) -> Bool[np.ndarray, " images"]:
        """[N] whether the answering route is right."""
        right: Bool[np.ndarray, " images"] = self.table.correct1[np.arange(self.table.num_images), self.run.routes]
        return right

    @property
    def route_names(self) -> list[str]:
        """[N] name of the answering route; numbers of routes differ between tables."""
        return [self.table.routes[route] for route in self.run.routes]


@dataclass(frozen=True)
class StaticTables:
    """The static sub-networks in a precision on a split: those of a bundle, and further ones of its
    run."""

    tables: tuple[RoutingTable, ...]
    """Routing tables of the same images."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all sub-networks."""
        return tuple(name for table in self.tables for name in table.routes)

    @property
    def madds(self) -> Int64[np.ndarray, " routes"]:
        """[K] MAdds of each."""
        return np.concatenate([table.madds for table in self.tables])

    @property
    def correct(self) -> Bool[np.ndarray, "images routes"]:
        """[N, K] whether each is right."""
        return np.concatenate([table.correct1 for table in self.tables], axis=1)


def precision_claims(own: RunOnTable, float32: RunOnTable, val: StaticTables, reported: StaticTables) -> dict[str, Any]:
    """The claims of a router in a precision on a split, as JSON values.

    Args:
        own: its run in this precision.
        float32: its run in float32, on the same images in the same order.
        val: the static sub-networks in this precision on `val`, on which the vertices of the static
            line are chosen.
        reported: the same sub-networks on the images of `own`.

    Returns:
        `top1`, `top5`, `madds_m`, `float32_top1`, `float32_madds_m`; the `difference` of top-1 to
        float32; `same_route_share`; `gain_over_static` at the same mean MAdds (None below the
        cheapest sub-network), `gain_over_random` routing with the same histogram, and
        `random_routing_top1`. Shares are fractions; what ends on `_interval` is the 95 % interval
        [low, high] over images, paired where it is of a difference.

    Raises:
        ValueError: the images differ.
    """
    table = own.table
    if not np.array_equal(table.image_ids, float32.table.image_ids):
        raise ValueError(f"the tables of {table.split} in two precisions are of different images")
    metrics, before = score_run(own.run, table), score_run(float32.run, float32.table)
    correct, spent = own.correct[:, None], own.run.madds[:, None].astype(np.float64)
    line = StaticLine.fit(val.madds, val.correct)
    gain = interval_at(gain_over_static(correct, spent, line, reported.correct, NUM_RESAMPLES), 0)
    difference = interval_at(gain_over_one(correct, float32.correct, NUM_RESAMPLES), 0)
    chance = interval_at(gain_over_random(own.run.routes[:, None], table.correct1, NUM_RESAMPLES), 0)
    low, high = bootstrap_interval(resample_points(correct, spent, NUM_RESAMPLES).resampled_top1[:, 0])
    return {
        "num_images": table.num_images,
        "top1": metrics["top1"],
        "top1_interval": [float(low), float(high)],
        "top5": metrics["top5"],
        "madds_m": metrics["madds_m"],
        "float32_top1": before["top1"],
        "float32_madds_m": before["madds_m"],
        **_named("difference", difference),
        "same_route_share": float(np.mean(np.array(own.route_names) == np.array(float32.route_names))),
        **_named("gain_over_static", gain),
        "random_routing_top1": random_routing(table.correct1, own.run.histogram),
        **_named("gain_over_random", chance),
    }


def static_claims(own: StaticTables, float32: RoutingTable) -> list[dict[str, Any]]:
    """The static sub-networks in a precision beside those in float32, as JSON values.

    Args:
        own: those in this precision.
        float32: the table in float32, of the same images, which has all of them.

    Returns:
        for each: `name`, `madds_m`, and `top1`, `float32_top1` and `difference` as of
        `precision_claims`.
    """
    sample = resample_points(own.correct, 0, NUM_RESAMPLES)
    low, high = bootstrap_interval(sample.resampled_top1)
    rows = []
    for index, name in enumerate(own.names):
        before = float32.correct1[:, float32.routes.index(name)]
        difference = interval_at(gain_over_one(own.correct[:, [index]], before, NUM_RESAMPLES), 0)
        rows.append(
            {
                "name": name,
                "madds_m": float(own.madds[index] / 1e6),
                "top1": float(sample.top1[index]),
                "top1_interval": [float(low[index]), float(high[index])],
                "float32_top1": float(before.mean()),
                **_named("difference", difference),
            }
        )
    return rows


def line_routes(val: RoutingTable, without: Sequence[str]) -> tuple[int, ...]:
    """The vertices of the static line of a table, as routes of it, that are not among the named
    routes: a line over those alone may be lower.

    Args:
        val: the table of `val`.
        without: names of routes.
    """
    vertices = StaticLine.fit(val.madds, val.correct1).vertices
    return tuple(sorted(route for route in vertices if val.routes[route] not in without))


def _named(name: str, found: Interval | None) -> dict[str, Any]:
    if found is None:
        return {name: None, f"{name}_interval": None}
    return {name: found.value, f"{name}_interval": [found.low, found.high]}
