"""Pareto fronts, hypervolume, the knee, and the small language that picks points from a front.

Every function takes objective values as an array [n, d], one row a point, and `goals`, one
"maximize" or "minimize" per column. A point dominates another when it is at least as good in every
objective and better in one.
"""

from __future__ import annotations

import math
import operator
import re
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import moocore
import numpy as np
from numpy.typing import ArrayLike, NDArray

from dsnet.errors import ConfigError, NotFoundError
from dsnet.wording import did_you_mean

REFERENCE_MARGIN = 1.05
"""Ratio of a reference's cost to that of the widest sub-network, so that the widest adds to the
hypervolume too."""

Goal = Literal["maximize", "minimize"]

DEFAULT_OBJECTIVES: tuple[tuple[str, Goal], ...] = (("top1", "maximize"), ("madds_m", "minimize"))


def front_mask(values: ArrayLike, goals: Sequence[Goal], *, keep_duplicates: bool = True) -> NDArray[np.bool_]:
    """Mask of the non-dominated points, in O(n log n).

    Args:
        values: [n, d] objective values, d = 2 or 3. Infinite values are ordered as usual; a row
            that holds a NaN is never on the front and dominates nothing.
        goals: d goals.
        keep_duplicates: True keeps every copy of a non-dominated point, False only the first in row
            order.

    Returns:
        bool [n].
    """
    costs = _as_costs(values, goals)
    mask = np.zeros(len(costs), dtype=bool)
    rows = np.flatnonzero(~np.isnan(costs).any(axis=1))
    if costs.shape[1] == 2:
        mask[rows] = _front_mask_2d(costs[rows], keep_duplicates)
    elif len(rows):
        mask[rows] = moocore.is_nondominated(costs[rows], keep_weakly=keep_duplicates)
    return mask


def _front_mask_2d(costs: NDArray[np.float64], keep_duplicates: bool) -> NDArray[np.bool_]:
    """The front of NaN-free costs [n, 2], by one sweep in the order of the first cost."""
    mask = np.zeros(len(costs), dtype=bool)
    if not len(costs):
        return mask
    order = np.lexsort((costs[:, 1], costs[:, 0]))  # stable, so the first of several copies is the first in row order
    swept = costs[order]
    is_new = np.r_[True, (swept[1:] != swept[:-1]).any(axis=1)]
    is_better = np.r_[True, swept[1:, 1] < np.minimum.accumulate(swept[:, 1])[:-1]]
    starts_group = is_new & is_better
    if keep_duplicates:
        # Copies of a point follow it directly, so they share the verdict on the first of them.
        group = np.cumsum(is_new) - 1
        mask[order] = starts_group[is_new][group]
    else:
        mask[order] = starts_group
    return mask


def hypervolume(values: ArrayLike, goals: Sequence[Goal], reference: ArrayLike) -> float:
    """Volume that the points dominate, bounded by `reference`; O(n log n) for 2 and 3 objectives.

    Args:
        values: [n, d], d = 2 or 3. Rows with a NaN, and points that are not better than the
            reference in every objective, add nothing.
        goals: d goals.
        reference: [d], a finite point in the units of `values` that is worse than every point of
            interest.

    Raises:
        ValueError: an infinitely good value, or a reference that is not finite.
    """
    inside, bound = _inside_reference(values, goals, reference)
    if not len(inside):
        return 0.0
    if inside.shape[1] == 3:
        return float(moocore.hypervolume(inside, bound))
    front = inside[_front_mask_2d(inside, keep_duplicates=False)]
    front = front[np.argsort(front[:, 0])]
    widths = np.diff(front[:, 0], append=bound[0])
    return float(widths @ (bound[1] - front[:, 1]))


def hypervolume_trace(values: ArrayLike, goals: Sequence[Goal], reference: ArrayLike) -> NDArray[np.float64]:
    """The hypervolume of the first 1, 2, ..., n points; never decreasing.

    Failed trials may stay in as rows of NaN: they repeat the value before them. With 2 objectives
    one step costs O(log front) plus the points that it pushes off the front.

    Args and errors: as `hypervolume`.

    Returns:
        float64 [n].
    """
    running = RunningHypervolume(goals, reference)
    rows = np.asarray(values, dtype=np.float64)
    trace = np.empty(len(rows))
    for index, row in enumerate(rows):
        running.add(row)
        trace[index] = running.volume
    return trace


