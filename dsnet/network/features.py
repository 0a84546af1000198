"""Features of any shape: images of channels [B, c, H, W], tokens [B, T, c] and vectors [B, c].

Tokens have their channels last, as in a transformer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor


def channel_axis(features: Float[Tensor, "batch ..."]) -> int:
    """The dimension of the channels.

    Raises:
        ValueError: the features have none of the known shapes.
    """
    match features.ndim:
        case 2 | 4:
            return 1
        case 3:
            return 2
    raise ValueError(
        "features at a gate must be [batch, channels, height, width], [batch, tokens, channels] or [batch, channels], "
        f"but are {list(features.shape)}"
    )


def channel_means(features: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch channels"]:
    """[B, c]: the mean of each channel over all positions."""
    positions = _positions(features)
    return features.mean(positions) if positions else features


def channel_deviations(features: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch channels"]:
    """[B, c]: the standard deviation of each channel over all positions; 0 for vectors."""
    positions = _positions(features)
    return features.var(positions, correction=0).sqrt() if positions else torch.zeros_like(features)


def channel_maxima(features: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch channels"]:
    """[B, c]: the maximum of each channel over all positions."""
    positions = _positions(features)
    return features.amax(positions) if positions else features


def _positions(features: Tensor) -> tuple[int, ...]:
    """The dimensions of the positions of an image."""
    channels = channel_axis(features)
    return tuple(dimension for dimension in range(1, features.ndim) if dimension != channels)


def padded(features: Float[Tensor, "batch ..."], size: int) -> Float[Tensor, "batch ..."]:
    """The features with zero channels at the end, `size` channels together."""
    missing = size - features.shape[channel_axis(features)]
    behind = features.ndim - 1 - channel_axis(features)
    return F.pad(features, (*(0, 0) * behind, 0, missing))


def spread(
    features: Float[Tensor, "batch ..."], places: Int64[Tensor, " channels"], size: int
) -> Float[Tensor, "batch ..."]:
    """The features with their channels at the given places of `size` channels; the others are
    zero."""
    axis = channel_axis(features)
    whole = features.new_zeros([size if each == axis else old for each, old in enumerate(features.shape)])
    return whole.index_copy(axis, places, features)
