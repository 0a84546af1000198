"""The command line of benchmarks that keep their runs in a folder: shared options of `train` (or
`run`), its exit codes, and `main`."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.regime_runs import JobT, Runner, do_jobs
from dsnet.errors import ConfigError, DsnetError, StoppedError

if TYPE_CHECKING:
    from benchmarks.harness import Options, Report

NUM_SEEDS = 3


def add_train_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `train`: folder, data, device, time limit and seeds."""
    parser.add_argument("--folder", type=Path, required=True, help="receives checkpoints and one JSON file per run")
    parser.add_argument("--data", type=Path, help="folder of the images; default: DSNET_DATA (digits need none)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch in each process")
    parser.add_argument("--max-seconds", type=float, default=math.inf, help="stop at the first step after so long")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(NUM_SEEDS)), metavar="SEED")


def add_report_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `report` with a figure: the folder of the runs, and a file for the
    figure."""
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument(
        "--svg",
        type=Path,
        help="also write the figure as SVG (needs kaleido and Chrome or Chromium: pip install kaleido)",
    )


def chosen_device(arguments: argparse.Namespace) -> torch.device:
    """The device of `train`; also sets the number of threads.

    Raises:
        ConfigError: torch sees no GPU.
    """
    if torch.device(arguments.device).type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device is {arguments.device}, but torch sees no GPU here; use --device cpu")
    torch.set_num_threads(arguments.threads)
    return torch.device(arguments.device)


def work_off(arguments: argparse.Namespace, todo: Sequence[JobT], run: Runner[JobT]) -> None:
    """Do the wanted runs that are not done yet.

    Raises:
        StoppedError: some runs are left, because time ran out or other processes hold them.
    """
    deadline = time.monotonic() + arguments.max_seconds
    left = do_jobs(arguments.folder, todo, run, should_stop=lambda: time.monotonic() > deadline, say=_say)
    if left:
        raise StoppedError(
            f"{len(todo) - len(left)} of {len(todo)} runs are done; left: {', '.join(job.name for job in left)}. "
            "Run the same command again; another process may be working on some of them"
        )
    _say(f"all {len(todo)} runs are done")


def _say(text: str) -> None:
    print(text, flush=True)


def run_main(
    argv: Sequence[str], parser: argparse.ArgumentParser, benchmark: str, measure: Callable[[Options], Report]
) -> int:
    """Run a command on a folder, or the benchmark by the harness; returns the exit code."""
    try:
        if argv and argv[0] in ("train", "run", "report"):
            arguments = parser.parse_args(argv)
            arguments.command(arguments)
        else:
            from benchmarks.harness import run_benchmark  # `train` has to work without rich

            run_benchmark(benchmark, measure, threads=1)
    except DsnetError as error:
        print(error, file=sys.stderr, flush=True)
        return error.exit_code
    return 0
