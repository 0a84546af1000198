"""Rate of gate trials: cohorts of 1, 8 and 64 in one program, compared with one trial at a time by
autograd.

Trials are complete: they train, calibrate and score. The tables are synthetic (a latent difficulty
decides which routes are right and is partly visible in the hidden vector); their shapes, route
costs and hyperparameters, on which alone the time depends, are those of the digits example and of
DS-MBNet on CIFAR-10. `benchmarks.gate_fronts` compares the fronts, and the time of training end to
end, on a real supernet.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.harness import Headline, Options, Report, Samples, Section, run_benchmark, sample_interleaved
from dsnet.families import Task, layout
from dsnet.gates.fit import fit_gates
from dsnet.gates.losses import complexity
from dsnet.gates.problem import sgs_targets
from dsnet.gates.settings import GateSettings, SgsTarget, Strategy
from dsnet.routing.routing_table import GateColumns, RoutingTable
from dsnet.space.cost import pooling_madds, subnet_cost
from dsnet.space.route_tree import RouteTree

BENCHMARK = "gate trials per second on a 5,000 x 14 table: cohorts of 1, 8, 64, and one by one by autograd (goal: 30 on 2 cores)"
GOAL_MS = 1000.0 / 30.0
COHORTS = (1, 8, 64)
NUM_PROCESSES = 2


@dataclass(frozen=True)
class Workload:
    """Sizes of a sweep's tables, the same for `gate` and `val`."""

    name: str
    model: str
    task: Task
    num_images: int


DIGITS = Workload("digits", "ds_tiny", Task(num_classes=10, in_channels=1, image_size=8), 270)
LARGE = Workload("large", "ds_mbnet", Task(num_classes=10, in_channels=3, image_size=32), 5000)


def synthetic_table(workload: Workload, split: str, seed: int) -> RoutingTable:
    """A synthetic table of the workload's shape: wider routes are right more often, and the hidden
    vector depends on the difficulty of an image."""
    subnets = layout(workload.model, workload.task)
    spec, num_images, num_routes = subnets.spec, workload.num_images, len(subnets)
    num_hidden = spec.gates[0].hidden
    rng = np.random.default_rng(seed)
    difficulty = rng.normal(size=num_images)
    skill = np.linspace(0.5, 1.5, num_routes) - difficulty[:, None]
    logits = rng.normal(size=(num_images, num_routes, workload.task.num_classes))
    labels = rng.integers(workload.task.num_classes, size=num_images)
    logits[np.arange(num_images), :, labels] += 2.0 + 1.5 * skill
    log_p = logits - np.log(np.exp(logits).sum(2, keepdims=True))
    p = np.sort(np.exp(log_p), axis=2)
    rank = (logits > logits[np.arange(num_images), :, labels][:, :, None]).sum(2)
    loadings = np.random.default_rng(0).normal(size=num_hidden)  # the same dependence on difficulty in every split
    hidden = np.maximum(difficulty[:, None] * loadings + rng.normal(size=(num_images, num_hidden)), 0.0)
    costs = [subnet_cost(spec, subnet, spec.image_size) for subnet in subnets]
    return RoutingTable(
        split=split,
        routes=tuple(subnet.name for subnet in subnets),
        tree=RouteTree.of(subnets),
        gates=(GateColumns(({"hidden": (0, num_hidden)},), (pooling_madds(spec, subnets[0], 0, spec.image_size),)),),
        trunk_madds=costs[0].trunk_madds,
        num_classes=workload.task.num_classes,
        image_ids=np.arange(num_images),
        labels=labels,
        madds=np.array([cost.madds for cost in costs]),
        ce=-log_p[np.arange(num_images), :, labels].astype(np.float32),
        predicted=logits.argmax(2),
        correct1=rank < 1,
        correct5=rank < 5,
        confidence=p[:, :, -1].astype(np.float32),
        margin=(p[:, :, -1] - p[:, :, -2]).astype(np.float32),
        entropy=-(np.exp(log_p) * log_p).sum(2).astype(np.float32),
        logits=logits.astype(np.float16),
        logit_classes=np.zeros((num_images, num_routes, 0), dtype=np.int32),
        evidence=hidden.astype(np.float32),
    )


def _drawn(rng: np.random.Generator, choices: object) -> Any:
    return str(rng.choice(get_args(choices)))


def trial_settings(num_routes: int, seed: int) -> Iterator[GateSettings]:
    """Yield random trials from the digits example's space, endlessly."""
    rng = np.random.default_rng(seed)
    for number in itertools.count():
        yield GateSettings(
            target=float(rng.uniform(0.05, 0.9)),
            routes=tuple(range(int(rng.integers(0, 3)), num_routes)),
            t_easy=float(rng.uniform(0.0, 0.9)),
            t_hard=float(rng.uniform(0.0, 0.5)),
            strategy=_drawn(rng, Strategy),
            sgs_target=_drawn(rng, SgsTarget),
            lr=float(np.exp(rng.uniform(np.log(1e-3), np.log(0.3)))),
            seed=number,
        )


