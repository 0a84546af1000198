"""A fixed list of trials under a Ray Tune scheduler whose decisions are stored before they take
effect, and replayed in a later launch.

The scheduler is given all trials at the start. Events that an earlier launch stored are replayed to
it in the stored order, which restores its state; Tune itself only gets the trials that still have
something to train.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    TrialScheduler,
)
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.tune.stopper import Stopper

from dsnet.seeds import derive_seed
from orchestration.config.schedulers import TIME
from orchestration.workers.tune_ledger import End, FateState, Ledger, Report, TuneRules

METRIC = "static_hypervolume"
MEMBER = "member"
SCHEDULERS: Mapping[str, type[TrialScheduler]] = {
    "none": FIFOScheduler,
    "asha": AsyncHyperBandScheduler,
    "median": MedianStoppingRule,
    "hyperband": HyperBandScheduler,
}


@dataclass(frozen=True)
class Member:
    """The facts about a supernet that scheduling needs."""

    name: str
    key: str
    epochs: int
    """Number of its epochs; the last report comes after them."""
    is_pending: bool
    """Whether it has something left to train."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a trial that returned by itself."""

    state: FateState
    reason: str | None = None
    is_lasting: bool = True


class ReplayingScheduler(TrialScheduler):
    """Wraps a scheduler of Ray Tune: stores reports and decisions, limits the number of running
    trials, and replays stored events."""

    _supports_buffered_results = False

    def __init__(
        self,
        inner: TrialScheduler,
        members: Sequence[Member],
        ledger: Ledger,
        rules: TuneRules,
        *,
        is_stopping: Callable[[], bool],
        outcome_of: Callable[[str], Outcome | None],
        hear: Callable[[str, Report | End], None],
    ) -> None:
        """Keep the scheduler, its members and the ledger; nothing is replayed yet.

        Args:
            inner: scheduler that decides; its metric is set already.
            members: all of them, in the order in which they start.
            ledger: ledger of earlier events; receives new ones.
            rules: the number of trials that run at a time, and the seed of the scheduler's random
                choices, with one stream per member.
            is_stopping: returns True when no further trial may start.
            outcome_of: returns the outcome of a member's trial that has returned; None if the trial
                was interrupted.
            hear: called with (member name, event) for every new event, after it was stored.
        """
        super().__init__()
        self._inner: Any = inner  # Any: its controller is Tune's, or a `_Replay`
        self._members = {member.name: member for member in members}
        self._by_key = {member.key: member for member in members}
        self._ledger = ledger
        self._concurrent = rules.concurrent
        self._seed = rules.seed
        self.is_stopping = is_stopping
        self._outcome_of = outcome_of
        self._hear = hear
        self._controller: Any = None
        self._trials: dict[str, Trial] = {}
        self._gone: set[str] = set()
        """Names of the members that have left the inner scheduler."""
        self._ended: set[str] = set()
        """Names of the members that ended in this launch."""
        self._waiting: list[Trial] = []
        self._started: list[Trial] = []

    # Called by the list of trials that Tune reads.

    def adopt(self, trials: Sequence[Trial]) -> None:
        """Take the whole list once, before anything runs, and replay the stored events."""
        self._trials = {trial.config[MEMBER]: trial for trial in trials}
        replay = _Replay(self)
        for trial in trials:
            with _seeded(self._seed, trial.config[MEMBER]):
                self._inner.on_trial_add(replay, trial)
        for event in self._ledger.events():
            if event.key in self._by_key:
                replay.play(self._by_key[event.key], event)
        for name, reason in replay.stopped.items():
            self._store_end(name, Outcome("stopped", reason))
        for name, trial in self._trials.items():
            if not self._members[name].is_pending or name in replay.stopped:
                self.leave(replay, trial)
            elif trial.status != Trial.PAUSED:
                trial.set_status(Trial.PENDING)
        self._waiting = [trial for name, trial in self._trials.items() if self._is_open(name)]
        # A paused trial does not count as running, and the scheduler may resume it at any time.
        self._waiting.sort(key=lambda trial: trial.status != Trial.PAUSED)

    def next_waiting(self) -> Trial | None:
        """The next trial for Tune; None if there is none, or if no more may run at a time."""
        if self.is_stopping():
            self._waiting.clear()
        if not self._waiting or (self._waiting[0].status != Trial.PAUSED and self._is_full()):
            return None
        self._started.append(self._waiting.pop(0))
        return self._started[-1]

    def drop_waiting(self) -> None:
        """Drop the trials that Tune has not been given."""
        self._waiting.clear()

    @property
    def has_waiting(self) -> bool:
        """Whether there are trials that Tune has not been given."""
        return bool(self._waiting)

    @property
    def is_idle(self) -> bool:
        """Whether no trial runs."""
        return all(trial.status != Trial.RUNNING for trial in self._started)

    def is_running(self, name: str) -> bool:
        """Whether the trial of a member runs now; may be called by another thread."""
        trial = self._trials.get(name)
        return trial is not None and trial.status == Trial.RUNNING

    # The interface of a scheduler.

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Do nothing: the inner scheduler has its metric already."""
        return True

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Do nothing: `adopt` has added all trials; this is also called when a trial gets a new
        worker."""

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Store the controller only: a lost worker is replaced; if it cannot be, `lost` is
        called."""
        self._controller = tune_controller

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: Mapping[str, Any]) -> str:
        """Store a report with the decision on it; the report of the last epoch always ends the
        trial."""
        member = self._members[trial.config[MEMBER]]
        epoch, value = int(result[TIME]), float(result[METRIC])
        if epoch in dict(self._ledger.reports(member.key)):
            return TrialScheduler.CONTINUE
        decision = TrialScheduler.CONTINUE
        if member.name not in self._gone:
            decision = self._inner.on_trial_result(tune_controller, trial, _result(epoch, value))
        is_last = epoch >= member.epochs
        if is_last:
            decision = TrialScheduler.STOP
        self._store(member.name, Report(member.key, epoch, value, decision))
        if is_last:
            self._store_end(member.name, Outcome("trained"))
        elif decision == TrialScheduler.STOP:
            self._store_end(member.name, Outcome("stopped", _reason(self._inner, epoch, value)))
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: Mapping[str, Any]) -> None:
        """Handle a trial that ended by itself, or was stopped while its pause was being
        prepared."""
        name = trial.config[MEMBER]
        if self._is_open(name):
            outcome = self._outcome_of(name)
            if outcome is None and self.is_stopping():
                return  # interrupted: the next launch continues it
            self._store_end(name, outcome if outcome is not None else self._stopped(name))
        self.leave(tune_controller, trial)

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """Handle a paused trial that the scheduler stopped."""
        name = trial.config[MEMBER]
        if self._is_open(name):
            self._store_end(name, self._stopped(name))
        self.leave(tune_controller, trial)

    def lost(self, trial: Trial, reason: str) -> None:
        """Record a trial whose workers failed for good."""
        name = trial.config[MEMBER]
        self._store_end(name, Outcome("failed", reason, is_lasting=False))
        self._gone.add(name)
        self._inner.on_trial_error(self._controller, trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """The inner scheduler's choice, if there is room for it."""
        if self.is_stopping():
            return None
        trial = self._inner.choose_trial_to_run(tune_controller)
        if trial is None or trial not in self._started or (trial.status == Trial.PAUSED and self._is_full()):
            return None
        return trial

    def debug_string(self) -> str:
        """The inner scheduler's text."""
        return str(self._inner.debug_string())

    # Also used by the replay.

    @property
    def inner(self) -> Any:
        """The scheduler that decides."""
        return self._inner

    def trials(self) -> list[Trial]:
        """All trials of the list."""
        return list(self._trials.values())

    def trial(self, name: str) -> Trial:
        """The trial of a member."""
        return self._trials[name]

    def is_gone(self, name: str) -> bool:
        """Whether a member has left the inner scheduler."""
        return name in self._gone

    def stop_reason(self, name: str) -> str | None:
        """The reason to record for a member that the scheduler stops now."""
        return self._stopped(name).reason

    def leave(self, controller: Any, trial: Trial) -> None:
        """Tell the inner scheduler, once, that a trial has ended."""
        name = trial.config[MEMBER]
        if name in self._gone:
            return
        self._gone.add(name)
        reports = self._ledger.reports(self._members[name].key)
        if reports and trial.status != Trial.PAUSED:
            self._inner.on_trial_complete(controller, trial, _result(*reports[-1]))
        else:
            self._inner.on_trial_remove(controller, trial)

    def _is_open(self, name: str) -> bool:
        """Whether a member has something to train and has not ended in this launch."""
        return self._members[name].is_pending and name not in self._ended

    def _is_full(self) -> bool:
        active = [trial for trial in self._started if trial.status in (Trial.PENDING, Trial.RUNNING)]
        return len(active) >= self._concurrent

    def _stopped(self, name: str) -> Outcome:
        reports = self._ledger.reports(self._members[name].key)
        return Outcome("stopped", _reason(self._inner, *reports[-1]) if reports else None)

    def _store_end(self, name: str, outcome: Outcome) -> None:
        self._ended.add(name)
        self._store(name, End(self._members[name].key, outcome.state, outcome.reason, outcome.is_lasting))

    def _store(self, name: str, event: Report | End) -> None:
        self._ledger.append(event)
        self._hear(name, event)


