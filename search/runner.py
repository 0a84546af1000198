"""Where trials run: what the search asks of a runner, and the one that runs them here, one after the other."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

logger = logging.getLogger(__name__)

Scalar = float | int | str | bool
State = Literal["complete", "failed"]


@dataclass(frozen=True)
class TrialSpec:
    """One trial to run.

    Attributes:
        slot: the trial's place in the sweep, from 0; the same on every launch and with any number of workers.
        seed: of the trial's own randomness, 0 <= seed < 2**32; derived from the sweep's seed and the slot.
        params: suggested values by dotted name, e.g. {"gate.target": 0.4}.
    """

    slot: int
    seed: int
    params: Mapping[str, Scalar]


@dataclass(frozen=True)
class TrialOutcome:
    """What became of a trial.

    Attributes:
        slot: of the spec that it answers.
        state: "complete" has metrics and no reason; "failed" has a reason and no metrics.
        metrics: by name.
        reason: why it failed, in one line.
        arrays: small results worth keeping, e.g. the gate's weights.
        duration_s: seconds of work, without waiting for a worker.
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
"""Metrics and arrays of a trial. Raising is how a trial fails. It may be called twice for one spec (a worker can be
lost after the work is done): it must have no effect but its result, and the result must depend on the spec alone."""


class Runner(Protocol):
    """Runs trials; how many at a time, and where, is its own affair."""

    def run(self, specs: Sequence[TrialSpec]) -> Generator[TrialOutcome, None, None]:
        """Yield one outcome per spec, in any order, as they come. Closing the generator early abandons the rest."""
        ...

    def close(self) -> None:
        """Release the workers. The runner cannot be used afterwards."""
        ...


class SerialRunner:
    """Runs trials in this process, in the order in which they are given, each when the next outcome is asked for."""

    def __init__(self, function: TrialFunction) -> None:
        self._function = function

    def run(self, specs: Sequence[TrialSpec]) -> Generator[TrialOutcome, None, None]:
        for spec in specs:
            yield outcome_from(self._function, spec)

    def close(self) -> None:
        """Nothing is held."""


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
