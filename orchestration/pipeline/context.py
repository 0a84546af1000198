"""The state that the stages of one launch share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsnet.errors import StoppedError
from dsnet.stop_signals import StopRequest
from orchestration.config.sweep import SweepConfig
from orchestration.pipeline.run_copies import RunCopies
from orchestration.pipeline.storage_watch import StorageWatch
from orchestration.prepare.preparation import Prepared
from orchestration.progress import ProgressView
from orchestration.results.run import RunResults
from orchestration.runs.folder import RunDir
from orchestration.runs.manifest import Manifest
from orchestration.runs.stages import StageDir, StagePlan, run_stage
from orchestration.tracking.protocol import Tracker
from orchestration.workers.cluster_watch import check_cluster
from orchestration.workers.training_watch import StallRules
from search.study.study import TrialRecord


def _ignore(record: TrialRecord) -> None:
    """Ignore a recorded trial."""


@dataclass(frozen=True)
class Launch:
    """The state that the stages of one launch share."""

    prepared: Prepared
    results: RunResults
    """The results of the run so far."""
    manifest: Manifest
    tracker: Tracker
    progress: ProgressView
    stop: StopRequest
    storage: StorageWatch
    on_record: Callable[[TrialRecord], None] = _ignore
    """Called with every recorded trial; a sweep of supernets adds the trials of all members to one
    study."""
    copies: RunCopies | None = None
    """The copies of finished stages at `storage.artifacts`; None without that setting."""
    on_test_opening: Callable[[], int] | None = None
    """In a member of a sweep of supernets: counts the opening for the whole sweep, and returns how
    often the sweep has read `test`."""

    @property
    def run(self) -> RunDir:
        """The run folder."""
        return self.results.run

    @property
    def config(self) -> SweepConfig:
        """The resolved configuration."""
        return self.prepared.config

    def run_stage(self, plan: StagePlan, work: Callable[[Path], Sequence[Path]]) -> StageDir:
        """Run a planned stage unless it is done; `results` hold its outputs afterwards. Arguments
        are those of `orchestration.runs.stages.run_stage`."""
        try:
            folder = run_stage(self.run, plan, work)
        except StoppedError:
            if self.copies is not None and plan.name == "search":
                self.copies.keep(plan.folder.path)
            raise
        self.keep(plan)
        self.results.refresh()
        return folder

    def keep(self, plan: StagePlan) -> None:
        """Copy a finished stage, if copies are wanted and an earlier launch has not made this
        one."""
        if self.copies is not None and not (plan.is_done and self.copies.has(plan.folder.path)):
            self.copies.keep(plan.folder.path)

    def keep_search(self, folder: StageDir) -> None:
        """Copy a search that goes on, now and then, if copies are wanted."""
        if self.copies is not None:
            self.copies.keep_sometimes(folder.path)

    def stall_rules(self, stage: str) -> StallRules:
        """Rules for stalled workers of a stage, whose messages begin with its name."""
        return StallRules(tell=lambda text: self.progress.warn(f"{stage}: {text}"))

    def count_test_opening(self, who: str) -> int:
        """Record that `test` is read; returns how often it has been read, by the whole sweep if
        this run is part of one."""
        own = self.manifest.count_test_opening(who)
        return own if self.on_test_opening is None else max(own, self.on_test_opening())

    def check_stop(self) -> None:
        """Raise StoppedError if a stop was requested, or if Ray was lost."""
        if self.stop():
            raise StoppedError("the sweep was stopped")
        check_cluster()
