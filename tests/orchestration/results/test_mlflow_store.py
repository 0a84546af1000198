"""The advice about a run's store in MLflow."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestration.config.loading import load_config
from orchestration.config.sweep import SweepConfig
from orchestration.results.mlflow_store import browsing_commands
from orchestration.runs.folder import RunDir


def config_with(tracking: str) -> SweepConfig:
    digits = Path(__file__).parents[3] / "examples" / "digits.yaml"
    return load_config(digits, overrides=[f"tracking={tracking}"]).config


@pytest.mark.parametrize(
    ("tracking", "end"),
    [
        ("{mlflow: true}", "dsnet-orch ui {run}"),
        ("{mlflow: true, uri: 'sqlite:////tmp/other.db'}", "dsnet-orch ui {run}"),
        ("{mlflow: true, uri: 'http://127.0.0.1:5000'}", "http://127.0.0.1:5000"),
    ],
)
def test_a_report_says_how_the_results_in_the_store_in_use_are_opened(tmp_path: Path, tracking: str, end: str) -> None:
    run = RunDir(tmp_path, "digits")
    ((_, command),) = browsing_commands(config_with(tracking), run)
    assert command == end.format(run=run.path)


def test_a_report_without_tracking_names_no_store(tmp_path: Path) -> None:
    assert browsing_commands(config_with("{mlflow: false}"), RunDir(tmp_path, "digits")) == ()


def test_the_address_of_a_server_in_the_environment_is_shown_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@server/mlflow")
    ((_, command),) = browsing_commands(config_with("{mlflow: true}"), RunDir(tmp_path, "digits"))
    assert command == "https://***@server/mlflow"
