"""Word wrapping of prose by the width of its characters on a terminal."""

from __future__ import annotations

from rich.cells import cell_len


def wrapped(text: str, width: int | None) -> list[str]:
    """Wrap prose at spaces only; a word longer than a line stays whole."""
    if width is None or cell_len(text) <= width:
        return [text]
    lines: list[str] = []
    for word in text.split(" "):
        if lines and cell_len(lines[-1]) + 1 + cell_len(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