def train_by_autograd(table: RoutingTable, settings: GateSettings) -> torch.Tensor:
    """Train one gate in the usual way, by autograd and torch's optimiser, for its time."""
    routes = list(settings.routes)
    hidden = torch.from_numpy(table.part("hidden").copy())
    hidden = hidden / hidden.pow(2).mean(0).sqrt().clamp_min(1e-6)
    ce = torch.from_numpy(table.ce[:, routes].copy())
    targets = torch.from_numpy(np.searchsorted(routes, sgs_targets(table, routes, settings)))
    madds = torch.from_numpy(table.madds[routes] / table.madds.max()).float()
    target = float(table.madds.min() + settings.target * np.ptp(table.madds)) / float(table.madds.max())
    weight = torch.zeros(len(routes), hidden.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=settings.lr)
    generator = torch.Generator().manual_seed(settings.seed)
    for step in range(settings.steps):
        rows = torch.randperm(table.num_images, generator=generator)[: settings.batch_size]
        logits = hidden[rows] @ weight.T
        p = (logits / settings.temperature(step)).softmax(1)
        loss = (p * ce[rows]).sum(1).mean() + F.cross_entropy(logits, targets[rows])
        cost = complexity((p @ madds).mean(), target, 1.0, settings.complexity_form)
        optimizer.zero_grad()
        (loss + settings.lambda_complexity * cost).backward()
        optimizer.step()
    return weight.detach()


class Sweep:
    """Trials of one workload."""

    def __init__(self, workload: Workload, seed: int) -> None:
        self.gate = synthetic_table(workload, "gate", seed)
        self.val = synthetic_table(workload, "val", seed + 1)
        self.settings = trial_settings(self.gate.num_routes, seed)

    def cohort(self, size: int) -> None:
        """Run the next `size` random trials as one cohort."""
        fits = fit_gates(self.gate, self.val, list(itertools.islice(self.settings, size)))
        for fit in fits:
            if isinstance(fit, Exception):
                raise fit

    def by_autograd(self) -> None:
        """Train the next random trial by autograd, without calibration and scoring."""
        train_by_autograd(self.gate, next(self.settings))


def _work(workload: Workload, seed: int, num_cohorts: int) -> float:
    """Seconds of cohorts of 64 in this process, on one thread, after a warm-up."""
    torch.set_num_threads(1)
    sweep = Sweep(workload, seed)
    sweep.cohort(COHORTS[-1])
    start = time.perf_counter()
    for _ in range(num_cohorts):
        sweep.cohort(COHORTS[-1])
    return time.perf_counter() - start


def rate_on_two_cores(workload: Workload, options: Options) -> float:
    """Trials a second of two parallel processes, without start-up and warm-up."""
    num_cohorts = 1 if options.quick else 5
    with ProcessPoolExecutor(NUM_PROCESSES, mp_context=get_context("spawn")) as pool:
        seconds = list(pool.map(_work, [workload] * NUM_PROCESSES, range(NUM_PROCESSES), [num_cohorts] * NUM_PROCESSES))
    return NUM_PROCESSES * num_cohorts * COHORTS[-1] / max(seconds)


def measure(options: Options) -> Report:
    """Run a cohort of each size in every round; the headline is a trial's share of a cohort of 64
    on two cores."""
    workloads = (DIGITS, LARGE)
    sweeps = {workload.name: Sweep(workload, options.seed) for workload in workloads}
    calls: dict[str, Callable[[], None]] = {}
    for name, sweep in sweeps.items():
        calls[f"{name}/autograd"] = sweep.by_autograd
        calls |= {f"{name}/{size}": _cohort_call(sweep, size) for size in COHORTS}
    samples = sample_interleaved(calls, rounds=3 if options.quick else 20, warmup=1)
    rates = {workload.name: rate_on_two_cores(workload, options) for workload in workloads}
    rows = [_row(name, sweep, samples, rates[name]) for name, sweep in sweeps.items()]
    columns = (
        "table",
        "images x routes x hidden",
        "autograd, training alone",
        *(f"cohort of {size}" for size in COHORTS),
        "2 processes, cohorts of 64",
    )
    share = Samples({"large/64": samples.ms["large/64"] / COHORTS[-1]}).median_ms("large/64")
    return Report(
        [Section("Trials per second, 1 thread a process, 200 steps of 512 images [95 %]", columns, rows)],
        Headline(
            f"a trial's share of a cohort of 64 on one core (2 cores: {rates['large']:.0f} trials/s)",
            share,
            " ms",
            GOAL_MS,
        ),
        {
            "times": samples.figures(),
            "two_processes_per_s": rates,
            "workloads": {workload.name: asdict(workload) for workload in workloads},
        },
    )


def _cohort_call(sweep: Sweep, size: int) -> Callable[[], None]:
    return lambda: sweep.cohort(size)


def _row(name: str, sweep: Sweep, samples: Samples, two_cores: float) -> tuple[str, ...]:
    per_trial = {f"{size}": samples.ms[f"{name}/{size}"] / size for size in COHORTS}
    rates = Samples({**per_trial, "autograd": samples.ms[f"{name}/autograd"]})
    return (
        name,
        f"{sweep.val.num_images} x {sweep.val.num_routes} x {sweep.val.part('hidden').shape[1]}",
        rates.per_second("autograd").text(1),
        *(rates.per_second(str(size)).text(1) for size in COHORTS),
        f"{two_cores:.0f}",
    )


if __name__ == "__main__":
    run_benchmark(BENCHMARK, measure, threads=1)
