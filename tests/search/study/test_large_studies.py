"""What a trial costs the driver does not grow with the number of trials before it."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial

from search.study.engine import Mirror
from search.study.halving import ParetoHalving
from search.study.study import RungRecord, StudyJournal
from tests.search.study.samples import study_settings, sweep

COHORT = 8


@pytest.mark.parametrize("num_trials", [16, 48])
def test_the_whole_study_is_read_a_few_times_a_cohort_and_never_for_a_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_trials: int
) -> None:
    reads, read = [], StudyJournal.trials

    def counted(journal: StudyJournal) -> list[FrozenTrial]:
        reads.append(1)
        return read(journal)

    monkeypatch.setattr(StudyJournal, "trials", counted)
    sweep(tmp_path / "study", num_trials, settings=study_settings("random", cohort=COHORT))
    assert len(reads) <= 4 * (num_trials // COHORT) + 6


def test_results_at_rungs_are_looked_up_without_copying_all_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Optuna copies all attributes of a study at every access, and halving looks at every earlier
    cohort."""
    path, settings = tmp_path / "study", study_settings(halving=ParetoHalving(2, (1, 2)))
    journal = StudyJournal.open(path, settings)
    stages = {first: {first: RungRecord("complete", {"top1": 0.5}, None, 1.0)} for first in range(0, 40, COHORT)}
    for first, stage in stages.items():
        journal.note_stage(first, 1, stage)
    monkeypatch.setattr(optuna.Study, "user_attrs", property(lambda _: pytest.fail("all attributes are copied")))
    assert {first: journal.stage(first, 1) for first in stages} == stages
    assert journal.stage(0, 2) == {}
    monkeypatch.undo()
    again = StudyJournal.open(path, settings)
    assert {first: again.stage(first, 1) for first in stages} == stages


def test_trials_share_their_distributions_in_the_study_and_in_the_mirror(tmp_path: Path) -> None:
    """Optuna makes new ones for every trial: several kilobytes each."""
    path, settings = tmp_path / "study", study_settings("random", cohort=COHORT)
    sweep(path, 24, settings=settings)
    history = StudyJournal.open(path, settings).trials()
    assert len({id(trial.distributions) for trial in history}) == 1
    mirrored = Mirror(settings, history)._study.get_trials(deepcopy=False)
    assert len({id(trial.distributions) for trial in mirrored}) == 1
    assert [trial.params for trial in mirrored] == [trial.params for trial in history]
    assert not any(trial.user_attrs for trial in mirrored)
    assert all(trial.user_attrs for trial in history), "the study itself keeps everything"
