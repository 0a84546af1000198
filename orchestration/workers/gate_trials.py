"""The trial function of a search over routing tables, as a worker builds it.

A worker imports only this module and its dependencies, nothing of the pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from dsnet.measure.latency_table import LatencyTable
from dsnet.routing.routing_table import RoutingTable
from dsnet.space.subnet_set import SubnetSet
from search.gate_trial import GateScores, GateTrial


@dataclass(frozen=True)
class MakeGateTrial:
    """Builds a trial function inside a worker, from arrays in the object store."""

    metas: dict[str, dict[str, Any]]
    subnets: SubnetSet
    latency: LatencyTable
    """Latency table of the main device."""
    defaults: dict[str, Any]
    devices: dict[str, LatencyTable] = field(default_factory=dict)
    """Latency tables of further devices, by name."""

    def __call__(self, arrays: Mapping[str, NDArray[Any]]) -> GateTrial:
        """The trial function over the shared tables."""
        gate, val = (
            RoutingTable.from_arrays(
                {name: arrays[f"{split}/{name}"] for name in RoutingTable.ARRAYS}, self.metas[split]
            )
            for split in ("gate", "val")
        )
        return GateTrial(gate, val, GateScores(self.subnets, self.latency, self.devices), self.defaults)
