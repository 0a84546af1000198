"""Time of `dsnet-orch --help`, compared with the interpreter alone."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import click

from benchmarks.harness import Headline, Options, Report, Section, run_benchmark, sample_interleaved

BENCHMARK = "fresh processes: `dsnet-orch --help` against `python -c pass` (goal: at most 0.3 s)"
GOAL_S = 0.3


def commands() -> dict[str, list[str]]:
    """The commands to start, by their names in the report.

    Raises:
        click.ClickException: dsnet-orch is not installed beside this interpreter.
    """
    script = Path(sys.executable).with_name("dsnet-orch")
    if not script.exists():
        raise click.ClickException(f"{script} does not exist; install the package into this environment: pip install .")
    return {
        "python -c pass": [sys.executable, "-c", "pass"],
        "dsnet-orch --help": [str(script), "--help"],
        "dsnet-orch launch --help": [str(script), "launch", "--help"],
    }


def measure(options: Options) -> Report:
    """Measure wall time of new processes, interleaved, and their CPU time (which does not depend on
    other work of the machine)."""
    cpu_s: dict[str, list[float]] = {}

    def started(name: str, argv: list[str]) -> Callable[[], None]:
        def call() -> None:
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            used = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
            cpu_s.setdefault(name, []).append(used)

        return call

    calls = {name: started(name, argv) for name, argv in commands().items()}
    samples = sample_interleaved(calls, rounds=8 if options.quick else 40, warmup=2)
    rows = []
    for name in calls:
        cpu_ms = 1e3 * sorted(cpu_s[name])[len(cpu_s[name]) // 2]
        rows.append((name, samples.median_ms(name).text(0), f"{samples.iqr_ms(name):.0f}", f"{cpu_ms:.0f}"))
    ratio = samples.ratio(["dsnet-orch --help"], ["python -c pass"])
    help_s = samples.in_seconds("dsnet-orch --help")
    return Report(
        [Section("Start-up", ("command", "wall ms [95 %]", "IQR ms", "CPU ms"), rows)],
        Headline(f"dsnet-orch --help ({ratio.value:.1f} x python -c pass)", help_s, " s", GOAL_S),
        {"wall": samples.figures(), "cpu_s": cpu_s, "help_over_bare": asdict(ratio)},
    )


if __name__ == "__main__":
    run_benchmark(BENCHMARK, measure)
