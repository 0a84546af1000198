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
from dsnet.files import writing
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
    source of a `StopRequest`. Created by `watched`.

    Attributes:
        run: the run of the launch.
        problem: what was found, as sentences; None while all is well.
    """

    def __init__(
        self, run: RunDir, reserve: DiskReserve, descriptor: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`descriptor` is the open run folder: while it is open, no other folder can have its
        inode."""
        self.run = run
        self.problem: str | None = None
        self._reserves = [reserve]
        self._descriptor = descriptor
        self._clock = clock
        self._next_s = clock()

    def add(self, reserve: DiskReserve) -> None:
        """Also look at another folder from now on."""
        self._reserves.append(reserve)

    def is_gone(self) -> bool:
        """Whether the run folder was deleted or moved since the launch began, even if there is a
        new one in its place."""
        try:
            return not os.path.samestat(self.run.path.stat(), os.fstat(self._descriptor))
        except FileNotFoundError:
            return True
        except OSError:  # the disk fails: nothing is known about the folder
            return False

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
def watched(run: RunDir, reserve: DiskReserve) -> Iterator[StorageWatch]:
    """Context manager around the work of a launch that watches its storage, and gives every fault
    of it one error.

    Args:
        run: the run; its folder exists.
        reserve: the reserve of its disk.

    Raises:
        StorageStoppedError: the disk is full, read-only or failing, or a reserve is used up;
            launching again continues.
        StorageError: the run folder is gone, or the launch had stored nothing yet.
    """
    with writing(run.path):
        descriptor = os.open(run.path, os.O_RDONLY | os.O_DIRECTORY)
    watch = StorageWatch(run, reserve, descriptor)
    try:
        yield watch
    except Exception as error:
        told = _told(error, watch)
        if told is error:
            raise
        raise told from error
    finally:
        os.close(descriptor)


def _told(error: Exception, watch: StorageWatch) -> Exception:
    """The error with which a launch ends."""
    run = watch.run
    if watch.is_gone():
        return StorageError(
            f"{run.path} was deleted or moved while the launch ran, and what it held cannot be continued there. Move it "
            "back, or launch again, which begins anew."
        )
    if watch.problem is not None:
        return StorageStoppedError(watch.problem)
    fault = storage_error(error, near=run.path)
    if fault is None:
        return error
    return StorageStoppedError(str(fault)) if os.path.exists(run.manifest_path) else fault
