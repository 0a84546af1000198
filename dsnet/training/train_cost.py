"""Cost of a training step, and of a whole training, in MAdds, for comparisons at equal cost."""

from __future__ import annotations

import random
from collections.abc import Sequence

from dsnet.image_size import ImageSize
from dsnet.space.cost import subnet_cost
from dsnet.space.spec import Subnet, SupernetSpec
from dsnet.space.subnet_set import SubnetSet
from dsnet.training.settings import Teacher
from dsnet.training.supernet_run import SupernetRun

BACKWARD = 2
"""Cost of a backward pass relative to its forward pass: a product for the inputs' gradient and one
for the weights'."""
DRAWS = 32
"""Draws of sub-networks over which the cost of a step is averaged."""


def shared_forward_madds(spec: SupernetSpec, subnets: Sequence[Subnet], image_size: ImageSize) -> int:
    """Forward MAdds of one image through several sub-networks, with shared segments counted once.

    Args:
        spec: the supernet.
        subnets: the sub-networks that run; for an empty sequence the result is 0.
        image_size: size of the images.
    """
    total = 0
    costs = {subnet.name: subnet_cost(spec, subnet, image_size) for subnet in subnets}
    for segment in range(len(spec.gates) + 1):
        # Two sub-networks share a segment where they agree on every channel group before the gate
        # that ends it.
        nodes = {subnet.prefix(spec.num_prefix_groups(segment)): costs[subnet.name] for subnet in subnets}
        total += sum(cost.segments[segment] for cost in nodes.values())
    return total


def step_madds(spec: SupernetSpec, trained: Sequence[Subnet], taught: Sequence[Subnet], image_size: ImageSize) -> int:
    """MAdds of one image in one training step.

    They are forward and backward passes of the trained sub-networks, and forward passes of those
    that teach.

    Args:
        spec: the supernet.
        trained: the sub-networks that learn in the step.
        taught: the sub-networks of the EMA copy that run as teachers.
        image_size: size of the images.
    """
    learning = (1 + BACKWARD) * shared_forward_madds(spec, trained, image_size)
    return learning + sum(subnet_cost(spec, subnet, image_size).madds for subnet in taught)


def training_madds(run: SupernetRun, subnets: SubnetSet, num_images: int, image_size: ImageSize) -> float:
    """Expected MAdds of a whole training, without its recalibration.

    Where a step draws sub-networks, the cost of a step is the mean over `DRAWS` draws.

    Args:
        run: the settings.
        subnets: the sub-networks.
        num_images: images of the training split.
        image_size: size of the images.
    """
    batch = min(run.train.batch_size, num_images)
    num_shown = run.train.epochs * (num_images // batch) * batch
    largest = subnets.largest
    alone = step_madds(subnets.spec, [largest], [], image_size)
    generator = random.Random(run.seed)
    draws = [_drawn(run, subnets, generator) for _ in range(DRAWS)]
    steps = [
        step_madds(subnets.spec, [largest, *narrower], _teachers(run.regime.teacher, largest, narrower), image_size)
        for narrower in draws
    ]
    share = run.bootstrapping.largest_first
    return num_shown * (share * alone + (1 - share) * sum(steps) / DRAWS)


def _drawn(run: SupernetRun, subnets: SubnetSet, generator: random.Random) -> list[Subnet]:
    """The sub-networks that a step trains beside the largest, drawn as training does; the smallest
    is the last."""
    order = [subnets[number] for number in subnets.by_madds()]
    smallest, largest = order[0], subnets.largest
    between = [subnet for subnet in order[1:] if subnet.widths != largest.widths]
    if run.width_space is not None:
        space = run.width_space
        smallest = subnets.at(space.smallest(subnets.spec))
        drawn = {space.draw(generator.randrange, subnets.spec) for _ in range(run.regime.num_random)}
        between = [subnets.at(widths) for widths in sorted(drawn - {smallest.widths, largest.widths})]
    elif run.regime.widths != "all":
        between = generator.sample(between, min(run.regime.num_random, len(between)))
    return [*between, *([] if smallest.widths == largest.widths else [smallest])]


def _teachers(teacher: Teacher, largest: Subnet, narrower: Sequence[Subnet]) -> list[Subnet]:
    """The sub-networks of the EMA copy that run as teachers."""
    if teacher == "ema" and narrower:
        return [largest]
    if teacher == "ema_ensemble" and narrower:
        return [largest, *narrower[:-1]]
    return []
