"""Common parts of all benchmarks: options, machine facts, paired timing with intervals, child
processes for peak memory, tables, JSON."""

from __future__ import annotations

import importlib
import math
import multiprocessing
import os
import pkgutil
import platform
import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from dsnet.arithmetic import arithmetic_facts
from dsnet.files import atomic_write_json
from dsnet.measure.latency import device_name, time_interleaved
from search.front.statistics import bootstrap_interval

NUM_RESAMPLES = 2000
MIN_ROUNDS = 5
"""Fewest rounds from which the spread can be estimated."""
TABLE_WIDTH = 160
"""Width in characters of tables that are not written to a terminal."""
DISTRIBUTIONS = ("torch", "numpy", "ray", "optuna", "mlflow", "pandas", "plotly", "click", "pydantic")
"""Distributions whose versions are recorded."""


@dataclass(frozen=True)
class Options:
    """Common options of the command line."""

    quick: bool
    threads: int
    """Number of torch's intra-op threads."""
    seed: int


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % bootstrap interval over rounds."""

    value: float
    low: float
    high: float

    @classmethod
    def exact(cls, value: float) -> Estimate:
        """A figure without an interval."""
        return cls(value, value, value)

    def text(self, digits: int = 3) -> str:
        """The estimate as text, `value [low, high]`."""
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


@dataclass(frozen=True)
class Headline:
    """The main figure of a benchmark; smaller is better."""

    label: str
    estimate: Estimate
    unit: str
    """Unit with its leading space, such as ` s`; empty for a ratio."""
    goal: float

    def text(self) -> str:
        """The last line that a benchmark prints."""
        share = self.estimate.value / self.goal
        return f"{self.label}: {self.estimate.text()}{self.unit}, {share:.2f} x the goal of at most {self.goal:g}{self.unit}"


@dataclass(frozen=True)
class Section:
    """A table to print; the JSON file gets its figures from `Report.figures`."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Report:
    """Results of a benchmark."""

    sections: Sequence[Section]
    headline: Headline
    figures: Mapping[str, Any]
    """All figures, JSON-able, with times in the unit that the key names."""


class Samples:
    """Milliseconds of several calls, [rounds] each; the calls of a round ran one after
    the other, so that differences are paired."""

    def __init__(self, ms: Mapping[str, NDArray[np.float64]]) -> None:
        self.ms = dict(ms)

    @property
    def num_rounds(self) -> int:
        """Number of times that each call was timed."""
        return len(next(iter(self.ms.values())))

    def median_ms(self, name: str) -> Estimate:
        """The median over rounds."""
        return _estimate(lambda rows: np.median(self.ms[name][rows], axis=-1), len(self.ms[name]))

    def in_seconds(self, name: str) -> Estimate:
        """The median in seconds."""
        ms = self.median_ms(name)
        return Estimate(ms.value / 1e3, ms.low / 1e3, ms.high / 1e3)

    def per_second(self, name: str) -> Estimate:
        """Calls a second one after another: rounds over their total time."""
        return _estimate(lambda rows: 1e3 / np.mean(self.ms[name][rows], axis=-1), len(self.ms[name]))

    def ratio(self, numerator: Sequence[str], denominator: Sequence[str]) -> Estimate:
        """Ratio of the median of the sum of some calls to that of others, with rounds resampled
        jointly."""
        top = np.sum([self.ms[name] for name in numerator], axis=0)
        bottom = np.sum([self.ms[name] for name in denominator], axis=0)
        return _estimate(lambda rows: np.median(top[rows], axis=-1) / np.median(bottom[rows], axis=-1), len(top))

    def iqr_ms(self, name: str) -> float:
        """Third minus first quartile."""
        first, third = np.percentile(self.ms[name], [25, 75])
        return float(third - first)

    def fastest_ms(self, name: str) -> float:
        """The smallest sample: nearest to an undisturbed machine."""
        return float(self.ms[name].min())

    def figures(self) -> dict[str, Any]:
        """Median, interval, quartile range and every sample of each call, for the JSON file."""
        return {
            name: {
                "median_ms": asdict(self.median_ms(name)),
                "iqr_ms": self.iqr_ms(name),
                "samples_ms": values.tolist(),
            }
            for name, values in self.ms.items()
        }


def _estimate(statistic: Callable[[NDArray[np.int64]], NDArray[np.float64]], num_rounds: int) -> Estimate:
    """A statistic of rows with its percentile bootstrap interval."""
    resamples = np.random.default_rng(0).integers(num_rounds, size=(NUM_RESAMPLES, num_rounds))
    low, high = bootstrap_interval(statistic(resamples))
    return Estimate(float(statistic(np.arange(num_rounds))), float(low), float(high))


