"""`status --watch` follows a run until no driver holds it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dsnet.files import atomic_write_json
from orchestration.commands import watching
from orchestration.commands.tables import terminal_width
from orchestration.commands.terminal import say
from orchestration.commands.watching import watch_status
from orchestration.progress import FiledProgress, Task
from orchestration.runs.folder import RunDir
from orchestration.runs.lock import DriverLock
from orchestration.runs.manifest import Manifest
from tests.orchestration.samples import SilentProgress


def test_on_a_pipe_every_change_is_a_line_and_the_status_comes_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path, "watched")
    run.create()
    Manifest(run.manifest_path).create(seed=0, hardware={})
    run.sweep_yaml.touch()
    task = Task("supernet", 2, "epoch", line_every=1, start=0)
    lock = DriverLock(run, "test").__enter__()
    with FiledProgress(SilentProgress(), run.progress_json).bar(task) as bar:

        def nothing_new() -> None:
            """The same state at two looks."""

        def an_end() -> None:
            bar.update(2)

        events = iter([nothing_new, an_end, lambda: lock.__exit__(None, None, None)])
        watch_status(lambda: run, lambda: print("the status"), lambda _: next(events)())  # noqa: T201
    assert capsys.readouterr().out.splitlines() == [
        "supernet: 0 of 2 epochs",
        "supernet: 2 of 2 epochs",
        "the status",
    ]


def test_on_a_terminal_the_screen_is_cleared_when_the_next_status_is_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path, "watched")
    run.create()
    Manifest(run.manifest_path).create(seed=0, hardware={})
    run.sweep_yaml.touch()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(watching.click, "clear", lambda: sys.stdout.write("<cleared>"))
    on_screen: list[str] = []

    def show() -> None:
        assert terminal_width() is not None, "the status is laid out for the terminal"
        say("the status")
        on_screen.append(capsys.readouterr().out)

    watch_status(lambda: run, show)
    assert on_screen == [""]
    assert capsys.readouterr().out == "<cleared>the status\n"


def test_a_run_without_a_driver_is_shown_once_and_one_that_has_not_begun_is_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path, "later")
    run.create()

    def begins() -> None:
        Manifest(run.manifest_path).create(seed=0, hardware={})
        atomic_write_json(run.progress_json, {"title": "of another release"})

    events = iter([lambda: None, begins, lambda: run.sweep_yaml.write_text("version: 1\n")])
    watch_status(lambda: run, lambda: print("the status"), lambda _: next(events)())  # noqa: T201
    told = capsys.readouterr()
    assert told.out == "the status\n"
    assert told.err.count("no run 'later'") == 1
    assert "waiting until it is launched" in told.err
    assert next(events, None) is None, "it was not shown before it had a configuration"
