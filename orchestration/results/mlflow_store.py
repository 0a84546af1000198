"""The MLflow store of a run."""

from __future__ import annotations

from dsnet.errors import ConfigError
from orchestration.config.command_lines import command_line
from orchestration.config.store_uri import (
    URI_VARIABLE,
    absolute_uri,
    is_server,
    shown_uri,
    uri_of_environment,
    uri_problem,
)
from orchestration.config.sweep import SweepConfig
from orchestration.results.stored_config import stored_config
from orchestration.runs.folder import RUN_NAME, RunDir, mlflow_store_uri
from orchestration.runs.manifest import Manifest


def store_uri(config: SweepConfig, run: RunDir) -> str:
    """The URI of a run's MLflow store: as configured, that of $MLFLOW_TRACKING_URI, or the database
    in the runs folder. It may hold a password, and is shown as `shown_uri` gives it.

    A member of a sweep of supernets is tracked with that sweep, at the sweep's present location.

    Raises:
        ConfigError: the environment names no store.
        PreflightError: the runs folder's path cannot be written in a database URI.
    """
    whole = whole_sweep(run)
    uri = config.tracking.uri if whole is run else _config_of(whole).tracking.uri
    if uri is None and (uri := uri_of_environment()) is not None and (problem := uri_problem(uri)) is not None:
        raise ConfigError(f"${URI_VARIABLE}: {problem}")
    return mlflow_store_uri(whole.root) if uri is None else absolute_uri(uri)


def browsing_commands(config: SweepConfig, run: RunDir) -> tuple[tuple[str, str], ...]:
    """(what it does, command) pairs for looking at a run in MLflow: of a server its address, none
    without tracking."""
    if not config.tracking.mlflow:
        return ()
    uri = store_uri(config, run)
    if is_server(uri):
        return (("The results in MLflow, to be opened in a browser", shown_uri(uri)),)
    return (("Browse the results in MLflow", command_line("ui", run.path)),)


def _config_of(run: RunDir) -> SweepConfig:
    return stored_config(run, Manifest(run.manifest_path).read())


def whole_sweep(run: RunDir) -> RunDir:
    """The sweep of supernets that a run is part of, or the run itself."""
    above = run.root.parent
    if not RUN_NAME.fullmatch(above.name):
        return run
    whole = RunDir(above.parent, above.name)
    return whole if whole.supernets_dir == run.root and whole.supernets_json.is_file() else run
