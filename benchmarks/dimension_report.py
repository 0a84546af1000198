"""Report of `dimensions`: accuracy of every sub-network, and its differences to the static line of
another supernet at equal MAdds and at equal milliseconds, paired over images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.alone_runs import load_records
from benchmarks.dimension_runs import ACCELERATION, TIMES, arms_of, unpacked
from benchmarks.harness import Estimate, Headline, Report, Samples, Section, show
from benchmarks.regime_report import markdown, t_interval
from benchmarks.regime_runs import PLAN
from dsnet.errors import PreflightError
from dsnet.files import read_json
from dsnet.wording import plural, signed
from search.front.controls import StaticLine
from search.front.statistics import gain_over_static

__all__ = ["as_text", "figures", "load_results", "make_report", "make_sections", "markdown"]

GOAL = 1.05
"""Largest training cost of a supernet relative to the cheapest one of its part."""
WIDTH = 100
"""Width of the tables in characters."""
NUM_RESAMPLES = 1000
NEAR = 0.01
"""Relative difference of costs up to which they count as equal: channels, heads and blocks are
whole numbers."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """Top-1 minus that of another supernet at an equal budget, a fraction, with its 95 % interval
    over images."""

    value: float
    low: float
    high: float
    is_bound: bool
    """Whether the point is cheaper than the other supernet's cheapest sub-network, to which it is
    then compared."""

    def text(self) -> str:
        """In percentage points; `≥` marks a point that is cheaper than what it is compared to."""
        mark = "≥" if self.is_bound else ""
        return f"{mark}{signed(100 * self.value)} [{signed(100 * self.low)}, {signed(100 * self.high)}]"


@dataclass(frozen=True)
class Row:
    """Results of one sub-network of an arm."""

    arm: str
    name: str
    madds: int
    top1: float
    """Mean over seeds."""
    ms: Estimate | None
    at_madds: Difference | None
    """None where it is not compared."""
    at_ms: Difference | None
    by_seed: tuple[float, ...]
    """The difference at equal MAdds of each seed."""


@dataclass(frozen=True)
class ArmResults:
    """The records of an arm by seed."""

    records: Mapping[int, Mapping[str, Any]]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the sub-networks, from the cheapest."""
        return tuple(row["name"] for row in self._rows)

    @property
    def madds(self) -> Floats:
        """[K] MAdds of the sub-networks."""
        return np.array([row["madds"] for row in self._rows], dtype=np.float64)

    @property
    def _rows(self) -> Sequence[Mapping[str, Any]]:
        rows: Sequence[Mapping[str, Any]] = next(iter(self.records.values()))["subnets"]
        return rows

    def right(self, seed: int) -> NDArray[np.bool_]:
        """[n, K] right answers on `test`."""
        record = self.records[seed]
        number = record["num_test_images"]
        return np.stack([unpacked(row["right"], number) for row in record["subnets"]], axis=1)

    def shares(self, seeds: Sequence[int]) -> Floats:
        """[n, K] shares of the seeds that are right."""
        found: Floats = np.mean([self.right(seed) for seed in seeds], axis=0)
        return found

    def val(self, seeds: Sequence[int]) -> Floats:
        """[K] top-1 on `val`, mean over seeds."""
        found: Floats = np.mean([[row["val"] for row in self.records[seed]["subnets"]] for seed in seeds], axis=0)
        return found


