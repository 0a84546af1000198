"""The findings of the verify stage, as verify.json holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from dsnet.measure.latency import (
    MAIN_DEVICE,
    LatencyTable,
    MachineLoad,
    Timing,
    noise_of,
)
from search.front.analysis import BudgetPick, PointAnalysis, SplitAnalysis


@dataclass(frozen=True)
class Agreement:
    """How a router's real run compares with its table."""

    slot: int
    num_images: int
    num_ties: int
    """Images that differ where the table itself was undecided to within rounding."""
    top1: float
    madds_m: float
    """Mean over the images, as really executed."""


@dataclass(frozen=True)
class DynamicLatency:
    """Measured latency of the front beside the static extremes: same run, same device, same images.
    All in ms of one batch."""

    device: str
    threads: int
    gates: Mapping[int, Mapping[int, Timing]]
    """batch size -> slot -> a call's time."""
    widest: Mapping[int, Timing]
    cheapest: Mapping[int, Timing]
    ideal: Mapping[int, Mapping[int, float]] = field(default_factory=dict)
    """batch size -> slot -> what the measured parts add up to for these images' routes: what the
    objective said, but on them."""
    split: str = "test"
    """Whose images were run; `dsnet-orch measure` takes those of `val`."""
    load: MachineLoad | None = None
    """Of the machine when all was timed; None in results of earlier releases."""

    @property
    def noise(self) -> str | None:
        """What makes the times doubtful; None where nothing does."""
        extremes = [*self.widest.values(), *self.cheapest.values()]
        return noise_of([*extremes, *(timing for row in self.gates.values() for timing in row.values())], self.load)

    def beside(self, table: LatencyTable, front: Sequence[PointAnalysis], routes: Sequence[str]) -> DynamicLatency:
        """The same with `ideal` filled in.

        Args:
            table: of this device, from the measure stage.
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
        """A JSON-able mapping."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DynamicLatency:
        """Rebuild what `to_json` gave."""
        gates = {int(n): {int(slot): Timing(**item) for slot, item in row.items()} for n, row in data["gates"].items()}
        widest, cheapest = (
            {int(n): Timing(**item) for n, item in data[name].items()} for name in ("widest", "cheapest")
        )
        ideal = {int(n): {int(slot): ms for slot, ms in row.items()} for n, row in data["ideal"].items()}
        load = MachineLoad.from_json(data.get("load"))
        return cls(data["device"], data["threads"], gates, widest, cheapest, ideal, data.get("split", "test"), load)


@dataclass(frozen=True)
class Verified:
    """What the verify stage found."""

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
        """On the main device."""
        return self.latencies[MAIN_DEVICE]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Verified:
        """Rebuild it from verify.json."""
        return cls(
            front=tuple(data["front"]),
            contenders=tuple(BudgetPick(**item) for item in data["contenders"]),
            val=SplitAnalysis.from_json(data["val"]),
            test=SplitAnalysis.from_json(data["test"]),
            latencies={name: DynamicLatency.from_json(item) for name, item in data["latencies"].items()},
            agreements=tuple(Agreement(**item) for item in data["agreements"]),
            num_openings=data["num_openings"],
        )
