"""Augmentation of whole batches on their own device: crop, mirroring, RandAugment style, cutout,
random erasing.

Nothing here synchronises with the device or processes images one by one. Drawing and applying are
separate functions, so that a draw can be inspected, repeated, and checked image by image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Int64, Real
from torch import Tensor

from dsnet.data.boxes import BoxDraw, draw_boxes
from dsnet.data.erasing import ErasingDraw, draw_erasing, erase
from dsnet.data.randaugment import MAX_MAGNITUDE, Operation, RandAugmentDraw, apply_randaugment, draw_randaugment
from dsnet.data.resized_crop import crop_boxes, resize_crops
from dsnet.errors import ConfigError

MAX_OPERATIONS = len(Operation)
"""Largest `randaugment_ops`: the number of different operations. More would destroy the image and
cost memory and time."""


class DescribedImages(Protocol):
    """Properties of a data set that determine an augmentation's defaults, as of an `ImageSet`."""

    @property
    def name(self) -> str:
        """The data set's registered name."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""


@dataclass(frozen=True)
class Augmentation:
    """Settings of the augmentation of training images; the defaults switch everything off."""

    crop_padding: int = 0
    """Pixels by which the image is padded on each side before a crop of its own size is cut out at
    random: mirrored at the edge, or with zeros where the padding reaches the image's size."""
    flip: bool = False
    """Mirror left and right with probability 1/2."""
    cutout: int = 0
    """Side in pixels of a square of zeros around a random pixel, clipped at the edges (DeVries &
    Taylor, 2017)."""

    randaugment_ops: int = 0
    """Number of operations per image (see `dsnet.data.randaugment`, after arXiv 1909.13719), 0..14;
    0 = none."""
    randaugment_magnitude: float = 9.0
    """Common magnitude of these operations, 0..10."""
    erasing: float = 0.0
    """Probability, 0..1, that a rectangle of 2 to 33 % of the image becomes random pixels (arXiv
    1708.04896)."""
    crop_scale: tuple[float, float] | None = None
    """Smallest and largest area of a random resized crop as shares of the image, 0 < smallest <=
    largest <= 1. None = no such crop, but (0.08, 1) for images that are streamed from files.
    Aspects are 3:4 to 4:3."""

    def __post_init__(self) -> None:
        _check_range("crop_padding", self.crop_padding, 0)
        _check_range("cutout", self.cutout, 0)
        _check_range("randaugment_ops", self.randaugment_ops, 0, MAX_OPERATIONS)
        _check_range("randaugment_magnitude", self.randaugment_magnitude, 0, MAX_MAGNITUDE)
        _check_range("erasing", self.erasing, 0, 1)
        if self.crop_scale is None:
            return
        object.__setattr__(self, "crop_scale", tuple(self.crop_scale))  # a list where it comes from JSON
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ConfigError(
                f"data.augment.crop_scale is {list(self.crop_scale)}, must be two shares of the image's area, "
                "0 < least <= greatest <= 1"
            )
        if self.crop_padding > 0:
            raise ConfigError(
                f"data.augment.crop_padding is {self.crop_padding} beside crop_scale {list(self.crop_scale)}: "
                "both crop; set crop_padding to 0 or crop_scale to null"
            )

    @classmethod
    def for_images(
        cls,
        images: DescribedImages,
        crop_padding: int | None = None,
        flip: bool | None = None,
        cutout: int = 0,
        **others: Any,
    ) -> Augmentation:
        """An augmentation with the defaults for a data set filled in.

        Args:
            images: The data set.
            crop_padding: None: an eighth of the image's width, or 0 where `crop_scale` is given.
            flip: None: True, except for digits.
            cutout: As the field.
            others: The other fields.

        Raises:
            ConfigError: A field is out of its range, or padding or cutout exceeds the image's side.
        """
        side = min(images.image_shape[1:])
        for name, pixels in (("crop_padding", crop_padding or 0), ("cutout", cutout)):
            if pixels > side:
                raise ConfigError(
                    f"data.augment.{name} is {pixels}, but the images of {images.name} have {side} pixels a side: write less"
                )
        if crop_padding is None:
            crop_padding = images.image_shape[-1] // 8 if others.get("crop_scale") is None else 0
        if flip is None:
            flip = images.name != "digits"  # a mirrored 2 is not a 2
        return cls(crop_padding, flip, cutout, **others)

    @property
    def needs_bytes(self) -> bool:
        """Whether an operation is on that requires pixel values 0..255."""
        return self.randaugment_ops > 0 or self.erasing > 0 or self.crop_scale is not None


def _check_range(name: str, value: float, lowest: float, highest: float | None = None) -> None:
    if value < lowest or (highest is not None and value > highest):
        rule = f">= {lowest}" if highest is None else f"{lowest}..{highest:g}"
        raise ConfigError(f"data.augment.{name} is {value}, must be {rule}")


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
        images = resize_crops(
            images, crop_boxes(draw.crop, (images.shape[2], images.shape[3]), augmentation.crop_scale)
        )
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
