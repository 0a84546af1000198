"""MLflow's database in a runs folder, read without MLflow: the experiment of a sweep, and the
locations of artifacts.

MLflow records the absolute folder of artifacts for every experiment and every run, so that a runs
folder that was moved or copied has no artifacts, or those of the old place. The database is in the
same folder as its artifacts, so the recorded folders are corrected whenever it is opened.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dsnet.errors import PreflightError
from orchestration.config.store_uri import database_of
from orchestration.tracking.view import view_tag

BUSY_TIMEOUT_S = 5.0
_LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def experiment_of(store_uri: str, uid: str) -> str | None:
    """The id of the experiment that holds a sweep's prepared view; None if no such view was
    written.

    Args:
        store_uri: an SQLite database.
        uid: uid of the sweep's own row.
    """
    database = database_of(store_uri)
    if database is None or not database.is_file():
        return None
    with _opened(database) as connection:
        if "experiment_tags" not in _tables(connection):
            return None
        query = "SELECT experiment_id FROM experiment_tags WHERE key = ? ORDER BY experiment_id DESC"
        found = connection.execute(query, (view_tag(uid),)).fetchone()
    return None if found is None else str(found[0])


def mend_artifact_locations(store_uri: str, artifact_root: Path) -> int:
    """Correct the recorded locations of artifacts after the runs folder was moved or copied.

    Only a database that lies beside its artifacts is changed, and only locations below a folder
    with the name of `artifact_root`. A location is kept if it exists and its counterpart below
    `artifact_root` does not.

    Args:
        store_uri: URI of the store.
        artifact_root: present folder of the artifacts.

    Returns:
        how many locations were rewritten.

    Raises:
        PreflightError: the database cannot be read or written.
    """
    database = database_of(store_uri)
    if database is None or not database.is_file() or database.parent != artifact_root.parent:
        return 0
    with _opened(database) as connection:
        present = _tables(connection)
        num_changed = sum(
            _mend(connection, table, column, artifact_root) for table, column in _LOCATIONS if table in present
        )
        connection.commit()
    return num_changed


def _mend(connection: sqlite3.Connection, table: str, column: str, artifact_root: Path) -> int:
    here, num_changed = artifact_root.as_uri(), 0
    for there, family in _elsewhere(connection, table, column, artifact_root):
        # Most runs have no artifacts, and no folder: the folder of the experiment decides for all
        # of them.
        if (artifact_root / unquote(family)).exists() or not (_path(there) / unquote(family)).exists():
            old = f"{there}/{family}"
            update = f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE {column} = ? OR substr({column}, 1, ?) = ?"
            values = (here, len(there) + 1, old, len(old) + 1, f"{old}/")
            num_changed += connection.execute(update, values).rowcount
    return num_changed


def _elsewhere(connection: sqlite3.Connection, table: str, column: str, artifact_root: Path) -> set[tuple[str, str]]:
    """(recorded folder of all artifacts, folder of an experiment in it) of the locations that are
    not below today's folder."""
    here, marker = artifact_root.as_uri(), f"/{artifact_root.name}/"
    query = f"SELECT DISTINCT {column} FROM {table} WHERE {column} LIKE ? AND substr({column}, 1, ?) != ?"
    rows = connection.execute(query, (f"file:%{marker}%", len(here) + 1, f"{here}/"))
    parted = [location.rpartition(marker) for (location,) in rows]
    return {(before + marker.rstrip("/"), below.split("/")[0]) for before, _, below in parted}


def _path(location: str) -> Path:
    return Path(unquote(urlsplit(location).path))


def _tables(connection: sqlite3.Connection) -> set[str]:
    return {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


@contextmanager
def _opened(database: Path) -> Iterator[sqlite3.Connection]:
    try:
        with closing(sqlite3.connect(database, timeout=BUSY_TIMEOUT_S)) as connection:
            yield connection
    except sqlite3.Error as error:
        raise PreflightError(
            f"{database}: cannot be read as MLflow's database ({error}); end other programs that use it, or move it away and write "
            "the runs again with: dsnet-orch sync RUN"
        ) from error
