"""The exponential moving average (EMA) of a supernet, the teacher of in-place bootstrapping."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from dsnet.network.supernet import Supernet


def ema_decay(step: int, decay: float, warm_up: bool) -> float:
    """Decay at a training step.

    With warm-up it is min(decay, (1 + step) / (10 + step)) (ours: a fixed 0.997 averages too long
    in short runs).

    Args:
        step: Number of the step, from 0.
        decay: The final decay, 0..1.
        warm_up: Whether to warm up.
    """
    return min(decay, (1 + step) / (10 + step)) if warm_up else decay


class Ema:
    """The exponential moving average of a supernet, as a copy in eval mode without gradients.

    The pairs of tensors are collected once, so that an update is two fused operations for any
    number of tensors. The student's tensors must therefore not be replaced (optimisers and
    `load_state_dict` write in place).
    """

    def __init__(self, student: Supernet) -> None:
        self.module = copy.deepcopy(student).eval().requires_grad_(False)
        pairs = list(zip(self.module.state_dict().values(), student.state_dict().values(), strict=True))
        self._averaged, self._sources = _unzip([pair for pair in pairs if pair[0].is_floating_point()])
        self._copied, self._originals = _unzip([pair for pair in pairs if not pair[0].is_floating_point()])

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Set average <- decay * average + (1 - decay) * student; integer buffers are copied."""
        torch._foreach_lerp_(self._averaged, self._sources, 1.0 - decay)
        if self._copied:
            torch._foreach_copy_(self._copied, self._originals)


def _unzip(pairs: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    return [target for target, _ in pairs], [source for _, source in pairs]
