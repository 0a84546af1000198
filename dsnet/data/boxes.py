"""Random rectangles for whole batches of images, for resized crops and random erasing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

NUM_ATTEMPTS = 10


@dataclass(frozen=True, eq=False)
class BoxDraw:
    """Uniform random numbers in [0, 1) for one rectangle in each of B images, independent of the
    images' sizes."""

    area: Float32[Tensor, "batch attempts"]
    """float32 [B, NUM_ATTEMPTS]: relative position of each attempt in the range of areas."""
    aspect: Float32[Tensor, "batch attempts"]
    """float32 [B, NUM_ATTEMPTS]: relative position in the range of aspect ratios, on a logarithmic
    scale."""
    top: Float32[Tensor, " batch"]
    """float32 [B]: relative position between the highest and the lowest possible place."""
    left: Float32[Tensor, " batch"]
    """float32 [B]: relative position between the leftmost and the rightmost possible place."""

    def __getitem__(self, image: int) -> BoxDraw:
        """The draw of one image, as a batch of one."""
        rows = slice(image, image + 1)
        return BoxDraw(self.area[rows], self.aspect[rows], self.top[rows], self.left[rows])


@dataclass(frozen=True, eq=False)
class Boxes:
    """A rectangle in each of B images, in pixels; all tensors int64 [B]."""

    top: Int64[Tensor, " batch"]
    left: Int64[Tensor, " batch"]
    height: Int64[Tensor, " batch"]
    width: Int64[Tensor, " batch"]


def draw_boxes(num_images: int, generator: torch.Generator) -> BoxDraw:
    """Draw the numbers for `num_images` rectangles on the generator's device."""

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=generator.device)

    return BoxDraw(draw(num_images, NUM_ATTEMPTS), draw(num_images, NUM_ATTEMPTS), draw(num_images), draw(num_images))


def fit_boxes(
    draw: BoxDraw, size: tuple[int, int], areas: Sequence[float], aspects: tuple[float, float]
) -> tuple[Boxes, Bool[Tensor, " batch"]]:
    """Choose for each image the first attempted rectangle that fits inside it.

    The published samplers (arXiv 1409.4842, 1708.04896) try again until a rectangle fits; here a
    fixed number of attempts is drawn at once, which needs no synchronisation with the device.

    Args:
        draw: The random numbers of B images.
        size: Height and width of every image in pixels.
        areas: Smallest and largest area as shares of the image, 0..1.
        aspects: Smallest and largest width / height, > 0; uniform on a logarithmic scale.

    Returns:
        The rectangles, and bool [B]: whether any attempt fitted; where none did, the rectangle is
        meaningless.
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
    """Map uniform numbers in [0, 1) to the integers 0..room, all equally likely."""
    return torch.minimum((share * (room + 1)).long(), room).clamp(min=0)
