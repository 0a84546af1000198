"""The gRPC server of a Ray Serve replica, on the loopback interface only. Import it lazily: it
imports Ray.

Every replica starts a server through which other deployments may call it. It listens on every
interface of the machine, without a password, and Ray Serve has no setting for its address. Nothing
calls it here, because there is one deployment, and the HTTP proxy reaches replicas through Ray.
"""

from __future__ import annotations

from typing import Any

from ray.serve._private import replica

from dsnet.errors import PreflightError
from orchestration.tracking.server import LOOPBACK

_FUNCTION = "add_port_to_grpc_server"
_EVERY_INTERFACE = "[::]:"


def keep_replica_on_loopback() -> None:
    """Bind the server that this replica is about to start to 127.0.0.1.

    Raises:
        PreflightError: this release of Ray starts it in another way, so that its address is not
            known.
    """
    bind = getattr(replica, _FUNCTION, None)
    if bind is None:
        raise PreflightError(
            "this release of Ray would open a port of the server to the network; install the release in constraints.txt"
        )

    def bind_on_loopback(server: Any, address: str) -> int:
        if not address.startswith(_EVERY_INTERFACE):
            raise PreflightError(
                f"Ray Serve wants to listen at {address}, which is not expected; use the release in constraints.txt"
            )
        return int(bind(server, f"{LOOPBACK}:{address.removeprefix(_EVERY_INTERFACE)}"))

    setattr(replica, _FUNCTION, bind_on_loopback)
