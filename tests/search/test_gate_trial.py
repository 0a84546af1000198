"""A cohort of trials: dotted parameters to trained routers and their numbers."""

from __future__ import annotations

import warnings
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch

from dsnet.families import layout
from dsnet.gates.fit import fit_gate, score_run
from dsnet.gates.problem import beam
from dsnet.gates.settings import GateSettings
from dsnet.measure.latency_table import LatencyTable, Timing
from dsnet.routers.cascade import CascadeRouter
from dsnet.routing.table_routing import run_on_table
from dsnet.space.subnet_set import SubnetSet
from orchestration.config.space import sweepable_keys
from search.gate_trial import FIELDS, ROUTING_KEYS, GateScores, GateTrial, gate_settings, router_of, routing_ids
from search.study.runner import TrialOutcome, TrialSpec
from tests.dsnet.samples import ROUTER_KINDS, THREE_GATES, random_table, small_set, task
from tests.search.samples import DEFAULTS, latency

QUICK: dict[str, Any] = {
    "gate.optimizer.steps": 30,
    "gate.optimizer.batch_size": 32,
    "gate.perceptron.hidden_units": 4,
}


def trial_of(subnets: SubnetSet, num_gates: int) -> GateTrial:
    gate, val = (
        random_table(size, len(subnets), seed=size, num_gates=num_gates, split=split)
        for size, split in ((80, "gate"), (90, "val"))
    )
    return GateTrial(gate, val, GateScores(subnets, latency(subnets)), DEFAULTS)


@pytest.fixture
def trial() -> GateTrial:
    """Three routes and one gate."""
    return trial_of(small_set("ds_tiny"), 1)


@pytest.fixture
def deep_trial() -> GateTrial:
    """Eight paths through three gates."""
    return trial_of(layout("ds_resnet", task(), THREE_GATES), 3)


def one(trial: GateTrial, params: dict[str, Any], seed: int = 1) -> TrialOutcome:
    (outcome,) = trial([TrialSpec(0, seed, {**QUICK, **params})])
    assert outcome.state == "complete", outcome.reason
    return outcome


def numbers(outcome: TrialOutcome) -> dict[str, Any]:
    """All but the time."""
    return {"metrics": dict(outcome.metrics), **{name: value.tobytes() for name, value in outcome.arrays.items()}}


def test_every_key_that_a_sweep_may_vary_reaches_the_gate() -> None:
    assert {key for key in sweepable_keys() if key.startswith("gate.")} == {*FIELDS, *ROUTING_KEYS}
    assert set(FIELDS.values()) == {field.name for field in fields(GateSettings)} - {"routes", "seed"}


def test_the_defaults_of_the_configuration_are_those_of_the_gate() -> None:
    settings = gate_settings({}, DEFAULTS, random_table(10, 4), seed=0)
    assert settings == replace(GateSettings(), routes=(0, 1, 2, 3))


def test_a_parameter_overrides_its_default_and_no_other() -> None:
    table = random_table(10, 4)
    base = gate_settings({}, DEFAULTS, table, seed=5)
    changed = gate_settings({"gate.sgs.strategy": "give_up", "gate.target": 0.1}, DEFAULTS, table, seed=5)
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
    assert routing_ids(range(5), first, last, stride) == expected


def test_a_routing_space_counts_among_the_routes_that_are_kept_and_rises() -> None:
    assert routing_ids((4, 1, 7, 2), 1, -1, 1) == (1, 2, 7)
    assert routing_ids((4, 1, 7, 2), 0, 2, 2) == (4, 7)


@pytest.mark.parametrize(("first", "last"), [(3, 2), (5, -1), (0, -6)])
def test_an_empty_routing_space_is_refused_with_its_values(first: int, last: int) -> None:
    with pytest.raises(ValueError, match=f"gate.routing first={first}, last={last}, stride=1 selects none of the 5"):
        routing_ids(range(5), first, last, 1)


def test_a_beam_of_routes_is_chosen_by_the_gate_split_and_counted_by_cost() -> None:
    table = random_table(40, 8, seed=3)
    params = {"gate.routing.beam": 4}
    assert gate_settings(params, DEFAULTS, table, seed=0).routes == tuple(sorted(beam(table, 4)))
    assert gate_settings({**params, "gate.routing.first": 1}, DEFAULTS, table, seed=0).routes == tuple(
        sorted(beam(table, 4)[1:])
    )


