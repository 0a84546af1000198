"""Analysis of a front on one split: every dynamic point beside its controls, with paired intervals
over images.

The functions are pure: they map tables and routers to numbers. All results are JSON-able, so that
those of the sealed split are stored once and the split never has to be read again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsnet.gates.fit import score_run
from dsnet.gates.settings import COLLAPSE_SHARE
from dsnet.metrics import added_values
from dsnet.routers.base import Router
from dsnet.routing.routing_table import RoutingTable
from dsnet.routing.table_routing import run_on_table
from dsnet.routing.table_run import TableRun, static_run
from search.front.analysis_records import BudgetPick, Interval, PointAnalysis, RouterShare, SplitAnalysis
from search.front.ceiling import CeilingCurve, RouteForecast
from search.front.controls import (
    CascadePoint,
    OracleCurve,
    StaticLine,
    budgets,
    cascade_curve,
    oracle_curve,
    random_routing,
    share_of_gap,
)
from search.front.pareto import DEFAULT_OBJECTIVES, Goal
from search.front.selection import BUDGET_SHARES
from search.front.statistics import (
    Gain,
    PointSample,
    bootstrap_interval,
    front_stability,
    gain_over_one,
    gain_over_random,
    gain_over_static,
    resample_points,
    tied_groups,
)

NUM_CURVE_POINTS = 60
NUM_RESAMPLES = 1000


@dataclass(frozen=True)
class Bootstrap:
    """Settings of the uncertainty of a front: the joint resampling of images, and the objectives in
    which points dominate each other."""

    num_resamples: int = NUM_RESAMPLES
    objectives: tuple[tuple[str, Goal], ...] = DEFAULT_OBJECTIVES
    """(metric, goal) of the sweep."""
    measured: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    """Slot -> metrics of the front's trials. Objectives other than top1, top5 and madds_m are not
    resampled, but have these values in every resample."""


def analyse_split(
    forecast: RouteForecast,
    val: RoutingTable,
    reported: RoutingTable,
    front: Mapping[int, Router],
    contenders: Mapping[BudgetPick, Router],
    *,
    num_classes: int,
    bootstrap: Bootstrap = Bootstrap(),
) -> SplitAnalysis:
    """Score routers on a split beside their controls (docs/definitions.md, Controls and intervals).

    Args:
        forecast: model fitted on `gate`, for the reachable ceiling.
        val: table on which the vertices of the static line, the thresholds of the cascade and the
            operating points of the ceiling are chosen.
        reported: table of the split of every number; may be `val` itself.
        front: routers by slot.
        contenders: the routers that represent their kinds, as `budget_picks` chose them.
        num_classes: number of classes, for the routes by class.
        bootstrap: settings of all intervals, and of the stability of the front.
    """
    madds = reported.madds.astype(np.float64)
    correct = reported.correct1
    controls = _SplitControls(
        table=reported,
        line=StaticLine.fit(madds, val.correct1),
        oracle=oracle_curve(correct, madds),
        ceiling=forecast.curve(val, reported),
        bootstrap=bootstrap,
    )
    static = resample_points(correct, madds, bootstrap.num_resamples)
    runs = {slot: run_on_table(router, reported) for slot, router in front.items()}
    others = {
        pick.slot: run_on_table(router, reported) for pick, router in contenders.items() if pick.slot not in front
    }
    points = _points(val, controls, {slot: router.kind for slot, router in front.items()}, runs, others)
    low, high = bootstrap_interval(static.resampled_top1)
    spread = np.linspace(madds.min(), madds.max() + madds.min() - reported.trunk_madds, NUM_CURVE_POINTS)
    cascade = cascade_curve(val, reported, madds, reported.trunk_madds, spread)
    thinned = np.unique(np.linspace(0, len(controls.oracle.top1) - 1, NUM_CURVE_POINTS).astype(int))
    return SplitAnalysis(
        split=reported.split,
        num_images=reported.num_images,
        routes=reported.routes,
        static_madds_m=_floats(madds / 1e6),
        static_top1=tuple(Interval(*map(float, row)) for row in zip(static.top1, low, high, strict=True)),
        static_top5=_floats(reported.correct5.mean(0)),
        line_madds_m=_floats(controls.line.madds / 1e6),
        line_top1=_floats(correct[:, list(controls.line.vertices)].mean(0)),
        cascade_madds_m=tuple(point.madds / 1e6 for point in cascade),
        cascade_top1=tuple(point.top1 for point in cascade),
        oracle_madds_m=_floats(controls.oracle.madds[thinned] / 1e6),
        oracle_top1=_floats(controls.oracle.top1[thinned]),
        reachable_madds_m=_floats(controls.ceiling.madds / 1e6),
        reachable_top1=_floats(controls.ceiling.top1),
        budgets_m=_floats(budgets(madds, BUDGET_SHARES) / 1e6),
        points=points,
        mean_top1=_mean_top1(controls, list(runs.values())),
        routers=router_shares(controls, contenders),
        class_counts=tuple(_class_counts(reported, run.routes, num_classes) for run in runs.values()),
        static_added=tuple(added_values(static_run(reported, route), reported) for route in range(reported.num_routes)),
    )


@dataclass(frozen=True)
class _SplitControls:
    """The routing table of a split, and the controls of its routers."""

    table: RoutingTable
    line: StaticLine
    oracle: OracleCurve
    ceiling: CeilingCurve
    bootstrap: Bootstrap

    def score(self, runs: Sequence[TableRun]) -> _RunScores:
        """Score runs beside the static line, the oracle and the ceiling, each at its own mean
        MAdds."""
        table = self.table
        correct = _answers(table.correct1, runs)
        spent = np.column_stack([run.madds for run in runs]).astype(np.float64)
        top1, madds = correct.mean(0), spent.mean(0)
        static, oracle, ceiling = (
            self.line.value_at(madds, table.correct1),
            self.oracle.at(madds),
            self.ceiling.at(madds),
        )
        return _RunScores(
            correct=correct,
            spent=spent,
            gain=gain_over_static(correct, spent, self.line, table.correct1, self.bootstrap.num_resamples),
            static=static,
            oracle=oracle,
            ceiling=ceiling,
            oracle_share=share_of_gap(top1, static, oracle),
            ceiling_share=share_of_gap(top1, static, ceiling, resolution=1 / table.num_images),
        )


@dataclass(frozen=True)
class _RunScores:
    """Scores of P runs and their controls; all fields are [P], except for the first two."""

    correct: NDArray[np.bool_]
    """[N, P]: whether each run answers each image rightly."""
    spent: NDArray[np.float64]
    """[N, P] MAdds."""
    gain: Gain
    static: NDArray[np.float64]
    oracle: NDArray[np.float64]
    ceiling: NDArray[np.float64]
    oracle_share: NDArray[np.float64]
    ceiling_share: NDArray[np.float64]


def _points(
    val: RoutingTable,
    controls: _SplitControls,
    kinds: Mapping[int, str],
    runs: Mapping[int, TableRun],
    others: Mapping[int, TableRun],
) -> tuple[PointAnalysis, ...]:
    if not runs:
        return ()
    table, scored = controls.table, controls.score(list(runs.values()))
    sample = resample_points(scored.correct, scored.spent, controls.bootstrap.num_resamples)
    low, high = bootstrap_interval(sample.resampled_top1)
    answering = np.column_stack([run.routes for run in runs.values()])
    chance = gain_over_random(answering, table.correct1, controls.bootstrap.num_resamples)
    widest = table.correct1[:, int(table.madds.argmax())]
    beside_widest = gain_over_one(scored.correct, widest, controls.bootstrap.num_resamples)
    stability = _stability(controls, sample, runs)
    ties = _ties(controls, runs, others)
    cascade = _cascade_at(val, table, sample.madds)
    points = []
    for index, (slot, run) in enumerate(runs.items()):
        beside = cascade.get(index)
        points.append(
            PointAnalysis(
                slot=slot,
                router=kinds[slot],
                metrics=score_run(run, table),
                top1=Interval(float(sample.top1[index]), float(low[index]), float(high[index])),
                gain=interval_at(scored.gain, index),
                gain_over_random=Interval(
                    float(chance.value[index]), float(chance.low[index]), float(chance.high[index])
                ),
                random_top1=random_routing(table.correct1, run.histogram),
                cascade_top1=None if beside is None else beside.top1,
                cascade_madds_m=None if beside is None else beside.madds / 1e6,
                cascade_escalated=None if beside is None else beside.escalated,
                oracle_top1=_finite(scored.oracle[index]),
                share_of_oracle_gap=_finite(scored.oracle_share[index]),
                reachable_top1=_finite(scored.ceiling[index]),
                share_of_reachable_gap=_finite(scored.ceiling_share[index]),
                stability=float(stability[index]),
                ties=ties[slot],
                histogram=_floats(run.histogram),
                runs=_floats(run.runs),
                over_widest=interval_at(beside_widest, index),
            )
        )
    return tuple(points)


def _stability(controls: _SplitControls, sample: PointSample, runs: Mapping[int, TableRun]) -> NDArray[np.float64]:
    """Stability [P] of the points in the objectives of the sweep: objectives that depend on the
    images are resampled, the others keep their measured values."""
    resampled = {"top1": sample.resampled_top1, "madds_m": sample.resampled_madds / 1e6}
    names = [name for name, _ in controls.bootstrap.objectives]
    if "top5" in names:
        among5 = _answers(controls.table.correct5, list(runs.values()))
        resampled["top5"] = resample_points(among5, 0, controls.bootstrap.num_resamples).resampled_top1
    columns = [
        resampled[name] if name in resampled else np.array([controls.bootstrap.measured[slot][name] for slot in runs])
        for name in names
    ]
    return front_stability(
        columns, [goal for _, goal in controls.bootstrap.objectives], _decisions(list(runs.values()))
    )


def _ties(
    controls: _SplitControls, front: Mapping[int, TableRun], others: Mapping[int, TableRun]
) -> dict[int, tuple[int, ...]]:
    """Slot of each front point -> slots of the points tied with it, both on the front and in
    `others`."""
    runs = {**front, **others}
    spent = np.column_stack([run.madds for run in runs.values()])
    sample = resample_points(
        _answers(controls.table.correct1, list(runs.values())), spent, controls.bootstrap.num_resamples
    )
    groups = tied_groups(sample, [slot in front for slot in runs])
    slots = list(runs)
    return {slots[anchor]: tuple(slots[index] for index in group) for anchor, group in groups.items()}


def _answers(right: NDArray[np.bool_], runs: Sequence[TableRun]) -> NDArray[np.bool_]:
    """Whether the answering route of each run is right, [N, P], from `right` [N, K]."""
    return np.column_stack([right[np.arange(len(right)), run.routes] for run in runs])


def _mean_top1(controls: _SplitControls, runs: Sequence[TableRun]) -> Interval | None:
    if not runs:
        return None
    sample = resample_points(_answers(controls.table.correct1, runs), 0, controls.bootstrap.num_resamples)
    low, high = bootstrap_interval(sample.resampled_top1.mean(axis=1))
    return Interval(float(sample.top1.mean()), float(low), float(high))


def router_shares(controls: _SplitControls, contenders: Mapping[BudgetPick, Router]) -> tuple[RouterShare, ...]:
    """Results of the trials that represent kinds of router, in the order of `contenders`."""
    if not contenders:
        return ()
    table = controls.table
    runs = [run_on_table(router, table) for router in contenders.values()]
    scored = controls.score(runs)
    limits = dict(zip(BUDGET_SHARES, budgets(table.madds, BUDGET_SHARES) / 1e6, strict=True))
    return tuple(
        RouterShare(
            router=pick.router,
            budget_share=pick.budget_share,
            budget_m=float(limits[pick.budget_share]),
            slot=pick.slot,
            madds_m=float(scored.spent[:, index].mean() / 1e6),
            top1=float(scored.correct[:, index].mean()),
            static_top1=_finite(scored.static[index]),
            oracle_top1=_finite(scored.oracle[index]),
            reachable_top1=_finite(scored.ceiling[index]),
            gain=interval_at(scored.gain, index),
            share_of_oracle_gap=_finite(scored.oracle_share[index]),
            share_of_reachable_gap=_finite(scored.ceiling_share[index]),
            is_collapsed=bool(runs[index].histogram.max() > COLLAPSE_SHARE),
        )
        for index, pick in enumerate(contenders)
    )


def interval_at(gain: Gain, index: int) -> Interval | None:
    """The gain of one point; None below the static line's first vertex."""
    found = Interval(float(gain.value[index]), float(gain.low[index]), float(gain.high[index]))
    return found if np.isfinite(found.value) else None


def _decisions(runs: Sequence[TableRun]) -> NDArray[np.int64]:
    """Numbers [N, P] that are equal where two runs treat an image alike: they run the same routes
    and answer with the same one."""
    did = [np.column_stack([run.routes, np.packbits(run.ran, axis=1)]) for run in runs]
    _, number = np.unique(np.concatenate(did), axis=0, return_inverse=True)
    return number.reshape(len(runs), -1).T


def _cascade_at(val: RoutingTable, table: RoutingTable, madds: NDArray[np.float64]) -> dict[int, CascadePoint]:
    """Index of each budget -> the cascade chosen for it on `val`; budgets below the cheapest route
    have none."""
    points = cascade_curve(val, table, table.madds, table.trunk_madds, madds)
    by_budget = {point.budget: point for point in points}
    return {index: by_budget[float(budget)] for index, budget in enumerate(madds) if float(budget) in by_budget}


def _class_counts(table: RoutingTable, routes: NDArray[np.int64], num_classes: int) -> tuple[tuple[int, ...], ...]:
    counts = np.zeros((num_classes, table.num_routes), dtype=np.int64)
    np.add.at(counts, (table.labels, routes), 1)
    return tuple(tuple(int(count) for count in row) for row in counts)


def _floats(values: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
