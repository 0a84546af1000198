"""Modules of the user that register network families, structure methods, router kinds, metrics or
exporters.

They are imported in every process that reads a registry, including Ray workers. They are named by
the environment variable `DSNET_PLUGINS` (import paths separated by commas) or by the entry point
group `dsnet_orch.plugins` of an installed package.
"""

from __future__ import annotations

import importlib
import os
from importlib.metadata import entry_points

from dsnet.errors import ConfigError

VARIABLE = "DSNET_PLUGINS"
GROUP = "dsnet_orch.plugins"

_loaded: set[str] = set()


def load_plugins() -> None:
    """Import the named modules that are not imported yet.

    Raises:
        ConfigError: a module cannot be imported.
    """
    named = [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    _import(named, f"the environment variable {VARIABLE}")
    if GROUP not in _loaded:
        _loaded.add(GROUP)
        _import([entry.module for entry in entry_points(group=GROUP)], f"an installed package ({GROUP})")


def _import(names: list[str], source: str) -> None:
    for name in names:
        if name in _loaded:
            continue
        _loaded.add(name)  # before the import: a plugin may read the registries itself
        try:
            importlib.import_module(name)
        except ImportError as error:
            _loaded.discard(name)
            raise ConfigError(f"the plugin {name!r}, named by {source}, cannot be imported: {error}") from error
