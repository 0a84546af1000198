"""MobileNetV1-style supernets with one gated stage: DS-MBNet and DS-Tiny.

DS-MBNet is the network of DS-Net (arXiv 2103.13258), with the layout of docs/methods.md, section 2;
`ds_tiny` is ours, for images of 8 to 32 pixels. With the option `kernels` the depthwise kernels
behind the gate are sliced too, as DS-Net++ (arXiv 2109.10060) proposes; the rules are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dsnet.families import Family, Task, register
from dsnet.families.options import (
    COMBINE,
    MAX_WIDTH,
    check_choice,
    check_number,
    is_integer,
    kernel_sizes,
    scaled_widths,
    with_kernels,
)
from dsnet.network.axes import Axes, Axis, prefixed
from dsnet.network.blocks import BlockShape, ConvNormSwish, PlainBlock, SeparableBlock, swish
from dsnet.network.layers import SlicedConv2d, SlicedLinear, make_norm, norm_axes
from dsnet.network.supernet import Supernet, TrunkOutput
from dsnet.space.spec import CLASSES, IMAGE, IMAGE_CHANNELS, ChannelGroup, GateSpec, Op, Subnet, SupernetSpec
from dsnet.space.subnet_set import SubnetSet

MBNET_ATTENTION = 0.25
"""Hidden channels of an attention, relative to the block's largest input (docs/methods.md, section
2)."""
TINY_ATTENTION = 1.0
"""The same for DS-Tiny: a quarter of its few channels would hold almost no information for the
gate."""
NESTED_NORMS = ("private_stats", "recalibrate")
"""Norms under which training normalises a channel of a batch in the same way in every
sub-network."""


@dataclass(frozen=True)
class Stage:
    """Consecutive blocks that write one channel group; the first has the stride."""

    num_blocks: int
    stride: int
    widths: tuple[int, ...]
    """(small, largest) before the gate; one width per route from the gated stage on."""


@dataclass(frozen=True)
class Plan:
    """Layout of a network, independent of the task."""

    family: str
    stem: Stage
    stages: tuple[Stage, ...]
    gated_stage: int
    attention: float
    """Hidden channels of an attention, relative to the block's largest input."""
    kernels: tuple[int, ...] = ()
    """Sizes in pixels, rising, of the depthwise kernels behind the gate; empty: 3, never sliced."""
    combine: str = "tied"
    """One of `COMBINE`: whether the size of a route's kernels follows from its widths."""


