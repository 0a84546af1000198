"""The search loop: ask a cohort, run it, tell it, in slot order.

Suggestions are computed on a mirror of the study in memory; the study on disk receives finished trials only. A suggestion is thus a pure
function of the cohorts before it, the sweep's seed and the slot: neither the number of workers, nor the order in which they finish, nor an
interruption changes it. An interrupted cohort is asked again from its first slot; what it had finished is told from the study, the rest runs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import optuna
from numpy.typing import NDArray
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from dsnet.errors import ConfigError
from search.runner import Runner, TrialOutcome, TrialSpec, describe_error
from search.samplers import derive_seed, make_sampler
from search.space import suggest
from search.study import Objective, StudyJournal, StudySettings, Suggestion, TrialRecord, quiet_optuna

StopReason = Literal["trials", "time", "stop"]
SaveArrays = Callable[[int, Mapping[str, NDArray[Any]]], None]
"""Keeps a slot's arrays. Called before the trial is recorded, so that a recorded trial always has them; again for the same slot after a kill."""
Constraints = Callable[[Mapping[str, float]], Mapping[str, float]]
"""From a trial's metrics to constraint values by name, feasible where <= 0; the same names for every trial."""


@dataclass(frozen=True)
class Budget:
    """When a sweep ends.

    Attributes:
        trials: finished trials in the study, failed ones included, those of earlier launches too.
        time_s: seconds of searching in this launch; None = no limit. The trial in hand is finished first.
    """

    trials: int
    time_s: float | None = None


@dataclass(frozen=True)
class SearchResult:
    """What a search came to.

    Attributes:
        records: all finished trials of the study in slot order, those of earlier launches too.
        stop_reason: which limit ended it: "trials" (the sweep is complete), "time", or "stop" (asked to; resumable).
    """

    records: tuple[TrialRecord, ...]
    stop_reason: StopReason

    @property
    def num_failed(self) -> int:
        return sum(record.state == "failed" for record in self.records)


class SearchObserver(Protocol):
    """Hears of trials as they are recorded."""

    def on_trial(self, record: TrialRecord) -> None:
        """A trial of this launch was recorded; in slot order."""
        ...


class NullObserver:
    """Hears and does nothing."""

    def on_trial(self, record: TrialRecord) -> None:
        """Nothing to do."""


def keep_no_arrays(slot: int, arrays: Mapping[str, NDArray[Any]]) -> None:
    """A `SaveArrays` for sweeps whose numbers are all that matters."""


def no_constraints(metrics: Mapping[str, float]) -> Mapping[str, float]:
    """The `Constraints` of a sweep without any."""
    return {}


@dataclass(frozen=True, kw_only=True)
class Search:
    """A sweep over one study.

    Attributes:
        settings: those with which the journal was opened.
        journal: where finished trials go.
        runner: runs them; stays open, it is the caller's to close.
        constraints: values for the sampler, from a trial's metrics.
        save_arrays: keeps what trials return beside their numbers.
        observer: hears of every recorded trial.
        should_stop: asked between trials; True ends the search after what is recorded.
    """

    settings: StudySettings
    journal: StudyJournal
    runner: Runner
    constraints: Constraints = no_constraints
    save_arrays: SaveArrays = keep_no_arrays
    observer: SearchObserver = NullObserver()
    should_stop: Callable[[], bool] = bool

    def run(self, budget: Budget) -> SearchResult:
        """Search until the budget is spent or a stop is asked for. Running again continues.

        Raises:
            ConfigError: the study cannot be continued with what is installed; see `Mirror`.
            PreflightError: the study cannot be written.
        """
        deadline_s = math.inf if budget.time_s is None else time.monotonic() + budget.time_s
        mirror, stop_reason = None, self._limit(budget, deadline_s)
        while stop_reason is None:
            if mirror is None:
                mirror = Mirror(self.settings, self.journal.trials())
            for record in self._run_cohort(mirror, budget.trials):
                self.observer.on_trial(record)
                stop_reason = self._limit(budget, deadline_s)
                if stop_reason is not None:
                    break
        return SearchResult(tuple(self.journal.records()), stop_reason)

    def _limit(self, budget: Budget, deadline_s: float) -> StopReason | None:
        if len(self.journal.trials()) >= budget.trials:
            return "trials"
        if time.monotonic() >= deadline_s:
            return "time"
        return "stop" if self.should_stop() else None

    def _run_cohort(self, mirror: Mirror, num_trials: int) -> Iterator[TrialRecord]:
        """Run what is missing of the next cohort; yield its trials when they are recorded."""
        suggestions = mirror.ask(num_trials)
        first = mirror.num_told
        done = self.journal.records()[first:]
        for record in done:
            _check_replay(record, suggestions[record.slot - first].params)
            mirror.tell(record)
        waiting = {slot: suggestions[slot - first] for slot in range(first + len(done), first + len(suggestions))}
        with closing(self._outcomes(waiting)) as outcomes:
            for outcome in outcomes:
                record = self._judge(outcome, waiting[outcome.slot])
                self.save_arrays(outcome.slot, outcome.arrays)
                self.journal.append(waiting[outcome.slot], record)
                mirror.tell(record)
                yield record

    def _outcomes(self, waiting: Mapping[int, Suggestion]) -> Iterator[TrialOutcome]:
        """Outcomes in slot order, each as soon as it and those before it are there."""
        specs = [
            TrialSpec(slot, derive_seed(self.settings.seed, slot, "trial"), item.params)
            for slot, item in waiting.items()
        ]
        early: dict[int, TrialOutcome] = {}
        due = iter(waiting)
        slot = next(due, None)
        for outcome in self.runner.run(specs):
            early[outcome.slot] = outcome
            while slot in early:
                yield early.pop(slot)
                slot = next(due, None)
        while slot is not None:  # a runner that breaks its promise must not leave a hole in the study
            yield early.pop(slot, None) or TrialOutcome.failed(slot, "the runner returned no outcome for this trial")
            slot = next(due, None)

    def _judge(self, outcome: TrialOutcome, suggestion: Suggestion) -> TrialRecord:
        record = TrialRecord(
            slot=outcome.slot,
            number=outcome.slot,
            state="failed",
            params=suggestion.params,
            values=None,
            metrics=dict(outcome.metrics),
            reason=outcome.reason,
            duration_s=outcome.duration_s,
        )
        if outcome.state == "failed":
            return replace(record, reason=outcome.reason or "failed without a reason")
        reason = _why_unusable(outcome.metrics, self.settings.objectives)
        if reason is not None:
            return replace(record, reason=reason)
        values = tuple(float(outcome.metrics[objective.name]) for objective in self.settings.objectives)
        try:
            constraints = {name: float(value) for name, value in self.constraints(outcome.metrics).items()}
        except KeyError as error:
            return replace(record, reason=f"a constraint could not be computed: {describe_error(error)}")
        return replace(record, state="complete", values=values, constraints=constraints)


