"""Analysis of a front on one split: every dynamic point beside its controls, with paired intervals
over images.

The functions are pure: they map tables and routers to numbers. All results are JSON-able, so that
those of the sealed split are stored once and the split never has to be read again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsnet.gates.fit import COLLAPSE_SHARE, score_run
from dsnet.routers.base import Router
from dsnet.routing.routing_table import RoutingTable
from dsnet.routing.table_routing import TableRun, run_on_table
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
from search.front.pareto import DEFAULT_OBJECTIVES, Goal, Pick, front_mask
from search.front.statistics import (
    Gain,
    PointSample,
    bootstrap_interval,
    front_stability,
    gain_over_one,
    gain_over_random,
    gain_over_static,
    resample_points,
    significant_sign,
    tied_groups,
    unpaired_difference,
)

NUM_CURVE_POINTS = 60
NUM_RESAMPLES = 1000
BUDGET_SHARES = (0.25, 0.5, 0.75)
"""Budgets at which kinds of router are compared, as shares of the range of MAdds."""
BUDGET_SLACK = 0.005
"""Relative excess over a budget that is allowed: a router is calibrated to the nearest step, which
may lie a little above the budget."""


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


@dataclass(frozen=True)
class Interval:
    """A value (fraction) with its 95 % bootstrap interval over images."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PointAnalysis:
    """Metrics of one router on one split, beside those of its controls. All routes that run for an
    image are paid for; the last one answers."""

    slot: int
    router: str
    """Its kind, as in `gate.router`."""
    metrics: dict[str, float]
    """Metrics as of a trial: top1, top5, ce, madds_m, p95_madds_m, route_entropy, max_route_share,
    and those that plugins add."""
    top1: Interval
    gain: Interval | None
    """Gain in top-1 over the static line at the same mean MAdds; None below the cheapest
    sub-network, where there is no line."""
    gain_over_random: Interval
    """Gain in top-1 over random routing with the same histogram."""
    random_top1: float
    """Expected top-1 of random routing with the same histogram: images are assigned to the
    answering routes at random. For a cascade that is a cascade which sends the same share of the
    images on, but drawn at random: it runs as much, and answers with the same routes equally
    often."""
    cascade_top1: float | None
    """Top-1 of the confidence cascade whose pair and threshold were chosen on `val` for the same
    budget; None if no cascade is as cheap."""
    cascade_madds_m: float | None
    """Mean MAdds of that cascade on this split, in millions: the budget holds on `val`."""
    cascade_escalated: float | None
    """Share of the images that it sends on to its second route."""
    oracle_top1: float | None
    """Top-1 of the oracle at the same mean MAdds."""
    share_of_oracle_gap: float | None
    """Share of the gap from the static line to the oracle that the router closes."""
    reachable_top1: float | None
    """Top-1 of the reachable ceiling at the same mean MAdds."""
    share_of_reachable_gap: float | None
    """Share of the gap from the static line to the reachable ceiling that the router closes; None
    if the ceiling is not above the line by more than one image."""
    stability: float
    """Share of resamples in which the point is not dominated by another point of the front, in the
    objectives of the sweep."""
    ties: tuple[int, ...]
    """Slots of the other points, and of the trials that represent a kind of router, that are tied
    with this one: the 95 % interval of the paired difference in top-1 includes 0, and mean MAdds is
    within 1 %. Ties are not transitive."""
    histogram: tuple[float, ...]
    """Share of the images by the route that answers."""
    runs: tuple[float, ...]
    """Share of the images that run each route; the shares of a cascade add up to more than one."""
    over_widest: Interval | None = None
    """Gain in top-1 over the widest static sub-network on the same images; None in results of an
    earlier release."""

    @property
    def static_top1(self) -> float | None:
        """Top-1 of the static line at the same mean MAdds; None below the cheapest sub-network."""
        return None if self.gain is None else self.top1.value - self.gain.value

    @property
    def clear_share_of_oracle_gap(self) -> float | None:
        """`share_of_oracle_gap`, but None where the gap is within its noise: see `_clear_share`."""
        return _clear_share(self.share_of_oracle_gap, self.static_top1, self.oracle_top1, self.gain)

    @property
    def clear_share_of_reachable_gap(self) -> float | None:
        """`share_of_reachable_gap`, but None where the gap is within its noise: see
        `_clear_share`."""
        return _clear_share(self.share_of_reachable_gap, self.static_top1, self.reachable_top1, self.gain)

    @property
    def is_collapsed(self) -> bool:
        """See `is_collapsed`."""
        return is_collapsed(self.metrics)

    @property
    def is_cascade_collapsed(self) -> bool:
        """Whether the confidence cascade of the same budget stops, or goes on, for more than 99 %
        of the images."""
        share = self.cascade_escalated
        return share is not None and max(share, 1 - share) > COLLAPSE_SHARE


