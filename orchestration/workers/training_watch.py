"""Signs of life of training workers: a silent one is told, and killed after a while, so that Ray
replaces it; training then continues from its newest checkpoint, to the same bits."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from orchestration.workers.life import BEAT_S, Listener, Pulse, kill_worker
from orchestration.workers.stalls import StallLimits, Stalls

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StallRules:
    """How stalls of training workers are noticed."""

    limits: StallLimits = field(default_factory=StallLimits)
    tell: Callable[[str], None] = logger.warning
    """Called with a sentence about each stall."""
    beat_s: float = BEAT_S
    """Seconds between two signs of life, > 0, a few of them within `limits.tell_s`."""


class TrainingWatch:
    """The workers of one or several trainings."""

    def __init__(self, pulses: Mapping[str, Pulse], rules: StallRules) -> None:
        """Listen to pulses.

        Args:
            pulses: the pulse of each worker, by its name in messages.
            rules: how stalls are noticed.
        """
        self._pulses = dict(pulses)
        self._stalls = Stalls(rules.limits, rules.tell)
        self._listener = Listener(rules.beat_s)
        self._num_stalls = dict.fromkeys(pulses.values(), 0)
        for pulse in pulses.values():
            self._listener.add(pulse)

    def took(self, seconds: float) -> None:
        """Note what a piece of the work took: the limit for silence is never far below it."""
        self._stalls.took(seconds)

    def look(self, is_running: Callable[[str], bool] = lambda name: True) -> None:
        """Tell of new stalls, and kill the workers that have been silent for too long.

        A worker that has not given a first sign is not judged: it waits for room in the cluster, or
        starts.

        Args:
            is_running: whether the worker of this name should be at work now.
        """
        for name, pulse in self._pulses.items():
            silent_s, sign = self._listener.silent_s(pulse), self._listener.newest(pulse)
            if silent_s is None or sign is None or sign.is_last or not is_running(name):
                self._stalls.drop(pulse)
                continue
            if not self._stalls.knows(pulse):
                self._stalls.begin(pulse, name, num_stalls=self._num_stalls[pulse])
            self._stalls.hear(pulse, silent_s)
        for key in self._stalls.overdue():
            assert isinstance(key, Pulse)
            self._replace(key)

    def _replace(self, pulse: Pulse) -> None:
        """Kill a worker, and wait for the first sign of the next one."""
        sign = self._listener.newest(pulse)
        self._stalls.drop(pulse)
        self._num_stalls[pulse] += 1
        self._listener.remove(pulse)
        self._listener.add(pulse, unlike=sign)
        if sign is not None:  # in a thread: a worker elsewhere is killed by a task, which may take a while
            threading.Thread(target=kill_worker, args=(sign,), name="kill-worker", daemon=True).start()

    def close(self) -> None:
        """Listen no longer."""
        self._listener.close()
