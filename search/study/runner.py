"""Where trials run: what the search asks of a runner, and the one that runs them here, one batch after the other."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

from search.suggest.space import Scalar

logger = logging.getLogger(__name__)


State = Literal["complete", "failed", "pruned"]
"""What became of a trial. Runners return the first two; the search prunes."""


PROGRESS = "progress/"
"""Names of arrays that begin so are what a staged trial needs to go on."""


@dataclass(frozen=True)
class TrialSpec:
    """One trial to run.

    Attributes:
        slot: the trial's place in the sweep, from 0; the same on every launch and with any number of workers.
        seed: of the trial's own randomness, 0 <= seed < 2**32; derived from the sweep's seed and the slot.
        params: suggested values by dotted name, e.g. {"gate.target": 0.4}.
        until: where this stage of the trial ends, in its own unit (epochs); None = at its end. For trials that run in stages.
        progress: the arrays named `PROGRESS...` that an earlier stage returned. Without any a trial runs from its start, to the same
            result.
    """

    slot: int
    seed: int
    params: Mapping[str, Scalar]
    until: int | None = None
    progress: Mapping[str, NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class TrialOutcome:
    """What became of a trial.

    Attributes:
        slot: of the spec that it answers.
        state: "complete" has metrics and no reason; "failed" has a reason and no metrics.
        metrics: by name.
        reason: why it failed, in one line.
        arrays: small results worth keeping, e.g. the gate's weights.
        duration_s: seconds of work, without waiting for a worker; in a batch, its equal share.
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
"""Metrics and arrays of one trial. Raising is how a trial fails. It may be called twice for one spec (a worker can be
lost after the work is done): it must have no effect but its result, and the result must depend on the spec alone."""


class CohortFunction(Protocol):
    """Runs several trials in one program; a trial's result is the same alone and beside any others.

    As a `TrialFunction`, it has no effect but its result and may be called again for the same specs.
    """

    @property
    def lanes(self) -> int:
        """The most trials that one call takes, >= 1."""
        ...

    def __call__(self, specs: Sequence[TrialSpec]) -> Sequence[TrialOutcome]:
        """One outcome per spec, in any order.

        A trial's failure is its own outcome. An exception fails nobody: it makes the runner call for each of the trials alone.
        """
        ...


@dataclass(frozen=True)
class OneByOne:
    """A trial function as a cohort function of one lane."""

    function: TrialFunction

    @property
    def lanes(self) -> int:
        """One."""
        return 1

    def __call__(self, specs: Sequence[TrialSpec]) -> Sequence[TrialOutcome]:
        """Each trial after the one before; an exception is that trial's failure."""
        return [outcome_from(self.function, spec) for spec in specs]


class Runner(Protocol):
    """Runs trials; how many at a time, and where, is its own affair."""

    def run(self, specs: Sequence[TrialSpec]) -> Generator[TrialOutcome, None, None]:
        """Yield one outcome per spec, in any order, as they come. Closing the generator early abandons the rest."""
        ...

    def stream(self, take: Callable[[], Sequence[TrialSpec]]) -> Generator[TrialOutcome, None, None]:
        """Run trials without waiting for their like: whenever a worker is free, it gets what `take` returns.

        Outcomes are yielded as they come, and `take` is asked only between them, so that it can learn from those before. It ends when
        `take` returns nothing and no trial runs any more. Closing the generator early abandons what runs.

        Args:
            take: the next trials for one worker; empty when there is nothing to run (it is asked again after the next outcome).
        """
        ...

    def close(self) -> None:
        """Release the workers. The runner cannot be used afterwards."""
        ...


class SerialRunner:
    """Runs trials in this process, in the order in which they are given, each batch when its first outcome is asked for."""

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
        """Nothing is held."""


def divide(specs: Sequence[TrialSpec], num_workers: int, lanes: int) -> list[tuple[TrialSpec, ...]]:
    """Batches of at most `lanes` trials in the given order, as many for each worker, of sizes that differ by at most one."""
    num_batches = num_workers * math.ceil(len(specs) / (num_workers * lanes))
    ends = [len(specs) * number // num_batches for number in range(num_batches + 1)] if specs else []
    return [tuple(specs[start:end]) for start, end in pairwise(ends) if start < end]


def run_batch(function: CohortFunction, specs: Sequence[TrialSpec]) -> list[TrialOutcome] | None:
    """Call a cohort function for a batch.

    Returns:
        one outcome per spec; or None where a batch of several gave none as a whole and its trials are to be called for one by one.
        A trial that is alone fails with the reason instead. KeyboardInterrupt passes.
    """
    start = time.perf_counter()
    try:
        outcomes = list(function(specs))
        answered = sorted(outcome.slot for outcome in outcomes)
        if answered != sorted(spec.slot for spec in specs):
            raise RuntimeError(f"asked for slots {[spec.slot for spec in specs]}, the trials answered for {answered}")
    except Exception as error:  # whatever trials raise is their failure, not the sweep's
        logger.debug("a batch of %d trials failed", len(specs), exc_info=True)
        if len(specs) > 1:
            return None
        return [TrialOutcome.failed(specs[0].slot, describe_error(error), time.perf_counter() - start)]
    return outcomes


def outcome_from(function: TrialFunction, spec: TrialSpec) -> TrialOutcome:
    """Call a trial function; an exception becomes a failed outcome with its reason (KeyboardInterrupt passes)."""
    start = time.perf_counter()
    try:
        metrics, arrays = function(spec)
        metrics = {name: float(value) for name, value in metrics.items()}
    except Exception as error:  # whatever a trial raises is that trial's failure, not the sweep's
        logger.debug("trial of slot %d failed", spec.slot, exc_info=True)
        return TrialOutcome.failed(spec.slot, describe_error(error), time.perf_counter() - start)
    return TrialOutcome(spec.slot, "complete", metrics, None, arrays, time.perf_counter() - start)


def describe_error(error: BaseException) -> str:
    """An exception as one line of at most 300 characters: 'ValueError: msg'."""
    message = " ".join(str(error).split())
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
