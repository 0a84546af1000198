"""The corner of a shared weight that one sub-network uses, and the way its gradient takes back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_adds_in_place: ContextVar[bool] = ContextVar("adds_in_place", default=False)


@contextmanager
def gradients_added_in_place() -> Iterator[None]:
    """Within: a corner's gradient is added straight into the corner of `weight.grad`.

    Autograd's own way makes, for every slice, a gradient as large as the whole weight, mostly zeros, and adds all of it: on a sandwich
    of four sub-networks that costs 1 to 5 % of a step. What it gives up: only `backward()` sees these gradients, not
    `torch.autograd.grad`, nor hooks on the parameters. So it is asked for by the training step alone.
    """
    token = _adds_in_place.set(True)
    try:
        yield
    finally:
        _adds_in_place.reset(token)


def corner(weight: Tensor, *sizes: int) -> Tensor:
    """`weight[:sizes[0], :sizes[1], ...]`; the weight itself where nothing is cut off."""
    if tuple(weight.shape[: len(sizes)]) == sizes:
        return weight
    pays = weight.ndim > 1  # a vector's zeros are cheaper than a call of ours
    if pays and _adds_in_place.get() and weight.requires_grad and weight.is_leaf and torch.is_grad_enabled():
        return _Corner.apply(weight, sizes)
    return weight[_index(sizes)]


class _Corner(torch.autograd.Function):
    """A contiguous copy of a corner: forward and backward of a convolution would each make one of their own."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, sizes: tuple[int, ...]) -> Tensor:
        ctx.weight, ctx.sizes = weight, sizes
        layout = torch.channels_last if _is_channels_last(weight) else torch.contiguous_format
        return weight[_index(sizes)].contiguous(memory_format=layout)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        weight = ctx.weight
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        weight.grad[_index(ctx.sizes)].add_(gradients[0])
        return None, None


def _index(sizes: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in sizes)


def _is_channels_last(weight: Tensor) -> bool:
    return weight.ndim == 4 and not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)
