"""The common currency of the platform: a supernet's channel groups, its sub-networks, and sets of them.

Every method of the field (slimmable, universally slimmable, pruned, gated) only differs in how it makes a `SubnetSet`;
measuring, tabling, routing, exporting consume nothing else. This module needs no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from dsnet.errors import CheckpointError

IMAGE = "image"
"""The `reads` of an op that takes the network's input."""
IMAGE_CHANNELS = -1
"""The `in_group` of an op whose input channels are those of the image."""
CLASSES = -2
"""The `out_group` of an op whose output channels are the classes."""

NORMS = ("private_stats", "private_affine", "recalibrate", "group_norm")
"""How sub-networks of different widths normalise (CONTRACTS, Supernet training): BatchNorm with private running statistics per prefix
of widths and one shared affine pair; with private affine pairs too; with statistics that training leaves alone and recalibration makes;
or GroupNorm, which keeps no statistics."""

OpKind = Literal["conv", "depthwise", "attention", "maxpool", "pool", "linear"]


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are always cut together: one width decides all layers that write them."""

    name: str
    max_width: int


@dataclass(frozen=True)
class Op:
    """One costed operation of the supernet, in execution order.

    Spatial size: `conv`, `depthwise` and `maxpool` pad by `kernel // 2`, so n pixels become ceil(n / stride); `pool` and `linear` have
    size 1; `attention` keeps its input's size.
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
    """0: before the first gate decides; s: after gate s - 1 decided."""
    in_union: tuple[int, ...] = ()
    """Further groups that write what the op reads: a residual stream holds the channels of its widest writer."""

    def input_width(self, widths: Sequence[int]) -> int:
        """Channels that the op reads, for a sub-network's widths (not for an op that reads the image)."""
        return max(widths[group] for group in (self.in_group, *self.in_union))


@dataclass(frozen=True)
class GateSpec:
    """Where a gate sits: it reads the hidden vector of the attention op `attention`."""

    name: str
    attention: str
    hidden: int
    """Length of the hidden vector h that the slimming head reads."""
    num_prefix_groups: int
    """The first so many channel groups lie before the gate; the routes that it chooses among agree on them."""


@dataclass(frozen=True)
class Subnet:
    """One sub-network: a width for every channel group of its supernet, in the groups' order."""

    name: str
    widths: tuple[int, ...]

    def prefix(self, num_groups: int) -> tuple[int, ...]:
        """The widths of the first `num_groups` groups: the key of BatchNorm statistics at that depth."""
        return self.widths[:num_groups]


@dataclass(frozen=True)
class SupernetSpec:
    """Everything that decides a supernet's shape; JSON-able, and enough to count its cost without building it."""

    family: str
    num_classes: int
    in_channels: int
    image_size: int
    """Side in pixels that the network is laid out for; cost may be asked at any other."""
    groups: tuple[ChannelGroup, ...]
    """In topological order."""
    ops: tuple[Op, ...]
    gates: tuple[GateSpec, ...]
    layout: Mapping[str, Any] = field(default_factory=dict)
    """What the family's builder needs beside the groups, as plain JSON values."""
    norm: str = "private_stats"
    """One of `NORMS`."""

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"norm is {self.norm!r}; known: {', '.join(NORMS)}")

    def to_json(self) -> dict[str, Any]:
        """A JSON-able mapping that `from_json` reads back to an equal spec.

        What came after the first release is left out where it holds its default, so that older fingerprints stay.
        """
        data = asdict(self)
        if data["norm"] == "private_stats":
            del data["norm"]
        for op in data["ops"]:
            if not op["in_union"]:
                del op["in_union"]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SupernetSpec:
        """Rebuild a spec.

        Raises:
            CheckpointError: a field is missing or unknown.
        """
        try:
            return cls(
                **{
                    **data,
                    "groups": tuple(ChannelGroup(**group) for group in data["groups"]),
                    "ops": tuple(Op(**{**op, "in_union": tuple(op.get("in_union", ()))}) for op in data["ops"]),
                    "gates": tuple(GateSpec(**gate) for gate in data["gates"]),
                }
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the stored supernet spec cannot be read: {error}; it was written by another version"
            ) from error

    def num_prefix_groups(self, gate: int) -> int:
        """How many channel groups lie before a gate; all of them for a gate that is not there."""
        return self.gates[gate].num_prefix_groups if gate < len(self.gates) else len(self.groups)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON form."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def check(self, subnet: Subnet) -> None:
        """Raise ValueError where `subnet` does not fit this supernet."""
        if len(subnet.widths) != len(self.groups):
            raise ValueError(
                f"sub-network {subnet.name!r} has {len(subnet.widths)} widths, but {self.family} has {len(self.groups)} channel groups"
            )
        for width, group in zip(subnet.widths, self.groups, strict=True):
            if not 1 <= width <= group.max_width:
                raise ValueError(
                    f"sub-network {subnet.name!r}: width {width} of channel group {group.name!r} must lie in 1..{group.max_width}"
                )


