"""A look at a process of this machine, in /proc."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessLook:
    """State of a process at one moment."""

    start_time: int
    """Clock ticks between boot and its start. A pid alone is not an identity, because it is reused
    after the process is gone; together with this it is one, until the machine starts again."""
    state: str
    """The letter of /proc/PID/stat: R, S, D, T (stopped), Z (ended), ..."""
    parent: int = 0
    """Pid of the process that started it, or that adopted it."""

    @property
    def has_ended(self) -> bool:
        """Whether only its entry is left."""
        return self.state in "ZX"

    @property
    def is_stopped(self) -> bool:
        """Whether it was stopped by SIGSTOP or a debugger."""
        return self.state in "Tt"


def look_at(pid: int) -> ProcessLook | None:
    """Look at a process; None if there is none, or no /proc."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The second field is the command in parentheses and may hold spaces and parentheses itself.
    fields = stat.rpartition(")")[2].split()
    return ProcessLook(int(fields[19]), fields[0], int(fields[1]))


def process_start_time(pid: int) -> int | None:
    """Clock ticks between boot and the start of a process; None if it is gone or a zombie, or if
    there is no /proc."""
    seen = look_at(pid)
    return None if seen is None or seen.has_ended else seen.start_time
