"""BatchNorm recalibration: the statistics of every width, re-estimated after training."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dsnet.network.layers import BN_MOMENTUM
from dsnet.network.prefix_tree import each_logits
from dsnet.network.supernet import Supernet


@torch.no_grad()
def recalibrate(supernet: Supernet, batches: Iterable[Tensor]) -> None:
    """Replace all running statistics by cumulative averages over `batches` of clean, normalised images [B, C, H, W].

    Every sub-network takes part, the teacher too, and each shared segment runs once a batch, so that each set of statistics sees every
    batch equally often: once, or as often as there are sub-networks that agree up to its layer and part only between two gates. (Ours:
    the published recalibration skips the teacher and keeps a momentum of 0.1.)

    Raises:
        ValueError: there is no batch.
    """
    norms = supernet.batch_norms()
    if not norms:
        return  # nothing to estimate, and no reason to run anything
    was_training = supernet.training
    supernet.eval()
    for norm in norms:
        norm.reset_statistics()
        norm.momentum = None
        norm.train()  # the norms alone: dropout would draw from the global generator
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
