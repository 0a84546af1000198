"""Plan of sweeps past one machine: how long a sweep takes on a given number of workers, and what
limits it.

The engine is the program's own (`search.study.engine`): it asks for points, records outcomes in a
journal on this disk, and applies its rules. Only the trials are simulated: a clock of its own holds
the workers' time, of which nobody waits, and the driver's time is what the engine really takes, in
CPU seconds of this machine. A worker is thus busy while its trial lasts, idle while the cohort's
last trials end and while the driver is busy.
"""

from __future__ import annotations

import heapq
import math
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import click
import numpy as np

from benchmarks.harness import Estimate, Headline, Options, Report, Section, run_benchmark
from search.study.engine import Budget, Search
from search.study.runner import TrialOutcome, TrialSpec, divide
from search.study.study import Objective, StudyJournal, StudySettings
from search.suggest.samplers import SamplerSettings
from search.suggest.space import parse_space

BENCHMARK = "hours of large sweeps on many workers, by the real engine with simulated trials, and what limits them"
SPREAD = 0.25
"""Standard deviation of the logarithm of a trial's time."""
CALL_S = 0.002
"""Seconds of a call to a worker: sending a batch and fetching its outcome (measured with Ray)."""
SPACE = {
    "gate.target": {"uniform": [0.05, 0.9]},
    "gate.router": {"choice": ["gate", "evidence_gate", "cascade", "learned_cascade"]},
    "gate.optimizer.lr": {"loguniform": [0.01, 0.3]},
    "gate.losses.sgs": {"uniform": [0.0, 1.0]},
}


@dataclass(frozen=True)
class Plan:
    """A sweep on a cluster."""

    name: str
    trials: int
    workers: int
    cohort: int
    trial_s: float
    """Mean seconds of a trial on one worker."""
    lanes: int = 1
    """Trials that a worker trains in one program."""
    sampler: str = "random"
    order: Literal["cohorts", "asynchronous"] = "cohorts"


@dataclass
class SimulatedWorkers:
    """A runner whose workers only let a clock of its own advance."""

    plan: Plan
    seed: int
    now_s: float = 0.0
    """The simulated time."""
    busy_s: float = 0.0
    """Seconds in which workers have worked, summed over them."""
    driver_s: float = 0.0
    """CPU seconds of this process between outcomes."""
    calls_s: float = 0.0
    """Seconds of calls to workers, one after the other."""

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)
        self._cpu_s = time.process_time()

    def run(self, specs: Sequence[TrialSpec]) -> Generator[TrialOutcome, None, None]:
        """See `Runner.run`."""
        waiting = list(divide(specs, self.plan.workers, self.plan.lanes))
        yield from self._work(lambda: waiting.pop(0) if waiting else ())

    def stream(self, take: Callable[[], Sequence[TrialSpec]]) -> Generator[TrialOutcome, None, None]:
        """See `Runner.stream`."""
        waiting: list[Sequence[TrialSpec]] = []

        def next_batch() -> Sequence[TrialSpec]:
            if not waiting:
                waiting.extend(divide(take(), 1, self.plan.lanes))
            return waiting.pop(0) if waiting else ()

        yield from self._work(next_batch)

    def close(self) -> None:
        """Do nothing."""

    def _work(self, take: Callable[[], Sequence[TrialSpec]]) -> Generator[TrialOutcome, None, None]:
        running: list[tuple[float, int, Sequence[TrialSpec], float]] = []
        while True:
            while len(running) < self.plan.workers and (batch := take()):
                self._driver_worked()
                self._called()
                heapq.heappush(running, (self.now_s + (lasts_s := self._seconds(batch)), batch[0].slot, batch, lasts_s))
            if not running:
                return
            self._driver_worked()
            ends_s, _, batch, lasts_s = heapq.heappop(running)
            self.now_s = max(self.now_s, ends_s)
            self._called()
            self.busy_s += lasts_s
            for spec in batch:
                yield self._outcome(spec, lasts_s / len(batch))

    def _called(self) -> None:
        self.now_s += CALL_S
        self.calls_s += CALL_S

    def _driver_worked(self) -> None:
        """Let the clock advance by what this process has computed since the last call."""
        now_s = time.process_time()
        self.driver_s += now_s - self._cpu_s
        self.now_s += now_s - self._cpu_s
        self._cpu_s = now_s

    def _seconds(self, batch: Sequence[TrialSpec]) -> float:
        """Seconds of a batch: trained in one program, its trials take as long as the longest."""
        drawn = np.exp(self._random.normal(-(SPREAD**2) / 2, SPREAD, len(batch)))
        return float(self.plan.trial_s * drawn.max())

    def _outcome(self, spec: TrialSpec, seconds: float) -> TrialOutcome:
        """Metrics that depend on the point, so that samplers have something to learn."""
        target = float(spec.params["gate.target"])
        rate = float(spec.params.get("gate.optimizer.lr", 0.1))
        top1 = 0.5 + 0.4 * math.sqrt(target) - 0.02 * abs(math.log(rate / 0.1)) + self._random.normal(0, 0.003)
        metrics = {"top1": top1, "madds_m": 10 * target}
        return TrialOutcome(spec.slot, "complete", metrics, duration_s=seconds)


