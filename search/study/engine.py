"""The search loop: ask for a cohort's suggestions, run its trials, tell the results.

Suggestions are computed on a mirror of the study in memory; the study on disk receives only
finished trials. A suggestion is thus a pure function of the earlier cohorts, the sweep's seed and
the slot: neither the number of workers, nor the order in which they finish, nor an interruption
changes it. An interrupted cohort is asked again from its first slot; its finished trials are told
from the study, and the others run.

The asynchronous order is not reproducible: a free worker gets a suggestion at once, based on the
trials that have finished by then. Finished trials are neither lost nor repeated there either, but
two sweeps differ.
"""

from __future__ import annotations

import copy
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
from optuna.trial import FrozenTrial, Trial

from dsnet.errors import ConfigError
from search.conditions.constraints import ConstraintSet
from search.study.halving import ParetoHalving
from search.study.runner import PROGRESS, Runner, State, TrialOutcome, TrialSpec
from search.study.stopping import StopRules
from search.study.study import (
    RungRecord,
    SharedDistributions,
    StudyJournal,
    StudySettings,
    Suggestion,
    TrialRecord,
    optuna_state,
    record_of,
)
from search.suggest.samplers import (
    POINT_LISTS,
    is_foreign,
    lasting_notes,
    make_sampler,
    num_points,
    quiet_optuna,
    slot_seed,
)
from search.suggest.space import Scalar, suggest

StopReason = Literal["trials", "time", "stop", "plateau", "target", "space"]
SaveArrays = Callable[[int, Mapping[str, NDArray[Any]]], str | None]
"""Function that stores a slot's arrays and returns the SHA-256 of the file, which is kept in the
trial's record; None if there are no arrays. It is called before the trial is recorded, so that a
recorded trial always has its arrays; after a kill it may be called again for the same slot and must
replace them."""
Queue = Callable[[], Sequence[Mapping[str, Scalar]]]
"""Function that returns all points that people have enqueued so far, oldest first; the list only
grows."""
NO_OUTCOME = "the runner returned no outcome for this trial"
BATCHES_PER_COHORT = 8
"""In the asynchronous order a worker gets this fraction of a cohort at a time: trials that train in
one program are cheaper."""


@dataclass(frozen=True)
class Budget:
    """Limits that end a sweep.

    Attributes:
        trials: number of finished trials in the study, including failed ones and those of earlier
            launches.
        time_s: seconds of search in this launch; None = no limit. Checked when a trial has been
            recorded.
        rules: rules that end it early because of its results.
    """

    trials: int
    time_s: float | None = None
    rules: StopRules = field(default_factory=StopRules)


@dataclass(frozen=True)
class SearchResult:
    """Result of a search.

    Attributes:
        records: all finished trials of the study in slot order, including those of earlier
            launches.
        stop_reason: why it ended: "trials" (the sweep is complete), "plateau" or "target" (a stop
            rule), "space" (every point of the grid was tried), "time", or "stop" (on request;
            resumable).
    """

    records: tuple[TrialRecord, ...]
    stop_reason: StopReason

    @property
    def num_failed(self) -> int:
        return sum(record.state == "failed" for record in self.records)


class SearchObserver(Protocol):
    """Receiver of trials as they are recorded."""

    def on_trial(self, record: TrialRecord) -> None:
        """Receive a recorded trial of this launch; with cohorts, in slot order."""
        ...


class NullObserver:
    """Observer that ignores all trials."""

    def on_trial(self, record: TrialRecord) -> None:
        """Do nothing."""


