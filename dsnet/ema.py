"""The exponential moving average that teaches in in-place bootstrapping."""

from __future__ import annotations

import copy

import torch
from torch import nn


def ema_decay(step: int, decay: float, warm_up: bool) -> float:
    """Decay at `step` (0-based). With warm-up min(decay, (1 + step) / (10 + step)): ours; a fixed 0.997 is wrong for short runs."""
    return min(decay, (1 + step) / (10 + step)) if warm_up else decay


def frozen_copy(module: nn.Module) -> nn.Module:
    """A copy in eval mode whose parameters need no gradient."""
    return copy.deepcopy(module).eval().requires_grad_(False)


@torch.no_grad()
def update_ema(ema: nn.Module, student: nn.Module, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * student for parameters and float buffers; integer buffers are copied."""
    averaged: list[torch.Tensor] = []
    newest: list[torch.Tensor] = []
    for target, source in zip(ema.state_dict().values(), student.state_dict().values(), strict=True):
        if target.is_floating_point():
            averaged.append(target)
            newest.append(source)
        else:
            target.copy_(source)
    torch._foreach_lerp_(averaged, newest, 1.0 - decay)
