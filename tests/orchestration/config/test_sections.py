"""The configuration objects: ranges, rules between settings, distributions, YAML and JSON Schema,
stage subsets."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from dsnet.data.settings import DataSettings
from dsnet.settings import LARGEST_RATE
from dsnet.training.settings import REGIMES, Regime, TrainSettings
from orchestration.config.distribution import Distribution
from orchestration.config.measure import MeasureConfig
from orchestration.config.resolve import gate_space, known_fields, resolve_cohort, resolve_timeout_s, supernet_space
from orchestration.config.section import NAME_PATTERN, section_class
from orchestration.config.space import sweepable_keys
from orchestration.config.stage_keys import stage_subset
from orchestration.config.supernet import resolve_regime
from orchestration.config.sweep import SweepConfig
from orchestration.config.warnings import config_warnings
from orchestration.config.written import json_schema, to_yaml
from orchestration.config.yaml_source import parse_yaml
from search.suggest.space import parse_space
from tests.dsnet.samples import ROUTER_KINDS

MINIMAL: dict[str, Any] = {
    "version": 1,
    "name": "tiny",
    "data": {"name": "digits"},
    "supernet": {"model": "ds_tiny"},
}


def build(**sections: Any) -> SweepConfig:
    return SweepConfig.model_validate({**MINIMAL, **sections})


# Strategies for whole configurations: every section partly filled, all values legal.
PICKS = ("knee", "all", "trial-0042", "max:top1 where madds_m<=0.1", "min:madds_m where top1>=0.9 and top5>=0.99")
TEXT = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=12)
SHARE = st.floats(0, 1)
POSITIVE = st.floats(1e-9, 1e6)
COUNT = st.integers(1, 10_000)
SIZES = st.sets(st.integers(2, 512), max_size=5).map(lambda sizes: [1, *sorted(sizes)])
SPACE_ENTRIES = st.fixed_dictionaries(
    {"gate.target": st.tuples(st.floats(0, 0.4), st.floats(0.5, 1)).map(lambda ends: {"uniform": list(ends)})},
    optional={
        "gate.sgs.strategy": st.sampled_from([{"choice": ["try_best", "give_up"]}, "give_up"]),
        "gate.optimizer.lr": st.tuples(st.floats(1e-6, 0.1), st.floats(0.2, 1)).map(lambda e: {"loguniform": list(e)}),
        "gate.optimizer.steps": st.sampled_from([{"int": [10, 50, 20]}, {"choice": [5, 50]}, 12]),
        "gate.losses.cls": st.just({"step": [0.0, 1.0, 0.25]}),
        "gate.router": st.sampled_from([{"choice": ["gates", "cascade"]}, "evidence_gate"]),
        "gate.routing.beam": st.just({"int": [2, 8]}),
    },
)
OPTIONS = st.dictionaries(
    TEXT, st.one_of(st.booleans(), st.integers(), SHARE, TEXT, st.lists(COUNT, max_size=3)), max_size=3
)
CONFIGS = st.fixed_dictionaries(
    {
        "version": st.just(1),
        "name": st.from_regex(NAME_PATTERN.replace("$", r"\Z"), fullmatch=True),
        "data": st.fixed_dictionaries(
            {"name": st.just("cifar10")},
            optional={
                "path": st.one_of(st.none(), TEXT),
                "limit": COUNT,
                "augment": st.fixed_dictionaries(
                    {},
                    optional={
                        "crop_scale": st.tuples(st.floats(0.01, 0.4), st.floats(0.5, 1)).map(list),
                        "randaugment_magnitude": st.floats(0, 10),
                    },
                ),
                "splits": st.fixed_dictionaries(
                    {}, optional={"train": COUNT, "val": st.floats(0.1, 0.4), "test": st.none()}
                ),
            },
        ),
        "supernet": st.fixed_dictionaries(
            {"model": TEXT},
            optional={
                "options": OPTIONS,
                "train": st.fixed_dictionaries({}, optional={"lr": POSITIVE, "epochs": COUNT, "grad_clip": POSITIVE}),
                "device": st.sampled_from(["auto", "cpu", "cuda"]),
                "init_from": TEXT,
                "regime": st.sampled_from([None, *REGIMES]),
            },
        ),
    },
    optional={
        "seed": st.integers(0, 2**32 - 1),
        "space": SPACE_ENTRIES,
        "gate": st.fixed_dictionaries(
            {},
            optional={
                "target": SHARE,
                "temperature": st.fixed_dictionaries({"end": POSITIVE}),
                "router": st.sampled_from(ROUTER_KINDS),
                "routing": st.fixed_dictionaries({"beam": st.one_of(st.none(), st.integers(2, 9))}),
                "end_to_end": st.fixed_dictionaries({"epochs": COUNT, "augment": st.booleans()}),
            },
        ),
        "measure": st.fixed_dictionaries({"batch_sizes": SIZES, "group_sizes": SIZES}),
        "tracking": st.fixed_dictionaries(
            {"uri": st.sampled_from([None, "http://host:5000", "sqlite:///a b.db"]), "mlflow": st.booleans()}
        ),
        "export": st.fixed_dictionaries({"picks": st.lists(st.sampled_from(PICKS), min_size=1, max_size=3)}),
        "presets": st.dictionaries(TEXT, st.just({"budget": {"trials": 3}}), max_size=2),
    },
).map(SweepConfig.model_validate)
STORES = ("http://host:5000", "sqlite:///a b.db")


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(CONFIGS)
def test_config_to_yaml_to_config_is_identity(config: SweepConfig) -> None:
    assert SweepConfig.model_validate(parse_yaml(to_yaml(config), "resolved").data) == config


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(CONFIGS)
def test_every_valid_config_satisfies_the_json_schema(config: SweepConfig) -> None:
    jsonschema.validate(json.loads(config.model_dump_json()), json_schema())


def test_resolved_yaml_names_every_setting() -> None:
    data = parse_yaml(to_yaml(build()), "resolved").data

    def lookup(dotted: str) -> object:
        found: Any = data
        for key in dotted.split("."):
            found = found[key]
        return found

    for dotted in known_fields():
        if dotted != "presets":
            lookup(dotted)


def test_only_four_keys_have_no_default() -> None:
    required = {
        dotted
        for dotted, field in known_fields().items()
        if field.is_required() and not section_class(field.annotation)
    }
    assert required == {"version", "name", "data.name", "supernet.model"}


def test_config_is_frozen_and_travels_between_processes() -> None:
    config = build()
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 3
    assert pickle.loads(pickle.dumps(config)) == config  # noqa: S301


def test_importing_the_configuration_imports_no_heavy_library() -> None:
    code = (
        "import sys, orchestration.config.loading;"
        "print(sorted({'torch', 'ray', 'mlflow', 'optuna', 'pandas', 'plotly'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_setting_is_described_for_the_editor() -> None:
    described = {dotted for dotted, field in known_fields().items() if field.description}
    assert {dotted for dotted, field in known_fields().items() if not section_class(field.annotation)} <= described


@pytest.mark.parametrize(
    ("sections", "where"),
    [
        ({"seed": -1}, ("seed",)),
        ({"seed": 2**32}, ("seed",)),
        ({"seed": True}, ("seed",)),
        ({"version": True}, ("version",)),
        ({"version": 1.0}, ("version",)),
        ({"data": {"name": "digits", "image_size": 7}}, ("data", "image_size")),
        ({"data": {"name": "digits", "image_size": [8, 7]}}, ("data", "image_size")),
        ({"data": {"name": "digits", "image_size": [8, 8, 8]}}, ("data", "image_size")),
        ({"data": {"name": "digits", "image_size": [8.0, 9]}}, ("data", "image_size")),
        ({"data": {"name": "digits", "image_size": "8x9"}}, ("data", "image_size")),
        ({"data": {"name": "digits", "limit": 0}}, ("data", "limit")),
        ({"data": {"name": "digits", "splits": {"val": 1.0}}}, ("data", "splits", "val")),
        ({"data": {"name": "digits", "splits": {"val": True}}}, ("data", "splits", "val")),
        ({"data": {"name": "digits", "splits": {"val": 0}}}, ("data", "splits", "val")),
        ({"supernet": {"model": "m", "train": {"epochs": -1}}}, ("supernet", "train", "epochs")),
        ({"supernet": {"model": "m", "train": {"accumulate": 0}}}, ("supernet", "train", "accumulate")),
        ({"supernet": {"model": "m", "train": {"num_random": -1}}}, ("supernet", "train", "num_random")),
        ({"supernet": {"model": "m", "train": {"widths": "some"}}}, ("supernet", "train", "widths")),
        ({"supernet": {"model": "m", "train": {"teacher": "ib"}}}, ("supernet", "train", "teacher")),
        ({"supernet": {"model": "m", "train": {"bn": "batch_norm"}}}, ("supernet", "train", "bn")),
        ({"supernet": {"model": "m", "train": {"schedule": "linear"}}}, ("supernet", "train", "schedule")),
        ({"supernet": {"model": "m", "train": {"precision": "fp16"}}}, ("supernet", "train", "precision")),
        ({"supernet": {"model": "m", "train": {"channels_last": 1}}}, ("supernet", "train", "channels_last")),
        ({"supernet": {"model": "m", "regime": "IB"}}, ("supernet", "regime")),
        ({"supernet": {"model": "m", "init_from": ""}}, ("supernet", "init_from")),
        ({"supernet": {"model": "m", "recalibration": {"images": -1}}}, ("supernet", "recalibration", "images")),
        ({"data": {"name": "digits", "augment": {"randaugment_ops": -1}}}, ("data", "augment", "randaugment_ops")),
        (
            {"data": {"name": "digits", "augment": {"randaugment_magnitude": 10.5}}},
            ("data", "augment", "randaugment_magnitude"),
        ),
        ({"data": {"name": "digits", "augment": {"erasing": 1.1}}}, ("data", "augment", "erasing")),
        ({"data": {"name": "digits", "augment": {"crop_scale": [0.5]}}}, ("data", "augment", "crop_scale")),
        ({"data": {"name": "digits", "augment": {"crop_scale": 0.5}}}, ("data", "augment", "crop_scale")),
        ({"data": {"name": "digits", "stream": "no"}}, ("data", "stream")),
        ({"data": {"name": "image_folder", "image_size": 8, "crop_fraction": 0}}, ("data", "crop_fraction")),
        ({"data": {"name": "image_folder", "image_size": 8, "crop_fraction": 1.01}}, ("data", "crop_fraction")),
        ({"supernet": {"model": "m", "train": {"epochs": 3.0}}}, ("supernet", "train", "epochs")),
        ({"supernet": {"model": "m", "train": {"lr": 0}}}, ("supernet", "train", "lr")),
        ({"supernet": {"model": "m", "train": {"lr": float("nan")}}}, ("supernet", "train", "lr")),
        ({"supernet": {"model": "m", "train": {"lr": float("inf")}}}, ("supernet", "train", "lr")),
        ({"supernet": {"model": "m", "train": {"momentum": 1.0}}}, ("supernet", "train", "momentum")),
        ({"supernet": {"model": "m", "bootstrapping": {"ema_decay": 1}}}, ("supernet", "bootstrapping", "ema_decay")),
        ({"supernet": {"model": ""}}, ("supernet", "model")),
        ({"gate": {"target": 1.01}}, ("gate", "target")),
        ({"gate": {"target_madds_m": 0}}, ("gate", "target_madds_m")),
        ({"gate": {"router": "mlp"}}, ("gate", "router")),
        ({"gate": {"trainer": "tables"}}, ("gate", "trainer")),
        ({"gate": {"perceptron": {"hidden_units": 0}}}, ("gate", "perceptron", "hidden_units")),
        ({"gate": {"routing": {"beam": 1}}}, ("gate", "routing", "beam")),
        ({"gate": {"optimizer": {"lr": 2e6}}}, ("gate", "optimizer", "lr")),
        ({"gate": {"optimizer": {"weight_decay": 2e6}}}, ("gate", "optimizer", "weight_decay")),
        ({"gate": {"end_to_end": {"epochs": 0}}}, ("gate", "end_to_end", "epochs")),
        ({"gate": {"end_to_end": {"threads": 0}}}, ("gate", "end_to_end", "threads")),
        ({"gate": {"sgs": {"t_easy": -0.1}}}, ("gate", "sgs", "t_easy")),
        ({"gate": {"routing": {"stride": 0}}}, ("gate", "routing", "stride")),
        ({"gate": {"temperature": {"end": 0}}}, ("gate", "temperature", "end")),
        ({"budget": {"trials": 0}}, ("budget", "trials")),
        ({"budget": {"max_failed": 1.5}}, ("budget", "max_failed")),
        ({"sampler": {"startup": -1}}, ("sampler", "startup")),
        ({"sampler": {"cohort": 0}}, ("sampler", "cohort")),
        ({"trial": {"timeout_s": 0}}, ("trial", "timeout_s")),
        ({"trial": {"retries": -1}}, ("trial", "retries")),
        ({"measure": {"batch_sizes": []}}, ("measure", "batch_sizes")),
        ({"ray": {"object_store_mib": 74}}, ("ray", "object_store_mib")),
        ({"storage": {"runs": "a\x00b"}}, ("storage", "runs")),
        ({"export": {"picks": []}}, ("export", "picks")),
        ({"space": {}}, ("space",)),
        ({"metrics": [{"name": "top1", "goal": "maximize"}]}, ("metrics",)),
    ],
)
def test_values_out_of_range_are_refused_at_construction(sections: dict[str, Any], where: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError) as caught:
        build(**sections)
    assert [error["loc"] for error in caught.value.errors()] == [where]


@pytest.mark.parametrize("name", ["a/b", ".hidden", "", "a b", "x" * 65, "line\n", "é", ".."])
def test_names_that_make_no_folder_are_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="name"):
        build(name=name)


@pytest.mark.parametrize("name", ["a", "digits", "A-b_c.1", "x" * 64, "-dash"])
def test_names_that_make_a_folder_are_accepted(name: str) -> None:
    assert build(name=name).name == name


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"name": "image_folder"}}, "image_size: an image folder needs it"),
        ({"data": {"name": "digits", "path": "x"}}, "takes no folder; remove 'x'"),
        ({"data": {"name": "digits", "splits": {"train": 0.9, "gate": 0.2}}}, "train 0.9 \\+ gate 0.2 = 1.1"),
        (
            {"supernet": {"model": "m", "train": {"epochs": 2, "warmup_epochs": 3}}},
            "3 epochs of warm-up do not fit into 2",
        ),
        (
            {"supernet": {"model": "m", "bootstrapping": {"mode": "ieb", "num_random": 0}}},
            "bootstrapping.num_random: ieb averages the teacher with random sub-networks and needs at least 1",
        ),
        (
            {"supernet": {"model": "m", "regime": "ieb", "train": {"num_random": 0}}},
            "train.num_random: ieb averages",
        ),
        (
            {"supernet": {"model": "m", "regime": "ieb", "bootstrapping": {"mode": "ib"}}},
            "bootstrapping.mode: ib contradicts supernet.regime ieb, whose teacher is ema_ensemble; keep one",
        ),
        (
            {"supernet": {"model": "m", "regime": "mvco", "train": {"teacher": "inplace"}}},
            "train.views: teacher inplace sees no images of its own; choose teacher ema or ema_ensemble, or views same",
        ),
        (
            {"supernet": {"model": "m", "regime": "ib", "bootstrapping": {"num_random": 4}}},
            "bootstrapping.num_random: 4 contradicts supernet.regime ib, which draws 3; write it as supernet.train",
        ),
        (
            {"supernet": {"model": "m", "train": {"num_random": 2}, "bootstrapping": {"num_random": 3}}},
            "bootstrapping.num_random: 3 contradicts supernet.train.num_random 2, the newer name of this setting",
        ),
        (
            {"supernet": {"model": "m", "train": {"epochs": 0}}},
            "train.epochs: 0 keeps the weights of supernet.init_from",
        ),
        (
            {"supernet": {"model": "checkpoint"}},
            "model: checkpoint takes the network from supernet.init_from, which is",
        ),
        (
            {"supernet": {"model": "checkpoint", "init_from": "x", "options": {"width": 1}}},
            "options: model checkpoint takes no options: the checkpoint has its own; remove width",
        ),
        (
            {"supernet": {"model": "m", "init_from": "x", "recalibration": {"images": 0}}},
            "recalibration.images: 0 keeps the statistics of supernet.init_from, but training outdates them; write supernet.train.epochs 0",
        ),
        ({"data": {"name": "digits", "stream": True}}, "stream: only an image_folder can be streamed"),
        (
            {"data": {"name": "digits", "crop_fraction": 0.875}},
            "crop_fraction: only an image_folder is cropped; remove 0.875",
        ),
        (
            {"data": {"name": "image_folder", "image_size": 8, "stream": True, "augment": {"crop_padding": 2}}},
            "augment.crop_padding: 2 pixels have no use: streamed images are cropped by crop_scale",
        ),
        (
            {"data": {"name": "digits", "augment": {"crop_scale": [0.9, 0.1]}}},
            r"crop_scale: range \[0.9, 0.1\] is the wrong way round; write \[0.1, 0.9\]",
        ),
        (
            {"data": {"name": "digits", "augment": {"crop_scale": [0.1, 0.9], "crop_padding": 4}}},
            "crop_padding: 4 pixels cannot be combined with crop_scale",
        ),
        ({"gate": {"routing": {"first": 3, "last": 2}}}, "3 is above gate.routing.last 2"),
        ({"gate": {"losses": {"cls": 0, "sgs": 0, "complexity": 0}}}, "would learn nothing"),
        ({"measure": {"batch_sizes": [4, 2]}}, r"got \[4, 2\], write \[2, 4\]"),
        ({"measure": {"group_sizes": [1, 2, 2]}}, r"got \[1, 2, 2\], write \[1, 2\]"),
        ({"measure": {"group_sizes": [2, 4]}}, "must start at 1"),
        (
            {"gate": {"target_madds_m": 9.0}, "space": {"gate.target": {"uniform": [0.1, 0.9]}}},
            "gate.target_madds_m: gate.target_madds_m would replace gate.target, which is in space too; set",
        ),
        (
            {"space": {"gate.target_madds_m": {"uniform": [4.0, 9.0]}, "gate.target": 0.5}},
            "space.gate.target_madds_m: gate.target_madds_m would replace",
        ),
        ({"space": {"gate.target_madds_m": {"uniform": [0, 9.0]}}}, "gate.target_madds_m must be above 0"),
        (
            {"gate": {"trainer": "end_to_end", "router": "cascade"}},
            "gate.router: gate.trainer end_to_end trains gate and gates only, not cascade; choose gate.trainer table",
        ),
        (
            {
                "gate": {"trainer": "end_to_end"},
                "space": {"gate.router": {"choice": ["gate", "evidence_gate", "cascade"]}},
            },
            "space.gate.router: .* not evidence_gate, cascade; choose",
        ),
        ({"space": {"gate.router": {"choice": ["gate", "gatse"]}}}, "holds 'gatse', but gate.router must be one of"),
        (
            {"gate": {"trainer": "end_to_end", "losses": {"quality": 0.5}}},
            "gate.losses.quality: gate.trainer end_to_end has the published losses only",
        ),
        (
            {"gate": {"trainer": "end_to_end"}, "space": {"gate.losses.quality": {"uniform": [0, 1]}}},
            "space.gate.losses.quality: gate.trainer end_to_end has",
        ),
        ({"space": {"gate.trainer": "table"}}, "cannot be swept"),
        ({"space": {"gate.end_to_end.threads": 2}}, "cannot be swept"),
        ({"space": {"gate.routing.beam": {"int": [1, 4]}}}, "holds 1, but gate.routing.beam must be at least 2"),
        ({"space": {"gate.lr": 0.1}}, "cannot be swept; did you mean 'gate.optimizer.lr'"),
        ({"space": {"gate.targt": 0.1}}, "cannot be swept; did you mean 'gate.target'"),
        ({"space": {"data.limit": 9}}, "cannot be swept"),
        ({"space": {"supernet.train.lr": 0.1}}, "supernet.* keys only, so no gate would be searched"),
        (
            {"space": {"gate.target": 0.1, "supernet.workers": 2}},
            "cannot be swept: it has no influence on the trained supernet",
        ),
        ({"space": {"gate.target": 0.1, "supernet.init_from": "x"}}, "start weights are the same for all supernets"),
        ({"space": {"gate.target": 0.1, "supernet.options": "x"}}, "swept one by one, as supernet.options.NAME"),
        ({"space": {"gate.target": 0.1, "supernet.train.lr": {"uniform": [0, 1]}}}, "train.lr must be above 0"),
        ({"space": {"gate.target": 0.1, "supernet.train.lr": {"choice": [[1], [2]]}}}, "train.lr must be a number"),
        ({"space": {"gate.sgs": 0.1}}, "cannot be swept"),
        ({"space": {"gate.target": {"uniform": [0.5, 1.5]}}}, "holds 1.5, but gate.target must be at most 1"),
        ({"space": {"gate.target": {"uniform": [-0.5, 0.5]}}}, "holds -0.5, but gate.target must be at least 0"),
        ({"space": {"gate.target": 2}}, "holds 2, but gate.target must be at most 1"),
        ({"space": {"gate.target": {"choice": [0.1, "half"]}}}, "holds 'half', but gate.target must be a number"),
        ({"space": {"gate.optimizer.steps": {"uniform": [1, 9]}}}, "takes whole numbers; write {int"),
        (
            {"space": {"gate.sgs.strategy": {"choice": ["try_best", "giveup"]}}},
            "holds 'giveup'.*'try_best' or 'give_up'",
        ),
        (
            {"space": {"gate.routing.first": {"int": [0, 4]}, "gate.routing.last": {"int": [3, 6]}}},
            "no route would be left",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        build(**sections)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ([("top1", "maximize"), ("top5", "maximize")], "at least one metric to maximize and one to minimize"),
        ([("madds_m", "minimize"), ("latency_ms", "minimize")], "at least one metric to maximize and one to minimize"),
        ([("top1", "maximize"), ("top1", "maximize"), ("madds_m", "minimize")], "top1 is an objective already"),
        ([("top1", "maximize"), ("latency_ms_batch7", "minimize")], "measure.batch_sizes are 1, 64; add the size"),
        ([("top1", "maximize"), ("latency_ms.phone", "minimize")], "on no device 'phone'; measure.devices names none"),
        ([("top1", "minimize"), ("madds_m", "minimize")], "top1 is a metric to maximize"),
        ([("top1", "maximize"), ("madds", "minimize")], "unknown metric 'madds'; did you mean 'madds_m'"),
    ],
)
def test_objectives_are_known_gains_and_costs(metrics: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        build(metrics=[{"name": name, "goal": goal} for name, goal in metrics])


@pytest.mark.parametrize("ref", [0, -1.0])
def test_a_reference_that_no_cost_is_below_is_refused(ref: float) -> None:
    with pytest.raises(ValidationError, match="no madds_m is better than"):
        build(metrics=[{"name": "top1", "goal": "maximize"}, {"name": "madds_m", "goal": "minimize", "ref": ref}])


def test_reference_accuracy_is_a_fraction() -> None:
    with pytest.raises(ValidationError, match="fraction from 0 to 1; got 70"):
        build(metrics=[{"name": "top1", "goal": "maximize", "ref": 70}, {"name": "madds_m", "goal": "minimize"}])


NOT_NULL: dict[str, Any] = {
    "supernet.regime": "ib",
    "supernet.train.widths": "all",
    "supernet.train.teacher": "ema",
    "supernet.train.views": "same",
    "supernet.train.bn": "group_norm",
    "supernet.bootstrapping.mode": "ib",
}
"""A value of the settings that are null by default and take no number."""


@pytest.mark.parametrize("key", sweepable_keys())
def test_every_setting_of_gate_and_supernet_can_be_fixed_to_its_default_in_the_space(key: str) -> None:
    value: Any = build()
    for part in key.split("."):
        value = getattr(value, part)
    value = NOT_NULL.get(key, 4) if value is None else value
    other = "gate.optimizer.lr" if key.startswith("gate.target") else "gate.target"
    config = build(space={key: value, other: 0.5})
    assert config.space[key] == Distribution("fixed", (value,))
    part = supernet_space(config) if key.startswith("supernet.") else gate_space(config)
    assert key in part


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"uniform": [0.9, 0.05]}, r"uniform range \[0.9, 0.05\] is the wrong way round; write \[0.05, 0.9\]"),
        ({"int": [9, 1, 2]}, r"int range \[9, 1, 2\] is the wrong way round; write \[1, 9, 2\]"),
        ({"uniform": [0.5, 0.5]}, "has one value only; to fix it, write 0.5"),
        ({"loguniform": [0, 1]}, "must start above 0"),
        ({"loguniform": [-1.0, 1.0]}, "must start above 0"),
        ({"uniform": [0, 1, 2]}, r"written uniform: \[low, high\]"),
        ({"uniform": 3}, r"written uniform: \[low, high\]; got 3"),
        ({"uniform": ["a", 1]}, "takes numbers; got 'a'"),
        ({"uniform": [False, True]}, "takes numbers; got false"),
        ({"uniform": [0, float("inf")]}, "takes numbers; got inf"),
        ({"int": [0.5, 2]}, "takes whole numbers; got 0.5"),
        ({"int": [0, 5, 2]}, "does not reach its end 5 in steps of 2"),
        ({"int": [0, 5, 0]}, "needs a step above 0"),
        ({"step": [0, 1]}, r"written step: \[low, high, step\]"),
        ({"step": [0.0, 1.0, 0.3]}, "does not reach its end 1.0"),
        ({"step": [0.0, 1.0, 2.0]}, "does not reach its end 1.0"),
        ({"choice": []}, "nothing to choose from"),
        ({"choice": ["a", "b", "a"]}, "names 'a' twice"),
        ({"choice": [1, True]}, "names true twice"),
        ({"choice": [{"a": 1}, 2]}, "must be a number, text, true or false, or a list of these; got a mapping"),
        ({"choice": [[1], [2, []]]}, r"or a list of these; got \[2, \[\]\]"),
        ({"choice": [[1, 2], [1, 2]]}, r"choice names \[1, 2\] twice"),
        ({"uniform": [0, 1], "when": {}}, r"when is written \{KEY: value\}"),
        ({"uniform": [0, 1], "when": "gate"}, r"when is written \{KEY: value\} or \{KEY: \[value, ...\]\}; got 'gate'"),
        ({"uniform": [0, 1], "when": {"a": []}}, "when a: holds no value"),
        ({"uniform": [0, 1], "when": {"a": [1, 1.0]}}, "when a: names 1.0 twice"),
        ({"uniform": [0, 1], "when": {"a": None}}, "when a: a value must be a number"),
        ({"when": {"a": 1}}, "expected a distribution"),
        ({"unifrom": [0, 1]}, "unknown distribution 'unifrom'; did you mean 'uniform'"),
        ({"fixed": [1]}, "unknown distribution 'fixed'"),
        ({"uniform": [0, 1], "int": [0, 1]}, "expected a distribution"),
        ({}, "expected a distribution"),
        (None, "expected a distribution"),
        ([0, 1], "expected a distribution"),
    ],
)
def test_malformed_distributions_say_how_to_write_them(written: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Distribution.parse(written)


@pytest.mark.parametrize(
    "written",
    [
        {"uniform": [0.0, 1.0]},
        {"step": [0.0, 0.3, 0.1]},
        {"int": [0, 3]},
        {"int": [1, 9, 4]},
        {"choice": [1, 2.5, False, "1"]},
        {"choice": [[[64, 128], [1.5, 2]], [[32], ["a"]]]},
        {"uniform": [0.0, 1.0], "when": {"gate.router": "gate"}},
        {"choice": [1, 2], "when": {"gate.router": ["gate", "gates"], "gate.sgs.strategy": "give_up"}},
        {"fixed": 3, "when": {"gate.router": "gate"}},
        3,
        "x",
    ],
)
def test_distributions_are_written_as_they_were_read(written: object) -> None:
    assert Distribution.parse(written).written() == written


@settings(max_examples=30, deadline=None)
@given(CONFIGS)
def test_the_search_reads_every_space_that_the_configuration_accepts(config: SweepConfig) -> None:
    written = {key: distribution.written() for key, distribution in config.space.items()}
    assert list(parse_space(written).distributions) == list(config.space)


def test_real_ranges_hold_floats_even_where_whole_numbers_were_written() -> None:
    assert [type(value) for value in Distribution.parse({"uniform": [0, 1]}).values] == [float, float]


@pytest.mark.parametrize("pick", ["kneee", "max:top2", "max:top1 where madds_m=1", "trial-7x"])
def test_a_pick_that_cannot_be_read_is_refused_before_anything_runs(pick: str) -> None:
    with pytest.raises(ValidationError, match="pick"):
        build(export={"picks": [pick]})


def test_a_batch_that_the_workers_cannot_share_equally_is_refused() -> None:
    with pytest.raises(ValidationError, match="cannot be shared equally among 3 workers with"):
        build(supernet={"model": "ds_tiny", "workers": 3, "train": {"batch_size": 64}})
    with pytest.raises(ValidationError, match="among 2 workers x 24 micro-batches with at least 2 each"):
        build(supernet={"model": "ds_tiny", "workers": 2, "train": {"batch_size": 64, "accumulate": 24}})


# Precedence for the regime: supernet.train.X > supernet.regime > supernet.bootstrapping > ib.
REGIME_CASES: list[tuple[dict[str, Any], Regime]] = [
    ({}, REGIMES["ib"]),
    *(({"regime": name}, regime) for name, regime in REGIMES.items()),
    ({"bootstrapping": {"mode": "none"}}, Regime(teacher="none")),
    ({"bootstrapping": {"mode": "inplace_distillation"}}, Regime(teacher="inplace")),
    ({"bootstrapping": {"mode": "ib"}}, REGIMES["ib"]),
    ({"bootstrapping": {"mode": "ieb", "num_random": 1}}, Regime(teacher="ema_ensemble", num_random=1)),
    ({"bootstrapping": {"num_random": 5}}, Regime(num_random=5)),
    ({"bootstrapping": {"num_random": 3}, "train": {"num_random": 3}}, Regime(num_random=3)),
    ({"bootstrapping": {"mode": "ieb"}, "train": {"teacher": "none"}}, Regime(teacher="none")),
    ({"bootstrapping": {"mode": "ieb"}, "train": {"num_random": 1}}, Regime(teacher="ema_ensemble", num_random=1)),
    ({"regime": "ib", "bootstrapping": {"mode": "ib", "num_random": 3}}, REGIMES["ib"]),
    ({"regime": "s_net", "bootstrapping": {"num_random": 2}}, REGIMES["s_net"]),
    ({"regime": "us_net", "train": {"num_random": 4}}, replace(REGIMES["us_net"], num_random=4)),
    ({"regime": "us_net", "train": {"bn": "private_stats"}}, replace(REGIMES["us_net"], norm="private_stats")),
    ({"regime": "s_net", "train": {"teacher": "inplace"}}, replace(REGIMES["s_net"], teacher="inplace")),
    ({"regime": "ieb", "train": {"widths": "all"}}, replace(REGIMES["ieb"], widths="all", num_random=0)),
    ({"train": {"widths": "all", "num_random": 7}}, Regime(widths="all", num_random=0)),
    ({"train": {"bn": "group_norm"}}, Regime(norm="group_norm")),
]


@pytest.mark.parametrize(("written", "regime"), REGIME_CASES, ids=[str(written) for written, _ in REGIME_CASES])
def test_the_regime_is_what_the_nearest_setting_says(written: dict[str, Any], regime: Regime) -> None:
    assert resolve_regime(build(supernet={"model": "m", **written}).supernet) == regime


@pytest.mark.parametrize(
    "written", [{"regime": "ib"}, {"bootstrapping": {"mode": "ib"}}, {"train": {"teacher": "ema"}}]
)
def test_one_regime_has_one_stage_key_however_it_is_written(written: dict[str, Any]) -> None:
    assert stage_subset(build(supernet={"model": "ds_tiny", **written}), "supernet") == stage_subset(
        build(), "supernet"
    )


def test_a_checkpoint_can_be_taken_as_it_is() -> None:
    supernet = {"model": "checkpoint", "init_from": "x", "train": {"epochs": 0}, "recalibration": {"images": 0}}
    assert build(supernet=supernet).supernet.train.epochs == 0


def test_a_share_of_the_datas_own_test_part_does_not_count_against_the_others() -> None:
    assert build(data={"name": "cifar10", "splits": {"train": 0.8, "gate": 0.1, "val": 0.1, "test": 0.5}})


STAGES = ("supernet", "measure", "table", "search", "verify")


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        ({"name": "other"}, set()),
        ({"seed": 5}, {"supernet", "search"}),
        ({"data": {"name": "cifar10"}}, {"supernet"}),
        ({"data": {"name": "digits", "limit": 9}}, {"supernet"}),
        ({"supernet": {"model": "other"}}, {"supernet"}),
        ({"supernet": {"model": "ds_tiny", "weights": "student"}}, {"supernet"}),
        ({"supernet": {"model": "ds_tiny", "train": {"lr": 0.2}}}, {"supernet"}),
        ({"supernet": {"model": "ds_tiny", "train": {"checkpoint_every": 9}}}, set()),
        ({"supernet": {"model": "ds_tiny", "train": {"accumulate": 2}}}, {"supernet"}),
        ({"supernet": {"model": "ds_tiny", "train": {"precision": "bf16"}}}, {"supernet"}),
        ({"supernet": {"model": "ds_tiny", "train": {"channels_last": True}}}, {"supernet"}),
        ({"supernet": {"model": "ds_tiny", "train": {"schedule": "constant"}}}, {"supernet"}),
        ({"supernet": {"model": "ds_tiny", "train": {"soft_weight": 0.9}}}, {"supernet"}),
        ({"supernet": {"model": "ds_tiny", "train": {"temperature": 4}}}, {"supernet"}),
        ({"supernet": {"model": "ds_tiny", "train": {"gamma_l1": 1e-5}}}, {"supernet"}),
        ({"supernet": {"model": "ds_tiny", "train": {"soft_weight": 1, "temperature": 1, "gamma_l1": 0}}}, set()),
        ({"supernet": {"model": "ds_tiny", "train": {"num_random": 1}}}, {"supernet"}),
        ({"supernet": {"model": "ds_tiny", "train": {"bn": "group_norm"}}}, {"supernet"}),
        ({"supernet": {"model": "ds_tiny", "regime": "ieb"}}, {"supernet"}),
        ({"supernet": {"model": "ds_tiny", "init_from": "moved"}}, set()),
        ({"data": {"name": "digits", "augment": {"erasing": 0.25}}}, {"supernet"}),
        ({"supernet": {"model": "ds_tiny", "keep_checkpoints": 9}}, set()),
        ({"supernet": {"model": "ds_tiny", "workers": 2, "threads": 1, "device": "cpu"}}, set()),
        ({"gate": {"target": 0.4}}, {"search"}),
        ({"space": {"gate.target": 0.4}}, {"search"}),
        ({"gate": {"router": "cascade"}}, {"search"}),
        ({"gate": {"trainer": "end_to_end"}}, {"search"}),
        ({"gate": {"routing": {"beam": 4}}}, {"search"}),
        ({"gate": {"end_to_end": {"epochs": 3}}}, set()),
        ({"gate": {"end_to_end": {"threads": 3}}}, set()),
        ({"sampler": {"cohort": 64}}, set()),
        ({"sampler": {"cohort": 4}}, {"search"}),
        ({"metrics": [{"name": "top5", "goal": "maximize"}, {"name": "madds_m", "goal": "minimize"}]}, {"search"}),
        ({"measure": {"repeats": 3}}, {"measure", "verify"}),
        ({"budget": {"trials": 3}}, set()),
        ({"trial": {"timeout_s": 3}}, set()),
        ({"ray": {"num_cpus": 3}}, set()),
        ({"storage": {"runs": "elsewhere"}}, set()),
        ({"tracking": {"mlflow": False}}, set()),
        ({"export": {"picks": ["all"]}}, set()),
        ({"presets": {"a": {}}}, set()),
    ],
)
def test_a_setting_enters_the_keys_of_just_the_stages_it_changes(change: dict[str, Any], stages: set[str]) -> None:
    before, after = build(), build(**change)
    assert {stage for stage in STAGES if stage_subset(before, stage) != stage_subset(after, stage)} == stages  # type: ignore[arg-type]


def test_the_published_way_of_training_keeps_the_key_of_the_first_release() -> None:
    """Its files had neither `trust` nor `largest_first`, and trained as these two values do."""
    published = build(supernet={"model": "ds_tiny", "bootstrapping": {"trust": "full", "largest_first": 0.0}})
    subset: Any = stage_subset(published, "supernet")
    assert subset["supernet"]["bootstrapping"] == {
        "ema_decay": 0.997,
        "ema_warmup": True,
        "soft_ramp_epochs": 0.0,
        "teacher_min_updates": 100,
    }
    assert subset != stage_subset(build(), "supernet")
    assert not {"soft_weight", "temperature", "gamma_l1"} & subset["supernet"]["train"].keys()


def test_end_to_end_settings_enter_the_search_where_trials_train_that_way() -> None:
    plain, changed, elsewhere = (
        build(gate={"trainer": "end_to_end", "end_to_end": settings})
        for settings in ({}, {"epochs": 3}, {"threads": 2})
    )
    assert stage_subset(plain, "search") != stage_subset(changed, "search")
    assert stage_subset(plain, "search") == stage_subset(elsewhere, "search")


def test_cohort_and_time_fit_the_way_in_which_trials_train() -> None:
    table, end_to_end = build(), build(gate={"trainer": "end_to_end"})
    assert (resolve_cohort(table), resolve_timeout_s(table)) == (64, 120)
    assert (resolve_cohort(end_to_end), resolve_timeout_s(end_to_end)) == (8, 4 * 3600)
    own = build(sampler={"cohort": 3}, trial={"timeout_s": 5}, gate={"trainer": "end_to_end"})
    assert (resolve_cohort(own), resolve_timeout_s(own)) == (3, 5)
    assert stage_subset(end_to_end, "search")["sampler"]["cohort"] == 8  # type: ignore[index,call-overload]


def test_an_absolute_target_goes_without_a_relative_one() -> None:
    space = {"gate.sgs.t_easy": {"uniform": [0, 1]}}
    assert build(gate={"target_madds_m": 9.0}, space=space).gate.target_madds_m == 9
    assert build(space={"gate.target_madds_m": {"loguniform": [4, 9]}})
    assert build(gate={"target_madds_m": 9.0}, space={"gate.target_madds_m": {"loguniform": [4, 9]}})


@pytest.mark.parametrize("router", ["gate", "gates"])
def test_a_slimming_head_can_be_trained_end_to_end(router: str) -> None:
    assert build(gate={"trainer": "end_to_end", "router": router})
    assert build(gate={"trainer": "end_to_end", "router": "cascade"}, space={"gate.router": {"choice": [router]}})


@pytest.mark.parametrize(("written", "size"), [(16, 16), ([16, 16], 16), ([16, 24], (16, 24)), (None, None)])
def test_an_image_size_has_one_form_however_it_is_written(written: object, size: object) -> None:
    config = build(data={"name": "digits", "image_size": written})
    assert config.data.image_size == size
    assert type(config.data.image_size) is type(size)
    assert SweepConfig.model_validate(parse_yaml(to_yaml(config), "resolved").data) == config
    assert DataSettings(name="digits", image_size=written).image_size == size  # type: ignore[arg-type]


def test_the_crop_is_in_the_fingerprint_of_the_images_and_in_no_stage() -> None:
    whole, cropped = (
        build(data={"name": "image_folder", "image_size": 8, **crop}) for crop in ({}, {"crop_fraction": 0.875})
    )
    assert "crop_fraction" not in stage_subset(whole, "supernet")["data"]
    assert all(stage_subset(whole, stage) == stage_subset(cropped, stage) for stage in STAGES)  # type: ignore[arg-type]


def test_moving_the_data_folder_changes_no_stage() -> None:
    here = build(data={"name": "cifar10", "path": "here"})
    there = build(data={"name": "cifar10", "path": "there"})
    assert all(stage_subset(here, stage) == stage_subset(there, stage) for stage in STAGES)  # type: ignore[arg-type]


@pytest.mark.parametrize("stage", STAGES)
def test_stage_subsets_are_json(stage: Any) -> None:
    subset = stage_subset(build(), stage)
    assert json.loads(json.dumps(subset, allow_nan=False)) == subset


def test_an_unknown_stage_is_a_programming_error() -> None:
    with pytest.raises(ValueError, match="unknown stage 'train'; known: structure, supernet, measure"):
        stage_subset(build(), "train")  # type: ignore[arg-type]


def test_json_schema_refuses_what_the_models_refuse() -> None:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    for bad in (
        {"seed": -1},
        {"extra": 1},
        {"gate": {"target": 2}},
        {"version": 2},
        {"space": {"gate.target": {"unifrm": [0, 1]}}},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**MINIMAL, **bad}, schema)


def test_json_schema_describes_settings_for_the_editor() -> None:
    train = json_schema()["$defs"]["TrainConfig"]["properties"]
    assert "Peak learning rate" in train["lr"]["description"]


def test_suspicious_but_legal_settings_are_warned_about() -> None:
    assert config_warnings(build()) == []
    few = build(budget={"trials": 8}, sampler={"startup": 16})
    assert config_warnings(few) == [
        "sampler.startup 16 is not below budget.trials 8: tpe will learn nothing, and all trials but those of sampler.enqueue "
        "will be random; lower sampler.startup or raise budget.trials"
    ]
    assert config_warnings(build(budget={"trials": 8}, sampler={"name": "random"})) == []


@pytest.mark.parametrize(
    ("sampler", "trials", "count"), [("tpe", 64, 1), ("nsga2", 64, 1), ("tpe", 65, 0), ("random", 9, 0)]
)
def test_a_sampler_that_never_learns_is_warned_about(sampler: str, trials: int, count: int) -> None:
    warnings = config_warnings(build(budget={"trials": trials}, sampler={"name": sampler}))
    assert len(warnings) == count
    assert all(
        text.startswith(f"sampler.cohort 64 is not below budget.trials {trials}: all trials") for text in warnings
    )


@pytest.mark.parametrize(
    ("gate", "text"),
    [
        ({}, "all trials will be equal, as router gate draws nothing from its seed"),
        ({"router": "cascade"}, "all trials will be equal, as router cascade draws nothing from its seed"),
        ({"router": "learned_cascade"}, "all trials differ by their seed alone"),
        ({"trainer": "end_to_end"}, "all trials differ by their seed alone"),
    ],
)
def test_a_sweep_without_dimensions_is_warned_about(gate: dict[str, Any], text: str) -> None:
    assert config_warnings(build(gate=gate, space={"gate.target": 0.5})) == [f"space holds fixed values only: {text}"]


def test_dimensions_that_end_to_end_trials_do_not_feel_are_warned_about() -> None:
    space = {"gate.optimizer.steps": {"int": [10, 20]}, "gate.optimizer.lr": {"uniform": [0.1, 0.3]}}
    assert config_warnings(build(space=space)) == []
    (text,) = config_warnings(build(gate={"trainer": "end_to_end"}, space=space))
    assert text.endswith("steps has no effect with gate.trainer end_to_end: gate.end_to_end.epochs counts")


def test_training_settings_that_work_against_each_other_are_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    bf16 = {"model": "m", "train": {"precision": "bf16"}}
    (slow,) = config_warnings(build(supernet={**bf16, "device": "cpu"}))
    assert slow.startswith("supernet.train.precision bf16 on a CPU: slower")
    assert config_warnings(build(supernet={**bf16, "device": "cuda"})) == []
    for is_available in (True, False):
        monkeypatch.setattr("torch.cuda.is_available", lambda answer=is_available: answer)
        assert len(config_warnings(build(supernet=bf16))) == (0 if is_available else 1)

    (cold,) = config_warnings(build(supernet={"model": "m", "train": {"bn": "recalibrate"}}))
    assert cold.startswith("supernet.train.bn recalibrate with teacher ema:")
    assert config_warnings(build(supernet={"model": "m", "regime": "us_net"})) == []
    for regime, number, count in (("ce", 4, 1), ("ce", 0, 0), ("s_net", 4, 1), ("ib", 4, 0)):
        unused = config_warnings(build(supernet={"model": "m", "regime": regime, "train": {"num_random": number}}))
        assert len(unused) == count
        assert all(text.startswith("supernet.train.num_random 4 is not used: ") for text in unused)
    for name, value, told in (("soft_weight", 0.9, "0.9"), ("temperature", 4, "4")):
        train = {name: value}
        (unread,) = config_warnings(build(supernet={"model": "m", "regime": "ce", "train": train}))
        assert (
            unread
            == f"supernet.train.{name} {told} is not used: with teacher none, all sub-networks learn from the labels"
        )
        assert config_warnings(build(supernet={"model": "m", "train": train})) == []


def test_the_core_accepts_the_same_rates() -> None:
    for name in ("lr", "weight_decay"):
        assert TrainSettings(**{name: LARGEST_RATE})
        assert build(supernet={"model": "m", "train": {name: LARGEST_RATE}})
        with pytest.raises(ValidationError, match="less than or equal to 1000000"):
            build(supernet={"model": "m", "train": {name: 2 * LARGEST_RATE}})


def test_sections_can_be_built_by_keyword_in_python() -> None:
    measure = MeasureConfig(batch_sizes=(1, 2), group_sizes=(1, 4))
    assert isinstance(measure, BaseModel)
    assert measure.group_sizes == (1, 4)
