"""Estimates of the time, memory and disk of each stage of a launch, from a few timed steps of the
real network on the real images.

Costs that cannot be timed beforehand, such as the start of Ray or a trial of a router, are
constants here, measured on two cores.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from heapq import heapreplace
from typing import Any

from dsnet.environment import resolve_device
from dsnet.measure.latency import BUDGET_S
from dsnet.measure.latency_table import MachineLoad
from dsnet.measure.settings import LatencySettings
from dsnet.process_memory import resident_bytes
from dsnet.structure.data import num_held_out, order_madds
from dsnet.structure.methods import structure_method
from dsnet.training.train_cost import training_madds
from dsnet.training.trial_run import TrialRun, trial_run
from dsnet.wording import plural
from orchestration.config.resolve import resolve_cores, resolve_side_by_side, resolve_threads, resolve_trials
from orchestration.config.sweep import SweepConfig
from orchestration.prepare.preparation import Prepared, latency_settings
from orchestration.runs.stages import StagePlan

MIB = 2**20
RAY_START_S = 8.0
SEARCH_START_S = 3.5
TRIAL_S = 0.03
"""Seconds of one trial, as its share of a cohort, with `TRIAL_STEPS` steps; mean over the kinds of
router."""
TRIAL_STEPS = 200
END_TO_END_COST = 3.0
"""Cost of an end-to-end training step relative to evaluating its images."""
ANALYSIS_S = 3.5
"""Seconds of resampling and fitting the reachable ceiling."""
CALL_S = 0.0003
"""Smallest time of one timed call in seconds, however small the network."""
ACCURACY_COST = 1.3
"""Cost of evaluating the sub-networks one by one, relative to the table, in which they share common
parts."""
RAY_BYTES = 600 * MIB
TRACKING_BYTES = 250 * MIB
WORKER_BYTES = 300 * MIB
"""Memory of a process that has imported torch and holds no images yet."""
TRIAL_BYTES = 15_000
"""Disk space of one trial: weights, journal and record."""
REPORT_BYTES = 6 * MIB
SUBNET_BYTES = 2_000
BUSY_LOAD = 0.5
"""Load average per core from which on the timed steps, which use all cores, are taken to be slowed
down by other work."""


@dataclass(frozen=True)
class StageForecast:
    """Estimated costs of one stage; 0 if it is done."""

    stage: str
    seconds: float
    memory_bytes: int
    """Peak memory of all processes together."""
    disk_bytes: int


@dataclass(frozen=True)
class Forecast:
    """Estimated costs of a launch."""

    stages: tuple[StageForecast, ...]
    timed: str
    """A sentence about how the steps were timed."""
    gpu_bytes: int = 0
    """Peak memory of the GPU; 0 if nothing trains on one."""

    @property
    def seconds(self) -> float:
        """Seconds of the whole launch."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def memory_bytes(self) -> int:
        """Peak memory of the whole launch."""
        return max((stage.memory_bytes for stage in self.stages), default=0)

    @property
    def disk_bytes(self) -> int:
        """Disk space of the whole launch."""
        return sum(stage.disk_bytes for stage in self.stages)

    def of(self, stage: str) -> StageForecast | None:
        """The estimate of one stage; None if there is none."""
        return next((each for each in self.stages if each.stage == stage), None)

    def to_json(self) -> dict[str, Any]:
        """The forecast as JSON, for scripts."""
        total = {"seconds": self.seconds, "memory_bytes": self.memory_bytes, "disk_bytes": self.disk_bytes}
        return {
            "stages": [asdict(stage) for stage in self.stages],
            **total,
            "gpu_bytes": self.gpu_bytes,
            "timed": self.timed,
        }


def forecast(prepared: Prepared, plans: Sequence[StagePlan]) -> Forecast | None:
    """Time a few steps, unless nothing that depends on them is left, and estimate the costs of each
    stage; writes nothing to the run.

    Args:
        prepared: the sweep's data and network.
        plans: plans of supernet, measure, table and search.

    Returns:
        None where every stage before verify is done.
    """
    if all(plan.is_done for plan in plans):
        return None
    load = MachineLoad.now()  # measured before the timed steps, which themselves load the machine
    timed = _timed(prepared)
    on_gpu = _at_a_time(prepared, plans) * timed.peak_bytes if timed.device == "cuda" else 0
    return Forecast(_stages(prepared, timed, plans), _how(prepared.config, timed, load), on_gpu)


