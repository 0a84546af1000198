"""Folders of small pictures."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

RED, GREY = (200, 10, 10), (90, 90, 90)


def fill(folder: Path, count: int, size: tuple[int, int] = (40, 30), colour: tuple[int, int, int] = RED) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", size, colour).save(folder / f"{number}.png")
