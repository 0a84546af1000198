"""The process that waits for a launch: exit codes, messages, and signals."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.processes import Command
from orchestration.runs.lock import read_lock
from tests.hostile import REPOSITORY
from tests.orchestration.launch_here import SMALL
from tests.orchestration.samples import write_sweep

HEAD = """
import ctypes, os, signal, sys, time
from orchestration.runs.supervisor import supervise, tell_command, tell_exit
supervise(lambda text: print(text, file=sys.stderr))
"""
COUNT = """
from dsnet.stop_signals import stop_on_signals
heard = []
with stop_on_signals(lambda: False, heard.append) as request:
    print("ready", os.getpid(), flush=True)
    while not request():
        time.sleep(0.005)
    time.sleep(0.3)
tell_exit(request.exit_code)
print(*heard, flush=True)
sys.exit(request.exit_code)
"""


def command(program: str) -> list[str]:
    return [sys.executable, "-c", HEAD + program, "launch", "my sweep.yaml"]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY)}


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(program), env=environment(), capture_output=True, text=True, timeout=60)


@contextmanager
def ready(program: str = COUNT) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A program that was started in a process group of its own, and the pid of its child."""
    with subprocess.Popen(
        command(program), env=environment(), stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            yield process, int(process.stdout.readline().split()[1])
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("tell_exit(0); print(1)", 0),
        ("tell_exit(3); sys.exit(3)", 3),
        ("tell_exit(0); sys.exit(5)", 5),
        ("tell_exit(6); os.kill(os.getpid(), signal.SIGABRT)", 6),  # a library at the end of the interpreter
    ],
)
def test_an_end_that_was_told_is_passed_on_without_a_word(program: str, code: int) -> None:
    answer = run(program)
    assert (answer.returncode, answer.stderr) == (code, "")


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            "was killed (SIGKILL), by hand or by the system because memory ran out",
        ),
        ("ctypes.CDLL(None)._exit(1)", "a library has ended the launch with exit code 1, as Ray does"),
        ("ctypes.CDLL(None)._exit(0)", "a library has ended the launch with exit code 0"),
        ("os.kill(os.getpid(), signal.SIGBUS)", "was ended by SIGBUS, most likely because a library failed"),
    ],
)
def test_an_end_from_outside_is_told_with_the_command_that_continues(program: str, said: str) -> None:
    answer = run(program)
    assert answer.returncode == 6
    message, last = answer.stderr.splitlines()[-2:]
    assert message.startswith("error: ")
    assert said in message
    assert message.endswith("Finished work is kept. Continue with:")
    assert last == "  dsnet-orch launch 'my sweep.yaml'"


def test_the_command_that_continues_is_the_one_that_was_told() -> None:
    answer = run("tell_command('dsnet-orch launch runs/a/sweep.yaml'); os.kill(os.getpid(), signal.SIGKILL)")
    assert answer.stderr.splitlines()[-1] == "  dsnet-orch launch runs/a/sweep.yaml"


def test_before_it_listens_a_launch_dies_of_a_signal_as_every_program_does() -> None:
    with ready("print('ready', os.getpid(), flush=True); time.sleep(60)") as (process, _):
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == -signal.SIGTERM


@pytest.mark.parametrize("is_for_group", [False, True])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 6)])
def test_a_signal_is_heard_once_whether_it_is_sent_to_one_process_or_to_all(
    number: signal.Signals, code: int, is_for_group: bool
) -> None:
    with ready() as (process, _):
        os.killpg(process.pid, number) if is_for_group else process.send_signal(number)
        assert process.wait(20) == code
        assert process.stdout is not None
        assert process.stdout.read() == f"{number.name}\n"


def read_line(terminal: int) -> None:
    shown = b""
    while not shown.endswith(b"\n"):
        shown += os.read(terminal, 1000)


def test_ctrl_c_at_a_terminal_is_heard_once() -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe(sys.executable, command(COUNT), environment())
    read_line(terminal)
    os.write(terminal, b"\x03")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    os.close(terminal)


@pytest.mark.parametrize("is_leader", [True, False])
def test_a_terminal_that_closes_is_heard(tmp_path: Path, is_leader: bool) -> None:
    """The kernel tells the leader of the session alone, which may be a shell that passes it on."""
    heard = tmp_path / "heard"
    program = COUNT.replace("print(*heard, flush=True)", f"open({str(heard)!r}, 'w').write(' '.join(heard))")
    shell = ["sh", "-c", '"$@"; true', "sh"]
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        line = command(program) if is_leader else [*shell, *command(program)]
        os.execvpe(line[0], line, environment())
    read_line(terminal)
    os.close(terminal)
    os.waitpid(pid, 0)
    deadline_s = time.monotonic() + 20.0
    while not heard.exists() or not heard.read_text():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    assert heard.read_text() == "SIGHUP"


def test_a_launch_does_not_outlive_the_process_that_waits_for_it() -> None:
    with ready() as (process, child):
        process.kill()
        process.wait()
        deadline_s = time.monotonic() + 20.0
        while is_running(child):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.slow
def test_a_driver_that_is_killed_is_told_by_its_supervisor(tmp_path: Path) -> None:
    write_sweep(tmp_path, SMALL)
    lock = tmp_path / "runs" / "tiny" / "driver.lock"
    launch = Command(tmp_path, "launch", "tiny.yaml")
    try:
        launch.wait_for(lock.exists)
        holder = read_lock(lock)
        assert holder is not None
        assert holder.pid != launch.process.pid
        os.kill(holder.pid, signal.SIGKILL)
        answer = launch.wait()
        assert answer.code == 6, answer.err
        assert answer.err.endswith("Finished work is kept. Continue with:\n  dsnet-orch launch tiny.yaml\n"), answer.err
        assert launch.left_behind() == []
    finally:
        launch.end()
