"""Makes matrix products on x86 the same to the bit in any company, by choosing the mode of MKL, the library that torch uses for them.

By default MKL takes another kernel, which sums in another order, when the operands lie elsewhere in memory or when more products share a
call. A router that trains alone then ends in other last bits than the same router in a cohort: on Intel processors that does not happen at
the sizes of gates, on AMD processors it does. The environment variable MKL_CBWR turns that choice off (oneMKL: conditional numerical
reproducibility); its flag STRICT exists for the AVX2 and AVX-512 kernels alone. MKL reads it at its first call.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Collection, Mapping, MutableMapping
from pathlib import Path

MKL_MODE = "MKL_CBWR"
_X86 = ("x86_64", "amd64")
_AVX512 = frozenset({"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"})
"""The CPU flags without which MKL does not use its AVX-512 kernels."""
_AVX2 = frozenset({"avx2", "fma"})


def fix_arithmetic(environ: MutableMapping[str, str] = os.environ) -> None:
    """Choose MKL's mode for this machine, unless the user has. Every process calls it before its first matrix product."""
    mode = None if MKL_MODE in environ else mkl_mode()
    if mode is not None:
        environ[MKL_MODE] = mode


def mkl_mode() -> str | None:
    """The mode that fits this machine's processor; None where MKL does not run."""
    return mode_for(platform.machine(), cpu_flags())


def users_mode(environ: Mapping[str, str] = os.environ) -> str | None:
    """The mode that the user has set and that other machines shall have too; None where each chooses its own."""
    mode = environ.get(MKL_MODE)
    return None if mode == mkl_mode() else mode


def mode_for(machine: str, flags: Collection[str]) -> str | None:
    """The mode for a processor.

    A processor that MKL does not give the named kernels (those of other makers than Intel, says its manual) gets its best ones, in the same
    strict mode, so that the maker need not be asked for.

    Args:
        machine: its architecture, as `platform.machine()` names it.
        flags: its features, as Linux names them; empty = not known.
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
        with path.open(encoding="utf-8", errors="replace") as lines:  # hundreds of processors: the first is enough
            flags = next((line.partition(":")[2] for line in lines if line.startswith("flags")), "")
    except OSError:
        return frozenset()
    return frozenset(flags.split())


def arithmetic_facts(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The mode of MKL as it is stored beside a result: {"mkl_cbwr": its value, or "not set"}."""
    return {"mkl_cbwr": environ.get(MKL_MODE, "not set")}
