"""A torch process group for Ray Train workers of one machine, on the loopback interface only.
Import it lazily: it imports Ray.

With Ray's own `TorchConfig` the workers find each other through torch's TCPStore, which listens on
every interface of the machine, without a password, and cannot be bound to an address. Here they
find each other through a file and communicate over the loopback interface; a single worker needs no
group.
"""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch.distributed as dist
from ray.train.backend import Backend, BackendConfig
from ray.train.torch import TorchConfig


@dataclass
class LoopbackConfig(TorchConfig):
    """The `torch_config` of `TorchTrainer` for a group on the loopback interface."""

    folder: str = ""
    """Folder of the file through which the workers find each other."""

    @property
    def backend_cls(self) -> type[Backend]:
        """The class that sets the group up."""
        return LoopbackBackend


class LoopbackBackend(Backend):
    """Sets the group up on every worker before training starts, and takes it down afterwards."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Join all workers. After the loss of a worker it is called again for new ones, which use a
        new file."""
        assert isinstance(backend_config, LoopbackConfig)
        size = len(worker_group)
        if size == 1:
            return
        uses_gpu = worker_group.get_resources_per_worker().get("GPU", 0) > 0
        place = Path(backend_config.folder) / f"meeting-{uuid.uuid4().hex}"
        ray.get(
            [
                worker_group.execute_single_async(
                    rank, _join, "nccl" if uses_gpu else "gloo", f"file://{place}", rank, size
                )
                for rank in range(size)
            ]
        )

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Take the group down."""
        worker_group.execute(_leave)


def _join(backend: str, meeting: str, rank: int, size: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=size)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
