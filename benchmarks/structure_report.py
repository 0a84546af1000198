"""Report on the runs of `structure`: accuracy per target with t-intervals over seeds, differences
to `uniform_ib` and to uniform widths with the same joint training, paired by seed, and where the
cost went."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.alone_runs import load_records
from benchmarks.harness import Estimate, Headline, Report, Section
from benchmarks.regime_report import LEVEL, Interval, t_interval
from benchmarks.regime_runs import PLAN
from benchmarks.structure_runs import ARMS, BASELINE
from dsnet.errors import PreflightError
from dsnet.files import read_json
from dsnet.wording import plural, signed

GOAL = 0.5
"""Largest number of percentage points, mean over targets, of AutoSlim's sub-networks below uniform
ones."""
COMPARED = "autoslim"
SPLITS = {"test": "top1", "val": "val"}
"""Split -> the field of a record that has its accuracy."""
MEAN = "mean"


@dataclass(frozen=True)
class Results:
    """The records of a folder, in the order of the arms and then by seed."""

    scale: Mapping[str, Any]
    records: tuple[Mapping[str, Any], ...]
    """Records of the runs that trained."""
    failures: tuple[Mapping[str, Any], ...]

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms that have a trained run."""
        return tuple(dict.fromkeys(record["arm"] for record in self.records))

    @property
    def targets(self) -> tuple[str, ...]:
        """The names of the targets, from the cheapest."""
        return tuple(row["name"] for row in self.records[0]["subnets"])

    @property
    def target_madds(self) -> tuple[float, ...]:
        """MAdds of the targets."""
        return tuple(row["target_madds"] for row in self.records[0]["subnets"])

    @property
    def num_test_images(self) -> int:
        """Number of images of `test`."""
        return int(self.records[0]["num_test_images"])

    def of_arm(self, arm: str) -> list[Mapping[str, Any]]:
        """The records of an arm by seed."""
        return [record for record in self.records if record["arm"] == arm]

    def top1(self, arm: str, split: str = "test") -> dict[int, list[float]]:
        """Seed -> top-1 of each target and, last, their mean."""
        found = {}
        for record in self.of_arm(arm):
            values = [float(row[SPLITS[split]]) for row in record["subnets"]]
            found[int(record["seed"])] = [*values, fmean(values)]
        return found

    def accuracy(self, arm: str, split: str = "test") -> list[Interval]:
        """Top-1 of each target and the mean, over the arm's seeds."""
        return _columns(list(self.top1(arm, split).values()))

    def difference(self, arm: str, split: str = "test", base: str = BASELINE) -> list[Interval]:
        """Top-1 minus that of another arm with the same seed; empty if they have no seed in
        common."""
        ours, theirs = self.top1(arm, split), self.top1(base, split)
        seeds = [seed for seed in ours if seed in theirs]
        return _columns([[a - b for a, b in zip(ours[seed], theirs[seed], strict=True)] for seed in seeds])


def _columns(rows: Sequence[Sequence[float]]) -> list[Interval]:
    return [t_interval(column) for column in zip(*rows, strict=True)]


def load_results(folder: Path) -> Results:
    """Read the finished runs of a folder.

    Raises:
        PreflightError: there are none, or none has trained.
    """
    if not (folder / PLAN).exists():
        raise PreflightError(f"{folder} has no runs; run `run` first, with the same --folder")
    order = list(ARMS)
    records = sorted(load_records(folder), key=lambda record: (order.index(record["arm"]), record["seed"]))
    trained = tuple(record for record in records if "error" not in record)
    if not trained:
        raise PreflightError(
            f"{folder}: none of {plural(len(records), 'run')} has been trained to its end; continue with `run`"
        )
    return Results(read_json(folder / PLAN)["scale"], trained, tuple(r for r in records if "error" in r))


def subject(results: Results) -> str:
    """Data, network and training in one sentence."""
    scale, first = results.scale, results.records[0]
    widest = max(row["madds"] for row in first["subnets"])
    train = scale["train"]
    network = str(scale["model"]).rpartition(":")[2]
    return (
        f"{network} ({widest / 1e6:.3g} M MAdds) on {scale['data']}; budget {first['budget_madds'] / 1e12:.3g} T MAdds, "
        f"that of {train['epochs']} epochs of {BASELINE}; batches of {train['batch_size']}, learning rate {train['lr']:g}, "
        f"weight decay {train['weight_decay']:g}"
    )


def make_sections(results: Results) -> list[Section]:
    """Sections of the report: what the ways are, accuracy and differences on `test`, cost, the same
    on `val`, and failed runs."""
    sections = [
        Section("The ways", ("way", "what it is"), [(arm, ARMS[arm].label) for arm in results.arms]),
        *_accuracy_sections(results, "test", f"the {results.num_test_images:,} images of test"),
        _cost_section(results),
        *_accuracy_sections(results, "val", "val, on which nothing was chosen either"),
    ]
    if results.failures:
        rows = [(record["arm"], str(record["seed"]), record["error"]) for record in results.failures]
        sections.append(Section("Failed runs, which are not part of the tables above", ("way", "seed", "why"), rows))
    return sections


