"""What the stages of one launch share."""

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


def _nobody(record: TrialRecord) -> None:
    """Hears and does nothing."""


@dataclass(frozen=True)
class Launch:
    """What the stages of one launch share."""

    prepared: Prepared
    run: RunDir
    manifest: Manifest
    tracker: Tracker
    progress: ProgressView
    stop: StopRequest
    on_record: Callable[[TrialRecord], None] = _nobody
    """Hears of every recorded trial: a sweep of supernets shows those of all its members in one
    study."""
    on_test_opening: Callable[[], int] | None = None
    """Of a member of a sweep of supernets: counts the opening for the whole sweep, and says how
    often that has read `test`."""

    @property
    def config(self) -> SweepConfig:
        """The resolved configuration."""
        return self.prepared.config

    def count_test_opening(self, who: str) -> int:
        """Record that `test` is read; how often it has been, by the whole sweep where this run is a
        part of one."""
        own = self.manifest.count_test_opening(who)
        return own if self.on_test_opening is None else max(own, self.on_test_opening())

    def check_stop(self) -> None:
        """Raise StoppedError where a stop was asked for."""
        if self.stop():
            raise StoppedError("the sweep was stopped")
