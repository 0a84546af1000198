"""What a person sees while a sweep runs, on stderr: stages, bars, warnings. stdout is for data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bar(Protocol):
    """One running bar."""

    def update(self, done: float, text: str = "") -> None:
        """Set how much is done, and what is said beside it."""
        ...


class ProgressView(Protocol):
    """Hears what a sweep does."""

    def say(self, text: str) -> None:
        """A line that stays."""
        ...

    def warn(self, text: str) -> None:
        """A line that stays and matters."""
        ...

    def bar(self, title: str, total: float) -> AbstractContextManager[Bar]:
        """A bar for the length of a with-block."""
        ...


class _RichBar:
    def __init__(self, progress: Progress, title: str, total: float) -> None:
        self._progress = progress
        self._task = progress.add_task(title, total=total, text="")

    def update(self, done: float, text: str = "") -> None:
        self._progress.update(self._task, completed=done, text=text)


class TerminalProgress:
    """Bars and lines on stderr; on a pipe only the lines."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """A line in yellow."""
        self.console.print(f"warning: {text}", style="yellow", markup=False, soft_wrap=True)

    @contextmanager
    def bar(self, title: str, total: float) -> Iterator[Bar]:
        """A bar with count, elapsed and remaining time, and room for a text."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[text]}", markup=False),
        )
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as progress:
            yield _RichBar(progress, title, total)


class _SilentBar:
    def update(self, done: float, text: str = "") -> None:
        """Nothing."""


class SilentProgress:
    """Says nothing, and remembers what it was told: for tests and for use as a library."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        """Remember a line."""
        self.lines.append(text)

    def warn(self, text: str) -> None:
        """Remember a warning."""
        self.lines.append(f"warning: {text}")

    @contextmanager
    def bar(self, title: str, total: float) -> Iterator[Bar]:
        """A bar that shows nothing."""
        yield _SilentBar()