def is_collapsed(metrics: Mapping[str, float]) -> bool:
    """Whether one route answers more than 99 % of the images, by the metrics of a gate
    (docs/definitions.md, Router)."""
    return metrics["max_route_share"] > COLLAPSE_SHARE


def pickable(
    pick: Pick, rows: Sequence[Mapping[str, Any]], on_front: Sequence[Mapping[str, Any]]
) -> Sequence[Mapping[str, Any]]:
    """The rows among which `search.front.pareto.apply_pick` chooses.

    `all` and the knee are chosen among the rows on the front only, because copies of a front point
    are not exported twice; the knee among those that are not collapsed, if there is one.

    Args:
        pick: what the user wrote.
        rows: all gates, with their metrics as flat keys.
        on_front: those on the front.
    """
    if pick.kind == "knee":
        return [row for row in on_front if not is_collapsed(row)] or on_front
    return on_front if pick.kind == "all" else rows


@dataclass(frozen=True)
class BudgetPick:
    """The trial that represents a kind of router at a budget, chosen on `val`."""

    router: str
    """The kind of router."""
    budget_share: float
    """The budget as a share of the range of MAdds."""
    slot: int


@dataclass(frozen=True)
class RouterShare:
    """Result of a kind of router at a budget, beside its controls at the mean MAdds that it spends
    on the split."""

    router: str
    budget_share: float
    budget_m: float
    """The budget in million MAdds; it holds on `val`."""
    slot: int
    madds_m: float
    top1: float
    static_top1: float | None
    """Top-1 of the static line at `madds_m`; None below the cheapest sub-network, like the fields
    that follow, except `is_collapsed`."""
    oracle_top1: float | None
    reachable_top1: float | None
    gain: Interval | None
    """Paired gain in top-1 over the static line."""
    share_of_oracle_gap: float | None
    share_of_reachable_gap: float | None
    is_collapsed: bool

    @property
    def clear_share_of_oracle_gap(self) -> float | None:
        """`share_of_oracle_gap`, but None where the gap is within its noise: see `_clear_share`."""
        return _clear_share(self.share_of_oracle_gap, self.static_top1, self.oracle_top1, self.gain)

    @property
    def clear_share_of_reachable_gap(self) -> float | None:
        """`share_of_reachable_gap`, but None where the gap is within its noise: see
        `_clear_share`."""
        return _clear_share(self.share_of_reachable_gap, self.static_top1, self.reachable_top1, self.gain)


def _clear_share(share: float | None, static: float | None, limit: float | None, gain: Interval | None) -> float | None:
    """A share of the gap from the static line to a limit (the reachable ceiling or the oracle);
    None if the gap is within its noise.

    The noise of the gap is estimated by the interval of the router's own gain over the same line at
    the same cost: both are paired differences of a router and the line over the same images, and so
    vary alike. An interval of that width around the gap must exclude 0, as shown.
    """
    if share is None or static is None or limit is None or gain is None:
        return None
    gap, half = limit - static, (gain.high - gain.low) / 2
    return share if significant_sign(gap - half, gap + half) > 0 else None