def sample_interleaved(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int,
    budget_s: float = math.inf,
    device: torch.device | str = "cpu",
) -> Samples:
    """Time calls interleaved, each round in a new order, and keep every round (which
    `time_interleaved` summarises).

    Args:
        calls: the calls to time, by name.
        rounds: number of rounds that are kept.
        warmup: number of rounds before these, which are not kept.
        budget_s: time limit in seconds, after which no further round starts, but with no fewer than
            `MIN_ROUNDS` rounds.
        device: device on which the calls run.
    """
    order = list(calls)
    shuffle = random.Random(0)
    synchronize = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    rows: dict[str, list[float]] = {name: [] for name in order}
    deadline = time.monotonic() + budget_s
    for number in range(warmup + rounds):
        if number >= warmup + MIN_ROUNDS and time.monotonic() > deadline:
            break
        shuffle.shuffle(order)
        timings = time_interleaved({name: calls[name] for name in order}, repeats=1, warmup=0, synchronize=synchronize)
        if number >= warmup:
            for name in order:
                rows[name].append(timings[name].median_ms)
    return Samples({name: np.array(values) for name, values in rows.items()})


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Result of a module-level function in a new interpreter, for measuring peak memory, which
    never decreases within a process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def memory_mib(field: str) -> float:
    """`VmRSS` (resident now) or `VmHWM` (peak so far) of this process, in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    kib = next(line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return int(kib) / 1024


def devices() -> list[torch.device]:
    """The CPU, and the GPU if there is one."""
    return [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()


def machine_facts() -> dict[str, Any]:
    """Facts about the machine and the software on which figures depend."""
    return {
        "devices": [device_name(device) for device in devices()],
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        **arithmetic_facts(),
    }


def versions() -> dict[str, str]:
    """Python's and the installed distributions' versions."""
    installed = {}
    for name in DISTRIBUTIONS:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), **installed}


def find_benchmarks() -> dict[str, str]:
    """Name -> description of every module of this package that has a `BENCHMARK`."""
    package = importlib.import_module("benchmarks")
    names = sorted(found.name for found in pkgutil.iter_modules(package.__path__) if not found.name.startswith("_"))
    modules = {name: importlib.import_module(f"benchmarks.{name}") for name in names}
    return {name: module.BENCHMARK for name, module in modules.items() if hasattr(module, "BENCHMARK")}


def run_benchmark(
    description: str, measure: Callable[..., Report], *, threads: int = 2, params: Sequence[click.Parameter] = ()
) -> None:
    """Run a benchmark from the command line.

    Args:
        description: the module's `BENCHMARK`.
        measure: runs the benchmark, with the `Options` and, by name, the values of `params`.
        threads: default of `--threads`.
        params: the benchmark's own options.
    """

    @click.command(help=description)
    @click.option("--quick", is_flag=True, help="Smaller inputs or fewer rounds: ends within a minute on 2 cores.")
    @click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write every figure to this file.")
    @click.option("--threads", default=threads, show_default=True, type=click.IntRange(1), help="Threads of torch.")
    @click.option("--seed", default=0, show_default=True)
    def command(quick: bool, json_path: Path | None, threads: int, seed: int, **own: Any) -> None:
        options = Options(quick, threads, seed)
        torch.set_num_threads(threads)
        load_before = os.getloadavg()[0]
        report = measure(options, **own)
        show(report.sections)
        if json_path is not None:
            record = {
                "description": description,
                "options": {
                    **asdict(options),
                    **{name: None if value is None else str(value) for name, value in own.items()},
                },
                "machine": machine_facts(),
                "versions": versions(),
                "load_average_1min": {"before": load_before, "after": os.getloadavg()[0]},
                "headline": asdict(report.headline),
                "figures": report.figures,
            }
            atomic_write_json(json_path, record)
        print(report.headline.text())

    command.params.extend(params)
    command()


def show(sections: Sequence[Section], file: IO[str] | None = None, width: int = TABLE_WIDTH) -> None:
    """Print tables.

    Args:
        sections: the tables.
        file: receives the text; None: the standard output.
        width: width in characters where it is not a terminal.
    """
    console = Console(highlight=False, markup=False, file=file)
    if not console.is_terminal:
        console.width = width
    for section in sections:
        table = Table(title=section.title, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for number, column in enumerate(section.columns):
            table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
        for row in section.rows:
            table.add_row(*row)
        console.print(table)
        console.print()
