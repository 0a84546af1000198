"""Base class of supernets: `net(images, subnet)`, and the same in segments between the gates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn

from dsnet.network.axes import Axes, take
from dsnet.network.features import channel_deviations, channel_maxima, channel_means, padded
from dsnet.network.layers import BatchNormBank
from dsnet.network.slicing import corner
from dsnet.space.entry_gate import ENTRY_CELLS, is_entry, own_segments
from dsnet.space.spec import CLASSES, Subnet, SupernetSpec
from dsnet.space.subnet_set import SubnetSet

EVIDENCE_PARTS = ("mean", "deviation", "maximum", "hidden")
"""Names of the parts of an image's evidence, in the order in which the routing table stores
them."""


@dataclass(frozen=True)
class TrunkOutput:
    """Output of a segment that ends at a gate."""

    features: Float[Tensor, "batch ..."]
    """[B, c, H, W], [B, T, c] or [B, c]: the features after attention, the input of the next
    segment."""
    gate_input: Float[Tensor, "batch ..."]
    """The features that the gate pools; those before attention where there is one."""
    hidden: Float[Tensor, "batch hidden"]
    """[B, hidden]: the attention's hidden vector h, which the published slimming head reads."""

    @classmethod
    def pooled(cls, features: Float[Tensor, "batch ..."], hidden: int) -> TrunkOutput:
        """The output at a gate without attention: the hidden vector is the mean of each channel,
        with zeros up to length `hidden` in place of channels that only wider sub-networks have."""
        return cls(features, features, padded(channel_means(features), hidden))

    def evidence(self, part: str) -> Float[Tensor, "batch features"]:
        """One part of the evidence that a router may read.

        Returns:
            [B, c] for the mean, standard deviation and maximum of each channel of the gate's input
            over its positions or tokens; [B, hidden] for `hidden`.

        Raises:
            KeyError: there is no such part.
        """
        match part:
            case "mean":
                return channel_means(self.gate_input)
            case "deviation":
                return channel_deviations(self.gate_input)
            case "maximum":
                return channel_maxima(self.gate_input)
            case "hidden":
                return self.hidden
        raise KeyError(f"unknown evidence {part!r}; known: {', '.join(EVIDENCE_PARTS)}")


class EntryGate(nn.Module):
    """A gate before the network, whose evidence is the images themselves: mean, deviation and
    maximum of each channel, and as the hidden vector a thumbnail of `ENTRY_CELLS` x `ENTRY_CELLS`
    cells, of which each is the mean of its pixels."""

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> TrunkOutput:
        """[B, C, H, W] -> the images unchanged, and their thumbnail [B, C * ENTRY_CELLS**2]."""
        return TrunkOutput(images, images, F.adaptive_avg_pool2d(images, ENTRY_CELLS).flatten(1))


class ChannelPlaces(NamedTuple):
    """Places of some channels among others."""

    places: Int64[Tensor, " channels"]
    size: int
    """Number of all channels."""


class PlainState(NamedTuple):
    """The weights of a plain network as a supernet has them."""

    tensors: Mapping[str, Shaped[Tensor, "*_"]]
    """By their names in the supernet; a tensor that has no place there keeps its name."""
    lacking: frozenset[str]
    """The tensors of the supernet that the plain network does not have, such as those of gates."""


