"""Learning rate schedules and optimisers of Stage I."""

from __future__ import annotations

import math

import torch
from torch import nn

from dsnet.network.layers import undecayed
from dsnet.training.settings import TrainSettings

ONE_CYCLE_START = 25.0
"""Ratio of the peak learning rate to the first one of `one_cycle`."""
ONE_CYCLE_END = 25e4
"""Ratio of the peak learning rate to the last one of `one_cycle`."""


def learning_rate(step: int, num_steps: int, warmup_steps: int, settings: TrainSettings) -> float:
    """The learning rate of step `step`, counted from 0 (see `TrainSettings.schedule`)."""
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
    """SGD with Nesterov momentum or AdamW, in torch's foreach form; 1-d parameters, and those that
    a module names (`dsnet.network.layers.undecayed`), are not decayed.

    The fused form is not used: for SGD it fails on parameters that get their first gradient late,
    as private affine pairs do in a sandwich.
    """
    kept = undecayed(module)
    named = list(module.named_parameters())
    decayed = [parameter for name, parameter in named if parameter.ndim > 1 and name not in kept]
    plain = [parameter for name, parameter in named if parameter.ndim <= 1 or name in kept]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr, foreach=True)
    return torch.optim.SGD(
        groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.momentum > 0, foreach=True
    )
