"""The store that writes rows to MLflow; all of them are derived from the run folder.

Every row has its own timestamps, steps and `uid`, so that writing it again (`dsnet-orch sync`)
changes nothing. A store that fails, or is slow, causes one warning; the rows that it misses can be
written later from the run folder.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import posixpath
import re
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestration.config.store_uri import database_of, is_server
from orchestration.tracking.database import mend_artifact_locations
from orchestration.tracking.datasets import dataset_inputs
from orchestration.tracking.new_database import create_database
from orchestration.tracking.view import SUPERSEDED, points_view, view_tag

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run
    from mlflow.tracking import MlflowClient
from orchestration.runs.curves import CurvePoint
from orchestration.tracking.logged_models import ModelPlace, log_bundle
from orchestration.tracking.protocol import TrackedBundle, TrackedData, TrackedRun

logger = logging.getLogger(__name__)
MAX_NAME_LENGTH = 250
MAX_PARAM_LENGTH = 6000
MAX_TAG_LENGTH = 8000
MAX_METRICS_PER_BATCH = 900
"""Largest number of metrics per batch; MLflow takes 1,000 entities, of which at most 100 parameters
and 100 tags."""
MAX_PARAMS_PER_BATCH = 90
PARENT_TAG = "mlflow.parentRunId"
"""Tag with which MLflow's page nests one row below another."""
NOTE_TAG = "mlflow.note.content"
"""Tag of the Markdown description that MLflow's page shows above a run."""
RUN_ID, EXPERIMENT_ID = "{run_id}", "{experiment_id}"
"""Placeholders in a description, replaced when it is written."""
_SUPERSEDED_TAGS = {"role": SUPERSEDED, "on_front": "false", "is_knee": "false"}
"""Tags that rate a row among the results of its sweep, with the values of a superseded row."""
_COMPLETE = ("FINISHED", "FAILED")


@dataclass(frozen=True)
class _KnownRun:
    run_id: str
    status: str
    tags: Mapping[str, str] = field(default_factory=dict)
    metrics: frozenset[str] = frozenset()
    """Names of the metrics that it has."""


