"""Latency as a person meets it: named device, fixed threads, warm-up, interleaved repeats, median and interquartile range."""

from __future__ import annotations

import os
import platform
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dsnet.errors import ConfigError
from dsnet.materialize import PlainSubnet, materialize_tail, materialize_trunk
from dsnet.strict_json import NumberRange
from dsnet.supernet import Supernet


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
    """n images -> a slimming head over all routes, its argmax, and the grouping."""
    tails: Mapping[int, Mapping[str, Timing]]
    """n images -> route -> its tail."""

    def batch1_ms(self, histogram: NDArray[np.float64], routes: Sequence[str]) -> float:
        """Ideal latency at batch 1: trunk + decide + the histogram's mean of the tails."""
        tails = np.array([self.tails[1][name].median_ms for name in routes])
        return self.trunk[1].median_ms + self.decide[1].median_ms + float(histogram @ tails)

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
    synchronize: Callable[[], None] = lambda: None,
    before_each: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Time several calls side by side: each round runs all of them, in a fresh random order, so that drift hits all alike.

    `before_each` runs untimed before every call; it may raise to give up.
    """
    order = list(calls)
    shuffle = random.Random(0)
    samples: dict[str, list[float]] = {name: [] for name in order}
    for round_number in range(warmup + repeats):
        shuffle.shuffle(order)
        for name in order:
            before_each()
            synchronize()
            start = time.perf_counter()
            calls[name]()
            synchronize()
            if round_number >= warmup:
                samples[name].append((time.perf_counter() - start) * 1e3)
    timings = {}
    for name, values in samples.items():
        first, median, third = np.percentile(values, [25, 50, 75])
        timings[name] = Timing(float(median), float(third - first), repeats)
    return timings


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
) -> LatencyTable:
    """Time every sub-network and every part of the dynamic network on random images; restores the process's thread count.

    Args:
        supernet: trained, with one gate.
        image_size: side in pixels.
        settings: device, threads, sizes, repeats.
        on_progress: hears (sizes done, sizes in all).
        before_each: runs untimed before every timed call; it may raise to give up.
    """
    device = torch.device(settings.device)
    supernet = supernet.to(device).eval()
    members = supernet.subnets.members
    trunk = materialize_trunk(supernet, members[0], fold_bn=True)
    tails = {subnet.name: materialize_tail(supernet, subnet, fold_bn=True) for subnet in members}
    whole = {name: PlainSubnet(trunk, tail).eval() for name, tail in tails.items()}
    head = torch.zeros(len(members), supernet.spec.gates[0].hidden, dtype=torch.float64, device=device)
    generator = torch.Generator().manual_seed(0)
    shape = (supernet.spec.in_channels, image_size, image_size)
    synchronize = waiter(device)
    total = len(settings.batch_sizes) + len(settings.group_sizes)
    subnets: dict[int, dict[str, Timing]] = {}
    parts: dict[int, dict[str, Timing]] = {}
    threads_before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        for size in settings.batch_sizes:
            images = torch.randn((size, *shape), generator=generator).to(device)
            calls = {name: _bind(module, images) for name, module in whole.items()}
            subnets[size] = time_interleaved(
                calls,
                repeats=settings.repeats,
                warmup=settings.warmup,
                synchronize=synchronize,
                before_each=before_each,
            )
            on_progress(len(subnets), total)
        for size in settings.group_sizes:
            images = torch.randn((size, *shape), generator=generator).to(device)
            output = trunk(images)
            calls = {name: _bind(tail, output.features) for name, tail in tails.items()}
            calls |= {"/trunk": _bind(trunk, images), "/decide": _decision(head, output.hidden)}
            parts[size] = time_interleaved(
                calls,
                repeats=settings.repeats,
                warmup=settings.warmup,
                synchronize=synchronize,
                before_each=before_each,
            )
            on_progress(len(subnets) + len(parts), total)
    finally:
        torch.set_num_threads(threads_before)
    return LatencyTable(
        device=device_name(device),
        threads=settings.threads,
        subnets=subnets,
        trunk={size: row["/trunk"] for size, row in parts.items()},
        decide={size: row["/decide"] for size, row in parts.items()},
        tails={size: {name: row[name] for name in tails} for size, row in parts.items()},
    )


def _bind(module: Callable[[torch.Tensor], object], argument: torch.Tensor) -> Callable[[], object]:
    return lambda: module(argument)


def _decision(head: torch.Tensor, hidden: torch.Tensor) -> Callable[[], object]:
    def decide() -> object:
        routes = (hidden.double() @ head.T).argmax(1)
        return torch.unique_consecutive(routes[torch.argsort(routes)], return_counts=True)

    return decide


def waiter(device: torch.device) -> Callable[[], None]:
    """What waits until the device has done all that it was given."""
    return torch.cuda.synchronize if device.type == "cuda" else _no_wait


def _no_wait() -> None:
    """The CPU has nothing to wait for."""
