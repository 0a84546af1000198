"""Timing: what is called how often, and what is made of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch

from dsnet.latency import LatencySettings, LatencyTable, Timing, device_name, measure_latency, time_interleaved
from tests.dsnet.samples import small_supernet

QUICK = LatencySettings(batch_sizes=(1, 3), group_sizes=(1, 2), repeats=2, warmup=1)


def test_every_call_runs_once_a_round_in_changing_order() -> None:
    rounds: list[str] = []

    def call(name: str) -> Callable[[], None]:
        return lambda: rounds.append(name)

    synchronized = Counter[str]()
    timings = time_interleaved(
        {name: call(name) for name in "abc"},
        repeats=5,
        warmup=2,
        synchronize=lambda: synchronized.update(["all"]),
    )
    assert Counter(rounds) == {"a": 7, "b": 7, "c": 7}
    orders = {tuple(rounds[start : start + 3]) for start in range(0, 21, 3)}
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len(orders) > 1
    assert synchronized["all"] == 2 * 21
    assert all(timing.repeats == 5 and timing.median_ms >= 0 and timing.iqr_ms >= 0 for timing in timings.values())


def test_median_and_quartiles_are_those_of_the_rounds_after_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    durations = iter([9.0, 0.001, 0.002, 0.003, 0.004, 0.010])
    clock = 0.0

    def call() -> None:
        nonlocal clock
        clock += next(durations)

    monkeypatch.setattr("time.perf_counter", lambda: clock)
    timing = time_interleaved({"x": call}, repeats=5, warmup=1)["x"]
    assert timing.median_ms == pytest.approx(3.0)
    assert timing.iqr_ms == pytest.approx(2.0)


@pytest.mark.parametrize("fails", [False, True])
def test_the_process_keeps_its_threads(fails: bool) -> None:
    before = torch.get_num_threads()
    met: list[int] = []

    def progress(done: int, total: int) -> None:
        met.append(torch.get_num_threads())
        if fails:
            raise InterruptedError

    settings = LatencySettings(threads=before + 1, batch_sizes=(1,), group_sizes=(1,), repeats=1, warmup=0)
    if fails:
        with pytest.raises(InterruptedError):
            measure_latency(small_supernet(), 16, settings, progress)
    else:
        assert measure_latency(small_supernet(), 16, settings, progress).threads == before + 1
    assert met == [before + 1] * (1 if fails else 2)
    assert torch.get_num_threads() == before


def test_a_measured_table_holds_every_part_and_survives_json() -> None:
    supernet = small_supernet()
    heard: list[tuple[int, int]] = []
    table = measure_latency(supernet, 16, QUICK, lambda done, total: heard.append((done, total)))
    names = [subnet.name for subnet in supernet.subnets]
    assert heard == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert {size: list(row) for size, row in table.subnets.items()} == {1: names, 3: names}
    assert {size: list(row) for size, row in table.tails.items()} == {1: names, 2: names}
    assert set(table.trunk) == set(table.decide) == {1, 2}
    assert table.device == device_name("cpu")
    assert table.device.endswith("cores")
    assert LatencyTable.from_json(json.loads(json.dumps(table.to_json()))) == table
    assert all(timing.median_ms > 0 for row in table.subnets.values() for timing in row.values())


def timings(*values: float) -> dict[str, Timing]:
    return {name: Timing(value, 0.1, 3) for name, value in zip("abc", values, strict=True)}


def test_batch_1_latency_is_trunk_plus_decision_plus_the_mean_tail() -> None:
    row = timings(1.0, 2.0, 4.0)
    table = LatencyTable("cpu", 1, {1: timings(3, 4, 9)}, {1: Timing(0.5, 0, 3)}, {1: Timing(0.25, 0, 3)}, {1: row})
    assert table.batch1_ms(np.array([0.5, 0.25, 0.25]), "abc") == 0.75 + 0.5 + 0.5 + 1.0
    assert table.batch1_ms(np.array([0.0, 0.0, 1.0]), "abc") == 4.75
