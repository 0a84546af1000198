"""The baseline's metrics, and the bounds of each metric over all routers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from dsnet.gates.fit import GateFit, fit_gate, fit_gates, score_run
from dsnet.measure.latency_table import LatencyTable, Timing
from dsnet.measure.settings import MAIN_DEVICE
from dsnet.routing.routing_table import RoutingTable
from dsnet.routing.table_routing import run_on_table
from dsnet.space.cost import subnet_cost
from dsnet.space.subnet_set import SubnetSet
from orchestration.config.gate import GateConfig
from orchestration.config.sweep import SweepConfig
from orchestration.prepare.reach import metric_ranges
from orchestration.results.measured import MeasuredSubnet, static_metrics
from orchestration.runs.stages import canonical_settings
from search.gate_trial import GateScores, gate_settings
from tests.dsnet.samples import (
    ROUTER_KINDS,
    lively_supernet,
    random_router,
    small_supernet,
    supernet_table,
    three_gate_supernet,
)

DEFAULTS = canonical_settings({"gate": GateConfig().model_dump(mode="json")})
SUPERNETS = {"one gate": lively_supernet(), "three gates": three_gate_supernet()}
TABLES = {name: supernet_table(supernet, 30) for name, supernet in SUPERNETS.items()}
SIZE = 16


def sweep(space: dict[str, Any], gate: dict[str, Any] | None = None, **measure: Any) -> SweepConfig:
    return SweepConfig.model_validate(
        {
            "version": 1,
            "name": "t",
            "data": {"name": "digits"},
            "supernet": {"model": "ds_tiny"},
            "gate": gate or {},
            "space": space,
            "measure": measure,
        }
    )


def latency_of(subnets: SubnetSet, seed: int) -> LatencyTable:
    """Random times that do not depend on the number of images."""
    rng = np.random.default_rng(seed)

    def timings(sizes: tuple[int, ...] = (1, 2, 7)) -> dict[int, Timing]:
        return {size: Timing(float(rng.uniform(0.1, 5.0)), 0.0, 1) for size in sizes}

    names = [subnet.name for subnet in subnets]
    tails = {name: timings() for name in names}
    return LatencyTable(
        "a clock",
        1,
        {size: {name: Timing(1.0, 0.0, 1) for name in names} for size in (1, 3, 16)},
        timings(),
        timings(),
        {size: {name: tails[name][size] for name in names} for size in (1, 2, 7)},
        {kind: timings() for kind in ROUTER_KINDS[1:]},
    )


def outside(metrics: dict[str, float], ranges: dict[str, tuple[float, float]]) -> dict[str, Any]:
    return {
        name: (metrics[name], bounds) for name, bounds in ranges.items() if not bounds[0] <= metrics[name] <= bounds[1]
    }


@pytest.mark.slow
@given(
    which=st.sampled_from(sorted(SUPERNETS)),
    kind=st.sampled_from(ROUTER_KINDS),
    target=st.floats(0.0, 1.0),
    units=st.integers(1, 9),
    first=st.integers(0, 1),
    stride=st.integers(1, 2),
    is_swept=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_fitted_router_leaves_the_ranges(
    which: str, kind: str, target: float, units: int, first: int, stride: int, is_swept: bool, seed: int
) -> None:
    subnets, table = SUPERNETS[which].subnets, TABLES[which]
    own = {
        "gate.router": kind,
        "gate.target": target,
        "gate.perceptron.hidden_units": units,
        "gate.routing.first": first,
        "gate.routing.stride": stride,
    }
    if is_swept:
        space: dict[str, Any] = {
            "gate.router": {"choice": list(ROUTER_KINDS)},
            "gate.perceptron.hidden_units": {"int": [1, 9]},
            "gate.routing.first": {"int": [0, 1]},
            "gate.routing.stride": {"int": [1, 2]},
        }
        config = sweep(space)
    else:
        gate = {"router": kind, "perceptron": {"hidden_units": units}, "routing": {"first": first, "stride": stride}}
        config = sweep({"gate.target": {"uniform": [0, 1]}}, gate)
    quick = {"gate.optimizer.steps": 2, "gate.optimizer.batch_size": 8}
    (fit,) = fit_gates(table, table, [gate_settings({**own, **quick}, DEFAULTS, table, seed)])
    assume(isinstance(fit, GateFit))  # one route is too few for a cascade
    devices = {MAIN_DEVICE: latency_of(subnets, seed), "server": latency_of(subnets, seed + 1)}
    metrics = GateScores(subnets, devices[MAIN_DEVICE], {"server": devices["server"]}).metrics(fit)
    ranges = metric_ranges(config, subnets, SIZE, devices)
    assert {name for name in metrics if name.startswith("latency")} <= ranges.keys()
    assert outside(metrics, ranges) == {}
    beforehand = metric_ranges(config, subnets, SIZE)
    assert all(
        beforehand[name][0] <= low <= high <= beforehand[name][1]
        for name, (low, high) in ranges.items()
        if name in beforehand
    )


@pytest.mark.parametrize("which", SUPERNETS)
@pytest.mark.parametrize("kind", ROUTER_KINDS)
def test_no_router_of_random_weights_leaves_them_either(which: str, kind: str) -> None:
    subnets, table = SUPERNETS[which].subnets, TABLES[which]
    latency = latency_of(subnets, 5)
    config = sweep({"gate.target": {"uniform": [0, 1]}}, {"router": kind, "perceptron": {"hidden_units": 5}})
    ranges = metric_ranges(config, subnets, SIZE, {MAIN_DEVICE: latency})
    for seed in range(20):
        router = random_router(kind, table, seed)
        if kind == "learned_cascade":  # the sample reads more evidence than trained ones do
            continue
        run = run_on_table(router, table)
        metrics = GateScores(subnets, latency).metrics(GateFit(router, score_run(run, table), run))
        assert outside(metrics, ranges) == {}, seed


def constant(table: RoutingTable, subnets: SubnetSet, kind: str, target: float) -> dict[str, float]:
    params = {"gate.router": kind, "gate.target": target, "gate.optimizer.steps": 1}
    fit = fit_gate(table, table, gate_settings(params, DEFAULTS, table, 0))
    return GateScores(subnets, latency_of(subnets, 1)).metrics(fit)


def test_the_ends_of_a_gates_range_are_reached() -> None:
    subnets, table = SUPERNETS["one gate"].subnets, TABLES["one gate"]
    config = sweep({"gate.target": {"uniform": [0, 1]}})
    ranges = metric_ranges(config, subnets, SIZE, {MAIN_DEVICE: latency_of(subnets, 1)})
    cheap, dear = (constant(table, subnets, "gate", target) for target in (0.0, 1.0))
    assert cheap["madds_m"] == pytest.approx(ranges["madds_m"][0])
    assert dear["madds_m"] == pytest.approx(ranges["madds_m"][1])
    assert ranges["params_m"][0] == pytest.approx(cheap["params_m"]) == pytest.approx(ranges["params_m"][1])


def test_a_cascade_may_cost_two_tails_and_a_gate_one() -> None:
    subnets = small_supernet().subnets
    madds = sorted(subnet_cost(subnets.spec, subnet, SIZE).madds / 1e6 for subnet in subnets)
    trunk = subnet_cost(subnets.spec, subnets[0], SIZE).trunk_madds / 1e6
    cascade = metric_ranges(sweep({"gate.router": "cascade"}), subnets, SIZE)["madds_m"]
    assert cascade == pytest.approx((madds[0], madds[-1] + madds[-2] - trunk))
    hidden = subnets.spec.gates[0].hidden
    gate = metric_ranges(sweep({"gate.router": "gate"}), subnets, SIZE)["madds_m"]
    assert gate == pytest.approx((madds[0] + 3 * hidden / 1e6, madds[-1] + 3 * hidden / 1e6))
    both = metric_ranges(sweep({"gate.router": {"choice": ["gate", "cascade"]}}), subnets, SIZE)["madds_m"]
    assert both == pytest.approx((madds[0], cascade[1]))


def test_before_anything_is_measured_every_latency_is_possible() -> None:
    config = sweep(
        {"gate.target": {"uniform": [0, 1]}},
        None,
        batch_sizes=[8, 64],
        devices={"server": {"device": "cpu", "threads": 2}},
    )
    ranges = metric_ranges(config, small_supernet().subnets, SIZE)
    names = [
        name + device
        for name in ("latency_ms", "latency_ms_batch8", "latency_ms_batch64")
        for device in ("", ".server")
    ]
    assert {name: ranges[name] for name in ranges if name.startswith("latency")} == dict.fromkeys(
        names, (0.0, math.inf)
    )
    assert ranges["top1"] == ranges["top5"] == (0.0, 1.0)


def test_a_static_subnetwork_has_every_metric_that_a_trial_has_and_the_teacher_no_latency() -> None:
    subnets = small_supernet().subnets
    latencies = {MAIN_DEVICE: latency_of(subnets, 1), "server": latency_of(subnets, 2)}
    latencies["server"] = replace(
        latencies["server"], subnets={3: {subnet.name: Timing(7.0, 0.0, 1) for subnet in subnets}}
    )
    name = subnets[1].name
    found = static_metrics(MeasuredSubnet(name, 0.5, 0.75, 2_000_000, 30_000, False), latencies)
    parts = latencies["server"]
    assert found == {
        "top1": 0.5,
        "top5": 0.75,
        "madds_m": 2.0,
        "p95_madds_m": 2.0,
        "params_m": 0.03,
        "latency_ms": 1.0,
        "latency_ms_batch3": 1.0,
        "latency_ms_batch16": 1.0,
        "latency_ms.server": parts.trunk[1].median_ms + parts.tails[1][name].median_ms,
        "latency_ms_batch3.server": 7.0,
    }
    teacher = static_metrics(MeasuredSubnet("largest", 0.5, 0.75, 2_000_000, 30_000, True), latencies)
    assert set(teacher) == {"top1", "top5", "madds_m", "p95_madds_m", "params_m"}