class SeparableSupernet(Supernet):
    """Supernet of a stem, stages of separable blocks, a global average pool and a classifier.

    The gate lies in the first block of the gated stage.
    """

    def __init__(self, spec: SupernetSpec, subnets: SubnetSet, generator: torch.Generator | None = None) -> None:
        super().__init__(spec, subnets)
        generator = generator if generator is not None else torch.Generator().manual_seed(0)
        widths = tuple(group.max_width for group in spec.groups)
        self.stem = SlicedConv2d(spec.in_channels, widths[0], 3, spec.layout["stem_stride"], generator)
        self.stem_norm = make_norm(spec.norm, widths[0], subnets.prefixes(0))
        self.blocks = nn.ModuleList(
            SeparableBlock(BlockShape(**shape), subnets, generator) for shape in spec.layout["blocks"]
        )
        self.classifier = SlicedLinear(widths[-1], spec.num_classes, generator)
        self.gated_block: int = spec.layout["gated_block"]
        self.dropout: float = spec.layout["dropout"]

    def own_upto_gate(self, gate: int, x: Float[Tensor, "batch channels height width"], subnet: Subnet) -> TrunkOutput:
        """Run the stem and the blocks up to the gated block's attention."""
        assert gate == 0, gate
        x = swish(self.stem_norm(self.stem(x, subnet.widths[0]), subnet.prefix(1)))
        for block in self.blocks[: self.gated_block]:
            x = block(x, subnet)
        return TrunkOutput(*self.blocks[self.gated_block].before_gate(x, subnet))  # type: ignore[operator]

    def own_head(
        self, features: Float[Tensor, "batch channels height width"], subnet: Subnet
    ) -> Float[Tensor, "batch classes"]:
        """Run the gated block's pointwise half, the remaining blocks and the classifier."""
        return self._finish(self._block(self.gated_block).after_gate(features, subnet), subnet, self.gated_block + 1)

    def start_own_heads(
        self, features: Float[Tensor, "batch channels height width"], subnets: Sequence[Subnet]
    ) -> Float[Tensor, "batch out_channels out_height out_width"] | None:
        """Run the gated block's pointwise half and the next block up to its attention, once for all
        sub-networks.

        All sub-networks read the same features here and their filters are prefixes of the widest's;
        the attention is the first layer that mixes channels again. (Ours; the gradients equal those
        of separate runs.)
        """
        number = self.gated_block
        is_nested = (
            self.training
            and self.spec.norm in NESTED_NORMS
            and all(block.shape.kernel_group is None for block in map(self._block, range(len(self.blocks))))
        )
        if not is_nested or len(subnets) < 2 or number + 1 == len(self.blocks):
            return None
        prefixes = [subnet.prefix(self._block(number).shape.out_group + 1) for subnet in subnets]
        return self._block(number + 1).before_attention_nested(
            self._block(number).after_gate_nested(features, prefixes), prefixes
        )

    def finish_head(
        self, start: Float[Tensor, "batch channels height width"], subnet: Subnet
    ) -> Float[Tensor, "batch classes"]:
        """Run one sub-network's head from the next block's attention on."""
        number = self.gated_block + 1
        block = self._block(number)
        attended, _ = block.attention(start[:, : subnet.widths[block.shape.in_group]])
        return self._finish(block.after_gate(attended, subnet), subnet, number + 1)

    def axes(self) -> Mapping[str, Axes]:
        """The axes of all tensors with channels."""
        stem, last = (Axis.of(((group, 1),), self.spec) for group in (0, len(self.spec.groups) - 1))
        axes: dict[str, Axes] = {"stem.weight": (stem,), **prefixed("stem_norm", norm_axes(self.stem_norm, stem))}
        for number in range(len(self.blocks)):
            axes |= prefixed(f"blocks.{number}", self._block(number).axes(self.spec))
        return {**axes, **prefixed("classifier", self.classifier.axes(last, self.spec))}

    def _finish(self, x: Tensor, subnet: Subnet, number: int) -> Tensor:
        """Run the blocks from `number` on, pooling, dropout (largest only) and classifier."""
        for block in self.blocks[number:]:
            x = block(x, subnet)
        x = x.mean((2, 3))
        if self.dropout and self.training and subnet == self.subnets.largest:
            x = F.dropout(x, self.dropout)
        return self.classifier(x)

    def _block(self, number: int) -> SeparableBlock:
        block = self.blocks[number]
        assert isinstance(block, SeparableBlock)
        return block

    def cut_own_upto_gate(self, gate: int, subnet: Subnet) -> nn.Module:
        """Plain modules from the image to the gate."""
        assert gate == 0, gate
        stem = ConvNormSwish(
            self.stem.cut(self.spec.in_channels, subnet.widths[0]), self.stem_norm.cut(subnet.prefix(1))
        )
        blocks = [self._cut_block(block, subnet) for block in self.blocks[: self.gated_block]]
        return _PlainTrunk(nn.Sequential(stem, *blocks), self.blocks[self.gated_block].cut_before(subnet))  # type: ignore[operator]

    def cut_own_head(self, subnet: Subnet) -> nn.Module:
        """Plain modules from the gate to the logits."""
        first = self.blocks[self.gated_block].cut_after(subnet)  # type: ignore[operator]
        blocks = [self._cut_block(block, subnet) for block in self.blocks[self.gated_block + 1 :]]
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), self.classifier.cut(subnet.widths[-1])]
        return nn.Sequential(first, *blocks, *head)

    @staticmethod
    def _cut_block(block: nn.Module, subnet: Subnet) -> PlainBlock:
        assert isinstance(block, SeparableBlock)
        return PlainBlock(block.cut_before(subnet), block.cut_after(subnet))


