"""Modules of the user that have the names of ours, of the standard library's or of installed
packages, in all places where Python looks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dsnet.import_path import OWN_PACKAGES, ROOT, USER_PATH, child_variables, import_object
from tests.hostile import REPOSITORY, write_hostile_modules
from tests.orchestration.samples import TINY

FILES = f"""
import sys
sys.argv = ["dsnet-orch", "--help"]
try:
    from dsnet_orch import main
    main()
except SystemExit as done:
    assert not done.code, done
import json, random, numpy, search, dashboards
names = {(*OWN_PACKAGES, "random", "numpy", "json")!r}
print(json.dumps({{name: sys.modules[name].__file__ for name in names}}))
"""


def run(folder: Path, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    given: Mapping[str, str] = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=folder, env=given, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    return write_hostile_modules(tmp_path / "photos")


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """What `pip install --target` makes."""
    site = tmp_path / "site"
    (site / "dsnet_orch-0.1.0.dist-info").mkdir(parents=True)
    for name in (*OWN_PACKAGES, "dsnet_orch.py"):
        (site / name).symlink_to(REPOSITORY / name)
    return site


def path_of(*folders: Path) -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join(map(str, folders))}


def test_the_program_finds_our_packages_and_the_installed_ones_before_the_users(hostile: Path, installed: Path) -> None:
    for home in (installed, REPOSITORY):
        ended = run(hostile, "-c", FILES, **path_of(hostile, home))
        assert ended.returncode == 0, ended.stderr
        files: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
        assert [files[name] for name in OWN_PACKAGES] == [f"{home}/{name}/__init__.py" for name in OWN_PACKAGES]
        assert not [file for file in files.values() if file.startswith(str(hostile))]


def test_an_editable_install_is_found_too(hostile: Path) -> None:
    """Its finder comes after the search of sys.path, where `-c` and PYTHONPATH put the user's
    folder."""
    finder = (
        "import sys; from importlib.util import spec_from_file_location as at\n"
        "class Editable:\n"
        "    def find_spec(name, path=None, target=None):\n"
        f"        mapping = dict.fromkeys({OWN_PACKAGES!r}, '/__init__.py') | {{'dsnet_orch': '.py'}}\n"
        f"        return at(name, {str(REPOSITORY)!r} + '/' + name + mapping[name]) if name in mapping else None\n"
        "sys.meta_path.append(Editable)\n"
    )
    ended = run(hostile, "-c", finder + FILES, **path_of(hostile))
    assert ended.returncode == 0, ended.stderr
    files = json.loads(ended.stdout.splitlines()[-1])
    assert [files[name] for name in OWN_PACKAGES] == [f"{REPOSITORY}/{name}/__init__.py" for name in OWN_PACKAGES]


@pytest.mark.slow
def test_modules_run_by_python_survive_what_lies_beside_them(tmp_path: Path) -> None:
    """`python -m` looks into the working directory first: only a namesake of the module's own
    package is in its way."""
    others = ("search", "dashboards", "json", "random", "numpy", "torch", "ray", "optuna")
    folder = write_hostile_modules(tmp_path / "photos", others)
    ended = run(folder, "-m", "dsnet.training", "--help", **path_of(REPOSITORY))
    assert (ended.returncode, "--max-seconds" in ended.stdout) == (0, True), ended.stderr
    (folder / "dsnet.py").write_text("raise SystemExit('the module dsnet of the user was imported')")
    (folder / "tiny.yaml").write_text(TINY)
    ended = run(folder, "-m", "orchestration.cli", "validate", "tiny.yaml", **path_of(REPOSITORY))
    assert ended.stdout.startswith("tiny.yaml: valid"), ended.stderr


def test_a_child_process_gets_installed_packages_by_pythonpath_and_the_users_folders_apart(
    hostile: Path, installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*path_of(hostile, installed)["PYTHONPATH"].split(os.pathsep), *sys.path])
    monkeypatch.setenv("PYTHONPATH", f"{hostile}{os.pathsep}{installed}")
    monkeypatch.delenv(USER_PATH, raising=False)
    variables = child_variables()
    first, *rest = variables["PYTHONPATH"].split(os.pathsep)
    assert (first, variables[USER_PATH], variables["PYTHONSAFEPATH"]) == (str(installed), str(hostile), "1")
    assert set(rest) <= {ROOT}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert child_variables() == variables, "a child of a child has the same"


def test_a_working_directory_that_was_deleted_holds_no_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (gone := tmp_path / "gone").mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert child_variables()["PYTHONSAFEPATH"] == "1"


def test_a_class_of_the_users_is_imported_from_the_working_directory(
    hostile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (hostile / "own_sampler_of_a_test.py").write_text("class Mine: pass\n")
    monkeypatch.chdir(hostile)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert import_object("own_sampler_of_a_test.Mine").__name__ == "Mine"
    assert import_object("random.Random") is __import__("random").Random
    with pytest.raises(ImportError, match="'search' is a package of dsnet-orch; give your module another name"):
        import_object("search.Mine")
    (hostile / "needs_another.py").write_text("import not_installed_at_all\n")
    with pytest.raises(ImportError) as failed:
        import_object("own_samplr.Mine")
    assert str(failed.value).startswith("No module named 'own_samplr'; it is searched for in installed packages")
    assert f"the working directory ({hostile})" in str(failed.value)
    assert str(failed.value).endswith("the folders of PYTHONPATH")
    with pytest.raises(ImportError, match=r"^No module named 'not_installed_at_all'$"):
        import_object("needs_another.Mine")


def test_a_child_finds_our_packages_where_only_the_working_directory_of_this_process_has_them() -> None:
    """As with `python -c` in a checkout that is not installed."""
    code = "from dsnet.import_path import child_variables as v; print(v()['PYTHONPATH'])"
    ended = run(REPOSITORY, "-c", code, PYTHONPATH="")
    assert ended.stdout.strip() == str(REPOSITORY), ended.stderr
