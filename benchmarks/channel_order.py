"""Orders of channels: accuracy of the sub-networks of a trained plain network that consist of its
first channels, without any further training.

A small plain residual network is trained with cross-entropy in plain PyTorch. Its channels are
sorted in each way, sub-networks with one ratio for all channel groups are cut, and their BatchNorm
statistics are estimated anew. Test images are read once per network and order, and nothing is
chosen on them.

    DSNET_DATA=DIR python -m benchmarks.channel_order
    python -m benchmarks.channel_order --quick
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.harness import Estimate, Headline, Options, Report, Section, run_benchmark
from benchmarks.pretrained import (
    MODEL,
    NUM_SEEDS,
    SCALES,
    Material,
    accuracies,
    chosen,
    paired,
    pretrain,
    settings,
    shown,
)
from benchmarks.regime_report import t_interval
from dsnet.import_path import ALLOW_IMPORTS
from dsnet.network.batchnorm import recalibrate
from dsnet.structure.settings import Order, StructureSettings
from dsnet.training.supernet import recalibration_batches

BENCHMARK = "orders of channels, without further training: test error of order noise over weight_l1 (goal: at most 1)"
TARGETS = (0.25, 0.5, 0.75)
ORDERS: tuple[Order, ...] = get_args(Order)


def measure_order(material: Material, order: Order, seed: int, source: Path) -> dict[str, Any]:
    """Accuracies on test of the sub-networks of one order, and the seconds of sorting."""
    run = settings(material, material.scale.after, 1.0, seed, 10.0)
    wanted = StructureSettings(method="uniform", targets=TARGETS, order=order, step=2)
    start = time.perf_counter()
    _, supernet = chosen(material, wanted, run, source)
    seconds = time.perf_counter() - start
    recalibrate(supernet, recalibration_batches(material.training, run, torch.device("cpu")))
    return {"top1": accuracies(material, supernet, run), "seconds": seconds}


def measure(options: Options) -> Report:
    """Every order for three networks: on digits with --quick, otherwise on CIFAR-10 from
    DSNET_DATA."""
    os.environ[ALLOW_IMPORTS] = "1"
    scale = SCALES["quick" if options.quick else "cifar"]
    material = Material.load(scale if options.quick else replace(scale, before=2 * scale.before))
    results: dict[str, list[dict[str, Any]]] = {order: [] for order in ORDERS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seed, options.seed + NUM_SEEDS):
            source = Path(folder) / f"plain-{seed}.pth"
            pretrain(material, seed, source)
            for order in ORDERS:
                results[order].append(measure_order(material, order, seed, source))
                print(f"seed {seed}, {order}: {results[order][-1]}", file=sys.stderr, flush=True)
    return report(results)


def report(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> Report:
    """Tables of accuracies, and of differences to `weight_l1` paired by seed, with t-intervals over
    seeds."""
    columns = tuple(f"{target:g} of the MAdds" for target in TARGETS)
    places = range(len(TARGETS))
    rows = [
        (
            order,
            *(shown([100 * run["top1"][place] for run in runs]) for place in places),
            shown([run["seconds"] for run in runs]),
        )
        for order, runs in results.items()
    ]
    differences = [
        (order, *(shown(paired(runs, results["weight_l1"], place)) for place in places))
        for order, runs in results.items()
        if order != "weight_l1"
    ]
    errors = [[1 - sum(run["top1"]) / len(TARGETS) for run in results[order]] for order in ("noise", "weight_l1")]
    found = t_interval([noise / other for noise, other in zip(*errors, strict=True)])
    half = found.half or 0.0
    return Report(
        [
            Section(f"top-1 on test of {MODEL}, %", ("order", *columns, "seconds"), rows),
            Section("difference to weight_l1, paired by seed, points", ("order", *columns), differences),
        ],
        Headline("error of noise over weight_l1", Estimate(found.mean, found.mean - half, found.mean + half), "", 1.0),
        {"results": {order: list(runs) for order, runs in results.items()}},
    )


if __name__ == "__main__":
    run_benchmark(BENCHMARK, measure, threads=1)
