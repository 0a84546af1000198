"""The cost of weight sharing in accuracy: every sub-network of a supernet against the same network
trained alone with fresh weights.

Data, batches, steps, augmentation, weight averaging and evaluation (recalibrated; on `test`, on
which nothing is chosen) are equal. Every network, shared or alone, takes the best of three
learning rates, chosen on `val` with the first seed (that of a supernet by the mean of its
sub-networks). Supernets are also trained with a third of the compute that all their sub-networks
need alone, and with as much.

    python -m benchmarks.alone train --scale cifar --folder F --data DIR --max-seconds 540
    python -m benchmarks.alone train --scale photos --folder F --data FOLDER_OF_CLASSES
    python -m benchmarks.alone train --scale gpu --folder F --data DIR --device cuda
    python -m benchmarks.alone train --sweep SWEEP.yaml --folder F   # the network of a sweep
    python -m benchmarks.alone report --folder F
    python -m benchmarks.alone --quick

`train --scale` needs only torch and dsnet. `train` may be killed at any time and repeated until its
exit code is 0; several processes of the same host can share a folder.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.alone_runs import ARMS, SCALES, USUAL_ARMS, Material, Scale, Trainer, jobs, load_material
from benchmarks.folder_commands import NUM_SEEDS, add_train_options, chosen_device, run_main, work_off
from benchmarks.regime_runs import begin, do_jobs
from dsnet.errors import ConfigError
from dsnet.families import create, family_names
from dsnet.files import atomic_write_json, atomic_write_text

if TYPE_CHECKING:
    from benchmarks.harness import Options, Report

BENCHMARK = "sub-networks against the same networks trained alone: mean loss of top-1 in points (goal: at most 0.5)"


def measure(options: Options) -> Report:
    """A tiny set of digits with --quick, else the `digits` scale (about a quarter of an hour on one
    thread)."""
    from benchmarks.alone_report import make_report  # `train` has to work without rich

    scale = SCALES["quick" if options.quick else "digits"]
    seeds = range(options.seed, options.seed + (2 if options.quick else NUM_SEEDS))
    with tempfile.TemporaryDirectory() as folder:
        material = load_material(scale, None)
        begin(Path(folder), scale, material)
        trainer = Trainer(scale, material, torch.device("cpu"), Path(folder), seeds[0])
        do_jobs(Path(folder), jobs(USUAL_ARMS, compared(scale, material), seeds, scale.lengths), trainer)
        return make_report(Path(folder))


def compared(scale: Scale, material: Material) -> list[str]:
    """Names of the sub-networks that are trained alone."""
    if scale.alone is not None:
        return list(scale.alone)
    return [subnet.name for subnet in create(scale.family, material.task, scale.options).subnets]


def train(arguments: argparse.Namespace) -> None:
    """Do the wanted runs that are not done yet.

    Raises:
        StoppedError: some runs are left, because time ran out or other processes hold them.
    """
    device = chosen_device(arguments)
    scale = SCALES[arguments.scale] if arguments.sweep is None else scale_of_sweep(arguments.sweep)
    material = load_material(scale, arguments.data)
    begin(arguments.folder, scale, material)
    todo = jobs(arguments.arms, arguments.alone or compared(scale, material), arguments.seeds, scale.lengths)
    work_off(arguments, todo, Trainer(scale, material, device, arguments.folder, arguments.seeds[0]))


def scale_of_sweep(path: Path) -> Scale:
    """The network, the images and the training settings of a sweep file, including settings that
    depend on its data.

    Raises:
        DsnetError: the file or its data is wrong, or its splits cannot be made again here.
    """
    from orchestration.config.loading import load_config  # `train --scale` works without the platform's packages
    from orchestration.prepare.preparation import prepare

    prepared = prepare(load_config(path, known_models=family_names()).config)
    config, run = prepared.config, prepared.supernet_run
    if config.seed != 0 or config.data.limit is not None:
        raise ConfigError(
            f"{path}: the benchmark uses the splits of seed 0 and all images; remove seed and data.limit from the file"
        )
    sizes = {name: len(getattr(prepared.splits, name)) for name in ("train", "gate", "val", "test")}
    return Scale(
        data=config.data.name,
        path=config.data.path,
        image_size=config.data.image_size,
        sizes=sizes,
        augmentation=asdict(run.augmentation),
        family=config.supernet.model,
        options=config.supernet.options,
        train=run.train,
    )


def report(arguments: argparse.Namespace) -> None:
    """Print the tables, and write them with all numbers into the folder."""
    from benchmarks.alone_report import make_report
    from benchmarks.regime_report import markdown

    found = make_report(arguments.folder)
    text = f"{markdown(found.sections)}\n{found.headline.text()}\n"
    atomic_write_text(arguments.folder / "report.md", text)
    atomic_write_json(arguments.folder / "report.json", dict(found.figures))
    print(text)
    print(f"written: {arguments.folder}/report.md, report.json")


def parser() -> argparse.ArgumentParser:
    """The two commands that work on a folder."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.alone", description=BENCHMARK)
    commands = top.add_subparsers(required=True)
    one = commands.add_parser("train", help="train and test the runs that are left; exit code 6 while some are left")
    one.set_defaults(command=train)
    add_train_options(one)
    what = one.add_mutually_exclusive_group()
    what.add_argument("--scale", choices=list(SCALES), default="digits")
    what.add_argument("--sweep", type=Path, help="a sweep file, in place of a scale")
    one.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(USUAL_ARMS), metavar="ARM")
    one.add_argument(
        "--alone", nargs="+", metavar="NAME", help="sub-networks that are trained alone [default: the scale's]"
    )
    two = commands.add_parser("report", help="tables and numbers of the finished runs")
    two.set_defaults(command=report)
    two.add_argument("--folder", type=Path, required=True)
    return top


def main(argv: Sequence[str]) -> int:
    """Run a command on a folder, or the benchmark by the harness."""
    return run_main(argv, parser(), BENCHMARK, measure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
