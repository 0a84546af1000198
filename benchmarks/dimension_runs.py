"""The runs of `dimensions`: supernets whose sub-networks differ in one dimension, their times, and
the acceleration of a dynamic vision transformer.

Trainings need only torch and dsnet; measuring times also needs the platform's packages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.regime_runs import Material, divided, speed
from dsnet.data.registry import load_images
from dsnet.data.settings import SplitSizes
from dsnet.deploy.engines import TORCH, timing_engine
from dsnet.deploy.materialize import materialize
from dsnet.deploy.onnx_files import open_model
from dsnet.errors import NonFiniteLossError
from dsnet.families import Task, layout, rebuild
from dsnet.families.vit import FAMILY as VIT
from dsnet.families.vit import VitSupernet, grid_of
from dsnet.image_size import height_and_width
from dsnet.measure.evaluate import build_routing_table
from dsnet.measure.latency import device_name
from dsnet.network.batchnorm import recalibrate
from dsnet.network.supernet import Supernet
from dsnet.network.transformer import PlainHead
from dsnet.routers.base import Router
from dsnet.space.cost import subnet_cost
from dsnet.space.spec import ChannelGroup, Subnet, SupernetSpec
from dsnet.space.subnet_set import SubnetSet
from dsnet.stored.checkpoint import load_supernet
from dsnet.training.settings import REGIMES, Regime, RegimeName, TrainSettings
from dsnet.training.supernet import TrainingCallbacks, train_supernet
from dsnet.training.supernet_run import SupernetRun
from dsnet.training.train_cost import training_madds

TIMES = "times"
"""Name of the cell that times all networks of a part."""
ACCELERATION = "acceleration"
"""Name of the cell that times dynamic inference."""
CHANNELS, KERNELS, EMBED, HEADS, MLP, DEPTH = "channels", "kernels", "embed", "heads", "mlp", "depth"
DIMENSIONS = (CHANNELS, KERNELS, EMBED, HEADS, MLP, DEPTH)
SHARES = tuple((number + 1) / 256 for number in range(256))
"""Shares of a dimension among which that of a budget is looked for."""
ALSO_TIMED = 64
"""Batch size at which networks are timed beside that of the part."""
BUDGET_S = 120.0
"""Seconds after which no further round of times begins."""
TIMED_POOL = 64
"""Images that the timed networks get their statistics from."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One supernet: the dimensions in which its sub-networks differ, and its training."""

    label: str
    """Description in the report."""
    dimensions: tuple[str, ...]
    base: str
    """The arm to which it is compared; its own name where it is compared to none."""
    start: Mapping[str, int] = field(default_factory=dict)
    """Dimension -> width that all narrower sub-networks have in it."""
    regime: RegimeName | None = None
    """None: the part's."""
    is_plain: bool = False
    """Whether the residual stream is sliced too: no channels stay idle behind the gate."""
    of: tuple[str, ...] = ()
    """The arms whose sub-networks it has, all of which learn in every step; empty: its own ones."""

    def regime_in(self, usual: RegimeName) -> Regime:
        """Its regime where `usual` is the part's."""
        regime = REGIMES[self.regime or usual]
        return replace(regime, widths="all", num_random=0) if self.of else regime


