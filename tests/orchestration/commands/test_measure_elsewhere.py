"""`dsnet-orch measure` on another device: the front there, kits and their results; the study does
not change."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsnet.measure.latency import DECIDE, TRUNK, LatencySamples
from dsnet.measure.latency_table import PUBLISHED, LatencyTable, Timing
from orchestration.commands.measure_elsewhere import front_sentence
from orchestration.results.elsewhere import fronts_of, store_timing, stored_timings
from search.front.latency_front import TimedPoint
from search.front.points import trial_name
from tests.orchestration.samples import Finished, call, problems_of_message, results_in

pytestmark = pytest.mark.ray

ONLY_ALLOWED = """\
import importlib.abc, runpy, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {"numpy", "onnxruntime", *sys.stdlib_module_names}:
            raise ModuleNotFoundError(f"{name} is not on this device")

sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""A program that runs a script where only numpy and onnxruntime are installed."""


def samples_of(table: LatencyTable) -> LatencySamples:
    """Samples with the medians of a table."""

    def times(timing: Timing) -> tuple[float, ...]:
        return (timing.median_ms,) * 3

    decisions = {PUBLISHED: table.decide, **table.decisions}
    parts = {
        size: {
            TRUNK: times(table.trunk[size]),
            **{name: times(timing) for name, timing in table.tails[size].items()},
            **{DECIDE + kind: times(row[size]) for kind, row in decisions.items()},
        }
        for size in table.trunk
    }
    whole = {size: {name: times(timing) for name, timing in row.items()} for size, row in table.subnets.items()}
    return LatencySamples(table.device, table.threads, whole, parts)


def leaving(points: list[dict[str, Any]]) -> list[str]:
    """Gates that another point dominates, by comparing all pairs."""

    def dominates(a: dict[str, Any], b: dict[str, Any]) -> bool:
        gains = (a["top1"] - b["top1"], b["latency_ms"] - a["latency_ms"])
        return min(gains) >= 0 and max(gains) > 0

    return [
        point["name"] for point in points if not point["is_static"] and any(dominates(other, point) for other in points)
    ]


def test_with_the_times_of_the_search_gates_have_the_latency_of_the_search(finished: Finished, tmp_path: Path) -> None:
    results = results_in(finished.copy(tmp_path))
    for device, table in results.latencies.items():
        timed = store_timing(results, "torch", samples_of(table), is_by_kit=False)
        suffix = f".{device}" if device else ""
        for size, points in fronts_of(results, timed).items():
            metric = ("latency_ms" if size == 1 else f"latency_ms_batch{size}") + suffix
            gates = {point.name: point.latency_ms for point in points if not point.is_static}
            assert gates == {
                trial_name(slot): pytest.approx(results.record(slot).metrics[metric]) for slot in results.front
            }
            static = {point.name: point.latency_ms for point in points if point.is_static}
            assert static == {subnet.name: table.static_ms(subnet.name, size) for subnet in results.members}
    assert [timed.samples.threads for timed in stored_timings(results)] == [1, 2]


def test_another_number_of_threads_is_timed_stored_and_shown_again(finished: Finished, tmp_path: Path) -> None:
    folder = finished.copy(tmp_path)
    before = results_in(folder)
    answer = call(folder, "measure", "tiny", "--threads", "3", "--json")
    assert answer.code == 0, answer.err
    (timed,) = answer.json["measurements"]
    assert (timed["engine"], timed["threads"], timed["is_by_kit"], timed["has_decisions"]) == ("torch", 3, False, True)
    assert set(timed["batches"]) == {"1", "8"}
    for batch in timed["batches"].values():
        assert batch["leaving"] == leaving(batch["points"])
        assert len(batch["points"]) == len(before.front) + len(before.members)
    (path,) = before.run.elsewhere_dir(before.done_key("supernet")).iterdir()
    assert path.name.endswith("-torch-3-threads.json")
    content = path.read_bytes()
    assert call(folder, "measure", "tiny", "--stored", "--json").json == answer.json
    shown = call(folder, "measure", "tiny", "--stored")
    assert "torch, 3 threads, batch 8" in shown.out
    assert "decision was not measured" not in shown.out
    assert path.read_bytes() == content
    after = results_in(folder)
    assert (after.latencies, after.newest_latencies, after.records) == (
        before.latencies,
        before.newest_latencies,
        before.records,
    )
    assert after.verified == before.verified
    path.write_text(json.dumps({**json.loads(content), "samples": {}}), encoding="utf-8")
    damaged = call(folder, "measure", "tiny", "--stored")
    assert damaged.code == 3
    assert problems_of_message(damaged, (str(path), "delete it, and measure that device again")) == []


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--threads", "2", "--stored"), ("--device, --engine or --threads and --stored exclude each other",)),
        (("--import", "x", "--export-kit", "y"), ("--export-kit and --import exclude each other",)),
        (("--json",), ("--json prints timings on other devices: add --device",)),
        (("--export-kit", "y", "--json"), ("leave out --json",)),
        (("--engine", "onnxruntme"), ("did you mean 'onnxruntime'",)),
        (("--stored",), ("has no timing on another device", "--export-kit")),
        (("--import", "missing.json"), ("missing.json cannot be read", "result.json")),
    ],
)
def test_impossible_options_are_refused(finished: Finished, options: tuple[str, ...], parts: tuple[str, ...]) -> None:
    answer = call(finished.folder, "measure", "tiny", *options)
    assert answer.code in (2, 3, 9)
    assert problems_of_message(answer, parts) == []


def point(name: str, **values: Any) -> TimedPoint:
    first = TimedPoint(name, 0.9, 1.0, False, 5.0, 4.0, 6.0, True, 1.0, None, None, None)
    return replace(first, **values)


def test_the_sentence_names_what_leaves_and_what_is_open() -> None:
    static = point("slim", is_static=True, is_on_front=False, front_share=0.5)
    behind = {"is_on_front": False, "front_share": 0.0, "dominated_by": "slim"}
    assert front_sentence([point("a"), static]) == (
        "No gate of the run's front (1 in all) leaves the front of top-1 and latency there."
    )
    assert front_sentence([point("a"), point("b", **behind), static]) == (
        "1 of 2 gates of the run's front leaves the front of top-1 and latency there: b (slim dominates it)."
    )
    assert front_sentence([point("a", front_share=0.6), point("b", **behind), point("c", **behind)]).endswith(
        "2 of 3 gates of the run's front leave the front of top-1 and latency there: "
        "b (slim dominates it), c (slim dominates it). The spread of the times leaves it open for a (on it by the medians)."
    )
    open_case = point("b", **(behind | {"front_share": 0.4}))
    assert front_sentence([open_case, static]) == (
        "No gate of the run's front (1 in all) surely leaves the front of top-1 and latency there. "
        "The spread of the times leaves it open for b (dominated by slim by the medians)."
    )
    assert "no gates on its front yet" in front_sentence([static])


@pytest.mark.slow
class TestKit:
    """A kit that is exported once, and run in processes without dsnet-orch."""

    @pytest.fixture(scope="class")
    def folder(self, finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A finished sweep and its kit in `kit`."""
        pytest.importorskip("onnxscript", reason="extra deploy is not installed")
        pytest.importorskip("onnxruntime", reason="extra deploy is not installed")
        folder = finished.copy(tmp_path_factory.mktemp("kit"))
        answer = call(folder, "measure", "tiny", "--export-kit", folder / "kit")
        assert answer.code == 0, answer.err
        assert answer.out.strip() == str(folder / "kit")
        assert "python time_kit.py" in answer.err
        return folder

    def start(self, folder: Path, *arguments: str) -> subprocess.Popen[str]:
        """Start the script of the kit in a folder of its own, as on a device."""
        program = [sys.executable, "-I", "-c", ONLY_ALLOWED, str(folder / "kit" / "time_kit.py"), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(program, cwd=folder, env={"PATH": os.environ["PATH"]}, **pipes)  # type: ignore[call-overload, no-any-return]

    def test_a_kit_is_timed_without_us_and_its_result_is_read(self, folder: Path) -> None:
        process = self.start(folder, "--rounds", "4")
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert "outputs of 7 graphs are the stored ones" in err
        assert "round 4 of 4" in err
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        assert max(result["deviations"].values()) <= result["tolerance"] == 1e-3
        assert {len(ms) for sizes in result["timings"].values() for ms in sizes.values()} == {4}
        answer = call(folder, "measure", "tiny", "--import", folder / "result.json", "--json")
        assert answer.code == 0, answer.err
        (timed,) = answer.json["measurements"]
        assert (timed["is_by_kit"], timed["has_decisions"], timed["threads"]) == (True, False, 1)
        assert timed["device"].endswith(f"ONNX Runtime {result['device']['onnxruntime']}")
        for size, batch in timed["batches"].items():
            assert batch["leaving"] == leaving(batch["points"])
            for k, subnet in enumerate(results_in(folder).trained_subnets):
                (own,) = [row for row in batch["points"] if row["name"] == subnet.name]
                times = sorted(result["timings"][f"static-{k}"][size])
                assert own["latency_ms"] == pytest.approx((times[1] + times[2]) / 2)
        shown = call(folder, "measure", "tiny", "--stored")
        assert "decision was not measured" in " ".join(shown.out.split())
        assert ", by a kit, batch 1" in shown.out

    def test_after_ctrl_c_the_finished_rounds_are_written(self, folder: Path) -> None:
        process = self.start(folder, "--rounds", "1000000", "--out", "stopped.json")
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("round 5 of"):
                break
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
        assert "then stopped" in err
        answer = call(folder, "measure", "tiny", "--import", folder / "stopped.json")
        assert answer.code == 0, answer.err

    def test_a_changed_kit_and_a_foreign_result_are_refused(self, folder: Path, finished: Finished) -> None:
        graph = folder / "kit" / "tail-1.onnx"
        content = graph.read_bytes()
        graph.write_bytes(content[:-1])
        process = self.start(folder, "--out", "changed.json")
        _, err = process.communicate(timeout=60)
        graph.write_bytes(content)
        assert process.returncode == 1
        assert "tail-1.onnx is missing, or is not the file that was exported; copy the whole kit again" in err
        assert not (folder / "changed.json").exists()
        foreign = folder / "foreign.json"
        foreign.write_text(json.dumps({"version": 1, "kit_sha256": "00" * 32}), encoding="utf-8")
        answer = call(finished.folder, "measure", "tiny", "--import", foreign)
        assert answer.code == 3
        assert problems_of_message(answer, ("kit 000000000000", "the kits of this run are: none")) == []
