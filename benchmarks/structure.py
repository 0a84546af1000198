"""Ways of getting sub-networks at equal MAdds and at equal total cost of training.

Networks trained alone, slimmable networks (all widths, or any width), in-place bootstrapping of
uniform widths, of those that AutoSlim's search finds, and of random ones, and SP-Net's pruning
beside uniform widths with its joint training. Every way may spend the same MAdds on everything that
it trains and scores; how many epochs that gives follows, rounded to whole ones, and the true cost
is recorded. Learning rate, weight decay, batches, augmentation, averaged weights, recalibration and
images are equal; no way chooses its learning rate. Accuracy is that on `test`, on which nothing is
chosen; differences are to `uniform_ib` and to uniform widths with the same joint training, paired
by seed.

    python -m benchmarks.structure run --scale digits --folder F --max-seconds 540
    python -m benchmarks.structure run --scale cifar --folder F --data DIR --max-seconds 540
    python -m benchmarks.structure run --scale gpu --folder F --data DIR --device cuda
    python -m benchmarks.structure report --folder F
    python -m benchmarks.structure --quick

`run` needs only torch and dsnet. It may be killed at any time and repeated until its exit code is
0; several processes of the same host can share a folder.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.folder_commands import (
    NUM_SEEDS,
    add_report_options,
    add_train_options,
    chosen_device,
    run_main,
    work_off,
)
from benchmarks.regime_runs import begin, do_jobs
from benchmarks.structure_runs import ARMS, QUICK_ARMS, SCALES, Trainer, jobs, load_split_images
from dsnet.files import atomic_write_json, atomic_write_text
from dsnet.import_path import ALLOW_IMPORTS

if TYPE_CHECKING:
    from benchmarks.harness import Options, Report

BENCHMARK = "ways of getting sub-networks at equal cost: points of AutoSlim's below uniform widths, mean over targets (goal: at most 0.5)"


def measure(options: Options) -> Report:
    """A tiny set of digits and two seeds with --quick, else the `digits` scale (about a quarter of
    an hour on one thread)."""
    from benchmarks.structure_report import load_results, make_report  # `run` has to work without Plotly and rich

    _allow_own_networks()
    scale, arms = (SCALES["quick"], QUICK_ARMS) if options.quick else (SCALES["digits"], tuple(ARMS))
    seeds = range(options.seed, options.seed + (2 if options.quick else NUM_SEEDS))
    with tempfile.TemporaryDirectory() as folder:
        images = load_split_images(scale, None)
        begin(Path(folder), scale, images)
        do_jobs(Path(folder), jobs(arms, seeds), Trainer(scale, images, torch.device("cpu")))
        return make_report(load_results(Path(folder)))


def run(arguments: argparse.Namespace) -> None:
    """Do the wanted runs that are not done yet.

    Raises:
        StoppedError: some runs are left, because time ran out or other processes hold them.
    """
    _allow_own_networks()
    device, scale = chosen_device(arguments), SCALES[arguments.scale]
    images = load_split_images(scale, arguments.data)
    begin(arguments.folder, scale, images)
    work_off(arguments, jobs(arguments.arms, arguments.seeds), Trainer(scale, images, device))


def _allow_own_networks() -> None:
    """Allow models by import path: the networks of the scales are those of
    `benchmarks.plain_networks`."""
    os.environ[ALLOW_IMPORTS] = "1"


def report(arguments: argparse.Namespace) -> None:
    """Print the tables, and write them with the figure and all numbers into the folder."""
    from benchmarks.regime_report import markdown
    from benchmarks.structure_figure import structure_figure
    from benchmarks.structure_report import figures, load_results, make_sections, subject
    from dashboards.images import write_figure

    results = load_results(arguments.folder)
    text = f"{subject(results)}\n\n{markdown(make_sections(results))}"
    atomic_write_text(arguments.folder / "report.md", text)
    atomic_write_json(arguments.folder / "report.json", figures(results))
    targets = [arguments.folder / "figure.html", *([arguments.svg] if arguments.svg is not None else [])]
    for target in targets:
        write_figure(structure_figure(results), target)
    print(text)
    print(f"written: {arguments.folder}/report.md, report.json, {', '.join(map(str, targets))}")


def parser() -> argparse.ArgumentParser:
    """The two commands that work on a folder."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.structure", description=BENCHMARK)
    commands = top.add_subparsers(required=True)
    one = commands.add_parser("run", help="do the runs that are left; exit code 6 while some are left")
    one.set_defaults(command=run)
    add_train_options(one)
    one.add_argument("--scale", choices=list(SCALES), default="digits")
    one.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM")
    two = commands.add_parser("report", help="tables, figure and numbers of the finished runs")
    two.set_defaults(command=report)
    add_report_options(two)
    return top


def main(argv: Sequence[str]) -> int:
    """Run a command on a folder, or the benchmark by the harness."""
    return run_main(argv, parser(), BENCHMARK, measure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
