"""Runners of trials: the interface that the search uses, and a serial runner."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

from dsnet.storage_faults import disk_error
from search.suggest.space import Scalar

logger = logging.getLogger(__name__)


State = Literal["complete", "failed", "pruned"]
"""State of a finished trial. Runners return the first two; the search itself prunes."""


PROGRESS = "progress/"
"""Prefix of the names of the arrays from which a staged trial resumes."""


@dataclass(frozen=True)
class TrialSpec:
    """One trial to run.

    Attributes:
        slot: the trial's index in the sweep, from 0; the same on every launch and with any number
            of workers.
        seed: seed of the trial's own randomness, 0 <= seed < 2**32; derived from the sweep's seed
            and the slot.
        params: suggested values by dotted name, e.g. {"gate.target": 0.4}.
        until: for trials that run in stages, the end of this stage in epochs; None = the trial's
            end.
        progress: the arrays with the prefix `PROGRESS` that an earlier stage returned. Without them
            the trial runs from its start, with the same result.
    """

    slot: int
    seed: int
    params: Mapping[str, Scalar]
    until: int | None = None
    progress: Mapping[str, NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class TrialOutcome:
    """Result of running a trial.

    Attributes:
        slot: slot of the trial's spec.
        state: "complete" (with metrics, without a reason) or "failed" (with a reason, without
            metrics).
        metrics: metrics by name.
        reason: why it failed, in one line.
        arrays: small arrays to keep, e.g. the gate's weights.
        duration_s: seconds of work, without waiting for a worker; in a batch, an equal share of the
            batch's time.
    """

    slot: int
    state: State
    metrics: Mapping[str, float] = field(default_factory=dict)
    reason: str | None = None
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    duration_s: float = 0.0

    @classmethod
    def failed(cls, slot: int, reason: str, duration_s: float = 0.0) -> TrialOutcome:
        """The outcome of a trial that gave no result."""
        return cls(slot=slot, state="failed", reason=reason, duration_s=duration_s)


TrialFunction = Callable[[TrialSpec], tuple[Mapping[str, float], Mapping[str, NDArray[Any]]]]
"""Function that runs one trial and returns its metrics and arrays; the trial fails if it raises. It
may be called twice for a spec (a worker can be lost after the work is done): it must have no side
effects, and its result must depend on the spec alone."""


class CohortFunction(Protocol):
    """Function that runs several trials in one program; the result of a trial does not depend on
    the other trials.

    Like a `TrialFunction`, it has no side effects and may be called again for the same specs.
    """

    @property
    def lanes(self) -> int:
        """Maximum number of trials per call, >= 1."""
        ...

    def __call__(self, specs: Sequence[TrialSpec]) -> Sequence[TrialOutcome]:
        """Run the trials and return one outcome per spec, in any order.

        A trial that fails has an outcome that says so. After an exception the runner calls the
        function for each trial separately.
        """
        ...


@dataclass(frozen=True)
class OneByOne:
    """Adapter from a trial function to a cohort function with one trial per call."""

    function: TrialFunction

    @property
    def lanes(self) -> int:
        """Always 1."""
        return 1

    def __call__(self, specs: Sequence[TrialSpec]) -> Sequence[TrialOutcome]:
        """Run the trials one after the other; a trial that raises has a failed outcome."""
        return [outcome_from(self.function, spec) for spec in specs]


class Runner(Protocol):
    """Interface of runners, which decide where trials run and how many at a time."""

    def run(self, specs: Sequence[TrialSpec]) -> Generator[TrialOutcome, None, None]:
        """Run trials; yields one outcome per spec in order of completion. Closing the generator
        abandons the rest."""
        ...

    def stream(self, take: Callable[[], Sequence[TrialSpec]]) -> Generator[TrialOutcome, None, None]:
        """Run trials asynchronously: each free worker gets the trials that `take` returns.

        Outcomes are yielded in order of completion, and `take` is called only between them, so that
        it can use earlier outcomes. It ends when `take` returns nothing and no trial is running.
        Closing the generator abandons the running trials.

        Args:
            take: returns the next trials for one worker; empty if there is nothing to run (it is
                called again after the next outcome).
        """
        ...

    def close(self) -> None:
        """Release the workers; the runner cannot be used afterwards."""
        ...


class SerialRunner:
    """Runner in this process: batches run in the given order, each when its first outcome is
    requested."""

    def __init__(self, function: CohortFunction) -> None:
        self._function = function

    def run(self, specs: Sequence[TrialSpec]) -> Generator[TrialOutcome, None, None]:
        for batch in divide(specs, num_workers=1, lanes=self._function.lanes):
            outcomes = run_batch(self._function, batch)
            if outcomes is not None:
                yield from outcomes
                continue
            for spec in batch:
                yield from run_batch(self._function, [spec]) or ()

    def stream(self, take: Callable[[], Sequence[TrialSpec]]) -> Generator[TrialOutcome, None, None]:
        while specs := take():
            yield from self.run(specs)

    def close(self) -> None:
        """Do nothing: there are no workers to release."""


def divide(specs: Sequence[TrialSpec], num_workers: int, lanes: int) -> list[tuple[TrialSpec, ...]]:
    """Divide trials, in order, into batches of at most `lanes` whose sizes differ by at most one.

    The number of batches is a multiple of `num_workers`, except that there are no empty batches.
    """
    num_batches = num_workers * math.ceil(len(specs) / (num_workers * lanes))
    ends = [len(specs) * number // num_batches for number in range(num_batches + 1)] if specs else []
    return [tuple(specs[start:end]) for start, end in pairwise(ends) if start < end]


def run_batch(function: CohortFunction, specs: Sequence[TrialSpec]) -> list[TrialOutcome] | None:
    """Call a cohort function for a batch.

    Returns:
        One outcome per spec; None if a batch of several trials failed as a whole, so that its
        trials should be run one by one. A single trial gets a failed outcome instead.
        KeyboardInterrupt is not caught.

    Raises:
        StorageError: The disk is full, read-only or failing.
    """
    start = time.perf_counter()
    try:
        outcomes = list(function(specs))
        answered = sorted(outcome.slot for outcome in outcomes)
        if answered != sorted(spec.slot for spec in specs):
            raise RuntimeError(f"trials of slots {[spec.slot for spec in specs]} gave outcomes for slots {answered}")
    except Exception as error:  # an error in trials must not end the sweep
        _raise_disk_error(error)
        logger.debug("a batch of %d trials failed", len(specs), exc_info=True)
        if len(specs) > 1:
            return None
        return [TrialOutcome.failed(specs[0].slot, describe_error(error), time.perf_counter() - start)]
    return outcomes


def outcome_from(function: TrialFunction, spec: TrialSpec) -> TrialOutcome:
    """Call a trial function; an exception gives a failed outcome with its reason (KeyboardInterrupt
    is not caught)."""
    start = time.perf_counter()
    try:
        metrics, arrays = function(spec)
        metrics = {name: float(value) for name, value in metrics.items()}
    except Exception as error:  # an error in a trial must not end the sweep
        _raise_disk_error(error)
        logger.debug("trial of slot %d failed", spec.slot, exc_info=True)
        return TrialOutcome.failed(spec.slot, describe_error(error), time.perf_counter() - start)
    return TrialOutcome(spec.slot, "complete", metrics, None, arrays, time.perf_counter() - start)


def _raise_disk_error(error: Exception) -> None:
    """Raise a StorageError if a full, read-only or failing disk ended a trial: that is no result of
    the trial, and would be recorded for ever."""
    fault = disk_error(error)
    if fault is not None:
        raise fault from error


def describe_error(error: BaseException) -> str:
    """An exception as one line of at most 300 characters: 'ValueError: msg'."""
    message = " ".join(str(error).split())
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
