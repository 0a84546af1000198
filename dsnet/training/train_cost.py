"""Cost of a training step in MAdds, for comparisons at equal cost. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

from dsnet.space.cost import subnet_cost
from dsnet.space.spec import Subnet, SupernetSpec

BACKWARD = 2
"""Cost of a backward pass relative to its forward pass: a product for the inputs' gradient and one
for the weights'."""


def shared_forward_madds(spec: SupernetSpec, subnets: Sequence[Subnet], image_size: int) -> int:
    """Forward MAdds of one image through several sub-networks, with shared segments counted once.

    Args:
        spec: the supernet.
        subnets: the sub-networks that run; for an empty sequence the result is 0.
        image_size: side of the square images, in pixels.
    """
    total = 0
    costs = {subnet.name: subnet_cost(spec, subnet, image_size) for subnet in subnets}
    for segment in range(len(spec.gates) + 1):
        # Two sub-networks share a segment where they agree on every channel group before the gate
        # that ends it.
        nodes = {subnet.prefix(spec.num_prefix_groups(segment)): costs[subnet.name] for subnet in subnets}
        total += sum(cost.segments[segment] for cost in nodes.values())
    return total


def step_madds(spec: SupernetSpec, trained: Sequence[Subnet], taught: Sequence[Subnet], image_size: int) -> int:
    """MAdds of one image in one training step.

    They are forward and backward passes of the trained sub-networks, and forward passes of those
    that teach.

    Args:
        spec: the supernet.
        trained: the sub-networks that learn in the step.
        taught: the sub-networks of the EMA copy that run as teachers.
        image_size: side of the square images, in pixels.
    """
    learning = (1 + BACKWARD) * shared_forward_madds(spec, trained, image_size)
    return learning + sum(subnet_cost(spec, subnet, image_size).madds for subnet in taught)
