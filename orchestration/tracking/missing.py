"""A mark in the run folder which says that MLflow lacks rows of the run, so that the next launch
writes them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from dsnet.errors import CheckpointError, DsnetError
from dsnet.files import read_sealed, write_sealed
from dsnet.wording import plural
from orchestration.progress import ProgressView
from orchestration.results.mlflow_store import whole_sweep
from orchestration.runs.folder import RunDir
from orchestration.tracking.protocol import TrackingSummary

logger = logging.getLogger(__name__)


class MissingRows:
    """The mark of a run, or of the sweep of supernets that it is part of, during one launch.

    It is written when the first write fails, so that it is there after a kill too, and removed when
    a launch or `dsnet-orch sync` has written everything. Its trackers' threads share it.

    Args:
        run: the run; its folder exists.
    """

    def __init__(self, run: RunDir) -> None:
        self._path = mark_of(run)
        self._lock = threading.Lock()
        self._num_missing = 0
        self.is_found = self._path.exists()
        """Whether an earlier launch left rows unwritten."""
        self._is_repeated = False

    def warned(self, warn: Callable[[str], None]) -> Callable[[str], None]:
        """A function for a tracker's one warning, which also sets the mark."""

        def both(text: str) -> None:
            self._write(1)
            warn(text)

        return both

    def repeat(self, replay: Callable[[], None], progress: ProgressView) -> None:
        """Write all rows of the run again if an earlier launch left some unwritten.

        Args:
            replay: gives all rows to the trackers of this launch.
            progress: is told.
        """
        if not self.is_found:
            return
        progress.say(f"{self._told()} failed in an earlier launch; they are repeated now")
        try:
            replay()
        except DsnetError as error:  # its results are not whole; the launch makes them again, and the mark stays
            progress.warn(f"the rows of MLflow cannot all be repeated yet ({error})")
        else:
            self._is_repeated = True

    def _told(self) -> str:
        """Number of rows that an earlier launch could not write, as a phrase."""
        try:
            number = int(read_sealed(self._path)["num_rows"])
        except (CheckpointError, LookupError, TypeError, ValueError):
            return "writes to MLflow"  # that there are some is all that matters
        return f"{plural(number, 'write')} to MLflow"

    def add(self, summary: TrackingSummary) -> None:
        """Count the writes that a tracker has lost; it is closed."""
        with self._lock:
            self._num_missing += summary.num_unsent
            if summary.num_unsent:
                self._write(self._num_missing)

    def settle(self) -> None:
        """Remove the mark if nothing is missing; all trackers are closed."""
        if not self._num_missing and (self._is_repeated or not self.is_found):
            self._path.unlink(missing_ok=True)

    def _write(self, num_rows: int) -> None:
        try:
            write_sealed(self._path, {"num_rows": num_rows})
        except CheckpointError as error:  # the sweep goes on without its mark; its own files say what is wrong
            logger.warning("%s", error)


def mark_of(run: RunDir) -> Path:
    """The file of the mark."""
    return whole_sweep(run).unsent_json
