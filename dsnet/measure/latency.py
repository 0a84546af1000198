"""Measurement of latency on a named device with a fixed number of threads: warm-up, interleaved
repeats, median and interquartile range."""

from __future__ import annotations

import math
import os
import platform
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from dsnet.deploy.engines import Engine, timing_engine
from dsnet.deploy.materialize import PlainSubnet
from dsnet.deploy.segments import CutSegments
from dsnet.image_size import ImageSize, height_and_width
from dsnet.measure.decision_timing import decision_calls, timed_routers
from dsnet.measure.engine_parts import EngineParts, TimedEntry
from dsnet.measure.latency_table import PUBLISHED, LatencyTable, MachineLoad, Timing
from dsnet.measure.settings import LatencySettings
from dsnet.network.supernet import Supernet
from dsnet.space.route_tree import RouteTree

MIN_REPEATS = 3
"""Fewest repeats from which the spread of a time can be estimated."""
BUDGET_S = 120.0
"""Default time for all measurements on one device, in seconds."""
TRUNK, DECIDE, ENTRY = "/trunk", "/decide/", "/entry/"
"""Names of the timed calls of the trunk and of decisions; the kind of router follows the second.
Tails are named like sub-networks, whose names hold no slash."""


Rounds = Mapping[int, Mapping[str, tuple[float, ...]]]
"""n images -> call -> milliseconds in each round. All calls of a size were run in the same
rounds."""


