"""One trial: dotted parameters to a trained gate and its numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dsnet.errors import NonFiniteLossError
from dsnet.latency import LatencyTable, Timing
from dsnet.routing_table import RoutingTable
from dsnet.training.gate import GateSettings, choose_routes, fit_gate, score_routes
from orchestration.config import GateConfig, sweepable_keys
from orchestration.stages import flatten
from search.gate_trial import FIELDS, ROUTING_KEYS, GateTrial, gate_settings, router_of, routing_ids
from search.runner import TrialSpec
from tests.dsnet.samples import random_table, small_set

DEFAULTS = flatten({"gate": GateConfig().model_dump(mode="json")})
QUICK = {"gate.optimizer.steps": 30, "gate.optimizer.batch_size": 32}


def latency(routes: tuple[str, ...]) -> LatencyTable:
    """1 ms of trunk, 0.5 ms to decide, and tails of 1, 2, 3, ... ms."""

    def timing(ms: float) -> Timing:
        return Timing(ms, 0.0, 1)

    tails = {name: timing(1.0 + index) for index, name in enumerate(routes)}
    return LatencyTable("a clock", 1, {}, {1: timing(1.0)}, {1: timing(0.5)}, {1: tails})


@pytest.fixture
def trial() -> GateTrial:
    gate, val = random_table(80, 3, seed=1), random_table(90, 3, seed=2, split="val")
    return GateTrial(gate, val, small_set("ds_tiny"), latency(val.routes), DEFAULTS)


def test_every_key_that_a_sweep_may_vary_reaches_the_gate() -> None:
    assert set(sweepable_keys()) == {*FIELDS, *ROUTING_KEYS}
    assert set(FIELDS.values()) == set(GateSettings.__dataclass_fields__) - {"routes", "seed"}


def test_the_defaults_of_the_configuration_are_those_of_the_gate() -> None:
    settings = gate_settings({}, DEFAULTS, 4, seed=0)
    assert settings == replace(GateSettings(), routes=(0, 1, 2, 3))


def test_a_parameter_overrides_its_default_and_no_other() -> None:
    base = gate_settings({}, DEFAULTS, 4, seed=5)
    changed = gate_settings({"gate.sgs.strategy": "give_up", "gate.target": 0.1}, DEFAULTS, 4, seed=5)
    assert changed == replace(base, strategy="give_up", target=0.1)


@pytest.mark.parametrize(
    ("first", "last", "stride", "expected"),
    [
        (0, -1, 1, (0, 1, 2, 3, 4)),
        (0, -1, 2, (0, 2, 4)),
        (1, 3, 2, (1, 3)),
        (1, 2, 3, (1,)),
        (2, 9, 1, (2, 3, 4)),
        (0, -2, 3, (0, 3)),
        (4, 4, 1, (4,)),
    ],
)
def test_a_routing_space_counts_from_first_to_last_inclusively(
    first: int, last: int, stride: int, expected: tuple[int, ...]
) -> None:
    assert routing_ids(5, first, last, stride) == expected


@pytest.mark.parametrize(("first", "last"), [(3, 2), (5, -1), (0, -6)])
def test_an_empty_routing_space_is_refused_with_its_values(first: int, last: int) -> None:
    with pytest.raises(ValueError, match=f"first={first}, last={last}, stride=1 holds none of the 5"):
        routing_ids(5, first, last, 1)


def test_an_unknown_parameter_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"gate\.tarket.*gate\.target"):
        gate_settings({"gate.tarket": 0.3}, DEFAULTS, 3, seed=0)


def test_a_trial_is_the_gate_fitted_with_its_parameters_and_its_seed(trial: GateTrial) -> None:
    params = {**QUICK, "gate.target": 0.4, "gate.routing.stride": 2, "gate.optimizer.lr": 0.1}
    metrics, arrays = trial(TrialSpec(7, 123, params))
    settings = GateSettings(target=0.4, routes=(0, 2), lr=0.1, steps=30, batch_size=32, seed=123)
    expected = fit_gate(trial.gate_table, trial.val_table, settings)
    assert {name: metrics[name] for name in expected.metrics} == expected.metrics
    assert np.array_equal(arrays["weight"], expected.router.weight.numpy())
    assert np.array_equal(arrays["histogram"], expected.histogram)


def test_the_same_spec_gives_the_same_bits_and_another_seed_does_not(trial: GateTrial) -> None:
    first, second = (trial(TrialSpec(0, 1, QUICK)) for _ in range(2))
    assert first[0] == second[0]
    assert all(np.array_equal(first[1][name], second[1][name]) for name in first[1])
    other = trial(TrialSpec(0, 2, QUICK))
    assert not np.array_equal(first[1]["weight"], other[1]["weight"])


def test_the_stored_arrays_make_a_router_that_decides_and_scores_as_the_trial_said(trial: GateTrial) -> None:
    metrics, arrays = trial(TrialSpec(0, 1, {**QUICK, "gate.routing.first": 1}))
    router = router_of(arrays)
    table = trial.val_table
    routes = choose_routes(router, table)
    assert set(routes.tolist()) <= {1, 2}
    scores = score_routes(routes, table, router.decision_madds)
    assert {name: metrics[name] for name in scores} == scores
    assert arrays["histogram"] == pytest.approx(np.bincount(routes, minlength=3) / len(routes))


def test_latency_is_the_histogram_over_the_measured_parts(trial: GateTrial) -> None:
    metrics, arrays = trial(TrialSpec(0, 1, QUICK))
    assert metrics["latency_ms"] == pytest.approx(1.5 + float(arrays["histogram"] @ [1.0, 2.0, 3.0]))


def test_parameters_grow_with_the_routing_space(trial: GateTrial) -> None:
    few = trial(TrialSpec(0, 1, {**QUICK, "gate.routing.last": 1}))[0]["params_m"]
    many = trial(TrialSpec(0, 1, QUICK))[0]["params_m"]
    assert 0 < few < many


def test_a_trial_leaves_the_shared_tables_as_they_were(trial: GateTrial) -> None:
    frozen = {name: array.copy() for name, array in trial.gate_table.arrays().items()}
    for array in (*trial.gate_table.arrays().values(), *trial.val_table.arrays().values()):
        array.flags.writeable = False  # as Ray's object store gives them
    trial(TrialSpec(0, 1, QUICK))
    assert all(np.array_equal(frozen[name], array) for name, array in trial.gate_table.arrays().items())


def test_a_trial_that_diverges_says_so(trial: GateTrial) -> None:
    with pytest.raises(NonFiniteLossError, match=r"gate\.optimizer\.lr"):
        trial(TrialSpec(0, 1, {**QUICK, "gate.optimizer.lr": 1e37}))


def test_a_trial_draws_nothing_from_the_global_generators(trial: GateTrial) -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    trial(TrialSpec(0, 1, QUICK))
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(trial.val_table, RoutingTable)
