"""Timing: the calls and their number, and the statistics of their times."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsnet.errors import ConfigError
from dsnet.measure.latency import MIN_REPEATS, LatencySamples, device_name, measure_latency, time_interleaved
from dsnet.measure.latency_table import (
    PUBLISHED,
    LatencyTable,
    MachineLoad,
    Timing,
    device_of,
    latency_file,
    latency_metric,
    noise_of,
)
from dsnet.measure.settings import MAIN_DEVICE, DeviceSettings, LatencySettings
from tests.dsnet.samples import ROUTER_KINDS, batch1_ms, small_supernet, three_gate_supernet

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


def test_a_short_budget_leaves_few_rounds_and_says_so() -> None:
    called = Counter[str]()
    calls = {"a": lambda: called.update("a"), "b": lambda: called.update("b")}
    timings = time_interleaved(calls, repeats=9, warmup=4, budget_s=0.0)
    assert called == {"a": 1 + MIN_REPEATS, "b": 1 + MIN_REPEATS}
    assert {timing.repeats for timing in timings.values()} == {MIN_REPEATS}
    assert time_interleaved(calls, repeats=2, warmup=0, budget_s=0.0)["a"].repeats == 2


def test_paths_through_several_gates_are_timed_one_by_one() -> None:
    supernet = three_gate_supernet(image_size=(12, 20))
    table = measure_latency(supernet, (12, 20), QUICK, budget_s=0.0)
    names = [subnet.name for subnet in supernet.subnets]
    assert {size: list(row) for size, row in table.tails.items()} == {1: names, 2: names}
    assert table.subnets[1].keys() == set(names)


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
    assert {PUBLISHED, *table.decisions} == set(ROUTER_KINDS)
    assert all(set(row) == {1, 2} for row in table.decisions.values())
    assert table.batch_sizes == (1, 3)
    assert table.device == device_name("cpu")
    assert table.device.endswith("cores")
    assert LatencyTable.from_json(json.loads(json.dumps(table.to_json()))) == table
    assert all(timing.median_ms > 0 for row in table.subnets.values() for timing in row.values())


def timings(*values: float) -> dict[str, Timing]:
    return {name: Timing(value, 0.1, 3) for name, value in zip("abc", values, strict=True)}


def test_batch_1_latency_is_trunk_plus_decision_plus_the_mean_tail() -> None:
    row = timings(1.0, 2.0, 4.0)
    table = LatencyTable("cpu", 1, {1: timings(3, 4, 9)}, {1: Timing(0.5, 0, 3)}, {1: Timing(0.25, 0, 3)}, {1: row})
    assert batch1_ms(table, np.array([0.5, 0.25, 0.25]), "abc") == 0.75 + 0.5 + 0.5 + 1.0
    assert batch1_ms(table, np.array([0.0, 0.0, 1.0]), "abc") == 4.75
    assert (
        batch1_ms(table, np.array([1.0, 0.0, 0.5]), "abc") == 0.75 + 1.0 + 2.0
    )  # a cascade: both run, one after the other


def table_of(trunk: dict[int, float], decide: dict[int, float], tails: dict[str, dict[int, float]]) -> LatencyTable:
    sizes = sorted(trunk)
    return LatencyTable(
        "a clock",
        1,
        {},
        {size: Timing(trunk[size], 0.0, 3) for size in sizes},
        {size: Timing(decide[size], 0.0, 3) for size in sizes},
        {size: {name: Timing(tail[size], 0.0, 3) for name, tail in tails.items()} for size in sizes},
    )


@given(
    st.integers(1, 6),
    st.lists(st.floats(0.0, 1.0), min_size=2, max_size=2),
    st.lists(st.floats(0.1, 9.0), min_size=8, max_size=8),
)
def test_ideal_latency_is_the_mean_over_every_way_the_images_may_fall(
    batch_size: int, runs: list[float], ms: list[float]
) -> None:
    names = ("a", "b")
    tails = {name: dict(zip((1, 3), ms[2 * k : 2 * k + 2], strict=True)) for k, name in enumerate(names)}
    trunk, decide = dict(zip((1, 3), ms[4:6], strict=True)), dict(zip((1, 3), ms[6:], strict=True))

    def time_of(known: dict[int, float], count: int) -> float:
        by_count = [0.0, known[1], (known[1] + known[3]) / 2, known[3]]
        return by_count[count] if count <= 3 else known[3] * count / 3

    expected = time_of(trunk, batch_size) + time_of(decide, batch_size)
    for share, name in zip(runs, names, strict=True):
        for falls in product((False, True), repeat=batch_size):
            probability = math.prod(share if fell else 1 - share for fell in falls)
            expected += probability * time_of(tails[name], sum(falls))
    found = table_of(trunk, decide, tails).ideal_ms(batch_size, np.array(runs), names)
    assert found == pytest.approx(expected, rel=1e-9)


def test_ideal_latency_at_batch_1_is_that_of_single_images() -> None:
    table = table_of({1: 2.0, 4: 3.0}, {1: 0.25, 4: 0.5}, {"a": {1: 1.0, 4: 1.5}, "b": {1: 7.0, 4: 20.0}})
    runs = np.array([1.0, 0.3])
    assert table.ideal_ms(1, runs, ("a", "b")) == pytest.approx(batch1_ms(table, runs, ("a", "b")), rel=1e-12)
    assert table.ideal_ms(256, np.array([1.0, 0.0]), ("a", "b")) == pytest.approx(64 * (3.0 + 0.5 + 1.5))


def test_a_kind_of_router_pays_for_its_own_decision_and_one_that_was_not_timed_for_the_published_one() -> None:
    plain = table_of({1: 2.0, 4: 3.0}, {1: 0.25, 4: 0.5}, {"a": {1: 1.0, 4: 1.5}})
    table = replace(plain, decisions={"cascade": {1: Timing(1.25, 0, 3), 4: Timing(4.5, 0, 3)}})
    runs = np.array([1.0])
    assert batch1_ms(table, runs, "a", "cascade") == batch1_ms(plain, runs, "a") + 1.0
    assert table.ideal_ms(4, runs, "a", "cascade") == pytest.approx(plain.ideal_ms(4, runs, "a") + 4.0)
    assert table.ideal_ms(4, runs, "a", "gates") == plain.ideal_ms(4, runs, "a")
    assert LatencyTable.from_json(json.loads(json.dumps(table.to_json()))) == table


def test_a_whole_subnetwork_takes_what_was_measured_and_at_batch_1_at_least_its_parts() -> None:
    table = table_of({1: 2.0}, {1: 0.25}, {"a": {1: 1.0}})
    assert table.static_ms("a") == 3.0
    with pytest.raises(KeyError):
        table.static_ms("a", 64)
    measured = replace(table, subnets={1: {"a": Timing(2.5, 0.0, 3)}, 64: {"a": Timing(99.0, 0.0, 3)}})
    assert (measured.static_ms("a"), measured.static_ms("a", 64)) == (2.5, 99.0)
    assert replace(table, subnets={64: {"a": Timing(99.0, 0.0, 3)}}).batch_sizes == (1, 64)


def test_metrics_and_files_name_batch_and_device() -> None:
    assert [latency_metric(), latency_metric(64), latency_metric(1, "server"), latency_metric(8, "server")] == [
        "latency_ms",
        "latency_ms_batch64",
        "latency_ms.server",
        "latency_ms_batch8.server",
    ]
    assert [device_of(latency_file(name)) for name in (MAIN_DEVICE, "server", "a_1")] == [MAIN_DEVICE, "server", "a_1"]
    assert [device_of(name) for name in ("subnets.json", "latency-.json", "latency-1x.json", "xlatency.json")] == [
        None
    ] * 4


def test_every_device_is_timed_with_the_same_sizes_and_its_own_threads() -> None:
    devices = {"server": DeviceSettings(device="auto", threads=3), "small": DeviceSettings()}
    settings = replace(QUICK, device="auto", threads=2, devices=devices)
    alone = settings.by_device({"auto": "cuda", "cpu": "cpu"}.__getitem__)
    assert {name: (own.device, own.threads) for name, own in alone.items()} == {
        MAIN_DEVICE: ("cuda", 2),
        "server": ("cuda", 3),
        "small": ("cpu", 1),
    }
    assert list(alone) == [MAIN_DEVICE, "server", "small"]
    assert all(replace(own, device="cpu", threads=1) == QUICK for own in alone.values())


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ({"my server": DeviceSettings()}, "measure.devices: 'my server' is not a valid device name"),
        ({"": DeviceSettings()}, "is not a valid device name"),
        ({"a.b": DeviceSettings()}, "is not a valid device name"),
        ({"server": DeviceSettings(threads=0)}, "measure.devices.server.threads is 0"),
    ],
)
def test_a_device_that_no_metric_could_name_is_refused(devices: dict[str, DeviceSettings], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LatencySettings(devices=devices)


IDLE, BUSY = MachineLoad(1.5, 2), MachineLoad(5.0, 2)


@pytest.mark.parametrize(
    ("spreads", "load", "told"),
    [
        ((0.02, 0.05, 0.4), IDLE, None),  # one call that was disturbed is no noise
        ((0.02, 0.3, 0.4), IDLE, ("30% of the median", "1.5 on 2 cores")),
        ((0.02, 0.05), BUSY, ("4% of the median", "5.0 on 2 cores")),
        ((0.3,), None, ("30% of the median",)),
        ((), None, None),
    ],
)
def test_times_of_a_busy_or_uneven_machine_say_so(
    spreads: tuple[float, ...], load: MachineLoad | None, told: tuple[str, ...] | None
) -> None:
    noise = noise_of([Timing(2.0, 2.0 * spread, 9) for spread in spreads], load)
    assert (noise is None) == (told is None)
    assert all(text in str(noise) for text in told or ())


def test_a_table_remembers_the_load_and_one_of_an_earlier_release_has_none() -> None:
    table = replace(table_of({1: 1.0}, {1: 0.1}, {"a": {1: 2.0}}), load=BUSY)
    stored = json.loads(json.dumps(table.to_json()))
    assert LatencyTable.from_json(stored) == table
    del stored["load"]
    assert LatencyTable.from_json(stored) == replace(table, load=None)


def test_resampled_rounds_keep_calls_together_and_the_table_has_the_medians() -> None:
    drift = (0.0, 5.0, 1.0, 9.0, 2.0)  # of each round
    parts = {
        size: {name: tuple(size * ms + late for late in drift) for name, ms in (("/trunk", 10.0), ("slim", 20.0))}
        for size in (1, 4)
    }
    samples = LatencySamples("a clock", 1, {1: {"slim": drift}}, parts)
    assert LatencySamples.from_json(json.loads(json.dumps(samples.to_json()))) == samples
    table = samples.table()
    assert (table.trunk[4].median_ms, table.tails[4]["slim"].median_ms) == (42.0, 82.0)
    assert table.subnets[1]["slim"] == Timing(2.0, 4.0, 5)
    rng = np.random.default_rng(0)
    drawn = [samples.resampled(rng) for _ in range(50)]
    for resample in drawn:
        assert resample.tails[4]["slim"].median_ms - resample.trunk[4].median_ms == pytest.approx(40.0)
    assert len({resample.trunk[4].median_ms for resample in drawn}) > 1
    assert len({resample.trunk[4].median_ms - resample.trunk[1].median_ms for resample in drawn}) > 1
