"""The modules that importing the core loads, and those that it must not need."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import dsnet

FORBIDDEN = ("ray", "mlflow", "optuna", "plotly", "pydantic", "yaml", "ruamel", "click", "rich", "pandas")


def loaded_modules(code: str) -> set[str]:
    """Top-level names in sys.modules of a fresh interpreter after `code`."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    [
        "dsnet",
        "dsnet.space.spec",
        "dsnet.space.cost",
        "dsnet.errors",
        "dsnet.files",
        "dsnet.seeds",
        "dsnet.settings",
        "dsnet.data.settings",
        "dsnet.gates.settings",
        "dsnet.measure.settings",
        "dsnet.training.settings",
    ],
)
def test_the_light_modules_pull_in_no_torch(module: str) -> None:
    assert not {"torch", "numpy", "sklearn", "PIL"} & loaded_modules(f"import {module}")


def test_the_package_says_the_version_that_is_installed() -> None:
    setup = (Path(dsnet.__file__).parents[1] / "setup.py").read_text(encoding="utf-8")
    assert dsnet.__version__ == version("dsnet-orch")
    assert dsnet.__version__ not in setup, "one source"


IMPORT_ALL = """
import importlib, pkgutil, sys
for name in %r:
    sys.modules[name] = None
import dsnet
names = [found.name for found in pkgutil.walk_packages(dsnet.__path__, "dsnet.") if not found.name.endswith("__main__")]
assert len(names) > 25, names
for name in names:
    importlib.import_module(name)
"""


@pytest.mark.slow
def test_every_module_imports_where_the_platforms_are_absent() -> None:
    """Setting a module to None makes its import fail, also an import inside a dependency."""
    assert "dsnet" in loaded_modules(IMPORT_ALL % (FORBIDDEN,))
