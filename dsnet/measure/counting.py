"""MAdds of a plain module as publications count them, with norms, activations and pooling or
without.

`dsnet.space.cost` counts convolutions, linear layers and pooling; this module is for comparisons
with numbers that were counted in another way (docs/methods.md, section 8).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten
NORMS = (aten.native_batch_norm, aten.native_layer_norm, aten.native_group_norm)
ACTIVATIONS = tuple(
    getattr(aten, name + suffix)
    for name in ("relu", "hardtanh", "silu", "sigmoid", "hardswish", "hardsigmoid", "gelu", "leaky_relu")
    for suffix in ("", "_")
)
"""ReLU6 is a `hardtanh`."""
POOLING = (aten.max_pool2d_with_indices, aten.avg_pool2d, aten._adaptive_avg_pool2d, aten.mean)


@dataclass(frozen=True)
class Counting:
    """Operations that count beside the products of convolutions and linear layers; biases and
    additions of two values never count."""

    norm: int = 0
    """For every element of a norm's input."""
    activation: int = 0
    """For every element of an activation's input."""
    pooling: int = 0
    """For every element of a pooling's input; a mean over height and width is a pooling."""


PRODUCTS = Counting()
"""Convolutions and linear layers alone."""
ALL_LAYERS = Counting(norm=2, activation=1, pooling=1)
"""All layers: a norm multiplies and shifts each element."""


def module_madds(module: nn.Module, image: Sequence[int], counting: Counting = PRODUCTS) -> int:
    """MAdds of one image in a plain module, in eval mode, without computing anything.

    A sub-network is counted as the plain module that `dsnet.deploy.materialize` makes of it. In a
    network without gates of its own `materialize_head` leaves out what the gate before it reads.

    Args:
        module: the network; not changed.
        image: channels, height and width of the image.
        counting: the operations that count beside products.
    """
    tensors = {name: tensor.to("meta") for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    images = torch.empty(1, *image, device="meta")
    was_training = module.training
    module.eval()
    elements = _Elements(counting)
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as products, elements:
            functional_call(module, tensors, (images,))
    finally:
        module.train(was_training)
    return products.get_total_flops() // 2 + elements.madds


class _Elements(TorchDispatchMode):
    """Adds up the operations that count for every element of an input."""

    def __init__(self, counting: Counting) -> None:
        super().__init__()
        self.madds = 0
        self._numbers: dict[Any, int] = {
            **dict.fromkeys(NORMS, counting.norm),
            **dict.fromkeys(ACTIVATIONS, counting.activation),
            **dict.fromkeys(POOLING, counting.pooling),
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = func.overloadpacket
        if kind in self._numbers and (kind is not aten.mean or args[0].ndim == 4):
            self.madds += self._numbers[kind] * args[0].numel()
        return func(*args, **(kwargs or {}))
