"""Losses of Stage I: cross-entropy to a target distribution, distillation, label smoothing, and the
penalty on the scales of norms."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from dsnet.network.layers import BatchNormBank


def soft_cross_entropy(
    logits: Float[Tensor, "batch classes"],
    target: Float[Tensor, "batch classes"],
    weights: Float[Tensor, " batch"] | None = None,
) -> Float[Tensor, ""]:
    """Mean over the batch of -sum_c target_c log softmax(logits)_c, times an image's weight.

    Args:
        logits: [B, C], not normalised.
        target: [B, C] distributions.
        weights: [B], >= 0, not normalised; None: 1.
    """
    return _mean(-(target * F.log_softmax(logits, dim=1)).sum(1), weights)


def _mean(losses: Tensor, weights: Tensor | None) -> Tensor:
    return losses.mean() if weights is None else (weights * losses).mean()


def distillation(
    logits: Float[Tensor, "batch classes"],
    soft: Float[Tensor, "batch classes"],
    hard: Float[Tensor, "batch classes"],
    weight: Float[Tensor, " batch"],
    temperature: float,
    weights: Float[Tensor, " batch"] | None = None,
) -> Float[Tensor, ""]:
    """Mean over the batch of the cross-entropy to soft labels at a temperature and to hard labels.

    The soft part is multiplied by the square of the temperature, so that its gradient keeps its
    size (Hinton et al., arXiv 1503.02531).

    Args:
        logits: [B, C], not normalised.
        soft: [B, C] distributions of the teacher at the temperature.
        hard: [B, C] distributions.
        weight: [B] weight of the soft part of each image, 0..1; the hard part has the rest.
        temperature: temperature of `soft`, > 0.
        weights: [B] factor of each image's loss, >= 0, not normalised; None: 1.
    """
    soft_part = -(soft * F.log_softmax(logits / temperature, dim=1)).sum(1) * temperature**2
    hard_part = -(hard * F.log_softmax(logits, dim=1)).sum(1)
    return _mean(weight * soft_part + (1.0 - weight) * hard_part, weights)


def scale_penalty(norms: Iterable[BatchNormBank]) -> Float[Tensor, ""]:
    """Sum of the absolute values of all scales (gamma), private ones of every width included.

    Raises:
        ValueError: there is no norm.
    """
    sizes = [scale.abs().sum() for norm in norms for scale in norm.scales()]
    if not sizes:
        raise ValueError("a network without BatchNorm has no scales to penalise")
    return torch.stack(sizes).sum()


def smoothed_one_hot(
    labels: Int64[Tensor, " batch"], num_classes: int, smoothing: float
) -> Float32[Tensor, "batch {num_classes}"]:
    """Label-smoothed targets [B, C]: (1 - smoothing) on the label plus smoothing / C everywhere."""
    share = smoothing / num_classes
    target = torch.full((len(labels), num_classes), share, device=labels.device)
    return target.scatter_(1, labels[:, None], 1.0 - smoothing + share)
