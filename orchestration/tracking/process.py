"""MLflow in a separate process.

A row costs 10 ms of Python in MLflow and SQLAlchemy. A thread of the driver would compete for the
interpreter's lock with the suggestions, which are Python too: it would delay them, and finish long
after the sweep. A separate process uses the core that is idle while the driver suggests.

The process can also omit most of SQLite's syncs to disk, of which a row otherwise takes a dozen; on
a busy machine these, and not Python, determine the time of a row.
"""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from dsnet.arithmetic import fix_arithmetic
from dsnet.import_path import child_variables
from dsnet.wording import first_line
from orchestration.config.store_uri import SQLITE, without_secrets
from orchestration.runs.curves import CurvePoint
from orchestration.tracking.protocol import LostWriterError, TrackedBundle, TrackedData, TrackedRun
from orchestration.tracking.store import MlflowStore

LOCAL_FILE_SYSTEMS = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay")
STOP_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class _Child:
    process: subprocess.Popen[bytes]
    connection: Connection[Any, Any]


class MlflowWriter:
    """An `MlflowStore` in a child process, with the same methods, to be called from one thread.

    The child starts with the first call, and again with the next call after it ended unexpectedly.
    It ends after its current call when this process ends, for whatever reason.
    """

    def __init__(self, store_uri: str, experiment: str, artifact_root: Path) -> None:
        self._arguments = (store_uri, experiment, artifact_root)
        self._child: _Child | None = None
        self._is_stopped = False

    def connect(self) -> None:
        """See `MlflowStore.connect`."""
        self._call("connect")

    def open_sweep(self, parent: TrackedRun) -> None:
        """See `MlflowStore.open_sweep`."""
        self._call("open_sweep", parent)

    def attach(self, parent: TrackedRun) -> None:
        """See `MlflowStore.attach`."""
        self._call("attach", parent)

    def write(self, run: TrackedRun, parent: TrackedRun) -> None:
        """See `MlflowStore.write`."""
        self._call("write", run, parent)

    def supersede(self, parent: TrackedRun, current: Sequence[str]) -> None:
        """See `MlflowStore.supersede`."""
        self._call("supersede", parent, current)

    def add_points(self, run: TrackedRun, parent: TrackedRun, points: Sequence[CurvePoint]) -> None:
        """See `MlflowStore.add_points`."""
        self._call("add_points", run, parent, points)

    def add_artifact(self, parent: TrackedRun, path: Path) -> None:
        """See `MlflowStore.add_artifact`."""
        # Absolute, because the child keeps the working directory in which it was started.
        self._call("add_artifact", parent, path.absolute())

    def add_datasets(self, parent: TrackedRun, datasets: Sequence[TrackedData]) -> None:
        """See `MlflowStore.add_datasets`."""
        self._call("add_datasets", parent, datasets)

    def add_bundle(self, parent: TrackedRun, bundle: TrackedBundle) -> None:
        """See `MlflowStore.add_bundle`."""
        self._call("add_bundle", parent, replace(bundle, path=bundle.path.absolute()))

    def describe(self, parent: TrackedRun, text: str) -> None:
        """See `MlflowStore.describe`."""
        self._call("describe", parent, text)

    def close_sweep(self, parent: TrackedRun) -> None:
        """See `MlflowStore.close_sweep`."""
        self._call("close_sweep", parent)

    def stop(self, *, at_once: bool) -> None:
        """End the child. `at_once` kills it, from any thread, even while a call waits for it; else
        it may finish its work for `STOP_TIMEOUT_S`. Later calls raise."""
        self._is_stopped = True
        child, self._child = self._child, None
        if child is None:
            return
        if not at_once:
            child.connection.close()
            with suppress(subprocess.TimeoutExpired):
                child.process.wait(STOP_TIMEOUT_S)
        # Every answered call is in the store; an interrupted one leaves a row that is RUNNING,
        # which the next launch corrects.
        child.process.kill()
        child.process.wait()

    def _call(self, name: str, *arguments: Any) -> None:
        """Make a call; it is repeated once if the child ends meanwhile, because it may have done a
        part of it only.

        Raises:
            LostWriterError: the second child ended too.
            RuntimeError: the store failed.
        """
        for is_last in (False, True):
            try:
                return self._attempt(name, *arguments)
            except LostWriterError:
                if is_last or self._is_stopped:
                    raise

    def _attempt(self, name: str, *arguments: Any) -> None:
        child = self._child or self._start()
        try:
            child.connection.send((name, arguments))
            error = child.connection.recv()
        except (OSError, EOFError) as lost:
            self._child = None
            child.process.kill()
            status = child.process.wait()
            raise LostWriterError(f"the process that writes to MLflow ended with status {status}") from lost
        if error is not None:
            raise RuntimeError(without_secrets(error, self._arguments[0]))

    def _start(self) -> _Child:
        if self._is_stopped:
            raise RuntimeError("the process that writes to MLflow was stopped")
        ours, theirs = Pipe()
        with theirs:
            process = subprocess.Popen(
                # A session of its own: Ctrl-C reaches only the driver, which then writes how the
                # sweep ended.
                [sys.executable, "-m", "orchestration.tracking.process", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what libraries print must not be part of the command's output
                env={**os.environ, **child_variables()},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        child = self._child = _Child(process, ours)
        if self._is_stopped:  # meanwhile, by a thread that found no child to end
            MlflowWriter.stop(self, at_once=True)
            raise RuntimeError("the process that writes to MLflow was stopped")
        ours.send(self._arguments)
        return child


class SharedWriter(MlflowWriter):
    """One child process for several trackers, whose threads take turns.

    Closing one tracker leaves the process to the others; `end` ends it.
    """

    def __init__(self, store_uri: str, experiment: str, artifact_root: Path) -> None:
        super().__init__(store_uri, experiment, artifact_root)
        self._turn = threading.Lock()

    def stop(self, *, at_once: bool) -> None:
        """Do nothing: the other trackers use the process too."""

    def end(self) -> None:
        """End the child; all trackers are closed by then."""
        super().stop(at_once=self._turn.locked())  # locked by a call that got no answer

    def _call(self, name: str, *arguments: Any) -> None:
        with self._turn:
            super()._call(name, *arguments)


def serve(connection: Connection[Any, Any]) -> None:
    """Execute the calls that arrive until the connection closes; answer each with None, or with an
    error in one line."""
    with suppress(EOFError, OSError):
        arguments = connection.recv()
        store = MlflowStore(*arguments)
        with few_syncs(arguments[0]):
            while True:
                name, arguments = connection.recv()
                error = None
                try:
                    getattr(store, name)(*arguments)
                except Exception as raised:  # noqa: BLE001 - MLflow's, SQLAlchemy's or a server's: the driver counts it
                    error = first_line(raised)
                connection.send(error)


@contextmanager
def few_syncs(store_uri: str) -> Iterator[None]:
    """Inside the block, let SQLite use a write-ahead log, and this process's connections not wait
    for the disk at every commit.

    A crash of any process loses nothing; a power failure can lose the last rows, which the study
    has. At the end the log is merged back into the database, which is one plain file again, unless
    another process has it open (`dsnet-orch ui`); then the next sweep merges it. Such a log works
    on one machine only, so a database on a file system that others may share is left unchanged.
    """
    path = Path(store_uri.removeprefix(SQLITE))
    if not store_uri.startswith(SQLITE) or not is_on_local_disk(path) or not _has_journal(path, "wal", wait_s=1.0):
        yield
        return
    from sqlalchemy import Engine, event

    opened: list[sqlite3.Connection] = []

    def sync_seldom(connection: sqlite3.Connection, _: Any) -> None:
        connection.execute("PRAGMA synchronous = NORMAL")
        opened.append(connection)

    event.listen(Engine, "connect", sync_seldom)
    try:
        yield
    finally:
        event.remove(Engine, "connect", sync_seldom)
        for connection in opened:
            connection.close()
        _has_journal(path, "delete", wait_s=0.1)


def is_on_local_disk(path: Path, mounts: Path = Path("/proc/self/mounts")) -> bool:
    """Whether a file lies on a file system of `LOCAL_FILE_SYSTEMS`; False if that cannot be
    determined."""
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return False
    kinds: dict[Path, str] = {}
    for line in lines:  # a later mount hides an earlier one at the same place
        _, place, kind, *_ = line.split()
        kinds[Path(place.encode().decode("unicode_escape"))] = kind  # a space is \040
    folders = [folder for folder in path.absolute().resolve().parents if folder in kinds]
    return bool(folders) and kinds[folders[0]] in LOCAL_FILE_SYSTEMS


def _has_journal(path: Path, mode: str, wait_s: float) -> bool:
    """Set a database's journal mode; returns whether the database has it now. A file that cannot be
    opened is left for MLflow to report."""
    try:
        with closing(sqlite3.connect(path, timeout=wait_s)) as connection:
            (found,) = connection.execute(f"PRAGMA journal_mode = {mode}").fetchone()
    except sqlite3.Error:
        return False
    return bool(found == mode)


if __name__ == "__main__":
    fix_arithmetic()
    serve(Connection(int(sys.argv[1])))
