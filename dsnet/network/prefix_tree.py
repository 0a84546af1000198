"""Evaluation of several sub-networks as a tree: segments that they share run only once.

Sub-networks that agree on all widths before a gate share everything up to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from jaxtyping import Float
from torch import Tensor

from dsnet.network.supernet import Supernet, TrunkOutput
from dsnet.space.spec import Subnet

OnNode = Callable[[int, Subnet, TrunkOutput], None]
"""Callback (gate, a sub-network that passes it, the segment's output at the gate)."""


def _ignore(gate: int, subnet: Subnet, output: TrunkOutput) -> None:
    """The callback that does nothing."""


def by_prefix(supernet: Supernet, subnets: Sequence[Subnet], gate: int) -> list[list[Subnet]]:
    """Group sub-networks that agree on every channel group before gate number `gate`, in order of
    first appearance."""
    groups: dict[tuple[int, ...], list[Subnet]] = {}
    for subnet in subnets:
        groups.setdefault(subnet.prefix(supernet.spec.num_prefix_groups(gate)), []).append(subnet)
    return list(groups.values())


def each_logits(
    supernet: Supernet,
    images: Float[Tensor, "batch ..."],
    subnets: Sequence[Subnet],
    gate: int = 0,
    on_node: OnNode = _ignore,
) -> Iterator[tuple[Subnet, Float[Tensor, "batch classes"]]]:
    """Run several sub-networks on the same images, each shared segment once.

    Args:
        supernet: The supernet that holds them.
        images: [B, C, H, W], normalised; where `gate` is not 0, the features after gate `gate - 1`.
        subnets: The sub-networks.
        gate: The first segment to run.
        on_node: Called once for every gate and prefix.

    Yields:
        (sub-network, logits [B, num_classes]); the order differs from that of `subnets` where
        sub-networks that share a prefix are not neighbours.
    """
    if gate == len(supernet.spec.gates):
        for subnet in subnets:
            yield subnet, supernet.head(images, subnet)
        return
    for group in by_prefix(supernet, subnets, gate):
        output = supernet.upto_gate(gate, images, group[0])
        on_node(gate, group[0], output)
        yield from each_logits(supernet, output.features, group, gate + 1, on_node)
