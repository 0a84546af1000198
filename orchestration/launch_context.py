"""What the stages of one launch share."""

from __future__ import annotations

from dataclasses import dataclass

from dsnet.errors import StoppedError
from orchestration.config import SweepConfig
from orchestration.preparation import Prepared
from orchestration.progress import ProgressView
from orchestration.rundir import Manifest, RunDir
from orchestration.signals import StopRequest
from orchestration.tracking import Tracker


@dataclass(frozen=True)
class Launch:
    """What the stages of one launch share."""

    prepared: Prepared
    run: RunDir
    manifest: Manifest
    tracker: Tracker
    progress: ProgressView
    stop: StopRequest

    @property
    def config(self) -> SweepConfig:
        """The resolved configuration."""
        return self.prepared.config

    def check_stop(self) -> None:
        """Raise StoppedError where a stop was asked for."""
        if self.stop():
            raise StoppedError("the sweep was stopped")
