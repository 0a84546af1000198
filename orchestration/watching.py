"""`dsnet-orch status --watch`: the status again and again, until no driver holds the run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import click

from orchestration.progress import read_task_state
from orchestration.rundir import Manifest, RunDir
from orchestration.terminal import is_running, say

INTERVAL_S = 1.0


def watch_status(run: RunDir, show: Callable[[], None], sleep: Callable[[float], None] = time.sleep) -> None:
    """Follow a run: on a terminal its status in place, on a pipe a line for every change and the status at the end.

    Args:
        run: the run.
        show: prints its status.
        sleep: waits between two looks.

    Raises:
        NotFoundError: there is no such run.
    """
    run.open_existing()
    in_place = sys.stdout.isatty()
    last: str | None = None
    while is_running(run):
        line = change_line(run)
        if line != last:
            if in_place:
                click.clear()
                show()
            else:
                say(line)
                sys.stdout.flush()
        last = line
        sleep(INTERVAL_S)
    if in_place:
        click.clear()
    show()


def change_line(run: RunDir) -> str:
    """What is being done, on one line: the newest stage that runs, and the newest task with its count and time left."""
    stages = Manifest(run.manifest_path).read()["stages"]
    running = [name for name, entry in stages.items() if entry["status"] == "running"]
    state = read_task_state(run.progress_json)
    if state is not None:
        return str(state)
    return f"{running[-1]} begins" if running else "starting"
