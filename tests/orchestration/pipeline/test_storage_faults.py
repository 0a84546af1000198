"""A disk that is full, read-only or gone at any moment of a launch: one message, exit code 3 or 6,
nothing lost, and a launch afterwards that ends as if nothing had happened."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.processes import Answer
from dsnet.disk_room import DiskReserve
from dsnet.errors import CheckpointError, PreflightError, StoppedError, StorageError, StorageStoppedError
from dsnet.files import file_sha256
from orchestration.pipeline.storage_watch import CHECK_EVERY_S, StorageWatch, check_reserve, watched
from orchestration.runs.folder import RunDir
from tests.full_disk import FullDisk
from tests.mounts import read_only
from tests.orchestration.launch_here import SMALL, launch_without_ray
from tests.orchestration.samples import call, problems_of_message, results_in, study_of, write_sweep

RESUMABLE = 6
REFUSED = 3


def launched(folder: Path, *options: str) -> Answer:
    return call(folder, "launch", "tiny.yaml", *options)


def facts_of(folder: Path) -> tuple[Any, ...]:
    """What must not depend on an interruption."""
    results = results_in(folder)
    stage = results.run.stage_dir("supernet", results.done_key("supernet"))
    assert results.verified is not None
    gates = {record.slot: record.arrays_sha256 for record in results.records}
    return (
        file_sha256(stage / "final.safetensors"),
        study_of(results),
        gates,
        results.verified.test.points,
        results.front,
    )


@dataclass(frozen=True)
class Whole:
    """A launch that nothing disturbed."""

    folder: Path
    """Only to be read."""
    num_writes: int
    facts: tuple[Any, ...]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The launch with which those that were disturbed are compared."""
    with pytest.MonkeyPatch.context() as patches:
        launch_without_ray(patches)
        folder = tmp_path_factory.mktemp("whole")
        write_sweep(folder, SMALL)
        disk = FullDisk(folder / "runs", 10**9)
        with disk.installed():
            answer = launched(folder)
        assert answer.code == 0, answer.err
        return Whole(folder, disk.num_writes, facts_of(folder))


def interrupt_and_resume(folder: Path, num_good: int, whole: Whole, code: int = errno.ENOSPC) -> str:
    """Launch on a disk that fails after some writes, look at the run, and launch again."""
    write_sweep(folder, SMALL)
    disk = FullDisk(folder / "runs", num_good, code)
    with disk.installed():
        answer = launched(folder)
    where = f"write {num_good + 1}: {disk.failed[:1]}"
    assert disk.failed, where
    has_begun = (folder / "runs" / "tiny" / "manifest.json").exists()
    assert answer.code == (RESUMABLE if has_begun else REFUSED), (where, answer)
    assert problems_of_message(answer, (os.strerror(code), "runs")) == [], where
    assert ("continue with" in answer.err) == has_begun, where
    if (folder / "runs" / "tiny" / "sweep.yaml").exists():
        assert call(folder, "status", "tiny", "--json").code == 0, where
    leftovers = [path.name for path in folder.rglob(".*.tmp")]
    assert leftovers == [], where
    again = launched(folder)
    assert again.code == 0, (where, again)
    assert "damaged" not in again.err, (where, again)
    assert facts_of(folder) == whole.facts, where
    return where


