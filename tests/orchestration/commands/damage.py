"""Damage of the files of a finished run, and what a command answers to it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.processes import Answer
from search.front.points_file import load_points
from tests.orchestration.samples import SWEEP, WITHOUT_MLFLOW

RUN = Path("runs", "tiny")
Corruption = Callable[[bytes], bytes | None]
"""From the content of a file to that of the damaged one; None removes it."""
CORRUPTIONS: Mapping[str, Corruption] = {
    "flipped": lambda content: _flipped(content),
    "halved": lambda content: content[: len(content) // 2],
    "emptied": lambda content: b"",
    "removed": lambda content: None,
    "other": lambda content: b'{"schema": 1, "stages": 5, "key": [], "files": 3, "version": "x"}',
    "deep": lambda content: b"[" * 50_000,
    "latin": lambda content: '{"caf\u00e9": 1}'.encode("latin-1"),
}
READ_ONLY: Mapping[str, tuple[str | Path, ...]] = {
    "status": ("status", "tiny", "--json"),
    "pareto": ("pareto", "tiny", "--json"),
    "report": ("report", "tiny"),
    "export": ("export", "tiny", "--pick", "knee"),
    "verify": ("verify", RUN / "export" / "knee"),
}
LAUNCH = ("launch", SWEEP, *WITHOUT_MLFLOW)
UNREAD: Mapping[str, str] = {
    "report.html": "made from the other files by every launch and by `report`; no command reads it",
    "front.png": "as report.html",
    "points.parquet": "as report.html",
    "progress.json": "only shown while a sweep runs",
    "data/splits.json": "for people; every launch writes it again where it differs",
    "supernet/*/epoch-*": "checkpoints of a training that is over; a training that continues checks their own hashes",
    "search/*/study.journal.chain": "where its last line fits the journal, the journal is proven",
    "export/*/gate.yaml": "for people; only `verify` compares it",
    "export/*/examples.safetensors": "only `verify` reads it",
}
"""Files of a run whose damage need not be noticed by a command that is not about them, and why."""
REFUSED = {3}
REFUSED_BY_VERIFY = {3, 7}


def _flipped(content: bytes) -> bytes:
    """The content with one digit or byte in its middle changed."""
    middle = len(content) // 2
    digits = [at for at in range(middle, len(content)) if chr(content[at]).isdecimal()]
    at = digits[0] if content[:1] == b"{" and digits else middle
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def stored_files(folder: Path) -> list[Path]:
    """Every file of the run, relative to its folder."""
    run = folder / RUN
    return sorted(path.relative_to(run) for path in run.rglob("*") if path.is_file() and "knee" not in path.parts)


CLOCKED = ("latency", "device_latency", "seconds", "test_openings", "num_openings")
"""Beginnings of the keys whose values differ when a stage runs again."""


def values(folder: Path, command: str, answer: Answer) -> Any:
    """What a command tells about a run, by its output and its files: of two equal runs the same."""
    if command == "report":
        return [_timeless(row) for row in load_points(folder / RUN / "points.parquet")]
    if command == "export":
        files = sorted((folder / RUN / "export" / "knee").iterdir())
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    if command == "verify":
        return answer.out.replace(str(folder), "")
    return _timeless(json.loads(answer.out.replace(str(folder), "")))


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if not key.startswith(CLOCKED)}
    return [_timeless(item) for item in value] if isinstance(value, list) else repr(value)


def problems(folder: Path, command: str, answer: Answer, right: Any, file: Path) -> list[str]:
    """The faults of an answer to a damaged file: a command must refuse and name the file, or give
    the right values, or name the file in its output."""
    found = [f"{bad!r} in stderr" for bad in ("Traceback", "internal error") if bad in answer.err]
    if answer.code == 0:
        if file.name not in answer.out and values(folder, command, answer) != right:
            found.append("another value than that of the undamaged run")
    else:
        if answer.code not in (REFUSED_BY_VERIFY if command == "verify" else REFUSED):
            found.append(f"exit code {answer.code}")
        if file.name not in answer.err:
            found.append(f"{file.name} is not named")
    return [f"{command}, {file}: {', '.join(found)}", answer.err[-600:]] if found else []


@contextmanager
def damaged(folder: Path, file: Path, corruption: Corruption) -> Iterator[None]:
    """Context manager in which a file of the run is damaged; afterwards it is as before."""
    path = folder / RUN / file
    content = path.read_bytes()
    changed = corruption(content)
    if changed is None:
        path.unlink()
    else:
        path.write_bytes(changed)
    try:
        yield
    finally:
        path.write_bytes(content)
