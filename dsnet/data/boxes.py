"""Random rectangles inside images, drawn for a whole batch: resized crops and random erasing both need them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_ATTEMPTS = 10


@dataclass(frozen=True, eq=False)
class BoxDraw:
    """Uniform numbers in [0, 1) for one rectangle in each of B images; the images' sizes need not be known yet."""

    area: Tensor
    """float32 [B, NUM_ATTEMPTS]: where in the range of areas each attempt lies."""
    aspect: Tensor
    """float32 [B, NUM_ATTEMPTS]: where in the range of aspects, on a logarithmic scale."""
    top: Tensor
    """float32 [B]: where between the highest and the lowest place."""
    left: Tensor
    """float32 [B]."""

    def __getitem__(self, image: int) -> BoxDraw:
        """The draw of one image, as a batch of one."""
        rows = slice(image, image + 1)
        return BoxDraw(self.area[rows], self.aspect[rows], self.top[rows], self.left[rows])


@dataclass(frozen=True, eq=False)
class Boxes:
    """A rectangle in each of B images, in pixels; all tensors int64 [B]."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor


def draw_boxes(num_images: int, generator: torch.Generator) -> BoxDraw:
    """Draw the numbers for `num_images` rectangles on the generator's device."""

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=generator.device)

    return BoxDraw(draw(num_images, NUM_ATTEMPTS), draw(num_images, NUM_ATTEMPTS), draw(num_images), draw(num_images))


def fit_boxes(
    draw: BoxDraw, size: tuple[int, int], areas: tuple[float, float], aspects: tuple[float, float]
) -> tuple[Boxes, Tensor]:
    """For each image the first attempt that lies inside it.

    The published samplers (arXiv 1409.4842, 1708.04896) try again until a rectangle fits; here a fixed number of
    attempts is drawn at once, so that nothing waits for the device.

    Args:
        draw: The numbers of B images.
        size: Height and width of every image in pixels.
        areas: Least and greatest area as shares of the image, 0..1.
        aspects: Least and greatest width / height, > 0; drawn evenly on a logarithmic scale.

    Returns:
        The rectangles, and bool [B]: whether any attempt fitted. Where none did the rectangle means nothing.
    """
    height, width = size
    area = height * width * (areas[0] + (areas[1] - areas[0]) * draw.area)
    low, high = math.log(aspects[0]), math.log(aspects[1])
    aspect = torch.exp(low + (high - low) * draw.aspect)
    heights, widths = (area / aspect).sqrt().round().long(), (area * aspect).sqrt().round().long()
    fits = (heights >= 1) & (heights <= height) & (widths >= 1) & (widths <= width)
    attempts = torch.arange(NUM_ATTEMPTS, device=fits.device)
    first = torch.where(fits, attempts, NUM_ATTEMPTS).amin(1)
    chosen = first.clamp(max=NUM_ATTEMPTS - 1)[:, None]
    box_height, box_width = heights.gather(1, chosen)[:, 0], widths.gather(1, chosen)[:, 0]
    top, left = _place(draw.top, height - box_height), _place(draw.left, width - box_width)
    return Boxes(top, left, box_height, box_width), first < NUM_ATTEMPTS


def _place(share: Tensor, room: Tensor) -> Tensor:
    """One of the places 0..room, all equally likely."""
    return torch.minimum((share * (room + 1)).long(), room).clamp(min=0)
