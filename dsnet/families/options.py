"""Helpers for the options of families: scaling of widths, sizes of kernels, checks of values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from dsnet.image_size import ImageSize, shorter_side, size_in_words

MAX_WIDTH = 65536
"""Largest width that a user may set, so that a typing error is reported before it exhausts the
memory."""
COMBINE = ("tied", "all")
"""How widths and sizes of kernels are combined: `tied`: the wider a sub-network, the larger its
kernels; `all`: every width with every size."""


def scaled_widths(widths: Sequence[float], factor: float, way_out: str) -> tuple[int, ...]:
    """Widths times `factor`, each rounded to the nearest multiple of 4 (at least 4).

    Raises:
        ValueError: the results do not rise strictly; `way_out` says in the message what to change.
    """
    scaled = tuple(max(4, 4 * round(width * factor / 4)) for width in widths)
    if any(right <= left for left, right in pairwise(scaled)):
        raise ValueError(f"width {factor} makes neighbouring widths equal ({list(scaled)}); {way_out}")
    return scaled


def check_number(name: str, value: Any, low: float, high: float) -> None:
    """Raise ValueError if an option is not a number in low..high (a bool is not a number)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}, but must be a number in {low}..{high}")


def check_choice(name: str, value: Any, known: Sequence[Any]) -> None:
    """Raise ValueError if an option is not one of the known values."""
    if isinstance(value, bool) or value not in known:
        raise ValueError(f"{name} is {value!r}, but must be {' or '.join(map(repr, known))}")


def is_integer(value: Any, low: int, high: int) -> bool:
    """Whether a value is an integer in low..high (a bool is not an integer)."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def kernel_sizes(image_size: ImageSize, options: Mapping[str, Any]) -> tuple[int, ...]:
    """The sizes of kernels that the options `kernels` and `combine` give, rising; empty for null.

    Raises:
        ValueError: they are not different odd numbers, or one is larger than the image.
    """
    check_choice("combine", options["combine"], COMBINE)
    given = options["kernels"]
    if given is None:
        if options["combine"] != COMBINE[0]:
            raise ValueError(
                f"combine is {options['combine']!r}, but there are no kernels to combine; set kernels, e.g. [3, 5]"
            )
        return ()
    if (
        not isinstance(given, (list, tuple))
        or len(given) < 2
        or not all(is_integer(size, 1, MAX_WIDTH) for size in given)
    ):
        raise ValueError(f"kernels is {given!r}, but must be a list of two or more sizes in pixels, such as [3, 5]")
    sizes = tuple(sorted(given))
    if len(set(sizes)) < len(sizes):
        raise ValueError(f"kernels is {given!r}, but each size must be there once")
    side = shorter_side(image_size)
    for size in sizes:
        if size % 2 == 0:
            raise ValueError(
                f"kernels holds {size}, but a smaller kernel is the centre of a larger one, so that all must be odd; "
                f"use {size - 1} or {size + 1}"
            )
        if size > side:
            raise ValueError(
                f"kernels holds {size}, which is larger than the image of {size_in_words(image_size)}; "
                f"use at most {side - (side % 2 == 0)}"
            )
    return sizes


def with_kernels(num_widths: int, kernels: Sequence[int], combine: str) -> Iterator[tuple[int, int | None]]:
    """The number of the widths and the size of the kernels of each sub-network.

    Args:
        num_widths: number of widths, from the narrowest to the widest.
        kernels: sizes of kernels, rising; empty: every sub-network has None.
        combine: one of `COMBINE`; with `tied` the sizes are evenly spaced over the widths.
    """
    for k in range(num_widths):
        if not kernels:
            yield k, None
        elif combine == "all":
            yield from ((k, kernel) for kernel in kernels)
        else:
            last = len(kernels) - 1
            yield k, kernels[round(k * last / (num_widths - 1))] if num_widths > 1 else kernels[last]
