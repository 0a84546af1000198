"""Copies of finished stages at `storage.artifacts`, with which a launch on another machine
continues."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestration.pipeline.run_copies import EVERY_S, RunCopies
from orchestration.results.run import RunResults
from orchestration.runs.folder import RunDir
from tests.orchestration.samples import SWEEP, WITHOUT_MLFLOW, Finished, call, study_of


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_launch_on_another_machine_continues_from_the_copies(finished: Finished, tmp_path: Path) -> None:
    folder = finished.copy(tmp_path / "first")
    url = (tmp_path / "bucket").as_uri()
    artifacts = ("--set", f"storage.artifacts={url}", *WITHOUT_MLFLOW)
    first = call(folder, "launch", SWEEP, *artifacts)
    assert first.code == 0, first.err
    copies = sorted(path.name.partition("-")[0] for path in (tmp_path / "bucket" / "tiny" / "finished").glob("*.tar"))
    assert copies == ["measure", "search", "supernet", "table", "verify"]

    other = ("launch", SWEEP, "--runs", tmp_path / "other", *artifacts)
    second = call(folder, *other)
    assert second.code == 0, second.err
    assert f"continues the run of which {url}/tiny has 5 stages" in second.err
    assert "supernet: already done" in second.err
    run = RunResults(RunDir(tmp_path / "other", "tiny"))
    assert study_of(run) == study_of(finished.results)
    assert run.manifest["test_openings"] == finished.results.manifest["test_openings"], "test was not read again"

    more = call(folder, *other, "--trials", "14")
    assert more.code == 0, more.err
    third = call(folder, "launch", SWEEP, "--runs", tmp_path / "third", *artifacts, "--trials", "14")
    assert third.code == 0, third.err
    ended = [RunResults(RunDir(tmp_path / name, "tiny")) for name in ("other", "third")]
    assert [len(results.records) for results in ended] == [14, 14]
    assert study_of(ended[0]) == study_of(ended[1])


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def copies_of(runs: Path, url: str, warnings: list[str], clock: Clock | None = None) -> RunCopies:
    run = RunDir(runs, "tiny")
    run.create()
    return RunCopies(run, url, warnings.append, clock or Clock())


def stage_in(copies: RunCopies, content: str = "1") -> Path:
    """A stage with a file, and a manifest."""
    folder = copies.run.path / "search" / "abc"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.journal").write_text(content)
    (folder / ".draft.1.tmp").write_text("unfinished")
    (folder / "study.journal.damaged-1").write_text("damaged")
    copies.run.manifest_path.write_text(json.dumps({"seed": 1}))
    return folder


def test_what_is_restored_is_what_was_copied(tmp_path: Path) -> None:
    url, warnings = (tmp_path / "bucket").as_uri(), list[str]()
    first = copies_of(tmp_path / "first", url, warnings)
    stage = stage_in(first)
    assert not first.has(stage)
    first.keep(stage)
    assert first.has(stage)
    assert first.restore() is None, "a run folder that has a manifest is left as it is"

    second = copies_of(tmp_path / "second", url, warnings)
    assert second.restore() == 1
    files = {path.relative_to(second.run.path).as_posix() for path in second.run.path.rglob("*") if path.is_file()}
    assert files == {"manifest.json", "search/abc/study.journal"}
    assert warnings == []


def test_a_search_that_goes_on_is_copied_now_and_then(tmp_path: Path) -> None:
    url, clock = (tmp_path / "bucket").as_uri(), Clock()
    copies = copies_of(tmp_path / "first", url, [], clock)
    stage = stage_in(copies)
    copies.keep_sometimes(stage)
    assert not copies.has(stage)
    clock.now_s += EVERY_S
    copies.keep_sometimes(stage)
    assert copies.has(stage)


def test_a_damaged_copy_is_said_and_not_used(tmp_path: Path) -> None:
    url, warnings = (tmp_path / "bucket").as_uri(), list[str]()
    copies = copies_of(tmp_path / "first", url, warnings)
    copies.keep(stage_in(copies))
    archive = tmp_path / "bucket" / "finished" / "search-abc.tar"
    archive.write_bytes(archive.read_bytes()[:700])
    second = copies_of(tmp_path / "second", url, warnings)
    assert second.restore() == 0
    assert not (second.run.path / "search").exists()
    assert len(warnings) == 1
    assert f"{url}/finished/search-abc.tar is damaged and is not used" in warnings[0]


def test_a_place_that_cannot_be_written_is_one_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    url, warnings = (tmp_path / "file" / "bucket").as_uri(), list[str]()
    copies = copies_of(tmp_path / "first", url, warnings)
    stage = stage_in(copies)
    for _ in range(2):
        copies.keep(stage)
    assert len(warnings) == 1
    assert f"the run is not copied to {url}, and this launch goes on without" in warnings[0]