@dataclass(frozen=True)
class Simulated:
    """The simulated course of a plan."""

    hours: float
    ideal_hours: float
    """Work of all trials over the number of workers."""
    busy_share: float
    """Share of the workers' time in which they work."""
    driver_ms: float
    """CPU milliseconds of the driver a trial."""
    driver_ms_end: float
    """The same for the last tenth of the trials."""
    driver_share: float
    """Share of the sweep's time in which the driver computes or calls."""
    journal_kb: float
    """Kilobytes of the journal a trial."""

    @property
    def limit(self) -> str:
        """The limit that a larger sweep meets first, as a phrase."""
        if self.driver_share > 0.3:
            return "the driver: fewer, longer trials, or a cheaper sampler"
        if self.busy_share < 0.7:
            return "the cohort: workers wait for its last trials"
        return "the number of workers"


def simulate(plan: Plan, seed: int, folder: Path) -> Simulated:
    """Run the engine over a plan; the journal is a file in `folder`."""
    settings = StudySettings(
        name="scale",
        space=parse_space(SPACE),
        objectives=[Objective("top1", "maximize"), Objective("madds_m", "minimize")],
        sampler=SamplerSettings(plan.sampler, {}, 64),
        seed=seed,
        cohort=plan.cohort,
        order=plan.order,
    )
    path = folder / "study.journal"
    workers = SimulatedWorkers(plan, seed)
    marks: list[tuple[int, float]] = []

    class Marks:
        def on_trial(self, record: object) -> None:
            marks.append((len(marks) + 1, time.process_time()))

    search = Search(journal=StudyJournal.open(path, settings), runner=workers, observer=Marks())
    result = search.run(Budget(plan.trials))
    assert len(result.records) == plan.trials
    tail = marks[-max(2, len(marks) // 10) :]
    return Simulated(
        hours=workers.now_s / 3600,
        ideal_hours=workers.busy_s / plan.workers / 3600,
        busy_share=workers.busy_s / (plan.workers * workers.now_s),
        driver_ms=1e3 * workers.driver_s / plan.trials,
        driver_ms_end=1e3 * (tail[-1][1] - tail[0][1]) / (tail[-1][0] - tail[0][0]),
        driver_share=(workers.driver_s + workers.calls_s) / workers.now_s,
        journal_kb=path.stat().st_size / 1e3 / plan.trials,
    )


def plans(trials: int, workers: int) -> list[Plan]:
    """The plans that are compared: the table of docs/scale.md."""
    return [
        Plan("table trials, default cohort", trials, workers, 64, 0.5),
        Plan("table trials, a cohort of all workers", trials, workers, workers, 0.5),
        Plan("table trials, asynchronous", trials, workers, workers, 0.5, order="asynchronous"),
        Plan("end to end (10 min), default cohort", trials, workers, 8, 600.0),
        Plan("end to end, a cohort of all workers", trials, workers, workers, 600.0),
        Plan("end to end, 4 x the workers", trials, workers, 4 * workers, 600.0),
        Plan("end to end, asynchronous", trials, workers, workers, 600.0, order="asynchronous"),
        Plan("end to end, TPE, a cohort of all workers", min(trials, 10_000), workers, workers, 600.0, sampler="tpe"),
    ]


def measure(options: Options, trials: int | None, workers: int, only: str) -> Report:
    """Simulate every plan; the headline is the share of their time in which workers wait, end to
    end."""
    number = trials or (400 if options.quick else 100_000)
    rows, figures = [], {}
    name, idle = "no plan", 0.0
    for plan in plans(number, min(workers, 50) if options.quick else workers):
        if only not in plan.name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = simulate(plan, options.seed, Path(folder))
        figures[plan.name] = {**asdict(plan), **asdict(found)}
        rows.append(
            (
                plan.name,
                f"{plan.trials:,}",
                f"{plan.workers:,}",
                f"{found.hours:.3g}",
                f"{found.ideal_hours:.3g}",
                f"{100 * found.busy_share:.0f}",
                f"{found.driver_ms:.2f} ({found.driver_ms_end:.2f})",
                f"{100 * found.driver_share:.0f}",
                f"{found.journal_kb:.2f}",
                found.limit,
            )
        )
        if plan.cohort > plan.workers or only:
            name, idle = plan.name, 1 - found.busy_share
    columns = ("sweep", "trials", "workers", "hours", "ideal", "busy %", "driver ms a trial (end)", "driver %")
    return Report(
        [Section("Simulated sweeps", (*columns, "journal kB", "limit"), rows)],
        Headline(f"idle share of the workers, {name}", Estimate.exact(idle), "", 0.2),
        figures,
    )


if __name__ == "__main__":
    run_benchmark(
        BENCHMARK,
        measure,
        threads=1,
        params=[
            click.Option(["--trials"], type=int, help="Trials of each plan."),
            click.Option(["--workers"], type=int, default=1000, show_default=True),
            click.Option(["--only"], default="", help="Plans whose names hold this text."),
        ],
    )
