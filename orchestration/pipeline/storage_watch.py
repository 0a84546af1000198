"""The storage of a launch: the reserve that it leaves on its disks, and one end for whatever goes
wrong there."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dsnet.disk_room import DiskReserve
from dsnet.errors import PreflightError, StorageError, StorageStoppedError
from dsnet.storage_faults import storage_error
from orchestration.config.sweep import SweepConfig
from orchestration.runs.folder import RunDir

CHECK_EVERY_S = 1.0
SETTING = "storage.min_free_mib"


def run_reserve(config: SweepConfig) -> DiskReserve:
    """The reserve of the disk with the runs folder."""
    folder = Path(config.storage.runs)
    return DiskReserve(folder, config.storage.min_free_mib, SETTING, "use another folder (storage.runs)")


def ray_reserve(config: SweepConfig, folder: Path) -> DiskReserve:
    """The reserve of the disk with Ray's folder on this machine."""
    return DiskReserve(folder, config.storage.min_free_mib, SETTING, "set RAY_TMPDIR to a folder on another disk")


def check_reserve(reserve: DiskReserve) -> None:
    """Refuse to begin where too little is free.

    Raises:
        PreflightError: the message names the folder, what is free, what is asked for and the
            setting.
    """
    problem = reserve.problem()
    if problem is not None:
        raise PreflightError(problem)


class StorageWatch:
    """Looks at the storage of a running launch when it is asked, at most once a second; it is a
    source of a `StopRequest`.

    Attributes:
        run: the run of the launch.
        problem: what was found, as sentences; None while all is well.
    """

    def __init__(self, run: RunDir, reserve: DiskReserve, clock: Callable[[], float] = time.monotonic) -> None:
        self.run = run
        self._reserves = [reserve]
        self._clock = clock
        self._next_s = clock()
        self._identity = _identity(run.path)
        self.problem: str | None = None

    def add(self, reserve: DiskReserve) -> None:
        """Also look at another folder from now on."""
        self._reserves.append(reserve)

    def is_gone(self) -> bool:
        """Whether the run folder was deleted or moved since the launch began, even if there is a
        new one in its place."""
        return _identity(self.run.path) != self._identity

    def __call__(self) -> bool:
        """Whether the launch should stop."""
        if self.problem is None and self._clock() >= self._next_s:
            self._next_s = self._clock() + CHECK_EVERY_S
            if self.is_gone():
                self.problem = f"{self.run.path} is gone."
            else:
                self.problem = next(filter(None, (reserve.problem() for reserve in self._reserves)), None)
        return self.problem is not None


@contextmanager
def one_end(run: RunDir, watch: StorageWatch) -> Iterator[None]:
    """Context manager around the work of a launch that gives every fault of storage one error.

    Raises:
        StorageStoppedError: the disk is full, read-only or failing, or a reserve is used up;
            launching again continues.
        StorageError: the run folder is gone, or the launch had stored nothing yet.
    """
    try:
        yield
    except StorageStoppedError:
        raise
    except Exception as error:
        if watch.is_gone():
            raise StorageError(
                f"{run.path} was deleted or moved while the launch ran, and what it held cannot be continued there. Move it "
                "back, or launch again, which begins anew."
            ) from error
        if watch.problem is not None:
            raise StorageStoppedError(watch.problem) from error
        fault = storage_error(error, near=run.path)
        if fault is None:
            raise
        if not os.path.exists(run.manifest_path):
            raise fault from error
        raise StorageStoppedError(str(fault)) from error


def _identity(folder: Path) -> tuple[int, int] | None:
    """Device and inode of a folder; None if it is not there."""
    try:
        facts = folder.stat()
    except FileNotFoundError:
        return None
    return facts.st_dev, facts.st_ino
