"""Which dimension buys most accuracy for its MAdds and milliseconds: channels, kernels, embedding,
heads, MLP or blocks; also two choices of DS-Net++, and the acceleration of a dynamic transformer.

Every supernet has one widest sub-network and narrower ones at the same budgets of MAdds, which it
reaches in one dimension. Weights at the start, images, steps and settings are equal, so that the
trainings cost the same (the table says how nearly). Accuracy is that on `test`, on which nothing is
chosen. A difference is paired over the images: the mean over seeds of a sub-network minus the
static line of the arm that it is compared with, at equal MAdds, and again at equal milliseconds.

Beside the dimensions: multi-view consistency against in-place bootstrapping (`ib`, `mvco`), and
the embedding sliced with an idle part of the stream (`embed`) against a stream that is sliced too
(`plain`). The transformer is trained on digits by default, which shows directions only.

    python -m benchmarks.dimensions run --scale cpu --folder F --data DIR --max-seconds 2400
    python -m benchmarks.dimensions run --scale gpu --folder F --data DIR --device cuda
    python -m benchmarks.dimensions report --folder F
    python -m benchmarks.dimensions --quick

`run` may be killed at any time and repeated until its exit code is 0: finished cells are skipped,
and a training continues from its last checkpoint. With `--device cuda`, networks are timed in torch
on the GPU, else in ONNX Runtime with the given threads. The GPU command has not been run yet.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.dimension_runs import CNN_ARMS, SCALES, VIT_ARMS, Cell, CellRunner, cells_of, load_part
from benchmarks.folder_commands import NUM_SEEDS, add_train_options, chosen_device, run_main
from benchmarks.harness import Options, Report
from benchmarks.regime_runs import begin, do_jobs
from dsnet.errors import StoppedError
from dsnet.files import atomic_write_json, atomic_write_text

BENCHMARK = (
    "which dimension buys most accuracy at equal MAdds and milliseconds: training MAdds, dearest supernet over "
    "cheapest (goal: at most 1.05)"
)


def measure(options: Options) -> Report:
    """Digits and one seed with --quick, else the vision transformer of the `cpu` scale on digits
    with three seeds (about a quarter of an hour on one thread); networks on CIFAR-10 need `run`."""
    from benchmarks.dimension_report import load_results, make_report

    parts = SCALES["quick"] if options.quick else {"vit": SCALES["cpu"]["vit"]}
    seeds = range(options.seed, options.seed + (1 if options.quick else NUM_SEEDS))
    with tempfile.TemporaryDirectory() as folder:
        for name, part in parts.items():
            own, material = Path(folder) / name, load_part(part, None)
            begin(own, part, material)
            do_jobs(own, cells_of(part, seeds), CellRunner(part, material, torch.device("cpu")), say=_quiet)
        return make_report(load_results(Path(folder)))


def _quiet(text: str) -> None:
    """Say nothing."""
    del text


def run(arguments: argparse.Namespace) -> None:
    """Do the wanted cells that are not done yet, part by part.

    Raises:
        StoppedError: some cells are left, because time ran out or other processes hold them.
    """
    device = chosen_device(arguments)
    deadline = time.monotonic() + arguments.max_seconds
    left: list[str] = []
    for name, part in SCALES[arguments.scale].items():
        if name not in arguments.parts:
            continue
        folder, material = arguments.folder / name, load_part(part, _path(part.data, arguments.data))
        begin(folder, part, material)
        runner: CellRunner = CellRunner(part, material, device)
        todo: list[Cell] = cells_of(part, arguments.seeds, arguments.arms)
        undone = do_jobs(folder, todo, runner, should_stop=lambda: time.monotonic() > deadline, say=_say)
        left += [f"{name}/{cell.name}" for cell in undone]
    if left:
        raise StoppedError(
            f"left: {', '.join(left)}. Run the same command again; another process may be working on some of them"
        )
    _say("all cells are done")


def _path(data: str, path: Path | None) -> Path | None:
    """The folder of a data set's images; digits have none."""
    return None if data == "digits" else path


def _say(text: str) -> None:
    print(text, flush=True)


def report(arguments: argparse.Namespace) -> None:
    """Print the table, and write it with all numbers into the folder."""
    from benchmarks.dimension_report import as_text, figures, load_results, make_sections, markdown

    results = load_results(arguments.folder)
    sections = make_sections(results)
    atomic_write_text(arguments.folder / "report.md", markdown(sections))
    atomic_write_json(arguments.folder / "report.json", figures(results))
    print(as_text(sections))
    print(f"written: {arguments.folder}/report.md, report.json")


def parser() -> argparse.ArgumentParser:
    """The two commands that work on a folder."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.dimensions", description=BENCHMARK)
    commands = top.add_subparsers(required=True)
    one = commands.add_parser("run", help="train, test and time what is left; exit code 6 while some cells are left")
    one.set_defaults(command=run)
    add_train_options(one)
    names = list(dict.fromkeys(name for parts in SCALES.values() for name in parts))
    arms = list(dict.fromkeys((*CNN_ARMS, *VIT_ARMS)))
    one.add_argument("--scale", choices=list(SCALES), default="cpu")
    one.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    one.add_argument("--arms", nargs="+", choices=arms, default=arms, metavar="ARM", help=", ".join(arms))
    two = commands.add_parser("report", help="the table of the finished cells")
    two.set_defaults(command=report)
    two.add_argument("--folder", type=Path, required=True)
    return top


def main(argv: Sequence[str]) -> int:
    """Run a command on a folder, or the benchmark by the harness."""
    return run_main(argv, parser(), BENCHMARK, measure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
