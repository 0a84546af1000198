"""A process that is killed while it creates MLflow's database leaves none behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from dsnet.errors import StorageError
from orchestration.tracking.new_database import create_database
from tests.full_disk import FullDisk
from tests.hostile import REPOSITORY

PROGRAM = """
import sys
from pathlib import Path
from orchestration.tracking.new_database import create_database
create_database(Path(sys.argv[1], "mlflow.db"), Path(sys.argv[1], "artifacts"))
"""


def num_pages(draft: Path) -> int:
    """Pages of a database; the complete one has more than a hundred."""
    return draft.stat().st_size // 4096


def test_a_killed_creation_is_begun_anew(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen([sys.executable, "-c", PROGRAM, tmp_path], env=environment) as process:
        while not any(num_pages(draft) >= 60 for draft in tmp_path.glob(".mlflow.db.*.tmp")):
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.001)
        process.kill()
    assert not (tmp_path / "mlflow.db").exists()
    database = tmp_path / "mlflow.db"
    create_database(database, tmp_path / "artifacts")
    assert os.listdir(tmp_path) == ["mlflow.db"], "the draft of the killed process is removed"
    before = database.read_bytes()
    create_database(database, tmp_path / "artifacts")
    assert database.read_bytes() == before
    client = MlflowClient(f"sqlite:///{database}")
    experiment = client.create_experiment("e")
    assert {each.name for each in client.search_experiments()} == {"Default", "e"}
    client.create_run(experiment)


def test_an_empty_file_is_taken_for_none_and_a_full_disk_is_told(tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    database.touch()
    with FullDisk(tmp_path, 0).installed(), pytest.raises(StorageError, match="the disk is full"):
        create_database(database, tmp_path / "artifacts")
    assert database.read_bytes() == b""
    create_database(database, tmp_path / "artifacts")
    assert database.read_bytes().startswith(b"SQLite format 3")
