"""A front in top-1 and latency on one device: routers and static sub-networks, timed there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dsnet.measure.latency import LatencySamples
from dsnet.measure.latency_table import PUBLISHED, LatencyTable
from search.front.pareto import Goal, front_mask
from search.front.statistics import bootstrap_interval

GOALS: tuple[Goal, Goal] = ("maximize", "minimize")
"""Goals of top-1 and latency."""
NUM_RESAMPLES = 400
"""Number of times that the rounds are drawn again."""
SURE = 0.95
"""A point is judged with certainty if the judgement is the same in this share of the resamples."""


@dataclass(frozen=True)
class Candidate:
    """A static sub-network, or a router with its routes on `val`."""

    name: str
    top1: float
    """Fraction, on `val`."""
    madds_m: float
    """Mean over the images, in millions."""
    runs: tuple[float, ...] | None = None
    """Share of the images that run each route; None for a static sub-network."""
    router: str = PUBLISHED
    """Its kind, as in `gate.router`."""


@dataclass(frozen=True)
class TimedPoint:
    """A candidate with its latency at one batch size on the device."""

    name: str
    top1: float
    madds_m: float
    is_static: bool
    latency_ms: float
    """Of the whole batch."""
    low_ms: float
    high_ms: float
    """95 % interval over the rounds."""
    is_on_front: bool
    """Whether no other candidate is at least as good in top-1 and latency, and better in one."""
    front_share: float
    """Share of the resamples in which that is so."""
    dominated_by: str | None
    """The fastest candidate that dominates it; None on the front."""
    static: str | None
    """The fastest static sub-network with at least its top-1; None if there is none."""
    static_ms: float | None
    """Latency of that sub-network."""

    @property
    def is_sure(self) -> bool:
        """Whether the times decide if it is on the front."""
        return (self.front_share if self.is_on_front else 1 - self.front_share) >= SURE


def latency_fronts(
    samples: LatencySamples,
    candidates: Sequence[Candidate],
    routes: Sequence[str],
    num_resamples: int = NUM_RESAMPLES,
) -> dict[int, tuple[TimedPoint, ...]]:
    """Latency of every candidate for each batch size, and which of them are on the front.

    A router's latency is the ideal one, as among the metrics of a trial
    (`dsnet.measure.latency.BatchClock`). Intervals are those of the times; top-1 is taken as
    measured.

    Args:
        samples: times on the device.
        candidates: n routers and static sub-networks, n >= 1.
        routes: names of the routes that `Candidate.runs` counts.
        num_resamples: number of times that the rounds are drawn again, at least 1.

    Returns:
        batch size -> the n candidates in their order.
    """
    rng = np.random.default_rng(0)
    tables = [samples.table(), *(samples.resampled(rng) for _ in range(num_resamples))]
    fronts = {}
    for size in tables[0].batch_sizes:
        measured, *resamples = _latencies(tables, size, candidates, routes)
        fronts[size] = _timed_points(candidates, measured, np.array(resamples))
    return fronts


def _timed_points(
    candidates: Sequence[Candidate], ms: NDArray[np.float64], resamples: NDArray[np.float64]
) -> tuple[TimedPoint, ...]:
    """See `latency_fronts`; latencies [n], and those of R resamples [R, n]."""
    top1 = np.array([candidate.top1 for candidate in candidates])
    is_static = np.array([candidate.runs is None for candidate in candidates])
    low, high = bootstrap_interval(resamples)
    on_front = _on_front(top1, ms)
    shares = np.mean([_on_front(top1, row) for row in resamples], axis=0)
    points = []
    for k, candidate in enumerate(candidates):
        is_better = (top1 >= top1[k]) & (ms <= ms[k]) & ((top1 > top1[k]) | (ms < ms[k]))
        better = _fastest(ms, is_better)
        static = _fastest(ms, is_static & (top1 >= top1[k]))
        points.append(
            TimedPoint(
                name=candidate.name,
                top1=candidate.top1,
                madds_m=candidate.madds_m,
                is_static=candidate.runs is None,
                latency_ms=float(ms[k]),
                low_ms=float(low[k]),
                high_ms=float(high[k]),
                is_on_front=bool(on_front[k]),
                front_share=float(shares[k]),
                dominated_by=None if better is None else candidates[better].name,
                static=None if static is None else candidates[static].name,
                static_ms=None if static is None else float(ms[static]),
            )
        )
    return tuple(points)


def _latencies(
    tables: Sequence[LatencyTable], batch_size: int, candidates: Sequence[Candidate], routes: Sequence[str]
) -> list[NDArray[np.float64]]:
    """For each table the latencies [n] of all candidates."""
    clock = tables[0].clock(batch_size, routes)
    chances = [None if own.runs is None else clock.chances(np.array(own.runs)) for own in candidates]

    def of_table(table: LatencyTable) -> NDArray[np.float64]:
        clock = table.clock(batch_size, routes)
        return np.array(
            [
                table.static_ms(own.name, batch_size) if chance is None else clock.expected_ms(chance, own.router)
                for own, chance in zip(candidates, chances, strict=True)
            ]
        )

    return list(map(of_table, tables))


def _on_front(top1: NDArray[np.float64], ms: NDArray[np.float64]) -> NDArray[np.bool_]:
    return front_mask(np.column_stack([top1, ms]), GOALS)


def _fastest(ms: NDArray[np.float64], mask: NDArray[np.bool_]) -> int | None:
    chosen = np.flatnonzero(mask)
    return int(chosen[np.argmin(ms[chosen])]) if len(chosen) else None
