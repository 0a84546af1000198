"""Reading and correcting MLflow's database; that MLflow itself serves from the corrected locations
is tested in test_server."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from dsnet.errors import PreflightError
from orchestration.tracking.database import experiment_of, mend_artifact_locations
from orchestration.tracking.view import view_tag

ROOT = "mlruns-artifacts"


def make_store(runs: Path, location: str | None = None) -> Path:
    """A runs folder with the tables that are read: an experiment with one artifact, and two runs
    of it."""
    (runs / ROOT / "my photos" / "r0" / "artifacts").mkdir(parents=True)
    place = location or (runs / ROOT / "my photos").as_uri()
    with closing(sqlite3.connect(runs / "mlflow.db")) as connection:
        connection.execute("CREATE TABLE experiments (experiment_id INTEGER, artifact_location TEXT)")
        connection.execute("CREATE TABLE experiment_tags (key TEXT, value TEXT, experiment_id INTEGER)")
        connection.execute("CREATE TABLE runs (run_uuid TEXT, artifact_uri TEXT)")
        connection.execute("INSERT INTO experiments VALUES (0, 'mlflow-artifacts:/0'), (1, ?)", (place,))
        connection.executemany("INSERT INTO runs VALUES (?, ?)", [(f"r{k}", f"{place}/r{k}/artifacts") for k in (0, 1)])
        connection.execute("CREATE TABLE model_versions (source TEXT, storage_location TEXT)")
        connection.execute("INSERT INTO model_versions VALUES (?, ?)", 2 * (f"{place}/models/m0/artifacts",))
        connection.execute("INSERT INTO experiment_tags VALUES (?, '{}', 1)", (view_tag("photos/1234"),))
        connection.commit()
    return runs


def mend(runs: Path) -> int:
    return mend_artifact_locations(f"sqlite:///{runs / 'mlflow.db'}", runs / ROOT)


def locations(runs: Path) -> list[str]:
    with closing(sqlite3.connect(runs / "mlflow.db")) as connection:
        columns = (("artifact_location", "experiments"), ("artifact_uri", "runs"))
        columns += (("source", "model_versions"), ("storage_location", "model_versions"))
        found = connection.execute(" UNION ".join(f"SELECT {column} FROM {table}" for column, table in columns))
        return sorted(location for (location,) in found)


def expected(runs: Path) -> list[str]:
    place = (runs / ROOT / "my photos").as_uri()
    return [
        place,
        f"{place}/models/m0/artifacts",
        f"{place}/r0/artifacts",
        f"{place}/r1/artifacts",
        "mlflow-artifacts:/0",
    ]


def test_a_folder_that_was_moved_names_its_new_place_once(tmp_path: Path) -> None:
    make_store(tmp_path / "old runs").rename(tmp_path / "new")
    assert mend(tmp_path / "new") == 5
    assert locations(tmp_path / "new") == expected(tmp_path / "new")
    assert mend(tmp_path / "new") == 0


def test_a_copy_names_its_own_artifacts_and_leaves_the_original_alone(tmp_path: Path) -> None:
    original = make_store(tmp_path / "original")
    shutil.copytree(original, tmp_path / "copy")
    assert mend(tmp_path / "copy") == 5
    assert locations(tmp_path / "copy") == expected(tmp_path / "copy")
    assert mend(original) == 0
    assert locations(original) == expected(original)


def test_artifacts_that_stayed_where_they_were_are_served_from_there(tmp_path: Path) -> None:
    original = make_store(tmp_path / "original")
    (tmp_path / "database only" / ROOT).mkdir(parents=True)
    shutil.copy(original / "mlflow.db", tmp_path / "database only")
    assert mend(tmp_path / "database only") == 0
    assert locations(tmp_path / "database only") == expected(original)


def test_a_database_that_does_not_lie_beside_the_artifacts_is_left_alone(tmp_path: Path) -> None:
    runs = make_store(tmp_path / "runs", location="file:///gone/mlruns-artifacts/photos")
    before = locations(runs)
    assert mend_artifact_locations(f"sqlite:///{runs / 'mlflow.db'}", tmp_path / "other" / ROOT) == 0
    assert mend_artifact_locations("http://127.0.0.1:1", runs / ROOT) == 0
    assert mend_artifact_locations(f"sqlite:///{runs / 'none.db'}", runs / ROOT) == 0
    assert locations(runs) == before
    assert not (runs / "none.db").exists()


def test_the_experiment_of_a_sweep_is_found_by_its_page(tmp_path: Path) -> None:
    uri = f"sqlite:///{make_store(tmp_path / 'runs') / 'mlflow.db'}"
    assert experiment_of(uri, "photos/1234") == "1"
    assert experiment_of(uri, "photos/5678") is None
    assert experiment_of("http://127.0.0.1:1", "photos/1234") is None


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / ROOT).mkdir()
    (tmp_path / "mlflow.db").write_bytes(b"not a database" * 100)
    with pytest.raises(PreflightError, match=r"mlflow\.db.*dsnet-orch sync"):
        mend(tmp_path)
