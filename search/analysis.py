"""What a front is worth on one split: every dynamic point beside its controls, with paired intervals over images.

Pure: tables and routers in, numbers out. Everything returned is JSON-able, so that what was read from the sealed split is stored once
and never has to be read again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsnet.routers import GateRouter
from dsnet.routing_table import RoutingTable
from dsnet.training.gate import COLLAPSE_SHARE, choose_routes, score_routes
from search.controls import (
    CascadePoint,
    StaticLine,
    budgets,
    cascade_curve,
    oracle_curve,
    random_routing,
    share_of_oracle_gap,
)
from search.pareto import front_mask
from search.statistics import bootstrap_interval, front_stability, gain_over_random, gain_over_static, resample_points

NUM_CURVE_POINTS = 60
NUM_RESAMPLES = 1000


@dataclass(frozen=True)
class Interval:
    """A value (fraction) with its 95 % bootstrap interval over images."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PointAnalysis:
    """One gate on one split."""

    slot: int
    metrics: dict[str, float]
    """As a trial's: top1, top5, ce, madds_m, p95_madds_m, route_entropy, max_route_share."""
    top1: Interval
    gain: Interval | None
    """Over the static line at the same mean MAdds; None below the cheapest sub-network, where there is no line."""
    gain_over_random: Interval
    random_top1: float
    """Random routing with the same histogram."""
    cascade_top1: float | None
    """A confidence cascade whose pair and threshold `val` chose for the same budget; None where it cannot spend so little."""
    cascade_madds_m: float | None
    """What that cascade really spends on this split: the budget holds on `val`."""
    oracle_top1: float | None
    share_of_oracle_gap: float | None
    stability: float
    """Share of resamples in which the point is not dominated by another of these points."""
    histogram: tuple[float, ...]
    """Share of the images by route."""

    @property
    def is_collapsed(self) -> bool:
        """More than 99 % of the images take one route."""
        return self.metrics["max_route_share"] > COLLAPSE_SHARE