ONE = "one"
"""The supernet with the sub-networks of all dimensions."""
CNN_ARMS: Mapping[str, Arm] = MappingProxyType(
    {
        CHANNELS: Arm(label="channels; the largest kernels", dimensions=(CHANNELS,), base=CHANNELS),
        KERNELS: Arm(label="kernels; all channels", dimensions=(KERNELS,), base=CHANNELS),
        "both": Arm(label="kernels of 5, then channels", dimensions=(CHANNELS,), base=CHANNELS, start={KERNELS: 5}),
        "mvco": Arm(
            label="as channels, trained by multi-view consistency",
            dimensions=(CHANNELS,),
            base=CHANNELS,
            regime="mvco",
        ),
        ONE: Arm(label="channels and kernels in one supernet", dimensions=(), base=ONE, of=(CHANNELS, KERNELS)),
    }
)
"""Supernets of networks with kernels, in the order of the tables."""
TOGETHER = "together"
VIT_ARMS: Mapping[str, Arm] = MappingProxyType(
    {
        TOGETHER: Arm(label="embedding, heads and MLP by one share", dimensions=(EMBED, HEADS, MLP), base=TOGETHER),
        EMBED: Arm(label="embedding, by idle slicing", dimensions=(EMBED,), base=TOGETHER),
        HEADS: Arm(label="heads", dimensions=(HEADS,), base=TOGETHER),
        MLP: Arm(label="hidden channels of the MLP", dimensions=(MLP,), base=TOGETHER),
        DEPTH: Arm(label="blocks", dimensions=(DEPTH,), base=TOGETHER),
        "plain": Arm(label="as embed, but the stream is sliced too", dimensions=(EMBED,), base=EMBED, is_plain=True),
        "ib": Arm(
            label="as together, trained by in-place bootstrapping",
            dimensions=(EMBED, HEADS, MLP),
            base=TOGETHER,
            regime="ib",
        ),
        ONE: Arm(
            label="all dimensions in one supernet",
            dimensions=(),
            base=ONE,
            of=(TOGETHER, EMBED, HEADS, MLP, DEPTH),
        ),
    }
)
"""Supernets of vision transformers, in the order of the tables."""


def arms_of(family: str) -> Mapping[str, Arm]:
    """The supernets that are compared in a family."""
    return VIT_ARMS if family == VIT else CNN_ARMS


@dataclass(frozen=True, kw_only=True)
class Part:
    """Settings that all cells of a part's folder share."""

    data: str
    """Name of a data set."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Numbers of images of splits that differ from the data set's default."""
    family: str
    options: Mapping[str, Any]
    ruler: str
    """The dimension whose narrower widths give the budgets."""
    ruler_widths: tuple[int, ...]
    regime: RegimeName
    """Regime of the arms without one of their own."""
    step: int
    """Numbers of channels are multiples of it. On a CPU with AVX-512, ONNX Runtime takes as long
    for other multiples of 4 as for the next multiple of 16, and much longer for numbers between."""
    train: TrainSettings
    recalibration_images: int | None = None
    engine: str = "onnxruntime"
    """The engine in which networks are timed on the CPU."""
    timed_batch: int = 1
    rounds: int = 200
    """Rounds of the times."""
    dynamic: Mapping[str, Any] | None = None
    """Options of the vision transformer whose acceleration is timed; None: none is."""
    dynamic_batches: tuple[int, ...] = (1, 64)
    dynamic_rounds: int = 40

    def to_json(self) -> dict[str, Any]:
        """A JSON-able mapping."""
        return asdict(self)


