"""Measurement of latency on a named device with a fixed number of threads: warm-up, interleaved
repeats, median and interquartile range."""

from __future__ import annotations

import math
import os
import platform
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float64
from numpy.typing import NDArray
from torch import nn

from dsnet.deploy.engines import Engine, timing_engine
from dsnet.deploy.materialize import PlainSubnet
from dsnet.deploy.segments import CutSegments
from dsnet.image_size import ImageSize, height_and_width
from dsnet.measure.decision_timing import decision_calls, timed_routers
from dsnet.measure.engine_parts import EngineParts, TimedEntry
from dsnet.measure.settings import MAIN_DEVICE, LatencySettings
from dsnet.metrics import DEVICE_NAME_PATTERN
from dsnet.network.supernet import Supernet
from dsnet.space.route_tree import RouteTree

MIN_REPEATS = 3
"""Fewest repeats from which the spread of a time can be estimated."""
BUDGET_S = 120.0
"""Default time for all measurements on one device, in seconds."""
TRUNK, DECIDE, ENTRY = "/trunk", "/decide/", "/entry/"
"""Names of the timed calls of the trunk and of decisions; the kind of router follows the second.
Tails are named like sub-networks, whose names hold no slash."""
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