class Supernet(nn.Module, ABC):
    """A weight-sharing network over one `SubnetSet`; base class of the families' networks.

    The sub-network is an argument of every call, not a mode of the network. A network with G gates
    has G + 1 segments: up to the first gate (the trunk, on which all members agree), from gate to
    gate, and from the last gate to the logits.

    A family implements the segments between the gates that it has itself (`own_upto_gate`,
    `own_head`, `cut_own_upto_gate`, `cut_own_head`). A spec may have an entry gate before them, and
    leave some of them out (`dsnet.space.entry_gate`); `upto_gate`, `head` and their like take the
    numbers of the spec's gates.
    """

    ignores_zero_channels = False
    """Whether every segment after the first computes the same for features with further channels
    that are zero. End-to-end training of gates then lets a narrow choice learn from the channels
    that it lacks (`dsnet.gates.mixing`). A norm across channels, such as LayerNorm, would feel
    them."""

    def __init__(self, spec: SupernetSpec, subnets: SubnetSet) -> None:
        super().__init__()
        if subnets.spec != spec:
            raise ValueError("the set of sub-networks was made for another supernet")
        if spec.gates:
            subnets.prefix_upto(0)  # raises where members differ before the first gate
        self.spec = spec
        self.subnets = subnets
        self._own_segments = own_segments(spec)

    @abstractmethod
    def own_upto_gate(self, gate: int, x: Float[Tensor, "batch ..."], subnet: Subnet) -> TrunkOutput:
        """Run one segment at the widths of `subnet`, up to number `gate` of the family's own gates.

        `x` is, for gate 0, the images [B, C, H, W], float, normalised; otherwise the features of
        the previous segment.
        """

    @abstractmethod
    def own_head(self, features: Float[Tensor, "batch ..."], subnet: Subnet) -> Float[Tensor, "batch classes"]:
        """Run the segment after the last of the family's own gates: features at this gate, or
        images if there is none -> logits [B, num_classes]."""

    @abstractmethod
    def cut_own_upto_gate(self, gate: int, subnet: Subnet) -> nn.Module:
        """The segment of `own_upto_gate` at the widths of `subnet` as a plain module: images or
        features -> TrunkOutput."""

    @abstractmethod
    def cut_own_head(self, subnet: Subnet) -> nn.Module:
        """The segment of `own_head` at the widths of `subnet` as a plain module: features ->
        logits."""

    def own_channel_places(self, gate: int, subnet: Subnet) -> ChannelPlaces | None:
        """See `channel_places`, for the family's own gates."""
        return None

    def channel_places(self, gate: int, subnet: Subnet) -> ChannelPlaces | None:
        """Places of the channels of a sub-network's features at a gate among those of the widest
        there; None if they are the first ones."""
        if is_entry(self.spec.gates[gate]):
            return None
        return self.own_channel_places(self._own_segments[gate][-1], subnet)

    def upto_gate(self, gate: int, x: Float[Tensor, "batch ..."], subnet: Subnet) -> TrunkOutput:
        """Run one segment at the widths of `subnet`, up to gate number `gate`.

        `x` is, for gate 0, the images [B, C, H, W], float, normalised; otherwise the features of
        the previous segment.
        """
        if is_entry(self.spec.gates[gate]):
            return EntryGate()(x)
        *passed, last = self._own_segments[gate]
        for own in passed:
            x = self.own_upto_gate(own, x, subnet).features
        return self.own_upto_gate(last, x, subnet)

    def head(self, features: Float[Tensor, "batch ..."], subnet: Subnet) -> Float[Tensor, "batch classes"]:
        """Run the last segment: features at the last gate -> logits [B, num_classes]."""
        for own in self._own_segments[-1]:
            features = self.own_upto_gate(own, features, subnet).features
        return self.own_head(features, subnet)

    def start_heads(
        self, features: Float[Tensor, "batch ..."], subnets: Sequence[Subnet]
    ) -> Float[Tensor, "batch ..."] | None:
        """Run the first layers of several sub-networks' heads together; see `start_own_heads`.

        None also where the last segment passes gates of the family that the spec leaves out.
        """
        return None if self._own_segments[-1] else self.start_own_heads(features, subnets)

    def start_own_heads(
        self, features: Float[Tensor, "batch ..."], subnets: Sequence[Subnet]
    ) -> Float[Tensor, "batch ..."] | None:
        """Run the first layers of several sub-networks' heads together, at the widest one's width.

        A narrower sub-network uses a prefix of the result's channels. In training mode this is
        exact for layers that treat each output channel separately and read a shared input. None
        where a family has no such layers. `finish_head` continues from the result.
        """
        return None

    def finish_head(self, start: Float[Tensor, "batch ..."], subnet: Subnet) -> Float[Tensor, "batch classes"]:
        """Run the rest of a sub-network's head after `start_heads`: logits [B, num_classes]."""
        raise NotImplementedError(f"{type(self).__name__} does not implement start_own_heads and finish_head")

    def cut_upto_gate(self, gate: int, subnet: Subnet) -> nn.Module:
        """A segment at the widths of `subnet` as a plain module: images or features ->
        TrunkOutput."""
        if is_entry(self.spec.gates[gate]):
            return EntryGate()
        *passed, last = self._own_segments[gate]
        return _after(self._passing(passed, subnet), self.cut_own_upto_gate(last, subnet))

    def cut_head(self, subnet: Subnet) -> nn.Module:
        """The last segment at the widths of `subnet` as a plain module: features -> logits."""
        return _after(self._passing(self._own_segments[-1], subnet), self.cut_own_head(subnet))

    def _passing(self, gates: Sequence[int], subnet: Subnet) -> list[nn.Module]:
        """Plain segments that pass gates of the family without a decision."""
        return [PlainFeatures(self.cut_own_upto_gate(own, subnet)) for own in gates]

    def trunk(self, images: Float[Tensor, "batch channels height width"], subnet: Subnet) -> TrunkOutput:
        """Run everything before the first gate; images are [B, C, H, W] float, normalised."""
        return self.upto_gate(0, images, subnet)

    def tail(self, features: Float[Tensor, "batch ..."], subnet: Subnet) -> Float[Tensor, "batch classes"]:
        """Run everything after the first gate; returns logits [B, num_classes]."""
        for gate in range(1, len(self.spec.gates)):
            features = self.upto_gate(gate, features, subnet).features
        return self.head(features, subnet)

    def cut_trunk(self, subnet: Subnet) -> nn.Module:
        """The trunk at the widths of `subnet` as a plain module: images -> TrunkOutput."""
        return self.cut_upto_gate(0, subnet)

    def cut_tail(self, subnet: Subnet) -> nn.Module:
        """The tail at the widths of `subnet` as a plain module: features -> logits."""
        between = [PlainFeatures(self.cut_upto_gate(gate, subnet)) for gate in range(1, len(self.spec.gates))]
        return _after(between, self.cut_head(subnet))

    def forward(
        self, images: Float[Tensor, "batch channels height width"], subnet: Subnet
    ) -> Float[Tensor, "batch classes"]:
        """Logits [B, num_classes] of one sub-network."""
        if not self.spec.gates:
            return self.head(images, subnet)
        return self.tail(self.trunk(images, subnet).features, subnet)

    def class_tensors(self) -> tuple[str, ...]:
        """The names of the tensors of the state dict that have a row for each class."""
        classifiers = tuple(f"{op.name}." for op in self.spec.ops if op.out_group == CLASSES)
        return tuple(name for name in self.state_dict() if name.startswith(classifiers))

    def axes(self) -> Mapping[str, Axes]:
        """The axes of the tensors of the state dict that have channels, by name: which channel
        groups lie along their dimensions.

        Every family of this package declares them. Of a family that declares none, every tensor is
        cut to a corner, and the order of its channels cannot change.
        """
        return {}

    def channel_scales(self) -> frozenset[str]:
        """The names of tensors that scale or shift channels although they have two or more
        dimensions, as filters have."""
        return frozenset()

    def fitted(
        self, tensors: Mapping[str, Shaped[Tensor, "*_"]], spec: SupernetSpec
    ) -> Mapping[str, Shaped[Tensor, "*_"]]:
        """The state dict of a supernet of this family for images of this one's size, where tensors
        depend on it.

        Args:
            tensors: the state dict.
            spec: the spec of the supernet that it belongs to.
        """
        return tensors

    def plain_state(self, tensors: Mapping[str, Shaped[Tensor, "*_"]]) -> PlainState | None:
        """The state dict of a plain network whose weights this one can start with, as this one has
        it; None where there is no such network.

        Raises:
            ValueError: it is that of a known network with which this one cannot start; the message
                says why and what works, and completes the sentence "the file ...".
        """
        return None

    def sorted_plain(self, tensors: Mapping[str, Shaped[Tensor, "*_"]]) -> Mapping[str, Shaped[Tensor, "*_"]]:
        """The weights of a plain network, by their names here, in the order in which this network
        takes them, so that its widest sub-network computes the same."""
        return tensors

    def batch_norms(self) -> list[BatchNormBank]:
        """All BatchNorm banks in module order; empty for a network without statistics."""
        return [module for module in self.modules() if isinstance(module, BatchNormBank)]


