"""Cost of a study of thousands of trials: time and memory of the driver for each trial, seconds of
the commands that read the finished run, and size of its report.

The run is a launch of the digits data with the program's own code. Its trials are real gates on the
sweep's tables, trained for one step only, in the driver's process instead of Ray's workers, so that
what is measured is the engine, the study and what the driver keeps. Commands run in processes of
their own, start-up included; of three calls the fastest counts. CPU seconds are those that an idle
machine would take; other programs on the same cores change the wall time only.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import click
from numpy.typing import NDArray

from benchmarks.harness import Estimate, Headline, Options, Report, Section, in_fresh_process, memory_mib, run_benchmark
from dsnet.arithmetic import fix_arithmetic
from dsnet.families import family_names
from dsnet.stop_signals import StopRequest, stop_on_signals
from orchestration.config.loading import load_config
from orchestration.environment import prepare_environment
from orchestration.pipeline import launch as launching
from orchestration.pipeline import search as searching
from orchestration.progress import TerminalProgress
from orchestration.runs.folder import RunDir
from orchestration.workers.trials import MakeCohortFunction
from search.study.runner import SerialRunner, TrialOutcome, TrialSpec
from search.study.study import TrialRecord

BENCHMARK = (
    "driver's time and memory a trial, commands and report of 2,000 to 10,000 trials (goals: 20 kB a trial; 2 s)"
)
GOAL_S = 2.0
GOAL_KB = 20.0
SIZES = (2_000, 5_000, 10_000)
QUICK_SIZES = (200, 400)
NUM_CALLS = 3
FIRST_TRIALS = 64
NAME = "large"
COMMANDS = (("status",), ("trials",), ("pareto",), ("status", "--json"), ("trials", "--json"), ("report",))
SWEEP = f"""\
version: 1
name: {NAME}
data: {{name: digits}}
supernet:
  model: ds_tiny
  options: {{num_routes: 4}}
  train: {{epochs: 8, batch_size: 40, warmup_epochs: 0.5}}
  bootstrapping: {{teacher_min_updates: 2}}
measure: {{batch_sizes: [1, 8], group_sizes: [1, 8], repeats: 2, warmup: 1}}
gate: {{optimizer: {{steps: 1, batch_size: 64}}}}
space:
  gate.router: {{choice: [gate, evidence_gate, cascade, learned_cascade]}}
  gate.target: {{uniform: [0.05, 0.9]}}
  gate.sgs.t_easy: {{uniform: [0.0, 0.9]}}
  gate.sgs.t_hard: {{uniform: [0.0, 0.5]}}
  gate.sgs.strategy: {{choice: [try_best, give_up]}}
  gate.sgs.target: {{choice: [extremes, cheapest]}}
  gate.routing.first: {{int: [0, 1]}}
  gate.losses.sgs: {{uniform: [0.0, 1.0]}}
  gate.losses.quality: {{choice: [0.0, 1.0]}}
  gate.optimizer.lr: {{loguniform: [0.01, 0.3]}}
