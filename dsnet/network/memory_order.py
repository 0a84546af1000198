"""The order of a tensor's values in memory: the same function, another speed."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def arranged(tensor: Tensor, channels_last: bool) -> Tensor:
    """[B, C, H, W] or [O, I, k, k] in NHWC order, or in the usual one; other tensors as they are."""
    if tensor.ndim != 4:
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@torch.no_grad()
def arrange(module: nn.Module, channels_last: bool) -> None:
    """Put every parameter of a module into one order, in place."""
    for parameter in module.parameters():
        parameter.data = arranged(parameter.data, channels_last)
