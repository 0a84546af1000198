"""Creation of MLflow's database, as a whole or not at all.

MLflow creates its tables in many steps. A process that is killed between two of them leaves a
database that no later one can open.
"""

from __future__ import annotations

from pathlib import Path

from dsnet.files import remove_drafts, replacing


def create_database(database: Path, artifact_root: Path) -> None:
    """Create a database of MLflow where there is none, or an empty file; callers hold a lock.

    Args:
        database: its file; the folder exists.
        artifact_root: folder for the artifacts of the experiment "Default", which MLflow creates.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    if database.is_file() and database.stat().st_size:
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    remove_drafts(database.parent, is_deep=False)
    with replacing(database) as draft:
        SqlAlchemyStore(f"sqlite:///{draft}", artifact_root.absolute().as_uri()).engine.dispose()
