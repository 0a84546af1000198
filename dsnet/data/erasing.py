"""Random erasing (arXiv 1708.04896) of whole batches: rectangles of random pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

from dsnet.data.boxes import Boxes, draw_boxes, fit_boxes

ERASED_AREAS = (0.02, 0.33)
ERASED_ASPECTS = (0.3, 3.3)


@dataclass(frozen=True, eq=False)
class ErasingDraw:
    """Random decisions of random erasing for each of B images."""

    is_erased: Bool[Tensor, " batch"]
    """bool [B]: the images that get a rectangle."""
    boxes: Boxes
    noise: UInt8[Tensor, "batch channels height width"]
    """uint8 [B, C, H, W]: the random pixels to fill in, the filling that the paper found best."""


def draw_erasing(
    images: UInt8[Tensor, "batch channels height width"], generator: torch.Generator, probability: float
) -> ErasingDraw:
    """Draw random erasing for one batch [B, C, H, W]; the generator is on the images' device."""
    num_images, _, height, width = images.shape
    is_chosen = torch.rand(num_images, generator=generator, device=images.device) < probability
    boxes, is_found = fit_boxes(draw_boxes(num_images, generator), (height, width), ERASED_AREAS, ERASED_ASPECTS)
    noise = torch.empty(images.shape, dtype=torch.uint8, device=images.device).random_(0, 256, generator=generator)
    return ErasingDraw(is_chosen & is_found, boxes, noise)


def erase(
    images: UInt8[Tensor, "batch channels height width"], draw: ErasingDraw
) -> UInt8[Tensor, "batch channels height width"]:
    """Replace the pixels inside each erased image's rectangle, uint8 [B, C, H, W]."""
    y = torch.arange(images.shape[2], device=images.device)
    x = torch.arange(images.shape[3], device=images.device)
    boxes = draw.boxes
    in_rows = (y >= boxes.top[:, None]) & (y < (boxes.top + boxes.height)[:, None])
    in_columns = (x >= boxes.left[:, None]) & (x < (boxes.left + boxes.width)[:, None])
    is_hidden = in_rows[:, :, None] & in_columns[:, None, :] & draw.is_erased[:, None, None]
    return torch.where(is_hidden[:, None], draw.noise, images)
