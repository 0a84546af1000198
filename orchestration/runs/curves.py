"""The loss curves of a training, read from their file while it grows."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CurvePoint:
    """Values of one training step: one line of curves.jsonl."""

    step: int
    time_ms: int
    metrics: Mapping[str, float | None]


class CurveTail:
    """Reads a growing curves.jsonl piece by piece.

    An unfinished last line is left for the next read; a line torn by a kill is skipped. A file that
    became shorter, because a resumed training cut it back, is read again from its beginning; a
    tracker tolerates repeated points.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> list[CurvePoint]:
        """The points written since the last call; empty if there is no file."""
        try:
            with open(self._path, "rb") as file:
                if file.seek(0, os.SEEK_END) < self._offset:
                    self._offset = 0
                file.seek(self._offset)
                complete = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return []
        self._offset += len(complete[0]) + len(complete[1])
        return [point for line in complete[0].splitlines() if (point := _parse_point(line)) is not None]


def _parse_point(line: bytes) -> CurvePoint | None:
    try:
        content = json.loads(line)
        return CurvePoint(int(content["step"]), int(content["time_ms"]), dict(content["metrics"]))
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
