"""Report on the runs of `supernet_accuracy`: t-intervals over seeds, differences paired by seed,
tables, and the figure's numbers.

Intervals hold for new seeds (weights, order, augmentation) on the same training and test images.
With few seeds they are wide, and they assume that differences between seeds are roughly normal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import Estimate, Headline, Report, Section
from benchmarks.regime_runs import ARMS, PLAN, RUNS
from dashboards.regimes import RegimeDifferences, RegimeSeries, RegimesInfo
from dsnet.errors import PreflightError
from dsnet.files import read_json
from dsnet.wording import plural, signed
from search.front.statistics import significant_sign

LEVEL = 0.95
BASELINES = ("ce", "inplace")
GOAL = 1.0


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its t-interval `mean ± half`."""

    mean: float
    half: float | None
    """Half the width of the interval; None for one seed."""
    num_seeds: int

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 is outside the interval as shown; False if there is no interval."""
        return self.half is not None and significant_sign(self.mean - self.half, self.mean + self.half) != 0


def t_quantile(level: float, degrees: int) -> float:
    """The t for which a variable with Student's distribution lies within ±t with probability
    `level`.

    Args:
        level: in (0, 1).
        degrees: degrees of freedom, at least 1.
    """
    if not 0 < level < 1 or degrees < 1:
        raise ValueError(f"level is {level} and degrees {degrees}, but must be in (0, 1) and at least 1")
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        angle = (low + high) / 2
        low, high = (angle, high) if _central_probability(angle, degrees) < level else (low, angle)
    return math.sqrt(degrees) * math.tan(low)


def _central_probability(angle: float, degrees: int) -> float:
    """P(|T| <= sqrt(degrees) tan(angle)): the finite sums of Abramowitz and Stegun, 26.7.3 and
    26.7.4."""
    cosine, sine = math.cos(angle), math.sin(angle)
    term, total = (cosine, 0.0) if degrees % 2 else (1.0, 0.0)
    for power in range(1 if degrees % 2 else 0, degrees - 1, 2):
        total += term
        term *= cosine * cosine * (power + 1) / (power + 2)
    return 2 / math.pi * (angle + sine * total) if degrees % 2 else sine * total


def t_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """The mean of one value per seed, with the t-interval of that mean.

    Raises:
        ValueError: there is no value.
    """
    if not len(values):
        raise ValueError("an interval needs at least one value")
    mean, num = float(np.mean(values)), len(values)
    if num == 1:
        return Interval(mean, None, 1)
    return Interval(mean, t_quantile(level, num - 1) * float(np.std(values, ddof=1)) / math.sqrt(num), num)


@dataclass(frozen=True)
class Results:
    """The records of a folder by regime and seed; widths are ordered by increasing MAdds."""

    scale: Mapping[str, Any]
    records: tuple[Mapping[str, Any], ...]
    """Records of the runs that trained, in the order of the regimes, then by seed."""
    failures: tuple[Mapping[str, Any], ...]
    widths: tuple[str, ...]
    madds: tuple[int, ...]
    is_member: tuple[bool, ...]
    """Whether each width is routable; False for a largest sub-network that only teaches."""

    @classmethod
    def from_records(cls, scale: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> Results:
        """Order the records, and separate those of failed runs.

        Raises:
            PreflightError: no run has trained.
        """
        order = list(ARMS)
        ordered = sorted(records, key=lambda record: (order.index(record["regime"]), record["seed"]))
        trained = tuple(record for record in ordered if "error" not in record)
        if not trained:
            raise PreflightError(
                f"none of {plural(len(records), 'run')} has been trained to its end; run `train` first, with the same --folder"
            )
        rows = sorted(trained[0]["subnets"], key=lambda row: row["madds"])
        return cls(
            scale,
            trained,
            tuple(record for record in ordered if "error" in record),
            tuple(row["name"] for row in rows),
            tuple(row["madds"] for row in rows),
            tuple(row["is_member"] for row in rows),
        )

    @property
    def regimes(self) -> tuple[str, ...]:
        """The regimes that have a trained run."""
        return tuple(dict.fromkeys(record["regime"] for record in self.records))

    @property
    def num_test_images(self) -> int:
        """Number of images of the test split."""
        return int(self.records[0]["num_test_images"])

    def top1(self, regime: str) -> dict[int, NDArray[np.float64]]:
        """Seed -> [W + 1] top-1 of each width and, last, the mean over the sub-networks (without a
        largest that only teaches)."""
        found = {}
        for record in self.records:
            if record["regime"] == regime:
                of_name = {row["name"]: row["top1"] for row in record["subnets"]}
                values = np.array([of_name[name] for name in self.widths])
                found[int(record["seed"])] = np.append(values, values[list(self.is_member)].mean())
        return found

    def accuracy(self, regime: str) -> list[Interval]:
        """Top-1 of each width and the mean of the sub-networks, over the regime's seeds: [W +
        1]."""
        return _columns(list(self.top1(regime).values()))

    def difference(self, regime: str, baseline: str) -> list[Interval]:
        """Top-1 minus that of the baseline with the same seed, in the form of `accuracy`; empty if
        they have no seed in common."""
        ours, theirs = self.top1(regime), self.top1(baseline)
        return _columns([ours[seed] - theirs[seed] for seed in ours if seed in theirs])

    def comparisons(self) -> dict[str, dict[str, list[Interval]]]:
        """Baseline -> regime -> differences, for all pairs that can be compared."""
        found = {
            baseline: {name: self.difference(name, baseline) for name in self.regimes if name != baseline}
            for baseline in BASELINES
            if baseline in self.regimes
        }
        return {baseline: {name: parts for name, parts in group.items() if parts} for baseline, group in found.items()}


def _columns(rows: Sequence[NDArray[np.float64]]) -> list[Interval]:
    return [t_interval(column) for column in np.transpose(rows).tolist()] if rows else []


def load_results(folder: Path) -> Results:
    """The finished runs of a folder.

    Raises:
        PreflightError: no run has been trained, or the folder was not made by `train`.
    """
    if not (folder / PLAN).exists():
        raise PreflightError(f"{folder} has no runs; run `train` first, with the same --folder")
    paths = sorted((folder / RUNS).glob("*.json"))
    return Results.from_records(read_json(folder / PLAN)["scale"], [read_json(path) for path in paths])


def subject(results: Results) -> str:
    """Description of what was trained, in one line."""
    scale, train = results.scale, results.scale["train"]
    num_train = plural(scale["num_train"], "training image") if scale["num_train"] else "the default training split"
    options = "".join(f", {name} {value}" for name, value in scale["options"].items())
    epochs, steps = plural(train["epochs"], "epoch"), plural(results.records[0]["steps"], "step")
    length = f"{epochs} = {steps} of {train['batch_size']} images"
    return f"{scale['family']}{options} on {scale['data']}, {num_train}, {length}, {train['precision']}"


def regimes_info(results: Results) -> RegimesInfo:
    """The figure's numbers."""
    num_widths = len(results.widths)

    def series(regime: str, parts: Sequence[Interval]) -> RegimeSeries:
        halves = [part.half for part in parts[:num_widths] if part.half is not None]
        return RegimeSeries(
            regime, parts[0].num_seeds, tuple(part.mean for part in parts[:num_widths]), tuple(halves) or None
        )

    return RegimesInfo(
        split=f"{results.scale['data']} test",
        num_images=results.num_test_images,
        subject=subject(results),
        level=LEVEL,
        subnets=results.widths,
        madds_m=tuple(madds / 1e6 for madds in results.madds),
        accuracy=tuple(series(regime, results.accuracy(regime)) for regime in results.regimes),
        differences=tuple(
            RegimeDifferences(baseline, tuple(series(name, parts) for name, parts in group.items()))
            for baseline, group in results.comparisons().items()
            if group
        ),
    )


