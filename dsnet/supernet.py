"""What every supernet can do: `net(images, subnet)`, and the same in two halves around its gate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from dsnet.layers import BatchNormBank
from dsnet.space import Subnet, SubnetSet, SupernetSpec

EVIDENCE_PARTS = ("mean", "deviation", "maximum", "hidden")
"""The parts of an image's evidence, in the order in which the routing table stores them."""


@dataclass(frozen=True)
class TrunkOutput:
    """What the trunk hands over at the gate."""

    features: Tensor
    """[B, c, H, W]: the attended features that every tail continues from."""
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

    There are no modes to set: the sub-network is an argument of every call.
    """

    def __init__(self, spec: SupernetSpec, subnets: SubnetSet) -> None:
        super().__init__()
        if subnets.spec != spec:
            raise ValueError("the set of sub-networks was made for another supernet")
        for gate in range(len(spec.gates)):
            subnets.prefix_upto(gate)
        self.spec = spec
        self.subnets = subnets

    @abstractmethod
    def trunk(self, images: Tensor, subnet: Subnet) -> TrunkOutput:
        """Run everything before the gate at the widths of `subnet`; images are [B, C, H, W] float, normalised."""

    @abstractmethod
    def tail(self, features: Tensor, subnet: Subnet) -> Tensor:
        """Run everything after the gate; returns logits [B, num_classes]."""

    @abstractmethod
    def cut_trunk(self, subnet: Subnet) -> nn.Module:
        """The trunk at the widths of `subnet` as a plain module: images -> TrunkOutput."""

    @abstractmethod
    def cut_tail(self, subnet: Subnet) -> nn.Module:
        """The tail at the widths of `subnet` as a plain module: features -> logits."""

    def forward(self, images: Tensor, subnet: Subnet) -> Tensor:
        """Logits [B, num_classes] of one sub-network."""
        return self.tail(self.trunk(images, subnet).features, subnet)

    def num_trunk_groups(self) -> int:
        """How many channel groups lie before the first gate (all of them where there is no gate)."""
        return self.spec.gates[0].num_prefix_groups if self.spec.gates else len(self.spec.groups)

    def by_trunk(self, subnets: Sequence[Subnet]) -> list[list[Subnet]]:
        """Group sub-networks that share a trunk, so that it runs once for each group."""
        groups: dict[tuple[int, ...], list[Subnet]] = {}
        for subnet in subnets:
            groups.setdefault(subnet.prefix(self.num_trunk_groups()), []).append(subnet)
        return list(groups.values())

    def batch_norms(self) -> list[BatchNormBank]:
        """Every BatchNorm bank, in module order."""
        return [module for module in self.modules() if isinstance(module, BatchNormBank)]


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
