"""manifest.json of a run: versions, hardware, data and the state of each stage."""

from __future__ import annotations

import os
import platform
import sys
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dsnet.arithmetic import arithmetic_facts
from dsnet.environment import installed_versions as versions_of
from dsnet.errors import CheckpointError
from dsnet.files import exclusive, read_sealed, understood, write_sealed

RECORDED_PACKAGES = (
    "dsnet-orch", "torch", "numpy", "ray", "optuna", "mlflow", "pandas", "plotly", "pyarrow", "safetensors",
    "scikit-learn", "Pillow", "pydantic", "moocore",
)  # fmt: skip
_MANIFEST_SCHEMA = 1


def now_iso() -> str:
    """The current time in UTC, ISO 8601, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Manifest:
    """manifest.json of a run: versions, hardware and data, and the state of each stage.

    Every change is a read-modify-write under a short file lock, so the driver and a `verify` or
    `report` beside it never overwrite each other's changes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self, *, seed: int, hardware: Mapping[str, Any], versions: Mapping[str, str] | None = None) -> None:
        """Write a new manifest, or update that of an earlier launch with today's versions and
        hardware."""
        facts = {"versions": dict(versions or installed_versions()), "seed": seed, "hardware": dict(hardware)}
        if self.path.exists():
            self.update(**facts)
            return
        write_sealed(
            self.path,
            {
                "schema": _MANIFEST_SCHEMA,
                "run_id": uuid.uuid4().hex,
                "created_at": now_iso(),
                **facts,
                "data_hashes": {},
                "stages": {},
                "test_openings": 0,
                "test_opened_by": [],
            },
        )

    def read(self) -> dict[str, Any]:
        """The whole manifest.

        Raises:
            CheckpointError: It is missing, damaged, or of another schema.
        """
        content = read_sealed(self.path)
        if content.get("schema") != _MANIFEST_SCHEMA:
            raise CheckpointError(
                f"{self.path} has schema {content.get('schema')!r}, but this release reads {_MANIFEST_SCHEMA}. "
                "Launch under another name, or use the release that made it."
            )
        with understood(self.path):
            _check_form(content)
        return content

    def update(self, **sections: Any) -> None:
        """Replace whole top-level sections."""
        with exclusive(self.path.parent):
            write_sealed(self.path, {**self.read(), **sections})

    def record_stage(self, name: str, record: Mapping[str, Any]) -> None:
        """Set one stage's {key, dir, status, started_at, seconds}."""
        with exclusive(self.path.parent):
            content = self.read()
            content["stages"][name] = dict(record)
            write_sealed(self.path, content)

    def count_test_opening(self, who: str) -> int:
        """Record that the sealed test split was read.

        Returns:
            How many times it has been read, this time included.
        """
        with exclusive(self.path.parent):
            content = self.read()
            content["test_openings"] += 1
            content["test_opened_by"].append({"who": who, "at": now_iso()})
            write_sealed(self.path, content)
        return int(content["test_openings"])


def _check_form(content: Mapping[str, Any]) -> None:
    """Raise LookupError or TypeError if a manifest lacks something that is read from it."""
    missing = {"run_id", "stages", "test_openings", "test_opened_by"} - content.keys()
    for entry in content.get("stages", {}).values():
        missing |= {"key", "status", "started_at", "seconds"} - entry.keys()
    if missing:
        raise KeyError(", ".join(sorted(missing)))


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the main packages, without importing any of them."""
    return versions_of(RECORDED_PACKAGES)


def describe_hardware(gpu: str | None = None) -> dict[str, Any]:
    """CPU model, usable cores, memory in GiB, MKL's mode, and the GPU's name, which the caller
    passes if it is known."""
    return {
        "cpu": _cpu_model(),
        "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": gpu,
        "platform": f"{platform.system()} {platform.machine()}",
        "executable": Path(sys.executable).name,
        **arithmetic_facts(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