def _accuracy_sections(results: Results, split: str, images: str) -> list[Section]:
    """The table of accuracies and those of differences on one split."""
    interval = f"± half of the {100 * LEVEL:g} % t-interval over seeds"
    columns = ("way", "seeds", *results.targets, MEAN)
    found = [
        Section(
            f"Top-1 on {images}, %, by MAdds as a share of the widest's; mean over seeds {interval}",
            columns,
            _rows(results, lambda arm: results.accuracy(arm, split), _percent),
        )
    ]
    to_baseline = {arm: BASELINE for arm in results.arms if arm != BASELINE}
    to_control = {arm: ARMS[arm].control for arm in results.arms if ARMS[arm].control not in (arm, BASELINE)}
    for bases, words in (
        (to_baseline, BASELINE),
        (to_control, f"{' or '.join(dict.fromkeys(to_control.values()))}, the uniform widths of its kind of training,"),
    ):
        found += _difference_sections(results, split, bases, words)
    return found


def _difference_sections(results: Results, split: str, bases: Mapping[str, str], words: str) -> list[Section]:
    """The table of differences on one split; none where no two arms have a seed in common.

    Args:
        results: the runs.
        split: `test` or `val`.
        bases: arm -> the arm to which it is compared.
        words: the arms to which they are compared, for the title.
    """
    differences = {arm: results.difference(arm, split, base) for arm, base in bases.items()}
    parts = [part for row in differences.values() for part in row]
    if not parts:
        return []
    title = f"Top-1 minus that of {words} with the same seed on {split}, points ± half of the {100 * LEVEL:g} % t-interval over seeds"
    if any(part.half is not None for part in parts):
        title += (
            f"; 0 is outside of {sum(part.excludes_zero for part in parts)} of {len(parts)} intervals, "
            f"where chance alone gives {(1 - LEVEL) * len(parts):.1f}"
        )
    rows = _rows(results, lambda arm: differences.get(arm, []), difference_text)
    return [Section(title, ("way", "seeds", *results.targets, MEAN), rows)]


def _rows(
    results: Results, of_arm: Callable[[str], Sequence[Interval]], worded: Callable[[Interval], str]
) -> list[tuple[str, ...]]:
    found = {arm: of_arm(arm) for arm in results.arms}
    return [(arm, str(parts[0].num_seeds), *(worded(part) for part in parts)) for arm, parts in found.items() if parts]


def _percent(part: Interval) -> str:
    text = f"{100 * part.mean:.1f}"
    return text if part.half is None else f"{text} ±{100 * part.half:.1f}"


def difference_text(part: Interval) -> str:
    """A difference in points; `no difference` where its interval holds 0; a single seed has no
    interval."""
    if part.half is None:
        return f"{signed(100 * part.mean)} (1 seed)"
    text = f"{signed(100 * part.mean)} ±{100 * part.half:.1f}"
    return text if part.excludes_zero else f"no difference ({text})"


def _cost_section(results: Results) -> Section:
    rows = []
    for arm in results.arms:
        records = results.of_arm(arm)
        spent = {
            name: fmean(record["spent_madds"][name] / record["budget_madds"] for record in records)
            for name in ("bases", "search", "training", "total")
        }
        off = [
            fmean(record["subnets"][k]["madds"] / record["subnets"][k]["target_madds"] - 1 for record in records)
            for k in range(len(results.targets))
        ]
        rows.append(
            (
                arm,
                "/".join(str(epochs) for epochs in dict.fromkeys(record["epochs"] for record in records)),
                *(f"{spent[name]:.2f}" for name in ("bases", "search", "training")),
                f"{spent['total']:.3f}",
                *(signed(100 * value) for value in off),
            )
        )
    columns = (
        "way",
        "epochs",
        "before the search",
        "search",
        "training",
        "total",
        *(f"MAdds over {name}, %" for name in results.targets),
    )
    return Section("Cost as shares of the budget, and MAdds relative to the targets; means over seeds", columns, rows)


def make_report(results: Results) -> Report:
    """Make the report for the harness; the headline compares AutoSlim's sub-networks with uniform
    ones.

    Raises:
        PreflightError: these two have no seed in common.
    """
    difference = results.difference(COMPARED)
    if not difference:
        raise PreflightError(f"{COMPARED} and {BASELINE} have no seed in common; continue with `run`")
    mean = difference[-1]
    half = 100 * mean.half if mean.half is not None else math.nan
    below = -100 * mean.mean
    label = (
        f"points of {COMPARED} below {BASELINE} at equal cost, mean over targets, {results.scale['data']}, "
        f"{plural(mean.num_seeds, 'seed')}"
    )
    return Report(
        make_sections(results), Headline(label, Estimate(below, below - half, below + half), "", GOAL), figures(results)
    )


def figures(results: Results) -> dict[str, Any]:
    """All numbers of the tables and all records, JSON-able; accuracies are fractions, and the last
    entry of each list is the mean."""
    return {
        "subject": subject(results),
        "scale": dict(results.scale),
        "level": LEVEL,
        "targets": list(results.targets),
        "accuracy": {
            split: {arm: [asdict(part) for part in results.accuracy(arm, split)] for arm in results.arms}
            for split in SPLITS
        },
        "differences": {
            split: {arm: [asdict(part) for part in results.difference(arm, split)] for arm in results.arms}
            for split in SPLITS
        },
        "differences_to_control": {
            split: {
                arm: [asdict(part) for part in results.difference(arm, split, ARMS[arm].control)]
                for arm in results.arms
            }
            for split in SPLITS
        },
        "runs": [dict(record) for record in (*results.records, *results.failures)],
    }