@dataclass(frozen=True)
class SubnetSet:
    """An immutable, ordered set of sub-networks of one supernet; `set[k]` is the declared id k.

    `len` and iteration exclude `teacher`, the sub-network that is only trained (for DS-MBNet the 819.9 M MAdds `largest`).
    """

    spec: SupernetSpec
    members: tuple[Subnet, ...]
    teacher: Subnet | None = None

    def __post_init__(self) -> None:
        if not self.members:
            raise ValueError("a SubnetSet needs at least one sub-network")
        names = [subnet.name for subnet in self.all]
        if len(set(names)) != len(names):
            raise ValueError(f"sub-network names must be unique, but are {names}")
        for subnet in self.all:
            self.spec.check(subnet)

    def __len__(self) -> int:
        return len(self.members)

    def __iter__(self) -> Iterator[Subnet]:
        return iter(self.members)

    def __getitem__(self, index: int) -> Subnet:
        return self.members[index]

    @property
    def all(self) -> tuple[Subnet, ...]:
        """The members and, last, the teacher where there is one."""
        return self.members if self.teacher is None else (*self.members, self.teacher)

    @property
    def largest(self) -> Subnet:
        """The sub-network that learns from labels: the teacher, or the costliest member where there is none."""
        return self.teacher if self.teacher is not None else self.members[self.by_madds()[-1]]

    def by_madds(self, image_size: int | None = None) -> tuple[int, ...]:
        """Member ids from the cheapest to the costliest; ties keep the declared order."""
        from dsnet.space.cost import subnet_cost  # cost is written in terms of this module

        size = self.spec.image_size if image_size is None else image_size
        return tuple(sorted(range(len(self)), key=lambda k: subnet_cost(self.spec, self.members[k], size).madds))

    def prefixes(self, group: int) -> list[tuple[int, ...]]:
        """Of every member and the teacher, the widths up to channel group `group`, itself included."""
        return [subnet.prefix(group + 1) for subnet in self.all]

    def prefix_upto(self, gate: int) -> tuple[int, ...]:
        """The widths that all members share before gate number `gate`.

        Raises:
            ValueError: two members differ before the gate, so that no gate there could choose between them.
        """
        num_groups = self.spec.num_prefix_groups(gate)
        prefixes = {subnet.prefix(num_groups) for subnet in self.members}
        if len(prefixes) > 1:
            raise ValueError(
                f"all sub-networks must agree on the {num_groups} channel groups before gate {self.spec.gates[gate].name!r}, "
                f"but their widths there are {sorted(prefixes)}"
            )
        return prefixes.pop()

    def subset(self, ids: Sequence[int]) -> SubnetSet:
        """The members `ids`, in that order, without the teacher."""
        return SubnetSet(self.spec, tuple(self.members[k] for k in ids))

    def to_json(self) -> dict[str, Any]:
        """A JSON-able mapping, with the fingerprint of the supernet that it belongs to."""
        return {
            "supernet": self.spec.fingerprint,
            "members": [asdict(subnet) for subnet in self.members],
            "teacher": None if self.teacher is None else asdict(self.teacher),
        }

    @classmethod
    def from_json(cls, spec: SupernetSpec, data: Mapping[str, Any]) -> SubnetSet:
        """Rebuild a set for `spec`.

        Raises:
            CheckpointError: the set was made for another supernet, or its parts are missing or do not fit.
        """
        try:
            if data["supernet"] != spec.fingerprint:
                raise CheckpointError(
                    f"the set of sub-networks belongs to supernet {data['supernet'][:12]}, not to {spec.fingerprint[:12]}; "
                    "use the set that was saved beside this checkpoint"
                )
            members, teacher = data["members"], data["teacher"]
            return cls(spec, tuple(map(_subnet, members)), None if teacher is None else _subnet(teacher))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the stored set of sub-networks cannot be read: {error!r}") from error


def _subnet(item: Mapping[str, Any]) -> Subnet:
    return Subnet(item["name"], tuple(item["widths"]))