class _Replay:
    """Stands in for Tune's controller while stored events are replayed to the scheduler."""

    def __init__(self, scheduler: ReplayingScheduler) -> None:
        self._scheduler = scheduler
        self.stopped: dict[str, str | None] = {}
        """Members that the scheduler stopped without a later event, with the reason: the launch was
        killed between the decision and its record."""

    def play(self, member: Member, event: Report | End) -> None:
        """Replay one event; its stored decision is used, whatever the scheduler decides now."""
        trial = self._scheduler.trial(member.name)
        self.stopped.pop(member.name, None)
        if self._scheduler.is_gone(member.name):
            return
        if isinstance(event, End):
            if event.is_lasting:
                self._end(trial)
            return
        trial.set_status(Trial.RUNNING)
        self._scheduler.inner.on_trial_result(self, trial, _result(event.epoch, event.value))
        if event.decision == TrialScheduler.STOP:
            self._end(trial)
        elif event.decision == TrialScheduler.PAUSE:
            trial.set_status(Trial.PAUSED)

    def _end(self, trial: Trial) -> None:
        self._scheduler.leave(self, trial)
        trial.set_status(Trial.TERMINATED)

    # The part of a controller that schedulers use.

    def get_trials(self) -> list[Trial]:
        """All trials."""
        return self._scheduler.trials()

    def get_live_trials(self) -> set[Trial]:
        """The trials that have not ended."""
        return {trial for trial in self.get_trials() if not trial.is_finished()}

    def stop_trial(self, trial: Trial) -> None:
        """End a paused trial for the scheduler."""
        name = trial.config[MEMBER]
        if not self._scheduler.is_gone(name):
            self.stopped[name] = self._scheduler.stop_reason(name)
            self._end(trial)


