"""Waiting for the end of a server in the foreground."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from orchestration.pipeline.signals import wait_for_stop


@pytest.fixture
def terminal_can_close() -> Iterator[None]:
    """The tests themselves may run under nohup, which ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("terminal_can_close")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_server_ends_with_ctrl_c_a_kill_and_its_terminal(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    timer = threading.Timer(0.1, os.kill, (os.getpid(), number))
    timer.start()
    wait_for_stop()
    timer.join()
    assert signal.getsignal(number) is before


def test_under_nohup_a_closed_terminal_ends_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        hung_up = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGHUP))
        killed = threading.Timer(0.6, os.kill, (os.getpid(), signal.SIGTERM))
        start = time.monotonic()
        hung_up.start()
        killed.start()
        wait_for_stop()
        assert time.monotonic() - start >= 0.6
        killed.join()
    finally:
        signal.signal(signal.SIGHUP, before)