@dataclass(frozen=True)
class PartResults:
    """The finished cells of a part: of its supernets of one dimension each, or of that of all
    dimensions, whose sub-networks are taken as arms."""

    name: str
    part: Mapping[str, Any]
    arms: Mapping[str, ArmResults]
    times: Mapping[str, Any] | None
    acceleration: Mapping[str, Any] | None
    failures: tuple[Mapping[str, Any], ...]
    is_shared: bool = False
    """Whether all arms are in one supernet."""
    batch: int | None = None
    """Batch size of the times; None: the part's."""

    @property
    def title(self) -> str:
        """Its name in the tables."""
        return f"{self.name}*" if self.is_shared else self.name

    @cached_property
    def samples(self) -> Samples | None:
        """Times of the networks; None where they were not measured at this batch size."""
        batches = [] if self.times is None else self.times["batches"]
        found = (each for each in batches if each["batch_size"] == self.timed_batch)
        return next((Samples({name: np.array(ms) for name, ms in each["samples_ms"].items()}) for each in found), None)

    @property
    def timed_batch(self) -> int:
        """Batch size of the times."""
        return int(self.part["timed_batch"]) if self.batch is None else self.batch

    def ms(self, arm: str, name: str) -> Estimate | None:
        """Time of a sub-network; None if it was not measured."""
        if self.times is None or self.samples is None:
            return None
        return self.samples.median_ms(self.times["timed_as"][f"{arm} {name}"])

    def medians(self, arm: str) -> Floats | None:
        """[K] milliseconds of the sub-networks of an arm."""
        found = [self.ms(arm, name) for name in self.arms[arm].names]
        return None if None in found else np.array([ms.value for ms in found if ms is not None])

    @property
    def training_ratio(self) -> float:
        """Training cost of the dearest arm relative to the cheapest."""
        costs = [next(iter(arm.records.values()))["training_madds"] for arm in self.arms.values()]
        return float(max(costs) / min(costs))

    @cached_property
    def rows(self) -> list[Row]:
        """The results of all sub-networks, in the order of the arms."""
        return [row for arm in self.arms for row in self._rows_of(arm)]

    def _rows_of(self, name: str) -> list[Row]:
        arm, base_name = self.arms[name], arms_of(self.part["family"])[name].base
        base = self.arms.get(base_name)
        top1 = arm.shares(list(arm.records)).mean(axis=0)
        at_madds: list[Difference] | None = None
        at_ms: list[Difference] | None = None
        by_seed: list[tuple[float, ...]] = [()] * len(arm.names)
        seeds = [seed for seed in arm.records if base is not None and seed in base.records]
        if base is not None and name != base_name and seeds:
            at_madds = differences(arm, arm.madds, base, base.madds, seeds)
            each = [differences(arm, arm.madds, base, base.madds, [seed], of_line=seeds) for seed in seeds]
            by_seed = [tuple(found[number].value for found in each) for number in range(len(arm.names))]
            own, others = self.medians(name), self.medians(base_name)
            at_ms = None if own is None or others is None else differences(arm, own, base, others, seeds)
        return [
            Row(
                name,
                subnet,
                int(arm.madds[number]),
                float(top1[number]),
                self.ms(name, subnet),
                None if at_madds is None else at_madds[number],
                None if at_ms is None else at_ms[number],
                by_seed[number],
            )
            for number, subnet in enumerate(arm.names)
        ]


def differences(
    arm: ArmResults,
    spent: Floats,
    base: ArmResults,
    base_spent: Floats,
    seeds: Sequence[int],
    of_line: Sequence[int] | None = None,
) -> list[Difference]:
    """Top-1 of every sub-network of an arm minus the static line of another one at equal cost.

    Args:
        arm: the arm.
        spent: [K] cost of its sub-networks: MAdds or milliseconds.
        base: the arm of the line.
        base_spent: cost of its sub-networks.
        seeds: the trainings whose mean is compared.
        of_line: the trainings by whose accuracy on `val` the line is chosen; None: `seeds`.
    """
    line = StaticLine.through(base_spent, base.val(seeds if of_line is None else of_line))
    cheapest = float(line.madds[0])
    is_bound = spent < cheapest * (1 - NEAR)
    reached = np.maximum(spent, cheapest * (1 + 1e-9))  # sums of equal costs may round to less
    gain = gain_over_static(arm.shares(seeds), reached, line, base.shares(seeds), NUM_RESAMPLES)
    ends = zip(gain.value, gain.low, gain.high, is_bound, strict=True)
    return [Difference(float(value), float(low), float(high), bool(bound)) for value, low, high, bound in ends]


