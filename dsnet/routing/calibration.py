"""Calibration of the price of compute (beta) so that a router's mean cost meets its target, without
labels (docs/definitions.md)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Float64
from numpy.typing import NDArray

Floats = NDArray[np.float64]
RESOLUTION = 1e-12
"""Resolution of `nearest_price` relative to its bound: finer than the spacing of break points,
coarser than rounding."""


def calibrate(
    scores: Float64[np.ndarray, "images routes"], madds: Float64[np.ndarray, " routes"], target: float
) -> float:
    """The beta for which the choices argmax_k(l_k - beta * cost_k) have the mean cost nearest to
    `target`.

    The best option of an image follows the upper envelope of the lines l_k - beta * cost_k: as beta
    rises it moves to cheaper options at a few break points. The break points of all images make the
    mean cost a falling step function of beta. The middle of the step nearest to the target is
    returned, since at its ends options tie.

    Args:
        scores: [N, R] logits.
        madds: [R] cost of each option; beta is in logits per cost of the most expensive option.
        target: wanted mean cost, in the unit of `madds`.
    """
    cost = madds / madds.max()
    distinct = np.unique(cost)
    if len(distinct) == 1:
        return 0.0
    best = np.column_stack([scores[:, cost == value].max(1) for value in distinct])
    beta, drop = _break_points(best, distinct)
    order = np.argsort(beta, kind="stable")
    beta, drop = beta[order], drop[order]
    is_end = np.r_[beta[1:] > beta[:-1], True]  # images that move at the same beta move together
    edges = beta[is_end]
    levels = distinct[-1] - np.r_[0.0, np.cumsum(drop)[is_end]] / len(scores)
    step = int(np.abs(levels - target / madds.max()).argmin())
    # Beyond the outermost break points every beta is on the same step.
    margin = 1.0 + edges[-1] - edges[0]
    return float(_middle(np.r_[edges[0] - margin, edges, edges[-1] + margin], step))


def _middle(edges: Floats, step: int) -> float:
    """The middle of a step; an edge itself where no float lies between its two edges."""
    return 0.5 * edges[step] + 0.5 * edges[step + 1]


def _break_points(scores: Floats, cost: Floats) -> tuple[Floats, Floats]:
    """(beta, drop in cost) of every move of every image, from the most expensive option on.

    `scores` are [N, R]; `cost` [R] rises strictly.
    """
    rows = np.arange(len(scores))
    current = np.full(len(scores), len(cost) - 1)
    betas, drops = [], []
    while len(rows):
        gap = cost[current][:, None] - cost
        with np.errstate(divide="ignore", invalid="ignore"):
            meets = np.where(gap > 0, (scores[rows, current][:, None] - scores[rows]) / gap, np.inf)
        # Among options that meet at the same beta the cheapest, which is the first, continues the
        # envelope.
        following = meets.argmin(1)
        betas.append(meets[np.arange(len(rows)), following])
        drops.append(cost[current] - cost[following])
        is_left = following > 0
        rows, current = rows[is_left], following[is_left]
    return np.concatenate(betas), np.concatenate(drops)


def nearest_price(mean_cost: Callable[[float], float], target: float, bound: float) -> float:
    """The beta in -bound..bound for which the mean cost comes nearest to `target`, found by
    bisection.

    For routers that decide at several gates: a later gate sees other evidence when an earlier
    decision changes, so that the mean cost falls with beta in general but not everywhere. Bisection
    finds a crossing of the target; among all values evaluated the nearest is taken, and the middle
    of its step is returned, since at the ends of a step rounding decides for some image.

    Args:
        mean_cost: Mean cost as a function of beta.
        target: Wanted mean cost.
        bound: Largest absolute value of beta, > 0.
    """
    low, high = -bound, bound
    met = {low: mean_cost(low), high: mean_cost(high)}
    while high - low > RESOLUTION * bound:
        middle = 0.5 * (low + high)
        met[middle] = mean_cost(middle)
        if met[middle] >= target:
            low = middle
        else:
            high = middle
    nearest = min(met, key=lambda beta: (abs(met[beta] - target), abs(beta)))
    below = [beta for beta in met if beta < nearest and met[beta] != met[nearest]]
    above = [beta for beta in met if beta > nearest and met[beta] != met[nearest]]
    left = _end_of_step(mean_cost, nearest, max(below, default=-bound), RESOLUTION * bound)
    right = _end_of_step(mean_cost, nearest, min(above, default=bound), RESOLUTION * bound)
    middle = 0.5 * left + 0.5 * right
    return middle if mean_cost(middle) == met[nearest] else nearest


def _end_of_step(mean_cost: Callable[[float], float], inside: float, outside: float, resolution: float) -> float:
    """The last beta, from `inside` towards `outside`, with the mean cost of `inside`; `outside` if
    it has that too."""
    level = mean_cost(inside)
    if mean_cost(outside) == level:
        return outside
    while abs(outside - inside) > resolution:
        middle = 0.5 * (inside + outside)
        if mean_cost(middle) == level:
            inside = middle
        else:
            outside = middle
    return inside


def confidence_threshold(confidence: Float[np.ndarray, " images"], first: float, extra: float, target: float) -> float:
    """The confidence below which a cascade runs its second route, for a mean cost nearest to
    `target`.

    The mean cost is first + share * extra, where share is the share of images that run the second
    route.

    Args:
        confidence: [N] confidence of the first route.
        first: cost of running the first route.
        extra: additional cost of running the second route, > 0.
        target: wanted mean cost.

    Returns:
        The middle between two neighbouring confidences; -inf if no image runs the second route,
        +inf if all do.
    """
    ordered = np.sort(confidence.astype(np.float64))
    # Images of equal confidence cannot be separated by a threshold.
    counts = np.r_[0, np.flatnonzero(np.diff(ordered)) + 1, len(ordered)]
    count = int(counts[np.abs(first + counts / len(ordered) * extra - target).argmin()])
    if count == 0:
        return -np.inf
    if count == len(ordered):
        return np.inf
    return float(0.5 * ordered[count - 1] + 0.5 * ordered[count])