@pytest.mark.parametrize("share", [0.2, 0.6, 0.85])
@pytest.mark.slow
def test_a_launch_on_a_disk_that_fills_up_is_continued_to_the_same_study(
    share: float, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch_without_ray(monkeypatch)
    interrupt_and_resume(tmp_path, int(share * whole.num_writes), whole)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_at_every_write_of_a_launch(whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch_without_ray(monkeypatch)
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES)
    for number in range(whole.num_writes):
        interrupt_and_resume(tmp_path / str(number), number, whole, codes[number % len(codes)])
        shutil.rmtree(tmp_path / str(number))


class Deletes(FullDisk):
    """Deletes the run folder before a write, and lets all writes be."""

    def _instead_of(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        counted = super()._instead_of(name, lambda *arguments, **options: None)

        def act(*arguments: Any, **options: Any) -> Any:
            if not self.failed:
                try:
                    counted(*arguments, **options)
                except OSError:
                    shutil.rmtree(Path(self._folder) / "tiny")
            return real(*arguments, **options)

        return act


def delete_and_resume(folder: Path, num_good: int, whole: Whole) -> None:
    """Launch, delete the run folder at some write, and launch again."""
    write_sweep(folder, SMALL)
    disk = Deletes(folder / "runs", num_good)
    with disk.installed():
        answer = launched(folder)
    where = f"write {num_good + 1}: {disk.failed[:1]}"
    assert answer.code == REFUSED, (where, answer)
    assert problems_of_message(answer, (str(folder / "runs" / "tiny"), "deleted or moved", "begins anew")) == [], where
    assert not (folder / "runs" / "tiny" / "manifest.json").exists(), where
    assert launched(folder).code == 0, where
    assert facts_of(folder) == whole.facts, where


@pytest.mark.slow
def test_a_run_folder_that_is_deleted_while_it_runs_is_said_and_not_made_again(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch_without_ray(monkeypatch)
    delete_and_resume(tmp_path, whole.num_writes // 2, whole)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_run_folder_deleted_at_every_write(whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch_without_ray(monkeypatch)
    for number in range(20, whole.num_writes, 7):  # from the first write inside the lock on
        delete_and_resume(tmp_path / str(number), number, whole)
        shutil.rmtree(tmp_path / str(number))


SETTING = "storage.min_free_mib"


def test_a_launch_does_not_begin_without_its_reserve(tmp_path: Path) -> None:
    write_sweep(tmp_path, SMALL)
    answer = launched(tmp_path, "--set", f"{SETTING}=1000000000")
    parts = (str(tmp_path / "runs"), "MiB free", "1,000,000,000 MiB", SETTING, "storage.runs")
    assert problems_of_message(answer, parts) == []
    assert answer.code == REFUSED
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_launch_stops_when_its_reserve_is_used_up_and_is_continued(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch_without_ray(monkeypatch)
    write_sweep(tmp_path, SMALL)
    monkeypatch.setattr("orchestration.pipeline.storage_watch.CHECK_EVERY_S", 0.0)
    asked = 0

    def free_bytes(path: Path) -> int:
        nonlocal asked
        asked += 1
        return 300 * 2**20 if asked < 6 else 100 * 2**20

    with monkeypatch.context() as full:
        full.setattr("dsnet.disk_room.free_bytes", free_bytes)
        answer = launched(tmp_path)
    parts = (str(tmp_path / "runs"), "100 MiB free", "256 MiB", SETTING, "continue with")
    assert problems_of_message(answer, parts) == []
    assert answer.code == RESUMABLE
    assert call(tmp_path, "status", "tiny").code == 0
    assert launched(tmp_path).code == 0
    assert facts_of(tmp_path) == whole.facts


def open_run(folder: Path) -> RunDir:
    run = RunDir(folder / "runs", "tiny")
    run.create()
    return run


def reserve_of(run: RunDir) -> DiskReserve:
    return DiskReserve(run.root, 0, SETTING)


def test_a_watch_looks_once_a_second_at_every_folder(tmp_path: Path) -> None:
    run, now = open_run(tmp_path), [0.0]
    with watched(run, reserve_of(run)) as watch:
        watch._clock = lambda: now[0]
        watch._next_s = 0.0
        assert not watch()
        watch.add(DiskReserve(tmp_path, 10**9, SETTING))
        now[0] = 0.9 * CHECK_EVERY_S
        assert not watch()
        now[0] = CHECK_EVERY_S
        assert watch()
        assert watch.problem is not None
        assert str(tmp_path) in watch.problem
        now[0] += 10
        assert watch()  # once is enough: the launch stops


def test_a_stop_for_the_reserve_names_it_and_a_stop_by_a_person_does_not(tmp_path: Path) -> None:
    run = open_run(tmp_path)

    def work(watch: StorageWatch, problem: str | None) -> None:
        watch.problem = problem
        raise StoppedError("the search was stopped")

    for problem, kind in (("no room", StorageStoppedError), (None, StoppedError)):
        with pytest.raises(StoppedError) as stopped, watched(run, reserve_of(run)) as watch:
            work(watch, problem)
        assert type(stopped.value) is kind
        assert stopped.value.exit_code == RESUMABLE


@pytest.mark.parametrize("comes_back", [False, True])
def test_a_run_folder_that_is_gone_is_noticed_even_if_another_took_its_place(tmp_path: Path, comes_back: bool) -> None:
    run = open_run(tmp_path)

    def work(watch: StorageWatch) -> None:
        assert not watch.is_gone()
        shutil.rmtree(run.path)
        if comes_back:
            run.create()
        assert watch.is_gone()
        watch._next_s = 0.0
        assert watch()
        raise CheckpointError("manifest.json is missing")

    with pytest.raises(StorageError, match=r"tiny was deleted or moved"), watched(run, reserve_of(run)) as watch:
        work(watch)


def test_errors_of_another_kind_pass_unchanged(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    for error in (CheckpointError("damaged"), ValueError("a bug"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, watched(run, reserve_of(run)):
            raise error
        assert caught.value is error
    with pytest.raises(PreflightError, match=SETTING):
        check_reserve(DiskReserve(run.root, 10**9, SETTING))


ONLY_READ = (
    ("status", "tiny"),
    ("status", "tiny", "--json"),
    ("trials", "tiny"),
    ("pareto", "tiny"),
    ("plan", "tiny.yaml"),
    ("validate", "tiny.yaml"),
    ("verify", "runs/tiny/export/knee"),
)
WRITE = (
    ("report", "tiny"),
    ("export", "tiny", "--pick", "knee"),
    ("export", "tiny", "--pick", "knee", "--out", "bundles"),
    ("measure", "tiny"),
    ("measure", "tiny", "--export-kit", "kit"),
    ("enqueue", "tiny", "--set", "gate.target=0.5"),
    ("extend", "tiny", "--trials", "+1"),
    ("init", "--data", "photos"),
    ("launch", "tiny.yaml"),
)


@pytest.mark.slow
def test_on_a_read_only_disk_commands_that_read_work_and_the_others_say_why_not(
    whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch_without_ray(monkeypatch)
    for number in range(20):
        photo = whole.folder / "photos" / f"class-{number % 2}" / f"{number}.png"
        photo.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (number, 0, 0)).save(photo)
    with read_only(whole.folder):
        for arguments in ONLY_READ:
            answer = call(whole.folder, *arguments)
            assert answer.code == 0, (arguments, answer)
        for arguments in WRITE:
            answer = call(whole.folder, *arguments)
            assert answer.code == REFUSED, (arguments, answer)
            assert problems_of_message(answer, ("ead-only file system",)) == [], arguments
