"""MLflow in a process of its own.

A row costs 10 ms of Python in MLflow and SQLAlchemy. In a thread of the driver that time is taken from the suggestions, which are Python
too, and the thread, which gives the interpreter's lock away at every statement, gets less than it needs and falls behind by most of the
sweep. Here the rows use the core that is idle while the driver suggests.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from orchestration.tracking import CurvePoint, MlflowStore, TrackedRun, first_line


class MlflowWriter:
    """An `MlflowStore` in a child process, with the same methods, to be called from one thread.

    The child starts with the first call, and again with the next call after it died. It ends when this process does, however that
    happens, after the call that it is in.
    """

    def __init__(
        self, store_uri: str, experiment: str, artifact_root: Path, under: TrackedRun | None = None
    ) -> None:
        self._arguments = (store_uri, experiment, artifact_root, under)
        self._process: subprocess.Popen[bytes] | None = None
        self._is_stopped = False

    def connect(self) -> None:
        """As `MlflowStore.connect`."""
        self._call("connect")

    def open_sweep(self, parent: TrackedRun) -> None:
        """As `MlflowStore.open_sweep`."""
        self._call("open_sweep", parent)

    def write(self, run: TrackedRun, parent: TrackedRun) -> None:
        """As `MlflowStore.write`."""
        self._call("write", run, parent)

    def add_points(self, run: TrackedRun, parent: TrackedRun, points: Sequence[CurvePoint]) -> None:
        """As `MlflowStore.add_points`."""
        self._call("add_points", run, parent, points)

    def add_artifact(self, parent: TrackedRun, path: Path) -> None:
        """As `MlflowStore.add_artifact`."""
        # The child has the folder in which this process was when it started.
        self._call("add_artifact", parent, path.absolute())

    def close_sweep(self, parent: TrackedRun) -> None:
        """As `MlflowStore.close_sweep`."""
        self._call("close_sweep", parent)

    def stop(self) -> None:
        """End the child; a call that waits for it raises, and so do all later ones. May be called from any thread, more than once."""
        self._is_stopped = True
        process, self._process = self._process, None
        if process is None:
            return
        # What was answered is in the store, and what is cut short there is a row that is RUNNING, which the next launch mends.
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):
                _end(pipe).close()

    def _call(self, name: str, *arguments: Any) -> None:
        process = self._process or self._start()
        try:
            pickle.dump((name, arguments), _end(process.stdin))
            _end(process.stdin).flush()
            error = pickle.load(_end(process.stdout))
        except (OSError, EOFError, ValueError, pickle.UnpicklingError) as lost:
            self._process = None
            process.kill()
            raise RuntimeError(f"the process that writes to MLflow ended with status {process.wait()}") from lost
        if error is not None:
            raise RuntimeError(error)

    def _start(self) -> subprocess.Popen[bytes]:
        if self._is_stopped:
            raise RuntimeError("the process that writes to MLflow was stopped")
        packages = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        process = subprocess.Popen(
            # -P: what lies in the user's folder must not stand in for our modules. A session of its own: Ctrl-C reaches the driver
            # alone, which then writes how the sweep ended.
            [sys.executable, "-P", "-m", "orchestration.mlflow_writer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(packages)},
            start_new_session=True,
        )
        pickle.dump(self._arguments, _end(process.stdin))
        self._process = process
        return process


class SharedWriter:
    """One child process for the trackers of several sweeps, each in a thread of its own; whoever makes it stops it.

    The larger sweep's rows say below which row they hang (`TrackedRun.under`).
    """

    def __init__(self, store_uri: str, experiment: str, artifact_root: Path) -> None:
        self._writer = MlflowWriter(store_uri, experiment, artifact_root)
        self._lock = threading.Lock()

    def connect(self) -> None:
        """As `MlflowStore.connect`."""
        with self._lock:
            self._writer.connect()

    def open_sweep(self, parent: TrackedRun) -> None:
        """As `MlflowStore.open_sweep`."""
        with self._lock:
            self._writer.open_sweep(parent)

    def write(self, run: TrackedRun, parent: TrackedRun) -> None:
        """As `MlflowStore.write`."""
        with self._lock:
            self._writer.write(run, parent)

    def add_points(self, run: TrackedRun, parent: TrackedRun, points: Sequence[CurvePoint]) -> None:
        """As `MlflowStore.add_points`."""
        with self._lock:
            self._writer.add_points(run, parent, points)

    def add_artifact(self, parent: TrackedRun, path: Path) -> None:
        """As `MlflowStore.add_artifact`."""
        with self._lock:
            self._writer.add_artifact(parent, path)

    def close_sweep(self, parent: TrackedRun) -> None:
        """As `MlflowStore.close_sweep`."""
        with self._lock:
            self._writer.close_sweep(parent)

    def stop(self) -> None:
        """Nothing: the others still write; see `end`."""

    def end(self) -> None:
        """End the child."""
        self._writer.stop()


def serve(requests: IO[bytes], replies: IO[bytes]) -> None:
    """Make the calls that arrive, until the other side is gone; answer each with None, or with what went wrong in one line."""
    store = MlflowStore(*pickle.load(requests))
    with suppress(EOFError, BrokenPipeError, pickle.UnpicklingError):
        while True:
            name, arguments = pickle.load(requests)
            error = None
            try:
                getattr(store, name)(*arguments)
            except Exception as raised:  # noqa: BLE001 - MLflow's, SQLAlchemy's or a server's: the driver counts it
                error = first_line(raised)
            pickle.dump(error, replies)
            replies.flush()


def _end(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


def _main() -> None:
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not get between the replies
    serve(sys.stdin.buffer, replies)
    os._exit(0)  # nobody is left to hear what closing a broken pipe says


if __name__ == "__main__":
    _main()