def load_results(folder: Path, batch: int | None = None) -> list[PartResults]:
    """The finished cells of every part in a folder.

    Args:
        folder: the folder of `run`.
        batch: batch size of the times; None: those of the parts.

    Raises:
        PreflightError: there are none.
    """
    found = [part for path in sorted(folder.glob(f"*/{PLAN}")) for part in _part_results(path.parent, batch)]
    if not any(part.arms or part.acceleration for part in found):
        raise PreflightError(f"{folder} has no finished cells; run `run` first, with the same --folder")
    return found


def _part_results(folder: Path, batch: int | None) -> list[PartResults]:
    """The supernets of one dimension each, and then those of all dimensions, whose sub-networks are
    taken as arms."""
    part = read_json(folder / PLAN)["scale"]
    records, arms = load_records(folder), arms_of(part["family"])
    trained: dict[str, dict[int, Mapping[str, Any]]] = {}
    for record in sorted((each for each in records if each.get("subnets")), key=lambda each: each["seed"]):
        trained.setdefault(record["arm"], {})[record["seed"]] = record
    of_name = {record["arm"]: record for record in records if record["seed"] is None}
    own = PartResults(
        folder.name,
        part,
        {name: ArmResults(trained[name]) for name in arms if name in trained and not arms[name].of},
        of_name.get(TIMES),
        of_name.get(ACCELERATION),
        tuple(record for record in records if "error" in record),
        batch=batch,
    )
    found = [own]
    for name in (name for name in trained if arms[name].of):
        shared = {
            each: ArmResults(_of_dimension(trained[name], each, has_widest=arms[each].base == each))
            for each in arms[name].of
        }
        found.append(replace(own, arms=shared, acceleration=None, failures=(), is_shared=True))
    return found


def _of_dimension(records: Mapping[int, Mapping[str, Any]], arm: str, *, has_widest: bool) -> dict[int, dict[str, Any]]:
    """The records of a supernet of all dimensions with the sub-networks of one arm alone; with the
    widest, which belongs to all, where `has_widest`."""
    found = {}
    for seed, record in records.items():
        rows = [
            row for row in record["subnets"] if (has_widest and row["name"] == "1") or row["name"].startswith(f"{arm} ")
        ]
        found[seed] = {**record, "subnets": [{**row, "name": row["name"].rpartition(" ")[2]} for row in rows]}
    return found


def make_sections(parts: Sequence[PartResults]) -> list[Section]:
    """The table of all sub-networks, that of the acceleration, and failed trainings."""
    rows = [_cells(part, row) for part in parts for row in part.rows]
    title = (
        "Top-1 on test, %, mean over seeds; points minus another arm's static line [95 % over images];\n"
        "seeds: half of the 95 % t-interval over seeds, at equal MAdds; ≥: cheaper than the other arm\n"
        f"*: all dimensions in one supernet; {_compared(parts)}\n{_timed(parts)}"
    )
    columns = ("", "M MAdds", "ms", "top-1", "at equal MAdds", "at equal ms", "seeds")
    sections = [Section(title, columns, rows)] if rows else []
    found = [_acceleration_rows(part) for part in parts if part.acceleration is not None]
    if found:
        speed = ("batch", "widest ms", "dynamic", "widest/dynamic", "by MAdds", "ceiling: widest/cheapest", "by MAdds")
        what = "Acceleration of dynamic inference, equal shares of four routes of DS-ViT++ [95 % over rounds]"
        sections.append(Section(what, speed, [row for rows in found for row in rows]))
    failed = [
        (part.name, f"{each['arm']}, seed {each['seed']}", each["error"]) for part in parts for each in part.failures
    ]
    if failed:
        sections.append(Section("Failed trainings, which are not part of the tables", ("part", "cell", "why"), failed))
    return sections


def _compared(parts: Sequence[PartResults]) -> str:
    """Which arms are compared with which."""
    found: dict[str, list[str]] = {}
    for part in parts:
        for name in part.arms:
            base = arms_of(part.part["family"])[name].base
            if name not in (base, *found.get(base, ())):
                found.setdefault(base, []).append(name)
    return "compared: " + "; ".join(f"{', '.join(names)} with {base}" for base, names in found.items())


