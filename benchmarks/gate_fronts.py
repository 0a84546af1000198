"""Training of gates on the routing table compared with training end to end on images: time, and
quality of the front.

It needs a run whose supernet and tables are done (`--run FOLDER`). For a few targets the published
gate is trained twice with the same settings: on the table, in one cohort, and end to end through
the frozen supernet (straight-through Gumbel choices). Both are calibrated and scored on `val`, with
a paired interval over images. The headline is the ratio of the time of an end-to-end trial of 30
epochs and a table trial's share of its cohort's time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.harness import Estimate, Headline, Options, Report, Section, run_benchmark
from dsnet.errors import NonFiniteLossError
from dsnet.gates.end_to_end import GateImages, seconds_per_epoch, train_end_to_end
from dsnet.gates.fit import GateFit, calibrate_heads, fit_gates
from dsnet.gates.problem import beam
from dsnet.gates.settings import EndToEndSettings, GateSettings
from dsnet.network.supernet import Supernet
from dsnet.routing.routing_table import RoutingTable
from dsnet.stored.checkpoint import load_supernet
from dsnet.stored.names import FINAL
from dsnet.wording import signed
from orchestration.commands.planning import prepare_again
from orchestration.results.run import RunResults
from orchestration.runs.folder import RunDir
from search.front.controls import StaticLine
from search.front.statistics import bootstrap_interval, resample_points

BENCHMARK = "a table trial against one trained end to end, on a run's supernet: the cost, and the fronts (goal: 10,000 times cheaper)"
GOAL_PPM = 100.0
"""10,000 times cheaper."""
PUBLISHED_EPOCHS = 30
COHORT = 64
NUM_CHOICES = 4
"""Number of routes, that of the published gate."""


@dataclass(frozen=True)
class Material:
    """A run's supernet, tables and gate images."""

    supernet: Supernet
    gate: RoutingTable
    val: RoutingTable
    images: GateImages

    @classmethod
    def of(cls, folder: Path) -> Material:
        """Read the material of a run."""
        results = RunResults(RunDir(folder.parent, folder.name))
        prepared = prepare_again(results)
        supernet, _ = load_supernet(results.run.stage_dir("supernet", results.done_key("supernet")) / FINAL)
        key = results.done_key("table")
        gate, val = (RoutingTable.load(results.run.table(key, split)) for split in ("gate", "val"))
        data = prepared.data
        return cls(supernet, gate, val, GateImages(data.images("gate"), data.labels("gate"), prepared.normalization))


def settings_for(targets: Sequence[float], table: RoutingTable, seed: int) -> list[GateSettings]:
    """Settings of the published gate over four routes of the static front, with a target; with
    losses without and with SGS."""
    routes = tuple(sorted(beam(table, NUM_CHOICES)))
    base = GateSettings(
        routes=routes, lr=0.02, complexity_form="quadratic", lambda_complexity=3.0, temperature_end=0.5, seed=seed
    )
    return [replace(base, target=target, lambda_sgs=sgs) for sgs in (0.0, 0.3) for target in targets]


