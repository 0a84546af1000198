"""Points that a user enqueues while a sweep runs: one JSON line each, appended under a lock and
never changed.

The driver reads them before every cohort; points can be appended with or without a driver.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsnet.errors import CheckpointError
from dsnet.files import append_bytes, exclusive, parse_json, reading, sealed, unsealed
from orchestration.runs.manifest import now_iso
from search.suggest.space import Scalar


def append_points(path: Path, points: Sequence[Mapping[str, Scalar]]) -> int:
    """Add points to a queue; they are on disk when this returns.

    Args:
        path: the queue; its folder exists.
        points: checked against the run's space.

    Returns:
        the number of points that the queue holds now.

    Raises:
        StorageError: it cannot be written; the queue holds what it held before.
        CheckpointError: the file is not a queue.
    """
    lines = [json.dumps(sealed({"params": dict(point), "at": now_iso()})) + "\n" for point in points]
    with exclusive(path.parent):
        held = read_queue(path)
        append_bytes(path, "".join(lines).encode(), after=_whole_lines(path))
    return len(held) + len(points)


def read_queue(path: Path) -> list[dict[str, Any]]:
    """All points so far, oldest first: {"params": {key: value}, "at": time}; empty if there is no
    file.

    Takes no lock; an incomplete last line is left out.

    Raises:
        CheckpointError: a complete line is not a point.
    """
    if not path.exists():
        return []
    with reading(path):
        text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    return [_point(path, number, line) for number, line in enumerate(whole.splitlines(), start=1)]


def _point(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        point = parse_json(line, f"{path}, line {number},")
    except CheckpointError as error:
        raise CheckpointError(
            f"{path}, line {number}: not a point ({error}); the file was edited. Restore the line, or write "
            '{"params": {}} in its place: lines are counted, and none may be missing'
        ) from error
    if not isinstance(point, dict) or not isinstance(point.get("params"), dict):
        raise CheckpointError(
            f'{path}, line {number}: not a point {{"params": {{...}}, "at": "..."}}; restore the file'
        )
    return unsealed(point, f"{path}, line {number},")


def _whole_lines(path: Path) -> int:
    """Number of bytes up to the last newline; 0 if there is no file."""
    return path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0
