"""The script of a kit runs on devices with an older Python, and only complete results of the same
kit are read."""

from __future__ import annotations

import ast
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from dsnet.errors import ConfigError, DataError
from dsnet.measure import time_kit
from dsnet.measure.kit import group_sizes, read_result, write_kit
from dsnet.measure.latency import TRUNK
from dsnet.measure.settings import LatencySettings
from dsnet.measure.time_kit import run_rounds
from tests.dsnet.cases import OBLONG
from tests.dsnet.samples import small_supernet

if TYPE_CHECKING:
    from dsnet.measure.time_kit import Call

SHA = "ab" * 32
KIT = {
    "version": 1,
    "tolerance": 1e-3,
    "graphs": [
        {"name": "trunk", "timed": TRUNK, "feed": "images", "sizes": [1, 2]},
        {"name": "tail-0", "timed": "slim", "feed": "features", "sizes": [1, 2]},
        {"name": "static-0", "timed": "slim", "feed": "images", "sizes": [2]},
    ],
}


def result() -> dict[str, Any]:
    """A complete result of `KIT`; its median times are 2, 3, 5, 7 and 11 ms."""

    def times(median: float) -> list[float]:
        return [median + 0.5, median, median - 1]

    return {
        "version": 1,
        "kit_sha256": SHA,
        "threads": 2,
        "device": {"cpu": "A board", "cores": 4, "onnxruntime": "1.16.3"},
        "load_average": [0.5, 0.1, 0.1],
        "deviations": {"trunk": 1e-6, "tail-0": 0.0, "static-0": 1e-3},
        "timings": {
            "trunk": {"1": times(2), "2": times(3)},
            "tail-0": {"1": times(5), "2": times(7)},
            "static-0": {"2": times(11)},
        },
    }


def written(folder: Path, content: object) -> Path:
    path = folder / "result.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_the_script_is_python_3_8_and_needs_only_numpy_and_onnxruntime() -> None:
    tree = ast.parse(Path(time_kit.__file__).read_text(encoding="utf-8"), feature_version=(3, 8))
    imported = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert imported - sys.stdlib_module_names == {"numpy", "onnxruntime"}


