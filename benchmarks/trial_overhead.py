"""Overhead of a trial beside its own work, and time of whole sweeps of 1,000 gate trials with
everything that a launch records.

Trials that do nothing, and trials that sleep 0.2 s, are run by our engine (cohorts and
asynchronous, with and without MLflow), by Ray Tune with `OptunaSearch`, and by plain Optuna in one
process. Each runs in a new process, so that the cold time (until the first trial is done) includes
everything except imports of torch and Optuna. Overhead is (wall time - asking - work / workers) /
trials. All suggest by TPE with the same settings. Tune has one objective (it compares trials by
one); the other two have both.

The sweeps run real gate trials on synthetic tables (`benchmarks.gate_trials`) over the space of the
digits example, without the router whose evidence these tables lack, on two actors with the journal
and MLflow. Start-up is not included: time is measured from the first `ask` until MLflow has the
last row.
"""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import optuna
from numpy.typing import NDArray

from benchmarks.gate_trials import DIGITS, LARGE, Workload, synthetic_table
from benchmarks.harness import Headline, Options, Report, Samples, Section, in_fresh_process, run_benchmark
from dsnet.families import layout
from dsnet.measure.latency_table import LatencyTable, Timing
from orchestration.config.distribution import Distribution
from orchestration.config.loading import load_config
from orchestration.config.sweep import SweepConfig
from orchestration.environment import prepare_environment
from orchestration.pipeline.search import gate_defaults, study_settings
from orchestration.tracking.background import MlflowTracker
from orchestration.tracking.protocol import NullTracker, TrackedRun, Tracker
from orchestration.workers.gate_trials import MakeGateTrial
from orchestration.workers.runtime import RaySettings, ray_session
from orchestration.workers.trials import Actors, RayRunner
from search.study import engine
from search.study.engine import Budget, Mirror, Search
from search.study.runner import OneByOne, Runner, TrialSpec
from search.study.study import Objective, StudyJournal, StudySettings, TrialRecord
from search.suggest.samplers import KNOWN_SAMPLERS, SamplerSettings, quiet_optuna
from search.suggest.space import Scalar, parse_space

BENCHMARK = (
    "overhead of a trial: ours, Ray Tune, plain Optuna; sweeps of 1,000 gate trials with MLflow (goals: 10 ms; 60 s)"
)
GOAL_MS = 10.0
GOAL_S = 60.0
NUM_WORKERS = 2
SLEEP_S = 0.2
NUM_WARMING = 4 * NUM_WORKERS
"""Number of first trials that are not counted if actors start with them."""
STARTUP = 16
COHORT = 8
SWEEP_LIMIT_S = 240.0
"""Seconds after which a sweep is stopped, with a report of the trials so far, because a sampler can
be slower than all of its trials."""
EXAMPLE = Path(__file__).parents[1] / "examples" / "digits.yaml"
UID = "overhead"
SPACE = {"x": {"uniform": [0.0, 1.0]}, "y": {"uniform": [0.0, 1.0]}, "kind": {"choice": ["a", "b", "c"]}}
OBJECTIVES = (Objective("top1", "maximize"), Objective("madds_m", "minimize"))


@dataclass(frozen=True)
class Load:
    """Trials of one kind."""

    work_s: float
    """Seconds that each trial sleeps."""
    num_trials: int

    @property
    def name(self) -> str:
        """Name in the report."""
        return f"sleeps {self.work_s:g} s" if self.work_s else "nothing"


@dataclass(frozen=True)
class Timed:
    """Times of one contender with one load, in one process."""

    load: Load
    cold_s: float
    """Seconds from the start until the first trial of the process is done."""
    wall_s: float
    """Seconds of the load's trials after warm-up."""
    ask_s: float
    """Seconds of suggestions within `wall_s`."""
    recorded_s: float | None = None
    """Seconds from the first of these trials until MLflow had them all."""

    def overhead_ms(self, workers: int) -> float:
        """Milliseconds per trial beside its work and its suggestion."""
        num_trials = self.load.num_trials
        return 1e3 * (self.wall_s - self.ask_s - self.load.work_s * num_trials / workers) / num_trials


def numbers(x: float, y: float) -> dict[str, float]:
    """The metrics of a trial that computes nothing."""
    return {"top1": 1.0 - x * x - y, "madds_m": 1.0 + x + y * y}


