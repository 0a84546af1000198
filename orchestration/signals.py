"""Waiting for the signal that ends a server in the foreground."""

from __future__ import annotations

import time

from dsnet.stop_signals import StopRequest, stop_on_signals

__all__ = ["StopRequest", "stop_on_signals", "wait_for_stop"]


def wait_for_stop() -> None:
    """Sleep until SIGINT or SIGTERM."""
    with stop_on_signals(lambda: False, lambda name: None) as request:
        while not request():
            time.sleep(0.2)