class RunningHypervolume:
    """The hypervolume of points that come one after the other.

    Args and errors: as `hypervolume`.
    """

    def __init__(self, goals: Sequence[Goal], reference: ArrayLike) -> None:
        self._goals = goals
        self._bound = _reference_costs(goals, reference)
        self._front: _Front2d | _Front3d = _Front2d(self._bound) if len(self._bound) == 2 else _Front3d(self._bound)

    @property
    def volume(self) -> float:
        """Hypervolume of all points so far."""
        return self._front.volume

    def add(self, values: ArrayLike) -> None:
        """Add one point [d]; a point with a NaN, or one that is not better than the reference in
        every objective, adds nothing."""
        point = _as_costs(np.atleast_2d(np.asarray(values, dtype=np.float64)), self._goals)[0]
        if np.all(point < self._bound):  # false for NaN
            _refuse_infinite(point)
            self._front.add(point)


class _Front2d:
    """A front of costs in increasing order of the first one, and its area up to the bound."""

    def __init__(self, bound: NDArray[np.float64]) -> None:
        self.volume = 0.0
        self._bound = (float(bound[0]), float(bound[1]))
        self._front: list[tuple[float, float]] = []

    def add(self, point: NDArray[np.float64]) -> None:
        x, y = float(point[0]), float(point[1])
        front = self._front
        start = bisect_left(front, (x, -math.inf))
        # The left neighbour has a smaller x: it sets how high the new area reaches.
        ceiling = front[start - 1][1] if start else self._bound[1]
        if ceiling <= y or (start < len(front) and front[start][0] == x and front[start][1] <= y):
            return
        left, stop = x, start
        while stop < len(front) and front[stop][1] >= y:  # dominated by the new point
            self.volume += (front[stop][0] - left) * (ceiling - y)
            left, ceiling = front[stop]
            stop += 1
        right = front[stop][0] if stop < len(front) else self._bound[0]
        self.volume += (right - left) * (ceiling - y)
        front[start:stop] = [(x, y)]


class _Front3d:
    """A front of three costs, and its volume up to the bound; recomputed only when the front
    changes."""

    def __init__(self, bound: NDArray[np.float64]) -> None:
        self.volume = 0.0
        self._bound = bound
        self._front = np.empty((0, len(bound)))

    def add(self, point: NDArray[np.float64]) -> None:
        if (self._front <= point).all(axis=1).any():
            return
        is_dominated = (point <= self._front).all(axis=1)
        self._front = np.vstack([self._front[~is_dominated], point])
        # The sum is taken in another order each time: without max, rounding could let the trace
        # fall by one ulp.
        self.volume = max(self.volume, float(moocore.hypervolume(self._front, self._bound)))


def knee(values: ArrayLike, goals: Sequence[Goal]) -> int:
    """The point of the front that gives the most in all objectives together.

    Every objective is scaled to [0, 1] over the front first, so that the answer does not depend on
    units; the knee has the least sum of scaled costs. With 2 objectives that is the greatest
    distance above the chord between the front's two ends. With 3 every objective counts as much as
    any other: two costs that rise together count twice. An objective in which the whole front is
    equal counts nothing.

    Of equally good points the one that is better in the *first* objective wins, then in the second;
    this also decides a front of two points, and one that bends the other way, where both ends
    (distance 0) win over all between. Of copies of a point the first row is meant.

    Args:
        values: [n, d], n >= 1, d = 2 or 3; rows with a value that is not finite are left out.
        goals: d goals.

    Returns:
        A row index of `values`.

    Raises:
        ValueError: no finite row.
    """
    costs = _as_costs(values, goals)
    finite = np.flatnonzero(np.isfinite(costs).all(axis=1))
    if not len(finite):
        raise ValueError(
            f"A knee needs at least one finite point, but all {len(costs)} rows have a NaN or an infinity."
        )
    rows = finite[front_mask(costs[finite], ("minimize",) * costs.shape[1], keep_duplicates=False)]
    # Best in the first objective first, then in the second: argmin below takes the first of equal
    # sums.
    rows = rows[np.lexsort(costs[rows].T[::-1])]
    front = costs[rows]
    extent = np.ptp(front, axis=0)
    scaled = (front - front.min(axis=0)) / np.where(extent > 0, extent, 1.0)
    # Rounding makes points on a straight front equal again.
    return int(rows[np.argmin(np.round(scaled.sum(axis=1), 12))])


def _as_costs(values: ArrayLike, goals: Sequence[Goal]) -> NDArray[np.float64]:
    """Values as float64 costs [n, d], all to be minimised."""
    if len(goals) not in (2, 3):
        raise ValueError(f"The number of goals is {len(goals)}, but must be 2 or 3.")
    unknown = [goal for goal in goals if goal not in ("maximize", "minimize")]
    if unknown:
        raise ValueError(f"The goal {unknown[0]!r} is unknown, but must be 'maximize' or 'minimize'.")
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        return np.empty((0, len(goals)))
    if array.ndim != 2 or array.shape[1] != len(goals):
        raise ValueError(f"The shape of `values` is {array.shape}, but must be [n, {len(goals)}].")
    costs: NDArray[np.float64] = array * np.array([-1.0 if goal == "maximize" else 1.0 for goal in goals])
    return costs