def make_sections(results: Results) -> list[Section]:
    """Sections of the report: accuracy, differences, cost of a step, and failed runs."""
    accuracy = {regime: results.accuracy(regime) for regime in results.regimes}
    title = f"Top-1 on the {results.num_test_images:,} test images, %; mean over seeds ± half of its {100 * LEVEL:g} % t-interval"
    sections = [_table(results, title, accuracy)]
    for baseline, group in results.comparisons().items():
        if group:
            sections.append(_table(results, _difference_title(baseline, group), group, are_differences=True))
    sections.append(_cost_section(results))
    if results.failures:
        rows = [(record["regime"], str(record["seed"]), record["error"]) for record in results.failures]
        sections.append(Section("Failed runs, which are not part of the tables above", ("regime", "seed", "why"), rows))
    return sections


def _difference_title(baseline: str, group: Mapping[str, Sequence[Interval]]) -> str:
    parts = [part for column in group.values() for part in column if part.half is not None]
    title = f"Top-1 minus {baseline}'s of the same seed, points ± half of the {100 * LEVEL:g} % t-interval of the paired differences"
    if not parts:
        return f"{title}; one seed gives no interval"
    num_sure = sum(part.excludes_zero for part in parts)
    return f"{title}; * = 0 is outside: {num_sure} of {len(parts)}, where chance alone gives {(1 - LEVEL) * len(parts):.1f}"


