"""MKL's mode: the user's own if it is set, else chosen by the processor; and in effect in this
process."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Collection
from pathlib import Path

import pytest
import torch

from dsnet.arithmetic import MKL_MODE, arithmetic_facts, cpu_flags, fix_arithmetic, mkl_mode, mode_for, users_mode

AVX2 = ("sse2", "avx", "avx2", "fma")
AVX512 = (*AVX2, "avx512f", "avx512dq", "avx512cd", "avx512bw", "avx512vl")
MODES = {"AUTO": 2, "COMPATIBLE": 3, "AVX2": 10, "AVX512": 12, "STRICT": 1 << 16}
"""MKL's own constants."""


@pytest.mark.parametrize(
    ("machine", "flags", "mode"),
    [
        ("x86_64", AVX512, "AVX512,STRICT"),
        ("AMD64", AVX2, "AVX2,STRICT"),
        ("x86_64", AVX512[:-1], "AVX2,STRICT"),  # the first AVX-512 processors lack what MKL's kernels need
        ("x86_64", ("sse2", "avx", "avx2"), "COMPATIBLE"),
        ("x86_64", ("sse2",), "COMPATIBLE"),
        ("x86_64", (), "AUTO,STRICT"),
        ("aarch64", (), None),
        ("arm64", AVX2, None),
    ],
)
def test_the_mode_follows_the_processors_features(machine: str, flags: Collection[str], mode: str | None) -> None:
    assert mode_for(machine, flags) == mode


def test_features_are_those_of_the_first_processor(tmp_path: Path) -> None:
    listing = tmp_path / "cpuinfo"
    listing.write_text("processor\t: 0\nflags\t\t: fpu avx2 fma\nprocessor\t: 1\nflags\t\t: fpu avx512f\n")
    assert cpu_flags(listing) == {"fpu", "avx2", "fma"}
    listing.write_text("processor\t: 0\nFeatures\t: fp asimd\n")
    assert cpu_flags(listing) == frozenset()
    assert cpu_flags(tmp_path / "none") == frozenset()


@pytest.mark.skipif(mkl_mode() is None, reason="MKL does not run on this processor")
def test_the_users_mode_wins_and_is_the_only_one_that_other_machines_get() -> None:
    environment: dict[str, str] = {}
    fix_arithmetic(environment)
    assert environment == {MKL_MODE: mkl_mode()}
    assert users_mode(environment) is None
    own = {MKL_MODE: "COMPATIBLE"}
    fix_arithmetic(own)
    assert own == {MKL_MODE: "COMPATIBLE"}
    assert users_mode(own) == "COMPATIBLE"
    assert arithmetic_facts(own) == {"mkl_cbwr": "COMPATIBLE"}
    assert arithmetic_facts({}) == {"mkl_cbwr": "not set"}


def test_mkl_computes_in_the_mode_that_is_set() -> None:
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    if not hasattr(library, "mkl_serv_cbwr_get"):
        pytest.skip("this torch has no MKL that could be asked")
    ones = torch.ones(3, 3)
    assert float((ones @ ones)[0, 0]) == 3.0
    branch, _, strict = os.environ[MKL_MODE].partition(",")
    wanted = MODES[branch] | MODES.get(strict, 0)
    on_other_makers = MODES["AUTO"] | (wanted & MODES["STRICT"])
    assert library.mkl_serv_cbwr_get(-1) in (wanted, on_other_makers)
