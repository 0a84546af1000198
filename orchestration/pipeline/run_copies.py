"""Copies of a run's finished stages at `storage.artifacts`, with which a launch on another machine
continues.

Each stage is one archive, because a search has a file for every gate; the manifest lies beside
them. In a sweep of supernets each supernet has its own copies, and the sweep itself those of its
manifest and of the ledger with the decisions of its scheduler. What is restored is checked like
every other file of a run: each output has its SHA-256 in the stage's marker.
"""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from dsnet.errors import DsnetError, PreflightError
from dsnet.files import atomic_write_bytes
from dsnet.wording import first_line
from orchestration.runs.folder import RunDir
from orchestration.workers.file_stores import UrlStore

FOLDER = "finished"
"""Folder of the copies, below the run's own at the URL."""
MANIFEST, SUFFIX = "manifest.json", ".tar"
EVERY_S, SHARE = 60.0, 0.05
"""A search that goes on is copied once in so many seconds, and rarely enough that the copies take
at most this share of the time."""


@dataclass
class RunCopies:
    """The copies of one run."""

    run: RunDir
    url: str
    """URL of the run's own folder at `storage.artifacts`."""
    warn: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic
    _store: UrlStore = field(init=False)
    _next_s: float = field(init=False)
    """The earliest time of the next copy of a search that goes on."""
    _has_failed: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._store = UrlStore(f"{self.url}/{FOLDER}")
        self._next_s = self.clock() + EVERY_S

    def keep(self, folder: Path) -> None:
        """Copy the folder of a stage, or another one two levels below the run's, and the manifest;
        a copy that fails is a warning, because the run folder has all of it."""
        started_s = self.clock()
        try:
            with tempfile.TemporaryDirectory(prefix="dsnet-copy-") as name:
                archive = Path(name) / "folder.tar"
                with tarfile.open(archive, "w") as tar:
                    tar.add(folder, self._below(folder), filter=_without_unfinished)
                self._store.put(self._name(folder), archive)
        except (DsnetError, OSError) as error:
            self._complain(error)
        self.keep_manifest()
        self._next_s = self.clock() + max(EVERY_S, (self.clock() - started_s) / SHARE)

    def keep_manifest(self) -> None:
        """Copy the manifest; a copy that fails is a warning."""
        try:
            self._store.write(MANIFEST, self.run.manifest_path.read_bytes())
        except (DsnetError, OSError) as error:
            self._complain(error)

    def has(self, folder: Path) -> bool:
        """Whether there is a copy of a folder; also if that cannot be found out, which was said."""
        try:
            return self._has_failed or self._name(folder) in self._store.sizes()
        except PreflightError as error:
            self._complain(error)
            return True

    def keep_sometimes(self, folder: Path) -> None:
        """Copy the folder of a stage that goes on, if the time has come."""
        if self.clock() >= self._next_s:
            self.keep(folder)

    def restore(self) -> int | None:
        """Write the copies into a run folder that has no manifest; folders that it has are kept.

        Returns:
            the number of folders that were restored; None if there is no copy, or the run folder
            has a manifest.

        Raises:
            PreflightError: the URL cannot be reached.
        """
        if self.run.manifest_path.exists():
            return None
        names = self._store.sizes()
        manifest = self._store.read(MANIFEST) if MANIFEST in names else None
        if manifest is None:
            return None
        restored = [name for name in sorted(names) if name.endswith(SUFFIX) and self._restore_folder(name)]
        atomic_write_bytes(self.run.manifest_path, manifest)
        return len(restored)

    def _restore_folder(self, name: str) -> bool:
        draft = self.run.path / f".restored.{os.getpid()}.tmp"
        archive, unpacked = draft / name, draft / "unpacked"
        draft.mkdir()
        try:
            self._store.get(name, archive)
            try:
                with tarfile.open(archive) as tar:
                    tar.extractall(unpacked, filter="data")
                (folder,) = unpacked.glob("*/*")
            except (tarfile.TarError, OSError, ValueError) as error:
                self.warn(f"the copy {self.url}/{FOLDER}/{name} is damaged and is not used: {first_line(error)}")
                return False
            place = self.run.path / folder.relative_to(unpacked)
            if place.exists():
                return False
            place.parent.mkdir(exist_ok=True)
            folder.rename(place)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return True

    def _complain(self, error: Exception) -> None:
        if not self._has_failed:
            self.warn(f"the run is not copied to {self.url}, and this launch goes on without: {first_line(error)}")
        self._has_failed = True

    def _name(self, folder: Path) -> str:
        return f"{self._below(folder).replace('/', '-')}{SUFFIX}"

    def _below(self, path: Path) -> str:
        return path.relative_to(self.run.path).as_posix()


def _without_unfinished(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Leave out what was set aside as damaged, and what is being written."""
    name = entry.name.rpartition("/")[2]
    return None if ".damaged-" in name or name.startswith(".") or name.endswith(".tmp") else entry
