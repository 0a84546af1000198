"""Location of the user's data: the configured path, or the environment variable DSNET_DATA."""

from __future__ import annotations

import os
from pathlib import Path

from dsnet.errors import DataError

DATA_VARIABLE = "DSNET_DATA"


def data_root(name: str, path: str | Path | None) -> Path:
    """The existing file or folder that holds a data set.

    Args:
        name: The data set's name, for the message.
        path: `data.path`; `~` and environment variables are expanded, a relative path starts at the
            working directory. None: the value of the environment variable DSNET_DATA.

    Raises:
        DataError: Neither is given, or the path does not exist.
    """
    given = path if path is not None else os.environ.get(DATA_VARIABLE)
    origin = "" if path is not None else f" (from the environment variable {DATA_VARIABLE})"
    if not given:
        raise DataError(
            f"data set {name!r} needs a folder: give it with --data FOLDER, data.path or the environment variable {DATA_VARIABLE}"
        )
    root = Path(os.path.expandvars(given)).expanduser()
    if not root.exists():
        raise DataError(
            f"data set {name!r}: {root}{origin} does not exist; give its folder with --data FOLDER, data.path or {DATA_VARIABLE}"
        )
    return root