def measure(options: Options, run: Path, epochs: int, pairs: int) -> Report:
    """Train the gates in both ways and compare them."""
    material = Material.of(run)
    targets = (0.3,) if options.quick else (0.15, 0.3, 0.5)
    compared_settings = settings_for(targets, material.gate, options.seed)[:pairs]
    table_s = _table_seconds(material, compared_settings)
    fits = [_checked(fit) for fit in fit_gates(material.gate, material.val, compared_settings)]
    rules = EndToEndSettings(epochs=epochs)
    rows, compared, seconds = [], [], []
    for settings, fit in zip(compared_settings, fits, strict=True):
        start = time.perf_counter()
        heads = train_end_to_end(material.supernet, material.images, settings, rules)
        seconds.append(time.perf_counter() - start)
        other = calibrate_heads(material.val, settings, heads)
        compared.append(_compared(material, settings, fit, other))
        rows.append(_row(compared[-1]))
    epoch_s = [seconds_per_epoch(material.supernet, material.images, compared_settings[0], rules) for _ in range(3)]
    cost = PUBLISHED_EPOCHS * np.median(epoch_s)
    estimate = Estimate(
        float(1e6 * np.median(table_s) / cost),
        float(1e6 * min(table_s) / (PUBLISHED_EPOCHS * max(epoch_s))),
        float(1e6 * max(table_s) / (PUBLISHED_EPOCHS * min(epoch_s))),
    )
    columns = (
        "target",
        "SGS",
        "table: top-1 %",
        "M MAdds",
        "over the line",
        f"end to end, {epochs} epochs: top-1 %",
        "M MAdds",
        "over the line",
        "difference [95 %]",
    )
    costs = [
        ("table trial, in a cohort of 64", f"{1e3 * np.median(table_s):.1f} ms", "1"),
        ("one epoch end to end", f"{np.median(epoch_s):.1f} s", f"{np.median(epoch_s) / np.median(table_s):,.0f}"),
        (f"a trial of {PUBLISHED_EPOCHS} epochs", f"{cost:.0f} s", f"{cost / np.median(table_s):,.0f}"),
    ]
    return Report(
        [
            Section(
                f"Published gate over {NUM_CHOICES} routes, on val ({material.val.num_images} images)", columns, rows
            ),
            Section(f"Cost, {options.threads} thread(s)", ("", "time", "table trials"), costs),
        ],
        Headline(
            f"a table trial, in millionths of an end-to-end trial of {PUBLISHED_EPOCHS} epochs (lowest and highest repeat)",
            estimate,
            "",
            GOAL_PPM,
        ),
        {"compared": compared, "table_s": table_s, "epoch_s": epoch_s, "end_to_end_s": seconds, "epochs": epochs},
    )


def _table_seconds(material: Material, pairs: Sequence[GateSettings]) -> list[float]:
    """Seconds of a trial's share of a cohort, measured five times after a warm-up."""
    cohort = [replace(pairs[index % len(pairs)], target=0.05 + 0.9 * index / COHORT) for index in range(COHORT)]
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        fit_gates(material.gate, material.val, cohort)
        seconds.append((time.perf_counter() - start) / COHORT)
    return seconds[1:]


def _checked(fit: GateFit | Exception) -> GateFit:
    if isinstance(fit, Exception):
        raise NonFiniteLossError(f"a gate of the comparison could not be trained: {fit}") from fit
    return fit


def _compared(material: Material, settings: GateSettings, table: GateFit, images: GateFit) -> dict[str, Any]:
    """Compare both gates on `val`; the vertices of the static line are chosen on `gate`, because
    `val` is the reported split."""
    val = material.val
    line = StaticLine.fit(val.madds, material.gate.correct1)
    rows = np.arange(val.num_images)
    correct = np.column_stack([val.correct1[rows, fit.run.routes] for fit in (table, images)])
    sample = resample_points(correct, np.column_stack([fit.run.madds for fit in (table, images)]), 1000)
    low, high = bootstrap_interval(sample.resampled_top1[:, 0] - sample.resampled_top1[:, 1])
    gains = sample.top1 - line.value_at(sample.madds, val.correct1)
    return {
        "settings": asdict(settings),
        "top1": sample.top1.tolist(),
        "madds_m": (sample.madds / 1e6).tolist(),
        "gain": gains.tolist(),
        "difference": [float(sample.top1[0] - sample.top1[1]), float(low), float(high)],
    }


def _row(found: dict[str, Any]) -> tuple[str, ...]:
    value, low, high = (100 * number for number in found["difference"])
    cells = [f"{found['settings']['target']:g}", f"{found['settings']['lambda_sgs']:g}"]
    for top1, madds_m, gain in zip(found["top1"], found["madds_m"], found["gain"], strict=True):
        cells += [f"{100 * top1:.1f}", f"{madds_m:.2f}", signed(100 * gain)]
    return (*cells, f"{signed(value)} [{signed(low)}, {signed(high)}]")


if __name__ == "__main__":
    run_benchmark(
        BENCHMARK,
        measure,
        threads=1,
        params=[
            click.Option(
                ["--run"], required=True, type=click.Path(exists=True, path_type=Path), help="A run's folder."
            ),
            click.Option(
                ["--epochs"], default=5, show_default=True, type=click.IntRange(1), help="Of end-to-end training."
            ),
            click.Option(
                ["--pairs"], default=6, show_default=True, type=click.IntRange(1, 6), help="Settings that are compared."
            ),
        ],
    )
