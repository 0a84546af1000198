"""The configuration of the search: conditions of a space, constraints, first points, sampler,
pruner, sweeps of supernets."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dsnet.errors import ConfigError
from dsnet.gates.fit import fit_gates
from dsnet.measure.latency_table import latency_metric
from orchestration.config.distribution import Distribution, thawed
from orchestration.config.gate import GateConfig
from orchestration.config.presets import BUILT_IN_PRESETS
from orchestration.config.resolve import (
    constraint_set,
    enqueued_points,
    gate_space,
    halving_rungs,
    resolve_cohort,
    resolve_space,
    supernet_space,
    target_set,
)
from orchestration.config.space import (
    PUBLISHED,
    flat_gate,
    readers,
    supernet_combinations,
    supernet_with,
    sweepable_keys,
)
from orchestration.config.stage_keys import stage_subset
from orchestration.config.sweep import SweepConfig, metric_names
from orchestration.config.warnings import config_warnings
from orchestration.config.written import json_schema, to_yaml
from orchestration.config.yaml_source import parse_yaml
from search.gate_trial import FIELDS, ROUTING_KEYS, gate_settings
from search.suggest.samplers import KNOWN_SAMPLERS
from search.suggest.space import check_point, parse_space
from tests.dsnet.samples import ROUTER_KINDS, random_table

MINIMAL: dict[str, Any] = {"version": 1, "name": "tiny", "data": {"name": "digits"}, "supernet": {"model": "ds_tiny"}}
TARGET = {"gate.target": {"uniform": [0.05, 0.9]}}
T_EASY = {"uniform": [0, 0.9]}
ROUTERS = {"gate.router": {"choice": ["gate", "evidence_gate", "cascade"]}}


def build(**sections: Any) -> SweepConfig:
    return SweepConfig.model_validate({**MINIMAL, **sections})


def refusal(**sections: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        build(**sections)
    return str(caught.value)


# ---- objectives


def test_three_objectives_and_latencies_of_named_devices() -> None:
    config = build(
        measure={"batch_sizes": [1, 8], "devices": {"server": {"threads": 4}, "gpu": {"device": "cuda"}}},
        metrics=[
            {"name": "top1", "goal": "maximize", "ref": 0.0},
            {"name": "madds_m", "goal": "minimize"},
            {"name": "latency_ms_batch8.gpu", "goal": "minimize"},
        ],
        export={"picks": ["max:top1 where latency_ms.server<=3"]},
    )
    latencies = ["latency_ms", "latency_ms_batch8"]
    names = ["top1", "top5", "madds_m", "p95_madds_m", "params_m", "balanced_top1", *latencies]
    names += [f"{name}.{device}" for device in ("server", "gpu") for name in latencies]
    assert list(metric_names(config)) == names
    assert {latency_metric(size, device) for size in (1, 8) for device in ("", "server", "gpu")} <= set(names)


def test_one_images_latency_has_one_name() -> None:
    metrics = [{"name": "top1", "goal": "maximize"}, {"name": "latency_ms_batch1", "goal": "minimize"}]
    assert "one image's latency is called 'latency_ms'" in refusal(metrics=metrics)


@pytest.mark.parametrize("name", ["my.server", "1st", "a-b", "", "x" * 33])
def test_a_device_needs_a_name_that_can_stand_in_an_expression(name: str) -> None:
    assert "is not a valid device name" in refusal(measure={"devices": {name: {}}})


def test_devices_enter_the_keys_of_measure_and_verify_only_where_there_are_some() -> None:
    none, some = build(), build(measure={"devices": {"server": {"threads": 4}}})
    for stage in ("measure", "verify"):
        assert "devices" not in stage_subset(none, stage)["measure"]  # type: ignore[arg-type,operator]
        assert stage_subset(none, stage) != stage_subset(some, stage)  # type: ignore[arg-type]
    assert stage_subset(none, "search") == stage_subset(some, "search")


def test_an_engine_enters_these_keys_only_where_it_is_not_torch() -> None:
    for wrap in (lambda own: own, lambda own: {"devices": {"server": own}}):
        none, torch, other = (build(measure=wrap(own)) for own in ({}, {"engine": "torch"}, {"engine": "onnxruntime"}))
        for stage in ("measure", "verify"):
            assert "engine" not in str(stage_subset(none, stage))  # type: ignore[arg-type]
            assert stage_subset(none, stage) == stage_subset(torch, stage)  # type: ignore[arg-type]
            assert stage_subset(none, stage) != stage_subset(other, stage)  # type: ignore[arg-type]
        assert stage_subset(none, "search") == stage_subset(other, "search")


# ---- constraints


def test_constraints_are_read_with_the_metrics_and_the_baseline() -> None:
    config = build(
        constraints=["top1 >= baseline.top1 - 0.01", {"hard": "params_m <= 5"}],
        budget={"target": ["top1>=0.9", "madds_m<=3"]},
    )
    constraints = constraint_set(config, {"baseline.top1": 0.8})
    assert [str(each) for each in constraints.soft] == ["top1 >= baseline.top1 - 0.01"]
    assert [str(each) for each in constraints.hard] == ["params_m <= 5"]
    with pytest.raises(ConfigError, match="top1 was not measured"):
        constraint_set(config, {})
    target = target_set(config, {})
    assert target.hold({"top1": 0.95, "madds_m": 3})
    assert not target.hold({"top1": 0.95, "madds_m": 4})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"constraints": ["top1 >="]}, "constraints.0: condition 'top1 >=', column 8"),
        ({"constraints": ["top1 >= 0", "mads_m <= 3"]}, "constraints.1.*did you mean 'madds_m'"),
        (
            {"constraints": [{"hard": "baseline.top2 <= 3"}]},
            "did you mean 'baseline.top5'|did you mean 'baseline.top1'",
        ),
        ({"constraints": ["top1 >= 0.5", {"hard": "top1  >= 0.5"}]}, "'top1 >= 0.5' is written twice"),
        ({"constraints": ["latency_ms.server <= 1"]}, "unknown metric 'latency_ms.server'"),
        ({"constraints": [3]}, "expected a condition such as"),
        ({"constraints": [{"soft": "top1 >= 0"}]}, "expected a condition such as .*; got a mapping with soft"),
        ({"budget": {"target": ["top1"]}}, "budget.target.0: condition 'top1', column 5"),
    ],
)
def test_a_condition_that_cannot_be_read_is_refused_before_anything_runs(
    sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        build(**sections)


# ---- conditions of the space


def test_where_the_router_is_swept_each_key_is_drawn_for_the_kinds_that_read_it() -> None:
    space = {**TARGET, **ROUTERS, "gate.sgs.t_easy": T_EASY, "gate.perceptron.hidden_units": {"int": [8, 64]}}
    resolved = resolve_space(build(space=space))
    assert {key: dict(distribution.when) for key, distribution in resolved.items()} == {
        "gate.target": {},
        "gate.router": {},
        "gate.sgs.t_easy": {"gate.router": ("gate", "evidence_gate")},
        "gate.perceptron.hidden_units": {"gate.router": ("evidence_gate",)},
    }
    assert list(resolved) == list(space)


@pytest.mark.parametrize("router", [None, "gate", {"choice": ["gate", "evidence_gate"]}])
def test_a_key_that_every_possible_router_reads_gets_no_condition(router: Any) -> None:
    space = {"gate.sgs.t_easy": T_EASY} | ({} if router is None else {"gate.router": router})
    assert resolve_space(build(space=space))["gate.sgs.t_easy"].when == ()


def test_a_written_condition_stays_and_is_only_narrowed_to_what_reads_the_key() -> None:
    space = {
        **ROUTERS,
        "gate.sgs.target": {"choice": ["extremes", "cheapest"]},
        "gate.sgs.t_easy": {**T_EASY, "when": {"gate.sgs.target": "extremes", "gate.router": ["gate", "cascade"]}},
    }
    resolved = resolve_space(build(space=space))
    assert dict(resolved["gate.sgs.t_easy"].when) == {"gate.router": ("gate",), "gate.sgs.target": ("extremes",)}
    assert dict(resolved["gate.sgs.target"].when) == {"gate.router": ("gate", "evidence_gate")}


def test_conditions_on_a_fixed_key_are_decided_beforehand() -> None:
    conditional = {"gate.sgs.t_easy": {**T_EASY, "when": {"gate.router": "gate"}}, **TARGET}
    assert resolve_space(build(space={**conditional, "gate.router": "gate"}))["gate.sgs.t_easy"].when == ()
    elsewhere = build(space={**conditional, "gate.router": "evidence_gate"})
    assert list(resolve_space(elsewhere)) == ["gate.target", "gate.router"]
    assert config_warnings(elsewhere) == [
        "space.gate.sgs.t_easy is never drawn: its conditions do not hold with the fixed values of space"
    ]


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"gate.sgs.t_easy": {**T_EASY, "when": {"gate.router": "gate"}}}, "gate.router is not in space"),
        ({**ROUTERS, "gate.sgs.t_easy": {**T_EASY, "when": {"gate.routr": "gate"}}}, "did you mean 'gate.router'"),
        (
            {**ROUTERS, "gate.sgs.t_easy": {**T_EASY, "when": {"gate.router": "gat"}}},
            "never is 'gat'; did you mean 'gate'",
        ),
        (
            {"gate.router": "gate", "gate.sgs.t_easy": {**T_EASY, "when": {"gate.router": "gat"}}},
            "must be one of .*got 'gat'",
        ),
        ({**TARGET, "gate.sgs.t_easy": {**T_EASY, "when": {"gate.target": 0.5}}}, "gate.target is drawn from uniform"),
        ({"gate.sgs.t_easy": {"choice": [0.1, 0.2], "when": {"gate.sgs.t_easy": 0.1}}}, "cannot depend on itself"),
        (
            {
                "gate.sgs.strategy": {"choice": ["try_best", "give_up"], "when": {"gate.sgs.target": "extremes"}},
                "gate.sgs.target": {"choice": ["extremes", "cheapest"], "when": {"gate.sgs.strategy": "give_up"}},
            },
            "gate.sgs.strategy and gate.sgs.target depend on each other",
        ),
        (
            {
                "gate.sgs.target": {"choice": ["extremes", "cheapest"]},
                "gate.sgs.strategy": {"choice": ["try_best", "give_up"], "when": {"gate.sgs.target": "extremes"}},
                "gate.sgs.t_hard": {**T_EASY, "when": {"gate.sgs.target": "cheapest", "gate.sgs.strategy": "give_up"}},
            },
            "the conditions never hold",
        ),
        (
            {**TARGET, "gate.sgs.target": {"choice": ["extremes", "cheapest"]}}
            | {"gate.router": {"choice": ["gate", "cascade"], "when": {"gate.sgs.target": "extremes"}}},
            "gate.router cannot be conditional",
        ),
        (
            {"gate.routing.stride": {"int": [1, 3]}, "gate.sgs.t_easy": {**T_EASY, "when": {"gate.routing.stride": 4}}},
            "gate.routing.stride never is 4; it is drawn from 1 to 3",
        ),
    ],
)
def test_a_condition_that_means_nothing_is_refused(space: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        build(space=space)


def test_rules_between_settings_look_at_what_can_come_together() -> None:
    """A first route behind the last one, and two kinds of target, are refused only where a trial
    could have both."""
    router = {"gate.router": {"choice": ["gate", "evidence_gate"]}}
    for last_when, first_when, is_refused in (("gate", "gate", True), ("gate", "evidence_gate", False)):
        space = {
            **router,
            "gate.routing.first": {"int": [0, 4], "when": {"gate.router": first_when}},
            "gate.routing.last": {"int": [3, 6], "when": {"gate.router": last_when}},
        }
        assert ("no route would be left" in refusal(space=space)) if is_refused else build(space=space)
        space = {
            **router,
            "gate.target": {"uniform": [0, 1], "when": {"gate.router": first_when}},
            "gate.target_madds_m": {"uniform": [3, 9], "when": {"gate.router": last_when}},
        }
        assert ("would replace gate.target" in refusal(space=space)) if is_refused else build(space=space)
    space = {**router, "gate.routing.first": {"int": [0, 4], "when": {"gate.router": "gate"}}}
    assert "no route would be left" in refusal(space=space, gate={"routing": {"last": 2}})
    assert build(space=space, gate={"routing": {"last": 4}})


CONDITIONAL_SPACES = st.fixed_dictionaries(
    {
        "gate.router": st.lists(st.sampled_from(ROUTER_KINDS), min_size=1, max_size=4, unique=True).map(
            lambda k: {"choice": k}
        ),
        "gate.target": st.just(TARGET["gate.target"]),
    },
    optional={
        "gate.sgs.t_easy": st.just(T_EASY),
        "gate.sgs.target": st.just({"choice": ["extremes", "cheapest"]}),
        "gate.perceptron.hidden_units": st.sampled_from([16, {"int": [8, 16]}]),
        "gate.optimizer.lr": st.just({"loguniform": [0.001, 0.3]}),
        "gate.losses.quality": st.just({"choice": [0.0, 1.0]}),
        "gate.routing.beam": st.just({"int": [2, 5]}),
        "supernet.train.lr": st.just({"choice": [0.05, 0.1]}),
    },
)


SCHEMA = jsonschema.Draft202012Validator(json_schema())


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(CONDITIONAL_SPACES)
def test_the_resolved_space_is_one_that_the_search_reads_and_is_resolved_already(space: dict[str, Any]) -> None:
    config = build(space=space)
    assert SweepConfig.model_validate(parse_yaml(to_yaml(config), "resolved").data) == config
    SCHEMA.validate(json.loads(config.model_dump_json()))
    written = {key: distribution.written() for key, distribution in gate_space(config).items()}
    again = build(space=written)
    assert resolve_space(again) == gate_space(config)
    read = parse_space(written)
    for point in enqueued_points(config):
        check_point(read, point)
    assert {**supernet_space(config), **gate_space(config)} == resolve_space(config)
    assert stage_subset(again, "search")["sampler"] == stage_subset(config, "search")["sampler"]


# ---- which router reads what


GATE_TABLE, VAL_TABLE = (
    random_table(num_routes=4, num_gates=2, seed=seed, split=split) for seed, split in ((0, "gate"), (1, "val"))
)
"""Two gates, so that all kinds of router can be trained on it."""
BASE: dict[str, Any] = flat_gate(GateConfig()) | {
    "gate.losses.quality": 0.5,  # so that quality_of counts
    "gate.sgs.strategy": "give_up",  # so that t_hard does
    "gate.optimizer.steps": 6,
    "gate.optimizer.batch_size": 20,
}
MADDS_M = GATE_TABLE.madds / 1e6
CHANGES: dict[str, list[Any]] = {
    "gate.target": [0.1, 0.9],
    "gate.target_madds_m": [float(MADDS_M.min()) * 1.1, float(MADDS_M.max()) * 0.95],
    "gate.perceptron.hidden_units": [5, 50],
    "gate.routing.first": [1, 2],
    "gate.routing.last": [1, 2],
    "gate.routing.stride": [2, 3],
    "gate.routing.beam": [2, 3],
    "gate.sgs.t_easy": [0.3, 0.9],
    "gate.sgs.t_hard": [0.3, 0.9],
    "gate.sgs.strategy": ["try_best"],
    "gate.sgs.target": ["cheapest"],
    "gate.losses.cls": [0.0, 3.0],
    "gate.losses.sgs": [0.0, 3.0],
    "gate.losses.complexity": [0.0, 9.0],
    "gate.losses.form": ["quadratic", "paper", "paper_raw"],
    "gate.losses.quality": [0.0, 3.0],
    "gate.losses.quality_of": ["probability"],
    "gate.optimizer.name": ["sgd"],
    "gate.optimizer.lr": [0.001, 0.5],
    "gate.optimizer.weight_decay": [0.01, 1.0],
    "gate.optimizer.steps": [3, 9],
    "gate.optimizer.batch_size": [7, 60],
    "gate.temperature.start": [0.2, 5.0],
    "gate.temperature.end": [0.1, 5.0],
}


def trained(points: list[dict[str, Any]]) -> list[Any]:
    """For each point, everything that identifies the router trained from it."""
    settings_of = [gate_settings(point, BASE, GATE_TABLE, seed=3) for point in points]
    found = []
    for fit in fit_gates(GATE_TABLE, VAL_TABLE, settings_of):
        assert not isinstance(fit, Exception), fit
        tensors, values = fit.router.to_arrays()
        found.append(({name: tensor.tolist() for name, tensor in tensors.items()}, values))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("router", ROUTER_KINDS)
def test_a_router_changes_with_the_settings_it_is_said_to_read_and_with_no_other(router: str) -> None:
    keys = [key for key in sweepable_keys() if key.startswith("gate.") and key != "gate.router"]
    assert sorted(keys) == sorted(CHANGES) == sorted({*FIELDS, *ROUTING_KEYS} - {"gate.router"})
    changed = [(key, value) for key in keys for value in CHANGES[key]]
    plain, *others = trained(
        [{"gate.router": router}, *({"gate.router": router, key: value} for key, value in changed)]
    )
    felt = {key for (key, _), other in zip(changed, others, strict=True) if other != plain}
    said = {key for key in keys if readers(key) is None or router in (readers(key) or ())}
    assert felt == said


HALVED: dict[str, Any] = {"space": TARGET, "gate": {"trainer": "end_to_end"}, "pruner": {"name": "pareto_halving"}}


@pytest.mark.parametrize(
    ("sections", "count"),
    [
        ({"space": {**TARGET, "gate.perceptron.hidden_units": {"int": [8, 64]}}}, 1),
        ({"space": {**TARGET, "gate.sgs.t_easy": T_EASY}, "gate": {"router": "cascade"}}, 1),
        ({"space": {**TARGET, **ROUTERS, "gate.perceptron.hidden_units": {"int": [8, 64]}}}, 0),
        ({"space": {**TARGET, "gate.sgs.t_easy": T_EASY}, "gate": {"sgs": {"target": "cheapest"}}}, 1),
        ({"space": {**TARGET, "gate.sgs.t_easy": T_EASY, "gate.sgs.target": "cheapest"}}, 1),
        ({"space": {**TARGET, "gate.sgs.t_easy": T_EASY, "gate.losses.sgs": 0.0}}, 1),
        ({"space": {**TARGET, "gate.sgs.t_easy": T_EASY, "gate.losses.sgs": {"uniform": [0, 1]}}}, 0),
        ({"space": {**TARGET, "gate.sgs.t_hard": T_EASY}}, 1),
        ({"space": {**TARGET, "gate.sgs.t_hard": T_EASY}, "gate": {"sgs": {"strategy": "give_up"}}}, 0),
        ({"space": {**TARGET, "gate.losses.quality_of": {"choice": ["correct", "probability"]}}}, 1),
        ({"supernets": {"number": 2}}, 1),
        ({"sampler": {"order": "asynchronous"}}, 1),
        ({"sampler": {"name": "grid"}, "space": TARGET}, 1),
        ({"sampler": {"name": "grid", "options": {"points": 4}}, "space": TARGET}, 0),
        ({"budget": {"plateau": {"trials": 256}}}, 1),
        ({"budget": {"plateau": {"trials": 255}}}, 0),
        ({"sampler": {"enqueue": [{"gate.target": 0.5}]}, "budget": {"trials": 1}, "space": TARGET}, 2),
        ({**HALVED, "constraints": [{"hard": "top1 >= 0.9"}]}, 1),
        ({**HALVED, "constraints": ["top1 >= 0.9", {"hard": "params_m <= 5"}]}, 0),
        ({"constraints": [{"hard": "top1 >= 0.9"}]}, 0),
        ({"sampler": {"name": "gp", "startup": 300}}, 1),
        ({"sampler": {"name": "nsga3"}, "budget": {"trials": 64}}, 1),
        ({"sampler": {"name": "qmc"}, "budget": {"trials": 64}}, 0),
    ],
)
def test_what_has_no_effect_is_warned_about(sections: dict[str, Any], count: int) -> None:
    assert len(config_warnings(build(**sections))) == count


# ---- sampler, first points, pruner


@pytest.mark.parametrize("name", [*KNOWN_SAMPLERS, "optuna.samplers.RandomSampler"])
def test_every_sampler_is_accepted_by_name(name: str) -> None:
    space = {"gate.target": {"step": [0.1, 0.9, 0.1]}}
    config = build(sampler={"name": name}, space=space)
    assert resolve_cohort(config) == (8 if name == "gp" else 64)
    assert resolve_cohort(build(sampler={"name": name, "cohort": 5}, space=space)) == 5


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ({"name": "tpee"}, "sampler.name: unknown sampler 'tpee'; did you mean 'tpe'"),
        ({"name": "no.such.Sampler"}, "sampler.name: cannot import"),
        ({"name": "tpe", "options": {"n_ei_candidate": 3}}, "sampler.options.n_ei_candidate: tpe has no such option"),
        ({"name": "grid", "options": {"points": 0}}, "sampler.options.points: is 0, but must be 1 or more"),
        ({"name": "grid", "options": {"points": 100}}, "sampler.name: grid: the space has"),
        (
            {"enqueue": [{"gate.target": 0.5}, {"gate.targt": 1}]},
            "enqueue.1.gate.targt: is not in space; did you mean 'gate.target'",
        ),
        ({"enqueue": [{"gate.target": 0.99}]}, r"enqueue.0.gate.target: 0.99 is not in uniform \[0.05, 0.9\]"),
        ({"enqueue": [{"gate.sgs.target": "cheap"}]}, r"'cheap' is not in choice \['extremes', 'cheapest'\]"),
        ({"enqueue": [{"gate.target": [1]}]}, "expected a number, text, true or false; got"),
        ({"enqueue": [{}]}, "enqueue.0: names no setting"),
        ({"enqueue": [{"supernet.train.lr": 0.1}]}, "supernets are drawn before the search"),
    ],
)
def test_a_sampler_that_could_not_start_is_refused(sampler: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        build(sampler=sampler)


def test_a_first_point_has_no_key_whose_condition_it_denies() -> None:
    space = {**ROUTERS, **TARGET, "gate.sgs.t_easy": T_EASY}
    assert build(
        space=space, sampler={"enqueue": [{"gate.router": "gate", "gate.sgs.t_easy": 0.1}, {"gate.router": "cascade"}]}
    )
    denied = refusal(space=space, sampler={"enqueue": [{"gate.router": "cascade", "gate.sgs.t_easy": 0.1}]})
    assert "is drawn only where gate.router is gate or evidence_gate, and this point has 'cascade'" in denied
    silent = refusal(space=space, sampler={"enqueue": [{"gate.sgs.t_easy": 0.1}]})
    assert "name gate.router in the point too" in silent


def test_the_published_settings_are_tried_first() -> None:
    (try_best, give_up) = enqueued_points(build())
    assert try_best == {
        "gate.router": "gate",
        "gate.target": 0.5,
        "gate.sgs.t_easy": 0.0,
        "gate.sgs.t_hard": 0.0,
        "gate.sgs.strategy": "try_best",
        "gate.sgs.target": "extremes",
        "gate.optimizer.lr": 0.05,
    }
    assert give_up == {**try_best, "gate.sgs.strategy": "give_up"}


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"space": {"gate.sgs.t_easy": {"uniform": [0.1, 0.9]}, **TARGET}}, [{"gate.target": 0.5}]),
        ({"space": {"gate.sgs.t_easy": {"uniform": [0.1, 0.9]}}}, []),
        ({"space": {"gate.target": 0.5}}, []),
        ({"space": TARGET, "sampler": {"enqueue": []}}, []),
        ({"space": TARGET, "sampler": {"enqueue": [{"gate.target": 0.25}]}}, [{"gate.target": 0.25}]),
        ({"space": {"gate.target": {"step": [0.0, 1.0, 0.25]}}, "sampler": {"name": "grid"}}, []),
        ({"space": {"gate.target": {"step": [0.0, 0.9, 0.3]}}}, []),
        ({"space": {**TARGET, **ROUTERS}}, [{"gate.target": 0.5, "gate.router": "gate"}]),
        (
            {"space": {**TARGET, "gate.router": {"choice": ["evidence_gate", "cascade"]}, "gate.sgs.t_easy": T_EASY}},
            [{"gate.target": 0.5}],
        ),
        (
            {"space": {"gate.losses.quality": {"choice": [0, 1]}, "gate.routing.beam": {"int": [3, 5]}}},
            [{"gate.losses.quality": 0.0, "gate.routing.beam": 4}],
        ),
        ({"space": {**TARGET, "supernet.train.lr": {"choice": [0.1, 0.2]}}}, [{"gate.target": 0.5}]),
    ],
)
def test_first_points_hold_what_the_space_holds(sections: dict[str, Any], expected: list[dict[str, Any]]) -> None:
    assert enqueued_points(build(**sections)) == expected


def test_the_published_settings_are_those_of_the_papers_preset() -> None:
    preset = BUILT_IN_PRESETS["paper"]["gate"]
    for key, value in PUBLISHED.items():
        found: Any = preset
        for part in key.split(".")[1:]:
            found = found.get(part, "try_best" if part == "strategy" else None)
        assert found == value, key


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"pruner": {"name": "pareto_halving"}},
            "pruner.name: pareto_halving ends long trials early; those of gate.trainer table",
        ),
        (
            {"pruner": {"name": "pareto_halving", "first_epochs": 30}, "gate": {"trainer": "end_to_end"}},
            "pruner.first_epochs: 30 is not below gate.end_to_end.epochs 30",
        ),
        (
            {
                "pruner": {"name": "pareto_halving"},
                "gate": {"trainer": "end_to_end"},
                "sampler": {"order": "asynchronous"},
            },
            "pareto_halving compares the trials of a cohort",
        ),
        ({"pruner": {"factor": 1}}, "greater than or equal to 2"),
    ],
)
def test_a_pruner_that_could_not_prune_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        build(**sections)


@pytest.mark.parametrize(
    ("first", "factor", "epochs", "rungs"), [(3, 3, 30, (3, 9, 27)), (3, 3, 27, (3, 9)), (1, 2, 2, (1,))]
)
def test_rungs_rise_by_the_factor_and_stay_below_the_end(
    first: int, factor: int, epochs: int, rungs: tuple[int, ...]
) -> None:
    pruner = {"name": "pareto_halving", "first_epochs": first, "factor": factor}
    gate = {"trainer": "end_to_end", "end_to_end": {"epochs": epochs}}
    assert halving_rungs(build(gate=gate, pruner=pruner)) == rungs
    assert halving_rungs(build(gate=gate)) == ()


SEARCH_CHANGES: list[tuple[dict[str, Any], bool]] = [
    ({"constraints": ["madds_m <= 3"]}, True),
    ({"constraints": []}, False),
    (
        {
            "metrics": [
                {"name": "top1", "goal": "maximize", "ref": 0.5},
                {"name": "madds_m", "goal": "minimize", "ref": 9},
            ]
        },
        False,
    ),
    ({"sampler": {"name": "nsga2"}}, True),
    ({"sampler": {"options": {"n_ei_candidates": 9}}}, True),
    ({"sampler": {"order": "asynchronous"}}, True),
    ({"sampler": {"enqueue": []}}, True),
    ({"sampler": {"cohort": 64}}, False),
    ({"pruner": {"factor": 5}}, False),
    ({"budget": {"plateau": {}, "target": ["top1 >= 0.9"], "trials": 5, "time_s": 3}}, False),
    ({"supernets": {"number": 9}}, False),
]


@pytest.mark.parametrize(("change", "is_another"), SEARCH_CHANGES)
def test_a_study_is_continued_unless_its_suggestions_or_results_would_differ(
    change: dict[str, Any], is_another: bool
) -> None:
    before, after = stage_subset(build(), "search"), stage_subset(build(**change), "search")
    assert (before != after) == is_another
    assert json.loads(json.dumps(after)) == after


def test_first_points_written_out_are_the_same_study_as_the_default_ones() -> None:
    default = build()
    written = build(sampler={"enqueue": enqueued_points(default)})
    assert stage_subset(default, "search") == stage_subset(written, "search")


def test_an_implied_condition_written_out_is_the_same_study() -> None:
    space = {**ROUTERS, "gate.sgs.t_easy": T_EASY}
    explicit = {**ROUTERS, "gate.sgs.t_easy": {**T_EASY, "when": {"gate.router": ["gate", "evidence_gate"]}}}
    assert stage_subset(build(space=space), "search") == stage_subset(build(space=explicit), "search")


# ---- sweeps of supernets


SUPERNETS: dict[str, Any] = {
    **TARGET,
    "supernet.train.lr": {"loguniform": [0.05, 0.2]},
    "supernet.regime": {"choice": ["ib", "ieb"]},
    "supernet.options.gated_widths": {"choice": [[[16, 24], [32, 48]], [[16, 32], [32, 64]]]},
}


def test_the_space_falls_into_supernets_and_gates() -> None:
    config = build(space=SUPERNETS)
    assert list(gate_space(config)) == ["gate.target"]
    assert list(supernet_space(config)) == list(SUPERNETS)[1:]
    assert SweepConfig.model_validate(parse_yaml(to_yaml(config), "resolved").data) == config
    lists = supernet_space(config)["supernet.options.gated_widths"].values
    assert len({*lists}) == 2, "lists of a choice can be told apart in a dictionary"
    assert supernet_space(build()) == {}


def test_each_supernet_is_the_section_with_its_own_settings() -> None:
    config = build(space=SUPERNETS)
    points = supernet_combinations(config.space)
    assert len(points) == 8
    made = [supernet_with(config.supernet, point) for point in points]
    assert len({each.model_dump_json() for each in made}) == 8
    assert {each.regime for each in made} == {"ib", "ieb"}
    assert made[0].options == {"gated_widths": [[16, 24], [32, 48]]}
    assert made[0].model == "ds_tiny"


def test_settings_of_supernets_may_depend_on_each_other() -> None:
    space = {
        **TARGET,
        "supernet.model": {"choice": ["ds_tiny", "ds_resnet"]},
        "supernet.options.depth": {"choice": [8, 14], "when": {"supernet.model": "ds_resnet"}},
    }
    points = supernet_combinations(build(space=space).space)
    assert points == [
        {"supernet.model": "ds_tiny"},
        {"supernet.model": "ds_resnet", "supernet.options.depth": 8},
        {"supernet.model": "ds_resnet", "supernet.options.depth": 14},
    ]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"supernet": {"model": "checkpoint", "init_from": "x"}, "space": SUPERNETS},
            "one finished network, whose settings cannot be swept",
        ),
        (
            {"supernet": {"model": "ds_tiny", "init_from": "x"}, "space": SUPERNETS},
            "supernet.init_from has weights for one network",
        ),
        (
            {"space": {**TARGET, "supernet.model": {"choice": ["ds_tiny", "checkpoint"]}}},
            "checkpoint is one finished network and cannot be swept",
        ),
        (
            {
                "space": {**TARGET, "supernet.train.warmup_epochs": {"choice": [1.0, 50.0]}},
                "supernet": {"model": "m", "train": {"epochs": 30}},
            },
            "no supernet can be made with 50.0: supernet.train.warmup_epochs: 50 epochs of warm-up do not fit into 30",
        ),
        (
            {
                "space": {**TARGET, "supernet.train.num_random": {"choice": [0, 2]}},
                "supernet": {"model": "m", "regime": "ieb"},
            },
            "no supernet can be made with 0: supernet.train.num_random: ieb averages",
        ),
        (
            {"space": {**ROUTERS, "supernet.train.lr": {"choice": [0.1, 0.2], "when": {"gate.router": "gate"}}}},
            "supernets are drawn and trained first",
        ),
        (
            {
                "space": {
                    "supernet.regime": {"choice": ["ib", "ieb"]},
                    "gate.target": {**T_EASY, "when": {"supernet.regime": "ib"}},
                }
            },
            "supernets are drawn and trained first",
        ),
        ({"supernets": {"scheduler": "ashaa"}}, "supernets.scheduler: unknown scheduler 'ashaa'; did you mean 'asha'"),
        ({"supernets": {"scheduler": "none", "options": {"grace_period": 3}}}, "scheduler none takes no options"),
        ({"supernets": {"options": {"grace": 3}}}, "supernets.options.grace: no option of supernets.scheduler asha"),
        (
            {
                "supernets": {"options": {"grace_period": 999}},
                "supernet": {"model": "m", "train": {"epochs": 30}},
            },
            "grace_period: 999 is above supernet.train.epochs",
        ),
    ],
)
def test_a_sweep_of_supernets_that_could_not_be_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        build(**sections)


@pytest.mark.parametrize(
    ("supernets", "said"),
    [
        ({"report_every": 8}, ["supernets.report_every 8 is not below supernet.train.epochs 8"]),
        ({"options": {"grace_period": 8}}, ["supernets.options.grace_period 8 is not below supernet.train.epochs 8"]),
        ({"options": {"grace_period": 7}, "report_every": 7}, []),
        ({"scheduler": "none", "report_every": 8}, []),
    ],
)
def test_a_scheduler_that_would_stop_nothing_is_warned_about(supernets: dict[str, Any], said: list[str]) -> None:
    space = {**TARGET, "supernet.train.epochs": {"choice": [6, 8]}}
    warnings = config_warnings(build(space=space, supernets=supernets))
    assert [warning.partition(":")[0] for warning in warnings] == said


def test_a_contradiction_of_some_supernets_only_is_warned_about() -> None:
    space = {
        **TARGET,
        "supernet.train.epochs": {"choice": [2, 30]},
        "supernet.train.warmup_epochs": {"choice": [1.0, 5.0]},
    }
    (warning,) = config_warnings(build(space=space))
    assert "count as failed: with supernet.train.epochs 2, supernet.train.warmup_epochs 5.0" in warning


def test_start_weights_may_be_shared_by_supernets_of_one_shape() -> None:
    space = {**TARGET, "supernet.train.lr": {"choice": [0.1, 0.2]}}
    assert build(supernet={"model": "ds_tiny", "init_from": "x"}, space=space)


def test_the_schema_needs_no_sampler_library() -> None:
    code = "import sys; from orchestration.config.written import json_schema; json_schema(); print('optuna' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ---- single values of a space


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(
        [
            Distribution("int", (2, 11, 3)),
            Distribution("int", (0, 4)),
            Distribution("step", (0.0, 0.9, 0.3)),
            Distribution("choice", (2, 2.5, "a", True, (1, 2))),
            Distribution("fixed", ("x",)),
        ]
    ),
    st.one_of(
        st.integers(-1, 12),
        st.integers(-3, 12).map(lambda tenths: tenths / 10),
        st.sampled_from(["a", "x", True, False, [1, 2]]),
    ),
)
def test_a_distribution_holds_just_the_values_that_can_be_listed(distribution: Distribution, value: Any) -> None:
    listed = [thawed(each) for each in distribution.values]
    if distribution.kind in ("int", "step"):
        low, high, step = (*distribution.values, 1)[:3]
        listed = [low + index * step for index in range(distribution.size or 0)]
        assert listed[-1] == pytest.approx(high)
    is_listed = any(
        isinstance(each, bool) == isinstance(value, bool)
        and (
            each == value if isinstance(each, str | list) or isinstance(value, str | list) else abs(each - value) < 1e-9
        )
        for each in listed
    )
    is_listed = is_listed and not (distribution.kind == "int" and isinstance(value, float))
    assert distribution.holds(value) == is_listed
    assert len(listed) == distribution.size