def test_an_unknown_parameter_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"gate\.tarket.*gate\.target"):
        gate_settings({"gate.tarket": 0.3}, DEFAULTS, random_table(10, 3), seed=0)


def test_a_trial_is_the_router_fitted_with_its_parameters_and_its_seed(trial: GateTrial) -> None:
    params = {
        "gate.router": "evidence_gate",
        "gate.target": 0.4,
        "gate.routing.stride": 2,
        "gate.optimizer.lr": 0.1,
        "gate.losses.quality": 0.3,
    }
    outcome = one(trial, params, seed=123)
    settings = GateSettings(
        router="evidence_gate",
        target=0.4,
        routes=(0, 2),
        lr=0.1,
        steps=30,
        batch_size=32,
        hidden_units=4,
        lambda_quality=0.3,
        seed=123,
    )
    expected = fit_gate(trial.gate_table, trial.val_table, settings)
    assert {name: outcome.metrics[name] for name in expected.metrics} == expected.metrics
    for name, value in expected.router.to_arrays()[0].items():
        np.testing.assert_array_equal(outcome.arrays[name], value.numpy())
    np.testing.assert_array_equal(outcome.arrays["histogram"], expected.run.histogram)
    np.testing.assert_array_equal(outcome.arrays["runs"], expected.run.runs)


def test_a_perceptrons_seed_counts_and_equal_specs_give_equal_bits(trial: GateTrial) -> None:
    params = {"gate.router": "evidence_gate"}
    first, second, other = one(trial, params), one(trial, params), one(trial, params, seed=2)
    assert numbers(first) == numbers(second)
    assert numbers(first) != numbers(other)


def mixed_specs() -> list[TrialSpec]:
    """All kinds in turn, with slots that are not positions and two trials that must fail."""
    specs = [
        TrialSpec(10 + 3 * index, index, {**QUICK, "gate.router": kind, "gate.target": 0.1 + 0.03 * index})
        for index, kind in enumerate(3 * ROUTER_KINDS)
    ]
    specs[4] = replace(specs[4], params={**QUICK, "gate.routing.first": 9})
    diverging: dict[str, Any] = {"gate.optimizer.name": "sgd", "gate.optimizer.lr": 1e6, "gate.losses.quality": 1.0}
    specs[7] = replace(specs[7], params={**QUICK, **diverging})
    return specs


def test_every_slot_has_its_outcome_and_a_bad_trial_fails_alone(deep_trial: GateTrial) -> None:
    specs = mixed_specs()
    outcomes = {outcome.slot: outcome for outcome in deep_trial(specs)}
    assert sorted(outcomes) == [spec.slot for spec in specs]
    bad = {specs[4].slot: "ValueError: gate.routing", specs[7].slot: "NonFiniteLossError: "}
    for spec in specs:
        outcome = outcomes[spec.slot]
        assert outcome.duration_s > 0.0
        if spec.slot in bad:
            assert outcome.state == "failed"
            assert str(outcome.reason).startswith(bad[spec.slot])
            continue
        assert outcome.state == "complete", outcome.reason
        (alone,) = deep_trial([spec])
        assert numbers(outcome) == numbers(alone)


def test_a_cohort_of_failures_alone_is_answered_too(trial: GateTrial) -> None:
    specs = [TrialSpec(slot, 0, {"gate.target": 2.0}) for slot in (3, 5)]
    outcomes = trial(specs)
    assert [(outcome.slot, outcome.state) for outcome in outcomes] == [(3, "failed"), (5, "failed")]
    assert all("gate.target is 2.0" in str(outcome.reason) for outcome in outcomes)


@pytest.mark.parametrize("kind", ROUTER_KINDS)
def test_the_stored_arrays_make_a_router_that_decides_and_scores_as_the_trial_said(
    deep_trial: GateTrial, kind: str
) -> None:
    outcome = one(deep_trial, {"gate.router": kind, "gate.routing.first": 1, "gate.target": 0.4})
    router = router_of(outcome.arrays)
    assert router.kind == kind
    assert 0 not in router.routes
    table = deep_trial.val_table
    run = run_on_table(router, table)
    scores = score_run(run, table)
    assert {name: outcome.metrics[name] for name in scores} == scores
    np.testing.assert_array_equal(outcome.arrays["histogram"], np.bincount(run.routes, minlength=8) / 90)
    np.testing.assert_array_equal(outcome.arrays["runs"], run.ran.mean(0))


