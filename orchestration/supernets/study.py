"""The merged study of a sweep of supernets: the gates of all members, and the supernets that were
stopped or failed.

The members' own studies and records are authoritative; this study contains a copy of all of them,
and records that it lacks are added again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from optuna.distributions import BaseDistribution, CategoricalDistribution

from orchestration.config.resolve import gate_space
from orchestration.config.sweep import SweepConfig
from orchestration.runs.folder import RunDir
from orchestration.supernets.entries import MemberEntry
from orchestration.supernets.members import supernet_part
from orchestration.supernets.results import GateId, SupernetSweepResults
from search.study.merged_study import MergedStudy, MergedTrial
from search.study.study import Objective, TrialRecord
from search.suggest.space import Scalar, parse_space

SUPERNET = "supernet"
"""The parameter whose value is the member's name."""


class SupernetStudy:
    """Write access to the merged study; create it with `open`."""

    def __init__(self, study: MergedStudy, settings: Mapping[str, Mapping[str, Scalar]]) -> None:
        self._study = study
        self._settings = settings

    @classmethod
    def open(cls, run: RunDir, config: SweepConfig, entries: Sequence[MemberEntry]) -> SupernetStudy:
        """Open the study of a sweep; it is created anew if space, metrics or members have
        changed."""
        names = tuple(entry.name for entry in entries)
        gates = parse_space({key: distribution.written() for key, distribution in gate_space(config).items()})
        distributions: dict[str, BaseDistribution] = {
            SUPERNET: CategoricalDistribution(names),
            **supernet_part(config).distributions,
            **gates.distributions,
        }
        objectives = [Objective(metric.name, metric.goal) for metric in config.metrics]
        study = MergedStudy.open(run.merged_journal, config.name, objectives, distributions)
        return cls(study, {entry.name: entry.settings for entry in entries})

    def add_gate(self, supernet: str, record: TrialRecord) -> None:
        """Add a gate trial of a member."""
        self._study.add(
            MergedTrial(
                origin=GateId(supernet, record.slot).name,
                state=record.state,
                params={**self._params(supernet), **record.params},
                values=record.values,
                constraints=record.constraints,
                metrics=record.metrics,
                reason=record.reason,
                start_ms=record.start_ms,
                finished_ms=record.finished_ms,
            )
        )

    def add_supernet(self, entry: MemberEntry) -> None:
        """Add a supernet that was stopped or failed; the others are represented by their gates."""
        if entry.state not in ("stopped", "failed"):
            return
        self._study.add(
            MergedTrial(
                origin=entry.name,
                state="pruned" if entry.state == "stopped" else "failed",
                params=self._params(entry.name),
                values=None,
                reason=entry.reason,
                reports=dict(entry.reports),
                start_ms=entry.start_ms,
                finished_ms=entry.end_ms,
            )
        )

    def add_missing(self, results: SupernetSweepResults) -> None:
        """Add the records that a killed launch did not write: supernets first, then the gates of
        each by slot."""
        for entry in results.entries:
            self.add_supernet(entry)
        for name, member in results.supernets.items():
            for record in member.records:
                self.add_gate(name, record)

    def _params(self, supernet: str) -> dict[str, Scalar]:
        return {SUPERNET: supernet, **self._settings[supernet]}
