"""The end of this process where an orderly end takes too long: every call of Ray may hang if one of
its processes does, and a step of other libraries may take minutes.

All files are written so that a kill at any moment loses no finished work.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from dsnet.stop_signals import StopRequest
from orchestration.runs.supervisor import tell_exit
from orchestration.workers.cluster_watch import ClusterWatch, current_watch
from orchestration.workers.runtime import is_left_open

STOP_S = 6.0
"""Seconds between a stop request and the end of the process."""
LOST_S = 20.0
"""Seconds between the loss of the cluster and the end of the process; Ray would end it, without a
message, after 60 s."""
LOOK_EVERY_S = 0.25
TELL_S = 1.0
"""Seconds that the last message may take."""
EXIT_UNTOLD = 6
"""Exit code where even the message could not be printed: stopped, and to be continued."""


class Deadline:
    """Decides when the process must end."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._stop_s: float | None = None
        self._lost_s: float | None = None

    def is_over(self, *, is_stopping: bool, is_lost: bool) -> bool:
        """Whether an orderly end has had its time, given what is known now."""
        now_s = self._clock()
        if is_stopping and self._stop_s is None:
            self._stop_s = now_s
        if not is_lost:
            self._lost_s = None
        elif self._lost_s is None:
            self._lost_s = now_s
        return any(
            since_s is not None and now_s - since_s >= most_s
            for since_s, most_s in ((self._stop_s, STOP_S), (self._lost_s, LOST_S))
        )


@contextmanager
def ended_in_time(request: Callable[[], StopRequest | None], tell: Callable[[str | None], int]) -> Iterator[None]:
    """End this process if the block goes on for too long after a stop request or the loss of the
    cluster.

    Args:
        request: the stop request of the launch; None before there is one.
        tell: called with what was lost of the cluster, or None, right before the end; returns the
            exit code. It prints its message at most once.
    """
    is_over = threading.Event()

    def watch() -> None:
        deadline, cluster = Deadline(), None
        while not is_over.wait(LOOK_EVERY_S):
            asked, now = request(), current_watch()
            cluster = cluster if now is None else now
            # Later stages need no cluster, and may go on where it was lost at the very end.
            lost = cluster.lost if cluster is not None and (now is not None or is_left_open()) else None
            leaves_no_time = lost is not None and cluster is not None and cluster.leaves_no_time
            is_late = deadline.is_over(is_stopping=asked is not None and asked(), is_lost=lost is not None)
            if is_late or leaves_no_time:
                _end(cluster, lambda lost=lost: tell(lost))  # type: ignore[misc]

    threading.Thread(target=watch, name="last-resort", daemon=True).start()
    try:
        yield
    finally:
        if not is_left_open():  # else the interpreter's own end may hang
            is_over.set()


def end_if_left_open(code: int) -> int:
    """End this process at once if Ray could not be shut down; else return the exit code."""
    if is_left_open():
        _end(None, lambda: code)
    return code


def _end(cluster: ClusterWatch | None, tell: Callable[[], int]) -> None:
    codes = [EXIT_UNTOLD]

    def work() -> None:
        codes.append(tell())
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # the terminal is closed
                stream.flush()

    # In a thread of its own: the thread that hangs may hold the lock of a stream.
    telling = threading.Thread(target=work, daemon=True)
    telling.start()
    if cluster is not None:
        cluster.kill_cluster()
    telling.join(TELL_S)
    tell_exit(codes[-1])
    os._exit(codes[-1])
