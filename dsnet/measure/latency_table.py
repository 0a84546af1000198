"""Tables of measured latencies: their names, what is computed from them, and their noise. Needs no
torch."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float64
from numpy.typing import NDArray

from dsnet.measure.settings import MAIN_DEVICE
from dsnet.metrics import DEVICE_NAME_PATTERN

PUBLISHED = "gate"
"""The kind of router whose decision time is used for kinds that were not timed."""
DEVICE_NAME = re.compile(DEVICE_NAME_PATTERN)
"""Pattern of the names of further devices, which are used in metric names, expressions and file
names."""


def latency_metric(batch_size: int = 1, device: str = MAIN_DEVICE) -> str:
    """The name of a latency among the metrics: `latency_ms`, `latency_ms_batch64`,
    `latency_ms.server`, `latency_ms_batch64.server`.

    The metric is in milliseconds per call, on one image or on a whole batch of `batch_size`.
    """
    return ("latency_ms" if batch_size == 1 else f"latency_ms_batch{batch_size}") + (f".{device}" if device else "")


def latency_file(device: str = MAIN_DEVICE) -> str:
    """The file of a device's `LatencyTable` in the measure stage's folder."""
    return f"latency-{device}.json" if device else "latency.json"


def device_of(file: str) -> str | None:
    """The device whose table a file of the measure stage holds; None for another file."""
    found = re.fullmatch(rf"latency(?:-({DEVICE_NAME.pattern}))?\.json", file)
    return None if found is None else found[1] or MAIN_DEVICE


@dataclass(frozen=True)
class Timing:
    """Wall time of one call."""

    median_ms: float
    iqr_ms: float
    """Third minus first quartile."""
    repeats: int

    @classmethod
    def by_call(cls, times: Mapping[str, Sequence[float]]) -> dict[str, Timing]:
        """The summaries of the times of several calls in the same rounds, in milliseconds."""
        first, median, third = np.percentile(list(times.values()), [25, 50, 75], axis=1)
        spread = third - first
        return {
            name: cls(float(median[k]), float(spread[k]), len(values)) for k, (name, values) in enumerate(times.items())
        }


NOISY_SPREAD = 0.2
"""Times are noisy if the ratio of interquartile range to median of the typical call is above this:
sub-networks that differ by a tenth can then not be told apart. On an idle machine the ratio is a
few hundredths."""
BUSY_LOAD = 2.0
"""The machine is busy if the load average per core is above this. It is about 1 right after
training; twice as much must come from other programs."""


@dataclass(frozen=True)
class MachineLoad:
    """Load of the machine at the time of a measurement."""

    load_average: float
    """Number of processes running or waiting to run, averaged over the last minute."""
    num_cores: int
    """Number of cores that this process may use."""

    @classmethod
    def now(cls) -> MachineLoad | None:
        """The current load; None if the system does not report it."""
        try:
            return cls(os.getloadavg()[0], len(os.sched_getaffinity(0)))
        except OSError:
            return None

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | None) -> MachineLoad | None:
        """Rebuild a load from the result of `asdict`; None, as in timings of earlier releases,
        stays None."""
        return None if data is None else cls(**data)


def noise_of(timings: Iterable[Timing], load: MachineLoad | None) -> str | None:
    """Describe why times are unreliable: their spread, or the load of the machine; None if they are
    reliable.

    Args:
        timings: timings of comparable calls.
        load: load of the machine after the calls; None if it is not known.
    """
    shares = [timing.iqr_ms / timing.median_ms for timing in timings if timing.median_ms > 0]
    spread = float(np.median(shares)) if shares else 0.0
    is_busy = load is not None and load.load_average > BUSY_LOAD * load.num_cores
    if spread <= NOISY_SPREAD and not is_busy:
        return None
    told = [f"quartiles {spread:.0%} of the median apart"]
    if load is not None:
        told.append(f"load average {load.load_average:.1f} on {load.num_cores} cores")
    return ", ".join(told)


@dataclass(frozen=True)
class LatencyTable:
    """Times of sub-networks and of the parts of the dynamic network on one device
    (docs/definitions.md, Latency)."""

    device: str
    """The device's model and the engine, as `device_name` returns them."""
    threads: int
    subnets: Mapping[int, Mapping[str, Timing]]
    """batch size -> sub-network -> the whole sub-network as a plain module with folded BatchNorm,
    or as one graph of the engine."""
    trunk: Mapping[int, Timing]
    """n images -> the shared trunk."""
    decide: Mapping[int, Timing]
    """n images -> the published gate's decision: a slimming head over all routes, its argmax on the
    host, and the grouping."""
    tails: Mapping[int, Mapping[str, Timing]]
    """n images -> route -> its tail."""
    decisions: Mapping[str, Mapping[int, Timing]] = field(default_factory=dict)
    """Other kind of router -> n images -> all its decisions (`dsnet.measure.decision_timing`); a
    missing kind counts as the published one."""
    load: MachineLoad | None = None
    """Load of the machine after the measurement; None in tables of earlier releases."""

    @property
    def noise(self) -> str | None:
        """Why the times of whole sub-networks are unreliable; None if they are reliable."""
        return noise_of([timing for row in self.subnets.values() for timing in row.values()], self.load)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Sizes of batches that have a metric of their own: 1, and every size at which whole
        sub-networks were timed."""
        return tuple(sorted({1, *self.subnets}))

    def static_ms(self, subnet: str, batch_size: int = 1) -> float:
        """Milliseconds of a call of a whole sub-network, as measured; if batch size 1 was not
        measured, the sum of its trunk and its tail.

        Raises:
            KeyError: another batch size that was not measured.
        """
        if batch_size == 1 and 1 not in self.subnets:
            return self.trunk[1].median_ms + self.tails[1][subnet].median_ms
        return self.subnets[batch_size][subnet].median_ms

    def ideal_ms(
        self, batch_size: int, runs: Float64[np.ndarray, " routes"], routes: Sequence[str], kind: str = PUBLISHED
    ) -> float:
        """Ideal latency of a batch of random images: trunk + decide + the expected time of each
        tail over its binomial group size.

        Args:
            batch_size: B; between the measured sizes times are interpolated, beyond them they grow
                in proportion.
            runs: [K] share of the images that run each route.
            routes: the names of these K routes.
            kind: kind of router.

        Returns:
            milliseconds of the whole batch.
        """
        return self.clock(batch_size, routes).ms(runs, kind)

    def clock(self, batch_size: int, routes: Sequence[str]) -> BatchClock:
        """`ideal_ms` of one batch size, prepared for many routers over the same routes."""
        sizes = np.arange(batch_size + 1)
        rows = [{size: tails[name] for size, tails in self.tails.items()} for name in routes]
        return BatchClock(
            float(_at(self.trunk, sizes)[-1]),
            float(_at(self.decide, sizes)[-1]),
            {kind: float(_at(measured, sizes)[-1]) for kind, measured in self.decisions.items()},
            np.array([_at(row, sizes) for row in rows]),
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON-able mapping."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LatencyTable:
        """Rebuild a table from `to_json`."""
        return cls(
            device=data["device"],
            threads=data["threads"],
            subnets={
                int(n): {name: Timing(**item) for name, item in row.items()} for n, row in data["subnets"].items()
            },
            trunk={int(n): Timing(**item) for n, item in data["trunk"].items()},
            decide={int(n): Timing(**item) for n, item in data["decide"].items()},
            tails={int(n): {name: Timing(**item) for name, item in row.items()} for n, row in data["tails"].items()},
            # Tables of earlier releases have none: there every kind counts as the published gate.
            decisions={
                kind: {int(n): Timing(**item) for n, item in row.items()}
                for kind, row in data.get("decisions", {}).items()
            },
            load=MachineLoad.from_json(data.get("load")),
        )


@dataclass(frozen=True)
class BatchClock:
    """Times of the parts of the dynamic network for one batch of B images."""

    trunk_ms: float
    decide_ms: float
    """Decision of the published gate."""
    decisions_ms: Mapping[str, float]
    """All decisions of each other kind of router."""
    tails_ms: Float64[np.ndarray, "routes sizes"]
    """[K, B + 1]: the tail of each route for 0, 1, ..., B images."""

    def fixed_ms(self, kind: str = PUBLISHED) -> float:
        """Time that every batch takes whatever its routes: trunk and decisions."""
        return self.trunk_ms + self.decisions_ms.get(kind, self.decide_ms)

    def ms(self, runs: Float64[np.ndarray, " routes"], kind: str = PUBLISHED) -> float:
        """Ideal latency of a batch of random images; `runs` [K] are the shares of images that run
        each route."""
        return self.expected_ms(self.chances(runs), kind)

    def chances(self, runs: Float64[np.ndarray, " routes"]) -> Float64[np.ndarray, "routes sizes"]:
        """[K, B + 1]: the probability that 0, 1, ..., B images of the batch run each route."""
        return _binomials(self.tails_ms.shape[1] - 1, np.asarray(runs, dtype=np.float64))

    def expected_ms(self, chances: Float64[np.ndarray, "routes sizes"], kind: str = PUBLISHED) -> float:
        """`ms` with the probabilities that `chances` returns, which are the same for all clocks of
        a batch size."""
        return self.fixed_ms(kind) + float((chances * self.tails_ms).sum())


def _at(measured: Mapping[int, Timing], sizes: NDArray[np.int64]) -> NDArray[np.float64]:
    """Milliseconds for `sizes` images: 0 for none, linear between the measured numbers, in
    proportion beyond the last; below the first measured number, its own time."""
    known = sorted(measured)
    ms = np.interp(sizes, known, [measured[size].median_ms for size in known])
    return np.where(sizes == 0, 0.0, ms * np.maximum(sizes / known[-1], 1.0))


def _binomials(count: int, shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Binomial probabilities [K, count + 1] that 0, 1, ... of `count` images run a route, given the
    `shares` [K] of all images that run each route."""
    numbers = np.arange(count + 1)
    ways = np.array([math.lgamma(count + 1) - math.lgamma(n + 1) - math.lgamma(count - n + 1) for n in numbers])
    inside = np.clip(shares, np.finfo(np.float64).tiny, 1.0 - np.finfo(np.float64).epsneg)[:, None]
    chances = np.exp(ways + numbers * np.log(inside) + (count - numbers) * np.log1p(-inside))
    chances[shares <= 0.0] = np.eye(count + 1)[0]
    chances[shares >= 1.0] = np.eye(count + 1)[count]
    return chances
