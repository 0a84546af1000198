"""Number of trials that each sampler needs for 90, 95 and 99 % of the result of an exhaustive sweep
of the same space.

All points of a discrete space of gate settings are run on one pair of routing tables, and the
results are stored (`--cache`). Then every sampler searches that space by looking its trials up, so
that twenty seeds of each take minutes. There are two spaces: `routers` holds several kinds of
router, with settings that only some of them have; `gate` is one kind, all of whose settings always
apply.

The measure is hypervolume. Its reference is the worst value of each objective on the exhaustive
front, moved out by a tenth of the front's range, so that the ends of the front count and points far
from any front do not. Different settings often train the same router: every trial counts, whether
or not it finds anything new, and the number of suggestions that repeat an earlier one is shown.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.gate_trials import DIGITS, LARGE, synthetic_table
from benchmarks.harness import Estimate, Headline, Options, Report, Section, run_benchmark
from dsnet.files import replacing
from dsnet.gates.fit import fit_gates
from dsnet.gates.settings import GateSettings
from dsnet.routing.routing_table import RoutingTable
from orchestration.results.run import RunResults
from orchestration.runs.folder import RunDir
from search.front.pareto import Goal, front_mask, hypervolume, hypervolume_trace
from search.front.statistics import bootstrap_interval
from search.gate_trial import FIELDS, LANES, gate_settings
from search.study.engine import Mirror
from search.study.study import Objective, StudySettings, TrialRecord
from search.suggest.grid import Grid
from search.suggest.samplers import SamplerSettings
from search.suggest.space import Scalar, Space, parse_space

BENCHMARK = "trials until 90, 95, 99 % of an exhaustive sweep's hypervolume, for each sampler (goal: the default needs at most random's)"
OBJECTIVES = (Objective("top1", "maximize"), Objective("madds_m", "minimize"))
GOALS: tuple[Goal, ...] = ("maximize", "minimize")
SHARES = (0.90, 0.95, 0.99)
MARGIN = 0.1
"""Distance of the reference from the worst values of the front, as a share of its range."""
TABLE_COHORT = 64
SMALL_COHORT = 16
"""Smaller cohort, which shows the cost of learning from 64 trials at a time."""
GP_COHORT = 8
GP_NOTE = "gp takes about a second for a suggestion: it runs fewer seeds and trials, in cohorts of 8"
CHUNK = 4 * LANES
DEFAULTS: Mapping[str, float | int | str | bool | None] = {
    **{key: getattr(GateSettings(), field) for key, field in FIELDS.items()},
    "gate.routing.first": 0,
    "gate.routing.last": -1,
    "gate.routing.stride": 1,
    "gate.routing.beam": None,
}


@dataclass(frozen=True)
class Source:
    """Source of the routing tables: files, or the synthetic ones of `benchmarks.gate_trials`."""

    files: tuple[Path, Path] | None
    is_small: bool
    seed: int

    @classmethod
    def of(cls, run: Path | None, is_small: bool, seed: int) -> Source:
        """The source for `run`: the folder of a run, or one with gate.safetensors and
        val.safetensors."""
        if run is None:
            return cls(None, is_small, seed)
        plain = (run / "gate.safetensors", run / "val.safetensors")
        if all(path.is_file() for path in plain):
            return cls(plain, is_small, seed)
        results = RunResults(RunDir(run.parent, run.name))
        key = results.done_key("table")
        return cls((results.run.table(key, "gate"), results.run.table(key, "val")), is_small, seed)

    def tables(self) -> tuple[RoutingTable, RoutingTable]:
        """Routing tables of `gate` and `val`."""
        if self.files is not None:
            return RoutingTable.load(self.files[0]), RoutingTable.load(self.files[1])
        workload = DIGITS if self.is_small else LARGE
        return synthetic_table(workload, "gate", self.seed), synthetic_table(workload, "val", self.seed + 1)

    @property
    def name(self) -> str:
        """Name in the report."""
        return f"made-up {'digits' if self.is_small else 'large'} tables" if self.files is None else str(self.files[1])


def spaces(num_routes: int, is_small: bool) -> dict[str, Space]:
    """The spaces that are swept exhaustively, by name.

    Args:
        num_routes: number of routes of the tables.
        is_small: whether to take only about a tenth of the points.
    """
    target = {"step": [0.05, 0.85, 0.2 if is_small else 0.05]}
    t_easy = {"step": [0.0, 0.6, 0.6 if is_small else 0.3]}
    beams = sorted({min(size, num_routes) for size in ((4, num_routes) if is_small else (4, 8, num_routes))})
    with_sgs = {"gate.router": "gate", "gate.losses.sgs": [0.3, 1.0]}
    routers = {
        "gate.router": {"choice": ["gate", "cascade", "learned_cascade"]},
        "gate.target": target,
        "gate.routing.first": {"int": [0, 1 if is_small else 3]},
        "gate.losses.sgs": {"choice": [0.0, 0.3, 1.0], "when": {"gate.router": "gate"}},
        "gate.sgs.target": {"choice": ["extremes", "cheapest"], "when": with_sgs},
        "gate.sgs.t_easy": {**t_easy, "when": with_sgs},
        "gate.optimizer.lr": {"choice": [0.01, 0.05], "when": {"gate.router": ["gate", "learned_cascade"]}},
    }
    gate = {
        "gate.router": "gate",
        "gate.target": target,
        "gate.routing.beam": {"choice": beams},
        "gate.losses.sgs": {"choice": [0.3, 1.0]},
        "gate.sgs.target": {"choice": ["extremes", "cheapest"]},
        "gate.sgs.t_easy": t_easy,
        "gate.losses.quality": {"choice": [0.0, 10.0]},
        "gate.optimizer.lr": {"choice": [0.01, 0.05]},
    }
    return {"routers": parse_space(routers), "gate": parse_space(gate)}


def pieces(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Consecutive parts of at most `size`."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def key_of(point: Mapping[str, Scalar]) -> tuple[tuple[str, Scalar], ...]:
    """Key of a point, in which equal steps with different rounding are equal."""
    return tuple(
        sorted((name, round(value, 9) if isinstance(value, float) else value) for name, value in point.items())
    )


@dataclass(frozen=True)
class Exhaustive:
    """Every point of a space, and its results."""

    space: Space
    values: NDArray[np.float64]
    """[points, 2] top-1 and mean million MAdds; NaN where the trial failed."""
    seconds: float
    """Seconds of the sweep, summed over all processes."""

    @property
    def reference(self) -> tuple[float, float]:
        """Reference of the hypervolume (see the module)."""
        front = self.values[front_mask(self.values, GOALS)]
        best, worst = front.max(axis=0), front.min(axis=0)
        span = best - worst
        return float(worst[0] - MARGIN * span[0]), float(best[1] + MARGIN * span[1])

    def table(self) -> dict[tuple[tuple[str, Scalar], ...], tuple[float, float]]:
        """Values of each point, by its `key_of`."""
        grid = Grid(self.space)
        return {key_of(grid[k]): (float(row[0]), float(row[1])) for k, row in enumerate(self.values)}


def run_points(source: Source, space: Space, indices: Sequence[int]) -> list[tuple[float, float]]:
    """Train and score some of a space's points, on one thread."""
    torch.set_num_threads(1)
    gate, val = source.tables()
    grid = Grid(space)
    settings = [gate_settings(grid[k], DEFAULTS, gate, seed=source.seed) for k in indices]
    found = []
    for some in pieces(settings, LANES):
        for fit in fit_gates(gate, val, some):
            found.append(
                (np.nan, np.nan) if isinstance(fit, Exception) else (fit.metrics["top1"], fit.metrics["madds_m"])
            )
    return found