@dataclass(frozen=True)
class LatencySamples:
    """All single times of a measurement, of which a `LatencyTable` has the medians."""

    device: str
    """See `LatencyTable.device`."""
    threads: int
    whole: Rounds
    """batch size -> whole sub-network -> its times."""
    parts: Rounds
    """n images -> trunk (`TRUNK`), decisions and the tail of each route -> their times.

    A decision is `DECIDE` with the kind of router; where it is in a graph of an engine, it is
    `ENTRY` with the kind, a slash, and the route that runs before it, if any: the time of
    everything up to it."""
    load: MachineLoad | None = None

    @property
    def has_decisions(self) -> bool:
        """Whether decisions were timed; else they count as 0 ms."""
        return any(name.startswith((DECIDE, ENTRY)) for row in self.parts.values() for name in row)

    def table(self) -> LatencyTable:
        """The table of the medians."""
        return self._table(_timings(self.whole), _timings(_with_decisions(self.parts)))

    def resampled(self, rng: np.random.Generator) -> LatencyTable:
        """The table of rounds that are drawn with replacement, for each size on its own; the calls
        of a size keep their common rounds."""
        parts = _with_decisions(_drawn(self.parts, rng))
        return self._table(_timings(_drawn(self.whole, rng)), _timings(parts))

    def _table(
        self, subnets: Mapping[int, Mapping[str, Timing]], parts: Mapping[int, Mapping[str, Timing]]
    ) -> LatencyTable:
        rows = {size: dict(row) for size, row in parts.items()}
        kinds = [name.removeprefix(DECIDE) for name in rows[1] if name.startswith(DECIDE)]
        decisions = {kind: {size: row.pop(DECIDE + kind) for size, row in rows.items()} for kind in kinds}
        trunk = {size: row.pop(TRUNK) for size, row in rows.items()}
        untimed = {size: Timing(0.0, 0.0, timing.repeats) for size, timing in trunk.items()}
        return LatencyTable(
            device=self.device,
            threads=self.threads,
            subnets=subnets,
            trunk=trunk,
            decide=decisions.pop(PUBLISHED, untimed),
            tails=rows,
            decisions=decisions,
            load=self.load,
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON-able mapping."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LatencySamples:
        """Rebuild it from `to_json`."""

        def rounds(name: str) -> Rounds:
            return {int(n): {call: tuple(ms) for call, ms in row.items()} for n, row in data[name].items()}

        load = MachineLoad.from_json(data["load"])
        return cls(data["device"], data["threads"], rounds("whole"), rounds("parts"), load)


def _with_decisions(parts: Rounds) -> Rounds:
    """The times of parts with those of decisions in place of those of graphs up to decisions: what
    such a graph takes longer than its trunk and the tail that it runs. It may be negative, because
    one call is faster than two."""
    found = {}
    for size, row in parts.items():
        found[size] = {name: times for name, times in row.items() if not name.startswith(ENTRY)}
        for name, times in row.items():
            if name.startswith(ENTRY):
                kind, _, first = name.removeprefix(ENTRY).partition("/")
                without = np.add(row[TRUNK], row[first]) if first else np.asarray(row[TRUNK])
                found[size][DECIDE + kind] = tuple((np.asarray(times) - without).tolist())
    return found


def _timings(rounds: Rounds) -> dict[int, dict[str, Timing]]:
    return {size: Timing.by_call(row) for size, row in rounds.items()}


def _drawn(rounds: Rounds, rng: np.random.Generator) -> Rounds:
    drawn = {}
    for size, row in rounds.items():
        count = len(next(iter(row.values())))
        chosen = rng.integers(count, size=count)
        drawn[size] = {name: tuple(times[index] for index in chosen) for name, times in row.items()}
    return drawn


def device_name(device: torch.device | str, engine: Engine | None = None) -> str:
    """The model of the device: the name of the GPU, or that of the processor and the number of
    usable cores; and the engine that runs on it, if it is not torch."""
    model = _device_model(device)
    return model if engine is None else f"{model}, {engine.title}"


def _device_model(device: torch.device | str) -> str:
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
    """Summaries of the times of `time_rounds`, whose arguments it takes."""
    times = time_rounds(
        calls, repeats=repeats, warmup=warmup, budget_s=budget_s, synchronize=synchronize, before_each=before_each
    )
    return Timing.by_call(times)


def time_rounds(
    calls: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int,
    budget_s: float = math.inf,
    synchronize: Callable[[], None] = lambda: None,
    before_each: Callable[[], None] = lambda: None,
) -> dict[str, tuple[float, ...]]:
    """Time several calls interleaved: each round runs all of them, in a new random order, so that
    drift affects all alike.

    Args:
        calls: the calls to time, by name.
        repeats: number of timed rounds.
        warmup: number of rounds before these, which are not timed.
        budget_s: time limit in seconds, after which no further round starts; `MIN_REPEATS` rounds,
            or `repeats` if these are fewer, are timed in any case.
        synchronize: waits until the device has finished.
        before_each: called, untimed, before every call; it may raise to stop.

    Returns:
        the milliseconds of each call in every round.
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
    return {name: tuple(values) for name, values in samples.items()}


def _rounds(repeats: int, warmup: int, budget_s: float) -> Iterator[bool]:
    """Yield for each round whether it is timed; after the first warm-up round, another starts only
    within a quarter of the budget."""
    start = time.monotonic()
    for number in range(warmup):
        if number and time.monotonic() - start > budget_s / 4:
            break
        yield False
    for number in range(repeats):
        if number >= MIN_REPEATS and time.monotonic() - start > budget_s:
            break
        yield True


def measure_latency(
    supernet: Supernet,
    image_size: ImageSize,
    settings: LatencySettings,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    before_each: Callable[[], None] = lambda: None,
    budget_s: float = BUDGET_S,
) -> LatencyTable:
    """The table of `measure_samples`, whose arguments it takes."""
    return measure_samples(supernet, image_size, settings, on_progress, before_each, budget_s).table()


@torch.inference_mode()
def measure_samples(
    supernet: Supernet,
    image_size: ImageSize,
    settings: LatencySettings,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    before_each: Callable[[], None] = lambda: None,
    budget_s: float = BUDGET_S,
) -> LatencySamples:
    """Time every sub-network and every part of the dynamic network on random images, on the main
    device of `settings`; the number of threads of the process is restored afterwards.

    Args:
        supernet: trained; paths through several gates are timed as sequences of the segments that
            they share.
        image_size: size of the images.
        settings: device, engine, threads, sizes, repeats.
        on_progress: called with (sizes done, sizes in all).
        before_each: called, untimed, before every timed call; it may raise to stop.
        budget_s: seconds for all sizes together, shared evenly; many paths or large images then
            have fewer repeats than `settings` asks for.

    Raises:
        ConfigError: the package of the engine is not installed.
        DsnetError: the network cannot be exported for the engine.
    """
    device, engine = torch.device(settings.device), timing_engine(settings.engine)
    supernet = supernet.to(device).eval()
    parts = _Parts(supernet, image_size, device, engine, settings.threads)
    total = settings.num_rounds
    done = 0

    def timed(calls: Mapping[str, Callable[[], object]]) -> dict[str, tuple[float, ...]]:
        nonlocal done
        times = time_rounds(
            calls,
            repeats=settings.repeats,
            warmup=settings.warmup,
            budget_s=budget_s / total,
            synchronize=waiter(device),
            before_each=before_each,
        )
        done += 1
        on_progress(done, total)
        return times

    threads_before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        whole = {size: timed(parts.whole_calls(size)) for size in settings.batch_sizes}
        rows = {size: timed(parts.part_calls(size)) for size in settings.group_sizes}
    finally:
        torch.set_num_threads(threads_before)
    return LatencySamples(device_name(device, engine), settings.threads, whole, rows, MachineLoad.now())


class _Parts:
    """The calls that are timed: trunk, tails, decisions and whole sub-networks, as modules composed
    of shared segments or as the graphs of an engine; all calls of a batch size get the same random
    images. Decisions that cannot be in a graph run in torch with every engine."""

    def __init__(
        self, supernet: Supernet, image_size: ImageSize, device: torch.device, engine: Engine | None, threads: int
    ) -> None:
        self.segments = CutSegments(supernet, RouteTree.of(supernet.subnets))
        self.generator = torch.Generator().manual_seed(0)
        self.shape = (supernet.spec.in_channels, *height_and_width(image_size))
        self.device = device
        routers = timed_routers(
            supernet.spec, self.segments, self.segments.trunk(torch.zeros((1, *self.shape), device=device))
        )
        parts = (
            _torch_parts(supernet, self.segments)
            if engine is None
            else EngineParts.open(supernet, image_size, engine, threads, routers)
        )
        self.trunk, self.tails, self.whole, self.entries = parts.trunk, parts.tails, parts.whole, parts.entries
        self.in_torch = {kind: router for kind, router in routers.items() if kind not in self.entries}

    def _images(self, size: int) -> torch.Tensor:
        return torch.randn((size, *self.shape), generator=self.generator).to(self.device)

    def whole_calls(self, size: int) -> dict[str, Callable[[], object]]:
        """Calls of every sub-network on `size` images."""
        images = self._images(size)
        return {name: _bind(module, images) for name, module in self.whole.items()}

    def part_calls(self, size: int) -> dict[str, Callable[[], object]]:
        """Calls of every tail, of the trunk and of the decisions of each kind of router, on `size`
        images."""
        images = self._images(size)
        features = self.trunk(images).features
        calls: dict[str, Callable[[], object]] = {name: _bind(tail, features) for name, tail in self.tails.items()}
        logits = next(iter(self.tails.values()))(features)
        decisions = decision_calls(self.in_torch, self.segments, self.segments.trunk(images), logits)
        return {
            **calls,
            TRUNK: _bind(self.trunk, images),
            **{DECIDE + kind: decide for kind, decide in decisions.items()},
            **{f"{ENTRY}{kind}/{entry.first or ''}": _bind(entry.call, images) for kind, entry in self.entries.items()},
        }


class _TorchParts(NamedTuple):
    """See `EngineParts`."""

    trunk: nn.Module
    tails: Mapping[str, nn.Module]
    whole: Mapping[str, nn.Module]
    entries: Mapping[str, TimedEntry] = MappingProxyType({})


def _torch_parts(supernet: Supernet, segments: CutSegments) -> _TorchParts:
    tails = {subnet.name: segments.tail(route) for route, subnet in enumerate(supernet.subnets.members)}
    whole = {name: PlainSubnet(segments.trunk, tail).eval() for name, tail in tails.items()}
    return _TorchParts(segments.trunk, tails, whole)


def _bind(module: Callable[[torch.Tensor], object], argument: torch.Tensor) -> Callable[[], object]:
    return lambda: module(argument)


def waiter(device: torch.device) -> Callable[[], None]:
    """A function that waits until the device has finished all its work."""
    return torch.cuda.synchronize if device.type == "cuda" else _no_wait


def _no_wait() -> None:
    """Do nothing: calls on the CPU are synchronous."""
