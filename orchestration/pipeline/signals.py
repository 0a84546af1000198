"""Waiting for a signal that ends a server in the foreground."""

from __future__ import annotations

import signal
import time

from dsnet.stop_signals import stop_on_signals


def wait_for_stop() -> None:
    """Sleep until SIGINT, SIGTERM, or SIGHUP (the terminal closes); SIGHUP stays ignored if it is,
    as under nohup."""
    closed: list[int] = []
    before = signal.getsignal(signal.SIGHUP)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda number, frame: closed.append(number))
    try:
        with stop_on_signals(lambda: bool(closed), lambda name: None) as request:
            while not request():
                time.sleep(0.2)
    finally:
        signal.signal(signal.SIGHUP, before)