class Clock:
    """A clock that only calls advance."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.order: list[Call] = []

    def __call__(self) -> float:
        return self.now_s

    def taking(self, call: Call, ms: float) -> Callable[[], None]:
        def run() -> None:
            self.order.append(call)
            self.now_s += ms / 1e3

        return run


def test_every_round_runs_every_call_once_in_another_order() -> None:
    clock = Clock()
    calls = {(f"graph-{k}", size): clock.taking((f"graph-{k}", size), k + size) for k in range(4) for size in (1, 8)}
    rounds = list(run_rounds(calls, rounds=5, warmup=2, seconds=60.0, seed=0, clock=clock))
    assert [len(row) for row in rounds] == [8] * 5
    for row in rounds:
        assert row == {(name, size): pytest.approx(int(name[-1]) + size) for name, size in calls}
    orders = [tuple(clock.order[start : start + 8]) for start in range(0, len(clock.order), 8)]
    assert len(orders) == 7, "two of warm-up"
    assert all(sorted(order) == sorted(calls) for order in orders)
    assert len(set(orders)) > 1


def test_the_time_ends_warm_up_and_rounds_but_leaves_three_rounds() -> None:
    clock = Clock()
    calls = {("slow", 1): clock.taking(("slow", 1), 10_000)}
    assert len(list(run_rounds(calls, rounds=9, warmup=6, seconds=30.0, seed=0, clock=clock))) == 3
    assert len(clock.order) == 1 + 3
    clock = Clock()
    calls = {("quick", 1): clock.taking(("quick", 1), 1_000)}
    assert len(list(run_rounds(calls, rounds=99, warmup=0, seconds=5.5, seed=0, clock=clock))) == 6


def test_groups_are_timed_up_to_the_largest_batch() -> None:
    settings = LatencySettings(batch_sizes=(1, 6), group_sizes=(1, 2, 4, 8, 16))
    assert group_sizes(settings) == (1, 2, 4, 8)
    assert group_sizes(LatencySettings(batch_sizes=(1,))) == (1,)
    assert group_sizes(LatencySettings(batch_sizes=(64,), group_sizes=(1, 16))) == (1, 16)


def test_a_kit_replaces_no_files(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(ConfigError, match=r"is not an empty folder; name a new one"):
        write_kit(small_supernet(), 16, LatencySettings(), tmp_path)


@pytest.mark.slow
def test_a_kit_has_images_of_the_network_s_size_and_shape(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="extra deploy is not installed")
    settings = LatencySettings(batch_sizes=(1,), group_sizes=(1,))
    write_kit(small_supernet(image_size=OBLONG), OBLONG, settings, tmp_path / "kit")
    kit = time_kit.read_kit(str(tmp_path / "kit"))
    assert kit["shape"] == [3, *OBLONG]
    sessions = time_kit.open_graphs(str(tmp_path / "kit"), kit, 1)
    away = time_kit.deviations(str(tmp_path / "kit"), kit, sessions)
    assert set(away) == {graph["name"] for graph in kit["graphs"]}
    assert max(away.values()) < kit["tolerance"]


def test_the_times_of_a_result_become_a_table_without_decisions(tmp_path: Path) -> None:
    samples = read_result(written(tmp_path, result()), {SHA: KIT})
    table = samples.table()
    assert (samples.device, samples.threads) == ("A board, 4 cores, ONNX Runtime 1.16.3", 2)
    assert not samples.has_decisions
    assert [table.trunk[size].median_ms for size in (1, 2)] == [2, 3]
    assert [table.tails[size]["slim"].median_ms for size in (1, 2)] == [5, 7]
    assert table.static_ms("slim", 2) == 11
    assert table.decide[1].median_ms == 0
    assert table.load is not None
    assert (table.load.load_average, table.load.num_cores) == (0.5, 4)


def change(*keys: str, to: object = None) -> Callable[[dict[str, Any]], object]:
    """A change of one entry; None removes it."""

    def apply(content: dict[str, Any]) -> object:
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        if to is None:
            del inner[keys[-1]]
        else:
            inner[keys[-1]] = to
        return content

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: json.dumps(content)[:-20], r"not valid JSON .*copy the file from the device again"),
        (lambda content: [content], r"no result of time_kit\.py; name the result\.json"),
        (change("version", to=2), r"version 2, but this release reads 1; export the kit again"),
        (change("kit_sha256", to="cd" * 32), r"result of kit cdcdcdcdcdcd, but the kits .* are: abababababab; "),
        (change("kit_sha256", to=["cd"]), r"result of kit \['cd'\], but the kits"),
        (change("timings", "tail-0"), r"tail-0 with 1 images has 0 rounds, but at least 3 .*run the script again"),
        (change("timings", "trunk", "2"), r"trunk with 2 images has 0 rounds"),
        (change("timings", "trunk", "1", to=[1.0, 2.0]), r"trunk with 1 images has 2 rounds"),
        (change("timings", "tail-0", "1", to=[1.0] * 4), r"tail-0 with 1 images has 4 rounds, but other graphs"),
        (change("timings", "trunk", "1", to=[1.0, math.nan, 2.0]), r"trunk with 1 images has a time that is no number"),
        (change("timings", "trunk", "1", to=[1.0, -1.0, 2.0]), r"trunk with 1 images has a time that is no number"),
        (change("timings", "trunk", "1", to=["a", "b", "c"]), r"entry is missing or of another type .*copy the file"),
        (change("timings", "trunk", to=[1.0]), r"entry is missing or of another type"),
        (change("device", "cpu"), r"entry is missing or of another type \(KeyError\('cpu'\)\)"),
        (change("threads"), r"entry is missing"),
        (change("deviations", "trunk", to=0.002), r"graph trunk are off by 0\.002 .* at most 0\.001"),
        (change("deviations", "static-0", to=math.nan), r"graph static-0 are off by nan"),
        (change("deviations", "tail-0"), r"entry is missing"),
    ],
)
def test_a_damaged_foreign_or_incomplete_result_is_refused(
    tmp_path: Path, damage: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_result(written(tmp_path, damage(result())), {SHA: KIT})


def test_a_missing_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be read: No such file or directory; name the result\.json"):
        read_result(tmp_path / "result.json", {})
