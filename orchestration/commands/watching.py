"""`dsnet-orch status --watch`: repeat the status until no driver holds the run."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout

import click

from dsnet.errors import NotFoundError
from orchestration.commands.messages import warn
from orchestration.commands.terminal import is_running, say
from orchestration.progress import read_task_state
from orchestration.runs.folder import RunDir
from orchestration.runs.manifest import Manifest

INTERVAL_S = 1.0


def watch_status(
    find: Callable[[], RunDir], show: Callable[[], None], sleep: Callable[[float], None] = time.sleep
) -> None:
    """Follow a run: on a terminal update its status in place; on a pipe print a line per change,
    and the status at the end.

    Waits for a run that has not begun.

    Args:
        find: returns the run's folder; called again while there is no such run.
        show: prints the status of the run.
        sleep: waits between two updates.
    """
    run = _begun(find, sleep)
    in_place = sys.stdout.isatty()
    last: str | None = None
    while is_running(run):
        line = change_line(run)
        if line != last:
            if in_place:
                _show_in_place(show)
            else:
                say(line)
                sys.stdout.flush()
        last = line
        sleep(INTERVAL_S)
    if in_place:
        _show_in_place(show)
    else:
        show()


class _Frame(io.StringIO):
    """A buffer for one screen; output into it is laid out as for the terminal."""

    def isatty(self) -> bool:
        return True


def _show_in_place(show: Callable[[], None]) -> None:
    """Clear the screen only when the whole status has been read, which may take a second."""
    frame = _Frame()
    with redirect_stdout(frame):
        show()
    click.clear()
    sys.stdout.write(frame.getvalue())
    sys.stdout.flush()


def _begun(find: Callable[[], RunDir], sleep: Callable[[float], None]) -> RunDir:
    """Wait until the run has a status to show: its manifest and the configuration, which is written
    later."""
    is_told = False
    while True:
        run = find()
        try:
            run.open_existing()
        except NotFoundError as error:
            if not is_told:
                warn(f"{error}; waiting until it is launched (stop with Ctrl-C)")
                is_told = True
        else:
            if run.sweep_yaml.is_file():
                return run
        sleep(INTERVAL_S)


def change_line(run: RunDir) -> str:
    """The current activity on one line: the newest task with its count and remaining time, or else
    the stage that begins."""
    stages = Manifest(run.manifest_path).read()["stages"]
    running = [name for name, entry in stages.items() if entry["status"] == "running"]
    state = read_task_state(run.progress_json)
    if state is not None:
        return str(state)
    return f"{running[-1]} begins" if running else "starting"
