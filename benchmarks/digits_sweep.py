"""The whole digits example, a new user's first sweep: wall time and its parts, and the memory of
all its processes together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.harness import Headline, Options, Report, Samples, Section, run_benchmark

BENCHMARK = "the whole of examples/digits.yaml in fresh processes: wall time and peak memory (goal: 180 s, 4 GiB)"
GOAL_S = 180.0
GOAL_MIB = 4096.0
EXAMPLE = Path(__file__).parents[1] / "examples" / "digits.yaml"
MARK = "DSNET_BENCHMARK_MARK"
"""Environment variable by which all processes of a launch are found, whatever their parent."""
SHORTER = ("--set", "supernet.train.epochs=5", "--set", "supernet.train.warmup_epochs=1", "--trials", "16")
POLL_S = 0.5


def peak_pss_mib(process: subprocess.Popen[bytes], mark: str) -> float:
    """Peak sum of proportional set sizes, in MiB, over all processes with the mark, until `process`
    ends."""
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, sum(_pss_mib(pid, mark) for pid in os.listdir("/proc") if pid.isdecimal()))
        time.sleep(POLL_S)
    return peak


def _pss_mib(pid: str, mark: str) -> float:
    try:
        if f"{MARK}={mark}".encode() not in Path(f"/proc/{pid}/environ").read_bytes():
            return 0.0
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0  # the process has ended, or we may not read it
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:")), 0.0)


def sweep_once(arguments: tuple[str, ...]) -> dict[str, Any]:
    """Launch the example into an empty folder.

    Raises:
        click.ClickException: the launch failed.
    """
    mark = uuid.uuid4().hex
    script = Path(sys.executable).with_name("dsnet-orch")
    with tempfile.TemporaryDirectory() as runs:
        command = [str(script), "launch", str(EXAMPLE), "--runs", runs, *arguments]
        start = time.perf_counter()
        process = subprocess.Popen(command, env={**os.environ, MARK: mark}, stdout=subprocess.DEVNULL)
        peak = peak_pss_mib(process, mark)
        wall_s = time.perf_counter() - start
        if process.returncode != 0:
            raise click.ClickException(f"{' '.join(command)} ended with {process.returncode}")
        stages = json.loads((Path(runs) / "digits" / "manifest.json").read_text())["stages"]
    seconds = {name: float(stage["seconds"]) for name, stage in stages.items()}
    return {"wall_s": wall_s, "peak_pss_mib": peak, "stages_s": seconds}


def measure(options: Options) -> Report:
    """Run a few launches one after the other; a launch uses the number of threads in its own
    configuration."""
    runs = [sweep_once(SHORTER if options.quick else ()) for _ in range(1 if options.quick else 3)]
    names = list(runs[0]["stages_s"])
    rows = [(name, *(f"{run['stages_s'][name]:.1f}" for run in runs)) for name in names]
    rows.append(("everything", *(f"{run['wall_s']:.1f}" for run in runs)))
    rows.append(("peak PSS, MiB", *(f"{run['peak_pss_mib']:.0f}" for run in runs)))
    columns = ("seconds in", *(f"launch {number + 1}" for number in range(len(runs))))
    wall = Samples({"sweep": np.array([1e3 * run["wall_s"] for run in runs])})
    peak = max(run["peak_pss_mib"] for run in runs)
    label = f"{'a shortened' if options.quick else 'the'} digits sweep, peak memory {peak / GOAL_MIB:.2f} x 4 GiB"
    return Report(
        [Section("Launches into an empty folder", columns, rows)],
        Headline(label, wall.in_seconds("sweep"), " s", GOAL_S),
        {"launches": runs},
    )


if __name__ == "__main__":
    run_benchmark(BENCHMARK, measure)
