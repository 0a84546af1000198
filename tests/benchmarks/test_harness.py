"""The common parts of the benchmarks, and the arithmetic behind each benchmark's table. No test
here depends on a duration."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import harness
from benchmarks.gate_trials import DIGITS, synthetic_table, trial_settings
from benchmarks.harness import Estimate, Headline, Options, Report, Samples, Section
from benchmarks.supernet_step import Networks, Workload, workloads
from dsnet.gates.fit import fit_gate


def test_every_benchmark_is_listed_with_one_line() -> None:
    found = harness.find_benchmarks()
    assert {"cli_startup", "gate_trials", "supernet_step", "dynamic_inference"} <= set(found)
    assert "harness" not in found
    assert all(description and "\n" not in description for description in found.values())


def test_a_ratio_is_paired_so_that_drift_cancels() -> None:
    drift = np.geomspace(1.0, 100.0, 21)
    samples = Samples({"a": 2.0 * drift, "b": drift, "c": drift})
    ratio = samples.ratio(["a", "b"], ["c"])
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((3.0, 3.0, 3.0))
    assert samples.median_ms("a").low < samples.median_ms("a").high


def test_rates_divide_rounds_by_their_total_time() -> None:
    assert Samples({"a": np.array([100.0, 300.0])}).per_second("a").value == pytest.approx(5.0)


def test_interleaving_runs_every_call_in_every_round_and_drops_the_warm_up() -> None:
    heard: list[str] = []
    samples = harness.sample_interleaved(
        {"a": lambda: heard.append("a"), "b": lambda: heard.append("b")}, rounds=7, warmup=2
    )
    assert samples.num_rounds == 7
    assert [sorted(heard[start : start + 2]) for start in range(0, 18, 2)] == [["a", "b"]] * 9


def test_a_spent_budget_still_leaves_enough_rounds() -> None:
    samples = harness.sample_interleaved({"a": lambda: None}, rounds=100, warmup=1, budget_s=0.0)
    assert samples.num_rounds == harness.MIN_ROUNDS


def test_a_fresh_process_is_another_process() -> None:
    assert harness.in_fresh_process(os.getpid) != os.getpid()


def test_peak_memory_is_at_least_what_is_resident() -> None:
    assert 1.0 < harness.memory_mib("VmRSS") <= harness.memory_mib("VmHWM")


def test_a_run_prints_its_headline_last_and_writes_every_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(options: Options) -> Report:
        headline = Headline("a/b", Estimate(0.8, 0.7, 0.9), "", 1.6)
        return Report([Section("[title]", ("x",), [("1 [0, 2]",)])], headline, {"quick": options.quick, "seen": [1.5]})

    target = tmp_path / "figures.json"
    monkeypatch.setattr(sys, "argv", ["benchmark", "--quick", "--threads", "1", "--json", str(target)])
    threads = torch.get_num_threads()
    try:
        with pytest.raises(SystemExit) as done:
            harness.run_benchmark("what it is", measure)
    finally:
        torch.set_num_threads(threads)
    assert done.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "a/b: 0.800 [0.700, 0.900], 0.50 x the goal of at most 1.6"
    assert any("[title]" in line for line in lines)
    stored = json.loads(target.read_text())
    assert stored["figures"] == {"quick": True, "seen": [1.5]}
    assert {"machine", "versions", "options", "load_average_1min", "headline"} <= set(stored)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["ds_mbnet", "mobilenet_v2", "ds_vit"])
def test_both_ways_of_the_supernet_step_compute_the_same_losses(model: str) -> None:
    networks = Networks(Workload("cpu", 32, 4, "float32", channels_last=True, seed=0, threads=1, model=model))
    ours, static = networks.ours()(), networks.static()()
    assert set(ours) == set(static)
    for name, loss in static.items():
        torch.testing.assert_close(ours[name], loss, rtol=1e-4, atol=1e-4)


def test_every_round_of_the_supernet_step_does_the_same_work() -> None:
    networks = Networks(Workload("cpu", 32, 2, "float32", channels_last=False, seed=0, threads=1))
    before = {name: value.clone() for name, value in networks.student.named_parameters()}
    networks.ours_with_update()()
    assert all(torch.equal(value, before[name]) for name, value in networks.student.named_parameters())


def test_the_cpu_workload_of_the_goal_is_the_first() -> None:
    first = workloads(Options(quick=False, threads=2, seed=0))[0]
    assert (first.device, first.image_size, first.batch_size) == ("cpu", 64, 32)


def test_a_made_up_table_is_a_whole_trial() -> None:
    gate, val = synthetic_table(DIGITS, "gate", 0), synthetic_table(DIGITS, "val", 1)
    result = fit_gate(gate, val, next(trial_settings(gate.num_routes, 0)))
    assert (val.num_images, val.num_routes) == (270, 6)
    assert 0.0 < result.metrics["top1"] < 1.0
    assert result.run.histogram.sum() == pytest.approx(1.0)
