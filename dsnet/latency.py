"""Latency as a person meets it: named device, fixed threads, warm-up, interleaved repeats, median and interquartile range."""

from __future__ import annotations

import math
import os
import platform
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dsnet.errors import ConfigError
from dsnet.materialize import PlainSubnet
from dsnet.route_tree import RouteTree
from dsnet.segments import CutSegments, rows_by
from dsnet.strict_json import NumberRange
from dsnet.supernet import Supernet

MIN_REPEATS = 3
"""Fewer say nothing about spread."""
BUDGET_S = 120.0
TRUNK, DECIDE = "/trunk", "/decide"
"""Beside the names of tails, which are those of sub-networks and hold no slash."""


@dataclass(frozen=True)
class Timing:
    """Wall time of one call."""

    median_ms: float
    iqr_ms: float
    """Third minus first quartile."""
    repeats: int


@dataclass(frozen=True)
class LatencyTable:
    """What the parts of the dynamic network cost on one device (CONTRACTS, Latency)."""

    device: str
    """What it is, in words."""
    threads: int
    subnets: Mapping[int, Mapping[str, Timing]]
    """batch size -> sub-network -> the whole sub-network as a plain module with folded BatchNorm."""
    trunk: Mapping[int, Timing]
    """n images -> the shared trunk."""
    decide: Mapping[int, Timing]
    """n images -> a slimming head over all routes, its argmax on the host, and the grouping."""
    tails: Mapping[int, Mapping[str, Timing]]
    """n images -> route -> its tail."""

    def batch1_ms(self, runs: NDArray[np.float64], routes: Sequence[str]) -> float:
        """Ideal latency at batch 1: trunk + decide + the tails that run.

        Args:
            runs: [K] share of the images that run each route; a cascade's add up to more than one.
            routes: their K names.
        """
        tails = np.array([self.tails[1][name].median_ms for name in routes])
        return self.trunk[1].median_ms + self.decide[1].median_ms + float(runs @ tails)

    def ideal_ms(self, batch_size: int, runs: NDArray[np.float64], routes: Sequence[str]) -> float:
        """Ideal latency of a batch of random images: trunk + decide + the expected time of each tail over its binomial group size.

        Args:
            batch_size: B; between the measured sizes times are interpolated, beyond them they grow in proportion.
            runs: [K] share of the images that run each route.
            routes: their K names.
        """
        sizes = np.arange(batch_size + 1)
        total = float(_at(self.trunk, sizes)[-1] + _at(self.decide, sizes)[-1])
        for share, name in zip(runs, routes, strict=True):
            row = {size: tails[name] for size, tails in self.tails.items()}
            total += float(_binomial(batch_size, float(share)) @ _at(row, sizes))
        return total

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
        )


def _at(measured: Mapping[int, Timing], sizes: NDArray[np.int64]) -> NDArray[np.float64]:
    """Milliseconds for numbers of images 0, 1, ...: none for 0, linear between the measured numbers, in proportion beyond the last."""
    known = sorted(measured)
    ms = np.interp(sizes, known, [measured[size].median_ms for size in known])
    return np.where(sizes == 0, 0.0, ms * np.maximum(sizes / known[-1], 1.0))


def _binomial(count: int, share: float) -> NDArray[np.float64]:
    """[count + 1] the probability that so many of `count` images run a route that a share of all images runs."""
    if not 0.0 < share < 1.0:
        return np.eye(count + 1)[count if share >= 1.0 else 0]
    rest = math.log1p(-share)
    logs = [
        math.lgamma(count + 1)
        - math.lgamma(n + 1)
        - math.lgamma(count - n + 1)
        + n * math.log(share)
        + (count - n) * rest
        for n in range(count + 1)
    ]
    return np.exp(logs)


def device_name(device: torch.device | str) -> str:
    """The device in words: the GPU's or the processor's own name and how many cores are usable."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.machine())}, {len(os.sched_getaffinity(0))} cores"


def time_interleaved(
    calls: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int,
    budget_s: float = math.inf,
    synchronize: Callable[[], None] = lambda: None,
    before_each: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Time several calls side by side: each round runs all of them, in a fresh random order, so that drift hits all alike.

    Args:
        calls: what to time, by name.
        repeats: rounds that count.
        warmup: rounds before these.
        budget_s: where this does not suffice, fewer rounds, but no fewer than `MIN_REPEATS` of those asked for.
        synchronize: waits until the device is done.
        before_each: runs untimed before every call; it may raise to give up.
    """
    order = list(calls)
    shuffle = random.Random(0)
    samples: dict[str, list[float]] = {name: [] for name in order}
    for counts in _rounds(repeats, warmup, budget_s):
        shuffle.shuffle(order)
        for name in order:
            before_each()
            synchronize()
            start = time.perf_counter()
            calls[name]()
            synchronize()
            if counts:
                samples[name].append((time.perf_counter() - start) * 1e3)
    timings = {}
    for name, values in samples.items():
        first, median, third = np.percentile(values, [25, 50, 75])
        timings[name] = Timing(float(median), float(third - first), len(values))
    return timings


def _rounds(repeats: int, warmup: int, budget_s: float) -> Iterator[bool]:
    """For each round whether it counts; warm-up takes no more than a quarter of the budget, but a round."""
    start = time.monotonic()
    for number in range(warmup):
        if number and time.monotonic() - start > budget_s / 4:
            break
        yield False
    for number in range(repeats):
        if number >= MIN_REPEATS and time.monotonic() - start > budget_s:
            break
        yield True


