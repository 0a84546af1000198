"""Vision transformer supernets: DS-ViT++ (docs/methods.md, section 10).

Published are the dimensions that are sliced (embedding, heads, hidden channels of the perceptron),
the names *dynamic idle slicing* and *nested residual learning*, and that DeiT is the network. The
rules are ours: the stream keeps its channels and a block reads and writes a prefix of them; the
last blocks can be left out; a gate stands between two blocks and reads the class token and the mean
of all tokens; heads and hidden channels of pretrained weights are sorted by importance.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn.utils import skip_init

from dsnet.errors import ConfigError
from dsnet.families import Family, Task, register
from dsnet.families.options import check_choice, check_number, is_integer
from dsnet.image_size import height_and_width
from dsnet.network.axes import Axes, Axis, prefixed
from dsnet.network.supernet import PlainState, Supernet, TrunkOutput
from dsnet.network.transformer import (
    PlainBlocks,
    PlainEmbedding,
    PlainHead,
    TokenGate,
    TransformerBlock,
    embedded,
    plain_linear,
    plain_norm,
    run_blocks,
)
from dsnet.network.vit_weights import (
    POSITIONS,
    check_one_class_token,
    resized_positions,
    sorted_by_importance,
    square_grid,
    with_own_names,
)
from dsnet.space.spec import (
    CLASSES,
    IMAGE,
    IMAGE_CHANNELS,
    ChannelGroup,
    GateSpec,
    Op,
    Pair,
    Subnet,
    SupernetSpec,
    Window,
)
from dsnet.space.subnet_set import SubnetSet

FAMILY = "ds_vit"
STREAM = 0
"""The channel group of the residual stream."""
HIDDEN = 0.25
"""Hidden channels of a gate's attention, relative to the stream."""
MIN_HIDDEN = 8
"""Fewest hidden channels of a gate's attention."""
SLICES = ("embed", "heads", "mlp", "depth")
"""The dimensions in which sub-networks can differ."""
PATCHES = (16, 8, 4, 2)
"""Sizes of patches that are taken without being written."""
FEW_PATCHES = 7
"""A patch that is not written leaves at least as many rows and columns, if one of `PATCHES`
does."""
PATHS = ("uniform", "all")
MAX_PATHS = 1024
"""Largest number of paths: each of them is evaluated, tabled and timed."""
CLASS_STD = 0.02
"""Standard deviation of the class token at the start, as in DeiT."""
POSITION_STD = 0.5**0.5
"""Standard deviation of the positions at the start (ours): that of sines and cosines. With the 0.02
of DeiT, small networks take many steps until they tell one patch from another."""


@dataclass(frozen=True)
class Plan:
    """The parts of a network, and the numbers of their channel groups."""

    patch: int
    """Height and width of a patch in pixels."""
    head_channels: int
    depth: int
    """Number of blocks."""
    gates: tuple[int, ...]
    """For each gate the number of blocks before it, rising."""

    @classmethod
    def of(cls, spec: SupernetSpec) -> Plan:
        """The plan of a network."""
        own = spec.layout
        return cls(own["patch"], own["head_channels"], own["depth"], tuple(own["gates"]))

    @property
    def depth_group(self) -> int:
        """The group whose width is the number of blocks after the last gate that run."""
        return 1 + 3 * self.gates[-1]

    def groups(self, block: int) -> tuple[int, int, int]:
        """The groups of a block: its part of the stream, its heads and its hidden channels."""
        first = 1 + 3 * block + (block >= self.gates[-1])
        return first, first + 1, first + 2

    def segment(self, block: int) -> int:
        """The segment that a block belongs to, which is the number of gates before it."""
        return sum(gate <= block for gate in self.gates)

    def blocks(self, segment: int) -> range:
        """The blocks of a segment."""
        bounds = (0, *self.gates, self.depth)
        return range(bounds[segment], bounds[segment + 1])


