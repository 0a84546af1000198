"""Calibration: the price of compute at which a router's mean cost meets its target, exactly and without labels.

It is defined in docs/definitions.md, Target, losses, calibration.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
RESOLUTION = 1e-12
"""Of `nearest_price`, relative to its bound: finer than the images' break points lie, coarser than rounding."""


def calibrate(scores: Floats, madds: Floats, target: float) -> float:
    """The beta for which options argmax_k(l_k - beta * cost_k) have a mean cost nearest to `target`.

    An image's best option is the upper envelope of the lines l_k - beta * cost_k over beta: it moves to cheaper options at a few break
    points. All break points in order make the mean cost as a falling step function of beta; the middle of the step nearest to the target
    is returned, away from its ties.

    Args:
        scores: [N, R] logits.
        madds: [R] cost of each option; beta is in logits per cost of the widest of them.
        target: wanted mean, in the unit of `madds`.
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
    """A number between two neighbouring edges; an edge itself where no float lies between them."""
    return 0.5 * edges[step] + 0.5 * edges[step + 1]


def _break_points(scores: Floats, cost: Floats) -> tuple[Floats, Floats]:
    """(beta, drop in cost) of every move of every image from the costliest option to the cheapest; `cost` [R] rises strictly."""
    rows = np.arange(len(scores))
    current = np.full(len(scores), len(cost) - 1)
    betas, drops = [], []
    while len(rows):
        gap = cost[current][:, None] - cost
        with np.errstate(divide="ignore", invalid="ignore"):
            meets = np.where(gap > 0, (scores[rows, current][:, None] - scores[rows]) / gap, np.inf)
        # Of options met at the same beta the cheapest, which is the first, is the next piece of the envelope.
        following = meets.argmin(1)
        betas.append(meets[np.arange(len(rows)), following])
        drops.append(cost[current] - cost[following])
        is_left = following > 0
        rows, current = rows[is_left], following[is_left]
    return np.concatenate(betas), np.concatenate(drops)


def nearest_price(mean_cost: Callable[[float], float], target: float, bound: float) -> float:
    """The beta in -bound..bound for which a mean cost that falls with beta, up to noise, comes nearest to `target`.

    For decisions one after the other: there the next one sees other evidence when an earlier one changes, so that the mean cost need not
    fall everywhere. Bisection finds a crossing; of all values met on the way the nearest is taken, and of its step the middle: at its
    ends rounding decides for some image.
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
    """How far the level at `inside` reaches towards `outside`, where it is another one (or the range ends)."""
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


def confidence_threshold(confidence: NDArray[np.floating], first: float, extra: float, target: float) -> float:
    """The threshold below which a cascade goes on, so that first + share * extra is nearest to `target`.

    Args:
        confidence: [N] of the first route.
        first: cost of running the first route.
        extra: cost of running the second route too, > 0.
        target: wanted mean cost.

    Returns:
        the middle between two neighbouring confidences; -inf where none goes on, +inf where all do.
    """
    ordered = np.sort(confidence.astype(np.float64))
    # Images of equal confidence go on together.
    counts = np.r_[0, np.flatnonzero(np.diff(ordered)) + 1, len(ordered)]
    count = int(counts[np.abs(first + counts / len(ordered) * extra - target).argmin()])
    if count == 0:
        return -np.inf
    if count == len(ordered):
        return np.inf
    return float(0.5 * ordered[count - 1] + 0.5 * ordered[count])
