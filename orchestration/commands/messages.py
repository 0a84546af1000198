"""Warnings on stderr."""

from __future__ import annotations

from rich.console import Console

from orchestration.wrapping import wrapped


def warn(text: str) -> None:
    """Write a warning to stderr (stdout is for data), wrapped between words at the width of the
    terminal."""
    console = Console(stderr=True, highlight=False)
    for line in wrapped(f"warning: {text}", console.width if console.is_terminal else None):
        console.print(line, markup=False, soft_wrap=True)
