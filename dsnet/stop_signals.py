"""Ctrl-C and SIGTERM as a stop request that long work checks regularly. Needs no torch."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """A request to stop, by a signal or by another source."""

    def __init__(self, also: Callable[[], bool] = lambda: False) -> None:
        self.signal: signal.Signals | None = None
        self._sources = [also]

    def add(self, source: Callable[[], bool]) -> None:
        """Ask another source too, from now on."""
        self._sources.append(source)

    def __call__(self) -> bool:
        """Whether a signal has arrived or the other source (a stop file, a deadline) requests a
        stop."""
        return self.signal is not None or any(source() for source in self._sources)

    @property
    def exit_code(self) -> int:
        """Exit code of a stopped process: 130 after Ctrl-C, else 6."""
        return 130 if self.signal is signal.SIGINT else 6


@contextmanager
def stop_on_signals(also: Callable[[], bool], on_first: Callable[[str], None]) -> Iterator[StopRequest]:
    """Context manager that turns SIGINT and SIGTERM into a stop request; a second signal raises
    KeyboardInterrupt.

    Args:
        also: another source of the request.
        on_first: called with the first signal's name.
    """
    request = StopRequest(also)

    def handle(number: int, frame: FrameType | None) -> None:
        if request.signal is not None:
            raise KeyboardInterrupt
        request.signal = signal.Signals(number)
        on_first(request.signal.name)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