sampler: {{cohort: 64, startup: 16}}
budget: {{trials: {FIRST_TRIALS}, verify: 12}}
ray: {{trial_actors: 1}}
tracking: {{mlflow: false}}
export: {{formats: [bundle]}}
"""
"""A sweep whose trials are cheap, over the space of the digits example."""


class TimedRunner(SerialRunner):
    """Runs trials in this process, and sums up the time in them."""

    def __init__(self, make: MakeCohortFunction, *, arrays: Mapping[str, NDArray[Any]], **_: Any) -> None:
        super().__init__(make(arrays))
        self.work_s = 0.0

    def run(self, specs: Sequence[TrialSpec]) -> Generator[TrialOutcome, None, None]:
        outcomes = super().run(specs)
        while True:
            start = time.process_time()
            outcome = next(outcomes, None)
            self.work_s += time.process_time() - start
            if outcome is None:
                return
            yield outcome


@contextmanager
def trials_in_process(on_trial: Callable[[TrialRecord, TimedRunner], None]) -> Iterator[None]:
    """Inside the block, launches run their trials in this process, without Ray, and call a function
    with every recorded trial."""
    runners: list[TimedRunner] = []
    told = searching._Observer.on_trial

    def make(*arguments: Any, **named: Any) -> TimedRunner:
        runners.append(TimedRunner(*arguments, **named))
        return runners[-1]

    def hear(observer: searching._Observer, record: TrialRecord) -> None:
        told(observer, record)
        on_trial(record, runners[-1])

    with (
        mock.patch.object(searching, "RayRunner", make),
        mock.patch.object(launching, "needs_workers", return_value=False),
        mock.patch.object(searching._Observer, "on_trial", hear),
    ):
        yield


@dataclass(frozen=True)
class Mark:
    """The driver at one moment of a search."""

    num_trials: int
    cpu_s: float
    """CPU time of the process, trials included."""
    work_s: float
    """CPU time in the trials themselves."""
    rss_mib: float


@dataclass(frozen=True)
class Grown:
    """The driver of a study that grew to a number of trials."""

    marks: tuple[Mark, ...]
    wall_s: float
    peak_mib: float

    def engine_ms(self, first: int, last: int) -> float:
        """CPU milliseconds a trial between two marks, beside the trials themselves."""
        begin, end = self.marks[first], self.marks[last]
        spent = end.cpu_s - begin.cpu_s - (end.work_s - begin.work_s)
        return 1e3 * spent / (end.num_trials - begin.num_trials)

    @property
    def search_kb(self) -> float:
        """Growth of the resident memory during the search, kB a trial."""
        begin, end = self.marks[0], self.marks[-1]
        return 2**20 / 1e3 * (end.rss_mib - begin.rss_mib) / (end.num_trials - begin.num_trials)


def grow(sweep: Path, num_trials: int, settings: Sequence[str] = (), marks_every: int = 500) -> Grown:
    """Launch a sweep whose supernet is trained, until its study has a number of trials; for a
    process of its own."""
    fix_arithmetic()
    prepare_environment()
    flags = {"budget.trials": num_trials, "storage.runs": str(sweep.parent / "runs")}
    config = load_config(sweep, overrides=settings, flags=flags, known_models=family_names()).config
    marks: list[Mark] = []

    def on_trial(record: TrialRecord, runner: TimedRunner) -> None:
        if (record.slot + 1) % marks_every == 0:
            marks.append(Mark(record.slot + 1, time.process_time(), runner.work_s, memory_mib("VmRSS")))

    @contextmanager
    def stop(run: RunDir) -> Iterator[StopRequest]:
        with stop_on_signals(run.stop_requested, lambda _: None) as request:
            yield request

    start = time.perf_counter()
    with trials_in_process(on_trial), open(os.devnull, "w") as nowhere, mock.patch.object(sys, "stderr", nowhere):
        launching.launch(config, command="large_study", progress=TerminalProgress(), stop=stop)
    return Grown(tuple(marks), time.perf_counter() - start, memory_mib("VmHWM"))


def begin(folder: Path, settings: Sequence[str] = ()) -> Path:
    """Write the sweep, and launch it with Ray for its supernet and its first trials; returns its
    file."""
    folder.mkdir(parents=True, exist_ok=True)
    sweep = folder / f"{NAME}.yaml"
    sweep.write_text(SWEEP, encoding="utf-8")
    options = [option for setting in settings for option in ("--set", setting)]
    _command(folder, ("launch", sweep.name, *options))
    return sweep


def _command(folder: Path, arguments: Sequence[str]) -> tuple[float, float, float]:
    """Run a command; returns its seconds, its CPU seconds and its peak memory in MiB."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "dsnet_orch", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    wall_s = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall_s, cpu_s, after.ru_maxrss / 1024


def command_seconds(folder: Path, command: Sequence[str]) -> tuple[float, float]:
    """The smallest wall and CPU seconds of a command about the run."""
    calls = [_command(folder, (command[0], NAME, *command[1:])) for _ in range(NUM_CALLS)]
    return min(wall for wall, _, _ in calls), min(cpu for _, cpu, _ in calls)


def measure(options: Options, folder: Path | None, sampler: str) -> Report:
    """Grow one study to each size, and time the commands; the headline is the slowest of status,
    trials and pareto at the last size."""
    sizes = QUICK_SIZES if options.quick else SIZES
    settings = (f"sampler.name={sampler}", f"seed={options.seed}")
    with tempfile.TemporaryDirectory() as scratch:
        place = folder if folder is not None else Path(scratch)
        sweep = begin(place, settings)
        figures: dict[str, Any] = {}
        drivers, commands = [], []
        slowest: list[float] = []
        for size in sizes:
            grown: Grown = in_fresh_process(grow, sweep, size, settings, 50 if options.quick else 500)
            report_mb = (place / "runs" / NAME / "report.html").stat().st_size / 1e6
            seconds = {" ".join(command): command_seconds(place, command) for command in COMMANDS}
            slowest = [seconds[name][1] for name in ("status", "trials", "pareto")]
            drivers.append(
                (
                    f"{size:,}",
                    f"{grown.engine_ms(0, len(grown.marks) // 2):.2f}",
                    f"{grown.engine_ms(len(grown.marks) // 2, -1):.2f}",
                    f"{grown.search_kb:.1f}",
                    f"{grown.peak_mib:.0f}",
                    f"{report_mb:.2f}",
                )
            )
            commands.append((f"{size:,}", *(f"{wall:.2f} ({cpu:.2f})" for wall, cpu in seconds.values())))
            figures[str(size)] = {"driver": asdict(grown), "commands_s": seconds, "report_mb": report_mb}
    most = max(slowest)
    return Report(
        [
            Section(
                f"Driver, {sampler}",
                ("trials", "ms a trial, first half", "second half", "kB a trial", "peak MiB", "report MB"),
                drivers,
            ),
            Section("Seconds of commands (CPU)", ("trials", *(" ".join(each) for each in COMMANDS)), commands),
        ],
        Headline(
            f"CPU time of the slowest of status, trials and pareto, {sizes[-1]:,} trials",
            Estimate.exact(most),
            " s",
            GOAL_S,
        ),
        figures,
    )


if __name__ == "__main__":
    run_benchmark(
        BENCHMARK,
        measure,
        threads=1,
        params=[
            click.Option(["--folder"], type=click.Path(path_type=Path), help="Keep the run here."),
            click.Option(["--sampler"], default="random", show_default=True),
        ],
    )