def sleep(spec: TrialSpec) -> tuple[Mapping[str, float], Mapping[str, NDArray[Any]]]:
    """A trial that only sleeps."""
    time.sleep(float(spec.params["work_s"]))
    return numbers(float(spec.params["x"]), float(spec.params["y"])), {}


def make_sleep(arrays: Mapping[str, NDArray[Any]]) -> OneByOne:
    """Build the sleeping trial function in an actor."""
    return OneByOne(sleep)


class Stopwatch:
    """Sum of the time spent in calls of one function."""

    def __init__(self) -> None:
        self.total_s = 0.0

    def timing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function so that its calls are timed."""

        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.total_s += time.perf_counter() - start

        return timed


@contextmanager
def timed_asking() -> Iterator[Stopwatch]:
    """Context that measures the time that searches within it spend on suggestions."""
    watch = Stopwatch()

    class TimedMirror(Mirror):
        ask_slots = watch.timing(Mirror.ask_slots)

    with mock.patch.object(engine, "Mirror", TimedMirror):
        yield watch


def tracker_at(folder: Path) -> MlflowTracker:
    """A tracker with a new MLflow database, which holds the row of the sweep."""
    tracker = MlflowTracker(f"sqlite:///{folder}/mlflow.db", UID, folder / "artifacts", UID)
    tracker.parent(TrackedRun(UID, UID, "sweep", 1))
    wait_for_rows(tracker, 2)  # with the creation of the database
    return tracker


def wait_for_rows(tracker: MlflowTracker, number: int) -> None:
    """Wait until a number of writes has been made."""
    while tracker.summary.num_written < number:
        if tracker.summary.num_unsent:
            raise RuntimeError(f"MLflow cannot be written: {tracker.summary.first_error}")
        time.sleep(0.002)


class Recording:
    """Recorder that writes a row of MLflow for every trial, as a launch does."""

    def __init__(self, tracker: Tracker, study: str) -> None:
        self._tracker = tracker
        self._study = study

    def on_trial(self, record: TrialRecord) -> None:
        """Write the row of a recorded trial."""
        status: Literal["FINISHED", "FAILED"] = "FINISHED" if record.state == "complete" else "FAILED"
        name = f"trial-{record.slot:04d}"
        times = (record.start_ms, record.finished_ms)
        uid = f"{UID}/{self._study}/{name}"
        row = TrackedRun(uid, name, "trial", *times, status, record.reason, record.params, record.metrics)
        self._tracker.trial(row)


def close_tracker(tracker: Tracker) -> None:
    """Wait until MLflow has every row."""
    summary = tracker.close("FINISHED", int(1000 * time.time()), timeout_s=600.0)
    if summary.num_unsent:
        raise RuntimeError(f"{summary.num_unsent} rows did not reach MLflow: {summary.first_error}")


def warm_up(runner: Runner, params: Mapping[str, Scalar]) -> None:
    """Let every actor build its trial function and run it; each must be busy while the others
    start."""
    for _ in range(3):
        for _ in runner.run([TrialSpec(slot, slot, params) for slot in range(NUM_WARMING)]):
            pass


def by_our_engine(loads: Sequence[Load], order: Literal["cohorts", "asynchronous"], has_mlflow: bool) -> list[Timed]:
    """Run the load by our engine: Search, RayRunner and StudyJournal."""
    begun = time.perf_counter()
    prepare_environment()
    point: dict[str, Scalar] = {"x": 0.5, "y": 0.5, "kind": "a", "work_s": 0.0}
    with (
        tempfile.TemporaryDirectory() as name,
        ray_session(RaySettings(num_cpus=NUM_WORKERS)),
        closing(RayRunner(make_sleep, arrays={}, actors=Actors(number=NUM_WORKERS))) as runner,
    ):
        for _ in runner.run([TrialSpec(0, 0, point)]):
            cold_s = time.perf_counter() - begun
        tracker = tracker_at(Path(name)) if has_mlflow else NullTracker()
        warm_up(runner, point)
        timed = [
            _searched(load, cold_s, order, runner, tracker, Path(name) / f"study-{number}.log")
            for number, load in enumerate(loads)
        ]
        close_tracker(tracker)
        return timed


def _searched(
    load: Load,
    cold_s: float,
    order: Literal["cohorts", "asynchronous"],
    runner: Runner,
    tracker: Tracker,
    path: Path,
) -> Timed:
    settings = StudySettings(
        name=path.stem,
        space=parse_space({**SPACE, "work_s": {"choice": [load.work_s]}}),
        objectives=OBJECTIVES,
        sampler=SamplerSettings("tpe", startup=STARTUP),
        cohort=COHORT,
        order=order,
    )
    journal = StudyJournal.open(path, settings)
    rows_before = tracker.summary.num_written if isinstance(tracker, MlflowTracker) else 0
    with timed_asking() as asking:
        start = time.perf_counter()
        search = Search(journal=journal, runner=runner, observer=Recording(tracker, path.stem))
        search.run(Budget(load.num_trials))
        wall_s = time.perf_counter() - start
    recorded_s = None
    if isinstance(tracker, MlflowTracker):
        wait_for_rows(tracker, rows_before + load.num_trials)
        recorded_s = time.perf_counter() - start
    return Timed(load, cold_s, wall_s, asking.total_s, recorded_s)


def by_tune(loads: Sequence[Load]) -> list[Timed]:
    """Run the load by Ray Tune with OptunaSearch, with reused actors and as many trials at a time
    as our engine has workers."""
    begun = time.perf_counter()
    prepare_environment()
    os.environ |= {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1"}
    with ray_session(RaySettings(num_cpus=NUM_WORKERS)):
        timed: list[Timed] = []
        for load in loads:
            first_s, wall_s, ask_s = _tuned(load)
            cold_s = timed[0].cold_s if timed else first_s - begun
            timed.append(Timed(load, cold_s, wall_s, ask_s))
        return timed


def _tuned(load: Load) -> tuple[float, float, float]:
    """Time at which the first trial was done, seconds of the trials after warm-up, and seconds of
    suggestions within these."""
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    asking, ends = Stopwatch(), list[tuple[float, float]]()

    class Ends(tune.Callback):
        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            ends.append((time.perf_counter(), asking.total_s))

    def trial(config: dict[str, Any]) -> None:
        time.sleep(load.work_s)
        tune.report(numbers(config["x"], config["y"]))

    num_trials = load.num_trials + NUM_WARMING
    with (
        quiet_optuna(),
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(OptunaSearch, "suggest", asking.timing(OptunaSearch.suggest)),  # Tune pickles the object
    ):
        sampler = optuna.samplers.TPESampler(seed=0, n_startup_trials=STARTUP, multivariate=True, constant_liar=True)
        tuner = tune.Tuner(
            trial,
            param_space={"x": tune.uniform(0, 1), "y": tune.uniform(0, 1), "kind": tune.choice(["a", "b", "c"])},
            tune_config=tune.TuneConfig(
                metric="top1",
                mode="max",
                search_alg=OptunaSearch(metric="top1", mode="max", sampler=sampler),
                num_samples=num_trials,
                max_concurrent_trials=NUM_WORKERS,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(storage_path=folder, name=UID, verbose=0, callbacks=[Ends()]),
        )
        results = tuner.fit()
    if results.num_errors or len(ends) != num_trials:
        raise RuntimeError(f"Tune ended {len(ends)} of {num_trials} trials, {results.num_errors} with errors")
    (warm, ask_before), (last, ask_after) = ends[NUM_WARMING - 1], ends[-1]
    return ends[0][0], last - warm, ask_after - ask_before


def by_optuna(loads: Sequence[Load]) -> list[Timed]:
    """Run the load by plain Optuna in one process, one trial after the other, with the study in a
    journal file."""
    begun = time.perf_counter()
    timed: list[Timed] = []
    for load in loads:
        first_s, wall_s, ask_s = _optimized(load)
        cold_s = timed[0].cold_s if timed else first_s - begun
        timed.append(Timed(load, cold_s, wall_s, ask_s))
    return timed


def _optimized(load: Load) -> tuple[float, float, float]:
    """The same times as `_tuned`, for plain Optuna."""
    asking = Stopwatch()

    def ask(study: optuna.Study) -> tuple[optuna.Trial, float, float]:
        trial = study.ask()
        x, y = trial.suggest_float("x", 0, 1), trial.suggest_float("y", 0, 1)
        trial.suggest_categorical("kind", ["a", "b", "c"])
        return trial, x, y

    timed_ask, first_s = asking.timing(ask), 0.0
    with quiet_optuna(), tempfile.TemporaryDirectory() as folder:
        backend = optuna.storages.journal.JournalFileBackend(f"{folder}/study.log")
        sampler = optuna.samplers.TPESampler(seed=0, n_startup_trials=STARTUP, multivariate=True, constant_liar=True)
        study = optuna.create_study(
            storage=optuna.storages.JournalStorage(backend),
            sampler=sampler,
            directions=[objective.goal for objective in OBJECTIVES],
        )
        for number in range(load.num_trials + 1):
            trial, x, y = timed_ask(study)
            time.sleep(load.work_s)
            study.tell(trial, list(numbers(x, y).values()))
            if number == 0:
                first_s, asking.total_s = time.perf_counter(), 0.0
    return first_s, time.perf_counter() - first_s, asking.total_s


@dataclass(frozen=True)
class Contender:
    """A way of running the trials."""

    name: str
    function: Callable[..., list[Timed]]
    arguments: tuple[Any, ...] = ()
    workers: int = NUM_WORKERS

    def run(self, loads: Sequence[Load]) -> list[Timed]:
        """Run its trials in a new process."""
        timed: list[Timed] = in_fresh_process(self.function, loads, *self.arguments)
        return timed


OURS = "ours"
CONTENDERS = (
    Contender(OURS, by_our_engine, ("cohorts", False)),
    Contender("ours, with MLflow", by_our_engine, ("cohorts", True)),
    Contender("ours, asynchronous", by_our_engine, ("asynchronous", False)),
    Contender("Ray Tune, OptunaSearch", by_tune),
    Contender("Optuna alone, 1 process", by_optuna, workers=1),
)


@dataclass(frozen=True)
class Swept:
    """Times of a sweep of gate trials with everything that a launch records, without start-up."""

    workload: str
    sampler: str
    num_trials: int
    num_failed: int
    search_s: float
    recorded_s: float
    """Seconds until MLflow had the last row."""
    ask_s: float
    work_s: float
    """Seconds of work, summed over all trials in their actors."""
    driver_cpu_s: float

    @property
    def per_second(self) -> float:
        """Trials per second, from the first suggestion to the last row."""
        return self.num_trials / self.recorded_s


def gate_sweep(workload: Workload, sampler: str, num_trials: int, limit_s: float) -> Swept:
    """Run the digits example's search with another sampler, over synthetic tables, by two
    actors."""
    prepare_environment()
    loaded = load_config(EXAMPLE, overrides=[f"sampler.name={sampler}", "sampler.cohort=null"]).config
    make, arrays = gate_trials(workload, gate_defaults(loaded))
    settings = sweep_settings(loaded, len(make.subnets))
    with (
        tempfile.TemporaryDirectory() as name,
        ray_session(RaySettings(num_cpus=NUM_WORKERS)),
        closing(RayRunner(make, arrays=arrays, actors=Actors(number=NUM_WORKERS))) as runner,
        timed_asking() as asking,
    ):
        journal = StudyJournal.open(Path(name) / "study.log", settings)
        tracker = tracker_at(Path(name))
        warm_up(runner, {})
        start, cpu = time.perf_counter(), time.process_time()
        search = Search(journal=journal, runner=runner, observer=Recording(tracker, sampler))
        result = search.run(Budget(num_trials, limit_s))
        search_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu
        close_tracker(tracker)
        recorded_s = time.perf_counter() - start
    work_s = sum(record.duration_s for record in result.records)
    return Swept(
        workload.name,
        sampler,
        len(result.records),
        result.num_failed,
        search_s,
        recorded_s,
        asking.total_s,
        work_s,
        cpu_s,
    )


def sweep_settings(config: SweepConfig, num_routes: int) -> StudySettings:
    """Settings of the example's study, for synthetic tables with a number of routes."""
    changes = {
        "gate.router": Distribution("choice", ("gate", "cascade", "learned_cascade")),
        "gate.routing.last": Distribution("int", (4, num_routes - 1)),
    }
    return study_settings(config.model_copy(update={"space": {**config.space, **changes}}))


