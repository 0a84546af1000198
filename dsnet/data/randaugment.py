"""RandAugment-style augmentation of whole batches: each image gets a few random operations of one
common magnitude.

The operations and the two parameters (number of operations, magnitude) are those of RandAugment
(arXiv 1909.13719). Ours: the geometric operations of an image are composed into one resampling,
before its tonal operations, which keep their order; shears are relative to the centre; pixels from
outside the image are middle grey, so that they do not widen the range that autocontrast stretches;
enhancements and geometric operations have either sign with probability 1/2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from dsnet.data.settings import MAX_MAGNITUDE
from dsnet.data.tonal import Strength, Tone, adjust

MAX_ROTATION = 30.0  # degrees; this and the next constants hold at magnitude 10
MAX_SHEAR = 0.3
MAX_TRANSLATION = 0.45  # relative to the image's side
MAX_ENHANCEMENT = 0.9
FEWEST_BITS = 4
FILL = 128
_CPU_CHUNK = 2**20  # pixel values per chunk on a CPU, so that a chunk fits its caches (3x faster at 224 px)


class Operation(IntEnum):
    """The operations that may be drawn for an image, each with the same probability."""

    IDENTITY = Tone.IDENTITY
    AUTOCONTRAST = Tone.AUTOCONTRAST
    EQUALIZE = Tone.EQUALIZE
    SOLARIZE = Tone.SOLARIZE
    POSTERIZE = Tone.POSTERIZE
    CONTRAST = Tone.CONTRAST
    BRIGHTNESS = Tone.BRIGHTNESS
    COLOR = Tone.COLOR
    SHARPNESS = Tone.SHARPNESS
    ROTATE = 9
    SHEAR_X = 10
    SHEAR_Y = 11
    TRANSLATE_X = 12
    TRANSLATE_Y = 13


@dataclass(frozen=True, eq=False)
class RandAugmentDraw:
    """Random decisions for each of B images with N operations each."""

    operation: Int64[Tensor, "batch operations"]
    """int64 [B, N], values of `Operation`, in the order in which they apply."""
    sign: Float32[Tensor, "batch operations"]
    """float32 [B, N], -1 or 1: the direction of an operation that has two."""


def draw_randaugment(
    images: UInt8[Tensor, "batch channels height width"], generator: torch.Generator, num_operations: int
) -> RandAugmentDraw:
    """Draw the operations of one batch [B, C, H, W]; the generator is on the images' device."""
    shape = (len(images), num_operations)
    operation = torch.randint(len(Operation), shape, generator=generator, device=images.device)
    sign = torch.randint(2, shape, generator=generator, device=images.device) * 2.0 - 1.0
    return RandAugmentDraw(operation, sign)


def apply_randaugment(
    images: UInt8[Tensor, "batch channels height width"], draw: RandAugmentDraw, magnitude: float
) -> UInt8[Tensor, "batch channels height width"]:
    """Apply the drawn operations.

    Args:
        images: uint8 [B, C, H, W].
        draw: The operations of each image.
        magnitude: 0..10; at 0 only autocontrast and equalize have an effect.

    Returns:
        uint8 [B, C, H, W].
    """
    share = magnitude / MAX_MAGNITUDE
    num_parts = 1 if images.device.type != "cpu" else min(len(images), math.ceil(images.numel() / _CPU_CHUNK))
    parts = (tensor.tensor_split(max(1, num_parts)) for tensor in (images, draw.operation, draw.sign))
    return torch.cat([_apply(part, RandAugmentDraw(*drawn), share) for part, *drawn in zip(*parts, strict=True)])


def _apply(images: Tensor, draw: RandAugmentDraw, share: float) -> Tensor:
    images = _move(images, *affine_maps(draw, share, images.shape[2:]))
    threshold, num_bits = round(256 * (1 - share)), 8 - round(share * (8 - FEWEST_BITS))
    for tone, sign in zip(draw.operation.unbind(1), draw.sign.unbind(1), strict=True):
        images = adjust(images, tone, Strength(1 + MAX_ENHANCEMENT * share * sign, threshold, num_bits))
    return images


def affine_maps(
    draw: RandAugmentDraw, share: float, size: torch.Size
) -> tuple[Float32[Tensor, "batch 2 2"], Float32[Tensor, "batch 2"]]:
    """Compose each image's geometric operations into an affine map from output to source.

    Args:
        draw: The operations of each image.
        share: Magnitude relative to the greatest, 0..1.
        size: Height and width in pixels.

    Returns:
        matrix [B, 2, 2] and offset [B, 2], float32: the pixel at p = (x, y), counted from the
        image's centre, is taken from matrix @ p + offset.
    """

    def amount(which: Operation, greatest: float) -> Tensor:
        return torch.where(draw.operation == which, share * greatest * draw.sign, 0.0)

    angle = amount(Operation.ROTATE, math.radians(MAX_ROTATION))
    across = torch.stack((angle.cos(), amount(Operation.SHEAR_X, MAX_SHEAR) - angle.sin()), -1)
    down = torch.stack((amount(Operation.SHEAR_Y, MAX_SHEAR) + angle.sin(), angle.cos()), -1)
    matrices = torch.stack((across, down), -2)  # [B, N, 2, 2]
    height, width = size
    moves = torch.stack(
        (
            amount(Operation.TRANSLATE_X, MAX_TRANSLATION * width),
            amount(Operation.TRANSLATE_Y, MAX_TRANSLATION * height),
        ),
        -1,
    )
    matrix, offset = matrices[:, 0], moves[:, 0]
    for number in range(1, matrices.shape[1]):  # a later operation reads the result of the earlier ones
        offset = offset + (matrix * moves[:, number, None]).sum(-1)
        matrix = matrix @ matrices[:, number]
    return matrix, offset


def _move(images: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
    """Resample each image by its affine map, nearest neighbour; grey outside the source."""
    num_images, channels, height, width = images.shape
    y = torch.arange(height, device=images.device)[:, None] + (0.5 - height / 2)
    x = torch.arange(width, device=images.device) + (0.5 - width / 2)
    matrix, offset = matrix[..., None, None], offset[..., None, None]
    columns = (matrix[:, 0, 0] * x + matrix[:, 0, 1] * y + (offset[:, 0] + width / 2)).floor_().long()
    rows = (matrix[:, 1, 0] * x + matrix[:, 1, 1] * y + (offset[:, 1] + height / 2)).floor_().long()
    is_inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    source = rows.clamp_(0, height - 1) * width + columns.clamp_(0, width - 1)
    index = source.reshape(num_images, 1, height * width).expand(-1, channels, -1)
    moved = images.flatten(2).gather(2, index).reshape(images.shape)
    return torch.where(is_inside[:, None], moved, FILL)