class VitSupernet(Supernet):
    """Patches as tokens, blocks of self-attention with gates between them, and a classifier on the
    class token."""

    UNDECAYED = ("cls_token", POSITIONS)

    def __init__(self, spec: SupernetSpec, subnets: SubnetSet, generator: torch.Generator | None = None) -> None:
        super().__init__(spec, subnets)
        draw = generator if generator is not None else torch.Generator().manual_seed(0)
        self.plan = plan = Plan.of(spec)
        channels = spec.max_widths[STREAM]
        self._stream = Axis.of(((STREAM, 1),), spec)
        patches = skip_init(nn.Conv2d, spec.in_channels, channels, plan.patch, plan.patch)
        nn.init.normal_(patches.weight, std=(spec.in_channels * plan.patch**2) ** -0.5, generator=draw)
        nn.init.zeros_(patches.bias)
        self.patch_embed = nn.ModuleDict({"proj": patches})
        rows, columns = grid_of(spec)
        self.cls_token = nn.Parameter(torch.empty(1, 1, channels))
        self.pos_embed = nn.Parameter(torch.empty(1, rows * columns + 1, channels))
        nn.init.normal_(self.cls_token, std=CLASS_STD, generator=draw)
        nn.init.normal_(self.pos_embed, std=POSITION_STD, generator=draw)
        built = plan.gates[-1] + spec.max_widths[plan.depth_group]  # no member runs the others
        self.blocks = nn.ModuleList(self._block(block, draw) for block in range(built))
        self.gates = nn.ModuleList(TokenGate(channels, _hidden(channels), draw) for _ in plan.gates)
        self.norm = plain_norm(channels)
        self.classifier = plain_linear(channels, spec.num_classes)
        nn.init.normal_(self.classifier.weight, std=0.01, generator=draw)

    def _block(self, block: int, generator: torch.Generator) -> TransformerBlock:
        embed, heads, mlp = self.plan.groups(block)
        return TransformerBlock(
            Axis.slice_of(STREAM, embed, self.spec),
            Axis.of(((heads, self.plan.head_channels),), self.spec),
            Axis.of(((mlp, 1),), self.spec),
            generator,
        )

    def _runs(self, segment: int, subnet: Subnet) -> range:
        """The blocks of a segment that a sub-network runs."""
        blocks = self.plan.blocks(segment)
        is_last = segment == len(self.plan.gates)
        return blocks[: subnet.widths[self.plan.depth_group]] if is_last else blocks

    def _embed_widths(self, blocks: Sequence[int], subnet: Subnet) -> list[int]:
        """For each block its part of the stream."""
        return [subnet.widths[self.plan.groups(block)[0]] for block in blocks]

    def _run(self, segment: int, x: Tensor, subnet: Subnet) -> Tensor:
        """Run the blocks of a segment, and for the first one before them the embedding."""
        if segment == 0:
            self._check_size(x)
            x = embedded(x, self.patch_embed["proj"], self.cls_token, self.pos_embed)
        blocks = self._runs(segment, subnet)
        own = [partial(self.blocks[block], widths=subnet.widths) for block in blocks]
        return run_blocks(x, list(zip(self._embed_widths(blocks, subnet), own, strict=True)))

    def _check_size(self, images: Tensor) -> None:
        height, width = height_and_width(self.spec.image_size)
        if images.shape[2:] != (height, width):
            raise ValueError(
                f"images have {images.shape[2]} x {images.shape[3]} pixels, but this network has positions for {height} x {width}; "
                "lay it out for the size of the images"
            )

    def own_upto_gate(self, gate: int, x: Float[Tensor, "batch ..."], subnet: Subnet) -> TrunkOutput:
        """Run the embedding (gate 0) and the blocks before a gate, and its attention."""
        return self.gates[gate](self._run(gate, x, subnet))

    def own_head(
        self, features: Float[Tensor, "batch tokens channels"], subnet: Subnet
    ) -> Float[Tensor, "batch classes"]:
        """Run the blocks after the last gate and the classifier."""
        return self.classifier(self.norm(self._run(len(self.plan.gates), features, subnet)[:, 0]))

    def _cut_blocks(self, segment: int, subnet: Subnet) -> PlainBlocks:
        blocks = self._runs(segment, subnet)
        cut = [self.blocks[block].cut(subnet.widths) for block in blocks]  # type: ignore[operator]
        return PlainBlocks(self._embed_widths(blocks, subnet), cut)

    def cut_own_upto_gate(self, gate: int, subnet: Subnet) -> nn.Module:
        """Plain modules up to a gate, and its attention."""
        parts: list[nn.Module] = [self._cut_blocks(gate, subnet), copy.deepcopy(self.gates[gate])]
        if gate == 0:
            patches = copy.deepcopy(self.patch_embed["proj"])
            assert isinstance(patches, nn.Conv2d)
            tokens = (tokens.detach().clone() for tokens in (self.cls_token, self.pos_embed))
            parts.insert(0, PlainEmbedding(patches, *tokens))
        return nn.Sequential(*parts)

    def cut_own_head(self, subnet: Subnet) -> nn.Module:
        """Plain modules from the last gate to the logits."""
        head = PlainHead(copy.deepcopy(self.norm), copy.deepcopy(self.classifier))
        return nn.Sequential(self._cut_blocks(len(self.plan.gates), subnet), head)

    def axes(self) -> Mapping[str, Axes]:
        """The axes of all tensors with channels."""
        stream, classes = self._stream, Axis.of(((CLASSES, 1),), self.spec)
        axes: dict[str, Axes] = {
            "patch_embed.proj.weight": (stream, Axis.of(((IMAGE_CHANNELS, 1),), self.spec)),
            "patch_embed.proj.bias": (stream,),
            "cls_token": (None, None, stream),
            POSITIONS: (None, None, stream),
            "norm.weight": (stream,),
            "norm.bias": (stream,),
            "classifier.weight": (classes, stream),
            "classifier.bias": (classes,),
        }
        for name, part in self.named_modules():
            if isinstance(part, TransformerBlock):
                axes |= prefixed(name, part.axes())
            elif isinstance(part, TokenGate):
                axes |= prefixed(name, part.axes(stream))
        return axes

    def fitted(
        self, tensors: Mapping[str, Shaped[Tensor, "*_"]], spec: SupernetSpec
    ) -> Mapping[str, Shaped[Tensor, "*_"]]:
        """The state dict with positions for this network's images."""
        return self._with_grid(tensors, grid_of(spec) if spec.family == self.spec.family else None)

    def _with_grid(self, tensors: Mapping[str, Tensor], before: Pair | None) -> Mapping[str, Tensor]:
        """The tensors with positions for this network's images, where theirs are known to have
        `before` rows and columns."""
        positions = tensors.get(POSITIONS)
        fits = positions is not None and before is not None and positions.shape[1:2] == (math.prod(before) + 1,)
        if positions is None or before is None or not fits or positions.shape == self.pos_embed.shape:
            return tensors
        return {**tensors, POSITIONS: resized_positions(positions, before, grid_of(self.spec))}

    def plain_state(self, tensors: Mapping[str, Shaped[Tensor, "*_"]]) -> PlainState:
        """The weights of a ViT or DeiT with the names of timm or torchvision.

        Raises:
            ValueError: they are those of a distilled DeiT.
        """
        check_one_class_token(tensors)
        own = with_own_names(tensors)
        resized = self._with_grid(own, square_grid(own[POSITIONS]) if POSITIONS in own else None)
        return PlainState(resized, frozenset(name for name in self.state_dict() if name.startswith("gates.")))

    def sorted_plain(self, tensors: Mapping[str, Shaped[Tensor, "*_"]]) -> Mapping[str, Shaped[Tensor, "*_"]]:
        """The weights with the heads and hidden channels of every block sorted by importance."""
        return sorted_by_importance(tensors, len(self.blocks), self.plan.head_channels)


