"""Rules that end a sweep because of what it found: functions of the finished trials in their order, hence the same after a resume."""

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
    """The front does not grow any more.

    Attributes:
        trials: finished trials over which growth is counted, failed ones included, >= 1.
        gain: share of the present hypervolume, > 0, below which growth counts as none.
        reference: of the hypervolume; one finite value per objective, worse than every point of interest.
    """

    trials: int
    gain: float
    reference: tuple[float, ...]


@dataclass(frozen=True)
class StopRules:
    """When a sweep has found enough.

    Attributes:
        plateau: None = search on however little is found.
        target: conditions that one feasible trial must meet together; without any there is no target.
    """

    plateau: Plateau | None = None
    target: ConstraintSet = field(default_factory=ConstraintSet)

    def watch(self, objectives: Sequence[Objective]) -> StopWatch:
        """A fresh watch over the trials of a study."""
        return StopWatch(self, objectives)


class StopWatch:
    """Hears of finished trials in their order, and says when to stop."""

    def __init__(self, rules: StopRules, objectives: Sequence[Objective]) -> None:
        self._rules = rules
        self._is_met = False
        self._volumes: deque[float] | None = None
        if rules.plateau is not None:
            goals = [objective.goal for objective in objectives]
            self._front = RunningHypervolume(goals, rules.plateau.reference)
            # The oldest is the hypervolume before the last `trials` trials: none before any.
            self._volumes = deque([0.0], maxlen=rules.plateau.trials + 1)

    def add(self, record: TrialRecord) -> None:
        """Take in the next finished trial."""
        target = self._rules.target
        if record.is_feasible and target.all:
            self._is_met |= target.hold(record.metrics)
        if self._volumes is not None:
            if record.is_feasible and record.values is not None:
                self._front.add(record.values)
            self._volumes.append(self._front.volume)

    @property
    def reason(self) -> Literal["plateau", "target"] | None:
        """Why to stop now; None = search on. A plateau needs a front: while nothing feasible was found the search goes on."""
        if self._is_met:
            return "target"
        plateau = self._rules.plateau
        if plateau is None or self._volumes is None or len(self._volumes) <= plateau.trials:
            return None
        growth = self._volumes[-1] - self._volumes[0]
        return "plateau" if growth < plateau.gain * self._volumes[-1] else None
