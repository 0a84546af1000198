"""Description of a supernet: its channel groups, operations, gates and sub-networks.

The methods of the field (slimmable, universally slimmable, pruned, gated) differ only in how they
make a `SubnetSet`; measuring, tabling, routing and exporting use nothing else. This module needs no
torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from dsnet.errors import CheckpointError
from dsnet.image_size import ImageSize, normal_size

IMAGE = "image"
"""The `reads` of an op that takes the network's input."""
IMAGE_CHANNELS = -1
"""The `in_group` of an op whose input channels are those of the image."""
CLASSES = -2
"""The `out_group` of an op whose output channels are the classes."""
Norm = Literal["private_stats", "private_affine", "recalibrate", "group_norm"]
NORMS: tuple[str, ...] = get_args(Norm)
"""Kinds of normalisation for sub-networks of different widths (docs/definitions.md, Supernet
training), in this order: BatchNorm with private running statistics per prefix of widths and one
shared affine pair; with private affine pairs too; with private statistics that only recalibration
computes, not training; or GroupNorm, which keeps no statistics."""
OpKind = Literal[
    "conv",
    "depthwise",
    "attention",
    "maxpool",
    "pool",
    "linear",
    "grouped",
    "norm",
    "scale",
    "fixed",
    "tokens",
    "mixing",
]
GroupKind = Literal["channels", "kernel", "heads", "depth", "slice"]
GROUP_KINDS: tuple[str, ...] = get_args(GroupKind)
Pair = tuple[int, int]
"""Height and width."""


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are always sliced together: one width applies to all layers that write them."""

    name: str
    max_width: int
    pinned: str = ""
    """Why every sub-network keeps all channels; empty where they can be sliced."""
    ids: tuple[int, ...] = ()
    """The channel of the residual stream that each of its channels is, where several groups write
    one stream and each has its own order; empty: the first channel of the group is the first of the
    stream, and so on."""
    kind: GroupKind = "channels"
    """What the width counts. `channels`: channels that a layer writes. `slice`: the first channels
    of a residual stream, which a block reads and writes; the others pass it unchanged. `heads`:
    attention heads. `depth`: blocks, of which the first ones run. `kernel`: the size of a kernel in
    pixels; a smaller kernel is the centre of the larger one, so that all sizes are odd or all are
    even."""
    choices: tuple[int, ...] = ()
    """The possible widths, rising, the largest of them `max_width`; empty: any up to it."""

    def channels(self, width: int) -> Sequence[int]:
        """The channels of its stream that a sub-network of this width has, in the group's order."""
        return self.ids[:width] if self.ids else range(width)

    @property
    def is_fixed(self) -> bool:
        """Whether it has one width only."""
        return bool(self.pinned) or self.choices == (self.max_width,)

    @property
    def is_size(self) -> bool:
        """Whether the width is the size of a kernel or a number of blocks, whose parts have places
        of their own: they cannot be sorted, and no score of channels is one of theirs."""
        return self.kind in ("kernel", "depth")

    @property
    def unit(self) -> str:
        """What the width counts, as a noun in the singular."""
        return {"heads": "head", "depth": "block", "kernel": "pixel"}.get(self.kind, "channel")

    def step(self, step: int) -> int:
        """The step of its widths where those of channels are multiples of `step`: heads and blocks
        are counted one by one."""
        return 1 if self.kind in ("heads", "depth") else step

    def narrowed(self, width: int) -> ChannelGroup:
        """The group of a network that has no more of it than a sub-network of this width."""
        choices = tuple(choice for choice in self.choices if choice <= width)
        return replace(self, max_width=width, ids=self.ids[:width], choices=choices)


