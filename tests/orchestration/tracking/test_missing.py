"""Rows that MLflow did not get: told at the end, marked in the run folder, written by the next
launch."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dsnet.errors import CheckpointError
from orchestration.runs.folder import RunDir
from orchestration.tracking.missing import MissingRows
from orchestration.tracking.process import MlflowWriter
from orchestration.tracking.protocol import TrackingSummary
from orchestration.tracking.rows import sweep_uid
from tests.orchestration.samples import SWEEP, Finished, call
from tests.orchestration.tracking.test_rows import rows_of


class View:
    """A progress view that keeps what it was told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.warnings: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def bar(self, task: Any) -> Any:
        raise NotImplementedError


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    found = RunDir(tmp_path / "runs", "tiny")
    found.create()
    return found


def lost(number: int) -> TrackingSummary:
    return TrackingSummary(5, number, "no answer" if number else None)


def test_the_mark_is_there_from_the_first_lost_row_until_a_launch_has_repeated_all(run: RunDir) -> None:
    warnings: list[str] = []
    first = MissingRows(run)
    assert not first.is_found
    first.warned(warnings.append)("it cannot be written")
    assert warnings == ["it cannot be written"]
    assert MissingRows(run).is_found, "a kill at this moment must not hide it"
    first.add(lost(7))
    first.settle()

    second, view = MissingRows(run), View()
    second.repeat(lambda: None, view)
    assert view.said == ["7 writes to MLflow failed in an earlier launch; they are repeated now"]
    second.add(lost(2))
    second.settle()
    assert MissingRows(run).is_found, "some of them failed again"

    third = MissingRows(run)
    third.add(lost(0))
    third.settle()
    assert MissingRows(run).is_found, "this launch did not repeat them"

    last = MissingRows(run)
    last.repeat(lambda: None, View())
    last.add(lost(0))
    last.settle()
    assert not run.unsent_json.exists()
    nothing, view = MissingRows(run), View()
    nothing.repeat(lambda: pytest.fail("nothing is missing"), view)
    assert view.said == []


def test_results_that_cannot_be_read_do_not_stop_the_launch_and_keep_the_mark(run: RunDir) -> None:
    MissingRows(run).add(lost(1))

    def replay() -> None:
        raise CheckpointError("subnets.json is missing")

    missing, view = MissingRows(run), View()
    missing.repeat(replay, view)
    missing.settle()
    assert "subnets.json is missing" in view.warnings[0]
    assert run.unsent_json.exists()


@pytest.mark.parametrize("content", ["", "[]", '{"num_rows": "x"}', "{"])
def test_a_damaged_mark_is_a_mark(run: RunDir, content: str) -> None:
    run.unsent_json.write_text(content)
    view = View()
    MissingRows(run).repeat(lambda: None, view)
    assert view.said == ["writes to MLflow failed in an earlier launch; they are repeated now"]


def flat(text: str) -> str:
    """A text without its line breaks."""
    return " ".join(text.split())


def kill_writers_of(monkeypatch: pytest.MonkeyPatch, names: Sequence[str], times: int) -> list[str]:
    """Kill the writing process in some calls of the product, before they are made; returns the
    calls."""
    attempt, killed = MlflowWriter._attempt, list[str]()

    def dying(writer: MlflowWriter, name: str, *arguments: Any) -> None:
        if name in names and len(killed) < times:
            child = writer._child or writer._start()
            os.kill(child.process.pid, signal.SIGKILL)
            child.process.wait()
            killed.append(name)
        attempt(writer, name, *arguments)

    monkeypatch.setattr(MlflowWriter, "_attempt", dying)
    return killed


@pytest.mark.slow
def test_a_launch_whose_writer_dies_says_so_and_the_next_one_writes_everything(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is new, too, and the supernet is finished: its curves are written as well."""
    folder = finished.copy(tmp_path)
    mark = folder / "runs" / "tiny" / "unsent.json"
    killed = kill_writers_of(monkeypatch, ("add_points", "write", "close_sweep"), times=6)
    answer = call(folder, "launch", SWEEP)
    assert answer.code == 0, answer.err
    assert len(killed) == 6
    told = re.search(r"(\d+ writes) to MLflow failed; the next launch of this run repeats them", flat(answer.err))
    assert told is not None, answer.err
    assert "dsnet-orch sync" in answer.err
    assert mark.is_file()
    live, uid = rows_of(finished.run.root), sweep_uid(finished.results.manifest, finished.run)
    assert rows_of(folder / "runs")[uid]["status"] == "FINISHED", "the sweep has ended, whatever was lost"

    again = call(folder, "launch", SWEEP)
    assert again.code == 0, again.err
    assert f"{told[1]} to MLflow failed in an earlier launch; they are repeated now" in flat(again.err)
    assert not mark.exists()
    found = rows_of(folder / "runs")
    assert found.keys() == live.keys()
    for name in live:
        assert found[name]["metrics"] == live[name]["metrics"], name
        assert found[name]["status"] == live[name]["status"], name
    assert found[uid]["status"] == "FINISHED"
