"""Images for the choice of sub-networks: the hold-out, and batches by which channels are sorted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, islice

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from dsnet.data.settings import Augmentation
from dsnet.data.sources import ImageSource
from dsnet.data.splits import Splits
from dsnet.space.spec import Subnet
from dsnet.structure.method import StructureProblem
from dsnet.structure.methods import structure_method
from dsnet.structure.noise import STEPS
from dsnet.training.supernet_run import SupernetRun
from dsnet.training.train_cost import step_madds

ORDER_BATCHES = 8
"""Number of batches by which channels are sorted, at most."""
ORDER_BATCH = 128
"""Images per batch."""


def num_held_out(problem: StructureProblem, num_images: int) -> int:
    """Number of images of a training split on which the method does not train: none where it trains
    networks and scores no candidate."""
    method = structure_method(problem.settings.method)
    if method.bases(problem) and not method.num_candidates(problem):
        return 0
    return problem.settings.num_held_out(num_images)


def held_out_images(
    source: ImageSource, splits: Splits, held: Int64[np.ndarray, " held_out"]
) -> tuple[UInt8[Tensor, "held_out channels height width"], Int64[Tensor, " held_out"]]:
    """The images of the hold-out as in evaluation, and their labels.

    Args:
        source: all images.
        splits: the splits of which the hold-out is a part.
        held: the ids of the images that are held out.
    """
    images = source.training_images(replace(splits, train=held), Augmentation())
    parts = torch.arange(len(held)).split(ORDER_BATCH)
    return torch.cat(list(images.clean(parts, torch.device("cpu")))), images.labels


def order_batches(
    source: ImageSource, splits: Splits, run: SupernetRun
) -> Iterator[tuple[Float[Tensor, "_batch channels height width"], Int64[Tensor, " _batch"]]]:
    """Normalised images of `train` with their labels, the same for the same splits.

    Args:
        source: all images.
        splits: the splits.
        run: the training, for its normalisation.
    """
    images = source.training_images(splits, Augmentation())
    parts = _sorting_parts(len(images.labels))
    for part, pixels in zip(parts, images.clean(parts, torch.device("cpu")), strict=True):
        yield run.normalization.apply(pixels), images.labels[part]


def order_madds(problem: StructureProblem, num_images: int) -> float:
    """MAdds of the forward and backward passes by which channels are sorted, and scored by the
    search; 0 where that needs no images.

    Args:
        problem: the problem, for the order and the network.
        num_images: images of `train` without the hold-out.
    """
    settings, widest = problem.settings, problem.subnets.at(problem.widest)
    passes: list[tuple[str, Subnet]] = [(settings.order, widest), *structure_method(settings.method).passes(problem)]
    sizes = [len(part) for part in _sorting_parts(num_images)]
    num_shown = {"taylor": sum(sizes), "noise": 2 * sum(islice(cycle(sizes), STEPS))}
    return float(
        sum(
            num_shown.get(kind, 0) * step_madds(problem.spec, [subnet], [], problem.image_size)
            for kind, subnet in passes
        )
    )


def _sorting_parts(num_images: int) -> tuple[Int64[Tensor, " _batch"], ...]:
    """The rows of every batch by which channels are sorted, about equally many each.

    The images may stand in the order of their classes, and every batch, by whose statistics norms
    normalise, must have its share of each class; so the rows are mixed, always in the same way.
    """
    count = min(num_images, ORDER_BATCHES * ORDER_BATCH)
    rows = torch.linspace(0, num_images - 1, count).long()
    mixed = rows[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
    return mixed.tensor_split(math.ceil(count / ORDER_BATCH))
