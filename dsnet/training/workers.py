"""Communication between data-parallel training processes: a single process, or
torch.distributed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Workers(Protocol):
    """A group of data-parallel training processes."""

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        ...

    @property
    def size(self) -> int:
        """Number of processes."""
        ...

    def agree_to_stop(self, wish: bool) -> bool:
        """Decide at the start of a step whether the group stops; all processes agree.

        `wish` is whether this process wants to stop; the group may follow one or two steps later.
        """
        ...

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its mean over the group, in one all-reduce per step."""
        ...

    def average_buffers(self, modules: Iterable[nn.Module]) -> None:
        """Replace every float buffer by its mean over the group, so that one checkpoint can hold
        the state of all."""
        ...


class SingleWorker:
    """A group of one process."""

    rank = 0
    size = 1

    def agree_to_stop(self, wish: bool) -> bool:
        """Return `wish`."""
        return wish

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Do nothing: the gradients are their own mean."""

    def average_buffers(self, modules: Iterable[nn.Module]) -> None:
        """Do nothing: the buffers are their own mean."""


class DistributedWorkers:
    """The processes of the default torch.distributed group.

    Wishes to stop are sent with the gradients, so that a step has a single all-reduce. On a GPU the
    result is read two steps later, when it has certainly arrived: reading it at once would make
    every step wait for the device.
    """

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self._wish = False
        self._votes: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def agree_to_stop(self, wish: bool) -> bool:
        """Logical or of the group's wishes one step ago (two steps on a GPU)."""
        self._wish = wish
        lag = 1 if not self._votes or self._votes[0][1] is None else 2
        if len(self._votes) < lag:
            return False
        vote, arrived = self._votes.popleft()
        if arrived is not None:
            arrived.synchronize()
        if vote.item() > 0:
            self._votes.clear()
            return True
        return False

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average all gradients, and the wishes to stop, by one all-reduce of a flat vector."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        wish = gradients[0].new_full((1,), float(self._wish))
        self._average([*gradients, wish])
        if wish.device.type == "cuda":
            on_host = torch.empty(1, dtype=wish.dtype, pin_memory=True).copy_(wish, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            self._votes.append((on_host, arrived))
        else:
            self._votes.append((wish, None))

    def average_buffers(self, modules: Iterable[nn.Module]) -> None:
        """Average all float buffers by one all-reduce of a flat vector."""
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
