"""The queue of points: only whole lines are read, with several writers and after a kill."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dsnet.errors import CheckpointError, StorageError
from orchestration.runs.queue import append_points, read_queue

POINT = {"gate.target": 0.25, "gate.router": "cascade", "gate.routing.last": 3}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "queue.jsonl"


def params(path: Path) -> list[dict[str, object]]:
    return [item["params"] for item in read_queue(path)]


def test_points_come_back_in_the_order_in_which_they_were_asked_for_with_their_times(path: Path) -> None:
    assert read_queue(path) == []
    assert append_points(path, [POINT]) == 1
    assert append_points(path, [{"gate.target": 0.5}, {}]) == 3
    assert params(path) == [POINT, {"gate.target": 0.5}, {}]
    times = [item["at"] for item in read_queue(path)]
    assert times == sorted(times)
    assert len(path.read_text().splitlines()) == 3


def test_a_line_that_is_not_whole_yet_is_left_out_and_does_not_spoil_the_next(path: Path) -> None:
    append_points(path, [POINT, {"gate.target": 0.5}])
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        num_whole = whole[:end].count(b"\n")
        assert params(path) == [POINT, {"gate.target": 0.5}][:num_whole]
        assert append_points(path, [{"gate.target": 0.75}]) == num_whole + 1
        assert params(path)[num_whole:] == [{"gate.target": 0.75}]


def test_many_processes_lose_no_point(path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from orchestration.runs.queue import append_points\n"
        "for k in range(20): append_points(Path(sys.argv[1]), [{'who': int(sys.argv[2]), 'k': k}])"
    )

    def run(who: int) -> int:
        return subprocess.run([sys.executable, "-c", code, str(path), str(who)], check=False).returncode

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(run, range(3))) == [0, 0, 0]
    found = params(path)
    assert len(found) == 60
    for who in range(3):
        assert [point["k"] for point in found if point["who"] == who] == list(range(20))


@pytest.mark.parametrize("line", ["{", "[1]", '{"at": "now"}', '{"params": 3}'])
def test_a_line_that_is_no_point_is_refused_by_its_number(path: Path, line: str) -> None:
    append_points(path, [POINT])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(CheckpointError, match=r"queue\.jsonl, line 2: not a point"):
        read_queue(path)
    before = path.read_bytes()
    with pytest.raises(CheckpointError):
        append_points(path, [POINT])
    assert path.read_bytes() == before


def test_what_cannot_be_written_is_refused_and_leaves_the_queue_as_it_was(path: Path) -> None:
    append_points(path, [POINT])
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_points(path, [{"gate.target": float("nan")}])
    assert params(path) == [POINT]
    with pytest.raises(StorageError, match="missing: it, or its folder, is not there"):
        append_points(path.parent / "missing" / "queue.jsonl", [POINT])
    assert json.loads(path.read_text())["params"] == POINT
