"""Time of (a) our in-place bootstrapping step, compared with (b) the sum of the same networks
trained as plain static modules.

(b) is the shortest possible time of a naive step: forward and backward of largest, two randoms and
smallest, each as a plain module with its own contiguous weights, and the teacher's forward. Both
compute the same losses (the largest difference is in the JSON), with the same dtype, layout and
threads; neither includes the optimiser and the EMA, which have their own row. (a) can be faster
than (b) because the trunk before the gate is shared. A plain network (`resnet18`, `mobilenet_v2`)
shares nothing, so that (a) can at best be as fast as (b).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks.harness import (
    Headline,
    Options,
    Report,
    Samples,
    Section,
    devices,
    in_fresh_process,
    memory_mib,
    run_benchmark,
    sample_interleaved,
)
from dsnet.deploy.materialize import materialize, materialize_trunk
from dsnet.families import Task, create
from dsnet.network.ema import Ema
from dsnet.network.memory_order import arrange, arranged
from dsnet.training.losses import smoothed_one_hot, soft_cross_entropy
from dsnet.training.optimization import make_optimizer
from dsnet.training.settings import TrainSettings
from dsnet.training.step import StepPlan, StepRules, supernet_step

BENCHMARK = "our in-place bootstrapping step over the same networks as plain static modules, time and peak memory (goal: at most 0.89)"
GOAL = 0.89
PLAIN = ("resnet18", "mobilenet_v2")
"""Plain networks that are compared too; goal: at most 1.10."""
VIT = "ds_vit"
"""A vision transformer, which is compared at 32 px; goal: at most 1.05."""
OPTIONS: dict[str, dict[str, Any]] = {
    "ds_mbnet": {"dropout": 0.0},
    VIT: {"patch": 4, "dim": 96, "heads": 3, "depth": 6},
}
"""Options of the families."""
SMOOTHING = 0.1
NUM_CLASSES = 10
EMA_DECAY = 0.997


@dataclass(frozen=True)
class Workload:
    """One comparison."""

    device: str
    image_size: int
    batch_size: int
    precision: str
    channels_last: bool
    seed: int
    threads: int
    model: str = "ds_mbnet"

    @property
    def title(self) -> str:
        """Description of the workload."""
        layout = "channels_last" if self.channels_last else "contiguous"
        size = f"{self.image_size} px, batch {self.batch_size}"
        return f"{self.model}, {self.device}, {size}, {self.precision}, {layout}, {self.threads} thread(s)"

    def autocast(self) -> torch.autocast:
        """Context of bfloat16 autocast, if the workload uses it."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16")


