"""What a gate trial on a routing table costs, one by one: train, calibrate, score.

The tables are made up (a latent difficulty decides which routes are right and leaks into the hidden vector); their shapes, route costs and
hyperparameters are those of the digits example and of DS-MBNet on CIFAR-10, and only these decide the time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch

from benchmarks.harness import Headline, Options, Report, Samples, Section, run_benchmark, sample_interleaved
from dsnet.cost import subnet_cost
from dsnet.families import Task, layout
from dsnet.routing_table import RoutingTable
from dsnet.training.gate import GateSettings, calibrated_router, fit_gate, train_gate

BENCHMARK = "seconds of work per gate trial on a 270 x 6 and a 5,000 x 14 table, one by one, 1 thread (goal: digits at most 1.5 s)"
GOAL_S = 1.5


@dataclass(frozen=True)
class Workload:
    """The size of a sweep's tables; `gate` and `val` are alike."""

    name: str
    model: str
    task: Task
    num_images: int


DIGITS = Workload("digits", "ds_tiny", Task(num_classes=10, in_channels=1, image_size=8), 270)
LARGE = Workload("large", "ds_mbnet", Task(num_classes=10, in_channels=3, image_size=32), 5000)


def synthetic_table(workload: Workload, split: str, seed: int) -> RoutingTable:
    """A table of the workload's shape: wider routes are right more often, the hidden vector hints at an image's difficulty."""
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
    loadings = np.random.default_rng(0).normal(size=num_hidden)  # the same hint on every split
    hidden = np.maximum(difficulty[:, None] * loadings + rng.normal(size=(num_images, num_hidden)), 0.0)
    costs = [subnet_cost(spec, subnet, spec.image_size) for subnet in subnets]
    return RoutingTable(
        split=split,
        routes=tuple(subnet.name for subnet in subnets),
        layout={"hidden": (0, num_hidden)},
        trunk_madds=costs[0].trunk_madds,
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
        evidence=hidden.astype(np.float32)[:, None, :],
    )


def trial_settings(num_routes: int, seed: int) -> Iterator[GateSettings]:
    """Random trials from the digits example's space, without end."""
    rng = np.random.default_rng(seed)
    for number in itertools.count():
        yield GateSettings(
            target=float(rng.uniform(0.05, 0.9)),
            routes=tuple(range(int(rng.integers(0, 3)), num_routes)),
            t_easy=float(rng.uniform(0.0, 0.9)),
            t_hard=float(rng.uniform(0.0, 0.5)),
            strategy=str(rng.choice(["try_best", "give_up"])),
            sgs_target=str(rng.choice(["extremes", "cheapest"])),
            lr=float(np.exp(rng.uniform(np.log(1e-3), np.log(0.3)))),
            seed=number,
        )


class Sweep:
    """Trials of one workload; a whole trial, and its two costly parts alone on the same settings."""

    def __init__(self, workload: Workload, seed: int) -> None:
        self.gate = synthetic_table(workload, "gate", seed)
        self.val = synthetic_table(workload, "val", seed + 1)
        self.whole = trial_settings(self.gate.num_routes, seed)
        self.training = trial_settings(self.gate.num_routes, seed)
        self.calibration = trial_settings(self.gate.num_routes, seed)

    def trial(self) -> None:
        """Train, calibrate, score."""
        fit_gate(self.gate, self.val, next(self.whole))

    def train(self) -> None:
        """The optimiser's steps."""
        train_gate(self.gate, next(self.training))

    def calibrate(self) -> None:
        """The bisections, from a random head."""
        settings = next(self.calibration)
        generator = torch.Generator().manual_seed(settings.seed)
        shape = (len(settings.routes), self.val.part("hidden").shape[1])
        calibrated_router(torch.randn(shape, generator=generator, dtype=torch.float64), self.val, settings)


def measure(options: Options) -> Report:
    """Every round runs the next random trial of each workload."""
    sweeps = {workload.name: Sweep(workload, options.seed) for workload in (DIGITS, LARGE)}
    calls: dict[str, Callable[[], None]] = {}
    for name, sweep in sweeps.items():
        calls |= {f"{name}/trial": sweep.trial, f"{name}/train": sweep.train, f"{name}/calibrate": sweep.calibrate}
    samples = sample_interleaved(calls, rounds=10 if options.quick else 60, warmup=2)
    rates = {name: samples.per_second(f"{name}/trial") for name in sweeps}
    rows = [_row(name, sweep, samples) for name, sweep in sweeps.items()]
    columns = (
        "table",
        "images x routes x hidden",
        "trial ms [95 %]",
        "IQR ms",
        "train ms",
        "calibrate ms",
        "trials/s [95 %]",
    )
    return Report(
        [Section(f"Gate trials one by one, {options.threads} thread(s), 200 steps of 512 images", columns, rows)],
        Headline("a digits gate trial", samples.in_seconds("digits/trial"), " s", GOAL_S),
        {"times": samples.figures(), "trials_per_s": {name: asdict(rate) for name, rate in rates.items()}},
    )


def _row(name: str, sweep: Sweep, samples: Samples) -> tuple[str, ...]:
    trial = f"{name}/trial"
    return (
        name,
        f"{sweep.val.num_images} x {sweep.val.num_routes} x {sweep.val.part('hidden').shape[1]}",
        samples.median_ms(trial).text(0),
        f"{samples.iqr_ms(trial):.0f}",
        f"{samples.median_ms(f'{name}/train').value:.0f}",
        f"{samples.median_ms(f'{name}/calibrate').value:.0f}",
        samples.per_second(trial).text(1),
    )


if __name__ == "__main__":
    run_benchmark(BENCHMARK, measure, threads=1)
