"""Random resized crops (arXiv 1409.4842): crops of random area and aspect, resized."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import UInt8
from torch import Tensor

from dsnet.data.boxes import BoxDraw, Boxes, fit_boxes

CROP_SCALE = (0.08, 1.0)
"""The published range of the crop's area as a share of the image."""
CROP_ASPECTS = (3 / 4, 4 / 3)
"""Published range of the crop's width / height, for a result that is a square; of another result,
the range is multiplied by its own width / height."""


def crop_boxes(draw: BoxDraw, size: tuple[int, int], scale: Sequence[float], aspect: float = 1.0) -> Boxes:
    """The crops of B images of one size.

    Where no attempt fits inside the image, the largest centred crop with an allowed aspect is
    taken.

    Args:
        draw: The random numbers of B images.
        size: Height and width of every image in pixels.
        scale: Smallest and largest area as shares of the image.
        aspect: Width / height of what the crops are resized to, so that they are distorted by no
            more than 4/3.
    """
    narrowest, widest = (aspect * each for each in CROP_ASPECTS)
    boxes, is_found = fit_boxes(draw, size, scale, (narrowest, widest))
    height, width = size
    whole_height = min(height, max(1, round(width / narrowest)))
    whole_width = min(width, max(1, round(height * widest)))
    return Boxes(
        torch.where(is_found, boxes.top, (height - whole_height) // 2),
        torch.where(is_found, boxes.left, (width - whole_width) // 2),
        torch.where(is_found, boxes.height, whole_height),
        torch.where(is_found, boxes.width, whole_width),
    )


def resize_crops(
    images: UInt8[Tensor, "batch channels height width"], boxes: Boxes
) -> UInt8[Tensor, "batch channels height width"]:
    """Cut each image's box out and enlarge it to the image's size, bilinear.

    Rows and columns are interpolated by two batched matrix products; pixels outside the box have
    weight 0.

    Args:
        images: uint8 [B, C, H, W].
        boxes: One box per image, inside the image.

    Returns:
        uint8 [B, C, H, W].
    """
    height, width = images.shape[2:]
    rows = _weights(boxes.top, boxes.height, height)
    columns = _weights(boxes.left, boxes.width, width)
    enlarged = rows[:, None] @ images.float() @ columns.transpose(1, 2)[:, None]
    return enlarged.round_().clamp_(0, 255).to(torch.uint8)


def _weights(first: Tensor, length: Tensor, size: int) -> Tensor:
    """Interpolation weights along one axis, float32 [B, size (output), size (input)]."""
    positions = torch.arange(size, device=first.device)
    source = (positions + 0.5) * (length / size)[:, None] - 0.5
    source = torch.minimum(source.clamp(min=0), (length - 1)[:, None]) + first[:, None]
    return (1 - (source[:, :, None] - positions).abs()).clamp(min=0)
