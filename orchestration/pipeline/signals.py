"""Waiting for a signal that ends a server in the foreground."""

from __future__ import annotations

import time
from collections.abc import Callable

from dsnet.stop_signals import stop_on_signals


def _nothing() -> None:
    """Check nothing."""


def wait_for_stop(check: Callable[[], None] = _nothing) -> None:
    """Sleep until SIGINT, SIGTERM, or SIGHUP (the terminal closes); SIGHUP stays ignored if it is,
    as under nohup.

    Args:
        check: called a few times a second; it may raise to end the wait.
    """
    with stop_on_signals(lambda: False, lambda name: None) as request:
        while not request():
            time.sleep(0.2)
            if not request():  # a signal to all processes ends what is checked too
                check()
