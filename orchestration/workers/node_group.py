"""A torch process group for Ray Train workers on several nodes, on the network interface by which
the nodes know each other. Import it lazily: it imports Ray.

By itself gloo listens at the address to which the machine's own host name resolves. On many
machines that is 127.0.0.1 or 127.0.1.1 (/etc/hosts), where workers of other nodes cannot reach it.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from contextlib import suppress
from typing import Any

import ray
from ray.train.backend import Backend
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
"""Environment variable that names the interface on which gloo listens."""
_GET_ADDRESS = 0x8915
"""Linux' request SIOCGIFADDR, for the IPv4 address of an interface."""


class NodesConfig(TorchConfig):
    """The `torch_config` of `TorchTrainer` for a group of several nodes."""

    @property
    def backend_cls(self) -> type[Backend]:
        """The class that sets the group up."""
        return NodesBackend


class NodesBackend(_TorchBackend):
    """Ray's own set-up of the group, after every worker has chosen its interface."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Join all workers; called again for new ones after the loss of a worker."""
        assert isinstance(backend_config, TorchConfig)
        worker_group.execute(_choose_interface)
        super().on_start(worker_group, backend_config)


def _choose_interface() -> None:
    """Let gloo listen at the address of this node in the cluster, unless the environment of the
    node names an interface."""
    found = interface_of(ray.util.get_node_ip_address())
    if found is not None:
        os.environ.setdefault(GLOO_INTERFACE, found)


def interface_of(address: str) -> str | None:
    """The network interface of this machine that has an address.

    Args:
        address: an IP address.

    Returns:
        its name, such as eth0; None if no interface has it as its first IPv4 address.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an IPv4 address
                answer = fcntl.ioctl(any_socket.fileno(), _GET_ADDRESS, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None
