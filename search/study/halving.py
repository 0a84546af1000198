"""Successive halving by Pareto rank: the choice of the trials that go on from a rung.

Trials are compared at rungs. Of all that have reached a rung, including those of earlier cohorts,
about one in `factor` goes on: the best Pareto ranks and, within a rank, the least crowded points,
so that the whole front is kept and not one end of it. This is the asynchronous form of the rule
(ASHA, arXiv 1810.05934), cohort by cohort, with non-dominated sorting and crowding distance (Deb et
al., 2002) for more than one objective. A decision depends only on objective values, constraint
violations and slots: a resumed study that stores them prunes the same trials.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from search.front.pareto import Goal, front_mask


@dataclass(frozen=True)
class ParetoHalving:
    """The rule of Pareto-rank successive halving.

    Attributes:
        factor: about 1/factor of the trials that reach a rung go on, >= 2.
        rungs: epochs at which trials are compared, rising, all below a trial's full length.
        keeps_front: raise the quota to the size of the feasible front at the rung (copies of a
            point count once). A front with more points than the quota is then kept whole, which
            costs more epochs; without it, less is found than by training fewer trials in full
            (benchmarks/pruning.py).
    """

    factor: int
    rungs: tuple[int, ...]
    keeps_front: bool = True

    def __post_init__(self) -> None:
        if self.factor < 2:
            raise ValueError(f"pruner.factor is {self.factor}, but must be at least 2")
        if not self.rungs or list(self.rungs) != sorted(set(self.rungs)) or self.rungs[0] < 1:
            raise ValueError(f"the rungs are {self.rungs}, but must be rising epochs from 1")

    @classmethod
    def geometric(cls, factor: int, first: int, epochs: int, *, keeps_front: bool = True) -> ParetoHalving:
        """Rungs at `first`, `first * factor`, `first * factor**2`, ... below a trial's full length
        of `epochs`.

        Raises:
            ValueError: `first` is not in 1..epochs - 1, or `factor` is below 2.
        """
        if not 1 <= first < epochs:
            raise ValueError(
                f"pruner.first_epochs is {first}, but must lie in 1..{epochs - 1}: a trial takes {epochs} epochs "
                "(gate.end_to_end.epochs)"
            )
        if factor < 2:
            raise ValueError(f"pruner.factor is {factor}, but must be at least 2")
        rungs = [first]
        while rungs[-1] * factor < epochs:
            rungs.append(rungs[-1] * factor)
        return cls(factor, tuple(rungs), keeps_front)

    def survivors(
        self,
        candidates: Mapping[int, tuple[float, ...]],
        earlier: Sequence[tuple[float, ...]],
        goals: Sequence[Goal],
        violations: Mapping[int, float] | None = None,
        earlier_violations: Sequence[float] | None = None,
    ) -> frozenset[int]:
        """The slots that go on from a rung.

        They are the candidates among the best ceil(n / factor) of all n trials that have reached
        the rung; with `keeps_front` among at least as many as are on the feasible front. If
        there is no such candidate, the best one goes on. Trials that violate constraints rank
        behind all that hold them, the smallest violation first (constrained domination, Deb et al.,
        2002). The order of `candidates` and of `earlier` does not matter.

        Args:
            candidates: objective values of this cohort at the rung by slot, without failed trials.
            earlier: objective values of the earlier cohorts at the rung, whatever happened to these
                trials afterwards.
            goals: one per objective, 2 or 3.
            violations: sum of constraint violations of the candidates by slot, > 0 if any is
                violated; None: no violations.
            earlier_violations: the same for `earlier`, in its order.

        Raises:
            ValueError: a value is not finite, or the number of values differs from that of the
                goals.
        """
        if not candidates:
            return frozenset()
        slots = sorted(candidates)
        before = sorted(zip(earlier, earlier_violations or [0.0] * len(earlier), strict=True))
        points = [*(point for point, _ in before), *(candidates[slot] for slot in slots)]
        for point in points:
            if len(point) != len(goals) or not all(map(math.isfinite, point)):
                raise ValueError(f"a trial at a rung has {len(goals)} finite objective values; got {point}")
        broken = np.array([*(value for _, value in before), *((violations or {}).get(slot, 0.0) for slot in slots)])
        values = np.array(points, dtype=np.float64)
        feasible, infeasible = np.flatnonzero(broken <= 0), np.flatnonzero(broken > 0)
        quota = math.ceil(len(values) / self.factor)
        if self.keeps_front:
            quota = max(quota, int(front_mask(values[feasible], goals, keep_duplicates=False).sum()))
        best_first = [
            *feasible[halving_order(values[feasible], goals)],
            *infeasible[np.argsort(broken[infeasible], kind="stable")],
        ]
        places = [int(row) - len(before) for row in best_first]
        going_on = [slots[place] for place in places[:quota] if place >= 0]
        return frozenset(going_on or [slots[next(place for place in places if place >= 0)]])


def halving_order(values: ArrayLike, goals: Sequence[Goal]) -> NDArray[np.int64]:
    """Rows from best to worst: by Pareto rank, then by crowding distance, then in the given order.

    Args:
        values: [n, d] finite objective values, d = 2 or 3.
        goals: d goals.

    Returns:
        int64 [n] row indices.
    """
    array = np.asarray(values, dtype=np.float64)
    ranks = pareto_ranks(array, goals)
    distances = np.zeros(len(ranks))
    for rank in range(int(ranks.max(initial=-1)) + 1):
        rows = np.flatnonzero(ranks == rank)
        distances[rows] = crowding_distances(array[rows])
    return np.lexsort((-distances, ranks))  # stable: equal rows stay in their order


def pareto_ranks(values: ArrayLike, goals: Sequence[Goal]) -> NDArray[np.int64]:
    """Pareto ranks by non-dominated sorting: 0 for the front, 1 for the front of the rest, and so
    on.

    Copies of a point have the same rank.

    Args:
        values: [n, d], d = 2 or 3, without NaN.
        goals: d goals.

    Returns:
        int64 [n] ranks.

    Raises:
        ValueError: a value is NaN.
    """
    array = np.asarray(values, dtype=np.float64)
    if np.isnan(array).any():
        raise ValueError("a row with a NaN has no Pareto rank; leave it out")
    ranks = np.full(len(array), -1, dtype=np.int64)
    left = np.arange(len(array))
    rank = 0
    while len(left):
        is_front = front_mask(array[left], goals)
        ranks[left[is_front]] = rank
        left = left[~is_front]
        rank += 1
    return ranks


def crowding_distances(values: ArrayLike) -> NDArray[np.float64]:
    """Crowding distance of each point of one rank: the sum over objectives of the gap between its
    neighbours, relative to the range.

    The ends of every objective get infinity. The first of several copies of a point gets the
    point's distance and the others 0; otherwise many trials at the same end of the front would be
    kept before all points in between.

    Args:
        values: [n, d] finite points of which none dominates another; goals do not matter.

    Returns:
        float64 [n], >= 0; the value of a first copy does not depend on the order of the rows.
    """
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        return np.zeros(0)
    points, first = np.unique(array, axis=0, return_index=True)
    own = np.zeros(len(points))
    for objective in range(points.shape[1]):
        others = [column for column in range(points.shape[1]) if column != objective]
        # `lexsort` takes the main key last. Other objectives break ties, so that the sum is a
        # function of the set of points.
        order = np.lexsort((*points[:, others].T, points[:, objective]))
        steps = points[order, objective]
        span = steps[-1] - steps[0]
        if span > 0:
            own[order] += np.r_[np.inf, (steps[2:] - steps[:-2]) / span, np.inf]
    if len(points) == 1:
        own[:] = np.inf
    distances = np.zeros(len(array))
    distances[first] = own
    return distances
