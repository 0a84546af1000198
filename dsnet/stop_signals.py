"""Ctrl-C, SIGTERM and SIGHUP as a stop request that long work checks regularly. Needs no torch."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """A request to stop, by a signal or by another source.

    Any thread may ask for it. A signal is heard even while the main thread is inside a library's C
    code, where Python runs no handler: the interpreter writes the signal's number into a pipe.
    """

    def __init__(self, also: Callable[[], bool] = lambda: False) -> None:
        self.handled: signal.Signals | None = None
        """The first signal whose handler has run."""
        self._arrived: signal.Signals | None = None
        self._sources = [also]
        self._pipe: int | None = None
        self._lock = threading.Lock()

    def add(self, source: Callable[[], bool]) -> None:
        """Ask another source too, from now on."""
        self._sources.append(source)

    def __call__(self) -> bool:
        """Whether a signal has arrived or the other source (a stop file, a deadline) requests a
        stop."""
        return self.signal is not None or any(source() for source in self._sources)

    @property
    def signal(self) -> signal.Signals | None:
        """The first signal that has arrived; None if there is none."""
        if self.handled is None and self._arrived is None:
            with self._lock:
                self._read()
        return self.handled or self._arrived

    @property
    def exit_code(self) -> int:
        """Exit code of a stopped process: 130 after Ctrl-C, else 6."""
        return 130 if self.signal is signal.SIGINT else 6

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear signals through the interpreter's pipe inside the block, in the main thread."""
        self._pipe, writing = os.pipe()
        for end in (self._pipe, writing):
            os.set_blocking(end, False)
        before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            with self._lock:
                self._read()
                os.close(self._pipe)
                self._pipe = None
            os.close(writing)

    def _read(self) -> None:
        if self._pipe is None:
            return
        try:
            numbers = os.read(self._pipe, 64)
        except BlockingIOError:
            return
        ours = [number for number in numbers if number in STOPPING]
        if ours and self._arrived is None:
            self._arrived = signal.Signals(ours[0])


STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that ask for a stop. SIGHUP comes when the terminal closes; under nohup it is ignored."""


TWICE_S = 0.5
"""Seconds within which the same signal counts once: one that was sent to a group of processes may
also be passed on by the parent."""


@contextmanager
def stop_on_signals(also: Callable[[], bool], on_first: Callable[[str], None]) -> Iterator[StopRequest]:
    """Context manager that turns SIGINT, SIGTERM and SIGHUP into a stop request; a second signal
    raises KeyboardInterrupt, unless it is the first one that arrives twice. SIGHUP stays ignored if
    it is, as under nohup.

    Args:
        also: another source of the request.
        on_first: called with the first signal's name.
    """
    request, first_s = StopRequest(also), 0.0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first_s
        if request.handled is not None:
            is_same = number == request.handled and time.monotonic() - first_s < TWICE_S
            if is_same or number == signal.SIGHUP:  # a closing terminal sends it several times
                return
            raise KeyboardInterrupt
        request.handled, first_s = signal.Signals(number), time.monotonic()
        on_first(request.handled.name)

    heard = [number for number in STOPPING if not _stays_ignored(number)]
    with request.listening():
        previous = {number: signal.signal(number, handle) for number in heard}
        try:
            yield request
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _stays_ignored(number: signal.Signals) -> bool:
    return number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN
