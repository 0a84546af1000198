"""Stored JSON has one reader, which answers any damage with one error that names the file."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsnet.errors import CheckpointError, StorageError
from dsnet.files import (
    file_sha256,
    known_sha256,
    read_json,
    read_json_lines,
    read_object,
    read_sealed,
    read_stored,
    remove_drafts,
    replace_link,
    set_aside,
    write_sealed,
)
from tests.full_disk import FullDisk

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that every example of a property writes again."""
    return tmp_path_factory.mktemp("place") / "stored.json"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"{} {}",
        b"[" * 50_000,
        b'{"a":' * 50_000,
        b"\xff\xfe",
        '{"caf\u00e9": 1}'.encode("latin-1"),
        b"9" * 5_000,
    ],
    ids=["empty", "torn", "two", "deep list", "deep object", "bytes", "latin-1", "digits"],
)
def test_text_that_is_no_json_is_one_error_with_the_name_of_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "stored.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"stored\.json is not valid JSON"):
        read_json(path)
    path.write_bytes(content + b"\n{}\n")
    if content:
        with pytest.raises(CheckpointError, match=r"stored\.json, line 1, is not valid JSON"):
            read_json_lines(path)


@pytest.mark.parametrize("content", ["[]", "3", "null", '"text"'])
def test_another_value_than_an_object_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "stored.json"
    path.write_text(content + "\n")
    with pytest.raises(CheckpointError, match=r"stored\.json does not hold a JSON object"):
        read_object(path)
    with pytest.raises(CheckpointError, match=r"stored\.json, line 1 is not a JSON object"):
        read_json_lines(path)


def test_a_missing_file_a_folder_and_values_of_another_form_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"stored\.json is missing"):
        read_json(tmp_path / "stored.json")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_json(tmp_path)
    assert read_json_lines(tmp_path / "stored.json") == []
    path = tmp_path / "stored.json"
    path.write_text('{"a": {"b": 1}}')
    assert read_stored(path, lambda content: content["a"]["b"] + 1) == 2
    for parse in (
        lambda content: content["b"],
        lambda content: content["a"] + 1,
        lambda content: int(content["a"]),
        lambda content: content["a"].c,
        lambda content: 1 / (content["a"]["b"] - 1),
    ):
        with pytest.raises(CheckpointError, match=r"stored\.json does not hold what this release writes there"):
            read_stored(path, parse)


def test_the_last_line_may_still_be_written(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3, "met')
    assert read_json_lines(path) == [{"step": 1}, {"step": 2}]


@given(content=st.dictionaries(st.text(max_size=4).filter(lambda key: key != "sha256"), values, max_size=4))
def test_a_sealed_object_is_read_as_it_was_written(place: Path, content: dict[str, Any]) -> None:
    write_sealed(place, content)
    assert read_sealed(place) == content
    assert read_json(place).keys() == content.keys() | {"sha256"}


def test_what_a_sealed_object_holds_cannot_be_changed_unnoticed(place: Path) -> None:
    content = {"trials": 12, "rules": {"plateau": None, 1: (0.25, True)}, "at": "2026-01-01"}
    write_sealed(place, content)
    plain, text = json.loads(json.dumps(content)), place.read_bytes()
    for at in range(len(text)):
        place.write_bytes(text[:at] + bytes([text[at] ^ 1]) + text[at + 1 :])
        try:
            read = read_sealed(place)
        except CheckpointError:
            continue
        # A change of a space, or of the name of the seal, leaves the values as they are.
        assert {key: read.get(key) for key in plain} == plain
    place.write_text(json.dumps(content))
    assert read_sealed(place) == plain, "of an earlier release, without a seal"


def test_a_hash_is_computed_again_when_the_file_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"first")
    first = known_sha256(path)
    assert first == known_sha256(path) == file_sha256(path)
    path.write_bytes(b"other")
    os.utime(path, ns=(1, 1))
    assert known_sha256(path) == file_sha256(path) != first
    with pytest.raises(CheckpointError, match="is missing"):
        known_sha256(tmp_path / "nothing")


def test_damaged_files_are_kept_beside_each_other(tmp_path: Path) -> None:
    path = tmp_path / "subnets.json"
    for text in ("first", "second"):
        path.write_text(text)
        set_aside(path)
    assert {each.name: each.read_text() for each in tmp_path.iterdir()} == {
        "subnets.json.damaged-1": "first",
        "subnets.json.damaged-2": "second",
    }


def a_dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_only_what_killed_processes_of_this_program_were_writing_is_removed(tmp_path: Path) -> None:
    dead, alive = a_dead_pid(), os.getpid()
    ours = [f".report.html.{dead}-0a1b2c3d.tmp", f"export/.figure.png.{dead}.partial", f".driver.lock.{dead}"]
    others = [
        f".report.html.{alive}-0a1b2c3d.tmp",
        f".notes.{dead}.tmp",
        f"report.html.{dead}-0a1b2c3d.tmp",
        f".report.html.{dead}-0a1b2c3.tmp",
        ".study.tmp",
        "driver.lock",
        f".driver.lock.{dead}.copy",
        "gates/slot-00001.safetensors",
    ]
    for name in [*ours, *others]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    bundle = tmp_path / "export" / f".knee.{dead}.tmp"
    bundle.mkdir()
    (bundle / "weights.safetensors").write_text("half of it")
    assert remove_drafts(tmp_path, min_age_s=600.0) == [], "another machine may be writing them"
    assert sorted(remove_drafts(tmp_path)) == sorted([*(tmp_path / name for name in ours), bundle])
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(tmp_path / name for name in others)


def test_a_writer_that_is_killed_leaves_a_draft_that_is_removed(tmp_path: Path) -> None:
    """The names that are written and those that are removed must be the same."""
    script = (
        "import os, sys; from pathlib import Path; from dsnet.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as draft:\n"
        "    draft.write_text('half of it'); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "points.parquet")], check=False)
    (left,) = tmp_path.iterdir()
    assert remove_drafts(tmp_path) == [left]


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EROFS])
def test_a_link_is_left_out_on_a_file_system_without_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(target: Any, path: Any) -> None:
        raise OSError(code, os.strerror(code), os.fspath(path))

    monkeypatch.setattr(os, "symlink", refuse)
    assert not replace_link(tmp_path / "link", Path("somewhere"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("num_good", [0, 1])
def test_a_link_on_a_disk_that_is_full_is_an_error_and_the_old_one_stays(tmp_path: Path, num_good: int) -> None:
    assert replace_link(tmp_path / "link", Path("old"))
    with FullDisk(tmp_path, num_good).installed(), pytest.raises(StorageError, match="the disk is full"):
        replace_link(tmp_path / "link", Path("new"))
    assert os.readlink(tmp_path / "link") == "old"
    assert os.listdir(tmp_path) == ["link"]
    assert replace_link(tmp_path / "link", Path("new"))
    assert os.readlink(tmp_path / "link") == "new"