def forecast_supernets(supernets: Sequence[tuple[Prepared, Sequence[StagePlan]]], concurrent: int) -> Forecast | None:
    """Time a few steps of every supernet of a sweep and estimate the stages of all together, as if
    each were trained to its end.

    Args:
        supernets: data, network and plans of each that may still be trained or searched; see
            `forecast`.
        concurrent: number of supernets trained at a time.

    Returns:
        None where every stage before verify is done.
    """
    left = [(prepared, plans) for prepared, plans in supernets if not all(plan.is_done for plan in plans)]
    if not left:
        return None
    load = MachineLoad.now()
    timed = [_timed(prepared, concurrent) for prepared, _ in left]
    found = [_stages(prepared, each, plans) for (prepared, plans), each in zip(left, timed, strict=True)]
    stages = []
    names = dict.fromkeys(stage.stage for each in found for stage in each)
    for name in sorted(names, key=lambda name: name != "structure"):
        parts = [stage for each in found for stage in each if stage.stage == name]
        seconds, memory = sum(part.seconds for part in parts), max(part.memory_bytes for part in parts)
        if name == "supernet":
            training = [part for part in parts if part.seconds]
            at_a_time = min(concurrent, len(training))
            if training:
                seconds = RAY_START_S + (seconds - RAY_START_S * len(training)) / at_a_time
                memory += (at_a_time - 1) * max(each.peak_bytes for each in timed)
        stages.append(StageForecast(name, seconds, memory, sum(part.disk_bytes for part in parts)))
    how = f"{_how(left[0][0].config, timed[0], load)}; for {plural(len(left), 'supernet')}, if none is stopped early"
    on_gpu = concurrent * max(each.peak_bytes for each in timed) if timed[0].device == "cuda" else 0
    return Forecast(tuple(stages), how, on_gpu)


def _stages(prepared: Prepared, timed: TrialRun, plans: Sequence[StagePlan]) -> tuple[StageForecast, ...]:
    left = {plan.name for plan in plans if not plan.is_done}
    at_a_time = _at_a_time(prepared, plans)
    beside = timed if at_a_time == 1 else _timed(prepared, at_a_time)
    estimates = _StageEstimates(prepared, timed, at_a_time, beside.step_s)
    stages = {
        **({} if prepared.structure is None else {"structure": estimates.structure}),
        "supernet": estimates.supernet,
        "measure": estimates.measure,
        "table": estimates.table,
        "search": estimates.search,
        "verify": estimates.verify,
    }
    return tuple(
        stage() if name in left or name == "verify" else StageForecast(name, 0.0, 0, 0)
        for name, stage in stages.items()
    )


def _at_a_time(prepared: Prepared, plans: Sequence[StagePlan]) -> int:
    """Number of networks that the structure stage trains at a time; 1 if it is done."""
    if prepared.structure is None or all(plan.is_done for plan in plans if plan.name == "structure"):
        return 1
    problem = prepared.structure.problem
    return resolve_side_by_side(prepared.config, structure_method(problem.settings.method).bases(problem))


def _seconds_of_all(seconds: Iterable[float], at_a_time: int) -> float:
    """Seconds of several trainings of which the next one begins when one of those that run ends."""
    ends = [0.0] * at_a_time
    for each in seconds:
        heapreplace(ends, ends[0] + each)
    return max(ends)


def _timed(prepared: Prepared, concurrent: int = 1) -> TrialRun:
    """Time a few steps with the threads of one of `concurrent` supernets."""
    config, run = prepared.config, prepared.supernet_run
    return trial_run(
        prepared.subnets,
        run,
        training=prepared.training_images(),
        data=prepared.data,
        device=resolve_device(config.supernet.device),
        threads=resolve_threads(config, resolve_cores(config), concurrent),
        workers=config.supernet.workers,
    )


def _how(config: SweepConfig, timed: TrialRun, load: MachineLoad | None) -> str:
    """A sentence about how the steps were timed; if other work slowed them down, it says that the
    estimate is too long."""
    name = "the GPU" if timed.device == "cuda" else "the CPU"
    steps, threads = plural(timed.num_steps, "step"), plural(timed.threads, "thread")
    how = f"based on {steps} of {config.supernet.train.batch_size} images, timed on {name} with {threads}"
    if load is None or load.load_average <= BUSY_LOAD * load.num_cores:
        return how
    return (
        f"{how}; the machine was busy with other work (load average {load.load_average:.1f} on "
        f"{plural(load.num_cores, 'core')}), so the estimate is too long for an idle machine; run plan again when it is idle"
    )