def _table(
    results: Results, title: str, columns: Mapping[str, Sequence[Interval]], *, are_differences: bool = False
) -> Section:
    """A table with a row per width and a column per regime."""
    labels = [
        f"{name} ({madds / 1e6:.3g} M{'' if is_member else ', teacher'})"
        for name, madds, is_member in zip(results.widths, results.madds, results.is_member, strict=True)
    ]
    labels.append(f"mean of the {sum(results.is_member)} sub-networks")
    rows = [
        (label, *(_cell(parts[row], is_difference=are_differences) for parts in columns.values()))
        for row, label in enumerate(labels)
    ]
    return Section(title, ("", *columns), rows)


def _cell(part: Interval, *, is_difference: bool) -> str:
    text = signed(100 * part.mean) if is_difference else f"{100 * part.mean:.1f}"
    if part.half is not None:
        text += f" ±{100 * part.half:.1f}"
    return text + "*" * (is_difference and part.excludes_zero)


def _cost_section(results: Results) -> Section:
    by_regime = {name: [r for r in results.records if r["regime"] == name] for name in results.regimes}
    seconds = {name: _step_seconds(records) for name, records in by_regime.items()}
    base = seconds.get("ce")
    rows = []
    for name, records in by_regime.items():
        passes, took = records[0]["passes"], seconds[name]
        rows.append(
            (
                name,
                records[0]["norm"],
                str(len(records)),
                str(passes["trained"]),
                str(passes["taught"]),
                "-" if took is None else f"{1e3 * took:.1f}",
                "-" if took is None or base is None else f"{took / base:.2f}",
                "-" if took is None else f"{took * records[0]['steps']:.0f}",
            )
        )
    devices = sorted({f"{r['device']}, {plural(r['threads'], 'thread')}" for r in results.records})
    columns = (
        "regime",
        "normalization",
        "seeds",
        "sub-networks trained a step",
        "teacher forwards",
        "ms a step",
        "over ce",
        "s of all steps",
    )
    return Section(f"Cost at equal steps ({'; '.join(devices)}); ms: median within and over runs", columns, rows)


def _step_seconds(records: Sequence[Mapping[str, Any]]) -> float | None:
    found = [record["seconds_per_step"] for record in records if record["seconds_per_step"] is not None]
    return median(found) if found else None


def error_ratio(results: Results, regime: str = "ib", baseline: str = "inplace") -> Interval:
    """Ratio of a regime's test error to that of the baseline with the same seed, mean over the
    sub-networks; the regime is better below 1.

    Raises:
        ValueError: regime and baseline have no seed in common.
    """
    ours, theirs = results.top1(regime), results.top1(baseline)
    return t_interval([(1 - ours[seed][-1]) / (1 - theirs[seed][-1]) for seed in ours if seed in theirs])


def make_report(results: Results) -> Report:
    """Make the report for the harness; the headline compares in-place bootstrapping with in-place
    distillation."""
    ratio = error_ratio(results)
    half = ratio.half if ratio.half is not None else math.nan
    label = f"test error of ib over inplace, {subject(results)}, {plural(ratio.num_seeds, 'seed')}"
    headline = Headline(label, Estimate(ratio.mean, ratio.mean - half, ratio.mean + half), "", GOAL)
    return Report(make_sections(results), headline, figures(results))


def figures(results: Results) -> dict[str, Any]:
    """All numbers of the tables and all records, JSON-able; accuracies are fractions, and the last
    entry of each list is the mean."""
    return {
        "subject": subject(results),
        "scale": dict(results.scale),
        "level": LEVEL,
        "widths": list(results.widths),
        "madds": list(results.madds),
        "is_member": list(results.is_member),
        "top1": {name: [asdict(part) for part in results.accuracy(name)] for name in results.regimes},
        "differences": {
            baseline: {name: [asdict(part) for part in parts] for name, parts in group.items()}
            for baseline, group in results.comparisons().items()
        },
        "runs": [dict(record) for record in (*results.records, *results.failures)],
    }


def markdown(sections: Sequence[Section]) -> str:
    """The tables for a document."""
    parts = []
    for section in sections:
        lines = ["| " + " | ".join(section.columns) + " |", "|---" * len(section.columns) + "|"]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in section.rows]
        parts.append(f"{section.title}:\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)