class FixedList(BasicVariantGenerator):
    """Gives Tune the trials one by one, when the scheduler allows."""

    def __init__(self, scheduler: ReplayingScheduler) -> None:
        super().__init__()
        self._scheduler = scheduler
        self._has_all = False

    def next_trial(self) -> Trial | None:
        """See `ReplayingScheduler.next_waiting`; the first call builds the whole list and replays
        it."""
        if not self._has_all:
            self._scheduler.adopt(list(iter(super().next_trial, None)))
            self._has_all = True
        return self._scheduler.next_waiting()

    def is_finished(self) -> bool:
        """Whether Tune has been given all trials."""
        return self._has_all and not self._scheduler.has_waiting

    def set_finished(self) -> None:
        """Give out no further trials."""
        if self._has_all:
            self._scheduler.drop_waiting()

    def save_to_dir(self, dirpath: str, *names: Any, **more: Any) -> None:
        """Do nothing: a launch continues from the ledger."""


class WhenIdle(Stopper):
    """Ends the experiment when a stop was requested and no started trial runs any more."""

    def __init__(self, scheduler: ReplayingScheduler) -> None:
        self._scheduler = scheduler

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """False: a single trial is never stopped here."""
        return False

    def stop_all(self) -> bool:
        """Whether the whole experiment ends now."""
        return self._scheduler.is_stopping() and self._scheduler.is_idle

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles it with its own state, which is never restored."""
        return {}


class LossWatch(tune.Callback):
    """Tells the scheduler of trials whose workers failed more often than they are replaced."""

    def __init__(self, scheduler: ReplayingScheduler, describe: Callable[[Trial], str]) -> None:
        self._scheduler = scheduler
        self._describe = describe

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Called when no attempts are left."""
        self._scheduler.lost(trial, self._describe(trial))


def _result(epoch: int, value: float) -> dict[str, Any]:
    """A report in the form that schedulers read, live and in a replay; it does not depend on the
    clock."""
    return {TIME: epoch, "training_iteration": epoch, METRIC: value}


def _reason(scheduler: TrialScheduler, epoch: int, value: float) -> str:
    return f"{type(scheduler).__name__} stopped it after epoch {epoch}, at a static hypervolume of {value:.4f}"


@contextmanager
def _seeded(seed: int, name: str) -> Iterator[None]:
    """Make a scheduler's draws from numpy's global generator depend on seed and name alone; the
    generator is restored after the block."""
    state = np.random.get_state()
    np.random.seed(derive_seed(seed, "scheduler", name) % 2**32)
    try:
        yield
    finally:
        np.random.set_state(state)
