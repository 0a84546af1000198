"""Helpers for the options of families: scaling of widths, checks of values."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any


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
