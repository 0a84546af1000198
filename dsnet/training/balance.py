"""Uneven classes in the training of a supernet (`data.balance`).

`weights` multiplies the loss of an image by N / (C * n), where n of the N images of the training
split are of its class, one of C: every class has the same weight in the expected loss, and the mean
weight of the images is 1. `sampling` gives every epoch equally many images of each class: those of
rare classes come several times, those of frequent classes in part. `none` takes the images as they
are.
"""

from __future__ import annotations

import torch
from jaxtyping import Float32, Int64
from torch import Tensor


def class_weights(labels: Int64[Tensor, " images"], num_classes: int) -> Float32[Tensor, " classes"]:
    """The weight of each class: float32 [C], N / (number of classes with images * n), and 0 for
    classes without images."""
    counts = torch.bincount(labels, minlength=num_classes)
    present = counts > 0
    weights = len(labels) / (int(present.sum()) * counts.clamp(min=1).double())
    return torch.where(present, weights, 0.0).float()


def epoch_order(labels: Int64[Tensor, " images"], balance: str, generator: torch.Generator) -> Int64[Tensor, " images"]:
    """The rows of one epoch in random order: as many as there are images.

    The order follows from the generator alone, so that a resumed run repeats it.

    Args:
        labels: int64 [N].
        balance: One of `dsnet.data.settings.Balance`.
        generator: On the CPU.

    Returns:
        int64 [N]: a permutation; with `sampling` every class is there N / C times, rounded up for
        some classes, drawn anew in every epoch, and down for the others. An image comes again only
        after all others of its class.
    """
    num_images = len(labels)
    if balance != "sampling":
        return torch.randperm(num_images, generator=generator)
    by_class = torch.argsort(labels, stable=True)
    members = by_class.split(torch.bincount(labels).tolist())
    present = [rows for rows in members if len(rows)]
    quotas = torch.full((len(present),), num_images // len(present))
    quotas[torch.randperm(len(present), generator=generator)[: num_images % len(present)]] += 1
    drawn = []
    for rows, quota in zip(present, quotas.tolist(), strict=True):
        shuffled = rows[torch.randperm(len(rows), generator=generator)]
        drawn.append(shuffled.repeat(-(-quota // len(rows)))[:quota])
    return torch.cat(drawn)[torch.randperm(num_images, generator=generator)]
