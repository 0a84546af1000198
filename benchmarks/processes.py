"""A command line in a process group of its own, and all processes that it starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
PROGRAM = (sys.executable, "-c", "from dsnet_orch import main; main()")
MARK = "DSNET_TEST_MARK"
"""Environment variable by which all processes of one command are found, whatever their present
parent."""


@dataclass(frozen=True)
class Answer:
    """The exit code and the output of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout as JSON."""
        return json.loads(self.out)


class Command:
    """`dsnet-orch`, or another program, in a process group of its own, as a terminal starts it."""

    def __init__(
        self,
        folder: Path,
        *arguments: str | Path,
        program: Sequence[str] = PROGRAM,
        python_path: Sequence[Path] = (),
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [*program, *map(str, arguments)],
            cwd=folder,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(map(str, (*python_path, REPOSITORY))),
                **(variables or {}),
                MARK: self.mark,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def interrupt(self) -> None:
        """Send SIGINT to the whole process group, as Ctrl-C does."""
        os.killpg(self.process.pid, signal.SIGINT)

    def wait(self, timeout_s: float = 240.0) -> Answer:
        """Wait until it has ended; returns its answer."""
        try:
            out, err = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.end()
            raise
        return Answer(self.process.returncode, out, err)

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 240.0) -> None:
        """Wait until a condition holds while the command runs.

        Raises:
            AssertionError: it ended, or the time was over, before the condition held.
        """
        deadline = time.monotonic() + timeout_s
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.end()
                raise AssertionError(f"the moment never came: {self.process.communicate()}")
            time.sleep(0.002)

    def pids(self) -> list[int]:
        """Processes that it started and that still run, itself included."""
        return [pid for pid in _all_pids() if self._is_ours(pid)]

    def left_behind(self, patience_s: float = 15.0) -> list[str]:
        """Commands of its processes that still run after it has ended; daemons get some seconds to
        end."""
        deadline = time.monotonic() + patience_s
        while (pids := self.pids()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return [Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")[:200] for pid in pids]

    def end(self) -> None:
        """Kill it and all that it started."""
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _is_ours(self, pid: int) -> bool:
        with suppress(OSError):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            return state != "Z" and f"{MARK}={self.mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes()
        return False


def _all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]
