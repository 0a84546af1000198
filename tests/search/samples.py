"""The defaults of gate trials and a latency table."""

from __future__ import annotations

from dsnet.measure.latency_table import LatencyTable, Timing
from dsnet.space.subnet_set import SubnetSet
from orchestration.config.gate import GateConfig
from orchestration.runs.stages import canonical_settings

DEFAULTS = canonical_settings({"gate": GateConfig().model_dump(mode="json")})


def latency(subnets: SubnetSet) -> LatencyTable:
    """1 ms of trunk, 0.5 ms to decide, and tails of 1, 2, 3, ... ms."""

    def timing(ms: float) -> Timing:
        return Timing(ms, 0.0, 1)

    tails = {subnet.name: timing(1.0 + index) for index, subnet in enumerate(subnets)}
    return LatencyTable("a clock", 1, {}, {1: timing(1.0)}, {1: timing(0.5)}, {1: tails})
