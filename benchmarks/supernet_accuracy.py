"""Comparison of training regimes at equal steps: accuracy of every width, paired differences with
intervals over seeds, and time.

Data, batches, epochs, optimiser, augmentation and evaluation (averaged weights, recalibrated, on
the test split, on which nothing is chosen) are equal. The work of a step is not: `ce` and `s_net`
train every width in each step, the others four; the tables give passes and time.

    python -m benchmarks.supernet_accuracy train --scale gpu --folder F --data DIR --device cuda \\
        --max-seconds 540   # repeat until all are done
    python -m benchmarks.supernet_accuracy report --folder F
    python -m benchmarks.supernet_accuracy --quick

`train` needs only torch and dsnet, may be repeated and killed at any time, and can share its folder
with other processes of the same host.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
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
from benchmarks.regime_runs import ARMS, SCALES, USUAL_ARMS, Scale, Trainer, begin, do_jobs, jobs, load_material
from dsnet.files import atomic_write_json, atomic_write_text

if TYPE_CHECKING:
    from benchmarks.harness import Options, Report

BENCHMARK = "training regimes at equal steps, all widths: test error of in-place bootstrapping over in-place distillation (goal: at most 1)"


def measure(options: Options) -> Report:
    """Train all usual regimes with three seeds: on digits with --quick, otherwise at the `cpu`
    scale on CIFAR-10 from DSNET_DATA (about half an hour)."""
    from benchmarks.regime_report import load_results, make_report  # `train` has to work without Plotly and rich

    scale = SCALES["quick" if options.quick else "cpu"]
    todo = jobs(USUAL_ARMS, range(options.seed, options.seed + NUM_SEEDS))
    with tempfile.TemporaryDirectory() as folder:
        material = load_material(scale, None)
        begin(Path(folder), scale, material)
        do_jobs(Path(folder), todo, Trainer(scale, material, torch.device("cpu")))
        return make_report(load_results(Path(folder)))


def chosen_scale(arguments: argparse.Namespace) -> Scale:
    """The named scale with the overrides of the command line."""
    scale = SCALES[arguments.scale]
    if arguments.epochs is not None:
        scale = replace(scale, train=replace(scale.train, epochs=arguments.epochs))
    if arguments.train_images is not None:
        scale = replace(scale, num_train=arguments.train_images)
    return scale


def train(arguments: argparse.Namespace) -> None:
    """Do the wanted runs that are not done yet.

    Raises:
        StoppedError: some runs are left, because time ran out or other processes hold them.
    """
    device = chosen_device(arguments)
    scale = chosen_scale(arguments)
    material = load_material(scale, arguments.data)
    begin(arguments.folder, scale, material)
    work_off(arguments, jobs(arguments.regimes, arguments.seeds), Trainer(scale, material, device))


def report(arguments: argparse.Namespace) -> None:
    """Print the tables, and write them with the figure and all numbers into the folder."""
    from benchmarks.regime_report import figures, load_results, make_sections, markdown, regimes_info, subject
    from dashboards.images import write_figure
    from dashboards.regimes import regimes_figure

    results = load_results(arguments.folder)
    text = f"{subject(results)}\n\n{markdown(make_sections(results))}"
    figure = regimes_figure(regimes_info(results))
    atomic_write_text(arguments.folder / "report.md", text)
    atomic_write_json(arguments.folder / "report.json", figures(results))
    targets = [arguments.folder / "figure.html", *([arguments.svg] if arguments.svg is not None else [])]
    for target in targets:
        write_figure(figure, target)
    print(text)
    print(f"written: {arguments.folder}/report.md, report.json, {', '.join(map(str, targets))}")


def parser() -> argparse.ArgumentParser:
    """The two commands that work on a folder."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.supernet_accuracy", description=BENCHMARK)
    commands = top.add_subparsers(required=True)
    one = commands.add_parser("train", help="train and test the runs that are left; exit code 6 while some are left")
    one.set_defaults(command=train)
    add_train_options(one)
    one.add_argument("--scale", choices=list(SCALES), default="cpu")
    one.add_argument("--regimes", nargs="+", choices=list(ARMS), default=list(USUAL_ARMS), metavar="REGIME")
    one.add_argument("--epochs", type=int, help="instead of the scale's; needs a folder of its own")
    one.add_argument("--train-images", type=int, help="instead of the scale's; needs a folder of its own")
    two = commands.add_parser("report", help="tables, figure and numbers of the finished runs")
    two.set_defaults(command=report)
    add_report_options(two)
    return top


def main(argv: Sequence[str]) -> int:
    """Run a command on a folder, or the benchmark by the harness."""
    return run_main(argv, parser(), BENCHMARK, measure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
