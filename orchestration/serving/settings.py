"""Settings of the server: address, batches, limits, and the operating point of its answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le

from dsnet.deploy.layout import FLOAT32
from dsnet.settings import NonNegativeFloat, PositiveInt, Settings

Port = Annotated[int, Ge(0), Le(65535)]
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class ServeSettings(Settings):
    """How a bundle is served."""

    port: Port = 8000
    """On 127.0.0.1; a free one is taken if it is in use, or if it is 0."""
    replicas: PositiveInt = 1
    """Processes that hold the bundle."""
    threads: PositiveInt | None = None
    """Threads of one batch; None: the CPUs of this process shared among the replicas."""
    max_batch: PositiveInt = 32
    """Largest number of images in a batch."""
    wait_ms: NonNegativeFloat = 5.0
    """How long an incomplete batch waits for further images."""
    max_queue: PositiveInt = 256
    """Images that a replica accepts at a time; further requests get 503."""
    max_mib: PositiveInt = 16
    """Largest body of a request in MiB; a larger one gets 413."""
    madds_m: float | None = None
    """Budget of all requests that bring none, in million MAdds."""
    latency_ms: float | None = None
    """The same, as a latency in ms of batch 1."""
    precision: str = FLOAT32
    """As of `dsnet.load_bundle`."""
