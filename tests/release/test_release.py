"""Results of release 0.1.0 stay the same: stage keys, the schema of sweep files, the draws of a
study, and a run folder.

Whatever depends on the processor (weights, hence gates, to the bit) is compared within one run
elsewhere, not with these records.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.orchestration.samples import call, results_in
from tests.release.recorded import (
    DATA,
    FRONT,
    RELEASE_RUN,
    SCHEMA,
    STAGE_KEYS,
    STUDY,
    copy_of_run,
    schema,
    stage_keys,
    study_of_release,
)

FIVE_IMAGES = 5 / 270
"""How far top-1 of a gate may be away that another processor has trained on the stored tables."""


def recorded(name: str) -> Any:
    return json.loads((DATA / name).read_text(encoding="utf-8"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a copy of the recorded run below `runs`."""
    copy_of_run(tmp_path)
    return tmp_path


def output(folder: Path, *arguments: str | Path) -> str:
    answer = call(folder, *arguments)
    assert answer.code == 0, answer
    return answer.out


def differences(found: Any, wanted: Any, where: str = "$") -> list[str]:
    """Places where two JSON values differ; numbers may be a millionth apart, as float32 sums are on
    another processor."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        missing = [f"{where}.{key}: in one only" for key in found.keys() ^ wanted.keys()]
        return missing + [
            text
            for key in wanted.keys() & found.keys()
            for text in differences(found[key], wanted[key], f"{where}.{key}")
        ]
    if isinstance(wanted, list) and isinstance(found, list) and len(found) == len(wanted):
        return [
            text
            for number, pair in enumerate(zip(found, wanted, strict=True))
            for text in differences(*pair, f"{where}[{number}]")
        ]
    same = found == pytest.approx(wanted, rel=1e-6, abs=1e-6) if isinstance(wanted, float) else found == wanted
    return [] if same else [f"{where}: {found!r}, recorded {wanted!r}"]


@pytest.mark.slow
def test_stage_keys_of_every_example_and_preset_are_those_of_the_release() -> None:
    assert differences(stage_keys(), recorded(STAGE_KEYS)) == []


def test_the_schema_of_sweep_files_is_that_of_the_release() -> None:
    assert differences(schema(), recorded(SCHEMA)) == []


def test_commands_read_a_run_of_the_release_as_it_did(folder: Path) -> None:
    assert differences(study_of_release(results_in(folder, RELEASE_RUN)), recorded(STUDY)) == []
    front = json.loads(output(folder, "pareto", RELEASE_RUN, "--json"))
    del front["run"]
    assert differences(front, recorded(FRONT)) == []
    stages = json.loads(output(folder, "status", RELEASE_RUN, "--json"))["stages"]
    assert {stage["status"] for stage in stages.values()} == {"done"}
    trials = json.loads(output(folder, "trials", RELEASE_RUN, "--json"))
    assert [trial["slot"] for trial in trials] == list(range(24))
    assert Path(output(folder, "report", RELEASE_RUN).strip()).stat().st_size > 1_000_000


def test_a_bundle_of_the_release_is_checked_and_another_is_exported(folder: Path) -> None:
    stored = folder / "runs" / RELEASE_RUN / "export" / "trial-0020"
    assert "ok" in output(folder, "verify", stored, "--data")
    exported = output(folder, "export", RELEASE_RUN, "--pick", "trial-0012").split()[-1]
    assert "ok" in output(folder, "verify", exported, "--data")


@pytest.mark.ray
def test_a_run_of_the_release_is_extended_and_its_search_draws_the_same_points(folder: Path, ray_cluster: None) -> None:
    run = folder / "runs" / RELEASE_RUN
    supernet = sorted((run / "supernet").rglob("*"))
    for stage in ("search", "verify", "export"):
        shutil.rmtree(run / stage)
    output(folder, "extend", RELEASE_RUN, "--trials", "+8")
    assert sorted((run / "supernet").rglob("*")) == supernet, "the supernet of the release is used as it is"
    found, wanted = study_of_release(results_in(folder, RELEASE_RUN)), recorded(STUDY)
    assert len(found) == len(wanted) + 8
    for mine, theirs in zip(found, wanted, strict=False):
        assert 0 <= mine["metrics"].pop("balanced_top1") <= 1, "a metric that the release did not have"
        assert mine["params"] == theirs["params"]
        assert mine["metrics"].keys() == theirs["metrics"].keys()
        assert mine["metrics"]["top1"] == pytest.approx(theirs["metrics"]["top1"], abs=FIVE_IMAGES)
        if theirs["params"]["gate.router"] == "cascade":  # nothing is trained
            assert differences(mine, theirs) == []
