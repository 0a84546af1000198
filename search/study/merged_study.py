"""A merged study: a journal with the trials of several studies and the origin of each.

It is derived from these studies: missing trials are added again, and a file made for other
dimensions or objectives is replaced. It holds only finished trials, one record each, in the order
in which they are added.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from dsnet.files import writing
from search.study.journal_chain import ChainWriter, chain_path, journal_state
from search.study.runner import State
from search.study.study import Objective, repair_journal
from search.suggest.samplers import quiet_optuna
from search.suggest.space import Scalar

_IDENTITY_ATTR = "dsnet_merged_study"
_STATES = {"complete": TrialState.COMPLETE, "failed": TrialState.FAIL, "pruned": TrialState.PRUNED}


@dataclass(frozen=True, kw_only=True)
class MergedTrial:
    """A finished trial of one of the studies.

    Attributes:
        origin: unique name of its study and trial, e.g. "s0-3fa29c01/trial-0042".
        state: its state in its study.
        params: parameter values by dotted name, including those that its study does not vary.
        values: values of the objectives; None if it has none.
        constraints: constraint values by name; a constraint holds where its value is <= 0.
        metrics: all metrics that it returned.
        reason: why it failed or was stopped.
        reports: intermediate values by step.
        start_ms: Unix time in ms at which it started.
        finished_ms: Unix time in ms at which it finished.
    """

    origin: str
    state: State
    params: Mapping[str, Scalar]
    values: tuple[float, ...] | None
    constraints: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    reason: str | None = None
    reports: Mapping[int, float] = field(default_factory=dict)
    start_ms: int = 0
    finished_ms: int = 0


class MergedStudy:
    """A merged study that is open for writing; created by `open`.

    Attributes:
        origins: origins of its trials, in the order of their numbers.
    """

    def __init__(self, path: Path, distributions: Mapping[str, BaseDistribution], study: optuna.Study) -> None:
        self._path = path
        self._distributions = distributions
        self._study = study
        self.origins = [str(trial.user_attrs["origin"]) for trial in study.get_trials(deepcopy=False)]
        self._known = set(self.origins)
        self._chain = ChainWriter(path)

    @classmethod
    def open(
        cls,
        path: Path,
        name: str,
        objectives: Sequence[Objective],
        distributions: Mapping[str, BaseDistribution],
    ) -> MergedStudy:
        """Open the study at `path`; it is created if there is none, or replaced if it has other
        objectives or dimensions.

        Only for the process that holds the run's lock.

        Args:
            path: path of the journal file.
            name: name of a new study in optuna-dashboard.
            objectives: the objectives, in the order of the trials' values.
            distributions: distribution of every parameter that a trial may have.

        Raises:
            StorageError: it cannot be written.
        """
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            if journal_state(path).damage is not None:  # all of it is derived again
                path.unlink(missing_ok=True)
            if not path.exists():
                chain_path(path).unlink(missing_ok=True)
            repair_journal(path)
            study = _existing(path)
            identity = _identity(objectives, distributions)
            if study is None or study.user_attrs.get(_IDENTITY_ATTR) != identity:
                path.unlink(missing_ok=True)
                chain_path(path).unlink(missing_ok=True)
                study = _created(path, name, objectives, identity)
        return cls(path, distributions, study)

    def add(self, trial: MergedTrial) -> bool:
        """Write a trial as one record unless the study has it; returns whether it was written.

        Raises:
            StorageError: it cannot be written.
        """
        if trial.origin in self._known:
            return False
        with writing(self._path):
            self._study.add_trial(_frozen(trial, self._distributions))
            self._chain.catch_up()
        self.origins.append(trial.origin)
        self._known.add(trial.origin)
        return True


def _existing(path: Path) -> optuna.Study | None:
    """The study in the file; None if there is none or the file is unreadable, since all of it can
    be derived again."""
    if not path.exists():
        return None
    try:
        storage = JournalStorage(JournalFileBackend(str(path)))
        studies = storage.get_all_studies()
        with quiet_optuna():
            return optuna.load_study(study_name=studies[0].study_name, storage=storage) if studies else None
    except (ValueError, KeyError, TypeError, AssertionError):
        return None


def _created(path: Path, name: str, objectives: Sequence[Objective], identity: Mapping[str, Any]) -> optuna.Study:
    """Create a study; its file is renamed when it is complete, so that a kill leaves no incomplete
    study."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    with quiet_optuna():
        storage = JournalStorage(JournalFileBackend(str(partial)))
        directions = [objective.goal for objective in objectives]
        study = optuna.create_study(study_name=name, storage=storage, directions=directions)
        study.set_metric_names([objective.name for objective in objectives])
        study.set_user_attr(_IDENTITY_ATTR, dict(identity))
        os.replace(partial, path)
        return optuna.load_study(study_name=name, storage=JournalStorage(JournalFileBackend(str(path))))


def _identity(objectives: Sequence[Objective], distributions: Mapping[str, BaseDistribution]) -> dict[str, Any]:
    return {
        "objectives": [[objective.name, objective.goal] for objective in objectives],
        "distributions": {
            name: optuna.distributions.distribution_to_json(item) for name, item in sorted(distributions.items())
        },
    }


def _frozen(trial: MergedTrial, distributions: Mapping[str, BaseDistribution]) -> FrozenTrial:
    frozen = create_trial(
        state=_STATES[trial.state],
        values=trial.values if trial.state == "complete" else None,
        params=dict(trial.params),
        distributions={name: distributions[name] for name in trial.params},
        user_attrs={"origin": trial.origin, "metrics": dict(trial.metrics), "reason": trial.reason},
        intermediate_values=dict(trial.reports),
        constraints=dict(trial.constraints),
    )
    frozen.datetime_start = datetime.fromtimestamp(trial.start_ms / 1000)
    frozen.datetime_complete = datetime.fromtimestamp(max(trial.start_ms, trial.finished_ms) / 1000)
    return frozen