class Networks:
    """A supernet, its teacher, a batch, and the sub-networks of a step; dropout is off so that both
    ways compute the same losses."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        task = Task(NUM_CLASSES, 3, workload.image_size)
        options = OPTIONS.get(workload.model, {})
        self.student = create(workload.model, task, options, seed=workload.seed).to(workload.device).train()
        for part in self.student.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        arrange(self.student, workload.channels_last)
        self.ema = Ema(self.student)
        generator = torch.Generator().manual_seed(workload.seed)
        shape = (workload.batch_size, 3, workload.image_size, workload.image_size)
        self.images = arranged(torch.randn(shape, generator=generator).to(workload.device), workload.channels_last)
        self.labels = torch.randint(NUM_CLASSES, (workload.batch_size,), generator=generator).to(workload.device)
        members = self.student.subnets
        between = [number for number, subnet in enumerate(members) if subnet != members.largest][1:]
        picks = [between[pick] for pick in torch.randperm(len(between), generator=generator)[:2].tolist()]
        self.plan = StepPlan(
            largest=members.largest,
            randoms=tuple(members[pick] for pick in picks),
            smallest=members[0],
            soft_weight=1.0,
            cold=frozenset(),
        )

    def ours(self) -> Callable[[], dict[str, Tensor]]:
        """Forward and backward of (a)."""
        rules = StepRules(teacher="ema", smoothing=SMOOTHING, precision=self.workload.precision)

        def step() -> dict[str, Tensor]:
            self.student.zero_grad(set_to_none=True)
            return supernet_step(self.student, self.ema.module, self.images, self.labels, self.plan, rules)

        return step

    def ours_with_update(self) -> Callable[[], None]:
        """(a) with the optimiser's step and the EMA; the learning rate is 0, so that every call
        does the same work."""
        optimizer = make_optimizer(self.student, TrainSettings())
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        step = self.ours()

        def update() -> None:
            step()
            optimizer.step()
            self.ema.update(EMA_DECAY)

        return update

    def static(self) -> Callable[[], dict[str, Tensor]]:
        """Forward and backward of (b)."""
        plan = self.plan
        largest, *smaller = [
            (subnet.name, self._plain(materialize(self.student, subnet)).train().requires_grad_(True))
            for subnet in (plan.largest, *plan.randoms, plan.smallest)
        ]
        teacher = self._plain(materialize(self.ema.module, plan.largest))

        def train(network: torch.nn.Module, target: Tensor) -> Tensor:
            network.zero_grad(set_to_none=True)
            with self.workload.autocast():
                logits = network(self.images).float()
            loss = soft_cross_entropy(logits, target)
            loss.backward()
            return loss.detach()

        def step() -> dict[str, Tensor]:
            losses = {largest[0]: train(largest[1], smoothed_one_hot(self.labels, NUM_CLASSES, SMOOTHING))}
            with torch.no_grad(), self.workload.autocast():
                target = teacher(self.images).float().softmax(1)
            return losses | {name: train(network, target) for name, network in smaller}

        return step

    def _plain(self, network: torch.nn.Module) -> torch.nn.Module:
        """A plain network in the workload's memory order."""
        arrange(network, self.workload.channels_last)
        return network

    def trunk(self) -> Callable[[], None]:
        """Forward and backward of the small trunk alone: (a) runs it once, (b) three times."""
        trunk = self._plain(materialize_trunk(self.student, self.plan.smallest)).train().requires_grad_(True)

        def step() -> None:
            trunk.zero_grad(set_to_none=True)
            with self.workload.autocast():
                features = trunk(self.images).features
            features.sum().backward()

        return step


def peak_memory_mib(workload: Workload, way: str) -> dict[str, float]:
    """Memory of two steps of one way, in a process of its own.

    Returns:
        `step`: peak memory of the steps beyond that of the networks and their gradients; `peak`:
            peak memory of the whole process, with the supernet from which (b)'s networks were cut.
    """
    torch.set_num_threads(workload.threads)
    networks = Networks(workload)
    step: Callable[[], object] = {"ours": networks.ours, "static": networks.static}[way]()
    if workload.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        before_mib = memory_mib("VmRSS")
    for _ in range(2):
        step()
    if workload.device == "cuda":
        peak = torch.cuda.max_memory_allocated()
        return {"step": (peak - before) / 2**20, "peak": peak / 2**20}
    peak_mib = memory_mib("VmHWM")
    return {"step": peak_mib - before_mib, "peak": peak_mib}


def workloads(options: Options, only: str = "") -> list[Workload]:
    """Workloads: DS-MBNet at 64 px and batch 32 on the CPU in both memory orders (32 px and 16 with
    --quick); 32 and 224 px, batch 256, bf16 on a GPU; the plain networks as the first, and the
    vision transformer likewise at 32 px.

    Args:
        options: of the benchmark.
        only: part of the titles; empty for all.
    """
    sizes = {"cpu": [(32, 16)] if options.quick else [(64, 32)], "cuda": [(32, 256), (224, 256)]}
    precisions = {"cpu": "float32", "cuda": "bf16"}
    layouts = {"cpu": (False, True), "cuda": (True,)}
    found = [
        Workload(device.type, size, batch_size, precisions[device.type], is_last, options.seed, options.threads)
        for device in devices()
        for size, batch_size in sizes[device.type]
        for is_last in layouts[device.type]
    ]
    further = [replace(found[0], model=model) for model in PLAIN]
    further.append(replace(found[0], model=VIT, image_size=32))
    return [workload for workload in (*found, *further) if only in workload.title]


