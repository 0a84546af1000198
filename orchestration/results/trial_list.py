"""Selection and order of a run's trials for lists: states, conditions, sorting."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, get_args

from dsnet.errors import ConfigError
from dsnet.metrics import find_metric
from dsnet.wording import did_you_mean
from orchestration.results.gate_id import GateId
from orchestration.results.protocol import Results
from search.conditions.constraints import BASELINE
from search.conditions.expressions import parse_comparison
from search.study.study import TrialRecord

Standing = Literal["complete", "infeasible", "failed", "pruned"]
"""Outcome of a trial; completed ones are divided by whether they hold every constraint."""
Wanted = Literal["complete", "feasible", "infeasible", "failed", "pruned"]
WANTED: tuple[str, ...] = get_args(Wanted)


@dataclass(frozen=True)
class ListedTrial:
    """A trial with the facts that lists show."""

    name: str
    record: TrialRecord
    is_front: bool
    supernet: str | None = None
    """Name of its supernet in a sweep of several; else None."""

    @property
    def standing(self) -> Standing:
        """Its state, or "infeasible" if it completed and violates a constraint."""
        record = self.record
        return "infeasible" if record.state == "complete" and not record.is_feasible else record.state

    @property
    def broken(self) -> tuple[str, ...]:
        """The constraints that it violates."""
        return broken_constraints(self.record)

    @property
    def reason(self) -> str | None:
        """Why it cannot be on the front; None if it can."""
        return f"violates {' and '.join(self.broken)}" if self.broken and not self.record.reason else self.record.reason

    @property
    def values(self) -> dict[str, float]:
        """The numbers that a condition may use: metrics, and parameters that are numbers."""
        params = {
            name: float(value)
            for name, value in self.record.params.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        return {**params, **self.record.metrics}


@dataclass(frozen=True)
class Selection:
    """The user's selection of trials."""

    state: str | None = None
    """One of `WANTED`; None selects all."""
    where: tuple[str, ...] = ()
    """Conditions over metrics, parameters and `baseline.*`; all must hold."""
    sort: str | None = None
    """A metric or parameter to sort by, the best first; None sorts by slot."""
    limit: int | None = None
    """Largest number of trials, >= 1; None has no limit."""


@dataclass(frozen=True)
class TrialList:
    """Finished trials, with the objectives and baselines by which they are judged."""

    trials: tuple[ListedTrial, ...]
    objectives: tuple[tuple[str, str], ...]
    """(metric, goal) of each objective."""
    baseline: Callable[[str | None], Mapping[str, float]] = lambda _: {}
    """Returns the metrics of the widest static sub-network of a supernet, without the prefix;
    called only if a condition reads one."""

    @classmethod
    def of(cls, results: Results) -> TrialList:
        """All finished trials of a sweep, by supernet, then by slot."""
        objectives = tuple((metric.name, metric.goal) for metric in results.config.metrics)
        front = frozenset(results.front_gates)
        trials = [
            ListedTrial(gate.name, record, gate in front, name or None)
            for name, supernet in results.supernets.items()
            for record in supernet.records
            for gate in (GateId(name, record.slot),)
        ]
        return cls(tuple(trials), objectives, lambda name: results.supernets[name or ""].baseline)

    def select(self, selection: Selection) -> tuple[ListedTrial, ...]:
        """The trials that match a selection.

        Raises:
            ConfigError: a condition cannot be read, or names an unknown metric or parameter.
        """
        chosen = [trial for trial in self.trials if _is_wanted(trial, selection.state)]
        baselines = self._baselines() if any(BASELINE in text for text in selection.where) else {}
        names = self._names() if selection.where or selection.sort is not None else []
        for text in selection.where:
            comparison = parse_comparison(text, [*names, *dict.fromkeys(chain.from_iterable(baselines.values()))])
            chosen = [
                trial for trial in chosen if comparison.holds({**trial.values, **baselines.get(trial.supernet, {})})
            ]
        if selection.sort is not None:
            _check_known(selection.sort, names)
            sign = -1.0 if self._is_rising(selection.sort) else 1.0
            chosen.sort(key=lambda trial: _rank(trial.values.get(selection.sort or ""), sign))
        return tuple(chosen[: selection.limit])

    def _names(self) -> list[str]:
        """The names that a condition may use, beside those of baselines."""
        return sorted({name for trial in self.trials for name in trial.values})

    def _baselines(self) -> dict[str | None, dict[str, float]]:
        """Values of `baseline.top1` and so on, by supernet."""
        supernets = dict.fromkeys(trial.supernet for trial in self.trials)
        return {
            supernet: {BASELINE + name: value for name, value in self.baseline(supernet).items()}
            for supernet in supernets
        }

    def _is_rising(self, name: str) -> bool:
        """Whether larger values of a metric or parameter are better."""
        goals = dict(self.objectives)
        known = find_metric(name)
        return goals[name] == "maximize" if name in goals else known is not None and known.goal == "maximize"


def broken_constraints(record: TrialRecord) -> tuple[str, ...]:
    """The constraints that a trial violates, or whose outcome is not known."""
    return tuple(text for text, violation in record.constraints.items() if not violation <= 0)


def json_row(trial: ListedTrial) -> dict[str, Any]:
    """Everything about a trial as JSON; values that are not finite become null."""
    record = trial.record
    return {
        "name": trial.name,
        "supernet": trial.supernet,
        "slot": record.slot,
        "state": record.state,
        "is_feasible": record.is_feasible,
        "is_front": trial.is_front,
        "reason": record.reason,
        "breaks": list(trial.broken),
        "params": dict(record.params),
        "metrics": _finite(record.metrics),
        "constraints": _finite(record.constraints),
        "rungs": {str(rung): list(values) for rung, values in record.rungs.items()},
        "duration_s": record.duration_s,
    }


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _is_wanted(trial: ListedTrial, state: str | None) -> bool:
    if state in (None, trial.record.state):
        return True
    return trial.record.is_feasible if state == "feasible" else trial.standing == state


def _check_known(name: str, known: Sequence[str]) -> None:
    if name not in known:
        hint = did_you_mean(name, known) or ";"
        raise ConfigError(
            f"--sort {name}: no trial has such a metric or parameter{hint} known: {', '.join(known) or 'none'}"
        )


def _rank(value: float | None, sign: float) -> float:
    """A sort key that puts the best first and a missing value last."""
    return math.inf if value is None or math.isnan(value) else sign * value
