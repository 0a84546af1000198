"""The loss curves of a training, read from their file while it grows."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dsnet.errors import CheckpointError
from dsnet.files import read_stored
from dsnet.stored.names import FINAL, checkpoint_stems


@dataclass(frozen=True)
class CurvePoint:
    """Values of one training step: one line of curves.jsonl."""

    step: int
    time_ms: int
    metrics: Mapping[str, float | None]


class CurveTail:
    """Reads a growing curves.jsonl piece by piece.

    An unfinished last line is left for the next read; a line torn by a kill is skipped. A file that
    was replaced or became shorter, because a resumed training cut it back, is read again from its
    beginning.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._inode: int | None = None
        self._waiting: dict[int, CurvePoint] = {}
        self._last_counted = -1
        self._newest = ("", -1)

    def read(self) -> list[CurvePoint]:
        """The points written since the last call, whether they count or not; empty if there is no
        file."""
        try:
            with open(self._path, "rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self._inode or file.seek(0, os.SEEK_END) < self._offset:
                    self._offset, self._inode = 0, inode
                    self._waiting.clear()
                file.seek(self._offset)
                complete = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return []
        self._offset += len(complete[0]) + len(complete[1])
        points = [point for line in complete[0].splitlines() if (point := _parse_point(line)) is not None]
        self._waiting |= {point.step: point for point in points if point.step > self._last_counted}
        return points

    def counted(self) -> list[CurvePoint]:
        """The points read so far that count, each once, by step: those up to the newest checkpoint
        beside the file, or all once the training is done. A training that was killed does the steps
        after its last checkpoint again, and writes their points again."""
        upto = self._counted_step()
        ready = sorted(step for step in self._waiting if upto is None or step <= upto)
        self._last_counted = max([self._last_counted, *ready])
        return [self._waiting.pop(step) for step in ready]

    def _counted_step(self) -> int | None:
        """Step of the newest checkpoint, -1 without one; None once the training is done."""
        folder = self._path.parent
        if (folder / f"{FINAL}.json").exists():
            return None
        stems = checkpoint_stems(folder)
        if not stems or stems[-1].name == self._newest[0]:
            return self._newest[1]
        try:
            step = read_stored(stems[-1].with_suffix(".json"), lambda meta: int(meta["step"]))
        except CheckpointError:  # just removed, or damaged: the training says so
            return self._newest[1]
        self._newest = (stems[-1].name, step)
        return step


def counted_points(path: Path) -> list[CurvePoint]:
    """The points of a curves.jsonl that count (`CurveTail.counted`)."""
    tail = CurveTail(path)
    tail.read()
    return tail.counted()


def _parse_point(line: bytes) -> CurvePoint | None:
    try:
        content = json.loads(line)
        return CurvePoint(int(content["step"]), int(content["time_ms"]), dict(content["metrics"]))
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