@dataclass(frozen=True, kw_only=True)
class LatencySettings:
    """What to time."""

    device: str = "cpu"
    threads: int = 1
    batch_sizes: tuple[int, ...] = (1, 64)
    """For whole sub-networks; increasing."""
    group_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    """For trunk, decision and tails; increasing from 1."""
    repeats: int = 15
    warmup: int = 3

    def __post_init__(self) -> None:
        count, count_from_0 = NumberRange(lowest=1, is_whole=True), NumberRange(lowest=0, is_whole=True)
        count.check("measure.threads", self.threads)
        count.check("measure.repeats", self.repeats)
        count_from_0.check("measure.warmup", self.warmup)
        for name, sizes in (("batch_sizes", self.batch_sizes), ("group_sizes", self.group_sizes)):
            if not sizes:
                raise ConfigError(f"measure.{name} must hold at least 1 entries; got 0")
            for size in sizes:
                count.check(f"measure.{name}", size)
            ordered = sorted(set(sizes))
            if list(sizes) != ordered:
                raise ConfigError(f"measure.{name}: sizes must increase; got {list(sizes)}, write {ordered}")
        if self.group_sizes[0] != 1:
            raise ConfigError(f"measure.group_sizes must start at 1; got {list(self.group_sizes)}")


@torch.inference_mode()
def measure_latency(
    supernet: Supernet,
    image_size: int,
    settings: LatencySettings,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    before_each: Callable[[], None] = lambda: None,
    budget_s: float = BUDGET_S,
) -> LatencyTable:
    """Time every sub-network and every part of the dynamic network on random images; restores the process's thread count.

    Args:
        supernet: trained; paths through several gates are timed as what they share, put together.
        image_size: side in pixels.
        settings: device, threads, sizes, repeats.
        on_progress: hears (sizes done, sizes in all).
        before_each: runs untimed before every timed call; it may raise to give up.
        budget_s: seconds for all sizes together, shared evenly; many paths or large images then have fewer repeats than asked for.
    """
    device = torch.device(settings.device)
    parts = _Parts(supernet.to(device).eval(), image_size, device)
    total = len(settings.batch_sizes) + len(settings.group_sizes)
    done = 0

    def timed(calls: Mapping[str, Callable[[], object]]) -> dict[str, Timing]:
        nonlocal done
        timings = time_interleaved(
            calls,
            repeats=settings.repeats,
            warmup=settings.warmup,
            budget_s=budget_s / total,
            synchronize=waiter(device),
            before_each=before_each,
        )
        done += 1
        on_progress(done, total)
        return timings

    threads_before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        subnets = {size: timed(parts.whole_calls(size)) for size in settings.batch_sizes}
        rows = {size: timed(parts.part_calls(size)) for size in settings.group_sizes}
    finally:
        torch.set_num_threads(threads_before)
    return LatencyTable(
        device=device_name(device),
        threads=settings.threads,
        subnets=subnets,
        trunk={size: row.pop(TRUNK) for size, row in rows.items()},
        decide={size: row.pop(DECIDE) for size, row in rows.items()},
        tails=rows,
    )


class _Parts:
    """What is timed: shared segments, put together to tails and whole sub-networks; every one on the same random images."""

    def __init__(self, supernet: Supernet, image_size: int, device: torch.device) -> None:
        members = supernet.subnets.members
        segments = CutSegments(supernet, RouteTree.of(supernet.subnets))
        self.trunk = segments.trunk
        self.tails = {subnet.name: segments.tail(route) for route, subnet in enumerate(members)}
        self.whole = {name: PlainSubnet(self.trunk, tail).eval() for name, tail in self.tails.items()}
        self.head = torch.zeros(len(members), supernet.spec.gates[0].hidden, dtype=torch.float64, device=device)
        self.generator = torch.Generator().manual_seed(0)
        self.shape = (supernet.spec.in_channels, image_size, image_size)
        self.device = device

    def _images(self, size: int) -> torch.Tensor:
        return torch.randn((size, *self.shape), generator=self.generator).to(self.device)

    def whole_calls(self, size: int) -> dict[str, Callable[[], object]]:
        """Every sub-network."""
        images = self._images(size)
        return {name: _bind(module, images) for name, module in self.whole.items()}

    def part_calls(self, size: int) -> dict[str, Callable[[], object]]:
        """Every tail, the trunk and the decision."""
        images = self._images(size)
        output = self.trunk(images)
        calls = {name: _bind(tail, output.features) for name, tail in self.tails.items()}
        return {**calls, TRUNK: _bind(self.trunk, images), DECIDE: _decision(self.head, output.hidden)}


def _bind(module: Callable[[torch.Tensor], object], argument: torch.Tensor) -> Callable[[], object]:
    return lambda: module(argument)


def _decision(head: torch.Tensor, hidden: torch.Tensor) -> Callable[[], object]:
    return lambda: rows_by((hidden.double() @ head.T).argmax(1).tolist())


def waiter(device: torch.device) -> Callable[[], None]:
    """What waits until the device has done all that it was given."""
    return torch.cuda.synchronize if device.type == "cuda" else _no_wait


def _no_wait() -> None:
    """The CPU has nothing to wait for."""
