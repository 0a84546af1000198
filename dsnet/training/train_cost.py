"""The compute that a training step spends, counted in MAdds (no torch): for comparisons at equal cost."""

from __future__ import annotations

from collections.abc import Sequence

from dsnet.space.cost import subnet_cost
from dsnet.space.spec import Subnet, SupernetSpec

BACKWARD = 2
"""A backward pass costs twice its forward pass: one product for the inputs' gradient, one for the weights'."""


def shared_forward_madds(spec: SupernetSpec, subnets: Sequence[Subnet], image_size: int) -> int:
    """Forward MAdds of one image through several sub-networks, each segment that they share counted once.

    Args:
        spec: the supernet.
        subnets: which sub-networks run; none cost nothing.
        image_size: side of the square images, in pixels.
    """
    total = 0
    costs = {subnet.name: subnet_cost(spec, subnet, image_size) for subnet in subnets}
    for segment in range(len(spec.gates) + 1):
        # Two sub-networks share a segment where they agree on every channel group before the gate that ends it.
        nodes = {subnet.prefix(spec.num_prefix_groups(segment)): costs[subnet.name] for subnet in subnets}
        total += sum(cost.segments[segment] for cost in nodes.values())
    return total


def step_madds(spec: SupernetSpec, trained: Sequence[Subnet], taught: Sequence[Subnet], image_size: int) -> int:
    """MAdds of one image in one training step: forward and backward of the trained, forward alone of those that teach.

    Args:
        spec: the supernet.
        trained: the sub-networks that learn in the step.
        taught: the sub-networks of the averaged copy that run to teach.
        image_size: side of the square images, in pixels.
    """
    learning = (1 + BACKWARD) * shared_forward_madds(spec, trained, image_size)
    return learning + sum(subnet_cost(spec, subnet, image_size).madds for subnet in taught)
