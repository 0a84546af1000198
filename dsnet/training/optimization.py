"""How the weights move: learning rate schedules and optimisers."""

from __future__ import annotations

import math

import torch
from torch import nn

from dsnet.training.settings import TrainSettings

ONE_CYCLE_START = 25.0
"""The peak learning rate over the first one of `one_cycle`."""
ONE_CYCLE_END = 25e4
"""The peak over the last one."""


def learning_rate(step: int, num_steps: int, warmup_steps: int, settings: TrainSettings) -> float:
    """The learning rate of one step, 0-based (see `TrainSettings.schedule`)."""
    peak = settings.lr
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    match settings.schedule:
        case "one_cycle":  # Smith & Topin, arXiv 1708.07120, with cosine flanks
            if step < warmup_steps:
                return _cosine(peak / ONE_CYCLE_START, peak, step / warmup_steps)
            return _cosine(peak, peak / ONE_CYCLE_END, progress)
        case "constant":
            return peak * min(1.0, (step + 1) / warmup_steps) if warmup_steps else peak
    return peak * (step + 1) / warmup_steps if step < warmup_steps else _cosine(peak, 0.0, progress)


def _cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine from `start` (progress 0) to `end` (progress 1)."""
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * progress))


def make_optimizer(module: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum or AdamW, in the foreach form; 1-d parameters are not decayed.

    Not torch's fused form: for SGD it fails on parameters that get their first gradient late, as private affine pairs in a sandwich do.
    """
    decayed = [parameter for parameter in module.parameters() if parameter.ndim > 1]
    plain = [parameter for parameter in module.parameters() if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr, foreach=True)
    return torch.optim.SGD(
        groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.momentum > 0, foreach=True
    )
