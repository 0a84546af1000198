"""A guard over the processes of a local cluster and the two agents of its raylet.

A raylet whose agent has ended announces the end of its node, as the GCS does for a raylet that has
ended. Ray then ends the driver from C++, with exit code 1 and without a message, less than a second
later. A guard (`guard_process.py`) therefore waits for the end of any of them, and kills the others
before they announce anything: without them the driver has the time to end in order.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from orchestration.runs.processes import look_at
from orchestration.workers import guard_process
from orchestration.workers.cluster_processes import MARK, command_line

AGENTS = {
    "its dashboard agent": ("DashboardAgent", "dashboard/agent.py"),
    "its agent for runtime environments": ("RuntimeEnvAgent", "runtime_env/agent/main.py"),
}
"""Name of each agent in messages, and parts of its command line: the process title that it sets,
and the path of its script, which is there before."""
END_S = 2.0


def agents_of(raylet: int) -> dict[int, str]:
    """Pid and name of the agents of a raylet; empty where there is no /proc."""
    found = {}
    for entry in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if entry.isdecimal() and (seen := look_at(int(entry))) is not None and seen.parent == raylet:
            line = command_line(int(entry))
            found.update({int(entry): name for name, parts in AGENTS.items() if any(part in line for part in parts)})
    return found


class Guard:
    """A process that ends all of several processes as soon as one of them, or this one, has ended.

    Args:
        names: pid and name of the processes that are waited for.
        killed: pids of those that are killed, in this order.
    """

    def __init__(self, names: dict[int, str], killed: list[int]) -> None:
        self._names = names
        pids = [",".join(str(pid) for pid in each) for each in (names, killed)]
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(guard_process.__file__)), *pids],
            env={name: value for name, value in os.environ.items() if name != MARK},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    @staticmethod
    def is_possible() -> bool:
        """Whether this system tells the end of a process (Linux from 5.3)."""
        return hasattr(os, "pidfd_open")

    def wait(self) -> str | None:
        """Wait for the end of a process; returns a sentence about it, or None after `stop`."""
        assert self._process.stdout is not None
        ended = [int(line) for line in self._process.stdout if line.strip().isdecimal()]
        return f"{self._names[ended[0]]} (process {ended[0]}) has ended" if ended else None

    def stop(self) -> None:
        """End the guard, so that the processes may end in order."""
        assert self._process.stdin is not None
        with suppress(OSError, ValueError):  # it has ended, or was stopped before
            self._process.stdin.write("x")
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
