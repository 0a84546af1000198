"""Ctrl-C and SIGTERM as a request that long work hears at its next boundary. Needs no torch."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether, and by which signal, the process was asked to stop."""

    def __init__(self, also: Callable[[], bool] = lambda: False) -> None:
        self.signal: signal.Signals | None = None
        self._also = also

    def __call__(self) -> bool:
        """True once a signal came, or the other source (a stop file, a deadline) says so."""
        return self.signal is not None or self._also()

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, else 6."""
        return 130 if self.signal is signal.SIGINT else 6


@contextmanager
def stop_on_signals(also: Callable[[], bool], on_first: Callable[[str], None]) -> Iterator[StopRequest]:
    """Handle SIGINT and SIGTERM while the block runs; a second one interrupts at once, as Python does by default.

    Args:
        also: another source of the request.
        on_first: hears the signal's name, once.
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
