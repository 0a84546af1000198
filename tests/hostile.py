"""A user's folder with modules that have the names of ours, of the standard library's and of
packages that we need."""

from __future__ import annotations

from pathlib import Path

MODULES = (
    "search",
    "dsnet",
    "orchestration",
    "ray",
    "mlflow",
    "random",
    "json",
    "secrets",
    "numpy",
    "torch",
    "tensorflow",
)
PACKAGES = ("dashboards", "optuna", "tests")
REPOSITORY = Path(__file__).parents[1]


def write_hostile_modules(folder: Path, names: tuple[str, ...] = (*MODULES, *PACKAGES)) -> Path:
    """Modules in `folder` that end the program which imports one of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        path = folder / name / "__init__.py" if name in PACKAGES else folder / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"raise SystemExit('the module {name} of the user was imported')\n", encoding="utf-8")
    (folder / "wandb").mkdir()  # a folder of runs, not a package
    return folder
