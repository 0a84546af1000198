"""Residual supernets with one gate per stage: DS-ResNet (docs/methods.md, section 2).

From the publication: bottleneck stages, slimming ratios {0.25, 0.5, 0.75, 1} chosen stage by stage,
a gate in the first block of each stage, a BatchNorm bank or GroupNorm, and a residual attention x *
(1 + tanh(a)) that is initially the identity. The rest is ours: the stem has one width, the
attention acts on the stage's input stream, and the last scale of a block is initialised to one (a
zero would leave the branches without gradient in the first step, and the attention is the identity
already). Without attention and needless projections (two options) the full network is the
well-known ResNet.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise, product
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dsnet.families import Family, Task, register
from dsnet.families.options import check_choice, check_number, is_integer, scaled_widths
from dsnet.network.axes import Axes, Axis, prefixed
from dsnet.network.blocks import ConvShape, ResidualBlock, ResidualShape, SlicedConvNorm
from dsnet.network.layers import SlicedAttention, SlicedLinear
from dsnet.network.supernet import PlainPooled, Supernet, TrunkOutput
from dsnet.space.spec import CLASSES, IMAGE, IMAGE_CHANNELS, ChannelGroup, GateSpec, Op, Subnet, SupernetSpec, Window
from dsnet.space.subnet_set import SubnetSet

ATTENTION = 0.25
"""Hidden channels of a stage's attention, relative to the widest stream that it reads."""
MIN_HIDDEN = 8
"""Fewest hidden channels of an attention (ours): a gate reads the hidden vector, and fewer hold
almost no information."""
EXPANSION = 4
"""Channels of a bottleneck's residual stream per inner channel."""
MAX_DEPTH = 200
MAX_PATHS = 1024
"""Largest number of paths: each of them is evaluated, tabled and timed."""
STEMS = ("small", "large")
STREAMS = ("tied", "padded")
PROJECTIONS = ("always", "needed")


@dataclass(frozen=True)
class Plan:
    """The stages of a network of one depth."""

    num_blocks: tuple[int, ...]
    """Blocks of each stage; each stage after the first halves the resolution and doubles the
    channels."""
    first_width: int
    """Channels of the stem and, inside the blocks, of the first stage."""
    is_bottleneck: bool = False

    @property
    def num_stages(self) -> int:
        """Number of stages, which is also the number of gates."""
        return len(self.num_blocks)


_PLANS: Mapping[int, Plan] = {
    18: Plan((2, 2, 2, 2), 64),
    34: Plan((3, 4, 6, 3), 64),
    50: Plan((3, 4, 6, 3), 64, is_bottleneck=True),
}


class ResidualStage(nn.Module):
    """The blocks whose width a gate decides, and before them the attention whose hidden vector this
    gate reads.

    A stage may have no attention. Its gate then reads the means of the channels.
    """

    def __init__(self, stage: Mapping[str, Any], subnets: SubnetSet, generator: torch.Generator) -> None:
        super().__init__()
        shapes = [_shape(block) for block in stage["blocks"]]
        self.in_groups = shapes[0].in_groups
        widest = max(subnets.spec.groups[group].max_width for group in self.in_groups)
        self.hidden: int = stage["hidden"]
        self.attention = (
            SlicedAttention(widest, self.hidden, generator, is_residual=True) if _has_attention(stage) else None
        )
        self.blocks = nn.ModuleList(ResidualBlock(shape, subnets, generator) for shape in shapes)

    def at_gate(self, x: Float[Tensor, "batch channels height width"]) -> TrunkOutput:
        """The output at the stage's gate for the stream [B, c, H, W] before it."""
        if self.attention is None:
            return TrunkOutput.pooled(x, self.hidden)
        attended, hidden = self.attention(x)
        return TrunkOutput(attended, x, hidden)

    def forward(
        self, x: Float[Tensor, "batch channels height width"], subnet: Subnet
    ) -> Float[Tensor, "batch out_channels out_height out_width"]:
        """Run all blocks on the stream after attention: [B, c, H, W] -> [B, c', H', W']."""
        for block in self.blocks:
            x = block(x, subnet)
        return x

    def cut(self, subnet: Subnet) -> nn.Sequential:
        """The blocks of one sub-network as plain modules."""
        return nn.Sequential(*(block.cut(subnet) for block in self.blocks))  # type: ignore[operator]

    def cut_at_gate(self, body: nn.Module, subnet: Subnet) -> nn.Module:
        """The segment of one sub-network that ends at the gate, as a plain module; `body` is
        everything before the attention."""
        if self.attention is None:
            return PlainPooled(body, self.hidden)
        return _PlainSegment(body, self.attention.cut(max(subnet.widths[group] for group in self.in_groups)))


