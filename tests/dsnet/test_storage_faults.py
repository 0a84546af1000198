"""A fault of storage is one error with the path and the way out, wherever it is caught; a file that
was being written holds what it held before."""

from __future__ import annotations

import errno
import os
import pickle
import resource
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dsnet.disk_room import DiskReserve, free_bytes
from dsnet.errors import CheckpointError, ConfigError, PreflightError, StorageError
from dsnet.files import append_bytes, atomic_write_bytes, read_json, replacing, writing
from dsnet.storage_faults import disk_error, storage_error
from dsnet.stored.checkpoint import save_tensors
from tests.dsnet.samples import random_table

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.ESTALE, errno.ENODEV)
PATH = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EMFILE)


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Let this process write no byte of a file beyond so many: the kernel cuts a longer write short
    and refuses the next one, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("code", DISK, ids=errno.errorcode.get)
def test_a_fault_of_the_disk_is_recognised_with_and_without_a_path(code: int, tmp_path: Path) -> None:
    for error in (OSError(code, os.strerror(code)), OSError(code, os.strerror(code), str(tmp_path / "a"))):
        found = disk_error(error)
        assert isinstance(found, StorageError)
        assert isinstance(found, PreflightError)
        assert found.exit_code == 3
        assert os.strerror(code) in str(found)
        assert (str(tmp_path / "a") in str(found)) == (error.filename is not None)
    assert str(tmp_path) in str(storage_error(OSError(code, "x"), near=tmp_path))


@pytest.mark.parametrize("code", PATH, ids=errno.errorcode.get)
def test_a_fault_of_a_path_is_one_of_storage_only_where_the_path_is_known(code: int, tmp_path: Path) -> None:
    assert storage_error(OSError(code, "x")) is None
    assert str(tmp_path) in str(storage_error(OSError(code, "x", str(tmp_path))))
    assert str(tmp_path) in str(storage_error(OSError(code, "x"), tmp_path, "write"))
    assert disk_error(OSError(code, "x", str(tmp_path))) is None  # it may be a mistake in the code that reads it


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
        TimeoutError(errno.ETIMEDOUT, "timed out"),
        BlockingIOError(errno.EAGAIN, "again"),
        OSError("no number"),
        ValueError("the disk is full"),
        RuntimeError("failed 28 times"),
    ],
    ids=repr,
)
def test_other_errors_are_none_of_storage(error: Exception) -> None:
    assert storage_error(error) is None


def caught(act: object) -> Exception:
    try:
        act()  # type: ignore[operator]
    except Exception as error:  # noqa: BLE001 - whatever the library raises
        return error
    raise AssertionError("nothing was raised")


def test_the_errors_of_libraries_about_a_disk_are_recognised(tmp_path: Path) -> None:
    table = pa.table({"a": list(range(10_000))})
    database = sqlite3.connect(tmp_path / "a.db")
    database.execute("PRAGMA max_page_count = 2")
    database.execute("CREATE TABLE t (x)")
    with largest_file(10_000):
        found = {
            "safetensors": caught(lambda: save_file({"a": torch.zeros(100_000)}, tmp_path / "a.safetensors")),
            "pyarrow": caught(lambda: pq.write_table(table, tmp_path / "a.parquet")),
            "python": caught(lambda: (tmp_path / "a").write_bytes(b"x" * 100_000)),
        }
    assert isinstance(found["safetensors"], SafetensorError | OSError)
    for name, error in found.items():
        assert "the file would be larger than is allowed" in str(disk_error(error)), (name, error)
    full = caught(lambda: database.execute("INSERT INTO t VALUES (zeroblob(100000))"))
    assert "the disk is full" in str(disk_error(full))
    rust = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert "the disk is full" in str(disk_error(rust))


def test_a_full_folder_of_temporary_files_and_a_deleted_working_directory_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "missing")])
    told = str(storage_error(caught(tempfile.mkdtemp)))
    assert str(tmp_path / "missing") in told
    assert "TMPDIR" in told
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    error = caught(Path("a").absolute)
    told = str(storage_error(error))
    monkeypatch.chdir(tmp_path)
    assert "the working directory was deleted" in told
    assert storage_error(error) is None  # there is one again: another cause


