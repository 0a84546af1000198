"""The output folder of `python -m dsnet.training`: its paths, and the record of finished stages.

    resolved.json   the configuration
    manifest.json   versions, seed, device, the data's fingerprint, the stages with the hashes of
                    their files and of the supernet from which they were made
    supernet/       epoch-*, curves.jsonl, final.safetensors|json
    measure/        subnets.json, train_sample.json, latency.json, and latency-NAME.json for each
                    of `measure.devices`
    table/          gate.safetensors, val.safetensors

A stage writes the same files as the pipeline's stage of that name.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsnet.errors import CheckpointError, ConfigError, DataError, LockedError, PreflightError
from dsnet.files import atomic_write_json, file_sha256, known_sha256, read_json
from dsnet.standalone.resolved import StandaloneConfig
from dsnet.stored.names import FINAL, STRUCTURE

STAGES = ("structure", "supernet", "measure", "table")
"""The stages in order; the first only where sub-networks are chosen."""
RESULT_VERSIONS: Mapping[str, int] = {"structure": 1, "supernet": 2, "measure": 3, "table": 2}
"""Version of each stage's results, to be raised when its code gives other results. A folder with
another version of `supernet` belongs to another release; if only a later stage's version differs,
that stage is repeated."""
_SCHEMA = 1


class OutputFolder:
    """The paths in an output folder, and its manifest."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest_path = path / "manifest.json"
        self.resolved_path = path / "resolved.json"
        self.structure = path / "structure"
        self.supernet = path / "supernet"
        self.measure = path / "measure"
        self.table = path / "table"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Context manager that locks the folder against other calls; a missing folder is created.

        Raises:
            LockedError: another call is using the folder.
            PreflightError: it cannot be created, holds other files, or its file system has no
                locks.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise PreflightError(
                f"--out {self.path}: cannot be used ({error.strerror}); choose another folder"
            ) from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise LockedError(
                    f"{self.path}: another call is using it; wait for it, or choose another --out"
                ) from error
            except OSError as error:
                raise PreflightError(
                    f"{self.path}: its file system has no locks ({error.strerror}); use a local disk"
                ) from error
            self._check_is_ours()
            yield
        finally:
            os.close(descriptor)

    def _check_is_ours(self) -> None:
        """Check that a folder without a manifest holds no files of other programs.

        A first call that was killed early leaves only the configuration or a temporary file of this
        command.

        Raises:
            PreflightError: it holds other files.
        """
        if self.manifest_path.exists():
            return
        own = (self.resolved_path.name, f".{self.resolved_path.name}.", f".{self.manifest_path.name}.")
        others = sorted(path.name for path in self.path.iterdir() if not path.name.startswith(own))
        if others:
            shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
            raise PreflightError(
                f"--out {self.path}: holds files that this command did not write ({shown}); choose a new or empty folder"
            )

    def check_config(self, config: StandaloneConfig) -> None:
        """Check that the folder was not begun with settings that give other results; writes
        nothing.

        Raises:
            ConfigError: it was; the message names the settings.
        """
        if not self.resolved_path.exists():
            return
        changed = config.changes(StandaloneConfig.from_json(read_json(self.resolved_path)))
        if changed:
            raise ConfigError(f"{self.path} was begun with other settings ({', '.join(changed)}); choose another --out")

    def begin(self, config: StandaloneConfig, facts: Mapping[str, Any]) -> None:
        """Record the configuration and the environment of the current call.

        Args:
            config: the configuration, after `check_config`.
            facts: versions, device, and `data` with its `fingerprint`.

        Raises:
            DataError: the folder was begun with other images or splits.
        """
        manifest = self.manifest()
        earlier = manifest.get("data", facts["data"])["fingerprint"]
        if earlier != facts["data"]["fingerprint"]:
            raise DataError(
                f"{self.path} was begun with other images or splits ({earlier[:12]}, now {facts['data']['fingerprint'][:12]}); "
                "restore the data, or choose another --out"
            )
        recorded = manifest.get("result_versions", {})  # older manifests have the stages' versions here only
        stages = {name: {"version": recorded.get(name), **entry} for name, entry in manifest.get("stages", {}).items()}
        fixed = {"schema": _SCHEMA, "seed": config.seed, "result_versions": dict(RESULT_VERSIONS)}
        atomic_write_json(self.resolved_path, config.to_json())
        atomic_write_json(self.manifest_path, {**fixed, **facts, "stages": stages})

    def manifest(self) -> dict[str, Any]:
        """The content of manifest.json; empty before the first call.

        Raises:
            CheckpointError: the file is incomplete, has another schema, or its supernet has another
                result version.
        """
        if not self.manifest_path.exists():
            return {}
        manifest = read_json(self.manifest_path)
        if not _is_of_this_release(manifest):
            raise CheckpointError(
                f"{self.manifest_path}: written by another release; finish it with that release, or choose another --out"
            )
        assert isinstance(manifest, dict)
        return manifest

    def is_readable(self) -> bool:
        """Whether the folder was begun by a release that trains the same supernet as this one.

        Raises:
            CheckpointError: the manifest is incomplete.
        """
        has_both = self.manifest_path.is_file() and self.resolved_path.is_file()
        return has_both and _is_of_this_release(read_json(self.manifest_path))

    def is_done(self, stage: str) -> bool:
        """Whether a stage is finished: by code of the current version, with intact files, and for
        the current result of the stage before it.

        A supernet that was lost and trained again may have other weights (on a GPU), for which
        measurements of the first are not valid.
        """
        entry = self._entry(stage)
        has_files = (
            entry["status"] == "done"
            and not self.is_outdated(stage)
            and all(self._is_whole(self.path / stage / name, facts) for name, facts in entry["files"].items())
        )
        return has_files and self._is_of_its_parent(stage, entry)

    def is_outdated(self, stage: str) -> bool:
        """Whether a stage was begun by a release whose code gives other results."""
        return self._entry(stage)["version"] != RESULT_VERSIONS[stage]

    def begin_stage(self, stage: str) -> None:
        """Create a stage's folder and record the stage as running.

        Files in it are kept, unless they are damaged, outdated or of another result of the stage
        before it.

        Raises:
            PreflightError: old files cannot be removed.
        """
        folder = self.path / stage
        for name, facts in self._entry(stage)["files"].items():
            if not self._is_whole(folder / name, facts):
                _remove(folder / name)
        parent = self._parent(stage)
        made_from = {} if parent is None else {parent: self._sha256(parent)}
        if made_from and (self.is_outdated(stage) or not self._is_of_its_parent(stage, self._entry(stage))):
            _remove(folder)
        # Only after the old files are removed: if this call is killed in between, the next one
        # removes the rest.
        self._write_entry(stage, {"status": "running", "files": {}, "version": RESULT_VERSIONS[stage], **made_from})
        folder.mkdir(exist_ok=True)

    def record(self, stage: str, seconds: float, outputs: Sequence[Path] = ()) -> None:
        """Add the seconds that a call spent on a stage; given outputs mark the stage as
        finished."""
        files = {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in outputs}
        status = "done" if outputs else "running"
        spent = round(self._entry(stage)["seconds"] + seconds, 3)
        self._write_entry(stage, {"status": status, "seconds": spent, "files": files})

    def footprint(self) -> set[tuple[str, int]]:
        """Name and size of all files from which a later call continues; unchanged by a call that
        made no progress."""
        files = (path for path in self.path.rglob("*") if path.is_file() and path.name != "curves.jsonl")
        return {(str(path), path.stat().st_size) for path in files if path != self.manifest_path}

    def _entry(self, stage: str) -> dict[str, Any]:
        manifest = self.manifest()
        new = {"status": "new", "seconds": 0.0, "files": {}, "version": RESULT_VERSIONS[stage]}
        entry: dict[str, Any] = manifest.get("stages", {}).get(stage, new)
        return {"version": manifest.get("result_versions", {}).get(stage), **entry}

    def _write_entry(self, stage: str, facts: Mapping[str, Any]) -> None:
        manifest = self.manifest()
        manifest["stages"][stage] = {**self._entry(stage), "dir": stage, **facts}
        atomic_write_json(self.manifest_path, manifest)

    def _is_whole(self, path: Path, facts: Mapping[str, Any]) -> bool:
        """Whether a file is as recorded."""
        return path.is_file() and path.stat().st_size == facts["bytes"] and known_sha256(path) == facts["sha256"]

    def _parent(self, stage: str) -> str | None:
        """The stage whose weights a stage reads; None for the first."""
        if stage == "structure":
            return None
        if stage != "supernet":
            return "supernet"
        return "structure" if "structure" in self.manifest().get("stages", {}) else None

    def _is_of_its_parent(self, stage: str, entry: Mapping[str, Any]) -> bool:
        parent = self._parent(stage)
        return parent is None or (self.is_done(parent) and entry.get(parent) == self._sha256(parent))

    def _sha256(self, stage: str) -> str:
        """SHA-256 of the tensors of a finished stage, `structure` or `supernet`."""
        name = STRUCTURE if stage == "structure" else FINAL
        return str(read_json(self.path / stage / f"{name}.json")["sha256"])


def _remove(path: Path) -> None:
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise PreflightError(f"{path}: cannot be removed ({error.strerror}); remove it") from error


def _is_of_this_release(manifest: object) -> bool:
    if not isinstance(manifest, dict) or manifest.get("schema") != _SCHEMA:
        return False
    versions = manifest.get("result_versions")
    return isinstance(versions, dict) and versions.get("supernet") == RESULT_VERSIONS["supernet"]