def sweep_all(source: Source, space: Space, processes: int, cache: Path) -> Exhaustive:
    """Train and score every point, or read the results from `cache` if they are there."""
    gate, val = source.tables()
    digest = hashlib.sha256(space.hash.encode())
    for table in (gate, val):
        digest.update(table.ce.tobytes() + table.evidence.tobytes())
    path = cache / f"exhaustive-{digest.hexdigest()[:16]}-{source.seed}.npz"
    if path.is_file():
        with np.load(path) as kept:
            return Exhaustive(space, kept["values"], float(kept["seconds"]))
    # Neighbours train in one program: those of one router are next to each other in the grid's own
    # order.
    chunks = pieces(range(len(Grid(space))), CHUNK)
    start = time.perf_counter()
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        parts = list(pool.map(run_points, [source] * len(chunks), [space] * len(chunks), chunks))
    seconds = time.perf_counter() - start
    values = np.array([row for part in parts for row in part])
    cache.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, values=values, seconds=seconds)
    return Exhaustive(space, values, seconds)


@dataclass(frozen=True)
class Contender:
    """A sampler with the settings that a sweep would use."""

    label: str
    settings: SamplerSettings
    cohort: int
    trials: int
    seeds: int


@dataclass(frozen=True)
class Searched:
    """Result of one search.

    Attributes:
        shares: [trials] share of the exhaustive hypervolume after 1, 2, ... trials.
        ask_s: seconds of all suggestions.
        num_repeated: number of suggestions that repeat an earlier one.
    """

    shares: NDArray[np.float64]
    ask_s: float
    num_repeated: int

    def trials_until(self, share: float) -> float:
        """Number of trials until a share is reached; infinite if it never is."""
        reached = np.flatnonzero(self.shares >= share)
        return float(reached[0] + 1) if len(reached) else np.inf