def _reference_costs(goals: Sequence[Goal], reference: ArrayLike) -> NDArray[np.float64]:
    bound: NDArray[np.float64] = _as_costs(np.atleast_2d(np.asarray(reference, dtype=np.float64)), goals)[0]
    if not np.isfinite(bound).all():
        raise ValueError(f"The reference point {reference!r} must be finite.")
    return bound


def _inside_reference(
    values: ArrayLike, goals: Sequence[Goal], reference: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The costs that are better than the reference in every objective, and the reference as
    costs."""
    costs, bound = _as_costs(values, goals), _reference_costs(goals, reference)
    inside = costs[(costs < bound).all(axis=1)]
    _refuse_infinite(inside)
    return inside, bound


def _refuse_infinite(costs: NDArray[np.float64]) -> None:
    if np.isneginf(costs).any():
        raise ValueError("A point with an infinitely good value has no hypervolume; leave it out.")


_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_METRIC = r"[A-Za-z_][A-Za-z0-9_.]*"
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_CONDITION = re.compile(rf"\s*({_METRIC})\s*(<=|>=|<|>)\s*({_NUMBER})\s*")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_EXAMPLE = "write e.g. 'knee', 'all', 'trial-0042' or 'max:top1 where madds_m<=200'"


@dataclass(frozen=True)
class Condition:
    """A bound on one metric; `comparison` is one of <=, >=, <, >."""

    metric: str
    comparison: str
    bound: float

    def __str__(self) -> str:
        return f"{self.metric}{self.comparison}{self.bound:g}"

    def holds(self, value: float) -> bool:
        return _COMPARISONS[self.comparison](value, self.bound)


@dataclass(frozen=True)
class Pick:
    """A choice of points from a front, as the user wrote it; `parse_pick` builds it, and
    `apply_pick` applies it."""

    kind: Literal["knee", "all", "best", "name"]
    text: str
    """The pick as the user wrote it, for messages."""
    metric: str = ""
    """The metric to optimise; only for kind "best"."""
    goal: Goal = "maximize"
    """Direction of the metric; only for kind "best"."""
    conditions: tuple[Condition, ...] = ()
    """Conditions that must all hold; only for kind "best"."""
    name: str = ""
    """Name of the point; only for kind "name"."""


def parse_pick(text: str, metrics: Collection[str] = ()) -> Pick:
    """Read `knee`, `all`, `max:METRIC` or `min:METRIC` (also with ` where METRIC<=NUMBER and ...`),
    or a point's name.

    Args:
        text: what the user wrote.
        metrics: the metrics that exist; when given, another one is an error here rather than later.

    Raises:
        ConfigError: names the part that cannot be read.
    """
    stripped = text.strip()
    if stripped == "knee":
        return Pick("knee", stripped)
    if stripped == "all":
        return Pick("all", stripped)
    head, colon, rest = stripped.partition(":")
    if not colon:
        if not _NAME.fullmatch(stripped):
            raise ConfigError(f"pick {text!r}: {stripped!r} is neither a keyword nor the name of a point; {_EXAMPLE}")
        return Pick("name", stripped, name=stripped)
    if head.strip() not in ("max", "min"):
        raise ConfigError(f"pick {text!r}: {head.strip()!r} before the colon must be 'max' or 'min'; {_EXAMPLE}")
    metric, *where = re.split(r"\bwhere\b", rest, maxsplit=1)
    metric = _metric(metric.strip(), text, metrics)
    conditions = tuple(_condition(part, text, metrics) for part in re.split(r"\band\b", where[0])) if where else ()
    goal: Goal = "maximize" if head.strip() == "max" else "minimize"
    return Pick("best", stripped, metric=metric, goal=goal, conditions=conditions)


def _metric(metric: str, text: str, metrics: Collection[str]) -> str:
    if not re.fullmatch(_METRIC, metric):
        raise ConfigError(f"pick {text!r}: {metric!r} is not the name of a metric; {_EXAMPLE}")
    if metrics and metric not in metrics:
        raise ConfigError(f"pick {text!r}: unknown metric {metric!r};{_way_out(metric, metrics)}")
    return metric


def _condition(part: str, text: str, metrics: Collection[str]) -> Condition:
    match = _CONDITION.fullmatch(part)
    if match is None:
        raise ConfigError(
            f"pick {text!r}: {part.strip()!r} is not a condition; "
            "write METRIC, then <=, >=, < or >, then a number, e.g. madds_m<=200"
        )
    metric, comparison, number = match.groups()
    if not math.isfinite(float(number)):
        raise ConfigError(f"pick {text!r}: the bound {number!r} is too large for a number")
    return Condition(_metric(metric, text, metrics), comparison, float(number))


def _way_out(word: str, known: Collection[str], num_shown: int = 12) -> str:
    listed = ", ".join(list(known)[:num_shown]) + (f", ... ({len(known)} in all)" if len(known) > num_shown else "")
    return did_you_mean(word, list(known)).removeprefix(";") + f" known: {listed}"


Row = Mapping[str, Any]


def apply_pick(
    pick: Pick, rows: Sequence[Row], objectives: Sequence[tuple[str, Goal]] = DEFAULT_OBJECTIVES
) -> list[Row]:
    """Select the rows that match `pick`, in the order of `rows`.

    `knee` and `all` select from the front of `rows` (copies of a front point are all on it), `max:`
    and `min:` from all rows. The latter return one: of equally good rows the one that is better in
    the objectives, in their order, then the first. Rows without a value for a metric of the pick
    are skipped.

    Args:
        pick: from `parse_pick`.
        rows: each with `name` and its metrics as flat keys.
        objectives: (metric, goal) pairs that make the front.

    Raises:
        NotFoundError: nothing matches; the message names the nearest point or name.
    """
    if not rows:
        raise NotFoundError(f"pick {pick.text!r}: there are no points to pick from")
    if pick.kind == "name":
        return [_by_name(pick, rows)]
    if pick.kind == "best":
        return [_best(pick, rows, objectives)]
    values = [[_value(row, metric) for metric, _ in objectives] for row in rows]
    goals = [goal for _, goal in objectives]
    on_front = np.flatnonzero(front_mask(values, goals) & np.isfinite(values).all(axis=1)).tolist()
    if not on_front:
        listed = " and ".join(metric for metric, _ in objectives)
        raise NotFoundError(f"pick {pick.text!r}: none of the {len(rows)} points has finite values of {listed}")
    if pick.kind == "all":
        return [rows[index] for index in on_front]
    return [rows[on_front[knee(np.asarray(values)[on_front], goals)]]]


def _by_name(pick: Pick, rows: Sequence[Row]) -> Row:
    names = [str(row["name"]) for row in rows]
    if pick.name not in names:
        raise NotFoundError(f"pick {pick.text!r}: no point of this name;{_way_out(pick.name, names)}; {_EXAMPLE}")
    return rows[names.index(pick.name)]


def _best(pick: Pick, rows: Sequence[Row], objectives: Sequence[tuple[str, Goal]]) -> Row:
    asked = [pick.metric, *(condition.metric for condition in pick.conditions)]
    measured = list(rows)
    for metric in asked:
        measured = [row for row in measured if not math.isnan(_value(row, metric))]
        if not measured:
            known = sorted({key for row in rows for key in row if not math.isnan(_value(row, key))})
            raise NotFoundError(f"pick {pick.text!r}: no point has a value of {metric!r};{_way_out(metric, known)}")
    feasible = [row for row in measured if all(c.holds(_value(row, c.metric)) for c in pick.conditions)]
    if not feasible:
        nearest = min(measured, key=lambda row: _violation(row, pick.conditions))
        shown = ", ".join(
            f"{metric}={_value(nearest, metric):g}" for metric in dict.fromkeys([*asked[1:], pick.metric])
        )
        raise NotFoundError(
            f"pick {pick.text!r}: no point satisfies {' and '.join(map(str, pick.conditions))}; "
            f"the nearest is {nearest['name']} with {shown}"
        )
    ranked = [(pick.metric, pick.goal), *objectives]
    return min(feasible, key=lambda row: tuple(_rank(_value(row, metric), goal) for metric, goal in ranked))


def _violation(row: Row, conditions: Sequence[Condition]) -> float:
    """Total violation of the conditions by a row: the sum of the excesses, each relative to its
    bound."""
    broken = [c for c in conditions if not c.holds(_value(row, c.metric))]
    return sum(abs(_value(row, c.metric) - c.bound) / (abs(c.bound) or 1.0) for c in broken)


def _rank(value: float, goal: Goal) -> float:
    """A sort key that puts the best first and a missing value last."""
    if math.isnan(value):
        return math.inf
    return -value if goal == "maximize" else value


def _value(row: Row, metric: str) -> float:
    """A metric as a float; NaN where it is absent, None or not a number."""
    value = row.get(metric)
    return float(value) if isinstance(value, int | float | np.number) and not isinstance(value, bool) else math.nan
