"""Ray's folder: a start that cannot succeed is refused with the limit, the folder, what is free and
the way out; ended sessions of ours are removed, and no others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.processes import Command
from dsnet.errors import PreflightError
from orchestration.environment import prepare_environment
from orchestration.runs.lock import LockHolder
from orchestration.workers import ray_folder as module
from orchestration.workers.ray_folder import (
    KEPT_SESSIONS,
    MARK,
    check_ray_folder,
    facts_for_message,
    mark_sessions,
    own_token,
    prune_sessions,
    ray_folder,
    token_variables,
)
from tests.mounts import fill, read_only, small_disk
from tests.orchestration.samples import problems_of_message, write_sweep

WAY_OUT = "RAY_TMPDIR"


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"TMPDIR": "/a"},
        {"RAY_TMPDIR": "/b"},
        {"TMPDIR": "/a", "RAY_TMPDIR": "/b"},
        {"RAY_TMPDIR": ""},
        {"RAY_TMPDIR": "a/b"},
        {"TMPDIR": "a"},
    ],
    ids=str,
)
def test_the_folder_is_the_one_that_ray_takes(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._common.utils import get_default_ray_temp_dir

    for name in ("TMPDIR", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    folder = ray_folder()
    prepare_environment()
    assert ray_folder() == folder == Path(get_default_ray_temp_dir())
    assert folder.is_absolute()


def test_a_path_that_no_socket_may_have_is_refused_by_the_same_limit_as_in_ray(tmp_path: Path) -> None:
    from ray._private.utils import validate_socket_filepath

    session = f"session_2026-01-31_23-59-59_123456_{os.getpid()}/sockets/plasma_store"
    room = 107 - len(session) - 1
    fits, too_long = (Path("/" + "x" * (length - 1)) for length in (room, room + 1))
    validate_socket_filepath(str(fits / session))
    with pytest.raises(OSError, match="107"):
        validate_socket_filepath(str(too_long / session))
    with pytest.raises(PreflightError, match=rf"{too_long} would have 108 bytes, but Linux allows 107; set {WAY_OUT}"):
        check_ray_folder(too_long, 100)
    assert not too_long.exists()
    deep = tmp_path / ("d" * 100)
    with pytest.raises(PreflightError, match="Linux allows 107"):
        check_ray_folder(deep, 100)
    assert not deep.exists()


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a short path, which sockets need."""
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def test_a_folder_that_cannot_be_written_is_refused(short: Path) -> None:
    (short / "file").write_text("")
    with pytest.raises(PreflightError, match=rf"Ray cannot start: cannot write {short}/file/ray.*{WAY_OUT}"):
        check_ray_folder(short / "file" / "ray", 100)
    with read_only(short), pytest.raises(PreflightError, match=rf"read-only.*{WAY_OUT}"):
        check_ray_folder(short / "ray", 100)


def test_a_full_disk_is_refused_with_what_is_free_there(short: Path) -> None:
    with small_disk(short / "d", "40m") as disk:
        check_ray_folder(disk / "ray", 1)
        fill(disk, leave=10 * 2**20)
        with pytest.raises(PreflightError, match=rf"its folder {disk}/ray has (9|10) MiB free.*32 MiB.*{WAY_OUT}"):
            check_ray_folder(disk / "ray", 1)