class ProgressStore(Protocol):
    """Store of the arrays from which staged trials resume; if they are lost, trials start again
    from their beginning."""

    def save(self, slot: int, rung: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Store a slot's arrays at a rung, replacing those of an earlier rung."""
        ...

    def load(self, slot: int, rung: int) -> Mapping[str, NDArray[Any]]:
        """The arrays stored at that rung; empty if there are none."""
        ...

    def forget(self, slot: int) -> None:
        """Remove a slot's arrays, since the trial has ended."""
        ...


class ProgressInMemory:
    """Progress store in the memory of this process."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[int, Mapping[str, NDArray[Any]]]] = {}

    def save(self, slot: int, rung: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        self._kept[slot] = (rung, arrays)

    def load(self, slot: int, rung: int) -> Mapping[str, NDArray[Any]]:
        kept_rung, arrays = self._kept.get(slot, (None, {}))
        return arrays if kept_rung == rung else {}

    def forget(self, slot: int) -> None:
        self._kept.pop(slot, None)


def keep_no_arrays(slot: int, arrays: Mapping[str, NDArray[Any]]) -> str | None:
    """A `SaveArrays` that discards the arrays."""
    return None


def never() -> bool:
    """A `should_stop` that never requests a stop."""
    return False


def nothing_enqueued() -> Sequence[Mapping[str, Scalar]]:
    """A `Queue` that is always empty."""
    return ()


@dataclass(frozen=True, kw_only=True)
class Search:
    """A sweep over one study.

    Attributes:
        journal: the study to which finished trials are written.
        runner: runs the trials; it is not closed here.
        constraints: constraints, which are told to the sampler; a hard one ends a trial as soon as
            it is known to be violated.
        save_arrays: stores the arrays that trials return.
        progress: store of the arrays from which staged trials resume.
        queue: points that people add during the sweep; each is tried in the next slot that has not
            begun yet.
        observer: receives every recorded trial.
        should_stop: called between trials; True ends the search, keeping the recorded trials.
    """

    journal: StudyJournal
    runner: Runner
    constraints: ConstraintSet = field(default_factory=ConstraintSet)
    save_arrays: SaveArrays = keep_no_arrays
    progress: ProgressStore = field(default_factory=ProgressInMemory)
    queue: Queue = nothing_enqueued
    observer: SearchObserver = field(default_factory=NullObserver)
    should_stop: Callable[[], bool] = never

    def run(self, budget: Budget) -> SearchResult:
        """Search until the budget is spent, a stop rule applies, or a stop is requested; running
        again continues.

        Raises:
            ConfigError: the study cannot be continued with the libraries installed here.
            PreflightError: the study cannot be written.
        """
        limits = _Limits(budget, self.journal.settings, self.should_stop, self._num_enqueued)
        for trial in self.journal.trials():
            limits.add(record_of(trial))
        reason = limits.reason()
        if reason is None:
            is_free = self.journal.settings.order == "asynchronous"
            reason = self._run_asynchronously(limits) if is_free else self._run_cohorts(limits)
        return SearchResult(tuple(self.journal.records()), reason)

    def _run_cohorts(self, limits: _Limits) -> StopReason:
        settings = self.journal.settings
        mirror = Mirror(settings, self.journal.trials())
        while (reason := limits.reason()) is None:
            # The mirror is rebuilt as after an interruption: for a foreign sampler, whose notes on
            # the study an interruption would lose; and after a shorter cohort (the end of a grid)
            # that continues because points were enqueued.
            if is_foreign(settings.sampler.name) or mirror.num_told % settings.cohort:
                mirror = Mirror(settings, self.journal.trials())
            num_trials, first_slot = limits.num_trials(), mirror.num_told
            points = self._fixed_points(range(first_slot, mirror.next_end(num_trials)), self._num_begun(first_slot))
            with closing(self._run_cohort(mirror, mirror.ask(num_trials, points))) as records:
                for record in records:
                    limits.add(record)
                    self.observer.on_trial(record)
                    reason = limits.reason()
                    if reason is not None:
                        return reason
        return reason

    def _num_enqueued(self) -> int:
        """Number of points that people have enqueued so far, including those without a slot."""
        return max(len(self.journal.enqueued), len(self.queue()))

    def _num_begun(self, first_slot: int) -> int:
        """Number of first slots whose points cannot change any more.

        They are recorded, or the study has a stage of them or of a later slot.

        Args:
            first_slot: first slot of the current cohort.
        """
        halving = self.journal.settings.halving
        noted = {} if halving is None else self.journal.stage(first_slot, halving.rungs[0])
        return max([len(self.journal.trials()), *(slot + 1 for slot in noted)])

    def _fixed_points(self, slots: Iterable[int], num_begun: int) -> Mapping[int, Mapping[str, Scalar]]:
        """All enqueued points by slot; new points are permanently assigned to those of `slots` that
        have not begun yet."""
        settings, noted = self.journal.settings, self.journal.enqueued
        taken = dict(enumerate(settings.enqueue)) | noted
        new = self.queue()[len(noted) :]
        if new:
            free = (slot for slot in slots if slot not in taken and slot >= num_begun)
            given = dict(zip(free, new, strict=False))
            if given:
                self.journal.note_enqueued(given)
                taken |= given
        return taken

    def _run_cohort(self, mirror: Mirror, suggestions: Mapping[int, Suggestion]) -> Generator[TrialRecord, None, None]:
        """Run the trials of a cohort that the study lacks; yields their records as they are
        written."""
        first_slot, waiting = mirror.num_told, dict(suggestions)
        for trial in self.journal.trials()[first_slot:]:
            record = record_of(trial)
            _check_replay(record, waiting.pop(record.slot))
            mirror.tell(record)
        halving = self.journal.settings.halving
        records = self._run_at_once(waiting) if halving is None else self._run_by_rungs(halving, first_slot, waiting)
        with closing(records):
            for record, arrays in records:
                record = self._recorded(waiting[record.slot], record, arrays)
                mirror.tell(record)
                yield record

    def _recorded(self, suggestion: Suggestion, record: TrialRecord, arrays: Mapping[str, NDArray[Any]]) -> TrialRecord:
        """Store a trial's arrays, then its record; returns the record as it is stored."""
        kept = {name: array for name, array in arrays.items() if not name.startswith(PROGRESS)}
        record = replace(record, arrays_sha256=self.save_arrays(record.slot, kept))
        self.journal.append(suggestion, record)
        self.progress.forget(record.slot)
        return record

    def rerun(self, records: Sequence[TrialRecord]) -> Generator[tuple[TrialRecord, TrialOutcome], None, None]:
        """Run recorded trials again from their start, with their own seeds; the study does not
        change. Yields each record with its outcome, as they come."""
        by_slot = {record.slot: record for record in records}
        with closing(self.runner.run(self._specs(by_slot))) as outcomes:
            for outcome in outcomes:
                yield by_slot[outcome.slot], outcome

    def _run_at_once(self, suggestions: Mapping[int, Suggestion]) -> Generator[_RecordWithArrays, None, None]:
        """Run trials from start to end; yields their records in slot order, each as early as
        possible."""
        with closing(_in_slot_order(self.runner, self._specs(suggestions))) as outcomes:
            for outcome in outcomes:
                yield self._judge(outcome, suggestions[outcome.slot], outcome.slot), outcome.arrays

    def _run_by_rungs(
        self, halving: ParetoHalving, first_slot: int, suggestions: Mapping[int, Suggestion]
    ) -> Generator[_RecordWithArrays, None, None]:
        """Run trials rung by rung and prune those that fall behind; results at a rung are read from
        the study where known.

        Trials are compared at a rung with their cohort and all earlier cohorts, so that the order
        in which they finish does not matter. If a stop is requested within a stage, it ends without
        yielding the cohort's records.
        """
        alive, ended = dict(suggestions), dict[int, TrialRecord]()
        rungs: dict[int, dict[int, tuple[float, ...]]] = {slot: {} for slot in suggestions}
        spent_s = dict.fromkeys(suggestions, 0.0)
        goals = [objective.goal for objective in self.journal.settings.objectives]
        before: int | None = None
        for rung in halving.rungs:
            stages = self._run_stage(first_slot, rung, before, alive, spent_s)
            if stages is None:
                return
            reached = _reached(stages)
            earlier = [
                stage
                for start in range(0, first_slot, self.journal.settings.cohort)
                for stage in _reached(self.journal.stage(start, rung)).values()
            ]
            survivors = halving.survivors(
                {slot: self._values(stage.metrics) for slot, stage in reached.items()},
                [self._values(stage.metrics) for stage in earlier],
                goals,
                {slot: self._violation(stage.metrics) for slot, stage in reached.items()},
                [self._violation(stage.metrics) for stage in earlier],
            )
            for slot in list(alive):
                stage = stages[slot]
                spent_s[slot] = stage.duration_s
                if slot in reached:
                    rungs[slot][rung] = self._values(stage.metrics)
                if slot not in survivors:
                    ended[slot] = self._ended(slot, alive.pop(slot), stage, rung, rungs[slot])
            before = rung
        last = self._specs(alive, None, before)
        with closing(_in_slot_order(self.runner, last)) as outcomes:
            for slot, suggestion in suggestions.items():
                if slot in ended:
                    yield ended[slot], {}
                    continue
                outcome = next(outcomes)
                record = self._judge(outcome, suggestion, slot)
                yield replace(record, duration_s=record.duration_s + spent_s[slot], rungs=rungs[slot]), outcome.arrays

    def _run_stage(
        self,
        first_slot: int,
        rung: int,
        before: int | None,
        alive: Mapping[int, Suggestion],
        spent_s: Mapping[int, float],
    ) -> dict[int, RungRecord] | None:
        """The results of a cohort's trials at a rung: read from the study where known, else run
        from the rung `before`.

        Each result is stored as soon as it is available. None: a stop was requested; stored results
        are kept.
        """
        stages = self.journal.stage(first_slot, rung)
        missing = {slot: item for slot, item in alive.items() if slot not in stages}
        with closing(self.runner.run(self._specs(missing, rung, before))) as outcomes:
            for outcome in outcomes:
                progress = {name: array for name, array in outcome.arrays.items() if name.startswith(PROGRESS)}
                self.progress.save(outcome.slot, rung, progress)
                record = self._judge(outcome, missing.pop(outcome.slot), outcome.slot)
                spent = spent_s[outcome.slot] + record.duration_s
                stages[outcome.slot] = RungRecord(record.state, dict(record.metrics), record.reason, spent)
                self.journal.note_stage(first_slot, rung, stages)
                if self.should_stop():
                    return None
        for slot in missing:  # a faulty runner must not leave a gap in the study
            stages[slot] = RungRecord("failed", {}, NO_OUTCOME, spent_s[slot])
        return stages

    def _violation(self, metrics: Mapping[str, float]) -> float:
        """Sum of a trial's constraint violations."""
        return sum(max(0.0, value) for value in self._constraint_values(metrics).values())

    def _values(self, metrics: Mapping[str, float]) -> tuple[float, ...]:
        return tuple(metrics[objective.name] for objective in self.journal.settings.objectives)

    def _ended(
        self,
        slot: int,
        suggestion: Suggestion,
        stage: RungRecord,
        rung: int,
        rungs: Mapping[int, tuple[float, ...]],
    ) -> TrialRecord:
        """The record of a trial that ends at a rung."""
        is_behind = stage.state == "complete"
        return TrialRecord(
            slot=slot,
            number=slot,
            state="pruned" if is_behind else stage.state,
            params=suggestion.params,
            values=None,
            metrics=stage.metrics,
            reason=f"fell behind at rung {rung}" if is_behind else stage.reason,
            duration_s=stage.duration_s,
            constraints=self._constraint_values(stage.metrics) if stage.state != "failed" else {},
            finished_ms=round(1000 * time.time()),
            rungs=dict(rungs),
        )

    def _run_asynchronously(self, limits: _Limits) -> StopReason:
        """Run the asynchronous order: each free worker gets suggestions based on the trials
        finished by then."""
        journal = self.journal
        mirror = Mirror(journal.settings, journal.trials())
        asked: dict[int, Suggestion] = {}
        size = math.ceil(journal.settings.cohort / BATCHES_PER_COHORT)
        known = {record.slot for record in journal.records()}
        reason: StopReason | None = None

        def take() -> list[TrialSpec]:
            if reason is not None:
                return []
            # Slots that a killed sweep had begun come first, so that its study has no gaps at the
            # end.
            free = (slot for slot in range(limits.num_trials()) if slot not in known)
            slots = [slot for slot, _ in zip(free, range(size), strict=False)]
            known.update(slots)
            if not slots:
                return []
            points = self._fixed_points(slots, 0)
            suggestions = mirror.ask_slots(slots, points)
            asked.update(suggestions)
            return self._specs(suggestions)

        with closing(self.runner.stream(take)) as outcomes:
            for outcome in outcomes:
                suggestion = asked.pop(outcome.slot)
                record = self._judge(outcome, suggestion, len(journal.trials()))
                record = self._recorded(suggestion, record, outcome.arrays)
                mirror.tell(record)
                limits.add(record)
                self.observer.on_trial(record)
                reason = limits.reason()
                if reason in ("stop", "time"):
                    return reason
        if reason is None:
            raise RuntimeError(f"the runner ended without outcomes for slots {sorted(asked)}")
        return reason

    def _specs(
        self,
        suggestions: Mapping[int, Suggestion] | Mapping[int, TrialRecord],
        until: int | None = None,
        before: int | None = None,
    ) -> list[TrialSpec]:
        seed = self.journal.settings.seed
        return [
            TrialSpec(
                slot,
                slot_seed(seed, slot, "trial"),
                item.params,
                until,
                {} if before is None else self.progress.load(slot, before),
            )
            for slot, item in suggestions.items()
        ]

    def _judge(self, outcome: TrialOutcome, suggestion: Suggestion, number: int) -> TrialRecord:
        """The record of an outcome.

        It is complete if objectives and constraints are present and finite, pruned if a hard
        constraint is violated, and failed otherwise.
        """
        metrics = {name: float(value) for name, value in outcome.metrics.items()}
        record = TrialRecord(
            slot=outcome.slot,
            number=number,
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
        constraints = self._constraint_values(metrics)
        reason = _why_unusable(constraints, constraints)
        if reason is not None:
            return replace(record, reason=f"constraint {reason}")
        broken = self.constraints.broken(metrics)
        state: State = "complete" if broken is None else "pruned"
        values = tuple(metrics[name] for name in names) if broken is None else None
        return replace(record, state=state, reason=broken, values=values, constraints=constraints)

    def _constraint_values(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return {name: float(value) for name, value in self.constraints.violations(metrics).items()}


_RecordWithArrays = tuple[TrialRecord, Mapping[str, NDArray[Any]]]
"""A trial's record, and the arrays that it returned."""


class _Limits:
    """State of the limits that end a search: budget, stop rules, size of the space, stop
    requests."""

    def __init__(
        self,
        budget: Budget,
        settings: StudySettings,
        should_stop: Callable[[], bool],
        num_enqueued: Callable[[], int],
    ) -> None:
        self._budget = budget
        self._num_enqueued = num_enqueued
        self._deadline_s = math.inf if budget.time_s is None else time.monotonic() + budget.time_s
        self._watch = budget.rules.watch(settings.objectives)
        self._should_stop = should_stop
        self._num_points = num_points(settings.sampler, settings.space)
        self._num_configured = len(settings.enqueue)
        self._num_finished = 0

    def add(self, record: TrialRecord) -> None:
        """Count a finished trial."""
        self._num_finished += 1
        self._watch.add(record)

    def num_trials(self) -> int:
        """Maximum number of slots of the sweep; for a grid it grows with the enqueued points."""
        if self._num_points is None:
            return self._budget.trials
        return min(self._budget.trials, self._num_points + self._num_configured + self._num_enqueued())

    def reason(self) -> StopReason | None:
        """The reason to end now; None = continue."""
        if self._num_finished >= self._budget.trials:
            return "trials"
        if self._watch.reason is not None:
            return self._watch.reason
        if self._num_finished >= self.num_trials():
            return "space"
        if time.monotonic() >= self._deadline_s:
            return "time"
        return "stop" if self._should_stop() else None


class Mirror:
    """Copy of the study in memory, on which suggestions are computed.

    A mirror that is rebuilt from the finished trials makes the same suggestions as one that was
    never interrupted.
    """

    def __init__(self, settings: StudySettings, history: Sequence[FrozenTrial]) -> None:
        """Build a mirror from the complete cohorts of `history` (finished trials in slot order).

        The trials of an incomplete cohort are asked again. In the asynchronous order, which has no
        cohorts, all trials are taken.
        """
        self._settings = settings
        is_free = settings.order == "asynchronous"
        self.num_told = len(history) if is_free else len(history) - len(history) % settings.cohort
        self._asked: dict[int, Trial] = {}
        with quiet_optuna():
            directions = [objective.goal for objective in settings.objectives]
            self._study = optuna.create_study(storage=InMemoryStorage(), directions=directions)
            self._study.add_trials([_bare(trial) for trial in history[: self.num_told]])
        SharedDistributions().share(self._study.get_trials(deepcopy=False))

    def next_end(self, num_trials: int) -> int:
        """The slot after the last one of the next cohort, for a sweep of `num_trials` slots."""
        return min(self.num_told + self._settings.cohort, num_trials)

    def ask(self, num_trials: int, points: Mapping[int, Mapping[str, Scalar]] | None = None) -> dict[int, Suggestion]:
        """Suggestions for the next cohort by slot, in slot order; fewer at the end of the sweep.

        Each slot has its own sampler with its own seed. All trials of a cohort must be told before
        the next cohort is asked.

        Args:
            num_trials: number of slots of the whole sweep.
            points: enqueued points of the whole sweep, by slot; the sampler draws missing
                parameters.

        Raises:
            RuntimeError: earlier suggestions have not been told.
        """
        if self._asked:
            raise RuntimeError(f"slots {sorted(self._asked)} were asked and not told")
        return self.ask_slots(range(self.num_told, self.next_end(num_trials)), points)

    def ask_slots(
        self, slots: Iterable[int], points: Mapping[int, Mapping[str, Scalar]] | None = None
    ) -> dict[int, Suggestion]:
        """Suggestions for the given slots, even if other suggestions have not been told yet."""
        settings, points = self._settings, points or {}
        suggestions = {}
        with quiet_optuna():
            for slot in slots:
                place = slot
                if settings.sampler.name in POINT_LISTS:  # enqueued points do not use up points of the list
                    place -= sum(other < slot for other in points)
                self._study.sampler = make_sampler(
                    settings.sampler, space=settings.space, base_seed=settings.seed, slot=place
                )
                if slot in points:
                    self._study.enqueue_trial(dict(points[slot]))
                trial = self._study.ask()
                suggest(trial, settings.space)
                self._asked[slot] = trial
                frozen = self._study.get_trials(deepcopy=False)[trial.number]
                suggestions[slot] = Suggestion(frozen.params, frozen.distributions, lasting_notes(frozen.system_attrs))
        return suggestions

    def tell(self, record: TrialRecord) -> None:
        """Add the result of a trial that was asked."""
        trial = self._asked.pop(record.slot)
        for name, value in record.constraints.items():
            trial.set_constraint(name, value)
        with quiet_optuna():
            self._study.tell(trial, values=record.values, state=optuna_state(record.state))
        self.num_told += 1


def _bare(trial: FrozenTrial) -> FrozenTrial:
    """A trial as samplers see it, without our own notes, which would take kilobytes; trials that
    are told have none either."""
    bare = copy.copy(trial)
    bare.user_attrs = {}
    return bare


def _reached(stages: Mapping[int, RungRecord]) -> dict[int, RungRecord]:
    """The stages of the trials that have not ended."""
    return {slot: stage for slot, stage in stages.items() if stage.state == "complete"}


def _in_slot_order(runner: Runner, specs: Sequence[TrialSpec]) -> Generator[TrialOutcome, None, None]:
    """Run trials; yields their outcomes in the order of `specs`, each as early as possible."""
    due = deque(spec.slot for spec in specs)
    early: dict[int, TrialOutcome] = {}
    with closing(runner.run(specs)) as outcomes:
        for outcome in outcomes:
            early[outcome.slot] = outcome
            while due and due[0] in early:
                yield early.pop(due.popleft())
    for slot in due:  # a faulty runner must not leave a gap in the study
        missing = TrialOutcome.failed(slot, NO_OUTCOME)
        yield early.get(slot, missing)


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
