"""The progress of a launch: lines on a pipe, a file for `status`, and the remaining time."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestration import progress as module
from orchestration.progress import (
    FiledProgress,
    Task,
    TaskState,
    TerminalProgress,
    TimeLeft,
    fitting,
    read_task_state,
)
from tests.orchestration.samples import SilentProgress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module.time, "monotonic", clock)
    return clock


def test_the_rest_takes_as_long_as_the_pace_says() -> None:
    clock = Clock()
    left = TimeLeft(Task("supernet", 30, "epoch", line_every=1), clock)
    clock.now += 4
    assert left.after(1) == 4 * 29
    clock.now += 2
    assert left.after(3) == 2 * 27


def test_what_was_done_before_is_no_pace() -> None:
    clock = Clock()
    left = TimeLeft(Task("supernet", 30, "epoch", line_every=1), clock)
    clock.now += 5
    assert left.after(20) is None
    clock.now += 6
    assert left.after(22) == 3 * 8
    known = TimeLeft(Task("search", 100, "trial", line_every=8, start=40), clock)
    clock.now += 10
    assert known.after(50) == 50


def test_on_a_pipe_there_is_a_line_for_every_epoch_with_time_left(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with TerminalProgress().bar(Task("supernet", 3, "epoch", line_every=1)) as bar:
        for epoch in (0.4, 1.0, 1.5, 2.1, 2.9, 3.0):
            clock.now += 30
            bar.update(epoch, "loss 0.5")
    assert capsys.readouterr().err.splitlines() == [
        "supernet: 1 of 3 epochs, 2 min left; loss 0.5",
        "supernet: 2 of 3 epochs, 51 s left; loss 0.5",
        "supernet: 3 of 3 epochs; loss 0.5",
    ]


def test_on_a_pipe_there_is_a_line_for_every_cohort_also_of_a_continued_search(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with TerminalProgress().bar(Task("search", 22, "trial", line_every=8, start=8)) as bar:
        for done in range(9, 23):
            clock.now += 1
            bar.update(done)
    assert capsys.readouterr().err.splitlines() == [
        "search: 16 of 22 trials, 6 s left",
        "search: 22 of 22 trials",
    ]


def test_beside_a_bar_stands_what_has_room_and_no_word_is_cut() -> None:
    count, remarks = "9 of 18 epochs, 30 s left", "s0-d1b30f50  epoch 9  static hypervolume 0.8123"
    shown = [fitting(count, remarks, room) for room in (100, 60, 40, 10)]
    assert shown == [f"{count}  {remarks}", f"{count}  s0-d1b30f50  epoch 9", f"{count}  s0-d1b30f50", count]


def test_work_whose_number_nobody_wants_to_know_prints_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    with TerminalProgress().bar(Task("table: val", 500, "image")) as bar:
        bar.update(500)
    assert capsys.readouterr().err == ""


def test_the_newest_task_stands_in_a_file_written_once_a_second_and_at_the_end(clock: Clock, tmp_path: Path) -> None:
    path = tmp_path / "progress.json"
    assert read_task_state(path) is None
    with FiledProgress(SilentProgress(), path).bar(Task("search", 40, "trial", line_every=4, start=0)) as bar:
        assert str(read_task_state(path)) == "search: 0 of 40 trials"
        clock.now += 10
        bar.update(10)
        assert read_task_state(path) == TaskState("search", "trial", 10, 40, 30.0)
        clock.now += 0.5
        bar.update(20)
        assert str(read_task_state(path)) == "search: 10 of 40 trials, 30 s left"
        bar.update(40)
        assert str(read_task_state(path)) == "search: 40 of 40 trials"
    FiledProgress(SilentProgress(), path)
    assert read_task_state(path) is None, "of an earlier launch"
    path.write_text("{torn")
    assert read_task_state(path) is None