def gate_trials(workload: Workload, defaults: dict[str, Any]) -> tuple[MakeGateTrial, dict[str, NDArray[Any]]]:
    """Arguments that the search stage gives to its actors: the maker of the trial function, and the
    arrays of the tables."""
    tables = {split: synthetic_table(workload, split, seed) for seed, split in enumerate(("gate", "val"))}
    subnets = layout(workload.model, workload.task)
    tails = {subnet.name: _timing(1.0 + index) for index, subnet in enumerate(subnets)}
    latency = LatencyTable("made up", 1, {}, {1: _timing(1.0)}, {1: _timing(0.5)}, {1: tails})
    make = MakeGateTrial({split: table.meta() for split, table in tables.items()}, subnets, latency, defaults)
    arrays = {f"{split}/{key}": value for split, table in tables.items() for key, value in table.arrays().items()}
    return make, arrays


def _timing(ms: float) -> Timing:
    return Timing(ms, 0.0, 1)


@dataclass(frozen=True)
class Sizes:
    """Numbers of trials, rounds and sweeps to measure."""

    loads: Sequence[Load]
    rounds: int
    sweeps: Sequence[tuple[Workload, str]]
    sweep_trials: int


FULL = Sizes(
    loads=(Load(0.0, 200), Load(SLEEP_S, 64)),
    rounds=3,
    sweeps=(*((DIGITS, name) for name in KNOWN_SAMPLERS), (LARGE, "random"), (LARGE, "tpe")),
    sweep_trials=1000,
)
QUICK = Sizes(loads=(Load(0.0, 40), Load(SLEEP_S, 8)), rounds=1, sweeps=((DIGITS, "tpe"),), sweep_trials=128)