class ResidualSupernet(Supernet):
    """Stem, residual stages with a gate before each, global average pool, classifier."""

    ignores_zero_channels = True
    """A stage reads its input by an attention and convolutions alone."""

    def __init__(self, spec: SupernetSpec, subnets: SubnetSet, generator: torch.Generator | None = None) -> None:
        super().__init__(spec, subnets)
        generator = generator if generator is not None else torch.Generator().manual_seed(0)
        self.stem = SlicedConvNorm(_stem_shape(spec.layout["stem"]), subnets, generator)
        self.pool = nn.MaxPool2d(3, 2, 1) if spec.layout["stem"] == "large" else nn.Identity()
        self.stages = nn.ModuleList(ResidualStage(stage, subnets, generator) for stage in spec.layout["stages"])
        self.out_groups = _shape(spec.layout["stages"][-1]["blocks"][-1]).stream
        widest = max(spec.groups[group].max_width for group in self.out_groups)
        self.classifier = SlicedLinear(widest, spec.num_classes, generator)

    def own_upto_gate(self, gate: int, x: Float[Tensor, "batch channels height width"], subnet: Subnet) -> TrunkOutput:
        """Run the stem (gate 0) or the previous stage, and the attention of the gate's stage."""
        x = self.pool(F.relu(self.stem(x, subnet))) if gate == 0 else self.stages[gate - 1](x, subnet)
        return self.stages[gate].at_gate(x)  # type: ignore[operator]

    def own_head(
        self, features: Float[Tensor, "batch channels height width"], subnet: Subnet
    ) -> Float[Tensor, "batch classes"]:
        """Run the last stage's blocks and the classifier."""
        return self.classifier(self.stages[-1](features, subnet).mean((2, 3)))

    def cut_own_upto_gate(self, gate: int, subnet: Subnet) -> nn.Module:
        """Plain modules up to the gate's attention."""
        body = (
            nn.Sequential(self.stem.cut(subnet), nn.ReLU(), copy.deepcopy(self.pool))
            if gate == 0
            else self.stages[gate - 1].cut(subnet)  # type: ignore[operator]
        )
        return self.stages[gate].cut_at_gate(body, subnet)  # type: ignore[operator]

    def cut_own_head(self, subnet: Subnet) -> nn.Module:
        """Plain modules from the last gate to the logits."""
        width = max(subnet.widths[group] for group in self.out_groups)
        blocks = self.stages[-1].cut(subnet)  # type: ignore[operator]
        return nn.Sequential(blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), self.classifier.cut(width))

    def axes(self) -> Mapping[str, Axes]:
        """The axes of all tensors with channels."""
        axes: dict[str, Axes] = {}
        for name, part in self.named_modules():
            if isinstance(part, SlicedConvNorm):
                axes |= prefixed(name, part.axes(self.spec))
            elif isinstance(part, ResidualStage) and part.attention is not None:
                axes |= prefixed(f"{name}.attention", part.attention.axes(Axis.stream(part.in_groups, self.spec)))
        return {
            **axes,
            **prefixed("classifier", self.classifier.axes(Axis.stream(self.out_groups, self.spec), self.spec)),
        }