def search(exhaustive: Exhaustive, contender: Contender, seed: int) -> Searched:
    """Search by looking trials up; suggestions are computed on a `Mirror` as in a sweep."""
    torch.set_num_threads(1)
    table = exhaustive.table()
    settings = StudySettings(
        name="efficiency",
        space=exhaustive.space,
        objectives=OBJECTIVES,
        sampler=contender.settings,
        seed=seed,
        cohort=contender.cohort,
    )
    num_trials = min(contender.trials, len(table)) if contender.settings.name == "grid" else contender.trials
    mirror = Mirror(settings, [])
    found: list[tuple[float, float]] = []
    seen = set()
    ask_s = 0.0
    while mirror.num_told < num_trials:
        start = time.perf_counter()
        suggestions = mirror.ask(num_trials)
        ask_s += time.perf_counter() - start
        for slot, suggestion in suggestions.items():
            key = key_of(suggestion.params)
            seen.add(key)
            found.append(table[key])
            mirror.tell(_record(slot, suggestion.params, table[key]))
    reference = exhaustive.reference
    whole = hypervolume(exhaustive.values, GOALS, reference)
    return Searched(hypervolume_trace(found, GOALS, reference) / whole, ask_s, len(found) - len(seen))


def _record(slot: int, params: Mapping[str, Scalar], values: tuple[float, float]) -> TrialRecord:
    is_complete = bool(np.isfinite(values).all())
    return TrialRecord(
        slot=slot,
        number=slot,
        state="complete" if is_complete else "failed",
        params=params,
        values=values if is_complete else None,
        metrics={"top1": values[0], "madds_m": values[1]},
        reason=None if is_complete else "the exhaustive sweep's trial failed",
        duration_s=0.0,
    )


def contenders(trials: int, seeds: int, gp_trials: int, gp_seeds: int) -> list[Contender]:
    """All contenders: every sampler with a sweep's defaults and generations of a cohort's size, and
    with smaller cohorts the one that gains most from them."""
    listed = [
        *((name, SamplerSettings(name)) for name in ("random", "grid", "qmc", "tpe", "nsga2", "nsga3")),
        *((f"{name}, generations of 64", SamplerSettings(name, startup=TABLE_COHORT)) for name in ("nsga2", "nsga3")),
    ]
    plain = [Contender(label, settings, TABLE_COHORT, trials, seeds) for label, settings in listed]
    plain.append(Contender("tpe, cohorts of 16", SamplerSettings("tpe"), SMALL_COHORT, trials, seeds))
    gp = Contender("gp", SamplerSettings("gp"), GP_COHORT, min(trials, gp_trials), min(seeds, gp_seeds))
    return [*plain, *([gp] if gp_trials else [])]