_CNN: Mapping[str, Any] = MappingProxyType({"ruler": KERNELS, "ruler_widths": (3,), "regime": "ib", "step": 16})
_VIT: Mapping[str, Any] = MappingProxyType({"family": VIT, "ruler": DEPTH, "regime": "mvco", "step": 8})
SCALES: Mapping[str, Mapping[str, Part]] = MappingProxyType(
    {
        "quick": {
            "tiny": Part(
                data="digits",
                sizes={"train": 96, "gate": 60, "val": 60, "test": 100},
                family="ds_tiny",
                options={"width": 0.5, "num_routes": 3, "gated_widths": [[16, 32, 64], [32, 64, 128]], "kernels": [3, 5, 7]},
                train=TrainSettings(epochs=1, batch_size=48, warmup_epochs=0.5),
                engine=TORCH,
                rounds=3,
                **_CNN,
            ),
            "vit": Part(
                data="digits",
                sizes={"train": 96, "gate": 60, "val": 60, "test": 100},
                options={"dim": 16, "heads": 8, "depth": 4, "mlp_ratio": 2.0, "gates": [1], "step": 1},
                ruler_widths=(2,),
                train=TrainSettings(epochs=1, batch_size=48, warmup_epochs=0.5, optimizer="adamw", lr=1e-3),
                engine=TORCH,
                rounds=3,
                dynamic={"dim": 16, "heads": 4, "depth": 3},
                dynamic_batches=(4,),
                dynamic_rounds=5,
                **{**_VIT, "step": 1},
            ),
        },
        "cpu": {
            "mbnet": Part(
                data="cifar10",
                sizes={"train": 6400, "gate": 1000, "val": 2000},
                family="ds_mbnet",
                options={
                    "width": 0.25,
                    "stem_stride": 1,
                    "num_routes": 3,
                    "gated_widths": [[24, 52, 80], [48, 96, 144]],
                    "kernels": [3, 5, 7],
                },
                train=TrainSettings(epochs=3, batch_size=32, warmup_epochs=0.25, channels_last=True),
                recalibration_images=1600,
                **_CNN,
            ),
            "vit": Part(
                data="digits",
                sizes={"train": 600, "gate": 60, "val": 337, "test": 800},
                options={"dim": 48, "heads": 8, "depth": 4, "mlp_ratio": 2.0, "gates": [1], "step": 1},
                ruler_widths=(2,),
                train=TrainSettings(
                    epochs=14, batch_size=32, optimizer="adamw", lr=2e-3, weight_decay=0.05, warmup_epochs=1
                ),
                dynamic={"dim": 96, "heads": 3, "depth": 6},
                **_VIT,
            ),
            "tiny": Part(
                data="cifar10",
                sizes={"train": 6400, "gate": 1000, "val": 2000},
                family="ds_tiny",
                options={"width": 0.5, "num_routes": 3, "gated_widths": [[16, 32, 64], [32, 64, 128]], "kernels": [3, 5, 7]},
                train=TrainSettings(epochs=3, batch_size=32, warmup_epochs=0.25, channels_last=True),
                recalibration_images=1600,
                **_CNN,
            ),
        },
        "gpu": {
            "mbnet": Part(
                data="cifar10",
                family="ds_mbnet",
                options={"stem_stride": 1, "num_routes": 3, "kernels": [3, 5, 7]},
                train=TrainSettings(
                    epochs=30,
                    batch_size=512,
                    lr=0.08,
                    warmup_epochs=2.0,
                    precision="bf16",
                    channels_last=True,
                    checkpoint_every=5,
                ),
                timed_batch=256,
                **_CNN,
            ),
            "vit": Part(
                data="cifar10",
                options={
                    "patch": 4, "dim": 192, "heads": 12, "depth": 12, "mlp_ratio": 2.0, "gates": [2], "step": 1
                },
                ruler_widths=(6, 8),
                train=TrainSettings(
                    epochs=100,
                    batch_size=512,
                    optimizer="adamw",
                    lr=1e-3,
                    weight_decay=0.05,
                    warmup_epochs=5,
                    precision="bf16",
                    checkpoint_every=5,
                ),
                timed_batch=256,
                dynamic={"patch": 4, "dim": 192, "heads": 3, "depth": 12},
                dynamic_batches=(1, 64, 256),
                **_VIT,
            ),
        },
    }
)  # fmt: skip
"""`quick`: seconds; `cpu`: half a minute to two minutes a cell on one thread; `gpu`: the full
DS-MBNet, and a transformer of DeiT-tiny's width, on all of CIFAR-10. `tiny` has kernels on features
of 16 and 8 pixels, `mbnet` on those of 4 and 2."""


def load_part(part: Part, path: Path | None) -> Material:
    """Read the data set of a part.

    Raises:
        DataError: the images are not there.
    """
    return divided(load_images(part.data, path), SplitSizes(**part.sizes))


