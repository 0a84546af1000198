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

    def agree_to_stop(self, wants_to_stop: bool) -> bool:
        """Decide at the start of a step whether the group stops; all processes agree.

        `wants_to_stop` is this process's own request; the group may stop one or two steps later.
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

    def agree_to_stop(self, wants_to_stop: bool) -> bool:
        """Return `wants_to_stop`."""
        return wants_to_stop

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Do nothing: the gradients are their own mean."""

    def average_buffers(self, modules: Iterable[nn.Module]) -> None:
        """Do nothing: the buffers are their own mean."""


class DistributedWorkers:
    """The processes of the default torch.distributed group.

    Requests to stop are sent with the gradients, so that a step has a single all-reduce. On a GPU
    the result is read two steps later, when it has certainly arrived: reading it at once would make
    every step wait for the device.
    """

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self._wants_to_stop = False
        self._requests: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def agree_to_stop(self, wants_to_stop: bool) -> bool:
        """Logical or of the group's requests one step ago (two steps on a GPU)."""
        self._wants_to_stop = wants_to_stop
        lag = 1 if not self._requests or self._requests[0][1] is None else 2
        if len(self._requests) < lag:
            return False
        share, arrived = self._requests.popleft()
        if arrived is not None:
            arrived.synchronize()
        if share.item() > 0:
            self._requests.clear()
            return True
        return False

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average all gradients, and the requests to stop, by one all-reduce of a flat vector."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        request = gradients[0].new_full((1,), float(self._wants_to_stop))
        self._average([*gradients, request])
        if request.device.type == "cuda":
            on_host = torch.empty(1, dtype=request.dtype, pin_memory=True).copy_(request, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            self._requests.append((on_host, arrived))
        else:
            self._requests.append((request, None))

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
