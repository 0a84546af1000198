"""Report on the runs of `alone`: the gap of every sub-network to the same network trained alone,
with intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.alone_runs import ALONE, ARMS, load_records, score
from benchmarks.harness import Estimate, Headline, Report, Section
from benchmarks.regime_report import Interval, t_interval
from benchmarks.regime_runs import PLAN
from dsnet.errors import PreflightError
from dsnet.files import read_json
from dsnet.wording import signed

GOAL = 0.5
"""Largest mean gap, in percentage points, of sub-networks to the same networks trained alone."""


@dataclass(frozen=True)
class Gap:
    """Gaps of a supernet's sub-networks to the same networks trained alone, for one way of training
    and one length."""

    arm: str
    length: float
    names: tuple[str, ...]
    """Sub-networks by increasing MAdds."""
    madds: tuple[int, ...]
    supernet: tuple[float, ...]
    """Top-1 of each on `test`, mean over seeds."""
    alone: tuple[float, ...]
    factors: tuple[float, ...]
    """Learning rate of each network alone, relative to the scale's."""
    factor: float
    """Learning rate of the supernet with the first seed, relative to the scale's."""
    gaps: tuple[Interval, ...]
    """Supernet minus alone, paired by seed."""
    mean: Interval
    """Mean gap over the sub-networks."""
    cost: float
    """Compute of training the supernet, relative to training all its sub-networks alone once."""
    steps: tuple[int, int]
    """Steps of the supernet, and of a network alone."""


def find_gaps(records: Sequence[Mapping[str, Any]]) -> list[Gap]:
    """Compute all gaps from the finished runs, over the seeds for which every sub-network was
    trained alone too."""
    found = []
    for length in sorted({record["length"] for record in records}, reverse=True):
        of_length = [record for record in best_rates(records) if record["length"] == length]
        alone = {(record["subnet"], record["seed"]): record for record in of_length if record["arm"] == ALONE}
        for arm in ARMS:
            gap = _gap(arm, length, [record for record in of_length if record["arm"] == arm], alone)
            found += [gap] if gap is not None else []
    return found