class PlainFeatures(nn.Module):
    """A plain segment that returns only the features of its `TrunkOutput`."""

    def __init__(self, segment: nn.Module) -> None:
        super().__init__()
        self.segment = segment

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """Images or features -> features."""
        return self.segment(x).features


class PlainPooled(nn.Module):
    """A plain segment that ends at a gate without attention; see `TrunkOutput.pooled`."""

    def __init__(self, body: nn.Module, hidden: int) -> None:
        super().__init__()
        self.body = body
        self.hidden = hidden

    def forward(self, x: Float[Tensor, "batch ..."]) -> TrunkOutput:
        """Images or features -> the features at the gate."""
        return TrunkOutput.pooled(self.body(x), self.hidden)


def _after(segments: Sequence[nn.Module], last: nn.Module) -> nn.Module:
    """Plain segments one after the other; the last alone where no other precedes it."""
    return nn.Sequential(*segments, last) if segments else last


def restrict(supernet: Supernet, members: Sequence[int]) -> Supernet:
    """A smaller supernet with only the given members.

    Its weights are cut to the widest of them, and the statistics of other sub-networks are dropped;
    the sub-networks compute exactly the same as before. A bundle stores such a supernet.
    """
    kept = supernet.subnets.subset(members)
    widest = tuple(max(widths) for widths in zip(*(subnet.widths for subnet in kept), strict=True))
    groups = tuple(group.narrowed(width) for group, width in zip(supernet.spec.groups, widest, strict=True))
    spec = replace(supernet.spec, groups=groups)
    small = type(supernet)(spec, SubnetSet(spec, kept.members)).to(next(supernet.parameters()))
    source, axes = supernet.state_dict(), supernet.axes()
    small.load_state_dict(
        {
            name: (
                take(source[name], axes[name], widest) if name in axes else corner(source[name], *value.shape)
            ).clone()
            for name, value in small.state_dict().items()
        }
    )
    return small.train(supernet.training)


def state_for_saving(supernet: Supernet) -> dict[str, Shaped[Tensor, "*_"]]:
    """The state dict as contiguous tensors on the CPU, as safetensors requires."""
    return {name: value.detach().to("cpu", copy=False).contiguous() for name, value in supernet.state_dict().items()}