@dataclass(frozen=True)
class _StageEstimates:
    """Estimates the costs of each stage from the timed steps."""

    prepared: Prepared
    timed: TrialRun
    at_a_time: int
    """Number of networks that the structure stage trains at a time."""
    beside_step_s: float
    """Seconds of a step of a network that is trained beside others there."""

    @property
    def config(self) -> SweepConfig:
        return self.prepared.config

    def _images(self, split: str) -> int:
        return len(self.prepared.splits[split])

    def structure(self) -> StageForecast:
        """Costs of the structure stage: the networks that its method trains and the sorting of
        channels, at the pace of steps with the threads that each has, and half of the candidates
        that there can be."""
        assert self.prepared.structure is not None
        problem, run, size = self.prepared.structure.problem, self.prepared.supernet_run, self.prepared.image_size
        method = structure_method(problem.settings.method)
        bases, later, candidates = method.bases(problem), method.later(problem), method.num_candidates(problem)
        held = num_held_out(problem, self._images("train"))
        num_train = self._images("train") - held
        steps = run.train.epochs * max(1, num_train // min(run.train.batch_size, num_train))
        joint = training_madds(run, self.prepared.subnets, num_train, size)
        seconds = RAY_START_S if bases else 0.0
        for networks in (bases, later):
            shares = [training_madds(each.run, each.subnets, num_train, size) / max(joint, 1.0) for each in networks]
            seconds += _seconds_of_all((steps * self.beside_step_s * share for share in shares), self.at_a_time)
        seconds += steps * self.timed.step_s * order_madds(problem, num_train) / max(joint, 1.0)
        if candidates:
            # A scorer has one thread; the table of all sub-networks was timed with all threads.
            image_s = self.timed.table_image_s * self.timed.threads / len(self.prepared.subnets)
            actors = self.config.supernet.structure.concurrent or resolve_cores(self.config)
            seconds += candidates / 2 * held * image_s / actors
        memory = self.supernet().memory_bytes + (self.at_a_time - 1) * self._worker_bytes()
        disk = (1 + max(1, len(bases) + len(later))) * self.timed.checkpoint_bytes
        return StageForecast("structure", seconds, memory, disk)

    def supernet(self) -> StageForecast:
        """Costs of the supernet stage: starting Ray, the steps, and recalibration."""
        run = self.prepared.supernet_run
        num_train = self._images("train")
        steps = run.train.epochs * max(1, num_train // min(run.train.batch_size, num_train))
        estimated = num_train if run.recalibration_images is None else min(num_train, run.recalibration_images)
        seconds = RAY_START_S + steps * self.timed.step_s + estimated * self.timed.recalibration_image_s
        memory = self._platform_bytes() + self.config.supernet.workers * self._worker_bytes() + self._image_bytes()
        return StageForecast("supernet", seconds, memory, (run.keep_checkpoints + 1) * self.timed.checkpoint_bytes)

    def measure(self) -> StageForecast:
        """Costs of the measure stage: accuracies on `val`, and latencies."""
        seconds = ACCURACY_COST * self._images("val") * self.timed.table_image_s
        seconds += sum(self._latency_s(settings) for settings in latency_settings(self.config).values())
        return StageForecast("measure", seconds, self._platform_bytes(), SUBNET_BYTES * len(self.prepared.subnets.all))

    def table(self) -> StageForecast:
        """Costs of the table stage: the answers of all routes to `gate` and `val`."""
        images = self._images("gate") + self._images("val")
        num_bytes = round(images * self.timed.table_image_bytes)
        return StageForecast("table", images * self.timed.table_image_s, self._platform_bytes() + num_bytes, num_bytes)

    def search(self) -> StageForecast:
        """Costs of the search: every trial of the budget."""
        trials, actors = resolve_trials(self.config), self.config.ray.trial_actors or resolve_cores(self.config)
        tables = round((self._images("gate") + self._images("val")) * self.timed.table_image_bytes)
        seconds = SEARCH_START_S + trials * self._trial_s() / actors
        memory = self._platform_bytes() + actors * (WORKER_BYTES + 2 * tables)
        return StageForecast("search", seconds, memory, trials * TRIAL_BYTES)

    def verify(self) -> StageForecast:
        """Costs of the verify stage: the front on `test`, its analysis, and the report."""
        images, subnets = self._images("test"), self.prepared.subnets
        routes = min(self.config.budget.verify or len(subnets), resolve_trials(self.config))
        seconds = ANALYSIS_S + images * self.timed.table_image_s * (1 + routes / len(subnets))
        num_bytes = round(images * self.timed.table_image_bytes)
        return StageForecast("verify", seconds, self._platform_bytes() + num_bytes, num_bytes + REPORT_BYTES)

    def _trial_s(self) -> float:
        gate = self.config.gate
        if gate.trainer == "table":
            return TRIAL_S * gate.optimizer.steps / TRIAL_STEPS
        images = gate.end_to_end.epochs * self._images("gate")
        return END_TO_END_COST * images * self.timed.table_image_s * self.timed.threads / gate.end_to_end.threads

    def _latency_s(self, settings: LatencySettings) -> float:
        """Seconds of measuring every size on one device; a measurement is cut off after
        `BUDGET_S`."""
        sizes = (*settings.batch_sizes, *settings.group_sizes)
        image_s = self.timed.table_image_s * max(1.0, self.timed.threads / settings.threads)
        calls = len(sizes) * len(self.prepared.subnets)
        return min(BUDGET_S, (settings.repeats + settings.warmup) * (sum(sizes) * image_s + calls * CALL_S))

    def _worker_bytes(self) -> int:
        """Bytes of a process that trains."""
        return resident_bytes() if self.timed.device == "cuda" else self.timed.peak_bytes

    def _image_bytes(self) -> int:
        """Bytes of the training images in the object store."""
        return 0 if self.config.data.stream else self.prepared.data.images("train").numel()

    def _platform_bytes(self) -> int:
        """Bytes of the driver, Ray and the process that writes to MLflow."""
        return resident_bytes() + RAY_BYTES + (TRACKING_BYTES if self.config.tracking.mlflow else 0)