def grid_of(spec: SupernetSpec) -> Pair:
    """Rows and columns of the patches of a network's images."""
    height, width = height_and_width(spec.image_size)
    return height // spec.layout["patch"], width // spec.layout["patch"]


def _hidden(channels: int) -> int:
    """Length of a gate's hidden vector."""
    return max(MIN_HIDDEN, int(HIDDEN * channels))


def _checked_patch(patch: Any, size: Pair) -> int:
    """The size of a patch: as written, or chosen for the images.

    Raises:
        ValueError: it does not divide the images; the message has the nearest that does.
    """
    common = math.gcd(*size)
    if patch is None:
        fitting = [own for own in PATCHES if common % own == 0]
        if not fitting:
            raise ValueError(
                f"patch: images of {size[0]} x {size[1]} pixels cannot be divided into patches of {', '.join(map(str, PATCHES))} "
                f"pixels: {_nearest_sizes(size, PATCHES[-1])}, or write patch"
            )
        return next((own for own in fitting if min(size) // own >= FEW_PATCHES), fitting[-1])
    if not is_integer(patch, 1, 512):
        raise ValueError(f"patch is {patch!r}, but must be a whole number of pixels in 1..512, or null")
    if common % patch:
        divisors = (own for own in range(1, common + 1) if common % own == 0)
        nearest = min(divisors, key=lambda own: (abs(own - patch), own))
        raise ValueError(
            f"patch is {patch}, but images of {size[0]} x {size[1]} pixels cannot be divided into such patches: "
            f"{_nearest_sizes(size, patch)}, or patch {nearest}"
        )
    return int(patch)


def _nearest_sizes(size: Pair, patch: int) -> str:
    """A phrase with the nearest size of images that patches divide."""
    height, width = (max(1, (side + patch // 2) // patch) * patch for side in size)
    return f"use images of {height} x {width} pixels"


def _check_shape(options: Mapping[str, Any]) -> None:
    """Check the widest network."""
    dim, heads, depth = options["dim"], options["heads"], options["depth"]
    for name, value, low, high in (("dim", dim, 2, 4096), ("heads", heads, 1, 64), ("depth", depth, 2, 64)):
        if not is_integer(value, low, high):
            raise ValueError(f"{name} is {value!r}, but must be a whole number in {low}..{high}")
    if dim % heads:
        divisors = (own for own in range(1, dim + 1) if dim % own == 0)
        nearest = min(divisors, key=lambda own: (abs(own - heads), own))
        raise ValueError(
            f"dim is {dim}, which {heads} heads do not divide: use heads {nearest}, or dim {max(1, round(dim / heads)) * heads}"
        )
    check_number("mlp_ratio", options["mlp_ratio"], 0.1, 16)
    check_number("trunk", options["trunk"], 0.05, 1)
    if not is_integer(options["step"], 1, 1024):
        raise ValueError(f"step is {options['step']!r}, but must be a whole number in 1..1024")
    check_choice("paths", options["paths"], PATHS)


def _checked_gates(gates: Any, depth: int) -> tuple[int, ...]:
    """For each gate the number of blocks before it."""
    if gates is None:
        return (max(1, depth // 3),)
    is_list = isinstance(gates, (list, tuple)) and len(gates) > 0
    if not is_list or not all(is_integer(gate, 1, depth - 1) for gate in gates) or list(gates) != sorted(set(gates)):
        raise ValueError(
            f"gates is {gates!r}, but must be rising numbers of blocks in 1..{depth - 1}, such as [{max(1, depth // 3)}]: "
            "a gate stands after so many blocks"
        )
    return tuple(gates)


def _checked_slices(slices: Any) -> tuple[str, ...]:
    known = ", ".join(SLICES)
    if not isinstance(slices, (list, tuple)) or not slices or any(name not in SLICES for name in slices):
        raise ValueError(f"slices is {slices!r}, but must be a list of dimensions: {known}")
    return tuple(name for name in SLICES if name in slices)


def _checked_ratios(ratios: Any) -> tuple[float, ...]:
    if not isinstance(ratios, (list, tuple)) or not ratios:
        raise ValueError(f"ratios is {ratios!r}, but must be a list of numbers in (0, 1]")
    for ratio in ratios:
        check_number("ratios", ratio, 0.01, 1)
    if list(ratios) != sorted(set(ratios)):
        raise ValueError(f"ratios is {list(ratios)!r}, but must rise")
    return tuple(ratios)


class _Builder:
    """The layout of a network: channel groups, and the widths that ratios give."""

    def __init__(self, options: Mapping[str, Any], plan: Plan) -> None:
        self.plan = plan
        self.dim: int = options["dim"]
        self.step: int = options["step"]
        self.slices = _checked_slices(options["slices"])
        self.ratios = _checked_ratios(options["ratios"])
        self.trunk: float = options["trunk"]
        self.most = {
            "embed": self.dim,
            "heads": options["heads"],
            "mlp": max(1, int(options["mlp_ratio"] * self.dim)),
            "depth": plan.depth - plan.gates[-1],
        }
        self.written = {name: self._written(name, options[f"route_{name}"]) for name in SLICES}
        self.groups = self._groups()

    def _written(self, name: str, widths: Any) -> tuple[int, ...] | None:
        """The widths of a dimension that are written, one for each ratio."""
        if widths is None:
            return None
        if name not in self.slices:
            raise ValueError(f"route_{name} is {widths!r}, but slices does not have {name}: add it there")
        most, number = self.most[name], len(self.ratios)
        is_list = isinstance(widths, (list, tuple)) and len(widths) == number
        if not is_list or not all(is_integer(width, 1, most) for width in widths):
            raise ValueError(
                f"route_{name} is {widths!r}, but must be a list of {number} whole numbers in 1..{most}, one for each of ratios"
            )
        return tuple(widths)

    def _groups(self) -> tuple[ChannelGroup, ...]:
        groups = [ChannelGroup("stream", self.dim, choices=(self.dim,))]
        for block in range(self.plan.depth):
            if block == self.plan.gates[-1]:
                groups.append(self._group("depth", "depth", "depth"))
            groups += [
                self._group(f"blocks.{block}.embed", "embed", "slice"),
                self._group(f"blocks.{block}.heads", "heads", "heads"),
                self._group(f"blocks.{block}.mlp", "mlp", "channels"),
            ]
        return tuple(groups)

    def _group(self, name: str, dimension: str, kind: Any) -> ChannelGroup:
        most = self.most[dimension]
        return ChannelGroup(name, most, kind=kind, choices=() if dimension in self.slices else (most,))

    def _width(self, dimension: str, ratio: float, number: int | None) -> int:
        """A width: the written one of a ratio, or the nearest possible one to a share."""
        most, written = self.most[dimension], self.written[dimension]
        if dimension not in self.slices:
            return most
        if written is not None and number is not None:
            return written[number]
        step = 1 if dimension in ("heads", "depth") else self.step
        return most if ratio == 1 else min(most, max(1, int(ratio * most / step + 0.5)) * step)

    def subnet(self, path: Sequence[int]) -> Subnet:
        """The sub-network with the given ratio, by its place among `ratios`, after each gate."""
        widths = [self.dim]
        for block in range(self.plan.depth):
            segment = self.plan.segment(block)
            number = path[segment - 1] if segment else None
            ratio = self.trunk if number is None else self.ratios[number]
            if block == self.plan.gates[-1]:
                widths.append(self._width("depth", ratio, number))
            widths += [self._width(dimension, ratio, number) for dimension in ("embed", "heads", "mlp")]
        return Subnet("-".join(f"{self.ratios[number]:g}" for number in path), tuple(widths))


def _ops(plan: Plan, spec: SupernetSpec) -> tuple[Op, ...]:
    window = Window((plan.patch, plan.patch), (plan.patch, plan.patch))
    ops = [
        Op("patch_embed.proj", "conv", IMAGE, IMAGE_CHANNELS, STREAM, window=window, has_bias=True),
        Op("tokens", "tokens", "patch_embed.proj", STREAM, STREAM, divisions=math.prod(grid_of(spec)) + 2),
    ]
    for block in range(plan.depth):
        if block in plan.gates:
            ops.append(_gate_op(plan.gates.index(block), spec, ops[-1].name))
        ops += _block_ops(plan, block, ops[-1].name)
    last = len(plan.gates)
    ops.append(Op("norm", "scale", ops[-1].name, STREAM, STREAM, divisions=2, segment=last))
    ops.append(Op("classifier", "linear", "norm", STREAM, CLASSES, has_bias=True, segment=last))
    return tuple(ops)


def _gate_op(gate: int, spec: SupernetSpec, reads: str) -> Op:
    hidden = _hidden(spec.max_widths[STREAM])
    return Op(_gate_name(gate), "attention", reads, STREAM, STREAM, hidden=hidden, divisions=2, segment=gate)


def _gate_name(gate: int) -> str:
    return f"gates.{gate}"


def _block_ops(plan: Plan, block: int, reads: str) -> list[Op]:
    """The costed operations of a block."""
    embed, heads, mlp = plan.groups(block)
    of_heads = {"parts": ((heads, plan.head_channels),)}
    further: tuple[tuple[str, Any, int, int, dict[str, Any]], ...] = (
        ("norm1", "scale", embed, embed, {"divisions": 2}),
        ("attn.qkv", "conv", embed, heads, {"has_bias": True, "out_repeat": 3 * plan.head_channels}),
        ("attn.mixing", "mixing", heads, heads, of_heads),
        ("attn.proj", "conv", heads, embed, {"has_bias": True, **of_heads}),
        ("norm2", "scale", embed, embed, {"divisions": 2}),
        ("mlp.fc1", "conv", embed, mlp, {"has_bias": True}),
        ("mlp.fc2", "conv", mlp, embed, {"has_bias": True}),
    )
    number = block - plan.gates[-1]
    when = (plan.depth_group, number) if number >= 0 else None
    ops: list[Op] = []
    for name, kind, num_in, num_out, fields in further:
        before = ops[-1].name if ops else reads
        own = Op(f"blocks.{block}.{name}", kind, before, num_in, num_out, segment=plan.segment(block), when=when)
        ops.append(replace(own, **fields))
    return ops


def _paths(options: Mapping[str, Any], num_ratios: int, num_gates: int) -> list[tuple[int, ...]]:
    """The paths of the members: for each gate the place of a ratio."""
    if options["paths"] == "uniform":
        return [(number,) * num_gates for number in range(num_ratios)]
    if num_ratios**num_gates > MAX_PATHS:
        raise ValueError(
            f"paths is 'all', which with {num_ratios} ratios and {num_gates} gates makes {num_ratios**num_gates} sub-networks; "
            f"at most {MAX_PATHS} are possible: use fewer ratios or gates, or 'uniform'"
        )
    return list(product(range(num_ratios), repeat=num_gates))


def _ds_vit(task: Task, options: Mapping[str, Any]) -> SubnetSet:
    _check_shape(options)
    plan = Plan(
        patch=_checked_patch(options["patch"], height_and_width(task.image_size)),
        head_channels=options["dim"] // options["heads"],
        depth=options["depth"],
        gates=_checked_gates(options["gates"], options["depth"]),
    )
    builder = _Builder(options, plan)
    bare = SupernetSpec(
        family=FAMILY,
        num_classes=task.num_classes,
        in_channels=task.in_channels,
        image_size=task.image_size,
        groups=builder.groups,
        ops=(),
        gates=tuple(
            GateSpec(f"gate{gate}", _gate_name(gate), _hidden(builder.dim), _num_before(plan, gate))
            for gate in range(len(plan.gates))
        ),
        layout={
            "patch": plan.patch,
            "head_channels": plan.head_channels,
            "depth": plan.depth,
            "gates": list(plan.gates),
        },
    )
    spec = replace(bare, ops=_ops(plan, bare))
    members = tuple(builder.subnet(path) for path in _paths(options, len(builder.ratios), len(plan.gates)))
    _check_distinct(members)
    largest = Subnet("largest", spec.max_widths)
    has_largest = any(subnet.widths == largest.widths for subnet in members)
    return SubnetSet(spec, members, None if has_largest else largest)


def _num_before(plan: Plan, gate: int) -> int:
    """Number of channel groups before a gate."""
    return 1 + 3 * plan.gates[gate]


def _check_distinct(members: Sequence[Subnet]) -> None:
    known: dict[tuple[int, ...], str] = {}
    for subnet in members:
        twin = known.setdefault(subnet.widths, subnet.name)
        if twin != subnet.name:
            raise ValueError(
                f"the routes {twin} and {subnet.name} are the same sub-network: use fewer ratios, a smaller step or more of slices"
            )


def _for_task(spec: SupernetSpec, task: Task) -> SupernetSpec:
    """The spec for other images and classes; positions depend on the images.

    Raises:
        ConfigError: patches do not divide the images.
    """
    plan = Plan.of(spec)
    try:
        _checked_patch(plan.patch, height_and_width(task.image_size))
    except ValueError as error:
        raise ConfigError(f"{FAMILY}: {error}") from error
    other = replace(spec, num_classes=task.num_classes, image_size=task.image_size)
    number = math.prod(grid_of(other)) + 2
    ops = (replace(op, divisions=number) if op.kind == "tokens" else op for op in spec.ops)
    return replace(other, ops=tuple(ops))


register(
    Family(
        FAMILY,
        {
            "patch": None,
            "dim": 192,
            "heads": 3,
            "depth": 12,
            "mlp_ratio": 4.0,
            "gates": None,
            "ratios": [0.25, 0.5, 0.75, 1.0],
            "slices": list(SLICES),
            "route_embed": None,
            "route_heads": None,
            "route_mlp": None,
            "route_depth": None,
            "trunk": 1.0,
            "step": 8,
            "paths": "uniform",
        },
        _ds_vit,
        VitSupernet,
        for_task=_for_task,
        naming="A number is the share of the sliced dimensions; of several numbers each is that after one gate.",
    )
)