class _PlainSegment(nn.Module):
    """Plain segment up to a gate: images or features -> TrunkOutput."""

    def __init__(self, body: nn.Module, attention: SlicedAttention) -> None:
        super().__init__()
        self.body = body
        self.attention = attention

    def forward(self, x: Tensor) -> TrunkOutput:
        x = self.body(x)
        attended, hidden = self.attention(x)
        return TrunkOutput(attended, x, hidden)


def _has_attention(stage: Mapping[str, Any]) -> bool:
    """Whether a stage of a layout has an attention."""
    return bool(stage.get("attention", True))


def _shape(block: Mapping[str, Any]) -> ResidualShape:
    return ResidualShape(**{**block, "in_groups": tuple(block["in_groups"])})


def _stem_shape(stem: str) -> ConvShape:
    return ConvShape((), 0, 7, 2) if stem == "large" else ConvShape((), 0, 3, 1)


class _Builder:
    """Builds a plan's layout stage by stage: channel groups, widths, blocks, gates."""

    def __init__(self, plan: Plan, options: Mapping[str, Any]) -> None:
        self.plan = plan
        self.ratios: Sequence[float] = options["ratios"]
        self.factor: float = options["width"]
        self.is_padded = options["streams"] == "padded"
        self.always_projects = options["projection"] == "always"
        self.has_attention: bool = options["attention"]
        self.groups: list[ChannelGroup] = []
        self.stage_of_group: list[int | None] = []
        self.widths: list[tuple[int, ...]] = []
        """The widths of each group, one per ratio."""
        self.stages: list[dict[str, Any]] = []
        self.gates: list[GateSpec] = []
        (stem,) = scaled_widths([plan.first_width], self.factor, "")
        self._add_group("stem", None, stem, (stem,) * len(self.ratios))
        self.stream: tuple[int, ...] = (0,)
        for number in range(plan.num_stages):
            self._add_stage(number)

    def _add_group(self, name: str, stage: int | None, full: int, widths: tuple[int, ...]) -> int:
        self.groups.append(ChannelGroup(name, full))
        self.stage_of_group.append(stage)
        self.widths.append(widths)
        return len(self.groups) - 1

    def _add_slimmed(self, name: str, stage: int, channels: int) -> int:
        widths = scaled_widths(
            [channels * ratio for ratio in self.ratios], self.factor, "use a larger width or fewer ratios"
        )
        (full,) = scaled_widths([channels], self.factor, "")
        return self._add_group(name, stage, full, widths)

    def _add_stage(self, number: int) -> None:
        hidden = self._widest_stream()
        if self.has_attention:
            hidden = max(MIN_HIDDEN, int(ATTENTION * hidden))
        evidence = _evidence_name(number, has_attention=self.has_attention)
        self.gates.append(GateSpec(f"gate{number}", evidence, hidden, len(self.groups)))
        blocks: list[dict[str, Any]] = []
        inner, out = 0, 0
        for index in range(self.plan.num_blocks[number]):
            if index == 0 or self.is_padded:
                inner, out = self._block_groups(
                    number, f"stage{number}.block{index}" if self.is_padded else f"stage{number}"
                )
            stride = 2 if index == 0 and number > 0 else 1
            is_needed = stride > 1 or self._widest_stream() != self.groups[out].max_width
            projects = index == 0 and (self.always_projects or is_needed)
            shape = ResidualShape(self.stream, inner, out, stride, self.plan.is_bottleneck, projects=projects)
            blocks.append({**asdict(shape), "in_groups": list(shape.in_groups)})
            self.stream = shape.stream
        further = {} if self.has_attention else {"attention": False}
        self.stages.append({"hidden": hidden, "blocks": blocks, **further})

    def _widest_stream(self) -> int:
        """Channels of the residual stream so far, in the full network."""
        return max(self.groups[group].max_width for group in self.stream)

    def _block_groups(self, stage: int, name: str) -> tuple[int, int]:
        """The groups of a block's inner and outer channels; one group if basic and tied."""
        channels = self.plan.first_width * 2**stage
        if not self.is_padded and not self.plan.is_bottleneck:
            group = self._add_slimmed(name, stage, channels)
            return group, group
        inner = self._add_slimmed(f"{name}.inner", stage, channels)
        expansion = EXPANSION if self.plan.is_bottleneck else 1
        return inner, self._add_slimmed(f"{name}.stream", stage, channels * expansion)

    def subnet(self, path: Sequence[int]) -> Subnet:
        """The sub-network with one ratio index per stage."""
        widths = (
            by_ratio[0 if stage is None else path[stage]]
            for by_ratio, stage in zip(self.widths, self.stage_of_group, strict=True)
        )
        return Subnet("path-" + "".join(map(str, path)), tuple(widths))