def measure(options: Options) -> Report:
    """Time all contenders in turn, round by round, and then the sweeps."""
    sizes = QUICK if options.quick else FULL
    timed: dict[tuple[str, Load], list[Timed]] = {}
    for _ in range(sizes.rounds):
        for contender in CONTENDERS:
            for one in contender.run(sizes.loads):
                timed.setdefault((contender.name, one.load), []).append(one)
    rows = [
        (contender.name, load.name, *_cells(timed[contender.name, load], contender.workers))
        for contender in CONTENDERS
        for load in sizes.loads
    ]
    swept = [
        in_fresh_process(gate_sweep, workload, sampler, sizes.sweep_trials, SWEEP_LIMIT_S)
        for workload, sampler in sizes.sweeps
    ]
    idle = [one.overhead_ms(NUM_WORKERS) for one in timed[OURS, sizes.loads[0]]]
    return Report(
        [
            Section(
                f"Trials on {NUM_WORKERS} workers, TPE: ms a trial beside its work, medians of {sizes.rounds}",
                ("by", "a trial does", "trials", "cold, s", "overhead, ms", "asking, ms", "until MLflow has it, ms"),
                rows,
            ),
            Section(
                f"Sweeps of gate trials with MLflow, {NUM_WORKERS} actors (goals: 1,000 trials in {GOAL_S:g} s, 10 trials/s)",
                (
                    "table",
                    "sampler",
                    "trials",
                    "failed",
                    "end to end, s",
                    "trials/s",
                    "search, s",
                    "asking, s",
                    "work / actors, s",
                    "driver's CPU, s",
                ),
                [_sweep_row(one) for one in swept],
            ),
        ],
        Headline(
            "overhead of a warm trial that does nothing, with the journal, asking apart",
            Samples({OURS: np.array(idle)}).median_ms(OURS),
            " ms",
            GOAL_MS,
        ),
        {
            "contenders": {
                f"{name}/{load.name}": [asdict(one) for one in runs] for (name, load), runs in timed.items()
            },
            "sweeps": [asdict(one) | {"per_second": one.per_second} for one in swept],
            "peak_rss_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
        },
    )


def _cells(runs: Sequence[Timed], workers: int) -> tuple[str, ...]:
    num_trials = runs[0].load.num_trials
    recorded = [1e3 * one.recorded_s / num_trials for one in runs if one.recorded_s is not None]
    return (
        str(num_trials),
        f"{np.median([one.cold_s for one in runs]):.1f}",
        f"{np.median([one.overhead_ms(workers) for one in runs]):.1f}",
        f"{np.median([1e3 * one.ask_s / num_trials for one in runs]):.1f}",
        f"{np.median(recorded):.1f}" if recorded else "",
    )


def _sweep_row(one: Swept) -> tuple[str, ...]:
    return (
        one.workload,
        one.sampler,
        str(one.num_trials),
        str(one.num_failed),
        f"{one.recorded_s:.1f}",
        f"{one.per_second:.1f}",
        f"{one.search_s:.1f}",
        f"{one.ask_s:.1f}",
        f"{one.work_s / NUM_WORKERS:.1f}",
        f"{one.driver_cpu_s:.1f}",
    )


if __name__ == "__main__":
    from benchmarks import trial_overhead  # actors unpickle its classes by this name, and not as __main__'s

    run_benchmark(BENCHMARK, trial_overhead.measure, threads=1)
