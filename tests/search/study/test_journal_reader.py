"""The quick reader of journals: what Optuna reads, and nothing where only Optuna can tell."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from search.study.journal_reader import read_lines
from search.study.study import load_enqueued, load_records, record_of
from tests.search.study.samples import SLACK, sometimes_broken, study_settings, sweep


def optunas(path: Path) -> optuna.Study:
    return optuna.load_study(study_name="digits", storage=JournalStorage(JournalFileBackend(str(path))))


def whole_lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "grid"])
def test_every_record_equals_what_optuna_reads(tmp_path: Path, sampler: str) -> None:
    path = tmp_path / "study"
    sweep(path, 20, settings=study_settings(sampler), constraints=SLACK)
    by_optuna = [record_of(trial) for trial in optunas(path).get_trials(deepcopy=False)]
    content = read_lines(whole_lines(path))
    assert content is not None
    assert len(content.trials) == 20
    assert load_records(path) == by_optuna
    assert {record.state for record in by_optuna} == {"complete", "failed"}
    assert any(record.constraints for record in by_optuna)
    assert content.user_attrs == optunas(path).user_attrs


def test_numbers_that_json_does_not_have_are_read_as_optuna_reads_them(tmp_path: Path) -> None:
    def with_nan(spec: Any) -> Any:
        metrics, arrays = sometimes_broken(spec)
        return {**metrics, "gain": math.nan, "most": math.inf}, arrays

    path = tmp_path / "study"
    sweep(path, 3, function=with_nan)
    assert read_lines(whole_lines(path)) is not None
    metrics = load_records(path)[0].metrics
    assert math.isnan(metrics["gain"])
    assert metrics["most"] == math.inf


def test_a_note_of_another_program_on_the_study_changes_no_record(tmp_path: Path) -> None:
    path = tmp_path / "study"
    records = sweep(path, 6)
    study = optunas(path)
    study._storage.set_study_system_attr(study._study_id, "dashboard:note", "a person's note")
    study.set_user_attr("dsnet_enqueued", {"7": {"gate.target": 0.5}})
    assert read_lines(whole_lines(path)) is not None
    assert load_records(path) == records
    assert load_enqueued(path) == {7: {"gate.target": 0.5}}


def test_what_only_optuna_understands_is_left_to_optuna(tmp_path: Path) -> None:
    path = tmp_path / "study"
    records = sweep(path, 6)
    lines = whole_lines(path)
    note = {"op_code": 8, "worker_id": "x", "trial_id": 2, "user_attr": {"reason": "a person's own"}}
    assert read_lines([*lines, json.dumps(note).encode() + b"\n"]) is None
    with path.open("ab") as file:
        file.write(json.dumps(note).encode() + b"\n")
    assert [record.reason for record in load_records(path)] == [record.reason for record in records]  # it had finished


@pytest.mark.parametrize(
    "damage",
    [b"\n", b"[]\n", b"7\n", b"{}\n", b'{"op_code":4}\n', b'{"op_code":4,\n', b"[" * 50_000 + b"\n", b"\xff\xfe\n"],
)
def test_a_damaged_line_is_left_to_the_reader_that_has_the_message(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "study"
    sweep(path, 3)
    assert read_lines([*whole_lines(path), damage]) is None


def test_two_studies_and_trials_without_a_study_are_not_understood(tmp_path: Path) -> None:
    path = tmp_path / "study"
    sweep(path, 3)
    lines = whole_lines(path)
    assert read_lines([*lines, lines[0]]) is None
    assert read_lines(lines[3:]) is None
    assert read_lines([]) is not None


def test_records_share_the_names_of_their_metrics(tmp_path: Path) -> None:
    """With a copy of every name in each trial, ten thousand trials take tens of MiB more."""
    path = tmp_path / "study"
    sweep(path, 12)
    names = [next(iter(record.metrics)) for record in load_records(path) if record.metrics]
    assert len({id(name) for name in names}) == 1
