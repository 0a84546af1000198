"""What every supernet can do: `net(images, subnet)`, and the same in segments between its gates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from dsnet.network.layers import BatchNormBank
from dsnet.space.spec import Subnet, SupernetSpec
from dsnet.space.subnet_set import SubnetSet

EVIDENCE_PARTS = ("mean", "deviation", "maximum", "hidden")
"""The parts of an image's evidence, in the order in which the routing table stores them."""


@dataclass(frozen=True)
class TrunkOutput:
    """What a segment hands over at its gate."""

    features: Tensor
    """[B, c, H, W]: the attended features that everything after the gate continues from."""
    gate_input: Tensor
    """[B, c, H, W]: the same before attention."""
    hidden: Tensor
    """[B, hidden]: the attention's hidden vector h, which the published slimming head reads."""

    def evidence(self, part: str) -> Tensor:
        """One part of the evidence a router may read: [B, c] of the gate's input, or [B, hidden].

        Raises:
            KeyError: no such part.
        """
        match part:
            case "mean":
                return self.gate_input.mean((2, 3))
            case "deviation":
                return self.gate_input.var((2, 3), correction=0).sqrt()
            case "maximum":
                return self.gate_input.amax((2, 3))
            case "hidden":
                return self.hidden
        raise KeyError(f"unknown evidence {part!r}; known: {', '.join(EVIDENCE_PARTS)}")


class Supernet(nn.Module, ABC):
    """A weight-sharing network over one `SubnetSet`; families subclass it.

    There are no modes to set: the sub-network is an argument of every call. A network with G gates has G + 1 segments: up to the first
    gate (the trunk, on which all members agree), from gate to gate, and from the last gate to the logits.
    """

    def __init__(self, spec: SupernetSpec, subnets: SubnetSet) -> None:
        super().__init__()
        if subnets.spec != spec:
            raise ValueError("the set of sub-networks was made for another supernet")
        if spec.gates:
            subnets.prefix_upto(0)  # a later gate chooses among those that agree before it
        self.spec = spec
        self.subnets = subnets

    @abstractmethod
    def upto_gate(self, gate: int, x: Tensor, subnet: Subnet) -> TrunkOutput:
        """Run one segment at the widths of `subnet`, up to gate number `gate`.

        `x`: for gate 0 the images [B, C, H, W], float, normalised; else the features that the gate before handed over.
        """

    @abstractmethod
    def head(self, features: Tensor, subnet: Subnet) -> Tensor:
        """Run the last segment: from what the last gate handed over to the logits [B, num_classes]."""

    def start_heads(self, features: Tensor, subnets: Sequence[Subnet]) -> Tensor | None:
        """What the heads of several sub-networks have in common, run once: the widest's first layers, of which narrower ones take a prefix.

        Exact in training mode for layers that treat every channel alone once their input is shared; None where there are none.
        `finish_head` goes on from here.
        """
        return None

    def finish_head(self, start: Tensor, subnet: Subnet) -> Tensor:
        """The rest of one sub-network's head after `start_heads`: logits [B, num_classes]."""
        raise NotImplementedError(f"{type(self).__name__} starts no heads together")

    @abstractmethod
    def cut_upto_gate(self, gate: int, subnet: Subnet) -> nn.Module:
        """A segment at the widths of `subnet` as a plain module: images or features -> TrunkOutput."""

    @abstractmethod
    def cut_head(self, subnet: Subnet) -> nn.Module:
        """The last segment at the widths of `subnet` as a plain module: features -> logits."""

    def trunk(self, images: Tensor, subnet: Subnet) -> TrunkOutput:
        """Run everything before the first gate; images are [B, C, H, W] float, normalised."""
        return self.upto_gate(0, images, subnet)

    def tail(self, features: Tensor, subnet: Subnet) -> Tensor:
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
        return nn.Sequential(*between, self.cut_head(subnet)) if between else self.cut_head(subnet)

    def forward(self, images: Tensor, subnet: Subnet) -> Tensor:
        """Logits [B, num_classes] of one sub-network."""
        return self.tail(self.trunk(images, subnet).features, subnet)

    def batch_norms(self) -> list[BatchNormBank]:
        """Every BatchNorm bank, in module order; none where the network normalises without statistics."""
        return [module for module in self.modules() if isinstance(module, BatchNormBank)]


class PlainFeatures(nn.Module):
    """A plain segment of which only the features go on."""

    def __init__(self, segment: nn.Module) -> None:
        super().__init__()
        self.segment = segment

    def forward(self, x: Tensor) -> Tensor:
        """Images or features -> features."""
        return self.segment(x).features


def restrict(supernet: Supernet, members: Sequence[int]) -> Supernet:
    """A smaller supernet that holds just the members `members`: weights cut to the widest of them, other statistics dropped.

    Its sub-networks compute exactly what they computed before; a bundle stores this.
    """
    kept = supernet.subnets.subset(members)
    groups = tuple(
        replace(group, max_width=max(subnet.widths[index] for subnet in kept))
        for index, group in enumerate(supernet.spec.groups)
    )
    spec = replace(supernet.spec, groups=groups)
    small = type(supernet)(spec, SubnetSet(spec, kept.members))
    source = supernet.state_dict()
    small.load_state_dict({name: source[name][_corner(value)].clone() for name, value in small.state_dict().items()})
    return small.to(next(supernet.parameters()).device).train(supernet.training)


def _corner(like: Tensor) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in like.shape)


def state_for_saving(supernet: Supernet) -> dict[str, Tensor]:
    """The state dict on the CPU, contiguous, ready for safetensors."""
    return {name: value.detach().to("cpu", copy=False).contiguous() for name, value in supernet.state_dict().items()}