@dataclass(frozen=True)
class Comparison:
    """Result of one workload."""

    workload: Workload
    plan: StepPlan
    samples: Samples
    memory: dict[str, dict[str, float]]
    loss_difference: float


def compare(workload: Workload, options: Options) -> Comparison:
    """Time both ways interleaved in one process, and measure the memory of each in a new
    process."""
    networks = Networks(workload)
    ours, static = networks.ours(), networks.static()
    difference = _largest_difference(ours(), static())
    calls: dict[str, Callable[[], object]] = {
        "ours": ours,
        "static": static,
        "ours_with_update": networks.ours_with_update(),
    }
    if workload.model not in PLAIN:
        calls["trunk"] = networks.trunk()
    rounds, budget_s = (8, 20.0) if options.quick else (30, 100.0)
    samples = sample_interleaved(calls, rounds=rounds, warmup=2, budget_s=budget_s, device=workload.device)
    memory = {way: in_fresh_process(peak_memory_mib, workload, way) for way in ("ours", "static")}
    return Comparison(workload, networks.plan, samples, memory, difference)


def measure(options: Options, only: str) -> Report:
    """Measure every workload; the headline is the first, on the CPU."""
    found = [compare(workload, options) for workload in workloads(options, only)]
    if not found:
        raise click.BadParameter(f"no workload has {only!r} in its title", param_hint="--only")
    first = found[0]
    return Report(
        [_section(comparison) for comparison in found],
        Headline(f"a/b, {first.workload.title}", first.samples.ratio(["ours"], ["static"]), "", GOAL),
        {comparison.workload.title: _figures(comparison) for comparison in found},
    )


def _largest_difference(ours: dict[str, Tensor], static: dict[str, Tensor]) -> float:
    """Largest difference between the losses of the same networks by the two ways."""
    return max(abs(float(ours[name]) - float(loss)) for name, loss in static.items())


def _section(found: Comparison) -> Section:
    samples = found.samples

    def row(label: str, call: str) -> tuple[str, ...]:
        step_mib = f"{found.memory[call]['step']:.0f}" if call in found.memory else "-"
        times = (samples.median_ms(call).text(1), f"{samples.iqr_ms(call):.1f}", f"{samples.fastest_ms(call):.1f}")
        return (label, *times, samples.ratio([call], ["static"]).text(), step_mib)

    rows = [
        row("(a) our step", "ours"),
        row("(b) the same networks, static", "static"),
        row("(a) with optimiser and EMA", "ours_with_update"),
    ]
    if found.workload.model not in PLAIN:
        rows.append(row("trunk: once in (a), 3 times in (b)", "trunk"))
    columns = ("", "ms [95 %]", "IQR ms", "fastest ms", "over (b) [95 %]", "peak of a step, MiB")
    return Section(f"{found.workload.title}, {samples.num_rounds} rounds", columns, rows)


def _figures(found: Comparison) -> dict[str, Any]:
    samples, plan = found.samples, found.plan
    return {
        "subnets": [subnet.name for subnet in (plan.largest, *plan.randoms, plan.smallest)],
        "times": samples.figures(),
        "ours_over_static": asdict(samples.ratio(["ours"], ["static"])),
        "fastest_ours_over_static": samples.fastest_ms("ours") / samples.fastest_ms("static"),
        **(
            {} if found.workload.model in PLAIN else {"trunk_over_static": asdict(samples.ratio(["trunk"], ["static"]))}
        ),
        "memory_mib": found.memory,
        "largest_loss_difference": found.loss_difference,
    }


if __name__ == "__main__":
    only = click.Option(["--only"], default="", help="Workloads whose titles hold this text, such as ds_vit.")
    run_benchmark(BENCHMARK, measure, params=[only])
