"""Progress of a launch: bars and lines on stderr for people, and a small file in the run folder for
`dsnet-orch status`.

stdout is for data. On a terminal a bar is shown; on a pipe a plain line is printed for every epoch
and every cohort of trials.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.progress import BarColumn, Progress, TextColumn

from dsnet.errors import CheckpointError
from dsnet.files import read_sealed, write_sealed
from dsnet.wording import duration, plural
from orchestration.output.console import Console
from orchestration.wrapping import wrapped

WRITE_EVERY_S = 1.0
"""Minimum time in seconds between two writes of the progress file."""


@dataclass(frozen=True)
class Task:
    """A piece of work whose progress is shown."""

    title: str
    total: float
    unit: str = ""
    """Unit of the count in the singular, e.g. "epoch"; empty for a bare count."""
    line_every: float | None = None
    """Amount of work between two lines on a pipe; None prints no lines."""
    start: float | None = None
    """Amount that earlier launches have done; None takes it from the first report."""


class Bar(Protocol):
    """A running progress bar."""

    def update(self, done: float, text: str = "") -> None:
        """Set the amount done, and the text beside it."""
        ...


class ProgressView(Protocol):
    """Interface through which a sweep shows its progress."""

    def say(self, text: str) -> None:
        """Print a line."""
        ...

    def warn(self, text: str) -> None:
        """Print a warning."""
        ...

    def bar(self, task: Task) -> AbstractContextManager[Bar]:
        """Show a bar for the length of a with-block."""
        ...


class TimeLeft:
    """Estimates the remaining time of a task from its pace in this launch."""

    def __init__(self, task: Task, clock: Callable[[], float] | None = None) -> None:
        self._total = task.total
        self._small = task.line_every or 1.0
        self._clock = clock if clock is not None else time.monotonic
        self._began_s = self._clock()
        self._start = task.start

    def after(self, done: float) -> float | None:
        """Seconds that the remaining work will take; None if no pace is known yet."""
        now = self._clock()
        if self._start is None:  # the first report of a continued task is the earlier work, which has no pace
            self._start = 0.0 if done <= self._small else done
            self._began_s = self._began_s if done <= self._small else now
        gained = done - self._start
        return None if gained <= 0 else max(0.0, self._total - done) * (now - self._began_s) / gained


def count_text(done: float, total: float, unit: str) -> str:
    """A count such as `7 of 30 epochs`."""
    return f"{int(done):,} of {plural(int(total), unit)}" if unit else f"{int(done):,} of {int(total):,}"


def left_text(seconds: float | None) -> str:
    """A text such as `, 42 s left`; empty if the time is unknown, or at the end."""
    return "" if not seconds else f", {duration(seconds)} left"


BAR_WIDTH = 16
"""Width of a bar in characters."""


def fitting(count: str, remarks: str, room: int) -> str:
    """A count with as many of the remarks (separated by two spaces) as there is room for; none is
    cut.

    Args:
        count: always shown.
        remarks: the most important first.
        room: width in characters.
    """
    shown = count
    for remark in filter(None, remarks.split("  ")):
        if len(shown) + 2 + len(remark) > room:
            break
        shown = f"{shown}  {remark}"
    return shown


class _RichBar:
    def __init__(self, progress: Progress, task: Task, room: int) -> None:
        self._progress = progress
        self._task = task
        self._room = room
        self._left = TimeLeft(task)
        self._id = progress.add_task(
            task.title, total=task.total, text=count_text(task.start or 0, task.total, task.unit)
        )

    def update(self, done: float, text: str = "") -> None:
        told = count_text(done, self._task.total, self._task.unit) + left_text(self._left.after(done))
        self._progress.update(self._id, completed=done, text=fitting(told, text, self._room))


class _LineBar:
    """Prints lines in place of a bar, one whenever another `line_every` are done."""

    def __init__(self, say: Callable[[str], None], task: Task) -> None:
        self._say = say
        self._task = task
        self._left = TimeLeft(task)
        self._told = task.start or 0.0

    def update(self, done: float, text: str = "") -> None:
        left, every = self._left.after(done), self._task.line_every
        if every is None or (done < self._told + every and not self._told < done == self._task.total):
            return
        self._told = done // every * every
        beside = f"; {text}" if text else ""
        self._say(f"{self._task.title}: {count_text(done, self._task.total, self._task.unit)}{left_text(left)}{beside}")


class TerminalProgress:
    """Shows bars and lines on stderr; on a pipe only lines."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)

    def say(self, text: str) -> None:
        """Print a line."""
        self._print(text)

    def warn(self, text: str) -> None:
        """Print a warning in yellow."""
        self._print(f"warning: {text}", style="yellow")

    def _print(self, text: str, style: str | None = None) -> None:
        width = self.console.width if self.console.is_terminal else None
        for line in text.splitlines():
            for part in wrapped(line, width):
                self.console.print(part, style=style, markup=False, soft_wrap=True)

    @contextmanager
    def bar(self, task: Task) -> Iterator[Bar]:
        """Show a bar with count, time left, and room for a text; on a pipe lines."""
        if not self.console.is_terminal:
            yield _LineBar(self.say, task)
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=BAR_WIDTH),
            TextColumn("{task.fields[text]}", markup=False),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            yield _RichBar(progress, task, self.console.width - len(task.title) - BAR_WIDTH - 2)


@dataclass(frozen=True)
class TaskState:
    """State of the newest task of a run, as stored in its progress file."""

    title: str
    unit: str
    done: float
    total: float
    left_s: float | None
    """Remaining seconds at the pace of the launch that wrote it."""

    def __str__(self) -> str:
        return f"{self.title}: {count_text(self.done, self.total, self.unit)}{left_text(self.left_s)}"


def read_task_state(path: Path) -> TaskState | None:
    """Read a run's progress file; None if there is none, or it cannot be read."""
    if not path.is_file():
        return None
    try:
        return TaskState(**read_sealed(path))
    except (CheckpointError, TypeError):
        return None


class _FiledBar:
    def __init__(self, bar: Bar, task: Task, path: Path) -> None:
        self._bar = bar
        self._task = task
        self._path = path
        self._left = TimeLeft(task)
        self._written_s: float | None = None

    def update(self, done: float, text: str = "") -> None:
        self._bar.update(done, text)
        left_s = self._left.after(done)
        now = time.monotonic()
        if self._written_s is None or now - self._written_s >= WRITE_EVERY_S or done >= self._task.total:
            self._written_s = now
            self.write(done, left_s)

    def write(self, done: float, left_s: float | None) -> None:
        state = TaskState(self._task.title, self._task.unit, done, self._task.total, left_s)
        write_sealed(self._path, asdict(state))


class FiledProgress:
    """Forwards everything to another view, and keeps a file with the state of the newest task; a
    file of an earlier launch is removed."""

    def __init__(self, view: ProgressView, path: Path) -> None:
        path.unlink(missing_ok=True)
        self._view = view
        self._path = path

    def say(self, text: str) -> None:
        """Print a line."""
        self._view.say(text)

    def warn(self, text: str) -> None:
        """Print a warning."""
        self._view.warn(text)

    @contextmanager
    def bar(self, task: Task) -> Iterator[Bar]:
        """Show a bar of the other view, whose updates are also written to the file."""
        with self._view.bar(task) as bar:
            filed = _FiledBar(bar, task, self._path)
            filed.write(task.start or 0.0, None)
            yield filed


def json_state(state: TaskState | None) -> dict[str, Any] | None:
    """The state as JSON."""
    return None if state is None else asdict(state)
