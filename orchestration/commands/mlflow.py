"""Commands about MLflow: write a run or new bundles to it, and find the pages with the points of
runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsnet.errors import NotFoundError, PreflightError
from dsnet.wording import plural
from orchestration.config.export import registered_name
from orchestration.config.store_uri import is_server, shown_uri
from orchestration.results.mlflow_store import store_uri, whole_sweep
from orchestration.results.protocol import Results
from orchestration.runs.folder import MLFLOW_DATABASE, mlflow_artifact_root, mlflow_store_uri
from orchestration.runs.lock import DriverLock
from orchestration.supernets.results import SupernetSweepResults
from orchestration.supernets.tracking import TreeTrackers, replay_sweep, row_of
from orchestration.tracking.links import Link, certain_link, newest_links
from orchestration.tracking.missing import mark_of
from orchestration.tracking.rows import make_tracker, write_bundles

SYNC_TIMEOUT_S = 600.0


def sync_again(results: Results) -> str:
    """Write a run to MLflow; returns a sentence about it.

    A member of a sweep of supernets is written with its whole sweep, because the front over all
    supernets decides which of its points are marked.

    Raises:
        PreflightError: tracking is off, or the store does not take the results.
        LockedError: a driver is at work; it writes to MLflow itself.
    """
    whole = whole_sweep(results.run)
    if whole is not results.run:
        results = SupernetSweepResults(whole)
    run, config = results.run, results.config
    if not config.tracking.mlflow:
        raise PreflightError(
            f"run {run.name!r} was made with tracking.mlflow: false; launch it with --set tracking.mlflow=true"
        )
    warnings: list[str] = []
    with DriverLock(run, f"dsnet-orch sync {run.name}"):
        trees = TreeTrackers(config, run)
        try:
            trackers = replay_sweep(results, lambda _: trees.make(warnings.append))
            summaries = [own.close(status, end_ms, SYNC_TIMEOUT_S) for own, status, end_ms in trackers]
        finally:
            trees.end()
    uri = store_uri(config, run)
    num_unsent = sum(summary.num_unsent for summary in summaries)
    if num_unsent:
        first = next(summary.first_error for summary in summaries if summary.num_unsent)
        raise PreflightError(f"{plural(num_unsent, 'write')} to {shown_uri(uri)} failed: {first}")
    mark_of(run).unlink(missing_ok=True)
    several = "" if "" in results.supernets else f" of {plural(len(results.supernets), 'supernet')}"
    return f"{run.name}: {plural(results.num_trials, 'trial')}{several} stored in {shown_uri(uri)}"


class BundleLog:
    """Makes the bundles of an export logged models of its run, where the run is tracked.

    Args:
        results: results of the run.
        register: name of a registered model of which each bundle becomes a version; None = as
            `export.register_as` says.

    Raises:
        ConfigError: the name is not allowed.
        PreflightError: there is a name, but tracking is off.
    """

    def __init__(self, results: Results, register: str | None) -> None:
        self._results = results
        self._register = results.config.export.register_as if register is None else registered_name(register)
        if register is not None and not results.config.tracking.mlflow:
            raise PreflightError(
                f"--register {register}: run {results.run.name!r} was made with tracking.mlflow: false; launch it with "
                "--set tracking.mlflow=true"
            )

    def write(self, paths: Sequence[Path], folder: Path | None) -> str | None:
        """Log bundles; returns a warning if the store does not take all of them.

        Bundles outside the run folder are logged only if they are to be registered: MLflow holds
        what `sync` can write again from the run folder.

        Args:
            paths: the bundles' folders.
            folder: the folder to which they were exported; None = that of the run.
        """
        if folder is not None and self._register is None:
            return None
        results = self._results
        tracker = make_tracker(results.config, results.run, warn=_said_below)
        row = row_of(results)
        tracker.attach(row)
        write_bundles(tracker, paths, folder or results.run.export_dir, self._register)
        summary = tracker.close(row.status, row.end_ms or row.start_ms, SYNC_TIMEOUT_S)
        if not summary.num_unsent:
            return None
        return (
            f"the bundles are complete, but MLflow at {shown_uri(store_uri(results.config, results.run))} did not take all of them "
            f"({summary.first_error}); repeat this export to log them"
        )


def _said_below(_: str) -> None:
    """Omit the tracker's own warning, which names another way out."""


@dataclass(frozen=True)
class Pages:
    """A store of MLflow, and the pages in it that show points."""

    uri: str
    artifacts: Path
    """Folder of the store's artifacts."""
    links: tuple[Link, ...]


def newest_pages(runs: Path) -> Pages:
    """The pages of the newest runs in a runs folder, in its default store.

    Raises:
        NotFoundError: no run was tracked there yet.
    """
    if not (runs / MLFLOW_DATABASE).is_file():
        raise NotFoundError(
            f"{runs}: has no {MLFLOW_DATABASE}; launch a sweep first, or give another runs folder with --runs"
        )
    uri = mlflow_store_uri(runs)
    return Pages(uri, mlflow_artifact_root(runs), tuple(newest_links(runs, uri)))


def pages_of(results: Results) -> Pages:
    """The page of a run, which is written to the store first if it has no page there; no page for a
    store on a server, which is not searched."""
    uri = store_uri(results.config, results.run)
    link = None if is_server(uri) else certain_link(results, uri, lambda: sync_again(results))
    return Pages(uri, mlflow_artifact_root(whole_sweep(results.run).root), () if link is None else (link,))