def _ops(stem: str, stages: Sequence[Mapping[str, Any]]) -> tuple[Op, ...]:
    ops = [_conv_op("stem", IMAGE, _stem_shape(stem), 0)]
    if stem == "large":
        ops.append(Op("pool", "maxpool", "stem", 0, 0, kernel=3, stride=2))
    reads = ops[-1].name
    for number, stage in enumerate(stages):
        shapes = [_shape(block) for block in stage["blocks"]]
        ops.append(_evidence_op(number, stage, shapes[0].in_groups, reads))
        if _has_attention(stage):
            reads = ops[-1].name
        for index, shape in enumerate(shapes):
            ops.extend(_block_ops(f"stages.{number}.blocks.{index}", shape, reads, number + 1))
            reads = ops[-1].name
    first, *others = shapes[-1].stream
    last = len(stages)
    ops.append(Op("average", "pool", reads, first, first, segment=last, in_union=tuple(others)))
    ops.append(Op("classifier", "linear", "average", first, CLASSES, segment=last, in_union=tuple(others)))
    return tuple(ops)


def _evidence_name(stage: int, *, has_attention: bool) -> str:
    """The name of the operation that makes the evidence of a stage's gate."""
    return f"stages.{stage}.{'attention' if has_attention else 'gate'}"


def _evidence_op(number: int, stage: Mapping[str, Any], stream: Sequence[int], reads: str) -> Op:
    """The operation that makes the evidence of a stage's gate: the attention, or the means of the
    channels."""
    first, *others = stream
    further: dict[str, Any] = {"segment": number, "in_union": tuple(others)}
    has_attention = _has_attention(stage)
    name = _evidence_name(number, has_attention=has_attention)
    if has_attention:
        return Op(name, "attention", reads, first, first, hidden=stage["hidden"], **further)
    return Op(name, "pool", reads, first, first, window=Window((1, 1), output=(1, 1)), **further)


def _block_ops(name: str, shape: ResidualShape, reads: str, segment: int) -> list[Op]:
    """The costed operations of a residual block.

    The shortcut's convolution comes first, so that the op after the block reads the end of its
    branch.
    """
    ops = [_conv_op(f"{name}.projection", reads, shape.projection, segment)] if shape.projects else []
    for index, conv in enumerate(shape.convs):
        ops.append(_conv_op(f"{name}.convs.{index}", reads, conv, segment))
        reads = ops[-1].name
    return ops


def _conv_op(name: str, reads: str, conv: ConvShape, segment: int) -> Op:
    first, *others = conv.in_groups or (IMAGE_CHANNELS,)
    return Op(
        name,
        "conv",
        reads,
        first,
        conv.out_group,
        kernel=conv.kernel,
        stride=conv.stride,
        has_norm=True,
        segment=segment,
        in_union=tuple(others),
    )


