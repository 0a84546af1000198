"""Files that are whole or not there: atomic writes, JSON, hashes. Needs no torch."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from dsnet.errors import CheckpointError


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def replace_file(temporary: Path, path: Path) -> None:
    """Flush `temporary` to disk and rename it to `path`, so that a reader sees the old file or the new one, never a part."""
    with temporary.open("rb+") as stream:
        os.fsync(stream.fileno())
    temporary.replace(path)


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically (NaN is refused: it is not JSON)."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    replace_file(temporary, path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing, torn, or no object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); delete it to have it made again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, met {type(data).__name__}")
    return data
