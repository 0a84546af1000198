"""The controls of a dynamic network: static line, random routing and confidence cascade; and the
oracle, their upper bound.

Everything is computed from the arrays of a routing table: N images, K routes; correct [N, K] bool,
confidence [N, K] (largest probability), madds [K] of each whole route (the caller adds a gate's own
cost where it applies). Choices (vertices, pairs, thresholds) are made on `val` and reported on the
given split. Accuracies are fractions, budgets are mean MAdds an image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from dsnet.routers.cascade import CascadeRouter  # it needs torch

Floats = NDArray[np.float64]


class RouteScores(Protocol):
    """The two arrays of a routing table that a cascade reads; `RoutingTable` has them."""

    @property
    def correct1(self) -> NDArray[np.bool_]:
        """bool [N, K]: whether each route is right."""

    @property
    def confidence(self) -> NDArray[np.float32]:
        """float [N, K]: largest probability of each route."""


def budgets(madds: ArrayLike, fractions: Sequence[float] = (0.25, 0.5, 0.75)) -> Floats:
    """Mean-MAdds budgets at the given fractions of the range from the cheapest to the widest
    route."""
    costs = np.asarray(madds, dtype=np.float64)
    found: Floats = costs.min() + np.asarray(fractions, dtype=np.float64) * np.ptp(costs)
    return found


@dataclass(frozen=True)
class StaticLine:
    """The best top-1 of static sub-networks, and of random mixtures of two of them, at a mean-MAdds
    budget.

    The vertices are the upper concave envelope of (MAdds, top-1 on `val`), from the cheapest
    sub-network to the most accurate one. The line ends there, because a budget need not be spent: a
    wider and worse sub-network would only lower the line.
    """

    vertices: tuple[int, ...]
    """Indices of the sub-networks, cheapest first."""
    madds: Floats
    """[V] MAdds of the vertices, increasing."""

    @classmethod
    def fit(cls, madds: ArrayLike, val_correct: ArrayLike) -> StaticLine:
        """Choose the vertices by the number of right answers.

        Args:
            madds: [K] MAdds of the sub-networks.
            val_correct: bool [N, K], whether each is right on `val`.
        """
        # Counts rather than accuracies, because with whole numbers it is decided exactly whether
        # three sub-networks lie on one straight line.
        return cls.through(madds, np.asarray(val_correct, dtype=bool).sum(axis=0))

    @classmethod
    def through(cls, madds: ArrayLike, val_score: ArrayLike) -> StaticLine:
        """Choose the vertices by a score of each sub-network on `val`: right answers, or top-1.

        Args:
            madds: [K] MAdds of the sub-networks.
            val_score: [K] their scores.
        """
        costs = np.asarray(madds, dtype=np.float64)
        num_correct = np.asarray(val_score, dtype=np.float64)
        hull: list[int] = []
        for index in np.lexsort((-num_correct, costs)):  # cheapest first, of equally cheap ones the best
            if hull and num_correct[index] <= num_correct[hull].max():
                continue
            while len(hull) > 1 and _is_below_chord(costs, num_correct, hull[-2], hull[-1], index):
                hull.pop()
            hull.append(int(index))
        return cls(vertices=tuple(hull), madds=costs[hull])

    def value_at(self, madds: ArrayLike, correct: ArrayLike) -> Floats:
        """Expected top-1 on a split at mean-MAdds budgets, with each image assigned at random to
        one of the two neighbouring vertices.

        Args:
            madds: budgets of any shape. Below the cheapest sub-network the value is NaN, above the
                last vertex it is that vertex's top-1.
            correct: bool [N, K] of all sub-networks on the reported split.

        Returns:
            float64 in the shape of `madds`.
        """
        vertex_top1 = np.asarray(correct, dtype=bool)[:, list(self.vertices)].mean(axis=0)
        return self.mix(np.asarray(madds, dtype=np.float64), vertex_top1)

    def mix(self, madds: Floats, vertex_top1: Floats) -> Floats:
        """The line at given budgets for given accuracies of its vertices: `value_at` for resampled
        accuracies.

        Args:
            madds: budgets [...] or [R, P].
            vertex_top1: [V], or [R, V] to go with [R, P].
        """
        upper = np.clip(np.searchsorted(self.madds, madds, side="left"), 1, None)
        upper = np.minimum(upper, len(self.madds) - 1)  # 0 where there is one vertex only
        lower = np.maximum(upper - 1, 0)
        span = np.where(upper > lower, self.madds[upper] - self.madds[lower], 1.0)
        share = np.clip((madds - self.madds[lower]) / span, 0.0, 1.0)
        mixed = (1.0 - share) * _take_last(vertex_top1, lower) + share * _take_last(vertex_top1, upper)
        return np.where(madds >= self.madds[0], mixed, np.nan)


def _is_below_chord(x: Floats, y: Floats, left: int, middle: int, right: int) -> bool:
    """Whether `middle` lies on or below the chord from `left` to `right`."""
    return bool((y[middle] - y[left]) * (x[right] - x[left]) <= (y[right] - y[left]) * (x[middle] - x[left]))


def _take_last(values: Floats, indices: NDArray[np.intp]) -> Floats:
    """`values[..., indices]`, row by row where `values` has rows."""
    return values[indices] if values.ndim == 1 else np.take_along_axis(values, indices, axis=-1)


def random_routing(correct: ArrayLike, histogram: ArrayLike) -> float:
    """Expected top-1 if images are assigned to routes at random with a given histogram; exact, not
    sampled.

    Args:
        correct: bool [N, K], whether each route is right.
        histogram: [K] counts or shares of the routes, with a positive sum.
    """
    shares = np.asarray(histogram, dtype=np.float64)
    if shares.sum() <= 0 or (shares < 0).any():
        raise ValueError(f"The histogram {shares.tolist()} must hold no negative share and a positive sum.")
    return float(np.asarray(correct, dtype=bool).mean(axis=0) @ (shares / shares.sum()))


@dataclass(frozen=True)
class CascadePoint:
    """The best cascade for one budget: run `first`, stop if its confidence reaches `threshold`,
    else run `second`."""

    budget: float
    """Largest mean MAdds on `val`."""
    first: int
    second: int
    threshold: float
    """-inf never runs the second route, +inf always does."""
    val_top1: float
    val_madds: float
    top1: float
    """On the reported split, like `madds` and `escalated`."""
    madds: float
    escalated: float
    """Share of images that run both routes."""


def cascade_curve(
    val: RouteScores, reported: RouteScores, madds: ArrayLike, trunk_madds: float, budgets: ArrayLike
) -> list[CascadePoint]:
    """The best confidence cascade of two routes for each budget.

    A cascade costs everything that it executes, the shared trunk once: trunk + tail_first +
    [escalated] * tail_second. Pair (cheaper route first) and threshold are those with the highest
    top-1 on `val` whose mean cost on `val` is within the budget; of equal ones the cheapest.

    Args:
        val: table on which pairs and thresholds are chosen.
        reported: table of the split of `top1` and `madds`.
        madds: [K], K >= 2.
        trunk_madds: the part of every route's `madds` that they share.
        budgets: [B] mean MAdds.

    Returns:
        One point for each budget, in order, leaving out budgets below the cheapest route.
    """
    costs = np.asarray(madds, dtype=np.float64)
    limits = np.asarray(budgets, dtype=np.float64).tolist()
    best: dict[float, _Choice] = {}
    for first, second, pair in _pairs_on_val(val, costs, trunk_madds):
        for limit in limits:
            cut = pair.best_within(limit)
            if cut is not None and (limit not in best or cut.beats(best[limit].cut)):
                best[limit] = _Choice(first, second, cut)
    return [_report(limit, best[limit], reported, costs, trunk_madds) for limit in limits if limit in best]


def run_cascade(
    cascade: CascadeRouter, scores: RouteScores, madds: ArrayLike, trunk_madds: float
) -> tuple[NDArray[np.bool_], Floats, NDArray[np.bool_]]:
    """Run a cascade on the stored scores of each image, by the rule of the router itself.

    Returns:
        (correct bool [N], MAdds spent [N], escalated bool [N]).
    """
    costs = np.asarray(madds, dtype=np.float64)
    escalated: NDArray[np.bool_] = np.asarray(
        cascade.goes_on(scores.confidence[:, cascade.first].astype(np.float64)), dtype=bool
    )
    correct = np.where(escalated, scores.correct1[:, cascade.second], scores.correct1[:, cascade.first])
    return correct, costs[cascade.first] + escalated * (costs[cascade.second] - trunk_madds), escalated


class _Cut(NamedTuple):
    """One threshold of a pair, with its top-1 and mean MAdds on `val`."""

    threshold: float
    top1: float
    madds: float

    def beats(self, other: _Cut) -> bool:
        return (self.top1, -self.madds) > (other.top1, -other.madds)


class _Choice(NamedTuple):
    first: int
    second: int
    cut: _Cut


def _report(budget: float, choice: _Choice, scores: RouteScores, madds: Floats, trunk_madds: float) -> CascadePoint:
    first, second, cut = choice
    from dsnet.routers.cascade import CascadeRouter

    correct, spent, escalated = run_cascade(CascadeRouter(first, second, cut.threshold), scores, madds, trunk_madds)
    return CascadePoint(
        budget=budget,
        first=first,
        second=second,
        threshold=cut.threshold,
        val_top1=cut.top1,
        val_madds=cut.madds,
        top1=float(correct.mean()),
        madds=float(spent.mean()),
        escalated=float(escalated.mean()),
    )


@dataclass(frozen=True)
class _Pair:
    """All thresholds of one pair of routes on `val`, by increasing cost."""

    threshold: Floats
    madds: Floats
    top1: Floats
    best_so_far: NDArray[np.intp]
    """Index of the best (then cheapest) threshold among the first 1, 2, ... ones."""

    def best_within(self, budget: float) -> _Cut | None:
        """The best threshold within a budget; None if the first route alone costs more."""
        num_affordable = int(np.searchsorted(self.madds, _with_slack(budget), side="right"))
        if num_affordable == 0:
            return None
        chosen = self.best_so_far[num_affordable - 1]
        return _Cut(float(self.threshold[chosen]), float(self.top1[chosen]), float(self.madds[chosen]))


def _pairs_on_val(val: RouteScores, madds: Floats, trunk_madds: float) -> Iterator[tuple[int, int, _Pair]]:
    """Yield every (cheaper route, costlier route) with its thresholds."""
    by_cost = np.argsort(madds, kind="stable").tolist()
    for position, first in enumerate(by_cost):
        # Sorted once for all partners: the least confident images are the first to go on.
        images = np.argsort(val.confidence[:, first], kind="stable")
        confidence = val.confidence[images, first].astype(np.float64)
        # Images of equal confidence stop or go on together, so that a threshold can only lie
        # between such groups.
        num_escalated = np.r_[0, np.flatnonzero(np.diff(confidence)) + 1, len(images)]
        threshold = np.r_[-np.inf, confidence[num_escalated[1:-1]], np.inf]
        for second in by_cost[position + 1 :]:
            # If the m least confident images go on, the number of right answers changes by the sum
            # of their differences.
            change = val.correct1[images, second].astype(np.int64) - val.correct1[images, first]
            top1 = (val.correct1[:, first].sum() + np.r_[0, np.cumsum(change)][num_escalated]) / len(images)
            is_record = np.r_[True, top1[1:] > np.maximum.accumulate(top1)[:-1]]
            pair = _Pair(
                threshold=threshold,
                madds=madds[first] + num_escalated / len(images) * (madds[second] - trunk_madds),
                top1=top1,
                best_so_far=np.maximum.accumulate(np.where(is_record, np.arange(len(top1)), 0)),
            )
            yield first, second, pair


class OracleCurve(NamedTuple):
    """The best accuracy that any assignment of images to routes reaches at a mean cost, knowing the
    labels."""

    madds: Floats
    """[M] mean MAdds, not decreasing; the first is that of the cheapest route for all images."""
    top1: Floats
    """[M] top-1, increasing by one image a step."""

    def at(self, budget: ArrayLike) -> Floats:
        """The best top-1 at mean MAdds <= budget (any shape); NaN below the cheapest route."""
        num_affordable = np.searchsorted(self.madds, _with_slack(np.asarray(budget, dtype=np.float64)), side="right")
        return np.where(num_affordable > 0, self.top1[np.maximum(num_affordable - 1, 0)], np.nan)


def oracle_curve(correct: ArrayLike, madds: ArrayLike) -> OracleCurve:
    """Compute the oracle by greedy assignment in the order of gain per cost.

    Images that the cheapest route gets wrong move to their cheapest right route, the cheapest move
    first. Every such move gains exactly one image, so that the greedy order is exact at each of the
    returned points; between two of them the curve is a step (an optimum over fractions of images
    would be at most one image higher).

    Args:
        correct: bool [N, K].
        madds: [K].
    """
    right, costs = np.asarray(correct, dtype=bool), np.asarray(madds, dtype=np.float64)
    num_images = len(right)
    cheapest_right = np.where(right, costs, np.inf).min(axis=1)
    extra = np.sort(cheapest_right[np.isfinite(cheapest_right)]) - costs.min()
    num_free = int((extra == 0).sum())
    paid = np.r_[0.0, np.cumsum(extra[num_free:])]
    return OracleCurve(
        madds=costs.min() + paid / num_images,
        top1=(num_free + np.arange(len(paid))) / num_images,
    )


def share_of_gap(
    router_top1: ArrayLike, static_top1: ArrayLike, upper_top1: ArrayLike, resolution: float = 0.0
) -> Floats:
    """Share of the gap from the static line to the oracle, or to the reachable ceiling, that a
    router closes: (router - static) / (upper - static) at equal budgets.

    Args:
        resolution: largest gap (one image, say) that counts as none, because a share of it has no
            meaning.

    Returns:
        the share; NaN where there is no gap.
    """
    router, static, upper = (np.asarray(x, dtype=np.float64) for x in (router_top1, static_top1, upper_top1))
    gap = upper - static
    has_gap = gap > resolution * (1 + 1e-9)  # false for NaN
    return np.where(has_gap, (router - static) / np.where(has_gap, gap, 1.0), np.nan)


def _with_slack(budget: ArrayLike) -> Floats:
    """The budget, increased so that a cost that equals it up to rounding is within it."""
    return np.asarray(budget, dtype=np.float64) * (1.0 + 1e-12)
