"""A lock that admits one driver per run: a file that names the process that holds it; the lock of
an ended process can be replaced."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType

from dsnet.errors import CheckpointError, ConfigError, LockedError, PreflightError, StorageError
from dsnet.files import atomic_write_json, exclusive, read_object
from dsnet.strict_json import read_strictly
from orchestration.runs.folder import RunDir
from orchestration.runs.manifest import now_iso
from orchestration.runs.processes import process_start_time


@dataclass(frozen=True)
class LockHolder:
    """The process that holds a run folder.

    A pid alone is not an identity, because it is reused after the process is gone. Together with
    the process's start time (clock ticks since boot) and the boot's id it is one.
    """

    pid: int
    start_time: int | None
    boot_id: str
    host: str
    command: str
    since: str

    @classmethod
    def this_process(cls, command: str) -> LockHolder:
        pid = os.getpid()
        return cls(pid, process_start_time(pid), _boot_id(), socket.gethostname(), command, now_iso())

    def is_on_another_host(self) -> bool:
        """Whether it may run on another host; False only if it surely ran here.

        A lock with this host's name but another boot id is of this host only if it is older than
        this boot; a younger one belongs to another machine with the same name.
        """
        if self.host != socket.gethostname():
            return True
        return self.boot_id != _boot_id() and datetime.fromisoformat(self.since).timestamp() >= _boot_time()

    def is_alive(self) -> bool:
        """Whether this very process still runs; only meaningful on its own host."""
        if self.boot_id != _boot_id():
            return False
        if self.start_time is None:
            return _pid_exists(self.pid)
        return process_start_time(self.pid) == self.start_time

    def is_running(self) -> bool:
        """Whether it still runs; a process on another host is taken to run."""
        return self.is_on_another_host() or self.is_alive()

    def __str__(self) -> str:
        since = datetime.fromisoformat(self.since).astimezone().strftime("%Y-%m-%d %H:%M:%S")  # local time
        return f"process {self.pid} on {self.host} since {since} ({self.command})"


class DriverLock:
    """Context manager: at most one driver per run folder.

    Args:
        run: The run; its folder exists.
        command: The user's command line, shown to a driver that finds the lock.
        take_over: Also replace a lock of another host, or one that cannot be read. The lock of a
            process that runs on this host is never replaced.

    Attributes:
        taken_over_from: The ended holder whose lock was replaced, or None.

    Raises:
        LockedError: On entering, when another driver holds the folder.
    """

    def __init__(self, run: RunDir, command: str, *, take_over: bool = False) -> None:
        self._run = run
        self._path = run.lock_path
        self._command = command
        self._take_over = take_over
        self._holder: LockHolder | None = None
        self.taken_over_from: LockHolder | None = None

    def __enter__(self) -> DriverLock:
        with exclusive(self._run.path):
            # `exclusive` orders the processes of this host; hosts sharing the folder are ordered by
            # link(2), which is atomic on network file systems too.
            holder = LockHolder.this_process(self._command)
            if not self._try_create(holder):
                self.taken_over_from = self._holder_to_replace()
                atomic_write_json(self._path, asdict(holder))
            self._holder = holder
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # The folder may have been deleted, or may not be writable any more. That must not hide
        # `error`; and a lock whose process has ended keeps nobody out.
        with suppress(StorageError, OSError), exclusive(self._run.path):
            if read_lock(self._path) == self._holder:
                self._path.unlink()
        self._holder = None

    def _try_create(self, holder: LockHolder) -> bool:
        draft = self._path.with_name(f".{self._path.name}.{holder.pid}")
        atomic_write_json(draft, asdict(holder))
        try:
            os.link(draft, self._path)
        except FileExistsError:
            return False
        except OSError as error:
            raise PreflightError(
                f"cannot create {self._path}: {error.strerror}. The run folder needs a POSIX file system with hard "
                "links; set storage.runs to a folder on a local disk."
            ) from error
        finally:
            draft.unlink()
        return True

    def _holder_to_replace(self) -> LockHolder | None:
        holder = read_lock(self._path)
        if holder is None:
            if self._take_over:
                return None
            if not self._path.exists():
                raise LockedError(f"the driver of run {self._run.name!r} has just ended; launch again.")
            raise LockedError(
                f"run {self._run.name!r}: {self._path} exists but cannot be read. If no driver is running, "
                "launch again with --take-over."
            )
        if holder.is_on_another_host():
            if not self._take_over:
                raise LockedError(
                    f"run {self._run.name!r} is held by {holder}. This host cannot check whether that process still runs: "
                    "if it has ended, launch again with --take-over."
                )
        elif holder.is_alive():
            raise LockedError(
                f"run {self._run.name!r} is held by {holder}. Wait for it, stop it with `kill -TERM {holder.pid}`, "
                "or launch under another name."
            )
        return holder


def read_lock(path: Path) -> LockHolder | None:
    """The holder recorded in a lock file; None if there is no file or it cannot be understood."""
    try:
        holder = read_strictly(LockHolder, read_object(path))
        datetime.fromisoformat(holder.since)
    except (CheckpointError, ConfigError, ValueError):
        return None
    return holder


def _pid_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _boot_time() -> float:
    """Seconds since the epoch at which this machine started; 0 if that is not known."""
    try:
        lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0.0
    return next((float(line.split()[1]) for line in lines if line.startswith("btime ")), 0.0)
