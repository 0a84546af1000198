"""Signals as a stop request."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from dsnet.stop_signals import stop_on_signals


@pytest.fixture(autouse=True)
def terminal_can_close() -> Iterator[None]:
    """The tests themselves may run under nohup, which ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 6), (signal.SIGHUP, 6)])
def test_each_signal_is_a_request_and_is_told_once(number: signal.Signals, code: int) -> None:
    told: list[str] = []
    before = signal.getsignal(number)
    with stop_on_signals(lambda: False, told.append) as request:
        assert not request()
        os.kill(os.getpid(), number)
        assert request()
        assert request.signal is number
        assert request.exit_code == code
    assert told == [number.name]
    assert request(), "it is remembered after the block"
    assert signal.getsignal(number) is before
    assert signal.set_wakeup_fd(-1) == -1


def test_the_same_signal_counts_once_within_half_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [10.0]
    monkeypatch.setattr("dsnet.stop_signals.time.monotonic", lambda: now_s[0])
    told: list[str] = []
    with stop_on_signals(lambda: False, told.append):
        for now_s[0] in (10.0, 10.01, 10.4):
            os.kill(os.getpid(), signal.SIGINT)
        assert told == ["SIGINT"]
        now_s[0] = 10.6
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_second_signal_interrupts_but_a_terminal_may_close_twice() -> None:
    with stop_on_signals(lambda: False, lambda name: None) as request:
        os.kill(os.getpid(), signal.SIGTERM)
        assert request()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with stop_on_signals(lambda: False, lambda name: None) as request:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGHUP)
        assert request.signal is signal.SIGHUP


def test_a_request_that_another_thread_has_heard_is_still_the_first_for_the_handler() -> None:
    """The pipe is read before the handler runs."""
    told: list[str] = []
    with stop_on_signals(lambda: False, told.append) as request:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        request._arrived = signal.SIGINT
        assert request()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        os.kill(os.getpid(), signal.SIGINT)
    assert told == ["SIGINT"]


def test_an_ignored_sighup_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop_on_signals(lambda: False, lambda name: None) as request:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not request()


def test_another_source_is_asked_too() -> None:
    asked = []
    with stop_on_signals(lambda: bool(asked), lambda name: None) as request:
        assert not request()
        asked.append(True)
        assert request()
        assert request.exit_code == 6
