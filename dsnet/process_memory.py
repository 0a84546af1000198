"""Peak memory of this process, or of the GPU: what a piece of work needs while it runs."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
"""What Linux takes to begin a new peak."""


def restart_peak(device: str) -> None:
    """Begin a new peak. Where the system cannot, the peak is that of the process's whole life."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):  # no Linux, or a container that refuses
        _CLEAR.write_text(_RESET_PEAK, encoding="ascii")


def peak_bytes(device: str) -> int:
    """The largest memory since `restart_peak`; 0 where the system does not tell."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status_bytes("VmHWM")


def resident_bytes() -> int:
    """Memory of this process now; 0 where the system does not tell."""
    return _status_bytes("VmRSS")


def _status_bytes(name: str) -> int:
    if not _STATUS.is_file():
        return 0
    found = re.search(rf"^{name}:\s+(\d+) kB$", _STATUS.read_text(encoding="ascii", errors="replace"), re.MULTILINE)
    return 1024 * int(found[1]) if found else 0
