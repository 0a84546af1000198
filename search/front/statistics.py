"""Intervals over images: the paired bootstrap of accuracy and mean MAdds, and the gains, stability
and ties that are computed from it.

All points are resampled with the same images (joint and paired), and both objectives of a point
come from the same resample. Resamples are held as integer counts, and MAdds are integers, so that
sums are exact and points that agree on a resample tie exactly. Everything here is conditional on
one trained supernet; a claim about methods needs several.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from search.front.controls import StaticLine
from search.front.pareto import Goal, front_mask

Floats = NDArray[np.float64]

CHUNK_BYTES = 8 * 2**20
POINT_DIGITS = 1
"""Decimals with which differences are shown, in percentage points."""


def bootstrap_counts(num_images: int, num_resamples: int, seed: int) -> Iterator[NDArray[np.float32]]:
    """Number of times that each image is drawn in each resample: whole numbers whose rows sum to
    `num_images`.

    The rows do not depend on how they are divided into chunks. Equal arguments give equal rows, so
    that two quantities are paired.

    Yields:
        float32 [r, num_images], at most 8 MiB each (one row at least); r sums to `num_resamples`.
    """
    if num_images < 1 or num_resamples < 1:
        raise ValueError(f"There are {num_images} images and {num_resamples} resamples, but both must be at least 1.")
    rng = np.random.default_rng(seed)
    rows_per_chunk = max(1, CHUNK_BYTES // (4 * num_images))
    for start in range(0, num_resamples, rows_per_chunk):
        counts = np.empty((min(rows_per_chunk, num_resamples - start), num_images), dtype=np.float32)
        for row in counts:
            row[:] = np.bincount(rng.integers(num_images, size=num_images), minlength=num_images)
        yield counts


def bootstrap_interval(samples: ArrayLike, level: float = 0.95) -> tuple[Floats, Floats]:
    """The percentile interval along the first axis.

    Args:
        samples: [R, ...] resampled values. NaN in a column makes its interval NaN.
        level: coverage in (0, 1).

    Returns:
        (low, high), each [...].
    """
    _check_level(level)
    tail = (1.0 - level) / 2
    low, high = np.quantile(np.asarray(samples, dtype=np.float64), [tail, 1.0 - tail], axis=0)
    return low, high


def wilson_interval(num_correct: int, num_images: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of one accuracy, as fractions; valid also at 0 and 1, where a
    bootstrap interval has no width."""
    _check_level(level)
    if not 0 <= num_correct <= num_images or num_images == 0:
        raise ValueError(f"{num_correct} correct of {num_images} images is not an accuracy.")
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share = num_correct / num_images
    centre = share + z * z / (2 * num_images)
    half = z * np.sqrt(share * (1 - share) / num_images + z * z / (4 * num_images**2))
    scale = 1 + z * z / num_images
    # At 0 and n one end is exact; the formula would miss it by rounding.
    low = 0.0 if num_correct == 0 else float((centre - half) / scale)
    high = 1.0 if num_correct == num_images else float((centre + half) / scale)
    return low, high


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"The value of `level` is {level}, but must be between 0 and 1.")


def significant_sign(low: float, high: float, digits: int | None = POINT_DIGITS) -> int:
    """Sign of a difference if its interval excludes 0, else 0; also 0 for NaN, an unknown interval.

    The ends are rounded as they are shown, so that nothing is called significant whose interval
    reads as touching 0: [0.0, 1.2].

    Args:
        low: lower end, a fraction.
        high: upper end.
        digits: decimals of the ends as shown, in percentage points; None for an interval that is
            not shown, whose ends are taken as they are.

    Returns:
        1, -1 or 0.
    """
    if digits is not None:
        low, high = (float(f"{100 * end:.{digits}f}") for end in (low, high))
    return int(low > 0) - int(high < 0)


