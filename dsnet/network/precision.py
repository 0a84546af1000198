"""Full float32 precision, for routing tables, checks and claims."""

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
