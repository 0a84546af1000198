"""Full float32 precision, for routing tables, checks and claims, and inside of other programs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.backends import cudnn


@contextmanager
def exact_float32() -> Iterator[None]:
    """Context manager that disables TF32, to which GPUs otherwise round inputs of convolutions and
    matrix products.

    TF32 changes a gate's evidence by 1e-3, enough to change routes. Also usable as a decorator.
    Training and timing keep the user's setting.
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


@contextmanager
def own_defaults() -> Iterator[None]:
    """Context manager in which tensors are made in float32 on the CPU, whatever the program around
    has set as default type and device. Also usable as a decorator.

    The default type is one for all threads: it is changed, for the block, only where it is another.
    """
    before = torch.get_default_dtype()
    try:
        if before != torch.float32:
            torch.set_default_dtype(torch.float32)
        with torch.device("cpu"):
            yield
    finally:
        if before != torch.float32:
            torch.set_default_dtype(before)
