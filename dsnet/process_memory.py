"""Current and peak memory of this process or of the GPU."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
"""Value that makes Linux reset a process's peak."""


def restart_peak(device: str) -> None:
    """Reset the peak; where that is unsupported, it stays that of the process's lifetime."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):  # not Linux, or forbidden in a container
        _CLEAR.write_text(_RESET_PEAK, encoding="ascii")


def peak_bytes(device: str) -> int:
    """Peak memory in bytes since `restart_peak`; 0 where the system does not report it."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status_bytes("VmHWM")


def resident_bytes() -> int:
    """Current memory of this process in bytes; 0 where the system does not report it."""
    return _status_bytes("VmRSS")


def _status_bytes(name: str) -> int:
    if not _STATUS.is_file():
        return 0
    found = re.search(rf"^{name}:\s+(\d+) kB$", _STATUS.read_text(encoding="ascii", errors="replace"), re.MULTILINE)
    return 1024 * int(found[1]) if found else 0