def groups_of(spec: SupernetSpec) -> dict[str, tuple[int, ...]]:
    """Dimension -> numbers of the channel groups behind the first gate that are its widths."""
    names = {"kernel": KERNELS, "heads": HEADS, "depth": DEPTH, "slice": EMBED}
    names["channels"] = MLP if spec.family == VIT else CHANNELS
    found: dict[str, tuple[int, ...]] = {}
    for number in range(spec.gates[0].num_prefix_groups, len(spec.groups)):
        dimension = names[spec.groups[number].kind]
        found[dimension] = (*found.get(dimension, ()), number)
    return found


def narrowed(
    spec: SupernetSpec, widths: Sequence[int], dimensions: Sequence[str], step: int
) -> Iterator[tuple[int, ...]]:
    """The widths with those of some dimensions at each of `SHARES`.

    A width is the nearest possible one. In networks with few groups of channels, each of them is
    also rounded the other way, because multiples of the step are far apart there.

    Args:
        spec: the network.
        widths: the widths at a share of 1.
        dimensions: the dimensions.
        step: numbers of channels are multiples of it, or as in `widths`.
    """
    numbers = [number for dimension in dimensions for number in groups_of(spec)[dimension]]
    possible = {number: _possible(spec.groups[number], widths[number], step) for number in numbers}
    num_tried = 2 if CHANNELS in dimensions else 1
    for share in SHARES:
        tried = [
            sorted(possible[number], key=lambda width: (abs(width - share * widths[number]), -width))[:num_tried]
            for number in numbers
        ]
        for chosen in product(*tried):
            found = dict(zip(numbers, chosen, strict=True))
            yield tuple(found.get(number, width) for number, width in enumerate(widths))


def _possible(group: ChannelGroup, most: int, step: int) -> list[int]:
    """The widths of a group up to `most`."""
    if group.choices:
        return [choice for choice in group.choices if choice <= most]
    own = group.step(step)
    return [*range(own, most, own), most]


def members_of(part: Part, arm: Arm, task: Task) -> SubnetSet:
    """The sub-networks of an arm, from the cheapest: one for each budget, and the widest, which all
    arms have.

    The budgets are the MAdds of the widest sub-network with each of the ruler's widths. Names are
    the budgets as shares of the widest's MAdds; behind the name of their dimension where an arm has
    several of them.
    """
    if arm.of:
        return _joined(part, arm, task)
    regime = arm.regime_in(part.regime)
    whole = layout(part.family, task, part.options, regime.norm)
    if arm.is_plain:
        whole = replace(whole, spec=_with_sliced_stream(whole.spec))
    spec, widest = whole.spec, whole[whole.by_madds()[-1]].widths
    groups = groups_of(spec)

    def with_width(widths: tuple[int, ...], dimension: str, width: int) -> tuple[int, ...]:
        return tuple(width if number in groups[dimension] else own for number, own in enumerate(widths))

    def madds(widths: tuple[int, ...]) -> int:
        return subnet_cost(spec, Subnet("", widths), task.image_size).madds

    start = widest
    for dimension, width in arm.start.items():
        start = with_width(start, dimension, width)
    candidates = {widths: madds(widths) for widths in {start, *narrowed(spec, start, arm.dimensions, part.step)}}
    full = madds(widest)
    members = []
    for width in part.ruler_widths:
        budget = madds(with_width(widest, part.ruler, width))
        nearest = min(candidates, key=lambda widths: (abs(candidates[widths] - budget), widths))
        members.append(Subnet(f"{budget / full:.2f}", nearest))
    return SubnetSet(spec, (*members, Subnet("1", widest)), whole.teacher)


def _joined(part: Part, arm: Arm, task: Task) -> SubnetSet:
    """The sub-networks of several arms, and the widest one once."""
    sets = {name: members_of(part, arms_of(part.family)[name], task) for name in arm.of}
    first = sets[arm.of[0]]
    narrower = (
        Subnet(f"{name} {subnet.name}", subnet.widths)
        for name, subnets in sets.items()
        for subnet in subnets.members[:-1]
    )
    return replace(first, members=(*narrower, first.members[-1]))


