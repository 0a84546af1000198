"""Images for the choice of sub-networks: the hold-out, and batches by which channels are sorted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from dsnet.data.settings import Augmentation
from dsnet.data.sources import ImageSource
from dsnet.data.splits import Splits
from dsnet.training.supernet_run import SupernetRun

ORDER_BATCHES = 8
"""Number of batches by which channels are sorted, at most."""
ORDER_BATCH = 128
"""Images per batch."""


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
    count = min(len(images.labels), ORDER_BATCHES * ORDER_BATCH)
    rows = torch.linspace(0, len(images.labels) - 1, count).long()
    parts = rows.split(ORDER_BATCH)
    for part, pixels in zip(parts, images.clean(parts, torch.device("cpu")), strict=True):
        yield run.normalization.apply(pixels), images.labels[part]
