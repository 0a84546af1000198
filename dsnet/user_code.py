"""Code of the user that a setting names by an import path."""

from __future__ import annotations

import os

from dsnet.errors import ConfigError
from dsnet.import_path import ALLOW_IMPORTS, import_object


def check_allowed(setting: str, path: str) -> None:
    """Check that the user has allowed the import of own code.

    Args:
        setting: dotted key of the setting that names the code.
        path: its value, `package.module:name`.

    Raises:
        ConfigError: it is not allowed.
    """
    if os.environ.get(ALLOW_IMPORTS) != "1":
        raise ConfigError(
            f"{setting}: {path!r} runs code of yours; allow that with {ALLOW_IMPORTS}=1 in the environment, or with --allow-imports "
            "on the command line"
        )


def import_allowed(setting: str, path: str) -> object:
    """Import a function or class that a setting names by `package.module:name`.

    Args:
        setting: dotted key of the setting.
        path: its value.

    Raises:
        ConfigError: the user has not allowed the import of own code, or it cannot be imported.
    """
    check_allowed(setting, path)
    try:
        return import_object(path.replace(":", "."))
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{setting}: {path!r} cannot be imported: {error}") from error
