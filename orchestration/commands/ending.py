"""The early end of a launch: what is said about it, and its exit code."""

from __future__ import annotations

import os
import stat
import threading

import click

from dsnet.errors import ClusterLostError, StoppedError, StorageStoppedError
from dsnet.stop_signals import StopRequest
from orchestration.commands.messages import complain
from orchestration.progress import ProgressView
from orchestration.workers.cluster_watch import lost_sentence

INTERRUPTED = 130


class Ending:
    """Tells once why a launch ends early and how it is continued, from whichever thread comes
    first."""

    def __init__(self, progress: ProgressView, command: str) -> None:
        """Keep the view that shows messages, and the command that continues the launch."""
        self.request: StopRequest | None = None
        """The stop request of the launch; None before it can be stopped."""
        self._progress = progress
        self._command = command
        self._lock = threading.Lock()
        self._is_told = False

    def hear(self, name: str) -> None:
        """Say that a signal was heard."""
        if name == "SIGHUP":
            leave_terminal()
        self._progress.say(f"{name}: stopping after the current step or trial (repeat to stop immediately) ...")

    def tell(self, error: StoppedError | KeyboardInterrupt) -> int:
        """Say why the launch ends; returns the exit code."""
        if isinstance(error, StorageStoppedError):
            return self._tell_stored(error)
        return self._tell_once(str(error) if isinstance(error, ClusterLostError) else None)

    def tell_lost(self, lost: str | None) -> int:
        """Say that the launch ends because of what was lost of the cluster, or because of a stop
        request if that is None; returns the exit code."""
        return self._tell_once(None if lost is None else lost_sentence(lost))

    def _tell_stored(self, error: StorageStoppedError) -> int:
        """Say that the storage ended the launch, and that something has to be corrected first."""
        with self._lock:
            self._is_told = True
            complain(f"error: {error}")
            complain("finished work is kept. When that is corrected, continue with:")
            click.echo(f"  {self._command}", err=True)
        return error.exit_code

    def _tell_once(self, problem: str | None) -> int:
        with self._lock:
            if not self._is_told:
                self._is_told = True
                if self.request is not None and self.request():
                    problem = None  # a closing terminal ends the processes of Ray too
                said = "stopped; finished work is kept" if problem is None else f"error: {problem}"
                complain(f"{said}. Continue with:")
                click.echo(f"  {self._command}", err=True)  # not wrapped, to be copied
        return INTERRUPTED if self.request is None else self.request.exit_code


def leave_terminal() -> None:
    """Write no more to a terminal that is closed: every write to it would fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):  # `isatty` is False for a closed terminal
            os.dup2(nowhere, descriptor)
    os.close(nowhere)