@dataclass(frozen=True)
class Window:
    """Geometry of a convolution or pooling that is not the usual one; each pair is height and
    width."""

    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    ceil: bool = False
    """Whether the last, incomplete window counts."""
    output: Pair = (0, 0)
    """Size of the output where it is fixed (adaptive pooling); 0 where it follows from the
    input."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Window:
        """Rebuild it from the result of `asdict`."""
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in data.items()
        }
        return cls(**values)

    def output_size(self, size: Pair) -> Pair:
        """Height and width of the output for an input of `size` pixels."""
        if self.output != (0, 0):
            return self.output
        height, width = (self._along(axis, size[axis]) for axis in (0, 1))
        return height, width

    def _along(self, axis: int, size: int) -> int:
        stride, padding = self.stride[axis], self.padding[axis]
        span = size + 2 * padding - self.dilation[axis] * (self.kernel[axis] - 1) - 1
        if span < 0:
            raise ValueError(f"a kernel of {self.kernel[axis]} pixels does not fit into {size} pixels")
        if not self.ceil:
            return span // stride + 1
        number = -(-span // stride) + 1
        return number - 1 if (number - 1) * stride >= size + padding else number


@dataclass(frozen=True)
class Op:
    """One operation of the supernet whose cost is counted.

    Spatial size: `conv`, `depthwise` and `maxpool` pad by `kernel // 2`, so n pixels become ceil(n
    / stride); `pool` and `linear` have size 1; `attention` keeps its input's size. A `scale` is a
    LayerNorm, or parameters by which channels are multiplied or shifted; it costs no MAdds.
    `tokens` turns h x w positions into h w + 1 tokens, of which the first is the class token, and
    adds a position to each; tokens have the size (number, 1). `mixing` is the two products of
    self-attention that have the square of the number of tokens: queries with keys, and the result
    with values; it reads queries, which have as many channels as keys and as values.
    """

    name: str
    kind: OpKind
    reads: str
    in_group: int
    out_group: int
    kernel: int = 1
    stride: int = 1
    hidden: int = 0
    """Channels of an attention's hidden layer; never sliced."""
    has_norm: bool = False
    segment: int = 0
    """Segment that the op belongs to: 0 before the first gate's decision, s after the decision of
    gate s - 1."""
    in_union: tuple[int, ...] = ()
    """Further groups that write the op's input; a residual stream has as many channels as its
    widest writer."""
    parts: tuple[Pair, ...] = ()
    """In a traced network the input's channels, in order: (group, repeats of each of its channels);
    a group may be `IMAGE_CHANNELS`. They replace `in_group` and `in_union`."""
    unions: tuple[tuple[int, ...], ...] = ()
    """For each of `parts` the further groups that write it, each into its own channels; empty where
    no part has any."""
    kernel_group: int | None = None
    """The group whose width is the size of the kernel; None: `kernel` is."""
    window: Window | None = None
    """Geometry that `kernel` and `stride` cannot express."""
    has_bias: bool = False
    divisions: int = 1
    """Groups of a grouped convolution; output channels per input channel of a depthwise one;
    parameters per channel of a `scale` or of `tokens`; values per channel that the hidden layer of
    an `attention` reads."""
    out_repeat: int = 1
    """Output channels per unit of `out_group`: those of a head in queries, keys and values."""
    when: Pair | None = None
    """(depth group, number of a block): the op runs only in sub-networks in which the group's width
    is above the number. In the others its input passes, and it costs nothing. None: it always
    runs."""
    fixed_madds: int = 0
    """MAdds of an operation of kind `fixed`, which every sub-network runs with all channels and
    whose cost no formula here gives; counted on images of the spec's size."""
    fixed_params: int = 0
    """Parameters of an operation of kind `fixed`."""
    depends: tuple[int, ...] = ()
    """Groups whose widths are the key of the op's BatchNorm statistics, the written ones last;
    empty: all groups up to `out_group`."""

    def runs(self, widths: Sequence[int]) -> bool:
        """Whether the op runs at a sub-network's widths."""
        return self.when is None or widths[self.when[0]] > self.when[1]

    def input_width(self, spec: SupernetSpec, widths: Sequence[int]) -> int:
        """Number of input channels for a sub-network's widths; of the image, all its channels."""
        if self.parts:
            unions = self.unions or ((),) * len(self.parts)
            return sum(
                repeat * spec.stream_width((group, *others), widths)
                for (group, repeat), others in zip(self.parts, unions, strict=True)
            )
        return spec.stream_width((self.in_group, *self.in_union), widths)


