"""Float32 that means it: what a table, a check or a claim is computed with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.backends import cudnn


@contextmanager
def exact_float32() -> Iterator[None]:
    """Keep convolutions from rounding their inputs to TF32 (GPUs do by default): it moves a gate's evidence by 1e-3, enough to flip routes.

    Also usable as a decorator. Training and timing are left as the user has them.
    """
    flags = {
        "enabled": cudnn.enabled,
        "benchmark": cudnn.benchmark,
        "deterministic": cudnn.deterministic,
        "allow_tf32": False,
    }
    matmul_before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with cudnn.flags(**flags):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul_before
