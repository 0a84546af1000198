"""How the training loop talks to its fellow workers: alone, or through torch.distributed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Workers(Protocol):
    """A group of data-parallel training processes."""

    @property
    def rank(self) -> int:
        """This process's number, from 0."""
        ...

    @property
    def size(self) -> int:
        """How many processes take part."""
        ...

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its mean over the group, in one all-reduce a step."""
        ...

    def average_buffers(self, modules: Iterable[nn.Module]) -> None:
        """Replace every float buffer by its mean over the group, so that all go on from one state, which a checkpoint can hold."""
        ...

    def any_of(self, flag: bool) -> bool:
        """Whether any process of the group raised `flag`, so that all stop at the same step."""
        ...


class SingleWorker:
    """A group of one."""

    rank = 0
    size = 1

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Nothing to average."""

    def average_buffers(self, modules: Iterable[nn.Module]) -> None:
        """Nothing to average."""

    def any_of(self, flag: bool) -> bool:
        """The flag itself."""
        return flag


class DistributedWorkers:
    """The processes of the default torch.distributed group."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """One all-reduce of all gradients as a flat vector."""
        self._average([parameter.grad for parameter in parameters if parameter.grad is not None])

    def average_buffers(self, modules: Iterable[nn.Module]) -> None:
        """One all-reduce of all float buffers as a flat vector."""
        self._average([b for module in modules for b in module.buffers() if b.is_floating_point()])

    def _average(self, tensors: list[Tensor]) -> None:
        """Replace tensors by their means over the group, in place."""
        if not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        parts = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(tensors, [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)])

    def any_of(self, flag: bool) -> bool:
        """Logical or over the group."""
        votes: Tensor = torch.tensor([float(flag)])
        if dist.get_backend() == "nccl":
            votes = votes.cuda()
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return bool(votes.item() > 0)