class Mirror:
    """The study in memory, on which suggestions are computed; whole cohorts enter and leave it.

    Rebuilt from the finished trials, it continues as if it had never been away.
    """

    def __init__(self, settings: StudySettings, history: Sequence[FrozenTrial]) -> None:
        """Take in all complete cohorts of `history` (finished trials in slot order); a rest is asked again."""
        self._settings = settings
        with quiet_optuna():
            directions = [objective.goal for objective in settings.objectives]
            self._study = optuna.create_study(storage=InMemoryStorage(), directions=directions)
            self.num_told = len(history) - len(history) % settings.cohort
            self._study.add_trials(history[: self.num_told])
        self._asked: dict[int, Trial] = {}

    def ask(self, num_trials: int) -> list[Suggestion]:
        """Suggestions for the next cohort, in slot order; fewer than a cohort where the sweep ends at `num_trials`.

        Each slot has a sampler of its own with a seed of its own. All of the cohort must be told before the next is asked.
        """
        settings = self._settings
        if self._asked:
            raise RuntimeError(f"slots {sorted(self._asked)} were asked and not told")
        slots = range(self.num_told, min(self.num_told + settings.cohort, num_trials))
        with quiet_optuna():
            for slot in slots:
                seed = derive_seed(settings.seed, slot, "sampler")
                self._study.sampler = make_sampler(settings.sampler, seed=seed, startup=settings.startup)
                trial = self._study.ask()
                suggest(trial, settings.space)
                self._asked[slot] = trial
        frozen = self._study.get_trials(deepcopy=False)[slots.start :]
        return [Suggestion(trial.params, trial.distributions, dict(trial.system_attrs)) for trial in frozen]

    def tell(self, record: TrialRecord) -> None:
        """Enter a finished trial of the asked cohort."""
        trial = self._asked.pop(record.slot)
        for name, value in record.constraints.items():
            trial.set_constraint(name, value)
        if record.state == "complete":
            self._study.tell(trial, values=record.values, state=TrialState.COMPLETE)
        else:
            self._study.tell(trial, state=TrialState.FAIL)
        self.num_told += 1


def _check_replay(record: TrialRecord, suggested: Mapping[str, Any]) -> None:
    if dict(record.params) != dict(suggested):
        raise ConfigError(
            f"slot {record.slot} of the study has the parameters {dict(record.params)}, but the sampler now suggests {dict(suggested)}: "
            f"the study was made with another version of Optuna or NumPy (this is Optuna {optuna.__version__}). Install the versions "
            "of constraints.txt, or start a new run"
        )


def _why_unusable(metrics: Mapping[str, float], objectives: Sequence[Objective]) -> str | None:
    for objective in objectives:
        value = metrics.get(objective.name)
        if value is None:
            return f"the trial returned no {objective.name}, only: {', '.join(sorted(metrics)) or 'nothing'}"
        if not math.isfinite(value):
            return f"{objective.name} is {value}"
    return None
