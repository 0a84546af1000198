"""Stalls: when the silence of a worker is told, and when its work is given to another one.

Needs no Ray. A worker that works gives a sign of life every few seconds, however long its work
takes; one that is stopped (SIGSTOP), or whose machine hangs, does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from dsnet.wording import duration


@dataclass(frozen=True, kw_only=True)
class StallLimits:
    """Seconds of silence after which something happens."""

    tell_s: float = 30.0
    """Seconds after which the silence is told, > 0."""
    least_s: float = 60.0
    """Seconds after which the work is given to another worker, at least, >= `tell_s`."""
    factor: float = 5.0
    """They are this many times what the longest such work has taken, > 0, if that is more."""
    most_s: float = 600.0
    """They are never more than this for the first worker, >= `least_s`."""

    def limit_s(self, longest_s: float, num_stalls: int) -> float:
        """Seconds of silence after which work is given to another worker.

        Args:
            longest_s: seconds that the longest finished work of this kind took; 0 if none has.
            num_stalls: stalls of this work before; each doubles the limit, so that work which
                keeps a worker silent by its nature ends too.
        """
        return min(max(self.least_s, self.factor * longest_s), self.most_s) * 2.0**num_stalls


@dataclass
class _Work:
    what: str
    begun_s: float
    heard_s: float
    num_stalls: int
    size: int
    is_told: bool = False


class Stalls:
    """The silence of all workers of one kind. Not for several threads."""

    def __init__(
        self, limits: StallLimits, tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Keep the limits, and the function that is told of each stall once."""
        self._limits = limits
        self._tell = tell
        self._clock = clock
        self._longest_s = 0.0
        self._works: dict[Hashable, _Work] = {}

    def begin(self, key: Hashable, what: str, *, num_stalls: int = 0, size: int = 1) -> None:
        """Note that a worker has begun.

        Args:
            key: names the work in the other calls.
            what: its name in a message, such as "the worker of trial-0007".
            num_stalls: number of workers that stalled at this work before.
            size: amount of the work, >= 1; what work has taken is counted for each unit.
        """
        now_s = self._clock()
        self._works[key] = _Work(what, now_s, now_s, num_stalls, size)

    def knows(self, key: Hashable) -> bool:
        """Whether this work has begun and not ended."""
        return key in self._works

    def hear(self, key: Hashable, silent_s: float) -> None:
        """Note how long ago a worker gave its last sign of life."""
        work = self._works[key]
        work.heard_s = max(work.heard_s, self._clock() - silent_s)

    def end(self, key: Hashable) -> None:
        """Note that work has ended well; it counts for the limit of later work."""
        work = self._works.pop(key)
        self.took((self._clock() - work.begun_s) / work.size)

    def drop(self, key: Hashable) -> None:
        """Forget work that ended otherwise."""
        self._works.pop(key, None)

    def took(self, seconds: float) -> None:
        """Note what one unit of work took."""
        self._longest_s = max(self._longest_s, seconds)

    def limit_s(self, key: Hashable) -> float:
        """Seconds of silence after which this work is given to another worker."""
        work = self._works[key]
        return self._limits.limit_s(self._longest_s * work.size, work.num_stalls)

    def silence_s(self, key: Hashable) -> float:
        """Seconds since the last sign of life."""
        return self._clock() - self._works[key].heard_s

    def overdue(self) -> list[Hashable]:
        """The works that another worker must do now; tells of every new stall."""
        late = []
        for key, work in self._works.items():
            silence_s, limit_s = self.silence_s(key), self.limit_s(key)
            if silence_s < self._limits.tell_s:
                if work.is_told:
                    work.is_told = False
                    self._tell(f"{work.what} works again")
                continue
            if not work.is_told:
                work.is_told = True
                self._tell(
                    f"{work.what} has given no sign of life for {duration(silence_s)}; after {duration(limit_s)} of silence it is "
                    "ended, and another worker continues the work"
                )
            if silence_s >= limit_s:
                late.append(key)
        return late