@dataclass(frozen=True)
class Effort:
    """Number of trials until a share is reached, over seeds; infinite where it is never reached."""

    trials: NDArray[np.float64]

    def text(self) -> str:
        """Median and quartiles, and the number of seeds that reached the share if not all did."""
        first, median, third = np.quantile(self.trials, [0.25, 0.5, 0.75], method="inverted_cdf")
        reached = np.isfinite(self.trials).mean()
        shown = " ".join((f"{_count(median)}", f"[{_count(first)}, {_count(third)}]"))
        return shown if reached == 1 else f"{shown} {100 * reached:.0f} %"


def _count(trials: float) -> str:
    return f"{trials:.0f}" if np.isfinite(trials) else "-"


def measure(
    options: Options, run: Path | None, cache: Path, processes: int, seeds: int, trials: int, gp: str
) -> Report:
    """Measure both spaces; the headline is the ratio of the default sampler's trials until 95 % to
    those of random search."""
    source = Source.of(run, options.quick, options.seed)
    gp_trials, gp_seeds = map(int, gp.split("x"))
    if options.quick:
        seeds, trials, gp_trials, gp_seeds = 2, 128, 0, 0
    figures: dict[str, Any] = {"source": source.name, "note": GP_NOTE, "spaces": {}}
    sections = []
    efforts: dict[tuple[str, str], NDArray[np.float64]] = {}
    for name, space in spaces(source.tables()[0].num_routes, options.quick).items():
        exhaustive = sweep_all(source, space, processes, cache)
        found = _search_all(exhaustive, contenders(trials, seeds, gp_trials, gp_seeds), processes)
        rows = [_row(contender, searches) for contender, searches in found]
        sections.append(Section(_title(name, exhaustive, trials, source), COLUMNS, rows))
        figures["spaces"][name] = _figures(exhaustive, found)
        for contender, searches in found:
            efforts[name, contender.label] = np.array([search.trials_until(0.95) for search in searches])
    _print_markdown(sections)
    return Report(
        [],
        Headline(
            f"trials of {SamplerSettings().name} until 95 %, over random's (both spaces; never = {trials})",
            _ratio(efforts, trials, options.seed),
            "",
            1.0,
        ),
        figures,
    )


COLUMNS = (
    "sampler",
    "seeds",
    *(f"trials until {100 * share:.0f} %" for share in SHARES),
    "at the end, %",
    "repeats, %",
    "ask, ms",
)


def _search_all(
    exhaustive: Exhaustive, listed: Sequence[Contender], processes: int
) -> list[tuple[Contender, list[Searched]]]:
    jobs = [(contender, seed) for contender in listed for seed in range(contender.seeds)]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        done = list(pool.map(search, [exhaustive] * len(jobs), *zip(*jobs, strict=True)))
    return [
        (contender, [one for (other, _), one in zip(jobs, done, strict=True) if other is contender])
        for contender in listed
    ]


def _row(contender: Contender, searches: Sequence[Searched]) -> tuple[str, ...]:
    num_trials = len(searches[0].shares)
    efforts = [Effort(np.array([one.trials_until(share) for one in searches])).text() for share in SHARES]
    end = np.median([one.shares[-1] for one in searches])
    repeats = np.mean([one.num_repeated for one in searches]) / num_trials
    ask_ms = 1e3 * np.mean([one.ask_s for one in searches]) / num_trials
    label = f"{contender.label} ({num_trials} trials)" if contender.settings.name == "gp" else contender.label
    return (label, str(len(searches)), *efforts, f"{100 * end:.2f}", f"{100 * repeats:.0f}", f"{ask_ms:.1f}")