def _timed(parts: Sequence[PartResults]) -> str:
    """The engine in which the networks of each part were timed."""
    found = [
        f"{part.name} {part.times['engine']}, batch {part.timed_batch}, {plural(part.times['threads'], 'thread')}"
        for part in parts
        if part.times is not None and part.samples is not None and not part.is_shared
    ]
    return f"ms: {'; '.join(found) or 'not measured'}"


def _cells(part: PartResults, row: Row) -> tuple[str, ...]:
    return (
        f"{part.title} {row.arm} {row.name}",
        f"{row.madds / 1e6:.3g}",
        "" if row.ms is None else f"{row.ms.value:.3g}",
        f"{100 * row.top1:.1f}",
        "" if row.at_madds is None else row.at_madds.text(),
        "" if row.at_ms is None else row.at_ms.text(),
        _over_seeds(row.by_seed),
    )


def _over_seeds(values: Sequence[float]) -> str:
    """Half of the t-interval over seeds, in points; empty for fewer than two."""
    half = t_interval(values).half if values else None
    return "" if half is None else f"±{100 * half:.1f}"


def _acceleration_rows(part: PartResults) -> list[tuple[str, ...]]:
    return [
        (
            str(found["batch_size"]),
            f"{found['widest'].value:.3g}",
            f"{found['dynamic'].value:.3g}",
            found["measured"].text(2),
            f"{found['of_madds']:.2f}",
            found["ceiling"].text(2),
            f"{found['madds_ceiling']:.2f}",
        )
        for found in accelerations(part)
    ]


def accelerations(part: PartResults) -> list[dict[str, Any]]:
    """For each batch size: milliseconds of the widest network and of dynamic inference, and their
    ratio beside that of the MAdds; and the ceiling, the ratio of the times of the widest and the
    cheapest network, beside that of the MAdds."""
    if part.acceleration is None:
        return []
    madds = part.acceleration["madds"]
    found = []
    for batch in part.acceleration["batches"]:
        samples = Samples({name: np.array(ms) for name, ms in batch["samples_ms"].items()})
        found.append(
            {
                "batch_size": batch["batch_size"],
                "widest": samples.median_ms("static widest"),
                "dynamic": samples.median_ms("dynamic"),
                "measured": samples.ratio(["static widest"], ["dynamic"]),
                "of_madds": max(madds) * len(madds) / sum(madds),
                "ceiling": samples.ratio(["static widest"], ["static cheapest"]),
                "madds_ceiling": max(madds) / min(madds),
            }
        )
    return found


def make_report(parts: Sequence[PartResults]) -> Report:
    """The report for the harness; the headline says how equal the costs of the trainings are."""
    ratios = {part.name: part.training_ratio for part in parts if part.arms and not part.is_shared}
    label = f"training MAdds, dearest supernet over cheapest, {', '.join(ratios)}"
    headline = Headline(label, Estimate.exact(max(ratios.values(), default=math.nan)), "", GOAL)
    return Report(make_sections(parts), headline, figures(parts))


def figures(parts: Sequence[PartResults]) -> dict[str, Any]:
    """All numbers of the tables, JSON-able; accuracies and differences are fractions."""
    return {
        part.title: {
            "part": dict(part.part),
            "training_ratio": part.training_ratio if part.arms else None,
            "seeds": {name: list(arm.records) for name, arm in part.arms.items()},
            "rows": [asdict(row) for row in part.rows],
            "acceleration": [
                {name: asdict(value) if isinstance(value, Estimate) else value for name, value in found.items()}
                for found in accelerations(part)
            ],
        }
        for part in parts
    }


def as_text(sections: Sequence[Section]) -> str:
    """The tables for a terminal."""
    out = StringIO()
    show(sections, file=out, width=WIDTH)
    return out.getvalue().rstrip("\n")
