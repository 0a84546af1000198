"""Losses of Stage I: cross-entropy to a target distribution, and label smoothing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int64
from torch import Tensor


def soft_cross_entropy(
    logits: Float[Tensor, "batch classes"], target: Float[Tensor, "batch classes"]
) -> Float[Tensor, ""]:
    """Mean over the batch of -sum_c target_c log softmax(logits)_c.

    Both are [B, C]; `logits` are not normalised, `target` is a distribution.
    """
    return -(target * F.log_softmax(logits, dim=1)).sum(1).mean()


def smoothed_one_hot(
    labels: Int64[Tensor, " batch"], num_classes: int, smoothing: float
) -> Float32[Tensor, "batch {num_classes}"]:
    """Label-smoothed targets [B, C]: (1 - smoothing) on the label plus smoothing / C everywhere."""
    share = smoothing / num_classes
    target = torch.full((len(labels), num_classes), share, device=labels.device)
    return target.scatter_(1, labels[:, None], 1.0 - smoothing + share)
