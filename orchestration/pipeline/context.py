"""The state that the stages of one launch share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dsnet.errors import StoppedError
from dsnet.stop_signals import StopRequest
from orchestration.config.sweep import SweepConfig
from orchestration.prepare.preparation import Prepared
from orchestration.progress import ProgressView
from orchestration.runs.folder import RunDir
from orchestration.runs.manifest import Manifest
from orchestration.tracking.protocol import Tracker
from search.study.study import TrialRecord


def _ignore(record: TrialRecord) -> None:
    """Ignore a recorded trial."""


@dataclass(frozen=True)
class Launch:
    """The state that the stages of one launch share."""

    prepared: Prepared
    run: RunDir
    manifest: Manifest
    tracker: Tracker
    progress: ProgressView
    stop: StopRequest
    on_record: Callable[[TrialRecord], None] = _ignore
    """Called with every recorded trial; a sweep of supernets adds the trials of all members to one
    study."""
    on_test_opening: Callable[[], int] | None = None
    """In a member of a sweep of supernets: counts the opening for the whole sweep, and returns how
    often the sweep has read `test`."""

    @property
    def config(self) -> SweepConfig:
        """The resolved configuration."""
        return self.prepared.config

    def count_test_opening(self, who: str) -> int:
        """Record that `test` is read; returns how often it has been read, by the whole sweep if
        this run is part of one."""
        own = self.manifest.count_test_opening(who)
        return own if self.on_test_opening is None else max(own, self.on_test_opening())

    def check_stop(self) -> None:
        """Raise StoppedError if a stop was requested."""
        if self.stop():
            raise StoppedError("the sweep was stopped")
