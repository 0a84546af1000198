"""Random crop, mirror image and cutout for whole batches, on the device where the batch lies.

Drawing and applying are two functions: what was drawn can be looked at, repeated, and checked image by image.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dsnet.data.images import ImageSet
from dsnet.errors import ConfigError


@dataclass(frozen=True)
class Augmentation:
    """What may be done to a training image; the default does nothing."""

    crop_padding: int = 0
    """Pixels by which the image is padded on each side before a crop of its own size is cut out at random: mirrored at
    the edge, or with zeros where the padding reaches the image's size."""
    flip: bool = False
    """Mirror left and right with probability 1/2."""
    cutout: int = 0
    """Side in pixels of a square of zeros around a random pixel, clipped at the edges (DeVries & Taylor, 2017)."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value < 0:
                raise ConfigError(f"data.augment.{field.name} is {value}, must be >= 0")

    @classmethod
    def for_images(
        cls, image_set: ImageSet, crop_padding: int | None = None, flip: bool | None = None, cutout: int = 0
    ) -> Augmentation:
        """Fill in the defaults: an eighth of the image's size of padding, and mirroring except for digits."""
        if crop_padding is None:
            crop_padding = image_set.image_shape[-1] // 8
        if flip is None:
            flip = image_set.name != "digits"  # a mirrored 2 is no 2
        return cls(crop_padding, flip, cutout)


@dataclass(frozen=True, eq=False)
class AugmentationDraw:
    """What chance decided for each of B images; all tensors [B]."""

    top: Tensor
    """int64: first row of the crop in the padded image, 0..2 * crop_padding."""
    left: Tensor
    """int64: first column of the crop."""
    is_flipped: Tensor
    """bool."""
    cutout_row: Tensor
    """int64: centre of the cutout in the finished image, 0..H - 1."""
    cutout_column: Tensor
    """int64: 0..W - 1."""


def augment(images: Tensor, generator: torch.Generator, augmentation: Augmentation) -> Tensor:
    """Augment each image of a batch on its own.

    Padding and cutout put zeros in: black for uint8 pixels, the data's mean after normalisation.

    Args:
        images: [B, C, H, W], uint8 or float.
        generator: On the images' device. The same state gives the same result.
        augmentation: What may be done.

    Returns:
        A new tensor of the same shape, type and device.
    """
    return apply_augmentation(images, draw_augmentation(images, generator, augmentation), augmentation)


def draw_augmentation(images: Tensor, generator: torch.Generator, augmentation: Augmentation) -> AugmentationDraw:
    """Draw the numbers for one batch [B, C, H, W].

    The same five are always drawn, so that switching one operation off leaves the others' numbers as they were.
    """
    num_images, _, height, width = images.shape

    def draw(high: int) -> Tensor:
        return torch.randint(high, (num_images,), generator=generator, device=images.device)

    positions = 2 * augmentation.crop_padding + 1
    return AugmentationDraw(draw(positions), draw(positions), draw(2).bool(), draw(height), draw(width))


def apply_augmentation(images: Tensor, draw: AugmentationDraw, augmentation: Augmentation) -> Tensor:
    """Crop, then mirror, then cut out, as drawn; one gather for the whole batch [B, C, H, W]."""
    num_images, channels, height, width = images.shape
    padding = augmentation.crop_padding
    y = torch.arange(height, device=images.device)
    x = torch.arange(width, device=images.device)

    columns = x.expand(num_images, width)
    if augmentation.flip:
        columns = torch.where(draw.is_flipped[:, None], width - 1 - x, columns)
    rows = y + (draw.top[:, None] - padding)  # [B, H]: where each pixel comes from; outside 0..H-1 is padding
    columns = columns + (draw.left[:, None] - padding)

    if padding < min(height, width):
        rows, columns = _mirror(rows, height), _mirror(columns, width)
    is_kept = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    if augmentation.cutout > 0:
        is_kept &= ~_cutout(draw, augmentation.cutout, y, x)

    source = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
    index = source.reshape(num_images, 1, height * width).expand(-1, channels, -1)
    gathered = images.reshape(num_images, channels, height * width).gather(2, index)
    return gathered.reshape(images.shape) * is_kept[:, None].to(images.dtype)


def _mirror(index: Tensor, size: int) -> Tensor:
    """Reflect positions at 0 and size - 1, the edge pixel itself not repeated; for -size < index < 2 * size - 1."""
    return (size - 1) - ((size - 1) - index.abs()).abs()


def _cutout(draw: AugmentationDraw, side: int, y: Tensor, x: Tensor) -> Tensor:
    """bool [B, H, W]: the pixels inside each image's square."""
    first_row, first_column = draw.cutout_row[:, None] - side // 2, draw.cutout_column[:, None] - side // 2
    in_rows = (y >= first_row) & (y < first_row + side)
    in_columns = (x >= first_column) & (x < first_column + side)
    return in_rows[:, :, None] & in_columns[:, None, :]