def _title(name: str, exhaustive: Exhaustive, trials: int, source: Source) -> str:
    values = exhaustive.values
    num_front = int(front_mask(values, GOALS, keep_duplicates=False).sum())
    num_values = len(np.unique(values[np.isfinite(values).all(axis=1)], axis=0))
    return (
        f"Space `{name}`: {len(values):,} points, {num_values:,} different results, {num_front} on the front; {trials} trials; "
        f"median [quartiles] over seeds, and the share of seeds that reached it; {source.name}"
    )


def _figures(exhaustive: Exhaustive, found: Sequence[tuple[Contender, Sequence[Searched]]]) -> dict[str, Any]:
    return {
        "num_points": len(exhaustive.values),
        "exhaustive_s": exhaustive.seconds,
        "reference": exhaustive.reference,
        "front": exhaustive.values[front_mask(exhaustive.values, GOALS, keep_duplicates=False)].tolist(),
        "written": dict(exhaustive.space.written),
        "searches": {
            contender.label: {
                "trials": len(searches[0].shares),
                "cohort": contender.cohort,
                "until": {f"{share}": [_or_none(one.trials_until(share)) for one in searches] for share in SHARES},
                "end_share": [float(one.shares[-1]) for one in searches],
                "repeated": [one.num_repeated for one in searches],
                "ask_ms_per_trial": [1e3 * one.ask_s / len(one.shares) for one in searches],
                "median_share": np.median([one.shares for one in searches], axis=0).round(5).tolist(),
            }
            for contender, searches in found
        },
    }


def _or_none(trials: float) -> int | None:
    return int(trials) if np.isfinite(trials) else None


def _ratio(efforts: Mapping[tuple[str, str], NDArray[np.float64]], trials: int, seed: int) -> Estimate:
    """Geometric mean over spaces of the ratio of medians, with seeds resampled; a share that is
    never reached counts as all trials."""
    rng = np.random.default_rng(seed)
    names = sorted({space for space, _ in efforts})

    def ratio(draw: bool) -> float:
        logs = []
        for name in names:
            medians = []
            for label in (SamplerSettings().name, "random"):
                own = np.minimum(efforts[name, label], trials)
                medians.append(np.median(rng.choice(own, len(own)) if draw else own))
            logs.append(np.log(medians[0] / medians[1]))
        return float(np.exp(np.mean(logs)))

    low, high = bootstrap_interval(np.array([ratio(True) for _ in range(1000)]))
    return Estimate(ratio(False), float(low), float(high))


def _print_markdown(sections: Sequence[Section]) -> None:
    for section in sections:
        print(f"{section.title}\n\n| {' | '.join(section.columns)} |\n|{'---|' * len(section.columns)}")
        for row in section.rows:
            print(f"| {' | '.join(row)} |")
        print()
    print(f"{GP_NOTE}.\n")


if __name__ == "__main__":
    run_benchmark(
        BENCHMARK,
        measure,
        threads=1,
        params=[
            click.Option(
                ["--run"],
                type=click.Path(exists=True, path_type=Path),
                help="A run's folder, or one with gate.safetensors and val.safetensors. Default: made-up tables.",
            ),
            click.Option(
                ["--cache"],
                default=Path("runs/benchmarks"),
                show_default=True,
                type=click.Path(path_type=Path),
                help="Keeps the exhaustive sweeps.",
            ),
            click.Option(["--processes"], default=2, show_default=True, type=click.IntRange(1)),
            click.Option(
                ["--seeds"], default=20, show_default=True, type=click.IntRange(2), help="Searches of each sampler."
            ),
            click.Option(
                ["--trials"], default=1024, show_default=True, type=click.IntRange(TABLE_COHORT), help="Of a search."
            ),
            click.Option(["--gp"], default="160x5", show_default=True, help="TRIALSxSEEDS of the Gaussian process."),
        ],
    )
