"""The resolved configuration of a run's last launch, as its folder holds it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from dsnet.errors import CheckpointError
from dsnet.files import atomic_write_text, known_sha256
from orchestration.config.loading import load_config
from orchestration.config.sweep import SweepConfig
from orchestration.config.written import to_yaml
from orchestration.runs.folder import RunDir
from orchestration.runs.manifest import Manifest

_HASHES = "sweep_sha256"
"""Section of the manifest with the SHA-256 of sweep.yaml: that of the launch before and of the last
one, so that a kill between the two writes leaves a file that is listed."""


def store_config(run: RunDir, manifest: Manifest, config: SweepConfig) -> None:
    """Write sweep.yaml, and its SHA-256 into the manifest."""
    text = to_yaml(config)
    before = [known_sha256(run.sweep_yaml)] if run.sweep_yaml.is_file() else []
    manifest.update(**{_HASHES: [*before, _sha256(text)]})
    atomic_write_text(run.sweep_yaml, text)
    manifest.update(**{_HASHES: [_sha256(text)]})


def stored_config(run: RunDir, manifest: Mapping[str, Any]) -> SweepConfig:
    """Read sweep.yaml.

    Args:
        run: the run.
        manifest: content of its manifest; one of an earlier release has no SHA-256 of the file.

    Raises:
        CheckpointError: the file is missing, or is not what the last launch wrote.
        ConfigError: it cannot be read.
    """
    if not run.sweep_yaml.is_file():
        raise CheckpointError(f"{run.sweep_yaml} is missing; restore it, or launch the sweep from its own file again")
    if _HASHES in manifest and known_sha256(run.sweep_yaml) not in manifest[_HASHES]:
        raise CheckpointError(
            f"{run.sweep_yaml} is not what the last launch wrote (its SHA-256 differs): it is damaged or was edited. Restore "
            "it; or launch the sweep from its own file again. To use changed settings, launch the changed file."
        )
    return load_config(run.sweep_yaml).config


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