class MlflowStore:
    """Writes rows to MLflow, one call after the other; every call may be repeated.

    A run is found by its tag `uid`. The tag `sweep` on parent and children allows one search per
    sweep, and the tag `root`, of the outermost sweep, allows one search for the points of a whole
    tree. A child that is FINISHED or FAILED was written completely, because its status is set last;
    only tags that differ and metrics that it lacks are added. Points of curves are written again,
    and MLflow drops those that it has (same run, name, step, time and value).
    """

    def __init__(self, store_uri: str, experiment: str, artifact_root: Path) -> None:
        """Keep the arguments (see `MlflowTracker`); nothing is opened yet."""
        self._store_uri = store_uri
        self._experiment = experiment
        self._artifact_root = artifact_root
        self._outer_ids: dict[str, str] = {}
        self._client: MlflowClient | None = None
        self._experiment_id = ""
        self._sweeps: dict[str, dict[str, _KnownRun]] = {}
        """Runs by uid, for each sweep that was written to."""
        self._known: dict[str, _KnownRun] = {}
        """Runs of the current sweep by uid."""

    def connect(self) -> None:
        """Open the store; create the database and the experiment if they are missing."""
        self._connected()

    def open_sweep(self, parent: TrackedRun) -> None:
        """Create or reopen the parent run; close with KILLED the rows below it that a killed driver
        left RUNNING."""
        self._load(parent)
        self._run_id(parent, parent)
        for uid, known in list(self._known.items()):
            if uid != parent.uid and known.status == "RUNNING":
                self._end(uid, "KILLED", _now_ms())
        tags = dict(parent.tags)
        if parent.under is not None:
            tags[PARENT_TAG] = self._outer_id(parent.under)  # also where the sweep was first launched by itself
        self.write(replace(parent, status="RUNNING", end_ms=None, tags=tags), parent)
        self._share_view(parent)

    def attach(self, parent: TrackedRun) -> None:
        """Write the parent run if it is missing; else leave it as it is."""
        if parent.uid not in self._load(parent):
            self.write(parent, parent)

    def write(self, run: TrackedRun, parent: TrackedRun) -> None:
        """Write a run: parameters, metrics and tags in one batch, then its status."""
        known = self._load(parent).get(run.uid)
        if known is not None and known.status in _COMPLETE and run.uid != parent.uid:
            self._amend(known, run, parent)
            return
        run_id = self._run_id(run, parent)
        params = clean_params(run.params)
        if known is not None:
            # Parameters are immutable: those of the first launch stay; the present ones are in
            # sweep.yaml.
            written = self._connected().get_run(run_id).data.params
            params = {name: value for name, value in params.items() if name not in written}
        tags, time_ms = _tags(run, parent, known), _written_at(run)
        self._log(run_id, [CurvePoint(0, time_ms, run.metrics)], params, tags)
        self._remember(run, tags)
        if run.status != "RUNNING":
            self._end(run.uid, run.status, time_ms)
        elif self._known[run.uid].status != "RUNNING":
            self._connected().update_run(run_id, status="RUNNING")
            self._known[run.uid] = replace(self._known[run.uid], status="RUNNING")

    def _amend(self, known: _KnownRun, run: TrackedRun, parent: TrackedRun) -> None:
        """Add to a finished row the tags that differ and the metrics that it lacks: the front and
        metrics on `test` are known only when all trials are done. Metrics that the row has are
        not written again: MLflow would keep both values and show the larger one."""
        tags = {name: value for name, value in _tags(run, parent, known).items() if known.tags.get(name) != value}
        metrics = {
            name: value
            for name, value in run.metrics.items()
            if value is not None and math.isfinite(value) and _clean_name(name) not in known.metrics
        }
        if tags or metrics:
            self._log(known.run_id, [CurvePoint(0, _written_at(run), metrics)], {}, tags)
            self._remember(run, tags)

    def _remember(self, run: TrackedRun, tags: Mapping[str, str]) -> None:
        known = self._known[run.uid]
        metrics = known.metrics | {_clean_name(name) for name, value in run.metrics.items() if value is not None}
        self._known[run.uid] = replace(known, tags={**known.tags, **tags}, metrics=metrics)

    def supersede(self, parent: TrackedRun, current: Sequence[str]) -> None:
        """Mark the rows below a sweep that belong to none of the present results: tag `superseded`,
        and neither a role, nor knee, nor on the front. Rows that belong to them again lose the mark
        and get their role when they are written again. See `Tracker.supersede`."""
        rows = self._load(parent)
        below = {}  # rows of the sweep's supernets
        if self._known[parent.uid].tags.get("root", parent.uid) == parent.uid:
            below = dict(self._search(f"tags.root = '{parent.uid}' AND tags.sweep != '{parent.uid}'"))
        for uid, row in {**below, **rows}.items():
            is_current = any(f"{uid}/".startswith(f"{place}/") for place in current)
            if uid == parent.uid or is_current != (SUPERSEDED in row.tags):
                continue
            kept = self._without_mark(row) if is_current else self._with_mark(row)
            if uid in rows:
                rows[uid] = replace(row, tags=kept)

    def _with_mark(self, row: _KnownRun) -> dict[str, str]:
        rated = {name: value for name, value in _SUPERSEDED_TAGS.items() if name in row.tags}
        self._log(row.run_id, [], {}, {SUPERSEDED: "true", **rated})
        return {**row.tags, SUPERSEDED: "true", **rated}

    def _without_mark(self, row: _KnownRun) -> dict[str, str]:
        cleared = {SUPERSEDED, *(("role",) if row.tags.get("role") == SUPERSEDED else ())}
        for name in cleared:
            self._connected().delete_tag(row.run_id, name)
        return {name: value for name, value in row.tags.items() if name not in cleared}

    def add_points(self, run: TrackedRun, parent: TrackedRun, points: Sequence[CurvePoint]) -> None:
        """Add metrics by step to a run."""
        self._load(parent)
        self._log(self._run_id(run, parent), points, {}, {})

    def add_artifact(self, parent: TrackedRun, path: Path) -> None:
        """Copy a file to the parent run; a second copy replaces the first."""
        self._load(parent)
        self._connected().log_artifact(self._run_id(parent, parent), str(path))

    def add_datasets(self, parent: TrackedRun, datasets: Sequence[TrackedData]) -> None:
        """Record the images of the sweep as inputs of the parent run; MLflow keeps one dataset for
        each name and digest."""
        self._load(parent)
        self._connected().log_inputs(self._run_id(parent, parent), dataset_inputs(datasets))

    def add_bundle(self, parent: TrackedRun, bundle: TrackedBundle) -> None:
        """Make a bundle a logged model of the parent run, and register it if it is to be."""
        self._load(parent)
        run_id = self._run_id(parent, parent)
        with self._alone():
            log_bundle(self._connected(), ModelPlace(self._experiment_id, run_id), bundle)

    def describe(self, parent: TrackedRun, text: str) -> None:
        """Set the description of the parent run."""
        self._load(parent)
        run_id = self._run_id(parent, parent)
        filled = text.replace(RUN_ID, run_id).replace(EXPERIMENT_ID, self._experiment_id)
        self._connected().set_tag(run_id, NOTE_TAG, filled[:MAX_TAG_LENGTH])

    def _share_view(self, parent: TrackedRun) -> None:
        """Store a prepared page of the sweep's points as a tag of the experiment, for `dsnet-orch
        ui`."""
        is_outermost = self._known[parent.uid].tags["root"] == parent.uid
        tag, content = view_tag(parent.uid), points_view(parent.uid, is_outermost=is_outermost)
        client = self._connected()
        if client.get_experiment(self._experiment_id).tags.get(tag) != content:
            client.set_experiment_tag(self._experiment_id, tag, content)

    def close_sweep(self, parent: TrackedRun) -> None:
        """End the parent with its status, and its running children with KILLED."""
        self._load(parent)
        self._run_id(parent, parent)
        end_ms = parent.end_ms if parent.end_ms is not None else _now_ms()
        for uid, known in list(self._known.items()):
            if known.status == "RUNNING" and uid != parent.uid:
                self._end(uid, "KILLED", end_ms)
        self._end(parent.uid, parent.status, end_ms)

    def stop(self, *, at_once: bool) -> None:
        """Do nothing: the store holds no resources."""

    def _connected(self) -> MlflowClient:
        if self._client is None:
            os.environ.update(mlflow_environment())
            from mlflow.tracking import MlflowClient

            if (database := database_of(self._store_uri)) is not None:
                with self._alone():
                    create_database(database.absolute(), self._artifact_root)
            _check_sqlite(self._store_uri)
            mend_artifact_locations(self._store_uri, self._artifact_root.absolute())
            client = MlflowClient(self._store_uri)
            with self._alone():
                self._experiment_id = self._open_experiment(client)
            self._client = client
        return self._client

    def _open_experiment(self, client: MlflowClient) -> str:
        experiment = client.get_experiment_by_name(self._experiment)
        if experiment is None:
            location = (
                None if is_server(self._store_uri) else (self._artifact_root.absolute() / self._experiment).as_uri()
            )
            tags = {"mlflow.experimentKind": "custom_model_development"}  # opens MLflow's "Model training" view
            return str(client.create_experiment(self._experiment, artifact_location=location, tags=tags))
        if experiment.lifecycle_stage == "deleted":
            client.restore_experiment(
                experiment.experiment_id
            )  # its name stays in use, so a new experiment cannot have it
        return str(experiment.experiment_id)

    def _load(self, parent: TrackedRun) -> dict[str, _KnownRun]:
        """The sweep's runs by uid; MLflow is searched only once per sweep."""
        if parent.uid not in self._sweeps:
            self._sweeps[parent.uid] = dict(self._search(f"tags.sweep = '{parent.uid}'"))
        self._known = self._sweeps[parent.uid]
        return self._known

    def _search(self, condition: str) -> Iterator[tuple[str, _KnownRun]]:
        client, token = self._connected(), None
        while True:
            page = client.search_runs([self._experiment_id], condition, max_results=1000, page_token=token)
            for run in page:
                yield run.data.tags["uid"], _known_run(run)
            token = page.token
            if not token:
                return

    def _run_id(self, run: TrackedRun, parent: TrackedRun) -> str:
        """The id of the run with this uid, and of its parent before it; both are created if they
        are missing."""
        if run.uid not in self._known:
            if run.uid == parent.uid:
                above = None if parent.under is None else self._outer_id(parent.under)
                self._known[run.uid] = self._sweep_row(run, above)
            else:
                self._known[run.uid] = self._create(run, parent.uid, self._run_id(parent, parent))
        return self._known[run.uid].run_id

    def _outer_id(self, outer: TrackedRun) -> str:
        """The id of the row above the sweep's own."""
        if outer.uid not in self._outer_ids:
            self._outer_ids[outer.uid] = self._sweep_row(outer, None).run_id
        return self._outer_ids[outer.uid]

    def _sweep_row(self, run: TrackedRun, above: str | None) -> _KnownRun:
        """The row of a sweep, created if it is missing; several trackers may look for it at the
        same time."""
        client = self._connected()
        with self._alone():
            found = client.search_runs([self._experiment_id], f"tags.uid = '{run.uid}'", max_results=1)
            if found:
                return _known_run(found[0])
            return self._create(run, run.uid, above)

    def _create(self, run: TrackedRun, sweep_uid: str, above: str | None) -> _KnownRun:
        tags = {"uid": run.uid, "sweep": sweep_uid, "kind": run.kind, **({PARENT_TAG: above} if above else {})}
        client = self._connected()
        info = client.create_run(self._experiment_id, start_time=run.start_ms, run_name=run.name, tags=tags).info
        return _KnownRun(info.run_id, "RUNNING")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Lock that keeps trackers on this machine from creating the same thing twice, which MLflow
        would allow."""
        self._artifact_root.mkdir(parents=True, exist_ok=True)
        with open(self._artifact_root / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed
            yield

    def _end(self, uid: str, status: str, end_ms: int) -> None:
        run_id = self._known[uid].run_id
        self._connected().set_terminated(run_id, status, end_time=end_ms)
        self._known[uid] = replace(self._known[uid], status=status)

    def _log(
        self, run_id: str, points: Sequence[CurvePoint], params: Mapping[str, str], tags: Mapping[str, str]
    ) -> None:
        from mlflow.entities import Param, RunTag

        client = self._connected()
        metrics = list(_metrics(points))
        named_tags = [RunTag(name, value) for name, value in tags.items()]
        named_params = [Param(name, value) for name, value in params.items()]
        # Nearly always one batch holds a whole run.
        if len(metrics) + len(named_params) <= MAX_METRICS_PER_BATCH and len(named_params) <= MAX_PARAMS_PER_BATCH:
            client.log_batch(run_id, metrics, named_params, named_tags)
            return
        for begin in range(0, len(named_params), MAX_PARAMS_PER_BATCH):
            client.log_batch(run_id, params=named_params[begin : begin + MAX_PARAMS_PER_BATCH])
        for begin in range(0, len(metrics), MAX_METRICS_PER_BATCH):
            client.log_batch(run_id, metrics[begin : begin + MAX_METRICS_PER_BATCH])
        client.log_batch(run_id, tags=named_tags)


def mlflow_environment() -> dict[str, str]:
    """Environment variables to set before anything imports MLflow: no telemetry, no jobs, short
    time-outs, few log lines and no progress bars, and no lock file of the working directory as a
    model's requirements.

    Time-outs, retries and the log level that the user has set are kept.
    """
    chosen = {
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    }
    return {
        **{name: os.environ.get(name, value) for name, value in chosen.items()},
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_UV_AUTO_DETECT": "false",
    }


def clean_params(params: Mapping[str, Any]) -> dict[str, str]:
    """Parameters with names and lengths that MLflow accepts; values in the notation of YAML."""
    return {_clean_name(name): _param_text(value)[:MAX_PARAM_LENGTH] for name, value in params.items()}


def _clean_name(name: str) -> str:
    """The name with characters that MLflow accepts: letters, digits, `_ - . : /` and space, and no
    name that reads as another path."""
    allowed = re.sub(r"[^\w\-. :/]", "_", name)
    return posixpath.normpath(allowed).strip("./ ")[:MAX_NAME_LENGTH].rstrip("./ ") or "_"


def _param_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _metrics(points: Sequence[CurvePoint]) -> Iterator[Metric]:
    from mlflow.entities import Metric

    for point in points:
        for name, value in point.metrics.items():
            if value is not None and math.isfinite(value):
                yield Metric(_clean_name(name), float(value), point.time_ms, point.step)


def _known_run(run: Run) -> _KnownRun:
    return _KnownRun(run.info.run_id, run.info.status, run.data.tags, frozenset(run.data.metrics))


def _tags(run: TrackedRun, parent: TrackedRun, known: _KnownRun | None) -> dict[str, str]:
    """The tags to write for a row: its `tags`, and those of its `first_tags` that it does not have
    yet."""
    root, reason = {"root": parent.root_uid}, {"reason": run.reason} if run.reason else {}
    first, always = {**run.first_tags}, {**run.tags, **reason}
    # A member of a sweep that is launched alone keeps the place that its sweep gave it.
    (first if parent.under is None else always).update(root)
    if run.note and run.note.startswith("" if known is None else known.tags.get(NOTE_TAG, "")):
        always[NOTE_TAG] = run.note
    new = {name: value for name, value in first.items() if known is None or name not in known.tags}
    tags = {**new, **always}
    return {_clean_name(name): str(value)[:MAX_TAG_LENGTH] for name, value in tags.items()}


def _written_at(run: TrackedRun) -> int:
    return run.end_ms if run.end_ms is not None else run.start_ms


def _check_sqlite(store_uri: str) -> None:
    """Fail at once on a database that cannot be opened, for which MLflow would retry for 100 s."""
    if store_uri.startswith("sqlite:///"):
        with closing(sqlite3.connect(store_uri.removeprefix("sqlite:///"), timeout=5.0)) as connection:
            connection.execute("PRAGMA schema_version")


def _now_ms() -> int:
    return int(time.time() * 1000)
