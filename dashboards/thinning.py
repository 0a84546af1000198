"""Thinning of clouds of points, so that the figure of a large sweep is small and drawn quickly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

MAX_POINTS: Final = 1500
"""Largest number of points of a cloud that a figure draws."""
CELLS: Final = 32
"""Number of cells along each axis, for nearly all points; fewer than `MAX_POINTS` in all, so that
each cell with points keeps one."""
FAR: Final = 8
"""Points that are farther away than this many times the spread of the others count as equally
far."""


def thinned(places: Sequence[tuple[float, float]], most: int = MAX_POINTS) -> list[int]:
    """Choose points that show where a cloud lies: of points that are close together some are left
    out, and points by themselves stay.

    The plane is divided into cells. Each cell keeps one of its points, then each that has more a
    second one, and so on. The choice depends on nothing but the places and their order.

    Args:
        places: (x, y) of each point, finite.
        most: largest number of points to keep.

    Returns:
        positions of the kept points, ascending; all of them if there are no more than `most`.
    """
    if len(places) <= most:
        return list(range(len(places)))
    cell = _cells(np.asarray(places, dtype=np.float64))
    order = np.random.default_rng(0).permutation(len(places))
    by_cell = order[np.argsort(cell[order], kind="stable")]
    starts = np.r_[0, np.flatnonzero(np.diff(cell[by_cell])) + 1]
    sizes = np.diff(np.r_[starts, len(by_cell)])
    rank = np.empty(len(places), dtype=np.int64)
    rank[by_cell] = np.arange(len(by_cell)) - np.repeat(starts, sizes)
    kept = order[np.argsort(rank[order], kind="stable")][:most]
    return [int(position) for position in np.sort(kept)]


def _cells(places: np.ndarray) -> np.ndarray:
    """The number of each point's cell; single points far away do not stretch the cells, but have
    some of their own."""
    low, high = np.percentile(places, [1, 99], axis=0)
    shares = (places - low) / np.where(high > low, high - low, 1.0)
    column, row = np.clip(np.floor(shares * CELLS), -FAR * CELLS, FAR * CELLS).astype(np.int64).T
    return np.asarray((2 * FAR * CELLS + 1) * column + row)