@dataclass(frozen=True)
class GateSpec:
    """Position of a gate, which reads the hidden vector of the attention op `attention`."""

    name: str
    attention: str
    hidden: int
    """Length of the hidden vector h that the slimming head reads."""
    num_prefix_groups: int
    """Number of channel groups before the gate; the routes among which it chooses agree on their
    widths."""


@dataclass(frozen=True)
class Subnet:
    """One sub-network: a width for every channel group of its supernet, in the groups' order."""

    name: str
    widths: tuple[int, ...]

    def prefix(self, num_groups: int) -> tuple[int, ...]:
        """The widths of the first `num_groups` groups, the key of the BatchNorm statistics at that
        depth."""
        return self.widths[:num_groups]


@dataclass(frozen=True)
class SupernetSpec:
    """Everything that determines a supernet's shape; it is JSON-able and suffices to count costs
    without building it."""

    family: str
    num_classes: int
    in_channels: int
    image_size: ImageSize
    """Size of the images for which the network is laid out; costs can be computed for any other
    size."""
    groups: tuple[ChannelGroup, ...]
    """The channel groups in topological order."""
    ops: tuple[Op, ...]
    """The operations in execution order."""
    gates: tuple[GateSpec, ...]
    layout: Mapping[str, Any] = field(default_factory=dict)
    """Further values that the family's builder needs beside the groups, as plain JSON values."""
    norm: str = "private_stats"
    """One of `NORMS`."""

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"norm is {self.norm!r}; known: {', '.join(NORMS)}")
        object.__setattr__(self, "image_size", normal_size(self.image_size))  # a list where it comes from JSON
        for group in self.groups:
            if group.kind not in GROUP_KINDS:
                raise ValueError(
                    f"channel group {group.name!r} is of kind {group.kind!r}; known: {', '.join(GROUP_KINDS)}"
                )
            if group.ids and (len(group.ids) != group.max_width or len(set(group.ids)) < len(group.ids)):
                raise ValueError(
                    f"channel group {group.name!r} has {group.max_width} channels, but its ids are {len(group.ids)} numbers, of which "
                    f"{len(set(group.ids))} are different"
                )
            if group.choices and (
                list(group.choices) != sorted(set(group.choices)) or group.choices[-1] != group.max_width
            ):
                raise ValueError(
                    f"channel group {group.name!r} has the choices {list(group.choices)}, but they must rise and end with "
                    f"{group.max_width}"
                )

    def to_json(self) -> dict[str, Any]:
        """A JSON-able mapping that `from_json` turns back into an equal spec.

        Fields added after the first release are omitted where they have their default, so that
        fingerprints of older specs do not change.
        """
        data = asdict(self)
        if data["norm"] == "private_stats":
            del data["norm"]
        for op in data["ops"]:
            for name in [name for name, default in _OP_DEFAULTS.items() if op[name] == default]:
                del op[name]
        for group in data["groups"]:
            for name in [name for name, default in _GROUP_DEFAULTS.items() if group[name] == default]:
                del group[name]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SupernetSpec:
        """Rebuild a spec from the result of `to_json`.

        Raises:
            CheckpointError: a field is missing or unknown.
        """
        try:
            return cls(
                **{
                    **data,
                    "groups": tuple(map(_group, data["groups"])),
                    "ops": tuple(map(_op, data["ops"])),
                    "gates": tuple(GateSpec(**gate) for gate in data["gates"]),
                }
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the stored supernet spec cannot be read: {error}; it was written by another version"
            ) from error

    def width_of(self, group: int, widths: Sequence[int]) -> int:
        """Number of channels of a group for a sub-network's widths; `group` may be `IMAGE_CHANNELS`
        or `CLASSES`.

        Raises:
            ValueError: there is no such group.
        """
        if group == IMAGE_CHANNELS:
            return self.in_channels
        if group == CLASSES:
            return self.num_classes
        if not 0 <= group < len(widths):
            raise ValueError(f"{self.family} has no channel group {group}: it has {len(widths)}")
        return widths[group]

    def stream_width(self, groups: Sequence[int], widths: Sequence[int]) -> int:
        """Number of channels of a stream that these groups write: those that at least one of them
        has. A single group may be `IMAGE_CHANNELS` or `CLASSES`."""
        own = [(group, self.width_of(group, widths)) for group in groups]
        if len(own) == 1 or not any(self.groups[group].ids for group, _ in own):
            return max(width for _, width in own)
        return len({channel for group, width in own for channel in self.groups[group].channels(width)})

    @property
    def max_widths(self) -> tuple[int, ...]:
        """All channels of every group."""
        return tuple(group.max_width for group in self.groups)

    def num_prefix_groups(self, gate: int) -> int:
        """Number of channel groups before a gate; for a number past the last gate, all of them."""
        return self.gates[gate].num_prefix_groups if gate < len(self.gates) else len(self.groups)

    @property
    def has_norms(self) -> bool:
        """Whether the network has norms of the kind `norm`; a LayerNorm is none."""
        return any(op.has_norm or op.kind == "norm" for op in self.ops)

    @property
    def has_batch_norm(self) -> bool:
        """Whether the network has BatchNorm, which keeps statistics."""
        return self.norm != "group_norm" and self.has_norms

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON form."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def check(self, subnet: Subnet) -> None:
        """Raise ValueError if `subnet` does not fit this supernet."""
        if len(subnet.widths) != len(self.groups):
            raise ValueError(
                f"sub-network {subnet.name!r} has {len(subnet.widths)} widths, but {self.family} has {len(self.groups)} channel groups"
            )
        for width, group in zip(subnet.widths, self.groups, strict=True):
            if group.pinned and width != group.max_width:
                raise ValueError(
                    f"sub-network {subnet.name!r}: channel group {group.name!r} keeps all {group.max_width} channels, "
                    f"not {width}: {group.pinned}"
                )
            if not 1 <= width <= group.max_width:
                raise ValueError(
                    f"sub-network {subnet.name!r}: width {width} of channel group {group.name!r} must lie in 1..{group.max_width}"
                )
            if group.choices and width not in group.choices:
                raise ValueError(
                    f"sub-network {subnet.name!r}: width {width} of channel group {group.name!r} must be one of "
                    f"{', '.join(map(str, group.choices))}; the nearest is {min(group.choices, key=lambda own: abs(own - width))}"
                )
            if group.kind == "kernel" and (group.max_width - width) % 2:
                raise ValueError(
                    f"sub-network {subnet.name!r}: a kernel of {width} pixels has no place in the centre of one of {group.max_width} "
                    f"(group {group.name!r}); both must be odd or both even"
                )


