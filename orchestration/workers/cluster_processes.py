"""The processes of a local Ray cluster, found by a mark in their environment.

Ray ends its own processes, but not after every fault: agents of a lost raylet live on for a minute,
and a stopped (SIGSTOP) process for ever.
"""

from __future__ import annotations

import os
import signal
import uuid
from contextlib import suppress
from pathlib import Path

from orchestration.runs.processes import look_at

MARK = "DSNET_RAY_CLUSTER"
"""Environment variable that all processes of a local cluster inherit; its value names the
cluster."""


def new_mark() -> str:
    """A name for a cluster."""
    return uuid.uuid4().hex


def marked_processes(mark: str) -> list[int]:
    """Pids of the processes of a cluster that still run, this process excluded; empty where there
    is no /proc."""
    sought = f"{MARK}={mark}".encode()
    found = []
    with suppress(FileNotFoundError):
        for name in os.listdir("/proc"):
            if not name.isdecimal() or int(name) == os.getpid():
                continue
            with suppress(OSError):  # it has ended meanwhile, or belongs to somebody else
                if sought in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                    found.append(int(name))
    return found


def ended_children() -> list[int]:
    """Pids of processes that this one has started and that have ended, as long as nobody has asked
    how: their environment cannot be read any more. Empty where there is no /proc."""
    found = []
    with suppress(FileNotFoundError):
        for name in os.listdir("/proc"):
            seen = look_at(int(name)) if name.isdecimal() else None
            if seen is not None and seen.has_ended and seen.parent == os.getpid():
                found.append(int(name))
    return found


def command_name(pid: int) -> str:
    """The name of a process's program; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def command_line(pid: int) -> str:
    """The command line of a process, with spaces; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace").replace("\0", " ").strip()
    except OSError:
        return ""


def kill_marked(mark: str) -> list[int]:
    """Kill all processes of a cluster, stopped ones too; returns their pids."""
    killed = []
    for _ in range(3):  # a process may have started another one between the look and the signal
        pids = marked_processes(mark)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
        if not pids:
            break
    return killed
