"""Sizes of images: the side of a square, or height and width.

A square always has a number as its size, so that what is stored about squares, and the keys and
digests made of it, do not depend on how the size was written. This module needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence

ImageSize = int | tuple[int, int]
"""Side of a square in pixels, or (height, width) with two different numbers; `normal_size` makes
one."""


def normal_size(size: int | Sequence[int]) -> ImageSize:
    """The normal form of a size: a number for a square, else (height, width).

    Args:
        size: a number, or height and width.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(size, int):
        return size
    if isinstance(size, str) or len(size) != 2 or not all(isinstance(side, int) for side in size):
        raise ValueError(f"image_size is {size!r}, but must be a number of pixels, or height and width")
    return image_size_of(size)


def image_size_of(shape: Sequence[int]) -> ImageSize:
    """The size of images or features of a shape (..., height, width)."""
    height, width = shape[-2:]
    return height if height == width else (height, width)


def height_and_width(size: ImageSize) -> tuple[int, int]:
    """Height and width in pixels."""
    return (size, size) if isinstance(size, int) else size


def shorter_side(size: ImageSize) -> int:
    """The smaller one of height and width, in pixels."""
    return min(height_and_width(size))


def size_in_words(size: ImageSize) -> str:
    """The size for a message: `32 x 32 pixels`, or `32 x 64 pixels (height x width)`."""
    height, width = height_and_width(size)
    return f"{height} x {width} pixels" + ("" if height == width else " (height x width)")
