"""`status --watch` follows a run until no driver holds it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsnet.errors import NotFoundError
from dsnet.files import atomic_write_json
from orchestration.progress import FiledProgress, SilentProgress, Task
from orchestration.rundir import DriverLock, Manifest, RunDir
from orchestration.watching import watch_status


def test_on_a_pipe_every_change_is_a_line_and_the_status_comes_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path, "watched")
    run.create()
    Manifest(run.manifest_path).create(seed=0, hardware={})
    task = Task("supernet", 2, "epoch", line_every=1, start=0)
    lock = DriverLock(run, "test").__enter__()
    with FiledProgress(SilentProgress(), run.progress_json).bar(task) as bar:

        def nothing_new() -> None:
            """The same state at two looks."""

        def an_end() -> None:
            bar.update(2)

        events = iter([nothing_new, an_end, lambda: lock.__exit__(None, None, None)])
        watch_status(run, lambda: print("the status"), lambda _: next(events)())  # noqa: T201
    assert capsys.readouterr().out.splitlines() == [
        "supernet: 0 of 2 epochs",
        "supernet: 2 of 2 epochs",
        "the status",
    ]


def test_a_run_without_a_driver_is_shown_once_and_one_that_is_missing_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path, "ended")
    run.create()
    with pytest.raises(NotFoundError, match="no run 'ended'"):
        watch_status(run, lambda: None)
    Manifest(run.manifest_path).create(seed=0, hardware={})
    atomic_write_json(run.progress_json, {"title": "of another release"})
    watch_status(run, lambda: print("the status"))  # noqa: T201
    assert capsys.readouterr().out == "the status\n"