class _PlainTrunk(nn.Module):
    """Plain trunk: images -> TrunkOutput."""

    def __init__(self, body: nn.Module, gated: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.gated = gated

    def forward(self, images: Tensor) -> TrunkOutput:
        return TrunkOutput(*self.gated(self.body(images)))


def _layout(plan: Plan, task: Task, options: Mapping[str, Any]) -> SubnetSet:
    stem, stages, gated_stage = plan.stem, plan.stages, plan.gated_stage
    widest = [
        ChannelGroup("stem" if index == 0 else f"stage{index - 1}", max(stage.widths))
        for index, stage in enumerate((stem, *stages))
    ]
    # The kernel comes before all channels that depend on it, so that it is in their keys.
    kernel_group = gated_stage + 1 if plan.kernels else None
    groups = tuple(widest)
    if kernel_group is not None:
        kernel = ChannelGroup("kernel", max(plan.kernels), kind="kernel", choices=plan.kernels)
        groups = (*widest[:kernel_group], kernel, *widest[kernel_group:])
    place = {index: index + (kernel_group is not None and index >= kernel_group) for index in range(len(widest))}
    hidden = 0
    gated_block = 0
    ops = [Op("stem", "conv", IMAGE, IMAGE_CHANNELS, 0, kernel=3, stride=stem.stride, has_norm=True)]
    blocks: list[dict[str, int]] = []
    for index, stage in enumerate(stages):
        for number in range(stage.num_blocks):
            source = place[index if number == 0 else index + 1]
            block = {
                "in_group": source,
                "out_group": place[index + 1],
                "stride": stage.stride if number == 0 else 1,
                "hidden": int(plan.attention * groups[source].max_width),
            }
            is_gated = index == gated_stage and number == 0
            if is_gated:
                hidden, gated_block = block["hidden"], len(blocks)
            if kernel_group is not None:
                is_behind = index >= gated_stage and not is_gated
                block |= {"kernel_group": kernel_group} if is_behind else {"kernel": min(plan.kernels)}
            blocks.append(block)
    for number, block in enumerate(blocks):
        ops.extend(_block_ops(number, BlockShape(**block), ops[-1].name, gated_block))
    last = len(groups) - 1
    ops.append(Op("pool", "pool", ops[-1].name, last, last, segment=1))
    ops.append(Op("classifier", "linear", "pool", last, CLASSES, segment=1))
    spec = SupernetSpec(
        family=plan.family,
        num_classes=task.num_classes,
        in_channels=task.in_channels,
        image_size=task.image_size,
        groups=groups,
        ops=tuple(ops),
        gates=(GateSpec("gate0", f"blocks.{gated_block}.attention", hidden, gated_stage + 1),),
        layout={
            "stem_stride": stem.stride,
            "blocks": blocks,
            "gated_block": gated_block,
            "dropout": float(options["dropout"]),
        },
    )
    return _subnets(spec, plan)


def _block_ops(number: int, shape: BlockShape, reads: str, gated_block: int) -> list[Op]:
    name = f"blocks.{number}"
    before, after = int(number > gated_block), int(number >= gated_block)
    source, target = shape.in_group, shape.out_group
    depthwise, attention, pointwise = f"{name}.depthwise", f"{name}.attention", f"{name}.pointwise"
    return [
        Op(
            depthwise,
            "depthwise",
            reads,
            source,
            source,
            kernel=shape.kernel,
            stride=shape.stride,
            has_norm=True,
            segment=before,
            kernel_group=shape.kernel_group,
        ),
        Op(attention, "attention", depthwise, source, source, hidden=shape.hidden, segment=before),
        Op(pointwise, "conv", attention, source, target, has_norm=True, segment=after),
    ]


def _subnets(spec: SupernetSpec, plan: Plan) -> SubnetSet:
    """The sub-networks of a network.

    Route k has the small width before the gate and width k after it, and a size of its kernels; the
    teacher has the largest width and kernels everywhere.
    """
    stages, gated_stage = (plan.stem, *plan.stages), plan.gated_stage
    num_routes = len(stages[gated_stage + 1].widths)
    members = []
    for k, kernel in with_kernels(num_routes, plan.kernels, plan.combine):
        widths = [stage.widths[0] if index <= gated_stage else stage.widths[k] for index, stage in enumerate(stages)]
        name = f"subnet-{k:02d}"
        if kernel is not None:
            widths.insert(gated_stage + 1, kernel)
            name += f"-k{kernel}" if plan.combine == "all" else ""
        members.append(Subnet(name, tuple(widths)))
    teacher = Subnet("largest", spec.max_widths)
    return SubnetSet(spec, tuple(members), teacher if teacher.widths != members[-1].widths else None)


def _scaled(widths: Sequence[int], factor: float) -> tuple[int, ...]:
    return scaled_widths(widths, factor, "use a larger width or fewer routes")


def _spread(low: int, high: int, count: int) -> tuple[int, ...]:
    """`count` widths from low to high, evenly spaced, multiples of 4."""
    if count == 1:
        return (high,)
    return tuple(round((low + (high - low) * k / (count - 1)) / 4) * 4 for k in range(count))


def _check(options: Mapping[str, Any], max_routes: int) -> None:
    check_number("width", options["width"], 0.1, 8)
    check_choice("stem_stride", options["stem_stride"], (1, 2))
    routes = options["num_routes"]
    if not is_integer(routes, 2, max_routes):
        raise ValueError(f"num_routes is {routes!r}, but must be an integer in 2..{max_routes}")
    dropout = options["dropout"]
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout!r}, but must lie in [0, 1)")