def test_latency_counts_every_route_that_ran(trial: GateTrial) -> None:
    for kind in ("gate", "cascade", "learned_cascade"):
        outcome = one(trial, {"gate.router": kind, "gate.target": 0.6})
        assert outcome.metrics["latency_ms"] == pytest.approx(1.5 + float(outcome.arrays["runs"] @ [1.0, 2.0, 3.0]))
        router = router_of(outcome.arrays)
        if isinstance(router, CascadeRouter):
            assert outcome.arrays["runs"][router.first] == 1.0
            assert outcome.arrays["runs"].sum() == pytest.approx(1.0 + outcome.arrays["histogram"][router.second])


def test_every_batch_size_and_device_has_a_latency_composed_of_its_own_table(trial: GateTrial) -> None:
    subnets = trial.scores.subnets
    names = [subnet.name for subnet in subnets]

    def table(slower: float) -> LatencyTable:
        sizes = (1, 4)
        whole = {size: {name: Timing(0.0, 0.0, 1) for name in names} for size in (1, 4, 6)}
        tails = {n: {name: Timing(slower * n * (1 + k), 0.0, 1) for k, name in enumerate(names)} for n in sizes}
        return LatencyTable(
            "a clock",
            1,
            whole,
            {n: Timing(slower * n, 0.0, 1) for n in sizes},
            {n: Timing(0.5, 0.0, 1) for n in sizes},
            tails,
            {"learned_cascade": {n: Timing(10.0, 0.0, 1) for n in sizes}},
        )

    scores = GateScores(subnets, table(1.0), {"server": table(3.0)})
    for kind, decide in (("gate", 0.5), ("cascade", 0.5), ("learned_cascade", 10.0)):
        outcome = one(replace(trial, scores=scores), {"gate.router": kind, "gate.target": 0.6})
        once = 1.0 + float(
            outcome.arrays["runs"] @ [1.0, 2.0, 3.0]
        )  # times grow in proportion to the images, so that means do
        expected = {
            "latency_ms": once + decide,
            "latency_ms_batch4": 4 * once + decide,
            "latency_ms_batch6": 6 * once + 1.5 * decide,  # beyond the largest measured size
            "latency_ms.server": 3 * once + decide,
            "latency_ms_batch4.server": 12 * once + decide,
            "latency_ms_batch6.server": 18 * once + 1.5 * decide,
        }
        assert {name: value for name, value in outcome.metrics.items() if "latency" in name} == pytest.approx(expected)


def test_parameters_grow_with_the_routing_space_and_count_the_router(trial: GateTrial) -> None:
    few = one(trial, {"gate.routing.last": 1}).metrics["params_m"]
    many = one(trial, {}).metrics["params_m"]
    rich = one(trial, {"gate.router": "evidence_gate"}).metrics["params_m"]
    assert 0 < few < many
    hidden = trial.gate_table.part("hidden").shape[1]
    perceptron = 4 * (9 + hidden) + 4 + 3 * 4 + 3
    assert round((rich - many) * 1e6) == perceptron - 3 * hidden


def test_a_trial_leaves_the_shared_tables_as_they_were(deep_trial: GateTrial) -> None:
    tables = (deep_trial.gate_table, deep_trial.val_table)
    frozen = [{name: array.copy() for name, array in table.arrays().items()} for table in tables]
    for table in tables:
        for array in table.arrays().values():
            array.flags.writeable = False  # as Ray's object store gives them
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        deep_trial(mixed_specs())
    for table, before in zip(tables, frozen, strict=True):
        assert all(np.array_equal(before[name], array) for name, array in table.arrays().items())


def test_a_trial_draws_nothing_from_the_global_generators(trial: GateTrial) -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    for kind in ROUTER_KINDS:
        one(trial, {"gate.router": kind})
    assert torch.equal(torch.get_rng_state(), state)
