"""Supernets of a sweep by name, with the settings in which they differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MOST_LETTERS = 32
"""Largest number of letters of the settings beside a name; longer ones are left out."""


def with_settings(name: str, settings: Mapping[str, Any]) -> str:
    """A name with the supernet's settings, where they are short: `s0 (uniform, lr 0.1)`.

    Args:
        name: name of the supernet.
        settings: its values of the settings that the sweep varies, by dotted key.
    """
    told = ", ".join(_spoken(key, value) for key, value in settings.items())
    return f"{name} ({told})" if 0 < len(told) <= MOST_LETTERS else name


def _spoken(key: str, value: Any) -> str:
    """A word for itself, another value after the last part of its key."""
    return value if isinstance(value, str) else f"{key.rpartition('.')[2]} {value_text(value)}"


def value_text(value: Any) -> str:
    """A value of a setting as text; numbers have four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