_OP_DEFAULTS: Mapping[str, Any] = {
    "in_union": (), "parts": (), "unions": (), "kernel_group": None, "window": None, "has_bias": False, "divisions": 1, "depends": (),
    "fixed_madds": 0, "fixed_params": 0, "out_repeat": 1, "when": None,
}  # fmt: skip
"""Fields of an op that JSON omits where they have their default."""
_GROUP_DEFAULTS: Mapping[str, Any] = {"pinned": "", "ids": (), "kind": "channels", "choices": ()}
"""Fields of a channel group that JSON omits where they have their default."""


def _group(data: Mapping[str, Any]) -> ChannelGroup:
    fields = {**data, "ids": tuple(data.get("ids", ())), "choices": tuple(data.get("choices", ()))}
    if fields.pop("is_kernel", False):  # earlier specs knew channels and kernels
        fields["kind"] = "kernel"
    return ChannelGroup(**fields)


def _op(data: Mapping[str, Any]) -> Op:
    window = data.get("window")
    return Op(
        **{
            **data,
            "in_union": tuple(data.get("in_union", ())),
            "parts": tuple((group, repeat) for group, repeat in data.get("parts", ())),
            "unions": tuple(map(tuple, data.get("unions", ()))),
            "window": None if window is None else Window.from_json(window),
            "depends": tuple(data.get("depends", ())),
            "when": None if data.get("when") is None else tuple(data["when"]),
        }
    )