def test_a_wrapped_fault_is_found_and_an_error_of_ours_keeps_its_own_words() -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "/x/a")

    def wrapped(cause: OSError, *, explicit: bool) -> Exception:
        try:
            try:
                raise cause
            except OSError as error:
                if explicit:
                    raise RuntimeError("a library") from error
                raise RuntimeError("a library")  # noqa: B904 - as libraries do
        except RuntimeError as error:
            return error

    assert "/x/a" in str(storage_error(wrapped(full, explicit=True)))
    assert "/x/a" in str(storage_error(wrapped(full, explicit=False)))
    missing = FileNotFoundError(errno.ENOENT, "No such file", "/x/b")
    assert storage_error(wrapped(missing, explicit=True)) is not None
    assert storage_error(wrapped(missing, explicit=False)) is None  # it was looked for, and may be missing
    ours = CheckpointError("damaged")
    ours.__cause__ = full
    assert storage_error(ours) is None
    assert storage_error(StorageError("told")).args == ("told",)  # type: ignore[union-attr]


def test_the_error_of_a_ray_task_is_that_of_its_worker() -> None:
    from ray.exceptions import OutOfDiskError, RayTaskError

    cause = pickle.loads(pickle.dumps(StorageError("cannot write /x: the disk is full")))  # noqa: S301 - as Ray does
    raised = RayTaskError("f", "a traceback of the worker", cause).as_instanceof_cause()
    assert str(storage_error(raised)) == "cannot write /x: the disk is full"
    assert storage_error(RayTaskError("f", "a traceback", ConfigError("of the user")).as_instanceof_cause()) is None
    assert "the disk is full" in str(storage_error(OutOfDiskError("spilling")))


def test_what_was_appended_in_part_is_cut_off_again(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    append_bytes(path, b"first\n")
    with largest_file(9), pytest.raises(StorageError, match=r"lines: the file would be larger"):
        append_bytes(path, b"second\n")
    assert path.read_bytes() == b"first\n"
    append_bytes(path, b"third\n")
    assert path.read_bytes() == b"first\nthird\n"
    append_bytes(path, b"fourth\n", after=6)  # what a killed writer left is replaced
    assert path.read_bytes() == b"first\nfourth\n"


def test_a_file_that_cannot_be_replaced_stays_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    atomic_write_bytes(path, b"old")
    with largest_file(9), pytest.raises(StorageError, match=r"cannot write .*state\.json"):
        atomic_write_bytes(path, b"a longer text")
    with (
        largest_file(9),
        pytest.raises(StorageError, match=r"cannot write .*state\.json"),
        replacing(path) as temporary,
    ):
        save_file({"a": torch.zeros(100)}, temporary)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_weights_and_tables_that_do_not_fit_on_the_disk_are_faults_of_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "final.safetensors"
    table = random_table(6, 3, hidden=2)
    for write in (lambda: save_tensors(path, {"a": torch.zeros(100)}), lambda: table.save(path)):
        with largest_file(9), pytest.raises(StorageError, match=r"cannot write .*final\.safetensors"):
            write()
    assert list(tmp_path.iterdir()) == []


def test_a_deleted_folder_is_not_made_again(tmp_path: Path) -> None:
    for write in (lambda path: atomic_write_bytes(path, b"x"), lambda path: append_bytes(path, b"x\n")):
        with pytest.raises(StorageError, match="it, or its folder, is not there"):
            write(tmp_path / "gone" / "a.json")
    with pytest.raises(StorageError, match="it, or its folder, is not there"), replacing(tmp_path / "a" / "b" / "c.st"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_read_is_not_taken_for_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "stage.json"
    path.write_text("{}")

    def failing(self: Path) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))

    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(StorageError, match=r"cannot read .*stage\.json: the disk reports an error"):
        read_json(path)


def test_other_errors_pass_through_a_block_that_writes(tmp_path: Path) -> None:
    for error in (ValueError("a bug"), CheckpointError("damaged"), KeyboardInterrupt()):
        with pytest.raises(type(error)), writing(tmp_path):
            raise error


def test_a_reserve_says_the_folder_what_is_free_what_is_asked_for_and_the_setting(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there"
    free = free_bytes(tmp_path)
    assert free is not None
    assert abs(free - (free_bytes(folder) or 0)) < 2**30
    assert DiskReserve(folder, 0, "storage.min_free_mib").problem() is None
    assert DiskReserve(folder, 1, "storage.min_free_mib").problem() is None
    told = DiskReserve(folder, 10**9, "storage.min_free_mib", "use another").problem()
    assert told is not None
    assert all(
        part in told for part in (str(folder), " MiB free", "1,000,000,000 MiB", "storage.min_free_mib", "use another")
    )


def test_a_reserve_asks_nothing_of_a_file_system_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(path: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "statvfs", failing)
    assert DiskReserve(Path("/x"), 10**9, "a").problem() is None