@dataclass(frozen=True)
class SplitAnalysis:
    """The static sub-networks, the controls and the routers on one split."""

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
    reachable_madds_m: tuple[float, ...]
    """Points of the reachable ceiling; between two of them, images are assigned to either at
    random."""
    reachable_top1: tuple[float, ...]
    budgets_m: tuple[float, ...]
    """25, 50 and 75 % of the range of MAdds, in millions."""
    points: tuple[PointAnalysis, ...]
    mean_top1: Interval | None
    """Mean top-1 of the points, all on the same resampled images; None without a point."""
    routers: tuple[RouterShare, ...]
    """Every kind of router that the sweep has tried, at those budgets."""
    class_counts: tuple[tuple[tuple[int, ...], ...], ...] = ()
    """[points][classes][routes] numbers of images."""

    def to_json(self) -> dict[str, Any]:
        """A JSON-able mapping."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SplitAnalysis:
        """Rebuild an analysis from the result of `to_json`."""
        fields = {name: _tuples(value) for name, value in data.items()}
        fields["static_top1"] = tuple(Interval(**item) for item in data["static_top1"])
        fields["points"] = tuple(_point(item) for item in data["points"])
        fields["mean_top1"] = _interval_or_none(data["mean_top1"])
        fields["routers"] = tuple(
            RouterShare(**{**item, "gain": _interval_or_none(item["gain"])}) for item in data["routers"]
        )
        return cls(**fields)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _point(item: Mapping[str, Any]) -> PointAnalysis:
    intervals = {name: _interval_or_none(item[name]) for name in ("top1", "gain", "gain_over_random")}
    intervals["over_widest"] = _interval_or_none(item.get("over_widest"))
    tuples = {name: tuple(item[name]) for name in ("ties", "histogram", "runs")}
    return PointAnalysis(**{**item, **intervals, **tuples})


def _interval_or_none(item: Mapping[str, float] | None) -> Interval | None:
    return None if item is None else Interval(**item)


def optimism(chosen: SplitAnalysis, reported: SplitAnalysis) -> Interval | None:
    """Optimism of the front on the split that it was chosen on: mean top-1 of its points there,
    minus that on the other split; None without a point.

    The two splits share no image, so nothing is paired: each mean, over all points, has the
    interval over its own images, and `unpaired_difference` combines the two.
    """
    if chosen.mean_top1 is None or reported.mean_top1 is None:
        return None
    ends = [(mean.value, mean.low, mean.high) for mean in (chosen.mean_top1, reported.mean_top1)]
    return Interval(*unpaired_difference(*ends))


def budget_picks(
    trials: Iterable[tuple[int, str, Mapping[str, float]]], madds: NDArray[np.int64]
) -> tuple[BudgetPick, ...]:
    """For every kind of router and budget the trial with the highest top-1 on `val` within the
    budget; of equal ones the cheapest.

    Args:
        trials: (slot, kind of router, metrics on `val` with top1 and madds_m) of the completed
            trials.
        madds: [K] MAdds of all routes, whose range defines the budgets.

    Returns:
        the picks, by kind, then budget; a kind without a trial within a budget has none there.
    """
    known = list(trials)
    picks = []
    for kind in sorted({kind for _, kind, _ in known}):
        for share, budget in zip(BUDGET_SHARES, budgets(madds, BUDGET_SHARES), strict=True):
            affordable = [
                (metrics["top1"], -metrics["madds_m"], -slot)
                for slot, own, metrics in known
                if own == kind and metrics["madds_m"] * 1e6 <= budget * (1 + BUDGET_SLACK)
            ]
            if affordable:
                picks.append(BudgetPick(kind, share, -max(affordable)[2]))
    return tuple(picks)


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


def front_slots(slots: Sequence[int], values: NDArray[np.float64], goals: Sequence[Goal]) -> tuple[int, ...]:
    """The slots on the Pareto front of `values` [n, d], with the best in the first objective last;
    of equal points the first is kept.

    With 3 objectives, points that are equal in the first are ordered by the second, best last, then
    by the third.

    Args:
        slots: slots of the n points.
        values: their 2 or 3 objectives.
        goals: "maximize" or "minimize" for each objective.
    """
    if len(slots) == 0:
        return ()
    kept = np.flatnonzero(front_mask(values, goals, keep_duplicates=False))
    gains = values[kept] * np.array([1.0 if goal == "maximize" else -1.0 for goal in goals])
    return tuple(slots[kept[position]] for position in np.lexsort(gains.T[::-1]))


def spread_along_front(values: NDArray[np.float64], size: int, kept: Sequence[int] = ()) -> tuple[int, ...]:
    """Choose about `size` points of a front, spread evenly over it; both ends and the points of
    `kept` are always chosen.

    With 2 objectives the front is a line, and the points are evenly spaced along it. With 3 it is a
    surface: chosen are the ends of the first objective, the extremes of the others as far as `size`
    allows, then repeatedly the point that is farthest from all chosen so far. Objectives are scaled
    to their range on the front.

    Args:
        values: [n, d] objectives in the front's order, d = 2 or 3.
        size: at least 2; no more points than that are added to those of `kept`.
        kept: positions that are always chosen.

    Returns:
        positions in increasing order; all of them if there are no more than `size`.
    """
    if len(values) <= size:
        return tuple(range(len(values)))
    extent = np.ptp(values, axis=0)
    scaled = values / np.where(extent > 0, extent, 1.0)
    if values.shape[1] > 2:
        return _spread_over_surface(scaled, size, kept)
    steps = np.abs(np.diff(scaled, axis=0))
    length = np.r_[0.0, np.cumsum(steps.sum(axis=1))]
    wanted = np.linspace(0.0, length[-1], max(2, size - len(set(kept))))
    nearest = np.abs(length[None, :] - wanted[:, None]).argmin(axis=1)
    return tuple(sorted({*(int(position) for position in nearest), *kept}))


def _spread_over_surface(scaled: NDArray[np.float64], size: int, kept: Sequence[int]) -> tuple[int, ...]:
    extremes = [int(find(column)) for column in scaled.T[1:] for find in (np.argmin, np.argmax)]
    chosen = list(dict.fromkeys([0, len(scaled) - 1, *kept]))
    chosen += list(dict.fromkeys(position for position in extremes if position not in chosen))
    chosen = chosen[: max(size, len({0, len(scaled) - 1, *kept}))]
    distance = np.min([np.linalg.norm(scaled - scaled[position], axis=1) for position in chosen], axis=0)
    while len(chosen) < size and distance.max() > 0:
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(scaled - scaled[chosen[-1]], axis=1))
    return tuple(sorted(chosen))


def _floats(values: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
