"""Protection of imports: our packages and installed packages take precedence over modules in a
user's folders.

Users may have modules of their own called `dsnet`, `search`, `orchestration` or `dashboards`, or
`ray` or `random`. Python searches the working directory (`python -m`) and PYTHONPATH before the
installed packages and an editable install of ours last, and Ray puts the driver's working directory
first in its workers. Every entry point therefore calls `protect_imports` first, and passes
`child_variables` to the processes that it starts.

This module is imported before the protection is active; it uses only modules that Python has
already loaded by then.
"""

from __future__ import annotations

import importlib
import os
import sys
from importlib.machinery import ModuleSpec, PathFinder

OWN_PACKAGES = ("dsnet", "search", "orchestration", "dashboards")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
"""The folder that holds our packages: site-packages, or a checkout."""
USER_PATH = "DSNET_USER_PATH"
"""Environment variable that passes the user's folders of PYTHONPATH to child processes, which
search them last."""
ALLOW_IMPORTS = "DSNET_ALLOW_IMPORTS"
"""Environment variable that allows models by import path if it is 1; `--allow-imports` sets it."""
WORKER_HOOK = f"{__name__}.protect_imports"
"""Import path of the function that Ray calls in each of its workers before the first task."""


class InstalledFirst:
    """Meta path finder for top-level modules in our packages and in installed ones.

    Modules that it does not find are left to the next finders, which search all of `sys.path`.
    """

    def __init__(self, folders: list[str]) -> None:
        """Create a finder for the folders of `sys.path` that hold the standard library and
        installed packages."""
        self._folders = folders

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder.find_spec`."""
        if "." in fullname:
            return None
        if fullname in OWN_PACKAGES:
            return PathFinder.find_spec(fullname, [ROOT])
        spec = PathFinder.find_spec(fullname, self._folders)
        # A folder without __init__.py counts as a package only if no folder of sys.path has a
        # regular one.
        return None if spec is None or spec.loader is None else spec


def protect_imports() -> None:
    """Give our packages, the standard library and installed packages precedence over the user's
    folders.

    The user's folders are the working directory, the script's folder, and folders of PYTHONPATH
    into which nothing was installed, wherever they are on `sys.path`. Their modules can still be
    imported if no installed module has the same name.
    """
    if any(isinstance(finder, InstalledFirst) for finder in sys.meta_path):
        return
    users = _user_folders()
    finder = InstalledFirst([folder for folder in sys.path if _real(folder) not in users])
    place = sys.meta_path.index(PathFinder) if PathFinder in sys.meta_path else 0
    sys.meta_path.insert(place, finder)
    sys.path.extend(folder for folder in _split(os.environ.get(USER_PATH)) if folder not in sys.path)


def child_variables() -> dict[str, str]:
    """Environment variables for a child process, so that it finds our packages and searches
    installed packages first.

    With them Python puts neither the working directory nor the user's folders of PYTHONPATH on the
    child's path.
    """
    given = _split(os.environ.get("PYTHONPATH"))
    installed = [folder for folder in given if _is_installation(folder)]
    users = [folder for folder in given if folder not in installed and _real(folder) != _real(ROOT)]
    users = _split(os.environ.get(USER_PATH)) + users
    own = {_real(folder) for folder in sys.path if folder not in given} - _user_folders()
    if _real(ROOT) not in own | set(map(_real, installed)):
        installed.append(ROOT)
    return {
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": os.pathsep.join(installed),
        USER_PATH: os.pathsep.join(dict.fromkeys(users)),
    }


def is_model_path(model: str) -> bool:
    """Whether the name of a model is an import path: `package.module:function`."""
    module, colon, function = model.partition(":")
    return colon == ":" and all(part.isidentifier() for part in (*module.split("."), *function.split(".")))


def import_object(path: str) -> object:
    """Import a class or function by its path, e.g. `my_package.MySampler`.

    Raises:
        ImportError, AttributeError, ValueError: it cannot be imported.
    """
    module_name, _, name = path.rpartition(".")
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        package = module_name.partition(".")[0]
        if package in OWN_PACKAGES:
            raise ImportError(
                f"{error} ('{package}' is a package of dsnet-orch; give your module another name)"
            ) from error
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise ImportError(
                f"{error}; it is searched for in installed packages, then in the working directory ({os.getcwd()}) and in the "
                "folders of PYTHONPATH"
            ) from error
        raise


def _user_folders() -> set[str]:
    """Real paths of the user's folders, whose modules are searched last."""
    script = (
        [sys.path[0]] if sys.path and sys.argv and _real(sys.path[0]) == _real(os.path.dirname(sys.argv[0])) else []
    )
    folders = ["", *script, *_split(os.environ.get("PYTHONPATH")), *_split(os.environ.get(USER_PATH))]
    library = os.path.dirname(os.path.abspath(os.__file__))
    return {_real(folder) for folder in folders if not _is_installation(folder)} - {_real(library)}


def _split(variable: str | None) -> list[str]:
    return [os.path.abspath(folder) for folder in (variable or "").split(os.pathsep) if folder]


def _real(folder: str) -> str:
    try:
        return os.path.realpath(folder or os.curdir)
    except OSError:  # the working directory has been deleted; nothing can be imported from it
        return folder


def _is_installation(folder: str) -> bool:
    """Whether an installer has put packages into a folder (`pip install --target`, or
    site-packages)."""
    try:
        return any(name.endswith(".dist-info") for name in os.listdir(folder or os.curdir))
    except OSError:
        return False
