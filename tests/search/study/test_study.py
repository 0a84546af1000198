"""The study on disk: one record per trial, readable by Optuna, whole after any tear."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from dsnet.errors import CheckpointError, ConfigError, NotFoundError, PreflightError
from search.study.engine import Budget, Mirror, Search
from search.study.halving import ParetoHalving
from search.study.journal_chain import chain_path
from search.study.runner import OneByOne, SerialRunner
from search.study.study import Objective, StudyJournal, TrialRecord, load_records, repair_journal
from search.suggest.space import parse_space
from tests.search.study.samples import (
    POINT,
    SLACK,
    SPACE,
    essence,
    sampler_settings,
    sometimes_broken,
    study_settings,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "search" / "study.journal"


def make_study(path: Path, trials: int = 10, sampler: str = "tpe") -> tuple[TrialRecord, ...]:
    journal = StudyJournal.open(path, study_settings(sampler))
    return (
        Search(journal=journal, runner=SerialRunner(OneByOne(sometimes_broken)), constraints=SLACK)
        .run(Budget(trials))
        .records
    )


def test_a_finished_trial_is_exactly_one_line_of_the_journal(path: Path) -> None:
    journal = StudyJournal.open(path, study_settings())
    num_lines = [len(path.read_bytes().splitlines())]

    class CountLines:
        def on_trial(self, record: TrialRecord) -> None:
            num_lines.append(len(path.read_bytes().splitlines()))

    Search(
        journal=journal, runner=SerialRunner(OneByOne(sometimes_broken)), constraints=SLACK, observer=CountLines()
    ).run(Budget(10))
    assert num_lines == list(range(num_lines[0], num_lines[0] + 11))


def test_a_reloaded_record_equals_the_one_that_was_told(path: Path) -> None:
    records = make_study(path)
    assert load_records(path) == list(records)
    assert {
        (value <= 0) == (record.metrics["madds_m"] <= 6) for record in records for value in record.constraints.values()
    } == {True}


def test_optuna_alone_reads_the_study_with_names_directions_states_and_constraints(path: Path) -> None:
    records = make_study(path)
    study = optuna.load_study(study_name="digits", storage=JournalStorage(JournalFileBackend(str(path))))
    assert study.metric_names == ["top1", "madds_m"]
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert [trial.state == TrialState.COMPLETE for trial in study.trials] == [r.state == "complete" for r in records]
    assert {trial.user_attrs["slot"] for trial in study.best_trials} == brute_force_feasible_front(records)
    assert all(trial.duration is not None and trial.duration.total_seconds() >= 0 for trial in study.trials)


def brute_force_feasible_front(records: tuple[TrialRecord, ...]) -> set[int]:
    points = {
        record.slot: record.values
        for record in records
        if record.values is not None and all(value <= 0 for value in record.constraints.values())
    }
    return {
        slot
        for slot, (top1, madds) in points.items()
        if not any(a >= top1 and m <= madds and (a, m) != (top1, madds) for a, m in points.values())
    }


def test_what_nsga2_notes_on_a_trial_survives_the_journal(path: Path) -> None:
    make_study(path, 20, sampler="nsga2")
    trials = StudyJournal.open(path, study_settings("nsga2")).trials()
    generations = [trial.system_attrs["ReplayableNSGAII:generation"] for trial in trials]
    assert generations == sorted(generations)
    assert generations[-1] >= 1


def test_a_mirror_of_the_stored_study_suggests_what_the_live_one_did(path: Path) -> None:
    make_study(path, 24)
    trials = StudyJournal.open(path, study_settings()).trials()
    suggestions = Mirror(study_settings(), trials[:16]).ask(24)
    assert [item.params for item in suggestions.values()] == [trial.params for trial in trials[16:]]


def test_every_possible_tear_of_the_last_record_is_cut_off(path: Path) -> None:
    records = make_study(path, 4)
    whole, chain = path.read_bytes(), chain_path(path).read_bytes().splitlines(keepends=True)
    last = len(whole.splitlines(keepends=True)[-1])
    for num_bytes in (1, 2, last // 2, last - 1):
        path.write_bytes(whole[:-num_bytes])
        chain_path(path).write_bytes(b"".join(chain[:-1]))  # which is written after the journal
        assert load_records(path) == list(records[:3])
        assert repair_journal(path) == last - num_bytes
        assert path.read_bytes() == whole[:-last]
        assert essence(make_study(path, 4)) == essence(records)


def test_repair_leaves_a_whole_journal_alone_and_clears_a_dead_writers_lock(path: Path) -> None:
    make_study(path, 2)
    before = path.read_bytes()
    lock = path.with_name(path.name + ".lock")
    lock.symlink_to(path)
    assert repair_journal(path) == 0
    assert path.read_bytes() == before
    assert not os.path.lexists(lock)


def test_repair_finds_the_last_newline_however_far_back_it_lies(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_bytes(b"{}\n" + b"x" * 200_000)
    assert repair_journal(path) == 200_000
    path.write_bytes(b"x" * 70_000)
    assert repair_journal(path) == 70_000
    assert path.read_bytes() == b""
    assert repair_journal(tmp_path / "none") == 0


@pytest.mark.parametrize("num_lines", [0, 1, 2, 3])
def test_a_study_whose_creation_was_cut_short_is_completed(path: Path, num_lines: int) -> None:
    StudyJournal.open(path, study_settings())
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3
    path.write_bytes(b"".join(lines[:num_lines]))
    chain_path(path).unlink()  # which is written last
    make_study(path, 2)
    study = optuna.load_study(study_name="digits", storage=JournalStorage(JournalFileBackend(str(path))))
    assert study.metric_names == ["top1", "madds_m"]
    assert study.user_attrs["dsnet_study"]["cohort"] == 8
    assert len(study.trials) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cohort": 4}, "made with cohort 8, and now it is 4"),
        ({"sampler": "random"}, "made with sampler 'tpe', and now it is 'random'"),
        ({"enqueue": [POINT]}, "made with enqueue"),
        ({"order": "asynchronous"}, "made with order 'cohorts', and now it is 'asynchronous'"),
        ({"halving": ParetoHalving(3, (2, 6))}, "made with halving None, and now it is"),
        ({"seed": 1}, "made with seed 0, and now it is 1"),
        ({"sampler": sampler_settings("tpe", 3)}, "made with startup 6, and now it is 3"),
        ({"objectives": (Objective("madds_m", "minimize"), Objective("top1", "maximize"))}, "made with objectives"),
    ],
)
def test_a_study_is_not_continued_with_other_settings(path: Path, changes: dict[str, Any], message: str) -> None:
    make_study(path, 2)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=message):
        StudyJournal.open(path, study_settings(**changes))
    assert path.read_bytes() == before


def test_a_renamed_sweep_continues_its_study(path: Path) -> None:
    records = make_study(path, 2)
    assert StudyJournal.open(path, study_settings(name="other")).records() == list(records)


def test_the_order_in_which_a_space_is_written_and_1_for_1_0_change_nothing(path: Path, tmp_path: Path) -> None:
    as_before = {**SPACE, "gate.losses.cls": 1.0, "gate.routing.first": {"int": [0, 3]}}
    rewritten = {name: as_before[name] for name in reversed(as_before)} | {"gate.losses.cls": 1}
    function = SerialRunner(OneByOne(sometimes_broken))
    whole = Search(journal=StudyJournal.open(tmp_path / "whole", study_settings()), runner=function).run(Budget(20))
    Search(journal=StudyJournal.open(path, study_settings()), runner=function).run(Budget(11))
    journal = StudyJournal.open(path, study_settings(space=parse_space(rewritten)))
    assert essence(Search(journal=journal, runner=function).run(Budget(20)).records) == essence(whole.records)
    for other in ({**SPACE, "gate.losses.cls": True}, {**SPACE, "gate.routing.first": {"int": [0, 4]}}):
        with pytest.raises(ConfigError, match="made with space_hash"):
            StudyJournal.open(path, study_settings(space=parse_space(other)))


def test_a_study_of_someone_else_is_refused(path: Path) -> None:
    path.parent.mkdir()
    study = optuna.create_study(storage=JournalStorage(JournalFileBackend(str(path))))
    study.add_trial(optuna.trial.create_trial(value=1.0))
    with pytest.raises(CheckpointError, match="this program did not write"):
        StudyJournal.open(path, study_settings())
    with pytest.raises(CheckpointError, match="this program did not write"):
        load_records(path)


@pytest.mark.parametrize("content", [b"not json\n{}\n", b"{}\n", b"[1]\n", b"\xff\xfe\n{}\n"])
def test_a_file_that_is_no_journal_is_refused_by_name(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    for read in (load_records, lambda file: StudyJournal.open(file, study_settings())):
        with pytest.raises(CheckpointError, match=r"study\.journal: not a readable Optuna journal"):
            read(path)


def test_reading_where_no_search_has_begun_says_so_and_creates_nothing(path: Path) -> None:
    with pytest.raises(NotFoundError, match="the search has not begun"):
        load_records(path)
    assert not path.parent.exists()


def test_reading_while_a_record_is_being_written_gives_what_is_whole(path: Path) -> None:
    records = make_study(path, 3)
    with path.open("ab") as file:
        file.write(b'{"op_code":4,"wor')
    before = path.read_bytes()
    assert load_records(path) == list(records)
    assert path.read_bytes() == before


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(PreflightError, match=r"cannot write .*study\.journal"):
        StudyJournal.open(blocker / "study.journal", study_settings())


def test_opening_and_searching_leave_optunas_logging_as_it_was(
    path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    before = optuna.logging.get_verbosity()
    make_study(path, 9)
    assert optuna.logging.get_verbosity() == before
    assert capfd.readouterr() == ("", "")
    assert [str(warning.message) for warning in recwarn if "optuna" in str(warning.filename)] == []


def test_the_record_of_a_trial_stays_small(path: Path) -> None:
    make_study(path, 12)
    longest = max(path.read_bytes().splitlines(), key=len)
    assert len(longest) < 4096
    assert json.loads(longest)["user_attrs"].keys() == {"slot", "metrics", "reason", "duration_s", "feasible"}
