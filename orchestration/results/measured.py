"""The measured numbers of one static sub-network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsnet.measure.latency_table import LatencyTable, latency_metric


@dataclass(frozen=True)
class MeasuredSubnet:
    """The numbers of one static sub-network, measured on `val`."""

    name: str
    top1: float
    top5: float
    madds: int
    params: int
    is_teacher: bool


@dataclass(frozen=True)
class MeasuredSubnets:
    """Content of subnets.json."""

    subnets: tuple[MeasuredSubnet, ...]
    num_images: int
    """Number of images in `val`."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MeasuredSubnets:
        """Build it from the result of `dsnet.measure.evaluate.measure_subnets`."""
        subnets = tuple(MeasuredSubnet(**item) for item in data["subnets"])
        if all(subnet.is_teacher for subnet in subnets):
            raise ValueError("no sub-network was measured")
        return cls(subnets, int(data["num_images"]))


def static_metrics(subnet: MeasuredSubnet, latencies: Mapping[str, LatencyTable]) -> dict[str, float]:
    """The metrics of a static sub-network, under the names that trials use.

    Args:
        subnet: numbers of the sub-network, measured on `val`.
        latencies: by device, the main one under `MAIN_DEVICE`; a latency is that of a call of the
            whole sub-network, without a decision. The teacher's was not measured.
    """
    metrics = {
        "top1": subnet.top1,
        "top5": subnet.top5,
        "madds_m": subnet.madds / 1e6,
        "p95_madds_m": subnet.madds / 1e6,
        "params_m": subnet.params / 1e6,
    }
    if not subnet.is_teacher:
        for device, table in latencies.items():
            for size in table.batch_sizes:
                metrics[latency_metric(size, device)] = table.static_ms(subnet.name, size)
    return metrics
