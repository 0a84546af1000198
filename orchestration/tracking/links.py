"""Links to the points of runs on MLflow's page."""

from __future__ import annotations

import os
import sys
import webbrowser
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from orchestration.results.protocol import Results
from orchestration.results.run import RunResults
from orchestration.runs.folder import RunDir, list_runs
from orchestration.tracking.database import experiment_of
from orchestration.tracking.rows import sweep_uid
from orchestration.tracking.view import runs_path, view_path

MAX_LINKS = 8


@dataclass(frozen=True)
class Link:
    """A run and its page, without the server's address."""

    name: str
    path: str
    runs: str
    """The list of all runs of its experiment, without the server's address."""


def link_to(results: Results, uri: str) -> Link | None:
    """The page of a run's points; None if the points are not in this store, or were written without
    the page.

    Args:
        results: results of the run.
        uri: URI of the store.
    """
    uid = sweep_uid(results.manifest, results.run)
    experiment = experiment_of(uri, uid)
    return None if experiment is None else Link(results.run.name, view_path(experiment, uid), runs_path(experiment))


def certain_link(results: Results, uri: str, write: Callable[[], object]) -> Link | None:
    """The page of a run's points; writes the run to the store first if it has no page there.

    Args:
        results: results of the run.
        uri: URI of the store.
        write: writes the run to the store.
    """
    link = link_to(results, uri)
    if link is None:
        write()
        link = link_to(results, uri)
    return link


def newest_links(root: Path, uri: str) -> list[Link]:
    """Pages of the newest runs in a runs folder that are in this store, newest first, at most
    `MAX_LINKS`."""
    runs = sorted((RunDir(root, name) for name in list_runs(root)), key=_age_s)
    links = (link_to(RunResults(run), uri) for run in runs)
    return [link for link in links if link is not None][:MAX_LINKS]


def _age_s(run: RunDir) -> float:
    return -run.manifest_path.stat().st_mtime


def open_in_browser(url: str) -> bool:
    """Open a page in the user's browser; False if there is no screen, or stdout is no terminal."""
    has_screen = sys.platform == "darwin" or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))
    return has_screen and sys.stdout.isatty() and webbrowser.open(url)
