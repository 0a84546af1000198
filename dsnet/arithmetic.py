"""Bit-reproducible matrix products on x86, by choosing the mode of MKL, which torch uses.

By default MKL may choose another kernel, which sums in another order, depending on the alignment of
the operands in memory and on the number of products in a call. A router that is trained alone then
differs in the last bits from the same router in a cohort: at the sizes of gates this happens on AMD
processors, but not on Intel's. The environment variable MKL_CBWR switches this choice off (oneMKL:
conditional numerical reproducibility); its flag STRICT exists only for the AVX2 and AVX-512
kernels. MKL reads it at its first call.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Collection, Mapping, MutableMapping
from pathlib import Path

MKL_MODE = "MKL_CBWR"
_X86 = ("x86_64", "amd64")
_AVX512 = frozenset({"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"})
"""The CPU flags that MKL's AVX-512 kernels require."""
_AVX2 = frozenset({"avx2", "fma"})


def fix_arithmetic(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set MKL's mode for this machine unless the user has set one; to be called before a process's
    first matrix product."""
    mode = None if MKL_MODE in environ else mkl_mode()
    if mode is not None:
        environ[MKL_MODE] = mode


def mkl_mode() -> str | None:
    """The mode for this machine's processor; None where MKL does not run."""
    return mode_for(platform.machine(), cpu_flags())


def users_mode(environ: Mapping[str, str] = os.environ) -> str | None:
    """The mode that the user has set, which other machines must use too; None if each chooses its
    own."""
    mode = environ.get(MKL_MODE)
    return None if mode == mkl_mode() else mode


def mode_for(machine: str, flags: Collection[str]) -> str | None:
    """The mode for a processor; None for an architecture on which MKL does not run.

    For processors to which MKL does not give the named kernels (according to its manual, those not
    made by Intel) it uses the best available ones in the same strict mode, so that the manufacturer
    need not be known.

    Args:
        machine: its architecture, as `platform.machine()` names it.
        flags: its features, as Linux names them; empty if they are unknown.
    """
    if machine.lower() not in _X86:
        return None
    if not flags:
        return "AUTO,STRICT"
    if set(flags) >= _AVX512:
        return "AVX512,STRICT"
    return "AVX2,STRICT" if set(flags) >= _AVX2 else "COMPATIBLE"


def cpu_flags(path: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The features of the first processor; empty where the system does not list them."""
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:  # the first of many processors is enough
            flags = next((line.partition(":")[2] for line in lines if line.startswith("flags")), "")
    except OSError:
        return frozenset()
    return frozenset(flags.split())


def arithmetic_facts(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """MKL's mode as recorded with results: {"mkl_cbwr": its value, or "not set"}."""
    return {"mkl_cbwr": environ.get(MKL_MODE, "not set")}