def _with_sliced_stream(spec: SupernetSpec) -> SupernetSpec:
    """The specification of `PlainSlicedVit`: the last norm and the classifier read the channels
    that the last block writes."""
    last = groups_of(spec)[EMBED][-1]
    ops = tuple(
        replace(op, in_group=last, out_group=last if op.name == "norm" else op.out_group)
        if op.name in ("norm", "classifier")
        else op
        for op in spec.ops
    )
    return replace(spec, ops=ops)


class PlainSlicedVit(VitSupernet):
    """A `ds_vit` with plain slicing: behind the last gate the residual stream has only the channels
    that the blocks read and write, which the classifier reads too; the others are dropped.

    All blocks behind the gate have one width of the stream.
    """

    def _kept(self, subnet: Subnet) -> int:
        widths = {subnet.widths[number] for number in groups_of(self.spec)[EMBED]}
        assert len(widths) == 1, f"the blocks of {subnet.name} read different parts of the stream: {sorted(widths)}"
        return widths.pop()

    def own_head(
        self, features: Float[Tensor, "batch tokens channels"], subnet: Subnet
    ) -> Float[Tensor, "batch classes"]:
        """Run the blocks after the gate and the classifier on the first channels of the stream."""
        kept = self._kept(subnet)
        x = self._run(len(self.plan.gates), features[..., :kept], subnet)[:, 0]
        x = F.layer_norm(x, (kept,), self.norm.weight[:kept], self.norm.bias[:kept], self.norm.eps)
        return F.linear(x, self.classifier.weight[:, :kept], self.classifier.bias)

    @torch.no_grad()
    def cut_own_head(self, subnet: Subnet) -> nn.Module:
        """Plain modules from the last gate to the logits."""
        kept = self._kept(subnet)
        norm, classifier = nn.LayerNorm(kept, self.norm.eps), nn.Linear(kept, self.spec.num_classes)
        norm.weight.copy_(self.norm.weight[:kept])
        norm.bias.copy_(self.norm.bias[:kept])
        classifier.weight.copy_(self.classifier.weight[:, :kept])
        classifier.bias.copy_(self.classifier.bias)
        blocks = self._cut_blocks(len(self.plan.gates), subnet)
        return nn.Sequential(_FirstChannels(kept), blocks, PlainHead(norm, classifier))


class _FirstChannels(nn.Module):
    """The first channels of a stream."""

    def __init__(self, kept: int) -> None:
        super().__init__()
        self.kept = kept

    def forward(self, x: Float[Tensor, "batch tokens channels"]) -> Float[Tensor, "batch tokens kept"]:
        """[B, T, D] -> [B, T, kept]."""
        return x[..., : self.kept]


def build(part: Part, arm: Arm, task: Task, seed: int) -> Supernet:
    """The supernet of an arm with fresh weights; equal seeds give equal weights to all arms."""
    subnets, generator = members_of(part, arm, task), torch.Generator().manual_seed(seed)
    return PlainSlicedVit(subnets.spec, subnets, generator) if arm.is_plain else rebuild(subnets, generator)


@dataclass(frozen=True)
class Cell:
    """One cell to do: the training and test of an arm, or a measurement of times."""

    arm: str
    """Name of an arm, `TIMES` or `ACCELERATION`."""
    seed: int | None = None

    @property
    def name(self) -> str:
        """Name of the cell's files."""
        return self.arm if self.seed is None else f"{self.arm}-seed{self.seed}"


def cells_of(part: Part, seeds: Sequence[int], arms: Sequence[str] | None = None) -> list[Cell]:
    """The cells of a part: the times, then all arms with the first seed, then with the next, so
    that unfinished parts can already be compared.

    Args:
        part: the part.
        seeds: seeds of the trainings.
        arms: names of arms; None: all.
    """
    measured = [Cell(TIMES), *([Cell(ACCELERATION)] if part.dynamic is not None else [])]
    chosen = [name for name in arms_of(part.family) if arms is None or name in arms]
    return [*measured, *(Cell(name, seed) for seed in seeds for name in chosen)]


