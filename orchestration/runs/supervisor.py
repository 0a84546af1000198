"""A process that waits for a launch, and says why it ended where the launch itself cannot: it is
killed, by hand or because memory ran out, or a library in C ends it, as Ray does if it loses one of
its processes while it starts.

`supervise` forks before anything large is imported. The child goes on with the launch; its parent
passes signals on, waits, and ends with the child's exit code. It needs Linux; elsewhere there is
one process only. A child never outlives its parent.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

RELAYED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
RESUMABLE = 6
_FROM_KERNEL = 0x80
"""`si_code` of a signal from the terminal. Ctrl-C goes to every process of the group; SIGHUP, when
the terminal closes, only to the leader of the session, which this process may be."""
_RELAY_S = 0.05
"""Seconds before a signal is passed on: a child that has got the same one itself may end
meanwhile."""
_LOOK_S = 1.0
_SET_DEATH_SIGNAL = 1
"""`PR_SET_PDEATHSIG` of prctl(2)."""
_SHOW_CURSOR = "\x1b[?25h"
_told: int | None = None
"""The pipe to the parent; None in a process without one."""


def supervise(complain: Callable[[str], None]) -> None:
    """Go on in a child process, if this process can be its parent; the parent never returns.

    Args:
        complain: prints a message to stderr; called in the parent.
    """
    global _told
    if not sys.platform.startswith("linux") or threading.active_count() > 1 or _told is not None:
        return
    reading, writing = os.pipe()
    parent = os.getpid()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*RELAYED, signal.SIGCHLD})
    child = os.fork()
    if child:
        os.close(writing)
        os._exit(_ended(_wait(child), _read(reading), complain))
    os.close(reading)
    ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before it was asked to take this process with it
        os._exit(RESUMABLE)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    _told = writing


def tell_command(command: str) -> None:
    """Tell the parent the command that continues this launch."""
    _tell(f"command {command}")


def tell_exit(code: int) -> None:
    """Tell the parent that this process ends by itself now."""
    _tell(f"exit {code}")


def _tell(line: str) -> None:
    if _told is not None:
        with suppress(OSError):
            os.write(_told, f"{line}\n".encode())


def _wait(child: int) -> int:
    """Pass signals on until the child has ended; returns its wait status."""
    while True:
        info = signal.sigtimedwait({*RELAYED, signal.SIGCHLD}, _LOOK_S)
        if info is not None and info.si_signo in RELAYED and not _has_child_got(info):
            time.sleep(_RELAY_S)
            os.kill(child, info.si_signo)  # it is there until it is waited for
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:  # as process 1 of a container, also what was left to it
                if ended[0] == child:
                    return ended[1]


def _has_child_got(info: signal.struct_siginfo) -> bool:
    return info.si_code == _FROM_KERNEL and info.si_signo != signal.SIGHUP


def _read(pipe: int) -> dict[str, str]:
    """The child's messages from the pipe: `command` and `exit`, each with its last text."""
    os.set_blocking(pipe, False)
    told = b""
    with suppress(BlockingIOError):
        while part := os.read(pipe, 4096):
            told += part
    lines = told.decode(errors="replace").splitlines()
    return {kind: text for kind, _, text in (line.partition(" ") for line in lines)}


def _ended(status: int, told: dict[str, str], complain: Callable[[str], None]) -> int:
    """The exit code for a child that has ended; says why it did, if it has not told so itself."""
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if "exit" in told:
        return int(told["exit"]) if number else os.waitstatus_to_exitcode(status)
    if number in RELAYED:  # before the launch listened: end in the same way
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    if sys.stderr.isatty():
        sys.stderr.write(f"{_SHOW_CURSOR}\n")
    complain(f"error: {_why(status, number)}. Finished work is kept. Continue with:")
    sys.stderr.write(f"  {told.get('command') or shlex.join(['dsnet-orch', *sys.argv[1:]])}\n")
    with suppress(OSError):
        sys.stderr.flush()
    return RESUMABLE


def _why(status: int, number: int) -> str:
    if number == signal.SIGKILL:
        return "the launch was killed (SIGKILL), by hand or by the system because memory ran out (dmesg shows it)"
    if number:
        return f"the launch was ended by {signal.Signals(number).name}, most likely because a library failed"
    code = os.waitstatus_to_exitcode(status)
    return f"a library has ended the launch with exit code {code}, as Ray does if it loses one of its processes while it starts"
