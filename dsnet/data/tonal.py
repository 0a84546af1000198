"""Tonal operations on whole batches, with a different operation for each image.

All but two operations map pixel values to pixel values: they are one table of 256 entries per image
and channel, applied by one gather. Colour and sharpness blend the image with a second one. Results
equal those of Pillow's `ImageOps` and `ImageEnhance`, in integers, on every device.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

_NUM_VALUES = 256


class Tone(IntEnum):
    """The tonal operations; `randaugment.Operation` begins with the same values."""

    IDENTITY = 0
    AUTOCONTRAST = 1
    EQUALIZE = 2
    SOLARIZE = 3
    POSTERIZE = 4
    CONTRAST = 5
    BRIGHTNESS = 6
    COLOR = 7
    SHARPNESS = 8


@dataclass(frozen=True, eq=False)
class Strength:
    """Strength of the operations that have one."""

    factor: Float32[Tensor, " batch"]
    """float32 [B]: factor of contrast, brightness, colour and sharpness; 1 changes nothing, 0
    removes the property."""
    threshold: int
    """0..256: solarize inverts pixel values from here on."""
    num_bits: int
    """1..8: bits that posterize keeps."""


def adjust(
    images: UInt8[Tensor, "batch channels height width"], tone: Int64[Tensor, " batch"], strength: Strength
) -> UInt8[Tensor, "batch channels height width"]:
    """Apply one operation to each image.

    Args:
        images: uint8 [B, C, H, W].
        tone: int64 [B], values of `Tone`; any other value leaves the image unchanged.
        strength: Strength of the operations.

    Returns:
        uint8 [B, C, H, W].
    """
    luma = _luma(images)
    pixels = _blended(images, luma, tone, strength.factor).flatten(2)
    values = pixels.long()
    tables = _tables(pixels, values, luma, tone, strength)
    return tables.gather(2, values).reshape(images.shape)


def _luma(images: Tensor) -> Tensor:
    """Luminance, int32 [B, 1, H, W].

    ITU-R 601 with Pillow's fixed-point weights for three channels; the mean for any other number of
    channels.
    """
    if images.shape[1] != 3:
        return images.float().mean(1, keepdim=True).round_().int()
    red, green, blue = images.int().split(1, dim=1)
    return (red * 19595 + green * 38470 + blue * 7471 + 32768) >> 16


def _blended(images: Tensor, luma: Tensor, tone: Tensor, factor: Tensor) -> Tensor:
    """Apply colour and sharpness by blending with the grey or the smoothed image."""
    tone, factor = tone[:, None, None, None], factor[:, None, None, None]
    is_color = tone == Tone.COLOR
    other = torch.where(is_color, luma.to(torch.uint8), _smoothed(images))
    factor = torch.where(is_color | (tone == Tone.SHARPNESS), factor, 1.0)
    return _blend(other, images, factor)


def _smoothed(images: Tensor) -> Tensor:
    """Pillow's SMOOTH filter: the 3x3 mean with the centre weighted five times; the outermost
    pixels are unchanged."""
    pixels = images.short()
    rows = pixels[:, :, :-2] + pixels[:, :, 1:-1] + pixels[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * pixels[:, :, 1:-1, 1:-1]
    smoothed = images.clone()
    smoothed[:, :, 1:-1, 1:-1] = (total.float() / 13 + 0.5).to(torch.uint8)
    return smoothed


def _blend(other: Tensor, values: Tensor, factor: Tensor) -> Tensor:
    """other + factor * (values - other), clipped to 0..255 and truncated to uint8 as in Pillow."""
    base = other.float()
    return (base + factor * (values.float() - base)).clamp_(0, 255).to(torch.uint8)


def _tables(pixels: Tensor, values: Tensor, luma: Tensor, tone: Tensor, strength: Strength) -> Tensor:
    """Lookup tables uint8 [B, C, 256]: the new value of each pixel value.

    `pixels` are uint8 [B, C, H * W], `values` the same in int64.
    """
    tone, factor = tone[:, None, None], strength.factor[:, None, None]
    lowest, highest = pixels.amin(2, keepdim=True), pixels.amax(2, keepdim=True)
    identity = torch.arange(_NUM_VALUES, dtype=torch.int32, device=values.device)
    as_bytes = identity.to(torch.uint8)
    mean = (luma.flatten(1).float().mean(1) + 0.5).to(torch.uint8)[:, None, None]
    black = torch.zeros_like(mean)
    tables = as_bytes.expand(*values.shape[:2], -1)
    for which, table in (
        (Tone.AUTOCONTRAST, _autocontrast(lowest.int(), highest.int(), identity)),
        (Tone.EQUALIZE, _equalize(values, highest.long(), identity)),
        (Tone.SOLARIZE, torch.where(identity < strength.threshold, as_bytes, 255 - as_bytes)),
        (Tone.POSTERIZE, as_bytes & (256 - 2 ** (8 - strength.num_bits))),
        (Tone.CONTRAST, _blend(mean, as_bytes, factor)),
        (Tone.BRIGHTNESS, _blend(black, as_bytes, factor)),
    ):
        tables = torch.where(tone == which, table, tables)
    return tables


def _autocontrast(lowest: Tensor, highest: Tensor, identity: Tensor) -> Tensor:
    """Tables that stretch each channel's range to 0..255."""
    span = highest - lowest
    stretched = _floor_divide((identity - lowest) * 255, span)
    return torch.where(span > 0, stretched, identity).clamp_(0, 255).to(torch.uint8)


def _equalize(values: Tensor, highest: Tensor, identity: Tensor) -> Tensor:
    """Tables that equalise each channel's histogram."""
    one = torch.ones((), dtype=torch.int32, device=values.device)
    counts = torch.zeros((*values.shape[:2], _NUM_VALUES), dtype=torch.int32, device=values.device)
    counts.scatter_add_(2, values, one.expand_as(values))
    num_brightest = counts.gather(2, highest)
    step = (values.shape[2] - num_brightest) // 255
    num_below = counts.cumsum(2, dtype=torch.int32) - counts
    spread = _floor_divide(step // 2 + num_below, step)
    return torch.where(step > 0, spread, identity).clamp_(0, 255).to(torch.uint8)


def _floor_divide(number: Tensor, divisor: Tensor) -> Tensor:
    """number / divisor rounded down; a divisor of 0 counts as 1."""
    return torch.div(number, divisor.clamp(min=1), rounding_mode="floor")
