"""Structure methods, registered by name. They need no torch.

A new method is one file in this folder that calls `register` when it is imported, a plugin
(`dsnet.plugins`), or a class of the user that is named by its import path.
"""

from __future__ import annotations

import importlib
import pkgutil

from dsnet.errors import ConfigError
from dsnet.import_path import is_model_path
from dsnet.plugins import load_plugins
from dsnet.structure.method import StructureMethod, StructureProblem, check_order
from dsnet.user_code import import_allowed
from dsnet.wording import way_out

SETTING = "supernet.structure.method"

_METHODS: dict[str, StructureMethod] = {}


def register(method: type[StructureMethod]) -> type[StructureMethod]:
    """Register a method under its name; returns the class, so that it can be a decorator.

    Raises:
        ValueError: another method has this name.
    """
    known = _METHODS.setdefault(method.name, method())
    if type(known) is not method:
        raise ValueError(f"there is a structure method {method.name!r} already; choose another name")
    return method


def method_names() -> tuple[str, ...]:
    """The names of all registered methods, those of plugins last."""
    load_plugins()
    return tuple(_METHODS)


def structure_method(name: str) -> StructureMethod:
    """The method of a name, or of an import path `package.module:Class`.

    Raises:
        ConfigError: there is none, import paths are not allowed, or the class cannot be imported
            or is no structure method.
    """
    if name in _METHODS or name in method_names():  # plugins are loaded only where one may be meant
        return _METHODS[name]
    if not is_model_path(name):
        raise ConfigError(f"{SETTING}: unknown method {name!r}{way_out(name, method_names())}")
    found = import_allowed(SETTING, name)
    if not (isinstance(found, type) and issubclass(found, StructureMethod)):
        raise ConfigError(
            f"{SETTING}: {name!r} is no class that inherits from dsnet.structure.method.StructureMethod, as a method must be"
        )
    try:
        return found()
    except TypeError as error:
        raise ConfigError(f"{SETTING}: {name!r} cannot be used: {error}") from error


def check_structure(problem: StructureProblem) -> None:
    """Check the settings against the network, before anything is trained.

    Raises:
        ConfigError: the channels cannot have the wanted order, or as `StructureMethod.check`.
    """
    check_order(problem)
    structure_method(problem.settings.method).check(problem)


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
