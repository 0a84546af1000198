"""Signs of life of workers, through the key-value store of Ray's GCS: a thread in the worker writes
one every few seconds, however long the work takes, and a thread of the driver reads them.

A worker that is stopped (SIGSTOP), or whose machine hangs, gives none. They need no file that
workers and driver share, and none is written for work that is shorter than their interval.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

from orchestration.runs.processes import process_start_time

logger = logging.getLogger(__name__)

NAMESPACE = "dsnet"
BEAT_S = 5.0
"""Seconds between two signs of life."""
KILL_S = 20.0
"""Seconds that a node may take to kill one of its workers."""


@dataclass(frozen=True)
class Sign:
    """A sign of life of a worker."""

    node: str
    """Ray's id of its node, hexadecimal."""
    pid: int
    start_time: int | None
    """Clock ticks between the boot of its machine and its start; None where there is no /proc."""
    number: int
    """Counts the signs of this worker, from 1."""
    is_last: bool = False
    """Whether the work has ended."""

    def encoded(self) -> bytes:
        """As it is stored."""
        return json.dumps(asdict(self)).encode()


@dataclass(frozen=True)
class Pulse:
    """The signs of life of one piece of work; can be pickled."""

    key: str
    """Its key in the store."""
    every_s: float = BEAT_S

    @classmethod
    def new(cls, every_s: float = BEAT_S) -> Pulse:
        """A pulse with a key of its own."""
        return cls(uuid.uuid4().hex, every_s)

    def of_rank(self, rank: int) -> Pulse:
        """The pulse of one of several workers that do the work together."""
        return Pulse(f"{self.key}/{rank}", self.every_s)

    @contextmanager
    def beating(self, *, at_once: bool = False) -> Iterator[None]:
        """Give signs of life for the length of the block; called in a worker.

        Args:
            at_once: give the first sign at the beginning, for work that surely takes longer than
                their interval.
        """
        is_over = threading.Event()
        beat = threading.Thread(target=self._beat, args=(is_over, at_once), name="signs-of-life", daemon=True)
        beat.start()
        try:
            yield
        finally:
            is_over.set()
            beat.join(self.every_s)  # it writes that the work has ended

    def _beat(self, is_over: threading.Event, at_once: bool) -> None:
        import ray

        if not ray.is_initialized():  # the work was called directly: nobody listens
            return
        number, pid = 0, os.getpid()
        while (at_once and number == 0) or not is_over.wait(self.every_s):
            number += 1
            node = ray.get_runtime_context().get_node_id()
            self._put(Sign(node, pid, process_start_time(pid), number))
        if number:
            self._put(Sign(node, pid, process_start_time(pid), number + 1, is_last=True))

    def _put(self, sign: Sign) -> None:
        from ray.experimental.internal_kv import _internal_kv_put

        try:
            _internal_kv_put(self.key, sign.encoded(), namespace=NAMESPACE)
        except Exception:  # whatever Ray raises while its GCS is away: the next sign may arrive
            logger.warning("no sign of life could be given", exc_info=True)


class Listener:
    """Reads signs of life in a thread of its own, because a read waits while the GCS hangs."""

    def __init__(self, every_s: float = BEAT_S, read: Callable[[str], bytes | None] | None = None) -> None:
        """Start the thread.

        Args:
            every_s: seconds between two looks at each pulse, > 0.
            read: returns the newest sign of a key; None = from the GCS of the connected cluster.
        """
        self._read = read if read is not None else _read
        self._every_s = every_s / 2
        self._lock = threading.Lock()
        self._heard: dict[str, tuple[bytes, float]] = {}
        self._old: dict[str, bytes] = {}
        self._pulses: dict[str, float] = {}
        """Times from which keys are read: work that has just begun has given no sign."""
        self._is_over = threading.Event()
        threading.Thread(target=self._listen, name="listener", daemon=True).start()

    def add(self, pulse: Pulse, unlike: Sign | None = None) -> None:
        """Listen to a pulse from now on; `unlike` is the last sign of an earlier worker, which is
        not heard again."""
        with self._lock:
            self._pulses[pulse.key] = time.monotonic() + pulse.every_s
            self._old[pulse.key] = b"" if unlike is None else unlike.encoded()

    def remove(self, pulse: Pulse) -> None:
        """Listen to a pulse no longer."""
        with self._lock:
            self._pulses.pop(pulse.key, None)
            self._heard.pop(pulse.key, None)
            self._old.pop(pulse.key, None)

    def silent_s(self, pulse: Pulse) -> float | None:
        """Seconds since the newest sign was read; None if there was none."""
        with self._lock:
            heard = self._heard.get(pulse.key)
        return None if heard is None else time.monotonic() - heard[1]

    def newest(self, pulse: Pulse) -> Sign | None:
        """The newest sign; None if there was none."""
        with self._lock:
            heard = self._heard.get(pulse.key)
        return None if heard is None else Sign(**json.loads(heard[0]))

    def close(self) -> None:
        """End the thread."""
        self._is_over.set()

    def _listen(self) -> None:
        while not self._is_over.wait(self._every_s):
            now_s = time.monotonic()
            with self._lock:
                due = [key for key, from_s in self._pulses.items() if from_s <= now_s]
            for key in due:
                try:
                    sign = self._read(key)
                except Exception:  # whatever Ray raises while its GCS is away: it is asked again
                    logger.debug("no sign of life could be read", exc_info=True)
                    continue
                with self._lock:
                    if sign is not None and key in self._pulses and sign != self._old[key]:
                        self._heard[key], self._old[key] = (sign, time.monotonic()), sign


def _read(key: str) -> bytes | None:
    from ray.experimental.internal_kv import _internal_kv_get

    found: bytes | None = _internal_kv_get(key, namespace=NAMESPACE)
    return found


def kill_worker(sign: Sign) -> None:
    """Kill the process of a worker, stopped or not, on whichever node it is; Ray then takes it for
    lost. Does nothing if it has ended."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if sign.node == ray.get_runtime_context().get_node_id():
        _kill(sign.pid, sign.start_time)
        return
    there = NodeAffinitySchedulingStrategy(node_id=sign.node, soft=False)
    kill = ray.remote(_kill).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
    ray.wait([kill.remote(sign.pid, sign.start_time)], timeout=KILL_S)


def _kill(pid: int, start_time: int | None) -> None:
    if process_start_time(pid) == start_time:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
