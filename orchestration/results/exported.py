"""Bundles in the export folder of a run that do not belong to its present results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsnet.deploy.layout import MANIFEST, ORIGIN_CLAIM
from dsnet.errors import CheckpointError
from dsnet.files import read_sealed
from orchestration.config.command_lines import command_line, has_own_code
from orchestration.results.protocol import Results
from orchestration.results.run import RunResults
from orchestration.runs.folder import KEY_CHARACTERS, RunDir


def origin_claim(results: RunResults, *, is_gate: bool) -> dict[str, str]:
    """The claim `made_from`: keys of the supernet stage and, for a gate, of the search stage."""
    stages = ("supernet", "search") if is_gate else ("supernet",)
    return {stage: str(results.stage_key(stage))[:KEY_CHARACTERS] for stage in stages}


def exported_bundles(run: RunDir) -> list[Path]:
    """The folders of the bundles in a run's folder of exports, sorted."""
    found = (path.parent for path in run.export_dir.rglob(MANIFEST))
    # Neither the link to the knee's bundle nor a draft that a killed export left.
    return sorted(path for path in found if not path.is_symlink() and not path.name.startswith("."))


def outdated_bundles(results: Results) -> list[Path]:
    """The bundles in the run's export folder that were made from another supernet, or from another
    search, than the run has now; sorted."""
    return [path for path in _readable_bundles(results.run) if outdated_part(results, read_sealed(path / MANIFEST))]


def damaged_bundles(run: RunDir) -> list[Path]:
    """The bundles in the run's export folder whose description is damaged; sorted."""
    readable = _readable_bundles(run)
    return [path for path in exported_bundles(run) if path not in readable]


def _readable_bundles(run: RunDir) -> list[Path]:
    found = []
    for path in exported_bundles(run):
        try:
            manifest = read_sealed(path / MANIFEST)
        except CheckpointError:  # `damaged_bundles` are those that are missing here
            continue
        if {"claims", "spec"} <= manifest.keys():
            found.append(path)
    return found


def damaged_warning(results: Results) -> str | None:
    """A sentence that names the damaged bundles of a run; without the full stop. None if there are
    none."""
    paths = damaged_bundles(results.run)
    if not paths:
        return None
    names = ", ".join(str(path / MANIFEST) for path in paths)
    again = command_line("export", results.run.path, "--pick", "...", own_code=has_own_code(results.config))
    return f"these bundles are damaged or were edited, and cannot be loaded: {names}; remove them, or export again with: {again}"


def outdated_part(results: Results, manifest: Any) -> str | None:
    """`supernet` or `search` if the bundle was made from another one than the run has now; else
    None.

    Bundles of earlier releases do not say from what they were made; for these only another family
    of networks is noticed.

    Args:
        results: the run in whose export folder the bundle lies.
        manifest: content of bundle.json.
    """
    trained = [own for own in results.supernets.values() if own.is_done("supernet")]
    made_from = manifest["claims"].get(ORIGIN_CLAIM)
    if made_from is None:
        families = {own.trained_subnets.spec.family for own in trained}
        return None if manifest["spec"]["family"] in families else "supernet"
    same = [own for own in trained if _has(own, "supernet", made_from)]
    if not same:
        return "supernet"
    return None if "search" not in made_from or any(_has(own, "search", made_from) for own in same) else "search"


def _has(results: RunResults, stage: str, made_from: dict[str, str]) -> bool:
    return results.is_current(stage) and str(results.stage_key(stage))[:KEY_CHARACTERS] == made_from[stage]


def outdated_warning(results: Results) -> str | None:
    """A sentence that names the outdated bundles of a run, and what to do with them; without the
    full stop. None if there are none."""
    paths = outdated_bundles(results)
    if not paths:
        return None
    names = ", ".join(path.relative_to(results.run.export_dir).as_posix() for path in paths)
    again = command_line("export", results.run.path, "--pick", "...", own_code=has_own_code(results.config))
    return (
        f"the supernet or the search of this run has changed since these bundles in {results.run.export_dir} were exported: "
        f"{names}; they still have the accuracy that they claim; remove them, or export again with: {again}"
    )
