"""Errors and warnings on stderr."""

from __future__ import annotations

from orchestration.output.console import Console
from orchestration.wrapping import wrapped


def warn(text: str) -> None:
    """Write a warning to stderr."""
    complain(f"warning: {text}")


def complain(text: str) -> None:
    """Write a message to stderr (stdout is for data), wrapped between words at the width of the
    terminal; what is no terminal gets each of its lines whole."""
    console = Console(stderr=True, highlight=False)
    width = console.width if console.is_terminal else None
    for line in text.splitlines():
        for part in wrapped(line, width):
            console.print(part, markup=False, soft_wrap=True)
