"""Selection among trials by their metrics: the front, a sample of it, picks, and the trials that
represent a kind of router. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.front.analysis_records import BudgetPick, is_collapsed
from search.front.controls import budgets
from search.front.pareto import Goal, Pick, front_mask

BUDGET_SHARES = (0.25, 0.5, 0.75)
"""Budgets at which kinds of router are compared, as shares of the range of MAdds."""
BUDGET_SLACK = 0.005
"""Relative excess over a budget that is allowed: a router is calibrated to the nearest step, which
may lie a little above the budget."""


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
