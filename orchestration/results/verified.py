"""The findings of the verify stage, as verify.json holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from dsnet.measure.latency_table import LatencyTable, MachineLoad, Timing, noise_of
from dsnet.measure.settings import MAIN_DEVICE
from search.front.analysis_records import BudgetPick, PointAnalysis, SplitAnalysis


@dataclass(frozen=True)
class Agreement:
    """Comparison of a router's actual run with its routing table."""

    slot: int
    num_images: int
    num_ties: int
    """Number of images that differ because the table itself was undecided to within rounding."""
    top1: float
    madds_m: float
    """Mean over the images, as really executed."""


@dataclass(frozen=True)
class DynamicLatency:
    """Measured latency of the front beside the static extremes, from the same run, device and
    images. All times are ms per batch."""

    device: str
    threads: int
    gates: Mapping[int, Mapping[int, Timing]]
    """Time of a call, by batch size and slot."""
    widest: Mapping[int, Timing]
    cheapest: Mapping[int, Timing]
    ideal: Mapping[int, Mapping[int, float]] = field(default_factory=dict)
    """By batch size and slot, the sum of the measured parts over these images' routes: the
    objective's latency, but on these images."""
    split: str = "test"
    """The split of the timed images; `dsnet-orch measure` uses `val`."""
    load: MachineLoad | None = None
    """Load of the machine when the timing was done; None in results of earlier releases."""

    @property
    def noise(self) -> str | None:
        """Why the times are unreliable; None if nothing is wrong."""
        extremes = [*self.widest.values(), *self.cheapest.values()]
        return noise_of([*extremes, *(timing for row in self.gates.values() for timing in row.values())], self.load)

    def beside(self, table: LatencyTable, front: Sequence[PointAnalysis], routes: Sequence[str]) -> DynamicLatency:
        """A copy with `ideal` filled in.

        Args:
            table: latency table of this device, from the measure stage.
            front: the same gates on the images that were timed.
            routes: names of the K sub-networks that `PointAnalysis.runs` counts.
        """
        clocks = {size: table.clock(size, routes) for size in self.gates}
        ideal = {
            size: {point.slot: clock.ms(np.array(point.runs), point.router) for point in front}
            for size, clock in clocks.items()
        }
        return replace(self, ideal=ideal)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DynamicLatency:
        """Build it from the result of `to_json`."""
        gates = {int(n): {int(slot): Timing(**item) for slot, item in row.items()} for n, row in data["gates"].items()}
        widest, cheapest = (
            {int(n): Timing(**item) for n, item in data[name].items()} for name in ("widest", "cheapest")
        )
        ideal = {int(n): {int(slot): ms for slot, ms in row.items()} for n, row in data["ideal"].items()}
        load = MachineLoad.from_json(data.get("load"))
        return cls(data["device"], data["threads"], gates, widest, cheapest, ideal, data.get("split", "test"), load)


@dataclass(frozen=True)
class Verified:
    """The result of the verify stage."""

    front: tuple[int, ...]
    contenders: tuple[BudgetPick, ...]
    val: SplitAnalysis
    test: SplitAnalysis
    latencies: Mapping[str, DynamicLatency]
    """By the name of the device, the main one under `MAIN_DEVICE`."""
    agreements: tuple[Agreement, ...]
    num_openings: int

    @property
    def latency(self) -> DynamicLatency:
        """The latency on the main device."""
        return self.latencies[MAIN_DEVICE]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Verified:
        """Build it from the content of verify.json."""
        return cls(
            front=tuple(data["front"]),
            contenders=tuple(BudgetPick(**item) for item in data["contenders"]),
            val=SplitAnalysis.from_json(data["val"]),
            test=SplitAnalysis.from_json(data["test"]),
            latencies={name: DynamicLatency.from_json(item) for name, item in data["latencies"].items()},
            agreements=tuple(Agreement(**item) for item in data["agreements"]),
            num_openings=data["num_openings"],
        )