def best_rates(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Keep one run per arm, sub-network, length and seed: the learning rate with the best `val`
    accuracy. Diverged runs are left out."""
    best: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for record in records:
        key = tuple(record[name] for name in ("arm", "subnet", "length", "seed"))
        if "error" not in record and (key not in best or score(record) > score(best[key])):
            best[key] = record
    return list(best.values())


def _gap(
    arm: str, length: float, runs: Sequence[Mapping[str, Any]], alone: Mapping[tuple[str, int], Mapping[str, Any]]
) -> Gap | None:
    compared = {name for name, _ in alone}
    rows = [row for row in runs[0]["subnets"] if row["is_member"] and row["name"] in compared] if runs else []
    rows.sort(key=lambda row: row["madds"])
    names = [row["name"] for row in rows]
    runs = [run for run in runs if all((name, run["seed"]) in alone for name in names)]
    if not runs or not names:
        return None
    ours = [[_top1(run, name) for run in runs] for name in names]
    theirs = [[_top1(alone[name, run["seed"]], name) for run in runs] for name in names]
    differences = [[x - y for x, y in zip(a, b, strict=True)] for a, b in zip(ours, theirs, strict=True)]
    return Gap(
        arm=arm,
        length=length,
        names=tuple(names),
        madds=tuple(row["madds"] for row in rows),
        supernet=tuple(map(_mean, ours)),
        alone=tuple(map(_mean, theirs)),
        factors=tuple(alone[name, runs[0]["seed"]]["factor"] for name in names),
        factor=runs[0]["factor"],
        gaps=tuple(map(t_interval, differences)),
        mean=t_interval([_mean(column) for column in zip(*differences, strict=True)]),
        cost=runs[0]["train_pmadds"] / runs[0]["all_alone_pmadds"],
        steps=(runs[0]["steps"], alone[names[0], runs[0]["seed"]]["steps"]),
    )


def _top1(record: Mapping[str, Any], name: str) -> float:
    (found,) = (row["top1"] for row in record["subnets"] if row["name"] == name)
    return float(found)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def make_sections(records: Sequence[Mapping[str, Any]], what: str) -> list[Section]:
    """Sections of the report: a summary, the gaps by width, and the curves over steps."""
    gaps = find_gaps(records)
    columns = ("way of training", "steps", "rate", "cost", "seeds", "mean", "smallest", "largest", "points below 0")
    rows = [
        (
            gap.arm,
            f"{gap.steps[0]} / {gap.steps[1]}",
            f"{gap.factor:g}",
            f"{gap.cost:.2f}",
            str(gap.mean.num_seeds),
            _points(gap.mean),
            _points(gap.gaps[0]),
            _points(gap.gaps[-1]),
            signed(100 * min(0.0, *(part.mean for part in gap.gaps))),
        )
        for gap in gaps
    ]
    title = (
        f"{what} on test: supernet minus the same network alone, points ± half of the 95 % t-interval over seeds; "
        "steps: supernet / alone; "
        "rate: the supernet's learning rate over the scale's; cost: its compute over that of all alone; last column: the worst sub-network"
    )
    return [
        Section(title, columns, rows),
        *map(_width_section, gaps),
        *_length_sections(records),
        *_curve_sections(records),
    ]


def _length_sections(records: Sequence[Mapping[str, Any]]) -> list[Section]:
    """Comparison of the ways of training at every length: the mean over sub-networks, and its
    difference to cross-entropy."""
    rows = []
    for length in sorted({record["length"] for record in records}, reverse=True):
        means: dict[str, dict[int, float]] = {}
        steps = 0
        for record in best_rates(records):
            if record["length"] == length and record["arm"] in ARMS and ARMS[record["arm"]].cost_share is None:
                members = [row["top1"] for row in record["subnets"] if row["is_member"]]
                means.setdefault(record["arm"], {})[record["seed"]] = _mean(members) if members else math.nan
                steps = record["steps"]
        for arm in (name for name in ARMS if name in means):
            paired = [value - means["ce"][seed] for seed, value in means[arm].items() if seed in means.get("ce", {})]
            top1 = f"{100 * _mean(list(means[arm].values())):.1f}"
            difference = _points(t_interval(paired)) if paired and arm != "ce" else ""
            rows.append((arm, str(steps), str(len(means[arm])), top1, difference))
    columns = ("way of training", "steps", "seeds", "mean over sub-networks %", "minus ce, points")
    return [Section("Ways of training at equal steps, on test", columns, rows)] if rows else []


def _points(part: Interval) -> str:
    text = signed(100 * part.mean)
    return text if part.half is None else f"{text} ±{100 * part.half:.1f}"


def _width_section(gap: Gap) -> Section:
    rows = [
        (
            gap.names[k],
            f"{gap.madds[k] / 1e6:.3g}",
            f"{100 * gap.supernet[k]:.1f}",
            f"{100 * gap.alone[k]:.1f}",
            f"{gap.factors[k]:g}",
            _points(gap.gaps[k]),
        )
        for k in range(len(gap.names))
    ]
    columns = ("sub-network", "MAdds M", "supernet %", "alone %", "rate alone", "gap")
    return Section(f"{gap.arm}, {gap.steps[0]} steps against {gap.steps[1]} alone", columns, rows)


def _curve_sections(records: Sequence[Mapping[str, Any]]) -> list[Section]:
    """Mean accuracy over the sub-networks on `val` during training, for each way and alone."""
    sections = []
    for length in sorted({record["length"] for record in records}, reverse=True):
        rows = []
        for arm in (*ARMS, ALONE):
            runs = [record for record in best_rates(records) if record["arm"] == arm and record["length"] == length]
            runs = [record for record in runs if record.get("curve")]
            if runs:
                rows.append((arm, *_curve(runs)))
        if rows:
            width = max(map(len, rows))
            columns = ("way of training", *(f"look {k}" for k in range(1, width)))
            padded = [(*row, *[""] * (width - len(row))) for row in rows]
            sections.append(Section(f"Curves, length {length:.3g}: steps: mean top-1 % on val", columns, padded))
    return sections


def _curve(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    of_steps: dict[int, list[float]] = {}
    for run in runs:
        for point in run["curve"]:
            members = {row["name"] for row in run["subnets"] if row["is_member"]}
            of_steps.setdefault(point["steps"], []).append(_mean([point["val"][name] for name in sorted(members)]))
    return [f"{steps}: {100 * _mean(values):.1f}" for steps, values in sorted(of_steps.items())]


def make_report(folder: Path) -> Report:
    """Make the report; the headline is the mean gap of `ib` to networks trained alone at equal
    steps.

    Raises:
        PreflightError: there are no finished runs of `ib` beside all of its sub-networks alone.
    """
    if not (folder / PLAN).exists():
        raise PreflightError(f"{folder} has no runs; run `train` first, with the same --folder")
    scale, records = read_json(folder / PLAN)["scale"], load_records(folder)
    gaps = find_gaps(records)
    first = next((gap for gap in gaps if gap.arm == "ib" and gap.length == 1.0), None)
    if first is None:
        raise PreflightError(
            f"{folder}: the runs of ib, and of its sub-networks alone, are not finished; continue with `train`"
        )
    half = 100 * first.mean.half if first.mean.half is not None else math.nan
    below = -100 * first.mean.mean
    label = (
        f"points of ib below the same networks alone, mean of {len(first.names)}, {scale['family']} on {scale['data']}"
    )
    headline = Headline(label, Estimate(below, below - half, below + half), "", GOAL)
    what = "Mean over classes" if scale["is_balanced"] else "Top-1"
    figures = {"scale": scale, "gaps": [asdict(gap) for gap in gaps], "runs": list(records)}
    return Report(make_sections(records, what), headline, figures)