def _plan(depth: Any) -> Plan:
    """The plan of a depth: 18, 34 or 50 as for ImageNet, or 6 n + 2 for three stages of n basic
    blocks.

    Raises:
        ValueError: no plan has this depth.
    """
    if is_integer(depth, 8, MAX_DEPTH):
        if depth in _PLANS:
            return _PLANS[depth]
        if depth % 6 == 2:
            return Plan(((depth - 2) // 6,) * 3, 16)
    raise ValueError(
        f"depth is {depth!r}, but must be one of {', '.join(map(str, _PLANS))} or 6 n + 2 up to {MAX_DEPTH} (8, 14, 20, 26, ...)"
    )


def _check_ratios(ratios: Any) -> None:
    is_fine = isinstance(ratios, (list, tuple)) and 2 <= len(ratios) <= 10
    for ratio in ratios if is_fine else ():
        is_fine = is_fine and not isinstance(ratio, bool) and isinstance(ratio, (int, float)) and 0 < ratio <= 1
    if not is_fine or any(right <= left for left, right in pairwise(ratios)):
        raise ValueError(f"ratios is {ratios!r}, but must be 2 to 10 rising numbers in (0, 1]")


def _paths(paths: Any, num_stages: int, num_ratios: int) -> list[tuple[int, ...]]:
    """The paths of the members: for each, one index into the ratios per stage.

    Raises:
        ValueError: `paths` is neither a known name nor a valid list of paths, or there are too
            many.
    """
    if paths == "uniform":
        return [(index,) * num_stages for index in range(num_ratios)]
    if paths == "all":
        if num_ratios**num_stages > MAX_PATHS:
            raise ValueError(
                f"paths is 'all', which with {num_ratios} ratios in {num_stages} stages makes {num_ratios**num_stages} sub-networks; "
                f"at most {MAX_PATHS} are possible: use fewer ratios, 'uniform' or a list of paths"
            )
        return list(product(range(num_ratios), repeat=num_stages))
    if not isinstance(paths, (list, tuple)) or not 2 <= len(paths) <= MAX_PATHS:
        raise ValueError(f"paths is {paths!r}, but must be 'all', 'uniform' or a list of 2 to {MAX_PATHS} paths")
    for path in paths:
        is_path = isinstance(path, (list, tuple)) and len(path) == num_stages
        if not is_path or not all(is_integer(index, 0, num_ratios - 1) for index in path):
            raise ValueError(
                f"paths holds {path!r}, but each path must be a list of {num_stages} indices of ratios in 0..{num_ratios - 1}"
            )
    chosen = [tuple(path) for path in paths]
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"paths names a path twice: {paths!r}")
    return chosen


def _ds_resnet(task: Task, options: Mapping[str, Any]) -> SubnetSet:
    plan = _plan(options["depth"])
    check_number("width", options["width"], 0.1, 8)
    check_choice("stem", options["stem"], STEMS)
    check_choice("streams", options["streams"], STREAMS)
    check_choice("projection", options["projection"], PROJECTIONS)
    if not isinstance(options["attention"], bool):
        raise ValueError(f"attention is {options['attention']!r}, but must be true or false")
    _check_ratios(options["ratios"])
    paths = _paths(options["paths"], plan.num_stages, len(options["ratios"]))
    builder = _Builder(plan, options)
    spec = SupernetSpec(
        family="ds_resnet",
        num_classes=task.num_classes,
        in_channels=task.in_channels,
        image_size=task.image_size,
        groups=tuple(builder.groups),
        ops=_ops(options["stem"], builder.stages),
        gates=tuple(builder.gates),
        layout={"stem": options["stem"], "stages": builder.stages},
        # A BatchNorm bank would hold statistics for every prefix of every path
        # (docs/definitions.md, SubnetSet).
        norm="group_norm" if options["paths"] == "all" else "private_stats",
    )
    members = tuple(builder.subnet(path) for path in paths)
    largest = Subnet("largest", tuple(group.max_width for group in spec.groups))
    has_largest = any(subnet.widths == largest.widths for subnet in members)
    return SubnetSet(spec, members, None if has_largest else largest)


register(
    Family(
        "ds_resnet",
        {
            "depth": 20,
            "width": 1.0,
            "ratios": [0.25, 0.5, 0.75, 1.0],
            "paths": "uniform",
            "stem": "small",
            "streams": "tied",
            "projection": "always",
            "attention": True,
        },
        _ds_resnet,
        ResidualSupernet,
        naming="The digits of a name such as path-013 tell, stage by stage, which of the stage's width ratios it has: 0 is the narrowest.",
    )
)
