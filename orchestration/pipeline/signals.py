"""Waiting for a signal that ends a server in the foreground."""

from __future__ import annotations

import time

from dsnet.stop_signals import stop_on_signals


def wait_for_stop() -> None:
    """Sleep until SIGINT, SIGTERM, or SIGHUP (the terminal closes); SIGHUP stays ignored if it is,
    as under nohup."""
    with stop_on_signals(lambda: False, lambda name: None) as request:
        while not request():
            time.sleep(0.2)
