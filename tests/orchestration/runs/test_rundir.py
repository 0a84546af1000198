import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from dsnet.errors import CheckpointError, ConfigError, LockedError, NotFoundError, PreflightError, StorageError
from dsnet.files import atomic_write_json, atomic_write_text, read_json
from orchestration.runs.folder import RunDir, list_runs, mlflow_store_uri
from orchestration.runs.lock import DriverLock, LockHolder, read_lock
from orchestration.runs.manifest import Manifest, describe_hardware
from orchestration.runs.processes import process_start_time

HOLD_THE_LOCK = """
import sys
from pathlib import Path
from orchestration.runs.lock import DriverLock
from orchestration.runs.processes import process_start_time
from orchestration.runs.folder import RunDir
with DriverLock(RunDir(Path(sys.argv[1]), "digits"), "a second driver"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "runs", "digits")
    run.create()
    return run


@contextmanager
def another_driver(run: RunDir) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD_THE_LOCK, str(run.root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def write_lock(run: RunDir, **changes: Any) -> LockHolder:
    holder = replace(LockHolder.this_process("an earlier launch"), **changes)
    atomic_write_json(run.lock_path, asdict(holder))
    return holder


def test_everything_of_a_run_lies_below_its_folder(run: RunDir) -> None:
    key = "0123456789abcdef" * 4
    paths = [
        run.sweep_yaml, run.manifest_path, run.lock_path, run.stop_path, run.splits_json, run.points_parquet,
        run.report_html, run.export_dir, run.curves_jsonl(key), run.subnets_json(key),
        run.latency_json(key), run.table(key, "gate"), run.table(key, "val"), run.sealed_table(key),
        run.study_journal(key), run.gate_weights(key, 42), run.verify_json(key),
    ]  # fmt: skip
    assert all(path.is_relative_to(run.path) for path in paths)
    assert len(set(paths)) == len(paths)
    assert run.gate_weights(key, 42) == run.path / "search" / "0123456789ab" / "gates" / "slot-00042.safetensors"


def test_the_test_table_is_only_behind_the_seal(run: RunDir) -> None:
    with pytest.raises(ValueError, match="'gate' and 'val'"):
        run.table("0" * 64, "test")
    assert run.sealed_table("0" * 64).parent.name == "sealed"


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a" * 65, "mlruns-artifacts", "with space", "a\n"])
def test_a_name_that_cannot_be_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a run"):
        RunDir(tmp_path, name)


def test_creating_twice_keeps_what_is_there(run: RunDir) -> None:
    run.sweep_yaml.write_text("version: 1\n")
    run.create()
    assert run.sweep_yaml.read_text() == "version: 1\n"
    assert [path.name for path in run.path.iterdir()] == ["sweep.yaml"]


def test_an_unwritable_runs_folder_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where the folder should be")
    with pytest.raises(PreflightError, match=r"storage\.runs.*'digits'.*Choose another folder"):
        RunDir(tmp_path / "runs", "digits").create()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_folders_made_on_the_way_to_a_failure_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "touch", full)
    with pytest.raises(PreflightError, match="No space left on device"):
        RunDir(tmp_path / "deep" / "runs", "digits").create()
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_does_not_exist_is_answered_with_those_that_do(run: RunDir) -> None:
    Manifest(run.manifest_path).create(seed=0, hardware={})
    run.open_existing()
    with pytest.raises(NotFoundError, match=r"no run 'digit'.*did you mean 'digits'.*runs there: digits"):
        RunDir(run.root, "digit").open_existing()
    assert not RunDir(run.root, "digit").path.exists()
    assert list_runs(run.root) == ["digits"]


def test_no_runs_folder_means_no_runs(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there are no runs there"):
        RunDir(tmp_path / "nowhere", "digits").open_existing()


def test_a_stop_file_is_seen_and_cleared(run: RunDir) -> None:
    assert not run.stop_requested()
    run.stop_path.touch()
    assert RunDir(run.root, run.name).stop_requested()
    run.clear_stop()
    run.clear_stop()
    assert not run.stop_requested()


def test_the_store_uri_refuses_a_path_that_a_uri_would_change(tmp_path: Path) -> None:
    assert mlflow_store_uri(tmp_path / "my runs") == f"sqlite:///{tmp_path}/my runs/mlflow.db"
    with pytest.raises(PreflightError, match=r"tracking\.uri"):
        mlflow_store_uri(tmp_path / "50%20")


def test_the_lock_is_held_inside_and_gone_outside(run: RunDir) -> None:
    with DriverLock(run, "dsnet-orch launch"):
        holder = json.loads(run.lock_path.read_text())
        assert holder["pid"] == os.getpid()
        assert holder["start_time"] == process_start_time(os.getpid())
        assert holder["command"] == "dsnet-orch launch"
    assert list(run.path.iterdir()) == []


def test_the_lock_is_released_when_the_sweep_fails(run: RunDir) -> None:
    with pytest.raises(ZeroDivisionError), DriverLock(run, "launch"):
        raise ZeroDivisionError
    assert not run.lock_path.exists()


def test_a_second_driver_is_told_who_holds_the_run(run: RunDir) -> None:
    with another_driver(run) as process:
        with (
            pytest.raises(LockedError, match=rf"process {process.pid} on .* since .*\(a second driver\)"),
            DriverLock(run, "launch"),
        ):
            pass
        with pytest.raises(LockedError), DriverLock(run, "launch", take_over=True):
            pass
        holder = read_lock(run.lock_path)
        assert holder is not None
        assert holder.pid == process.pid


def test_the_lock_of_a_killed_driver_is_taken_over_even_before_it_is_reaped(run: RunDir) -> None:
    with another_driver(run) as process:
        process.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 10
        while process_start_time(process.pid) is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert Path(f"/proc/{process.pid}").exists(), "not reaped yet: a zombie"
        with DriverLock(run, "launch again") as lock:
            assert lock.taken_over_from is not None
            assert lock.taken_over_from.pid == process.pid
            assert json.loads(run.lock_path.read_text())["pid"] == os.getpid()
    assert not run.lock_path.exists()


def test_a_recycled_pid_is_not_mistaken_for_the_driver(run: RunDir) -> None:
    start_time = process_start_time(os.getpid())
    assert start_time is not None
    dead = write_lock(run, start_time=start_time - 1)
    with DriverLock(run, "launch") as lock:
        assert lock.taken_over_from == dead


def test_a_lock_from_before_a_reboot_is_taken_over(run: RunDir) -> None:
    write_lock(run, boot_id="an earlier boot", since="2001-01-01T00:00:00.000+00:00")
    with DriverLock(run, "launch") as lock:
        assert lock.taken_over_from is not None


@pytest.mark.parametrize("changes", [{"host": "another-host"}, {"boot_id": "a twin with the same host name"}])
def test_a_lock_of_another_host_is_stolen_only_on_demand(run: RunDir, changes: dict[str, str]) -> None:
    foreign = write_lock(run, **changes)
    with pytest.raises(LockedError, match="--take-over"), DriverLock(run, "launch"):
        pass
    assert read_lock(run.lock_path) == foreign
    with DriverLock(run, "launch", take_over=True) as lock:
        assert lock.taken_over_from == foreign


@pytest.mark.parametrize(
    "damage",
    [
        "{",
        "[]",
        "[" * 50_000,
        {"since": "yesterday"},
        {"since": 3},
        {"pid": "12"},
        {"pid": None},
        {"start_time": "now"},
        {"more": 1},
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_lock_that_cannot_be_read_is_respected(run: RunDir, damage: str | dict[str, object]) -> None:
    holder = asdict(LockHolder.this_process("dsnet-orch launch"))
    run.lock_path.write_text(damage if isinstance(damage, str) else json.dumps(holder | damage))
    assert read_lock(run.lock_path) is None
    with pytest.raises(LockedError, match="cannot be read"), DriverLock(run, "launch"):
        pass
    with DriverLock(run, "launch", take_over=True) as lock:
        assert lock.taken_over_from is None


def test_of_many_that_find_a_dead_lock_one_wins(run: RunDir) -> None:
    write_lock(run, start_time=1)
    command = [sys.executable, "-c", HOLD_THE_LOCK, str(run.root)]
    drivers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for _ in range(4)
    ]
    deadline = time.monotonic() + 60
    while sum(driver.poll() is not None for driver in drivers) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sum(driver.poll() is None for driver in drivers) == 1, "the winner holds it until its stdin is closed"
    assert sorted(driver.communicate()[0] for driver in drivers) == [b"", b"", b"", b"held\n"]


def test_a_lock_taken_by_someone_else_meanwhile_is_not_released(run: RunDir) -> None:
    with DriverLock(run, "launch"):
        usurper = write_lock(run, host="another-host")
    assert read_lock(run.lock_path) == usurper


def test_a_process_that_does_not_exist_has_no_start_time() -> None:
    assert process_start_time(2**22 + 1) is None


def test_a_manifest_survives_another_launch(run: RunDir) -> None:
    manifest = Manifest(run.manifest_path)
    manifest.create(seed=3, hardware=describe_hardware(gpu="a GPU"))
    manifest.record_stage("table", {"key": "k", "dir": "table/k", "status": "done", "started_at": "", "seconds": 1.0})
    manifest.update(data_hashes={"train": "abc"})
    before = manifest.read()
    manifest.create(seed=3, hardware={"cpu": "another"})
    after = manifest.read()
    assert after == {**before, "hardware": {"cpu": "another"}}
    assert before["versions"]["torch"].startswith("2.")
    assert before["hardware"]["gpu"] == "a GPU"
    assert before["hardware"]["num_cores"] >= 1
    assert before["hardware"]["mkl_cbwr"] == os.environ.get("MKL_CBWR", "not set")
    assert after["stages"]["table"]["status"] == "done"


def test_every_opening_of_the_test_split_is_counted_across_processes(run: RunDir) -> None:
    manifest = Manifest(run.manifest_path)
    manifest.create(seed=0, hardware={}, versions={"python": "3"})
    script = (
        "import sys; from pathlib import Path; from orchestration.runs.manifest import Manifest\n"
        "for _ in range(10): Manifest(Path(sys.argv[1])).count_test_opening('report')"
    )
    others = [subprocess.Popen([sys.executable, "-c", script, str(run.manifest_path)]) for _ in range(2)]
    assert [other.wait(timeout=60) for other in others] == [0, 0]
    assert manifest.count_test_opening("verify") == 21
    opened_by = [opening["who"] for opening in manifest.read()["test_opened_by"]]
    assert opened_by == ["report"] * 20 + ["verify"]


@pytest.mark.parametrize("content", ["", '{"schema": 1, "stages"', "null", '{"schema": 99}'])
def test_a_torn_or_foreign_manifest_is_named(run: RunDir, content: str) -> None:
    run.manifest_path.write_text(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        Manifest(run.manifest_path).read()


def test_a_missing_manifest_is_named(run: RunDir) -> None:
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        Manifest(run.manifest_path).read()


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "manifest.json"
    atomic_write_text(path, "old")
    monkeypatch.setattr(os, failing, full)
    with pytest.raises(
        StorageError, match=r"cannot write .*manifest\.json: the disk is full \(No space left on device"
    ):
        atomic_write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_killed_at_any_moment_leaves_one_whole_version(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    atomic_write_json(path, {"version": -1, "payload": [-1] * 10_000})
    script = (
        "import sys; from pathlib import Path; from dsnet.files import atomic_write_json\n"
        "print('go', flush=True); n = 0\n"
        "while True: atomic_write_json(Path(sys.argv[1]), {'version': n, 'payload': [n] * 10_000}); n += 1"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        for _ in range(20):
            time.sleep(0.01)
            content = read_json(path)
            assert content["payload"] == [content["version"]] * 10_000
        writer.kill()
    content = read_json(path)
    assert content["payload"] == [content["version"]] * 10_000
    assert content["version"] > 0


def test_written_files_follow_the_umask_so_that_others_may_read_them(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    atomic_write_json(path, {"where": tmp_path})
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode
    assert read_json(path) == {"where": str(tmp_path)}