def _gated(options: Mapping[str, Any], defaults: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """The widths of each stage from the gated one on: `gated_widths` unscaled, or the scaled
    defaults.

    Raises:
        ValueError: `gated_widths` is not a list of equally long, rising lists of widths, one for
            each of these stages.
    """
    given = options["gated_widths"]
    if given is None:
        return [_scaled(widths, options["width"]) for widths in defaults]
    if not isinstance(given, (list, tuple)) or len(given) != len(defaults):
        raise ValueError(
            f"gated_widths is {given!r}, but must hold {len(defaults)} lists of widths, one per gated stage"
        )
    for widths in given:
        if not isinstance(widths, (list, tuple)) or not all(is_integer(width, 1, MAX_WIDTH) for width in widths):
            raise ValueError(f"gated_widths holds {widths!r}, but must hold lists of integers in 1..{MAX_WIDTH}")
        if len(widths) < 2 or len(widths) != len(given[0]) or any(b <= a for a, b in pairwise(widths)):
            raise ValueError(
                f"gated_widths holds {widths!r}, but each list must rise and all must have one length of 2 or more routes"
            )
    return [tuple(widths) for widths in given]


def _ds_mbnet(task: Task, options: Mapping[str, Any]) -> SubnetSet:
    _check(options, max_routes=14)
    width, routes = options["width"], options["num_routes"]
    # Fewer routes keep the extremes and the even spacing of the published fourteen.
    picks = [round(k * 13 / (routes - 1)) for k in range(routes)]
    third, fourth = _gated(options, ([224 + 32 * k for k in picks], [736 + 32 * k for k in picks]))
    stages = [
        Stage(1, 1, _scaled((32, 88), width)),
        Stage(2, 2, _scaled((48, 168), width)),
        Stage(2, 2, _scaled((96, 264), width)),
        Stage(6, 2, third),
        Stage(2, 2, fourth),
    ]
    stem = Stage(1, options["stem_stride"], _scaled((16, 24), width))
    kernels = kernel_sizes(task.image_size, options)
    plan = Plan("ds_mbnet", stem, tuple(stages), 3, MBNET_ATTENTION, kernels, options["combine"])
    return _layout(plan, task, options)


def _ds_tiny(task: Task, options: Mapping[str, Any]) -> SubnetSet:
    _check(options, max_routes=12)
    width, routes = options["width"], options["num_routes"]
    first, second = _gated(options, (_spread(8, 96, routes), _spread(16, 192, routes)))
    stages = [Stage(1, 1, _scaled((16, 24), width)), Stage(2, 2, first), Stage(1, 2, second)]
    stem = Stage(1, options["stem_stride"], _scaled((8, 12), width))
    kernels = kernel_sizes(task.image_size, options)
    plan = Plan("ds_tiny", stem, tuple(stages), 1, TINY_ATTENTION, kernels, options["combine"])
    return _layout(plan, task, options)


SHARED_OPTIONS: Mapping[str, Any] = {"width": 1.0, "gated_widths": None, "kernels": None, "combine": COMBINE[0]}
"""Options with equal defaults in both families."""
register(
    Family(
        "ds_mbnet",
        {**SHARED_OPTIONS, "stem_stride": 2, "num_routes": 14, "dropout": 0.2},
        _ds_mbnet,
        SeparableSupernet,
    )
)
register(
    Family(
        "ds_tiny",
        {**SHARED_OPTIONS, "stem_stride": 1, "num_routes": 6, "dropout": 0.0},
        _ds_tiny,
        SeparableSupernet,
    )
)
