"""Memory format of tensors and parameters (NCHW or NHWC), which affects speed but not results."""

from __future__ import annotations

import torch
from jaxtyping import Shaped
from torch import Tensor, nn


def arranged(tensor: Shaped[Tensor, "*shape"], channels_last: bool) -> Shaped[Tensor, "*shape"]:
    """A four-dimensional tensor in NHWC or contiguous memory format; others unchanged."""
    if tensor.ndim != 4:
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@torch.no_grad()
def arrange(module: nn.Module, channels_last: bool) -> None:
    """Convert every parameter of a module to one memory format, in place."""
    for parameter in module.parameters():
        parameter.data = arranged(parameter.data, channels_last)
