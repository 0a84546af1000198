"""Rules that end a sweep early because of its results.

They are functions of the finished trials in their order, so that a resumed sweep ends at the same
trial.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from search.conditions.constraints import ConstraintSet
from search.front.pareto import RunningHypervolume
from search.study.study import Objective, TrialRecord


@dataclass(frozen=True)
class Plateau:
    """Rule that ends a sweep when the hypervolume of its front no longer grows.

    Attributes:
        trials: number of finished trials, including failed ones, over which growth is measured, >=
            1.
        gain: growth below this share of the current hypervolume ends the sweep, > 0.
        reference: reference point of the hypervolume; one finite value per objective, worse than
            every point of interest.
    """

    trials: int
    gain: float
    reference: tuple[float, ...]


@dataclass(frozen=True)
class StopRules:
    """The rules that end a sweep early.

    Attributes:
        plateau: rule on the growth of the front; None = no such rule.
        target: conditions all of which one feasible trial must meet to end the sweep; empty = no
            target.
    """

    plateau: Plateau | None = None
    target: ConstraintSet = field(default_factory=ConstraintSet)

    def watch(self, objectives: Sequence[Objective]) -> StopWatch:
        """The state of these rules at the start of a study."""
        return StopWatch(self, objectives)


class StopWatch:
    """State of the stop rules, updated with each finished trial in order."""

    def __init__(self, rules: StopRules, objectives: Sequence[Objective]) -> None:
        self._rules = rules
        self._is_met = False
        self._volumes: deque[float] | None = None
        if rules.plateau is not None:
            goals = [objective.goal for objective in objectives]
            self._front = RunningHypervolume(goals, rules.plateau.reference)
            # The first entry is the hypervolume before the last `trials` trials: 0 before any
            # trial.
            self._volumes = deque([0.0], maxlen=rules.plateau.trials + 1)

    def add(self, record: TrialRecord) -> None:
        """Add the next finished trial."""
        target = self._rules.target
        if record.is_feasible and target.all:
            self._is_met |= target.hold(record.metrics)
        if self._volumes is not None:
            if record.is_feasible and record.values is not None:
                self._front.add(record.values)
            self._volumes.append(self._front.volume)

    @property
    def reason(self) -> Literal["plateau", "target"] | None:
        """The rule that ends the sweep now; None = continue.

        A plateau requires a front: as long as no feasible trial was found, the search continues.
        """
        if self._is_met:
            return "target"
        plateau = self._rules.plateau
        if plateau is None or self._volumes is None or len(self._volumes) <= plateau.trials:
            return None
        growth = self._volumes[-1] - self._volumes[0]
        return "plateau" if growth < plateau.gain * self._volumes[-1] else None