def test_shared_memory_too_small_for_the_object_store_is_refused(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_disk(short / "shm", "10m") as shared, small_disk(short / "d", "60m") as disk:
        monkeypatch.setattr(module, "SHARED_MEMORY", shared)
        check_ray_folder(disk / "ray", 50)  # Ray uses its folder instead
        with pytest.raises(PreflightError, match=rf"object store needs 100 MiB.*{shared} has (9|10) MiB.*shm-size"):
            check_ray_folder(disk / "ray", 100)


def test_the_facts_of_a_failed_start_name_folder_room_logs_and_way_out(short: Path) -> None:
    told = facts_for_message(short)
    assert all(part in told for part in (str(short), "MiB free", "/dev/shm", "session_latest/logs", WAY_OUT))


def test_a_local_cluster_gets_a_token_of_its_own_unless_the_user_chose_one() -> None:
    assert token_variables({}) == {"RAY_AUTH_TOKEN": own_token()}
    assert token_variables({"RAY_AUTH_MODE": "token"}) == {"RAY_AUTH_TOKEN": own_token()}
    assert len(own_token()) == 64
    for chosen in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        assert token_variables({chosen: "x"}) == {}
    assert token_variables({"RAY_AUTH_MODE": "disabled"}) == {}


class Sessions:
    """Folders like those that Ray makes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.number = 0

    def make(self, *, pid: int | None = None, mark: object = None) -> Path:
        """A session, younger than those before; marked with a holder, with JSON, or not at all."""
        self.number += 1
        session = self.folder / f"session_2026-01-01_00-00-00_{self.number:06d}_{pid or 99_000 + self.number}"
        (session / "logs").mkdir(parents=True)
        (session / "logs" / "raylet.out").write_text("log")
        if mark is not None:
            (session / MARK).write_text(json.dumps(asdict(mark) if isinstance(mark, LockHolder) else mark))
        return session


def ended_process() -> LockHolder:
    """The record of a process of this boot that has ended."""
    here = LockHolder.this_process("ray")
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return LockHolder(process.pid, 1, here.boot_id, here.host, here.command, here.since)


def test_ended_sessions_of_ours_are_removed_except_the_newest(tmp_path: Path) -> None:
    sessions, ended = Sessions(tmp_path), ended_process()
    made = [sessions.make(mark=ended) for _ in range(5)]
    assert prune_sessions(tmp_path) == made[: 5 - KEPT_SESSIONS]
    assert sorted(tmp_path.iterdir()) == made[5 - KEPT_SESSIONS :]
    assert prune_sessions(tmp_path) == []
    assert prune_sessions(tmp_path / "missing") == []


def test_sessions_of_others_and_those_that_run_stay(tmp_path: Path) -> None:
    sessions, ended, alive = Sessions(tmp_path / "ray"), ended_process(), LockHolder.this_process("ray")
    elsewhere = LockHolder(ended.pid, 1, "another boot", "another-host", "ray", ended.since)
    kept = [
        sessions.make(),  # not marked: Ray's own, or of another program
        sessions.make(mark=alive),
        sessions.make(mark=elsewhere),
        sessions.make(mark={"pid": 1}),
        sessions.make(mark=[]),
    ]
    foreign = sessions.make(mark=ended)
    os.chown(foreign, 12345, 12345) if os.getuid() == 0 else (foreign / MARK).unlink()
    marked_by_others = sessions.make(mark=ended)
    os.chown(marked_by_others / MARK, 12345, 12345) if os.getuid() == 0 else (marked_by_others / MARK).unlink()
    outside = Sessions(tmp_path / "outside").make(mark=ended)
    link = tmp_path / "ray" / "session_2026-01-01_00-00-00_000099_99099"
    link.symlink_to(outside)
    other_name = tmp_path / "ray" / "session_latest_backup"
    sessions.make(mark=ended).rename(other_name)
    used = sessions.make(mark=ended)  # its driver has ended, but a process of the cluster has not
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", str(used)]) as process:
        try:
            while not Path(f"/proc/{process.pid}/cmdline").read_bytes():  # it has just been started
                time.sleep(0.01)
            assert prune_sessions(tmp_path / "ray", kept=0) == []
        finally:
            process.kill()
    assert all(path.exists() for path in (*kept, foreign, marked_by_others, link, outside, other_name, used))
    assert prune_sessions(tmp_path / "ray", kept=0) == [used]


def test_a_launch_removes_a_bounded_number_in_a_bounded_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions, ended = Sessions(tmp_path), ended_process()
    made = [sessions.make(mark=ended) for _ in range(6)]
    monkeypatch.setattr(module, "MOST_PRUNED", 2)
    assert prune_sessions(tmp_path, kept=0) == made[:2]
    monkeypatch.setattr(module, "PRUNE_S", -1.0)
    assert prune_sessions(tmp_path, kept=0) == []


def test_only_the_sessions_of_this_process_are_marked(tmp_path: Path) -> None:
    sessions = Sessions(tmp_path)
    own, other = sessions.make(pid=os.getpid()), sessions.make()
    mark_sessions(tmp_path)
    assert (own / MARK).exists()
    assert not (other / MARK).exists()
    assert prune_sessions(tmp_path, kept=0) == []  # this process runs


@pytest.mark.slow
@pytest.mark.ray
def test_a_start_that_takes_too_long_ends_with_a_message_and_leaves_no_process(tmp_path: Path, short: Path) -> None:
    write_sweep(tmp_path)
    options = ("--set", "ray.start_timeout_s=0.01", "--set", "tracking.mlflow=false")
    command = Command(tmp_path, "launch", "tiny.yaml", *options, variables={"RAY_TMPDIR": str(short)})
    began = time.monotonic()
    try:
        answer = command.wait(60)
        parts = ("did not start within 0.01 s", "ray.start_timeout_s", f"{short}/ray", "MiB free", WAY_OUT)
        assert problems_of_message(answer, parts) == []
        assert answer.code == 3
        assert time.monotonic() - began < 60
        assert command.left_behind() == []
    finally:
        command.end()