@dataclass(frozen=True)
class SplitAnalysis:
    """The static sub-networks, the controls and the gates on one split."""

    split: str
    num_images: int
    routes: tuple[str, ...]
    static_madds_m: tuple[float, ...]
    static_top1: tuple[Interval, ...]
    static_top5: tuple[float, ...]
    line_madds_m: tuple[float, ...]
    """Vertices of the static line, chosen on val."""
    line_top1: tuple[float, ...]
    cascade_madds_m: tuple[float, ...]
    cascade_top1: tuple[float, ...]
    oracle_madds_m: tuple[float, ...]
    oracle_top1: tuple[float, ...]
    budgets_m: tuple[float, ...]
    """25, 50, 75 % of the range of MAdds."""
    points: tuple[PointAnalysis, ...]
    class_counts: tuple[tuple[tuple[int, ...], ...], ...] = ()
    """[points][classes][routes] images."""

    def to_json(self) -> dict[str, Any]:
        """A JSON-able mapping."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SplitAnalysis:
        """Rebuild what `to_json` gave."""
        fields = {name: _tuples(value) for name, value in data.items()}
        fields["static_top1"] = tuple(Interval(**item) for item in data["static_top1"])
        fields["points"] = tuple(_point(item) for item in data["points"])
        return cls(**fields)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _point(item: Mapping[str, Any]) -> PointAnalysis:
    intervals = {
        name: None if item[name] is None else Interval(**item[name]) for name in ("top1", "gain", "gain_over_random")
    }
    return PointAnalysis(**{**item, **intervals, "histogram": tuple(item["histogram"])})


def analyse_split(
    val: RoutingTable,
    reported: RoutingTable,
    routers: Mapping[int, GateRouter],
    *,
    num_classes: int,
    num_resamples: int = NUM_RESAMPLES,
) -> SplitAnalysis:
    """Score gates on a split beside their controls (CONTRACTS, Controls and intervals).

    Args:
        val: chooses the static line's vertices and the cascade's thresholds.
        reported: the split of every number; may be `val` itself.
        routers: gates by slot.
        num_classes: for the routes by class.
        num_resamples: of the joint bootstrap.
    """
    madds = reported.madds.astype(np.float64)
    correct = reported.correct1
    line = StaticLine.fit(madds, val.correct1)
    static = resample_points(correct, madds, num_resamples)
    choices = {slot: choose_routes(router, reported) for slot, router in routers.items()}
    low, high = bootstrap_interval(static.resampled_top1)
    spread = np.linspace(madds.min(), madds.max() + madds.min() - reported.trunk_madds, NUM_CURVE_POINTS)
    cascade = cascade_curve(val, reported, madds, reported.trunk_madds, spread)
    oracle = oracle_curve(correct, madds)
    thinned = np.unique(np.linspace(0, len(oracle.top1) - 1, NUM_CURVE_POINTS).astype(int))
    return SplitAnalysis(
        split=reported.split,
        num_images=reported.num_images,
        routes=reported.routes,
        static_madds_m=_floats(madds / 1e6),
        static_top1=tuple(Interval(*map(float, row)) for row in zip(static.top1, low, high, strict=True)),
        static_top5=_floats(reported.correct5.mean(0)),
        line_madds_m=_floats(line.madds / 1e6),
        line_top1=_floats(correct[:, list(line.vertices)].mean(0)),
        cascade_madds_m=tuple(point.madds / 1e6 for point in cascade),
        cascade_top1=tuple(point.top1 for point in cascade),
        oracle_madds_m=_floats(oracle.madds[thinned] / 1e6),
        oracle_top1=_floats(oracle.top1[thinned]),
        budgets_m=_floats(budgets(madds) / 1e6),
        points=_points(val, reported, routers, choices, line, num_resamples),
        class_counts=tuple(_class_counts(reported, routes, num_classes) for routes in choices.values()),
    )


def _points(
    val: RoutingTable,
    table: RoutingTable,
    routers: Mapping[int, GateRouter],
    choices: Mapping[int, NDArray[np.int64]],
    line: StaticLine,
    num_resamples: int,
) -> tuple[PointAnalysis, ...]:
    if not routers:
        return ()
    slots = list(routers)
    routes = np.column_stack([choices[slot] for slot in slots])
    correct = np.take_along_axis(table.correct1, routes, axis=1)
    spent = table.madds[routes] + np.array([routers[slot].decision_madds for slot in slots])
    sample = resample_points(correct, spent, num_resamples)
    low, high = bootstrap_interval(sample.resampled_top1)
    gain = gain_over_static(correct, spent, line, table.correct1, num_resamples)
    chance = gain_over_random(routes, table.correct1, num_resamples)
    stability = front_stability(sample, routes)
    oracle = oracle_curve(table.correct1, table.madds).at(sample.madds)
    cascade = _cascade_at(val, table, sample.madds)
    static = line.value_at(sample.madds, table.correct1)
    share = share_of_oracle_gap(sample.top1, static, oracle)
    points = []
    for index, slot in enumerate(slots):
        histogram = np.bincount(routes[:, index], minlength=table.num_routes) / table.num_images
        has_line = bool(np.isfinite(gain.value[index]))
        points.append(
            PointAnalysis(
                slot=slot,
                metrics=score_routes(routes[:, index], table, routers[slot].decision_madds),
                top1=Interval(float(sample.top1[index]), float(low[index]), float(high[index])),
                gain=Interval(float(gain.value[index]), float(gain.low[index]), float(gain.high[index]))
                if has_line
                else None,
                gain_over_random=Interval(
                    float(chance.value[index]), float(chance.low[index]), float(chance.high[index])
                ),
                random_top1=random_routing(table.correct1, histogram),
                cascade_top1=cascade[index].top1 if index in cascade else None,
                cascade_madds_m=cascade[index].madds / 1e6 if index in cascade else None,
                oracle_top1=_finite(oracle[index]),
                share_of_oracle_gap=_finite(share[index]),
                stability=float(stability[index]),
                histogram=_floats(histogram),
            )
        )
    return tuple(points)


def _cascade_at(val: RoutingTable, table: RoutingTable, madds: NDArray[np.float64]) -> dict[int, CascadePoint]:
    """Index of a budget -> the cascade that val chose for it."""
    points = cascade_curve(val, table, table.madds, table.trunk_madds, madds)
    by_budget = {point.budget: point for point in points}
    return {index: by_budget[float(budget)] for index, budget in enumerate(madds) if float(budget) in by_budget}


def _class_counts(table: RoutingTable, routes: NDArray[np.int64], num_classes: int) -> tuple[tuple[int, ...], ...]:
    counts = np.zeros((num_classes, table.num_routes), dtype=np.int64)
    np.add.at(counts, (table.labels, routes), 1)
    return tuple(tuple(int(count) for count in row) for row in counts)


def front_slots(slots: Sequence[int], values: NDArray[np.float64], goals: Sequence[str]) -> tuple[int, ...]:
    """The slots on the Pareto front of `values` [n, d], first objective's best last; of equal points the earliest stays.

    Args:
        slots: of the n points.
        values: their objectives.
        goals: "maximize" or "minimize" for each objective.
    """
    if len(slots) == 0:
        return ()
    mask = front_mask(values, goals, keep_duplicates=False)  # type: ignore[arg-type]
    sign = 1.0 if goals[0] == "maximize" else -1.0
    kept = [index for index in range(len(slots)) if mask[index]]
    return tuple(slots[index] for index in sorted(kept, key=lambda index: sign * values[index, 0]))


def _floats(values: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
