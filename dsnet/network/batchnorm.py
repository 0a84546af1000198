"""BatchNorm recalibration: running statistics of every width, estimated after training; and
normalisation by the batch alone, for widths that have none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from dsnet.network.layers import BN_MOMENTUM
from dsnet.network.prefix_tree import each_logits
from dsnet.network.supernet import Supernet


@torch.no_grad()
def recalibrate(supernet: Supernet, batches: Iterable[Float[Tensor, "_batch channels height width"]]) -> None:
    """Replace all running statistics by cumulative averages over batches of images.

    Every sub-network takes part, including the teacher, and each shared segment runs once per
    batch, so that a set of statistics sees every batch equally often: once, or once for each group
    of sub-networks that share the set but run its segment separately because they differ in later
    widths of it. (Ours: the published recalibration skips the teacher and keeps a momentum of 0.1.)

    Args:
        supernet: The network, changed in place.
        batches: Unaugmented, normalised images [B, C, H, W].

    Raises:
        ValueError: there is no batch.
    """
    norms = supernet.batch_norms()
    if not norms:
        return  # the network has no statistics
    was_training = supernet.training
    supernet.eval()
    for norm in norms:
        norm.reset_statistics()
        norm.momentum = None
        norm.train()  # only the norms: dropout would draw from the global generator
    num_batches = 0
    try:
        for images in batches:
            num_batches += 1
            for _ in each_logits(supernet, images, supernet.subnets.all):
                pass
    finally:
        for norm in norms:
            norm.momentum = BN_MOMENTUM
        supernet.train(was_training)
    if num_batches == 0:
        raise ValueError("recalibration needs at least one batch of images")


@contextmanager
def batch_statistics(supernet: Supernet) -> Iterator[None]:
    """Context manager in which norms normalise by the statistics of the batch and keep theirs
    unchanged; everything else is in eval mode."""
    norms = supernet.batch_norms()
    was_training, momenta = supernet.training, [norm.momentum for norm in norms]
    supernet.eval()
    for norm in norms:
        norm.momentum = 0.0
        norm.train()  # only the norms: dropout stays off
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        supernet.train(was_training)
