"""Augmentation of whole batches on their own device: crop, mirroring, RandAugment style, cutout,
random erasing.

Nothing here synchronises with the device or processes images one by one. Drawing and applying are
separate functions, so that a draw can be inspected, repeated, and checked image by image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64, Real
from torch import Tensor

from dsnet.data.boxes import BoxDraw, draw_boxes
from dsnet.data.erasing import ErasingDraw, draw_erasing, erase
from dsnet.data.randaugment import RandAugmentDraw, apply_randaugment, draw_randaugment
from dsnet.data.resized_crop import crop_boxes, resize_crops
from dsnet.data.settings import Augmentation


@dataclass(frozen=True, eq=False)
class AugmentationDraw:
    """Random decisions for each of B images; all tensors are [B]. None: the operation is off."""

    top: Int64[Tensor, " batch"]
    """int64: first row of the crop in the padded image, 0..2 * crop_padding."""
    left: Int64[Tensor, " batch"]
    """int64: first column of the crop."""
    is_flipped: Bool[Tensor, " batch"]
    """bool: whether the image is mirrored."""
    cutout_row: Int64[Tensor, " batch"]
    """int64: centre of the cutout in the finished image, 0..H - 1."""
    cutout_column: Int64[Tensor, " batch"]
    """int64: its column, 0..W - 1."""
    crop: BoxDraw | None = None
    """The random resized crop."""
    randaugment: RandAugmentDraw | None = None
    erasing: ErasingDraw | None = None


def augment(
    images: Real[Tensor, "batch channels height width"], generator: torch.Generator, augmentation: Augmentation
) -> Real[Tensor, "batch channels height width"]:
    """Augment each image of a batch independently.

    Padding and cutout insert zeros: black in uint8 pixels, the data's mean in normalised images.

    Args:
        images: [B, C, H, W], uint8; also float where only padding, mirroring and cutout are on.
        generator: Random generator on the images' device. The same state gives the same result.
        augmentation: The settings.

    Returns:
        A new tensor of the same shape, type and device.
    """
    return apply_augmentation(images, draw_augmentation(images, generator, augmentation), augmentation)


def draw_augmentation(
    images: Real[Tensor, "batch channels height width"], generator: torch.Generator, augmentation: Augmentation
) -> AugmentationDraw:
    """Draw the random numbers for one batch [B, C, H, W].

    The numbers of crop, mirroring and cutout are always drawn, so that switching one of these off
    does not change the others' numbers. Resized crop, RandAugment-style operations and erasing draw
    afterwards, in this order, if on.

    Raises:
        ValueError: An operation is on that needs uint8, and the images are not.
    """
    if augmentation.needs_bytes and images.dtype != torch.uint8:
        raise ValueError(f"resized crops, RandAugment-style operations and erasing need uint8, not {images.dtype}")
    num_images, _, height, width = images.shape

    def draw(high: int) -> Tensor:
        return torch.randint(high, (num_images,), generator=generator, device=images.device)

    positions = 2 * augmentation.crop_padding + 1
    top, left, is_flipped = draw(positions), draw(positions), draw(2).bool()
    cutout_row, cutout_column = draw(height), draw(width)
    crop = draw_boxes(num_images, generator) if augmentation.crop_scale is not None else None
    operations = augmentation.randaugment_ops
    randaugment = draw_randaugment(images, generator, operations) if operations > 0 else None
    erasing = draw_erasing(images, generator, augmentation.erasing) if augmentation.erasing > 0 else None
    return AugmentationDraw(top, left, is_flipped, cutout_row, cutout_column, crop, randaugment, erasing)


def apply_augmentation(
    images: Real[Tensor, "batch channels height width"], draw: AugmentationDraw, augmentation: Augmentation
) -> Real[Tensor, "batch channels height width"]:
    """Apply what was drawn to a whole batch [B, C, H, W].

    In this order: resized crop, padded crop and mirroring, RandAugment-style operations, cutout,
    random erasing.
    """
    if draw.crop is not None and augmentation.crop_scale is not None:
        height, width = images.shape[2:]
        boxes = crop_boxes(draw.crop, (height, width), augmentation.crop_scale, width / height)
        images = resize_crops(images, boxes)
    images = _crop_and_mirror(images, draw, augmentation)
    if draw.randaugment is not None:
        images = apply_randaugment(images, draw.randaugment, augmentation.randaugment_magnitude)
    if augmentation.cutout > 0:
        images = images * ~_cutout(images, draw, augmentation.cutout)
    return images if draw.erasing is None else erase(images, draw.erasing)


def _crop_and_mirror(images: Tensor, draw: AugmentationDraw, augmentation: Augmentation) -> Tensor:
    """Padded crop and mirroring, by one gather for the whole batch."""
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
    source = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
    index = source.reshape(num_images, 1, height * width).expand(-1, channels, -1)
    gathered = images.reshape(num_images, channels, height * width).gather(2, index)
    return gathered.reshape(images.shape) * is_kept[:, None].to(images.dtype)


def _mirror(index: Tensor, size: int) -> Tensor:
    """Reflect positions at 0 and size - 1 without repeating the edge pixel; for -size < index < 2 *
    size - 1."""
    return (size - 1) - ((size - 1) - index.abs()).abs()


def _cutout(images: Tensor, draw: AugmentationDraw, side: int) -> Tensor:
    """bool [B, 1, H, W]: the pixels inside each image's square."""
    y = torch.arange(images.shape[2], device=images.device)
    x = torch.arange(images.shape[3], device=images.device)
    first_row, first_column = draw.cutout_row[:, None] - side // 2, draw.cutout_column[:, None] - side // 2
    in_rows = (y >= first_row) & (y < first_row + side)
    in_columns = (x >= first_column) & (x < first_column + side)
    return (in_rows[:, :, None] & in_columns[:, None, :])[:, None]
