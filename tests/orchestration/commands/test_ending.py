"""What is said when a launch ends early, and its exit code."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import textwrap

import pytest

from dsnet.errors import ClusterLostError, StoppedError
from dsnet.stop_signals import StopRequest
from orchestration.commands.ending import Ending
from tests.hostile import REPOSITORY
from tests.orchestration.samples import SilentProgress

CONTINUE = "Continue with:\n  dsnet-orch launch tiny.yaml\n"


def ending(number: signal.Signals | None = None) -> Ending:
    made = Ending(SilentProgress(), "dsnet-orch launch tiny.yaml")
    made.request = StopRequest()
    made.request.handled = number
    return made


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 6), (signal.SIGHUP, 6)])
def test_a_stop_is_told_once_with_the_command_that_continues(
    number: signal.Signals, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = ending(number)
    assert stopped.tell(StoppedError("a stage was stopped")) == code
    assert stopped.tell_lost(None) == code, "the last resort comes second"
    assert capsys.readouterr() == ("", f"stopped; finished work is kept. {CONTINUE}")


def test_a_lost_cluster_is_told_once_and_ends_with_6(capsys: pytest.CaptureFixture[str]) -> None:
    lost = ending()
    assert lost.tell_lost("its GCS (process 7) has ended") == 6
    assert lost.tell(ClusterLostError("Ray was lost")) == 6
    message = "error: Ray was lost: its GCS (process 7) has ended. Finished work is kept. "
    assert capsys.readouterr() == ("", message + CONTINUE)


def test_a_closing_terminal_that_ends_ray_too_is_a_stop(capsys: pytest.CaptureFixture[str]) -> None:
    assert ending(signal.SIGHUP).tell(ClusterLostError("Ray was lost")) == 6
    assert capsys.readouterr().err.startswith("stopped; finished work is kept.")


CLOSED = """
import os, sys
from orchestration.commands.ending import leave_terminal

sys.stdin.read()  # until the terminal is closed
try:
    print("nobody reads this", flush=True)
except OSError:
    leave_terminal()
    print("nor this", flush=True)
    os._exit(42)
"""


@pytest.mark.slow
def test_a_closed_terminal_is_written_to_no_more() -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CLOSED)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=theirs,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs)
    os.close(ours)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(60) == 42