@dataclass(frozen=True, eq=False)
class CellRunner:
    """Does one cell of a part: a `Runner`."""

    part: Part
    material: Material
    device: torch.device

    def __call__(self, cell: Cell, folder: Path, should_stop: Callable[[], bool]) -> dict[str, Any] | None:
        """Do the cell, a training from its last checkpoint in `folder`; None if it was stopped.
        Tests and times are not interrupted."""
        facts: dict[str, Any] = {"arm": cell.arm, "seed": cell.seed, "device": device_name(self.device)}
        facts |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
        if cell.arm == TIMES:
            return facts | self._times()
        if cell.arm == ACCELERATION:
            return facts | self._acceleration()
        assert cell.seed is not None
        arm = arms_of(self.part.family)[cell.arm]
        supernet = build(self.part, arm, self.material.task, cell.seed)
        subnets, run = supernet.subnets, self.run_of(arm, cell.seed)
        cost = training_madds(run, subnets, len(self.material.training.labels), self.material.task.image_size)
        facts |= {"settings": run.to_json(), "training_madds": cost}
        callbacks = TrainingCallbacks(should_stop=should_stop)
        try:
            final = train_supernet(
                supernet, self.material.training, run, folder=folder, device=self.device, callbacks=callbacks
            )
        except NonFiniteLossError as error:
            return facts | {"error": str(error), "subnets": []}
        return None if final is None else facts | self._tested(arm, final) | speed(folder / "curves.jsonl")

    def run_of(self, arm: Arm, seed: int) -> SupernetRun:
        """Stage I's settings of a cell; within a part only regime and seed differ."""
        return SupernetRun(
            train=self.part.train,
            regime=arm.regime_in(self.part.regime),
            augmentation=self.material.training.augmentation,
            normalization=self.material.normalization,
            seed=seed,
            recalibration_images=self.part.recalibration_images,
            keep_checkpoints=1,
        )

    def _tested(self, arm: Arm, final: Path) -> dict[str, Any]:
        """Every sub-network with its answers to the images of `val` and `test`."""
        task, data = self.material.task, self.material.data
        supernet = build(self.part, arm, task, 0)
        supernet.load_state_dict(load_supernet(final)[0].state_dict())
        supernet = supernet.to(self.device).eval()
        tables = {
            split: build_routing_table(supernet, data, split, self.material.normalization) for split in ("val", "test")
        }
        rows = []
        for number, subnet in enumerate(supernet.subnets):
            cost = subnet_cost(supernet.spec, subnet, task.image_size)
            right = {split: table.correct1[:, number] for split, table in tables.items()}
            rows.append(
                {
                    "name": subnet.name,
                    "widths": list(subnet.widths),
                    "madds": cost.madds,
                    "params": cost.params,
                    "val": float(right["val"].mean()),
                    "top1": float(right["test"].mean()),
                    "right": packed(right["test"]),
                }
            )
        return {"subnets": rows, "num_test_images": data.num_images("test")}

    def _times(self) -> dict[str, Any]:
        """Milliseconds of all networks of all arms, interleaved; equal networks are timed once.
        Their weights are random."""
        from benchmarks.harness import sample_interleaved  # trainings have to work without rich

        task, part = self.material.task, self.part
        pool = torch.randn(
            TIMED_POOL, task.in_channels, *height_and_width(task.image_size), generator=torch.Generator().manual_seed(0)
        )
        networks: dict[str, Callable[[Tensor], object]] = {}
        timed_as: dict[str, str] = {}
        known: dict[tuple[bool, tuple[int, ...]], str] = {}
        for name, arm in arms_of(part.family).items():
            if arm.of:
                continue  # its networks are those of others
            supernet = build(part, arm, task, 0)
            subnets = supernet.subnets
            keys = [(arm.is_plain and subnet.name != "1", subnet.widths) for subnet in subnets]
            own = [f"{name} {subnet.name}" for subnet in subnets]
            if any(key not in known for key in keys):
                recalibrate(supernet, [pool])  # else activations shrink to denormals, which are slow
                supernet.eval()
                for key, cell, network in zip(keys, own, self._opened(supernet), strict=True):
                    if key not in known:
                        known[key], networks[cell] = cell, network
            timed_as |= {cell: known[key] for key, cell in zip(keys, own, strict=True)}
        batches = []
        for size in dict.fromkeys((part.timed_batch, ALSO_TIMED)):
            batch = _repeated(pool, size).to(self.device)
            calls = {name: partial(network, batch) for name, network in networks.items()}
            with torch.inference_mode():
                samples = sample_interleaved(calls, rounds=part.rounds, warmup=3, budget_s=BUDGET_S, device=self.device)
            batches.append({"batch_size": size, "samples_ms": {n: ms.tolist() for n, ms in samples.ms.items()}})
        return {"engine": self._engine, "timed_as": timed_as, "batches": batches}

    @property
    def _engine(self) -> str:
        """The engine in which networks are timed: that of the part on the CPU, else torch."""
        return self.part.engine if self.device.type == "cpu" else TORCH

    def _opened(self, supernet: Supernet) -> list[Callable[[Tensor], object]]:
        """Every member as a network of its own, ready to be called."""
        engine = timing_engine(self._engine)
        if engine is None:
            return [materialize(supernet, subnet, fold_bn=True).to(self.device).eval() for subnet in supernet.subnets]
        from dsnet.deploy.onnx_graphs import SegmentGraphs

        graphs = SegmentGraphs.of(supernet, (), supernet.spec.image_size)
        threads = torch.get_num_threads()
        return [open_model(graphs.static(number), engine, threads) for number in range(len(supernet.subnets))]

    def _acceleration(self) -> dict[str, Any]:
        """Times of dynamic inference with equal shares of the routes, beside the widest and the
        cheapest network, with random weights."""
        from benchmarks import dynamic_inference as dynamic
        from benchmarks.harness import Samples, sample_interleaved

        part = self.part
        assert part.dynamic is not None
        network = dynamic.Network("DS-ViT++", VIT, tuple(part.dynamic.items()), (0, 1, 2, 3))
        engine, threads = timing_engine(self._engine), torch.get_num_threads()

        def placed(supernet: Supernet, router: Router, image_size: int, equal: int | None) -> dynamic.Contenders:
            if engine is None:
                return dynamic.in_torch(supernet, router, image_size, equal)
            return dynamic.InEngine(supernet, router, engine, threads, image_size, equal)

        batches = []
        with torch.inference_mode():
            work = dynamic.synthetic(network, self.device.type, 0, placed)
            subnets = work.contenders.dynamic.subnets
            madds = [subnet_cost(subnets.spec, subnet, dynamic.IMAGE_SIZE).madds for subnet in subnets]
            for size in part.dynamic_batches:
                calls = work.contenders.calls(work.batches(size, 0))
                samples = sample_interleaved(calls, rounds=part.dynamic_rounds, warmup=3, device=self.device)
                summed: dict[str, NDArray[np.float64]] = {}
                for name, values in samples.ms.items():
                    contender = name.partition("/")[0]
                    summed[contender] = summed.get(contender, 0) + values
                both = Samples(summed)
                batches.append({"batch_size": size, "samples_ms": {n: ms.tolist() for n, ms in both.ms.items()}})
        grid = grid_of(subnets.spec)
        return {"engine": self._engine, "madds": madds, "tokens": grid[0] * grid[1] + 1, "batches": batches}


def _repeated(images: Tensor, number: int) -> Tensor:
    """So many images, repeated as often as needed."""
    return images.repeat(-(-number // len(images)), 1, 1, 1)[:number].contiguous()


def packed(right: NDArray[np.bool_]) -> str:
    """Right answers [n] as text, eight images a byte; see `unpacked`."""
    return np.packbits(right).tobytes().hex()


def unpacked(text: str, num_images: int) -> NDArray[np.bool_]:
    """The right answers [n] that `packed` has stored."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8), count=num_images).astype(bool)
