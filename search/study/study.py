"""The study on disk: an Optuna journal that holds only finished trials, one record each.

Optuna itself writes several records per trial, so that a kill in between would leave the trial
RUNNING for ever. Here a trial is written as one line when it is finished; optuna-dashboard can open
the journal. With cohorts, trials are written in slot order, so that the trial in slot k is the
study's trial number k. Decisions that a resumed sweep must repeat (points that a person enqueued,
rungs of halving) are attributes of the study. One process writes (the driver, which holds the run's
lock); any number may read at the same time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from dsnet.errors import CheckpointError, ConfigError, NotFoundError
from dsnet.files import writing
from search.study.halving import ParetoHalving
from search.study.journal_chain import MARK, ChainWriter, chain_path, checked_lines
from search.study.journal_reader import JournalTrial, read_lines
from search.study.runner import State
from search.suggest.samplers import SamplerSettings, check_sampler, quiet_optuna
from search.suggest.space import Scalar, Space, check_point, parse_space

_IDENTITY_ATTR = "dsnet_study"
_IDENTITY_VERSION = 2
_ENQUEUED_ATTR = "dsnet_enqueued"
_RUNG_ATTR = "dsnet_rung"
_ARRAYS_ATTR = "dsnet_arrays"
_STATES: Mapping[TrialState, State] = {
    TrialState.COMPLETE: "complete",
    TrialState.FAIL: "failed",
    TrialState.PRUNED: "pruned",
}
_OPTUNA_STATES = {name: state for state, name in _STATES.items()}


@dataclass(frozen=True)
class Objective:
    """A metric that a sweep optimises, and its direction."""

    name: str
    goal: Literal["maximize", "minimize"]


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """Settings on which the suggestions of a study depend; they are fixed when the study is
    created.

    Attributes:
        name: name of the study in optuna-dashboard.
        space: the search space.
        objectives: metrics that every trial must return as finite values.
        sampler: the sampler and its options.
        seed: seed of the whole sweep, from which every slot derives its own (`slot_seed`).
        cohort: >= 1; number of trials that are suggested before any of them is told. Independent of
            the number of workers.
        order: `cohorts`: suggestions depend only on earlier cohorts. `asynchronous`: they depend on
            the trials that have finished when a worker is free, which differ from sweep to sweep.
        enqueue: points of the first slots; missing parameters are drawn.
        halving: rule that prunes trials at rungs; None = every trial runs to its end. Requires
            cohorts.
    """

    name: str
    space: Space
    objectives: Sequence[Objective]
    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    seed: int = 0
    cohort: int = 8
    order: Literal["cohorts", "asynchronous"] = "cohorts"
    enqueue: Sequence[Mapping[str, Scalar]] = ()
    halving: ParetoHalving | None = None

    def __post_init__(self) -> None:
        check_sampler(self.sampler, len(self.objectives))
        if self.cohort < 1:
            raise ConfigError(f"sampler.cohort is {self.cohort}, but must be 1 or more")
        if not self.objectives:
            raise ConfigError("metrics: a study needs at least one objective")
        if self.halving is not None and self.order == "asynchronous":
            raise ConfigError(
                "pruner.name: with sampler.order asynchronous trials cannot be compared at rungs; set pruner.name none, "
                "or sampler.order cohorts"
            )
        for point in self.enqueue:
            check_point(self.space, point)

    def identity(self) -> dict[str, Any]:
        """The settings that must not change between launches on one study, as plain JSON values."""
        return {
            "objectives": [[objective.name, objective.goal] for objective in self.objectives],
            "space_hash": self.space.hash,
            "sampler": self.sampler.name,
            "sampler_options": dict(self.sampler.options),
            "startup": self.sampler.startup,
            "cohort": self.cohort,
            "order": self.order,
            "enqueue": [dict(point) for point in self.enqueue],
            "halving": None
            if self.halving is None
            else [self.halving.factor, list(self.halving.rungs), self.halving.keeps_front],
            "seed": self.seed,
        }


@dataclass(frozen=True)
class TrialRecord:
    """A finished trial, for reports and fronts.

    Attributes:
        slot: its index in the sweep, from 0.
        number: its number in Optuna's study.
        state: "complete", "failed", or "pruned" (ended early without an error).
        params: parameter values by dotted name.
        values: values of the objectives, in the study's order; None unless complete.
        metrics: all metrics that it returned; for a pruned trial those of its last stage.
        reason: why it failed or was pruned; None if it is complete.
        duration_s: seconds of work.
        constraints: constraint values by name; a constraint holds where its value is <= 0.
        finished_ms: Unix time in ms at which its record was made.
        rungs: for a trial in stages, values of the objectives at each rung that it reached.
        arrays_sha256: SHA-256 of the file with the arrays that it returned; None if it returned
            none, or in studies of earlier releases.
    """

    slot: int
    number: int
    state: State
    params: Mapping[str, Scalar]
    values: tuple[float, ...] | None
    metrics: Mapping[str, float]
    reason: str | None
    duration_s: float
    constraints: Mapping[str, float] = field(default_factory=dict)
    finished_ms: int = 0
    rungs: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    arrays_sha256: str | None = None

    @property
    def is_feasible(self) -> bool:
        """Whether it is complete and all constraints hold, as points of a front must be."""
        return self.state == "complete" and all(value <= 0 for value in self.constraints.values())

    @property
    def start_ms(self) -> int:
        """Unix time in ms at which its work began."""
        return self.finished_ms - round(1000 * self.duration_s)


@dataclass(frozen=True)
class RungRecord:
    """Result of a trial at a rung.

    Attributes:
        state: "complete" if it may go on.
        metrics: its metrics at the rung.
        reason: why it ends here (failed, or pruned by a hard constraint); None if it may go on.
        duration_s: seconds of work up to the rung.
    """

    state: State
    metrics: dict[str, float]
    reason: str | None
    duration_s: float


@dataclass(frozen=True)
class Suggestion:
    """A sampler's suggestion for a slot, with the sampler's own attributes of the trial (e.g.
    NSGA-II's generation)."""

    params: Mapping[str, Scalar]
    distributions: Mapping[str, BaseDistribution]
    sampler_notes: Mapping[str, Any]


class StudyJournal:
    """A study that is open for writing; created by `open`.

    Attributes:
        settings: the study's settings.
    """

    def __init__(self, path: Path, settings: StudySettings, study: optuna.Study) -> None:
        self.settings = settings
        self._path = path
        self._study = study
        # Optuna copies all attributes at every access.
        attrs = study.user_attrs
        noted = attrs.get(_ENQUEUED_ATTR, {})
        self._enqueued: dict[int, dict[str, Scalar]] = {int(slot): point for slot, point in noted.items()}
        self._stages = {name: _stages_in(stages) for name, stages in attrs.items() if name.startswith(f"{_RUNG_ATTR}:")}
        self._chain = ChainWriter(path)
        self._shared = SharedDistributions()
        self._num_trials = len(self.trials())

    @classmethod
    def open(cls, path: Path, settings: StudySettings) -> StudyJournal:
        """Open the study at `path`, or create it; an incomplete last record is removed first. Every
        record that is written is also recorded in a chain beside it (`journal_chain`).

        Only for the process that holds the run's lock.

        Raises:
            ConfigError: the existing study was made with other settings.
            CheckpointError: the file is not a journal of ours, or records of it are missing or were
                changed.
            StorageError: it cannot be written.
        """
        checked_lines(path)
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            repair_journal(path)
            with _reading(path):
                storage = JournalStorage(JournalFileBackend(str(path)))
            study = _load_or_create(storage, settings)
            settings = _with_order_of_study(study, settings)
            _check_identity(study, path, settings)
            return cls(path, settings, study)

    def trials(self) -> list[FrozenTrial]:
        """All finished trials as Optuna's objects, in the order of their numbers; not copies, and
        not to be changed."""
        trials = self._study.get_trials(deepcopy=False)
        self._shared.share(trials)
        return trials

    def records(self) -> list[TrialRecord]:
        """All finished trials in slot order."""
        return _by_slot(list(map(record_of, self.trials())), self._study.user_attrs)

    def append(self, suggestion: Suggestion, record: TrialRecord) -> None:
        """Write a finished trial as one record; it is on disk when this returns.

        Raises:
            ValueError: the record's number or slot is not the next one.
            StorageError: it cannot be written; nothing of the trial is kept, and the next `open`
                repairs the file.
        """
        number = self._num_trials
        if record.number != number:
            raise ValueError(
                f"slot {record.slot} was to be trial number {record.number}, but the next number is {number}"
            )
        if self.settings.order == "cohorts" and record.slot != number:
            raise ValueError(
                f"slot {record.slot} was to be written as trial number {number}: slots are written in order"
            )
        with self._recording():
            self._study.add_trial(_frozen(suggestion, record))
        self._num_trials += 1

    @property
    def enqueued(self) -> dict[int, dict[str, Scalar]]:
        """Points that people enqueued during the sweep, by the slots assigned to them."""
        return dict(self._enqueued)

    def note_enqueued(self, points: Mapping[int, Mapping[str, Scalar]]) -> None:
        """Assign points to slots permanently; the assignment is on disk when this returns."""
        noted = self._enqueued | {slot: dict(point) for slot, point in points.items()}
        with self._recording():
            self._study.set_user_attr(_ENQUEUED_ATTR, {str(slot): point for slot, point in noted.items()})
        self._enqueued = noted

    def stage(self, first_slot: int, rung: int) -> dict[int, RungRecord]:
        """Known results, by slot, of the trials of one cohort at a rung; the cohort is given by its
        first slot."""
        return dict(self._stages.get(_rung_attr(first_slot, rung), {}))

    def note_stage(self, first_slot: int, rung: int, stages: Mapping[int, RungRecord]) -> None:
        """Store the results of a cohort's trials at a rung; they are on disk when this returns."""
        noted = {str(slot): asdict(stage) for slot, stage in stages.items()}
        with self._recording():
            self._study.set_user_attr(_rung_attr(first_slot, rung), noted)
        self._stages[_rung_attr(first_slot, rung)] = dict(stages)

    def note_arrays(self, slot: int, sha256: str) -> None:
        """Store the SHA-256 of arrays of a recorded trial that were made again with other bits."""
        noted = {**self._study.user_attrs.get(_ARRAYS_ATTR, {}), str(slot): sha256}
        with self._recording():
            self._study.set_user_attr(_ARRAYS_ATTR, noted)

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Context manager for writing a record of the journal and, at its end, of the chain."""
        with writing(self._path):
            yield
            self._chain.catch_up()


def _rung_attr(first_slot: int, rung: int) -> str:
    """The attribute with the results of a cohort at a rung."""
    return f"{_RUNG_ATTR}:{first_slot}:{rung}"


def _stages_in(noted: Mapping[str, Any]) -> dict[int, RungRecord]:
    return {int(slot): RungRecord(**item) for slot, item in noted.items()}


class SharedDistributions:
    """Lets the trials of a study share equal distributions, of which Optuna makes new ones for
    every trial that it reads: several kilobytes each."""

    def __init__(self) -> None:
        self._num_shared = 0
        self._known: dict[tuple[tuple[str, BaseDistribution], ...], dict[str, BaseDistribution]] = {}

    def share(self, trials: Sequence[FrozenTrial]) -> None:
        """Replace the distributions of the trials that have come since the last call."""
        for trial in trials[self._num_shared :]:
            own = trial.distributions
            trial.distributions = self._known.setdefault(tuple(own.items()), own)
        self._num_shared = len(trials)


def load_records(path: Path) -> list[TrialRecord]:
    """Read a study's finished trials, in slot order.

    It changes nothing and takes no lock, so that it may be called while the driver writes.

    Raises:
        NotFoundError: the file does not exist.
        CheckpointError: the file is not a journal of ours, or records of it are missing or were
            changed.
    """
    lines = checked_lines(path)
    if not path.is_file():
        raise NotFoundError(f"no study at {path}: the search has not begun; launch the sweep first")
    content = read_lines(lines)
    if content is not None:
        if content.trials and _IDENTITY_ATTR not in content.user_attrs:
            raise _foreign(path)
        with _reading(path):
            records = [_record(number, trial) for number, trial in enumerate(content.trials)]
            return _by_slot(records, content.user_attrs)
    with _reading(path):
        storage = JournalStorage(JournalFileBackend(str(path)))
    studies = storage.get_all_studies()
    if not studies:
        return []
    trials = storage.get_all_trials(studies[0]._study_id, deepcopy=False)
    if trials and _IDENTITY_ATTR not in studies[0].user_attrs:
        raise _foreign(path)
    with _reading(path):
        return _by_slot(list(map(record_of, trials)), studies[0].user_attrs)


def has_study(path: Path) -> bool:
    """Whether there is a study at `path`, even if its journal was lost."""
    return path.exists() or chain_path(path).exists()


def load_enqueued(path: Path) -> dict[int, dict[str, Scalar]]:
    """Read the enqueued points to which slots are assigned, by slot; it changes nothing and takes
    no lock.

    Raises:
        CheckpointError: the file is not a journal, or records of it are missing or were changed.
    """
    content = read_lines(checked_lines(path))
    if content is not None:
        noted = content.user_attrs.get(_ENQUEUED_ATTR, {})
    else:
        with _reading(path):
            storage = JournalStorage(JournalFileBackend(str(path)))
        studies = storage.get_all_studies()
        noted = studies[0].user_attrs.get(_ENQUEUED_ATTR, {}) if studies else {}
    return {int(slot): point for slot, point in noted.items()}


def _by_slot(records: Sequence[TrialRecord], attrs: Mapping[str, Any]) -> list[TrialRecord]:
    noted = {int(slot): str(sha256) for slot, sha256 in attrs.get(_ARRAYS_ATTR, {}).items()}
    again = [replace(each, arrays_sha256=noted[each.slot]) if each.slot in noted else each for each in records]
    return sorted(again, key=lambda record: record.slot)


def repair_journal(path: Path) -> int:
    """Repair a journal whose writer was killed; only for the process that holds the run's lock.

    An incomplete last record would make every later write fail, so the file is truncated after its
    last newline. Optuna's lock file is removed, since one left by a killed process would delay the
    first write by half a minute.

    Returns:
        The number of bytes that were removed.
    """
    # Optuna's lock is a symbolic link beside the journal.
    path.with_name(path.name + ".lock").unlink(missing_ok=True)
    if not path.exists():
        return 0
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        whole = _end_of_last_line(file, size)
        if whole < size:
            file.truncate(whole)
            os.fsync(file.fileno())
    return size - whole


def record_of(trial: FrozenTrial) -> TrialRecord:
    """Convert a finished trial of ours from Optuna's form."""
    finished_ms = 0 if trial.datetime_complete is None else round(1000 * trial.datetime_complete.timestamp())
    values = None if trial.values is None else tuple(trial.values)
    plain = JournalTrial(
        trial.state.value, values, trial.params, trial.user_attrs, trial.constraints, finished_ms=finished_ms
    )
    return _record(trial.number, plain)


def _record(number: int, trial: JournalTrial) -> TrialRecord:
    attrs = trial.user_attrs
    return TrialRecord(
        slot=attrs["slot"],
        number=number,
        state=_STATES[TrialState(trial.state)],
        params=trial.params,
        values=trial.values,
        metrics=attrs["metrics"],
        reason=attrs["reason"],
        duration_s=attrs["duration_s"],
        constraints=trial.constraints,
        finished_ms=trial.finished_ms,
        rungs={int(rung): tuple(values) for rung, values in attrs.get("rungs", {}).items()},
        arrays_sha256=attrs.get("arrays_sha256"),
    )


def optuna_state(state: State) -> TrialState:
    """Optuna's value for a trial's state."""
    return _OPTUNA_STATES[state]


def _frozen(suggestion: Suggestion, record: TrialRecord) -> FrozenTrial:
    rungs = {str(rung): list(values) for rung, values in record.rungs.items()}
    trial = create_trial(
        state=optuna_state(record.state),
        values=record.values,
        params=dict(suggestion.params),
        distributions=dict(suggestion.distributions),
        user_attrs={
            "slot": record.slot,
            "metrics": dict(record.metrics),
            "reason": record.reason,
            "duration_s": record.duration_s,
            **({"rungs": rungs} if rungs else {}),
            **({} if record.arrays_sha256 is None else {"arrays_sha256": record.arrays_sha256}),
            # For tools that do not show named constraints, such as optuna-dashboard.
            **({"feasible": record.is_feasible} if record.constraints else {}),
        },
        system_attrs=dict(suggestion.sampler_notes),
        constraints=dict(record.constraints),
    )
    trial.datetime_complete = datetime.fromtimestamp(record.finished_ms / 1000)
    trial.datetime_start = trial.datetime_complete - timedelta(seconds=record.duration_s)
    return trial


def _load_or_create(storage: JournalStorage, settings: StudySettings) -> optuna.Study:
    # The one study in the file, whatever its name: a sweep may have been renamed.
    studies = storage.get_all_studies()
    with quiet_optuna():
        if studies:
            return optuna.load_study(study_name=studies[0].study_name, storage=storage)
        directions = [objective.goal for objective in settings.objectives]
        return optuna.create_study(study_name=settings.name, storage=storage, directions=directions)


def _with_order_of_study(study: optuna.Study, settings: StudySettings) -> StudySettings:
    """The settings with the study's own space, if the two spaces differ only in the order of
    entries or in 1 for 1.0.

    Such spaces describe the same sweep, but samplers draw in the order of the space, which must
    stay that of the first launch.
    """
    noted = study.user_attrs.get(_IDENTITY_ATTR, {}).get("space")
    if noted is None or _order_free(noted) != _order_free(settings.space.written):
        return settings
    return replace(settings, space=parse_space(noted))


def _order_free(written: Any) -> Any:
    """A form of a written space that is equal for spaces that differ only in order or in 1 for 1.0;
    true is not 1."""
    if isinstance(written, Mapping):
        return {name: _order_free(entry) for name, entry in written.items()}
    if isinstance(written, Sequence) and not isinstance(written, str):
        return [_order_free(item) for item in written]
    return (isinstance(written, bool), written)


def _check_identity(study: optuna.Study, path: Path, settings: StudySettings) -> None:
    """Check the settings against those of the study; store them if it is new or its creation was
    interrupted.

    Raises:
        CheckpointError: the study was not written by this program.
        ConfigError: a setting differs.
    """
    noted = study.user_attrs.get(_IDENTITY_ATTR)
    if noted is None:
        if study.get_trials(deepcopy=False):
            raise _foreign(path)
        with quiet_optuna():
            study.set_metric_names([objective.name for objective in settings.objectives])
        note = {
            "version": _IDENTITY_VERSION,
            "optuna": optuna.__version__,
            "space": dict(settings.space.written),
            MARK: True,
        }
        study.set_user_attr(_IDENTITY_ATTR, note | settings.identity())
        return
    for key, value in settings.identity().items():
        if noted.get(key) != value:
            raise ConfigError(
                f"{path}: this study was made with {key} {noted.get(key)!r}, and now it is {value!r}. Its trials could "
                "not be compared: restore the setting, or start a new study in another run"
            )


def _foreign(path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: holds a study that this program did not write; move it away and launch again")


def _end_of_last_line(file: Any, size: int, block: int = 1 << 16) -> int:
    """The offset after the last newline of a file; 0 if it has none."""
    end = size
    while end > 0:
        start = max(0, end - block)
        file.seek(start)
        newline: int = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Context manager that turns Optuna's errors on invalid lines into a CheckpointError."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not a readable Optuna journal ({error}); restore it, or move it away to start anew"
        ) from error
