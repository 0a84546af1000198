"""The search loop: ask a cohort, run it, tell it, in slot order.

Suggestions are computed on a mirror of the study in memory; the study on disk receives finished trials only. A
suggestion is thus a pure function of the cohorts before it, the sweep's seed and the slot: neither the number of
workers, nor the order in which they finish, nor an interruption changes it. An interrupted cohort is asked again from
its first slot; what it had finished is told from the study, the rest runs.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import optuna
from numpy.typing import NDArray
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from dsnet.errors import ConfigError
from search.runner import Runner, TrialOutcome, TrialSpec
from search.samplers import make_sampler, slot_seed
from search.space import suggest
from search.study import StudyJournal, StudySettings, Suggestion, TrialRecord, quiet_optuna, record_of

StopReason = Literal["trials", "time", "stop"]
SaveArrays = Callable[[int, Mapping[str, NDArray[Any]]], None]
"""Keeps a slot's arrays. Called before the trial is recorded, so that a recorded trial always has them; after a kill it
may be called again for the same slot, and replaces what is there."""
Constraints = Callable[[Mapping[str, float]], Mapping[str, float]]
"""From a trial's metrics to constraint values by name, feasible where <= 0; the same names for every trial. NaN (it
cannot be computed) fails the trial."""


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


def never() -> bool:
    """A `should_stop` for sweeps that nobody stops."""
    return False


def no_constraints(metrics: Mapping[str, float]) -> Mapping[str, float]:
    """The `Constraints` of a sweep without any."""
    return {}


@dataclass(frozen=True, kw_only=True)
class Search:
    """A sweep over one study.

    Attributes:
        journal: the study, where finished trials go.
        runner: runs the trials; stays open, it is the caller's to close.
        constraints: values for the sampler, from a trial's metrics.
        save_arrays: keeps what trials return beside their numbers.
        observer: hears of every recorded trial.
        should_stop: asked between trials; True ends the search after what is recorded.
    """

    journal: StudyJournal
    runner: Runner
    constraints: Constraints = no_constraints
    save_arrays: SaveArrays = keep_no_arrays
    observer: SearchObserver = field(default_factory=NullObserver)
    should_stop: Callable[[], bool] = never

    def run(self, budget: Budget) -> SearchResult:
        """Search until the budget is spent or a stop is asked for. Running again continues.

        Raises:
            ConfigError: the study cannot be continued with the libraries installed here.
            PreflightError: the study cannot be written.
        """
        deadline_s = math.inf if budget.time_s is None else time.monotonic() + budget.time_s
        mirror = Mirror(self.journal.settings, self.journal.trials())
        stop_reason = self._limit(budget, deadline_s)
        while stop_reason is None:
            with closing(self._run_cohort(mirror, budget.trials)) as records:
                for record in records:
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

    def _run_cohort(self, mirror: Mirror, num_trials: int) -> Generator[TrialRecord, None, None]:
        """Run what is missing of the next cohort; yield its trials as they are recorded."""
        suggestions = mirror.ask(num_trials)
        for trial in self.journal.trials()[mirror.num_told :]:
            record = record_of(trial)
            _check_replay(record, suggestions.pop(record.slot))
            mirror.tell(record)
        with closing(self._in_slot_order(suggestions)) as outcomes:
            for outcome in outcomes:
                suggestion = suggestions[outcome.slot]
                record = self._judge(outcome, suggestion)
                self.save_arrays(outcome.slot, outcome.arrays)
                self.journal.append(suggestion, record)
                mirror.tell(record)
                yield record

    def _in_slot_order(self, suggestions: Mapping[int, Suggestion]) -> Generator[TrialOutcome, None, None]:
        """Run the suggestions; yield each outcome as soon as it and those of all slots before it are there."""
        seed = self.journal.settings.seed
        specs = [TrialSpec(slot, slot_seed(seed, slot, "trial"), item.params) for slot, item in suggestions.items()]
        due = deque(suggestions)
        early: dict[int, TrialOutcome] = {}
        with closing(self.runner.run(specs)) as outcomes:
            for outcome in outcomes:
                early[outcome.slot] = outcome
                while due and due[0] in early:
                    yield early.pop(due.popleft())
        for slot in due:  # a runner that breaks its promise must not leave a hole in the study
            missing = TrialOutcome.failed(slot, "the runner returned no outcome for this trial")
            yield early.get(slot, missing)

    def _judge(self, outcome: TrialOutcome, suggestion: Suggestion) -> TrialRecord:
        """Decide what the study will say of a trial: complete with all numbers finite, or failed with a reason."""
        metrics = {name: float(value) for name, value in outcome.metrics.items()}
        record = TrialRecord(
            slot=outcome.slot,
            number=outcome.slot,
            state="failed",
            params=suggestion.params,
            values=None,
            metrics=metrics,
            reason=outcome.reason or "failed without a reason",
            duration_s=outcome.duration_s,
            finished_ms=round(1000 * time.time()),
        )
        if outcome.state == "failed":
            return record
        names = [objective.name for objective in self.journal.settings.objectives]
        reason = _why_unusable(names, metrics)
        if reason is not None:
            return replace(record, reason=reason)
        constraints = {name: float(value) for name, value in self.constraints(metrics).items()}
        reason = _why_unusable(constraints, constraints)
        if reason is not None:
            return replace(record, reason=f"constraint {reason}")
        values = tuple(metrics[name] for name in names)
        return replace(record, state="complete", reason=None, values=values, constraints=constraints)


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

    def ask(self, num_trials: int) -> dict[int, Suggestion]:
        """Suggestions for the next cohort by slot, in slot order; fewer where the sweep ends at `num_trials`.

        Each slot has its own sampler with its own seed. All of the cohort must be told before the next is asked.
        """
        settings = self._settings
        if self._asked:
            raise RuntimeError(f"slots {sorted(self._asked)} were asked and not told")
        slots = range(self.num_told, min(self.num_told + settings.cohort, num_trials))
        with quiet_optuna():
            for slot in slots:
                seed = slot_seed(settings.seed, slot, "sampler")
                self._study.sampler = make_sampler(settings.sampler, seed=seed, startup=settings.startup)
                self._asked[slot] = self._study.ask()
                suggest(self._asked[slot], settings.space)
        trials = self._study.get_trials(deepcopy=False)[slots.start :]
        return {
            slot: Suggestion(trial.params, trial.distributions, dict(trial.system_attrs))
            for slot, trial in zip(slots, trials, strict=True)
        }

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


def _check_replay(record: TrialRecord, suggestion: Suggestion) -> None:
    if dict(record.params) != dict(suggestion.params):
        raise ConfigError(
            f"slot {record.slot} of the study has the parameters {dict(record.params)}, but the sampler now suggests "
            f"{dict(suggestion.params)}: the study was made with other versions of Optuna or NumPy (this is Optuna "
            f"{optuna.__version__}). Install the versions of constraints.txt, or start a new run"
        )


def _why_unusable(names: Iterable[str], numbers: Mapping[str, float]) -> str | None:
    for name in names:
        if name not in numbers:
            return f"{name} is missing; the trial returned {', '.join(sorted(numbers)) or 'nothing'}"
        if not math.isfinite(numbers[name]):
            return f"{name} is {numbers[name]}"
    return None