def unpaired_difference(
    first: tuple[float, float, float], second: tuple[float, float, float]
) -> tuple[float, float, float]:
    """The difference of two values from independent samples, with an interval from both of their
    intervals.

    The distance of each end from the difference is the root of the sum of squares of the two
    distances that contribute to it (Zou and Donner 2008, "recovering variance estimates"). For
    symmetric intervals this is the usual formula, and skewed ones stay skewed.

    Args:
        first: (value, low, high), low <= value <= high.
        second: the value to subtract, in the same form; from other images.

    Returns:
        (value, low, high).
    """
    (value, low, high), (other, other_low, other_high) = first, second
    difference = value - other
    return (
        difference,
        difference - float(np.hypot(value - low, other_high - other)),
        difference + float(np.hypot(high - value, other - other_low)),
    )


@dataclass(frozen=True)
class PointSample:
    """P points as observed, and in R resamples of the images that all points share."""

    top1: Floats
    """[P], fractions."""
    madds: Floats
    """[P], mean MAdds an image."""
    resampled_top1: Floats
    """[R, P]."""
    resampled_madds: Floats
    """[R, P]."""


def resample_points(correct: ArrayLike, madds: ArrayLike, num_resamples: int = 1000, seed: int = 0) -> PointSample:
    """Resample P points over their n images.

    Args:
        correct: [n, P] bool, whether the point classifies the image rightly; or the share of
            several trainings that do.
        madds: [n, P] MAdds spent on the image, or any shape that broadcasts to it ([P] for static
            points).
        num_resamples: R.
        seed: equal seeds and n pair the resamples of two calls.
    """
    hits = np.asarray(correct, dtype=np.float64)
    num_images, num_points = hits.shape
    spent = np.broadcast_to(np.asarray(madds, dtype=np.float64), hits.shape)
    top1 = np.empty((num_resamples, num_points))
    mean_madds = np.empty((num_resamples, num_points))
    start = 0
    for counts in bootstrap_counts(num_images, num_resamples, seed):
        rows = slice(start, start + len(counts))
        exact = counts.astype(np.float64)
        top1[rows] = exact @ hits
        mean_madds[rows] = exact @ spent
        start += len(counts)
    # Dividing sums, rather than weighting with counts / n, keeps equal resamples of two points
    # exactly equal.
    return PointSample(
        top1=hits.sum(axis=0) / num_images,
        madds=spent.sum(axis=0) / num_images,
        resampled_top1=top1 / num_images,
        resampled_madds=mean_madds / num_images,
    )


@dataclass(frozen=True)
class Gain:
    """Differences in top-1 (fractions), one for each of P points, with the ends of their
    intervals."""

    value: Floats
    low: Floats
    high: Floats


def gain_over_static(
    correct: ArrayLike,
    madds: ArrayLike,
    line: StaticLine,
    static_correct: ArrayLike,
    num_resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Gain:
    """Top-1 of P dynamic points minus the static line at their mean MAdds, on the same images.

    In every resample the points' mean MAdds, hence the mixing weights of the line, and the
    accuracies of its sub-networks are computed anew; the line's vertices stay those that were
    chosen on `val`.

    Args:
        correct: [n, P] bool.
        madds: [n, P] MAdds spent on each image, the gate's own included.
        line: fitted on `val`.
        static_correct: [n, K] bool of all K sub-networks on the reported split, in the order that
            `line` was fitted with; or, like `correct`, the mean over several trainings.

    Returns:
        The gains; NaN for a point below the cheapest sub-network, where there is no line.
    """
    static_hits = np.asarray(static_correct)[:, list(line.vertices)]
    points = resample_points(correct, madds, num_resamples, seed)
    statics = resample_points(static_hits, line.madds, num_resamples, seed)
    value = points.top1 - line.mix(points.madds, statics.top1)
    gains = points.resampled_top1 - line.mix(points.resampled_madds, statics.resampled_top1)
    low, high = bootstrap_interval(gains, level)
    return Gain(value, low, high)


def gain_over_one(
    correct: ArrayLike, other: ArrayLike, num_resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> Gain:
    """Top-1 of P points minus that of one other, on the same images.

    Args:
        correct: bool [n, P].
        other: bool [n].
    """
    points = resample_points(correct, 0, num_resamples, seed)
    beside = resample_points(np.asarray(other)[:, None], 0, num_resamples, seed)
    low, high = bootstrap_interval(points.resampled_top1 - beside.resampled_top1, level)
    return Gain(points.top1 - beside.top1, low, high)


def gain_over_random(
    routes: ArrayLike, route_correct: ArrayLike, num_resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> Gain:
    """Top-1 of P routers minus random routing with the same histogram, which every resample
    computes anew.

    Args:
        routes: int [n, P], the route that each router takes for each image.
        route_correct: bool [n, K], whether each route is right.
    """
    choices, right = np.asarray(routes), np.asarray(route_correct, dtype=bool)
    num_routes = right.shape[1]
    routed = resample_points(np.take_along_axis(right, choices, axis=1), 0, num_resamples, seed)
    by_route = resample_points(right, 0, num_resamples, seed)
    chance, resampled_chance = np.zeros(choices.shape[1]), np.zeros((num_resamples, choices.shape[1]))
    for route in range(num_routes):
        share = resample_points(choices == route, 0, num_resamples, seed)
        chance += share.top1 * by_route.top1[route]
        resampled_chance += share.resampled_top1 * by_route.resampled_top1[:, route, None]
    low, high = bootstrap_interval(routed.resampled_top1 - resampled_chance, level)
    return Gain(routed.top1 - chance, low, high)


def front_stability(objectives: Sequence[Floats], goals: Sequence[Goal], decisions: ArrayLike) -> Floats:
    """The share of resamples in which each point is non-dominated; not a p-value.

    Args:
        objectives: 2 or 3; each [R, P] as resampled with the same images, or [P] if it is the same
            in every resample.
        goals: one for each objective.
        decisions: int [n, P], number of each point's treatment of each image. Points with equal
            decisions on all images, and equal objectives [P], count as one point, and all of them
            get its share.

    Returns:
        float64 [P].
    """
    fixed = [np.unique(objective, return_inverse=True)[1] for objective in objectives if np.ndim(objective) == 1]
    alike = np.vstack([np.asarray(decisions), *fixed])
    _, first, group = np.unique(alike, axis=1, return_index=True, return_inverse=True)
    values = np.stack(np.broadcast_arrays(*(np.atleast_2d(objective) for objective in objectives)), axis=-1)
    num_on_front = np.zeros(len(first))
    for resample in values[:, first]:
        num_on_front += front_mask(resample, goals, keep_duplicates=True)
    return (num_on_front / len(values))[group.ravel()]


def tied_groups(
    sample: PointSample, is_front: ArrayLike, level: float = 0.95, madds_tolerance: float = 0.01
) -> dict[int, tuple[int, ...]]:
    """For every front point the other points that are tied with it.

    A point is tied with a front point when the interval of their paired top-1 difference includes 0
    and its mean MAdds is within `madds_tolerance` (relative) of the front point's. Each group
    belongs to one front point: a point may be in several groups, and ties are not transitive.

    Args:
        sample: P points.
        is_front: bool [P].

    Returns:
        index of each front point -> indices of the points tied with it, except itself.
    """
    groups = {}
    for anchor in np.flatnonzero(np.asarray(is_front, dtype=bool)):
        is_near = np.abs(sample.madds - sample.madds[anchor]) <= madds_tolerance * sample.madds[anchor]
        is_near[anchor] = False
        near = np.flatnonzero(is_near)
        low, high = bootstrap_interval(sample.resampled_top1[:, near] - sample.resampled_top1[:, [anchor]], level)
        is_tied = [significant_sign(*ends, digits=None) == 0 for ends in zip(low, high, strict=True)]
        groups[int(anchor)] = tuple(int(index) for index in near[is_tied])
    return groups
