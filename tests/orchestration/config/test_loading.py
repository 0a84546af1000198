"""From files, presets, --set and flags to one configuration: precedence, origins, messages that
point at the cause."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from dsnet.errors import ConfigError
from orchestration.config.command_lines import has_own_code, has_own_network, launch_command
from orchestration.config.distribution import Distribution
from orchestration.config.loading import LoadedConfig, load_config
from orchestration.config.resolve import enqueued_points, known_fields, resolve_cohort, resolve_space, resolve_trials
from orchestration.config.section import section_class
from orchestration.config.supernet import resolve_regime
from orchestration.config.sweep import SweepConfig
from orchestration.config.written import json_schema, to_yaml
from orchestration.config.yaml_source import read_yaml_file

EXAMPLES = Path(__file__).parents[3] / "examples"
MODELS = ("ds_tiny", "ds_mbnet", "ds_resnet", "ds_vit", "mobilenet_v2")
HEAD = "version: 1\nname: t\ndata: {name: digits}\nsupernet: {model: ds_tiny}\n"  # four lines


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The name of a file in the working directory, so that messages show it as a user sees it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DSNET_DATA", raising=False)
    return Path("sweep.yaml")


def load(path: Path, text: str, **arguments: Any) -> LoadedConfig:
    path.write_text(text, encoding="utf-8")
    return load_config(path, **{"known_models": MODELS, "environ": {}, **arguments})


def complaint(path: Path, text: str, **arguments: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, text, **arguments)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    for jargon in ("pydantic", "https://", "Input should", "type=", "Traceback", "validation error"):
        assert jargon not in message
    return message


def test_a_minimal_file_gives_the_defaults(sweep: Path) -> None:
    loaded = load(sweep, HEAD)
    assert loaded.config == SweepConfig.model_validate(
        {"version": 1, "name": "t", "data": {"name": "digits"}, "supernet": {"model": "ds_tiny"}}
    )
    assert loaded.presets == ()
    assert loaded.warnings == ()


# Precedence: default < file < preset < --set < flag, for every subset of the last four.
LEVELS = {"sweep.yaml:5": 1.0, "preset quick": 2.0, "--set": 3.0, "flag": 4.0}


@pytest.mark.parametrize(
    "spoken", [chosen for size in range(5) for chosen in itertools.combinations(LEVELS, size)], ids=str
)
def test_the_strongest_voice_wins_and_is_named(sweep: Path, spoken: tuple[str, ...]) -> None:
    text = HEAD + ("budget: {time_s: 1}\n" if "sweep.yaml:5" in spoken else "")
    text += "presets: {quick: {budget: {" + ("time_s: 2" if "preset quick" in spoken else "trials: 7") + "}}}\n"
    loaded = load(
        sweep,
        text,
        preset="quick",
        overrides=["budget.time_s=3"] if "--set" in spoken else [],
        flags={"budget.time_s": 4 if "flag" in spoken else None},
    )
    strongest = max(spoken, key=LEVELS.__getitem__, default=None)
    assert loaded.config.budget.time_s == (LEVELS[strongest] if strongest else None)
    assert loaded.origins["budget.time_s"] == (strongest or "default")


def test_origins_cover_every_setting_with_its_line(sweep: Path) -> None:
    text = HEAD + "gate:\n  target: 0.4\n  sgs:\n    t_easy: 0.1\nspace:\n  gate.target: 0.3\n"
    origins = load(sweep, text, overrides=["supernet.options.width=0.5", "space.gate.losses.cls=2"]).origins
    assert origins["version"] == "sweep.yaml:1"
    assert origins["data.name"] == "sweep.yaml:3"
    assert origins["gate.target"] == "sweep.yaml:6"
    assert origins["gate.sgs.t_easy"] == "sweep.yaml:8"
    assert origins["gate.sgs.t_hard"] == "default"
    assert origins["space.gate.target"] == "sweep.yaml:10"
    assert origins["space.gate.losses.cls"] == "--set"
    assert origins["supernet.options.width"] == "--set"
    settings_of_schema = {dotted for dotted, field in known_fields().items() if not section_class(field.annotation)}
    assert settings_of_schema - set(origins) == {"presets", "space", "supernet.options"}


def test_a_later_override_wins_over_an_earlier_one(sweep: Path) -> None:
    assert load(sweep, HEAD, overrides=["seed=1", "seed=2"]).config.seed == 2


@pytest.mark.parametrize(
    ("override", "dotted", "value"),
    [
        ("supernet.train.lr=1e-3", "supernet.train.lr", 0.001),
        ("supernet.train.grad_clip=null", "supernet.train.grad_clip", None),
        ("supernet.train.grad_clip=", "supernet.train.grad_clip", None),
        ("tracking.mlflow=false", "tracking.mlflow", False),
        ("measure.batch_sizes=[1, 2]", "measure.batch_sizes", (1, 2)),
        ("storage.runs=no", "storage.runs", "no"),
        ("storage.runs='1'", "storage.runs", "1"),
        ("tracking.uri=http://127.0.0.1:5000/?a=b", "tracking.uri", "http://127.0.0.1:5000/?a=b"),
        ("supernet.train={epochs: 4, lr: 0.5}", "supernet.train.epochs", 4),
    ],
)
def test_set_reads_its_value_as_yaml(sweep: Path, override: str, dotted: str, value: object) -> None:
    found: Any = load(sweep, HEAD, overrides=[override]).config
    for key in dotted.split("."):
        found = getattr(found, key)
    assert found == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "--set seed: expected KEY=VALUE"),
        ("=3", "--set =3: '' is not a dotted key"),
        ("gate..target=1", "--set gate..target=1: 'gate..target' is not a dotted key"),
        ("seed=x", "--set seed=x: seed: expected a whole number; got 'x'"),
        ("seed=[1", "--set seed=[1:1:3: is not YAML"),
        ("seed.x=1", "--set seed.x=1: seed: expected a whole number; got a mapping with x"),
        ("sede=1", "--set sede=1: sede: unknown key 'sede'; did you mean 'seed'?"),
        ("space.gate.target={uniform: [1, 0]}", "is the wrong way round; write [0, 1]"),
        (
            "tracking.uri=http://me:pw7@h",
            "--set tracking.uri=http://***@h: tracking.uri: 'http://***@h' holds a password",
        ),
        ("presets.a.seed=1", "presets can be written in the file only"),
        (
            "supernet.train={batch_size: 128, accumulate: 65}",
            "accumulate: 65}: supernet.train.batch_size: 128 images cannot be shared equally among 1 worker x 65",
        ),
        (
            "supernet={workers: 3, train: {batch_size: 128}}",
            "supernet.train.batch_size: 128 images cannot be shared equally among 3 w",
        ),
        (
            "supernet.train.precision=bfloat16",
            "unknown precision 'bfloat16'; did you mean 'bf16'? known: float32, bf16",
        ),
    ],
)
def test_a_wrong_override_is_quoted(sweep: Path, override: str, message: str) -> None:
    assert message in complaint(sweep, HEAD, overrides=[override])


def test_a_network_that_cannot_take_the_images_is_blamed_itself(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ConfigError("VGG does not run on an image of 3 x 8 x 64: too small; choose another data.image_size")

    monkeypatch.setattr("orchestration.config.loading._check_options", refuse)
    told = complaint(sweep, HEAD, overrides=["data.image_size=[8,64]"])
    assert "supernet.model: VGG does not run on an image of 3 x 8 x 64: too small; choose another" in told
    assert "options" not in told


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{width: 99}", "sweep.yaml:4:45: supernet.options.width: width is 99, but must be a number in 0.1..8"),
        (
            "{widht: 1}",
            "sweep.yaml:4:38: supernet.options.widht: unknown option of ds_tiny; did you mean 'width'? known: ",
        ),
        ("{num_routes: 1, width: 1}", "sweep.yaml:4:50: supernet.options.num_routes: num_routes"),
    ],
)
def test_an_option_that_the_family_refuses_is_pointed_at(sweep: Path, line: str, message: str) -> None:
    text = HEAD.replace("{model: ds_tiny}", f"{{model: ds_tiny, options: {line}}}")
    assert complaint(sweep, text).startswith(message)
    assert load(sweep, text, known_models=None).config.supernet.model == "ds_tiny"


def test_an_option_that_the_command_line_spoilt_is_quoted(sweep: Path) -> None:
    message = complaint(sweep, HEAD, overrides=["supernet.options.width=99"])
    assert message.startswith("--set supernet.options.width=99: supernet.options.width: width is 99, but must be")


def test_a_wrong_flag_names_its_setting(sweep: Path) -> None:
    message = complaint(sweep, HEAD, flags={"budget.trials": 0})
    assert message == "command line: budget.trials: must be at least 1; got 0"


def test_a_space_in_the_file_replaces_the_default_and_presets_change_single_entries(sweep: Path) -> None:
    space = "space: {gate.target: {uniform: [0, 1]}, gate.sgs.t_easy: 0.1}\n"
    preset = "presets: {p: {space: {gate.target: {choice: [0.2, 0.4]}}}}\n"
    assert load(sweep, HEAD + space + preset, preset="p").config.space == {
        "gate.target": Distribution("choice", (0.2, 0.4)),
        "gate.sgs.t_easy": Distribution("fixed", (0.1,)),
    }


def test_an_override_changes_one_entry_of_the_default_space(sweep: Path) -> None:
    default, changed = load(sweep, HEAD), load(sweep, HEAD, overrides=["space.gate.target=0.3"])
    assert changed.config.space == {**default.config.space, "gate.target": Distribution("fixed", (0.3,))}
    assert changed.origins["space.gate.sgs.t_easy"] == "default"


def test_presets_merge_sections_and_replace_lists(sweep: Path) -> None:
    text = HEAD.replace("{model: ds_tiny}", "{model: ds_tiny, options: {width: 1, a: [1, 2]}, train: {lr: 0.5}}")
    text += "presets: {p: {supernet: {options: {a: [3]}, train: {epochs: 2}}}}\n"
    loaded = load(sweep, text, preset="p", known_models=None)
    assert loaded.config.supernet.options == {"width": 1, "a": [3]}
    assert (loaded.config.supernet.train.lr, loaded.config.supernet.train.epochs) == (0.5, 2)
    assert loaded.presets == ("p",)
    assert loaded.config.presets == {}, "a resolved configuration has its preset inside"


def test_a_layer_with_another_model_begins_without_the_options_of_the_one_below(sweep: Path) -> None:
    text = HEAD.replace("{model: ds_tiny}", "{model: ds_tiny, options: {width: 0.5}}")
    text += (
        "presets: {other: {supernet: {model: ds_resnet, options: {depth: 8}}}, same: {supernet: {model: ds_tiny}}}\n"
    )
    other = load(sweep, text, preset="other")
    assert other.config.supernet.options == {"depth": 8}
    assert other.origins["supernet.options.depth"] == "preset other"
    assert load(sweep, text, preset="same").config.supernet.options == {"width": 0.5}
    assert load(sweep, text, overrides=["supernet.model=ds_resnet"]).config.supernet.options == {}
    (said,) = load(sweep, text, overrides=["supernet.model=ds_resnet"]).warnings
    assert said.startswith("--set sets supernet.model to ds_resnet; the options of ds_tiny are left out")
    assert said.endswith(": supernet.options.width")
    assert other.warnings == load(sweep, text, preset="same").warnings == ()
    both = ["supernet.model=ds_mbnet", "supernet.options.num_routes=3"]
    assert load(sweep, text, overrides=both).config.supernet.options == {"num_routes": 3}


def test_a_method_that_the_space_chooses_need_not_stand_in_its_section(sweep: Path) -> None:
    space = (
        "space: {supernet.structure.method: {choice: [greedy, uniform]}, gate.target: 0.5}\nsupernets: {number: 2}\n"
    )
    text = HEAD.replace("ds_tiny", "ds_tiny, structure: {targets: [0.5, 1.0]}") + space
    loaded = load(sweep, text)
    assert loaded.config.supernet.structure.method == "greedy"
    assert loaded.origins["supernet.structure.method"] == "first choice of space.supernet.structure.method"
    written = text.replace("structure: {", "structure: {method: uniform, ")
    assert load(sweep, written).config.supernet.structure.method == "uniform"
    without = text.replace("structure: {targets: [0.5, 1.0]}", "structure: {}")
    line = without.splitlines().index(space.splitlines()[0]) + 1
    assert complaint(sweep, without).startswith(
        f"sweep.yaml:{line}:9: first choice of space.supernet.structure.method: "
    )


def test_settings_that_none_of_the_methods_reads_are_named(sweep: Path) -> None:
    """A sweep over methods may have settings for each of them."""
    parts = "structure: {targets: [0.5, 1.0], bases: {rounds: 2}, progressive: {threshold: null}}"
    text = HEAD.replace("ds_tiny", f"ds_tiny, {parts}")

    def swept(*methods: str) -> str:
        method = f"{{choice: [{', '.join(methods)}]}}"
        return f"{text}space: {{supernet.structure.method: {method}, gate.target: {{uniform: [0, 1]}}}}\nsupernets: {{number: 2}}\n"

    assert load(sweep, swept("uniform", "multi_base", "progressive")).config.supernet.structure.bases.rounds == 2
    assert load(sweep, swept("uniform", "multi_base", "progressive")).warnings == ()
    (warning,) = load(sweep, swept("uniform", "multi_base")).warnings
    assert warning == (
        "supernet.structure.progressive has no effect: none of the methods in space reads it; choose method progressive, or remove it"
    )
    loaded = load(sweep, text.replace("structure: {", "structure: {method: progressive, "))
    assert loaded.warnings == (
        "supernet.structure.bases has no effect: method progressive does not read it; choose method multi_base, or remove it",
    )


def test_anchors_may_share_settings(sweep: Path) -> None:
    text = HEAD + "presets:\n  a: &a {budget: {trials: 3}}\n  b: {<<: *a, seed: 4}\n"
    config = load(sweep, text, preset="b").config
    assert (config.budget.trials, config.seed) == (3, 4)


# Bad input, each class with the place it must point at.
BAD_VALUES = [
    (
        "supernet: {model: ds_tiny, trian: {}}",
        "5:28: supernet.trian: unknown key 'trian'; did you mean 'train'? known keys: model,",
    ),
    (
        "supernet: {model: ds_tiny, epochs: 1}",
        "5:28: supernet.epochs: unknown key 'epochs'; did you mean 'supernet.structure.epochs' or 'supernet.train.epochs'?",
    ),
    ("zzz: 1", "5:1: zzz: unknown key 'zzz'; known keys: version, name"),
    ("seed: '3'", "5:7: seed: expected a whole number; got '3'; remove the quotes"),
    ("seed: 1.5", "5:7: seed: expected a whole number; got 1.5"),
    ("seed: true", "5:7: seed: expected a whole number; got true"),
    ("seed:", "5:1: seed: expected a whole number; got nothing (null)"),
    ("seed: {a: 1}", "5:7: seed: expected a whole number; got a mapping with a"),
    ("gate: {target: much}", "5:16: gate.target: expected a number; got 'much'"),
    ("gate: {target: 1.5}", "5:16: gate.target: must be at most 1; got 1.5"),
    ("gate: 3", "5:7: gate: expected a section of settings; got 3"),
    ("gate: [1]", "5:7: gate: expected a section of settings; got [1]"),
    ("budget: {trials: 0}", "5:18: budget.trials: must be at least 1; got 0"),
    ("budget: {time_s: soon}", "5:18: budget.time_s: expected a number or null; got 'soon'"),
    ("tracking: {mlflow: yes}", "5:20: tracking.mlflow: expected true or false; got 'yes'; write true"),
    (
        "tracking: {experiment: 7}",
        "5:24: tracking.experiment: expected text or null; got 7; to mean text, quote it: '7'",
    ),
    ("measure: {batch_sizes: 4}", "5:24: measure.batch_sizes: expected a list; got 4"),
    ("measure: {batch_sizes: [1, x]}", "5:28: measure.batch_sizes.1: expected a whole number; got 'x'"),
    (
        "sampler: {name: tpee}",
        "5:17: sampler.name: unknown sampler 'tpee'; did you mean 'tpe'? known: random, grid, qmc, tpe, nsga2, nsga3, gp",
    ),
    ("sampler: {name: 3}", "5:17: sampler.name: expected text; got 3; to mean text, quote it: '3'"),
    (
        "sampler: {name: tpe, options: {gama: 3}}",
        "5:38: sampler.options.gama: tpe has no such option",
    ),
    (
        "sampler: {enqueue: [{gate.target: 0.5}, {gate.target: 7}]}",
        "5:55: sampler.enqueue.1.gate.target: 7 is not in uniform [0.05, 0.9]; choose a value that the search could draw",
    ),
    (
        "sampler: {enqueue: [{gate.target: [1]}]}",
        "5:35: sampler.enqueue.0.gate.target: expected a number, text, true or",
    ),
    ("sampler: {enqueue: 3}", "5:20: sampler.enqueue: expected a list or null; got 3"),
    (
        "sampler: {order: async}",
        "5:18: sampler.order: unknown order 'async'; known: cohorts, asynchronous",
    ),
    ("budget: {plateau: 3}", "5:19: budget.plateau: expected a section of settings or null; got 3"),
    ("budget: {plateau: {trial: 3}}", "5:20: budget.plateau.trial: unknown key 'trial'; did you mean 'trials'?"),
    (
        "budget: {target: [top1 > 0.9, madds < 3]}",
        "5:31: budget.target.1: condition 'madds < 3', column 1: unknown metric",
    ),
    ("budget: {target: top1 > 0.9}", "5:18: budget.target: expected a list; got 'top1 > 0.9'"),
    (
        "constraints: [madds_m <= 180, top1 => 0.3]",
        "5:31: constraints.1: condition 'top1 => 0.3', column 6: '=' cannot",
    ),
    (
        "constraints: [{hard: params <= 5}]",
        "5:15: constraints.0: condition 'params <= 5', column 1: unknown metric 'params'",
    ),
    ("constraints: [{hrad: params_m <= 5}]", "5:15: constraints.0: expected a condition such as"),
    ("constraints: top1 > 0.9", "5:14: constraints: expected a list; got 'top1 > 0.9'"),
    (
        "pruner: {name: halving}",
        "5:16: pruner.name: unknown pruner 'halving'; did you mean 'pareto_halving'? known: none,",
    ),
    ("pruner: {name: pareto_halving}", "5:16: pruner.name: pareto_halving ends long trials early"),
    ("measure: {devices: {a.b: {}}}", "5:26: measure.devices.a.b: 'a.b' is not a valid device name"),
    (
        "measure: {devices: {a: {thread: 1}}}",
        "5:25: measure.devices.a.thread: unknown key 'thread'; did you mean 'threads'?",
    ),
    (
        "measure: {devices: {a: {device: gpu}}}",
        "5:33: measure.devices.a.device: unknown device 'gpu'; did you mean 'cuda'?",
    ),
    (
        "measure: {engine: onnxruntme}",
        "5:19: measure.engine: unknown engine 'onnxruntme'; did you mean 'onnxruntime'? known: onnxruntime, openvino, torch",
    ),
    (
        "measure: {device: cuda, engine: onnxruntime}",
        "5:33: measure.engine: engine onnxruntime runs on the CPU only, but device is cuda; write device: cpu, or engine: torch",
    ),
    (
        "measure: {devices: {a: {device: cuda, engine: onnxruntime}}}",
        "5:47: measure.devices.a.engine: engine onnxruntime runs on the CPU only",
    ),
    (
        "metrics: [{name: top1, goal: maximize}, {name: latency_ms.a, goal: minimize}]",
        "5:48: metrics.1.name: 'latency_ms.a' is measured on no device 'a'; measure.devices names none",
    ),
    (
        "supernets: {scheduler: hyperbnd}",
        "5:24: supernets.scheduler: unknown scheduler 'hyperbnd'; did you mean 'hyperband'?",
    ),
    (
        "space: {gate.router: {choice: [gate, cascade]}, gate.sgs.t_easy: {uniform: [0, 1], when: {gate.router: gat}}}",
        "5:104: space.gate.sgs.t_easy.when.gate.router: gate.router never is 'gat'; did you mean 'gate'?",
    ),
    (
        "space: {gate.target: 0.5, supernet.train.epochs: 9, supernet.train.warmup_epochs: {choice: [1, 99]}}",
        "5:83: space.supernet.train.warmup_epochs: no supernet can be made with 99: supernet.train.warmup_epochs: 99 epochs",
    ),
    (
        "space: {gate.target: 0.5, supernet.model: {choice: [ds_tiny, ds_tny]}}",
        "5:43: space.supernet.model: unknown model 'ds_tny'; did you mean 'ds_tiny'? known models: ds_tiny, ds_mbnet, ds_resnet",
    ),
    (
        "space: {gate.target: 0.5, supernet.options.num_routes: {int: [1, 4]}}",
        "5:56: space.supernet.options.num_routes: no supernet can be made with 1: ",
    ),
    (
        "export: {register_as: digits}\ntracking: {mlflow: false}",
        "5:23: export.register_as: a model is registered in MLflow, but tracking.mlflow is false",
    ),
    ("export: {picks: ['max:top3']}", "5:18: export.picks.0: pick 'max:top3': unknown metric 'top3'"),
    (
        "space: {gate.target: {uniform: [0.9, 0.05]}}",
        "5:22: space.gate.target: uniform range [0.9, 0.05] is the wrong way round; write [0.05, 0.9]",
    ),
    ("space: {gate.targt: 0.1}", "5:21: space.gate.targt: cannot be swept; did you mean 'gate.target'?"),
    (
        "space: {gate.target: {uniform: [0, 2]}}",
        "5:22: space.gate.target: uniform holds 2.0, but gate.target must be at most 1",
    ),
    ("metrics: []", "5:10: metrics: must hold at least 2 entries; got 0"),
    ("metrics: [{name: top1, goal: maximize}, {name: madds_m}]", "5:41: metrics.1.goal: is required and missing"),
    (
        "metrics: [{name: top1, gaol: 1, goal: maximize}, {name: madds_m, goal: minimize}]",
        "5:24: metrics.0.gaol: unknown key 'gaol'; did you mean 'goal'?",
    ),
    (
        "metrics: [{name: top1, goal: maximize}, {name: madds, goal: minimize}]",
        "5:48: metrics.1.name: unknown metric 'madds'; did you mean 'madds_m'?",
    ),
    (
        "gate: {losses: {cls: 0, sgs: 0, complexity: 0}}",
        "5:16: gate.losses: cls, sgs, complexity and quality are all 0",
    ),
    (
        "supernet: {model: ds_tiny, regime: us_nte}",
        "5:36: supernet.regime: unknown regime 'us_nte'; did you mean 'us_net'? known: ce, s_net, us_net, sp_net, ib, ieb",
    ),
    (
        "supernet: {model: ds_tiny, regime: ieb, bootstrapping: {mode: ib}}",
        "5:63: supernet.bootstrapping.mode: ib contradicts supernet.regime ieb, whose teacher is ema_ensemble; "
        "keep one of the two, the other null",
    ),
    (
        "supernet: {model: ds_tiny, regime: ib, bootstrapping: {num_random: 4}}",
        "5:68: supernet.bootstrapping.num_random: 4 contradicts supernet.regime ib, which draws 3; "
        "write it as supernet.train.num_random",
    ),
    (
        "supernet: {model: ds_tiny, regime: ieb, train: {num_random: 0}}",
        "5:61: supernet.train.num_random: ieb averages the teacher with random sub-networks and needs at least 1",
    ),
    (
        "supernet: {model: ds_tiny, train: {teacher: ema_ensemble}, bootstrapping: {num_random: 0}}",
        "5:88: supernet.bootstrapping.num_random: ieb averages",
    ),
    (
        "supernet: {model: ds_tiny, train: {teacher: ib}}",
        "5:45: supernet.train.teacher: unknown teacher 'ib'; known: none, inplace, ema, ema_ensemble",
    ),
    ("supernet: {model: ds_tiny, train: {bn: gn}}", "5:40: supernet.train.bn: unknown bn 'gn'; known: private_stats,"),
    (
        "supernet: {model: ds_tiny, train: {schedule: linear}}",
        "5:46: supernet.train.schedule: unknown schedule 'linear'; known: cosine, one_cycle, constant",
    ),
    (
        "supernet: {model: ds_tiny, train: {precision: 16}}",
        "5:47: supernet.train.precision: expected one of float32, bf16; got 16",
    ),
    (
        "supernet: {model: ds_tiny, train: {accumulate: 0}}",
        "5:48: supernet.train.accumulate: must be at least 1; got 0",
    ),
    (
        "supernet: {model: ds_tiny, train: {channels_last: on}}",
        "5:51: supernet.train.channels_last: expected true or false; got 'on'; write true",
    ),
    (
        "supernet: {model: ds_tiny, train: {epochs: 0}}",
        "5:44: supernet.train.epochs: 0 keeps the weights of supernet.init_from, which is not set; name a checkpoint",
    ),
    (
        "supernet: {model: ds_tiny, train: {batch_size: 128, accumulate: 100}}",
        "5:48: supernet.train.batch_size: 128 images cannot be shared equally among 1 worker x 100 micro-batches",
    ),
    (
        "supernet: {model: checkpoint}",
        "5:19: supernet.model: checkpoint takes the network from supernet.init_from, which is not set",
    ),
    (
        "supernet: {model: checkpoint, init_from: x, options: {width: 1}}",
        "5:54: supernet.options: model checkpoint takes no options: the checkpoint has its own; remove width",
    ),
    (
        "supernet: {model: ds_tiny, init_from: x, recalibration: {images: 0}}",
        "5:66: supernet.recalibration.images: 0 keeps the statistics of supernet.init_from, but training outdates",
    ),
    (
        "supernet: {model: ds_tiny, init_from: $NOWHERE/final}",
        "5:39: supernet.init_from: the environment variable NOWHERE is not set; set it or write the path out",
    ),
    ("data: {name: digits, stream: true}", "5:30: data.stream: only an image_folder can be streamed; digits fits"),
    ("data: {name: digits, augment: {erasing: 2}}", "5:41: data.augment.erasing: must be at most 1; got 2"),
    (
        "data: {name: digits, augment: {randaugment_magnitude: 11}}",
        "5:55: data.augment.randaugment_magnitude: must be at most 10; got 11",
    ),
    (
        "data: {name: digits, augment: {randaugment_ops: two}}",
        "5:49: data.augment.randaugment_ops: expected a whole number or null; got 'two'",
    ),
    (
        "data: {name: digits, augment: {crop_scale: [0, 1]}}",
        "5:45: data.augment.crop_scale.0: must be above 0; got 0",
    ),
    (
        "data: {name: digits, augment: {crop_scale: [0.5]}}",
        "5:44: data.augment.crop_scale: must hold at least 2 entries; got 1",
    ),
    (
        "data: {name: digits, normalization: {mean: [33.3], std: [78.6]}}",
        "5:37: data.normalization: mean: [33.3] is not in the unit of this setting, in which pixels lie in 0..1, as in torchvision; "
        "values of pixels in 0..255 are divided by 255: [0.1306]",
    ),
    (
        "data: {name: digits, normalization: imagnet}",
        "5:37: data.normalization: expected imagenet, {mean: [...], std: [...]} for pixels in 0..1, or null; got 'imagnet'",
    ),
    (
        "data: {name: digits, normalization: {mean: [0.1]}}",
        "5:37: data.normalization: std: missing; a setting without a default must be given",
    ),
    (
        "data: {name: digits, augment: {crop_scale: 0.5}}",
        "5:44: data.augment.crop_scale: expected a list or null; got 0.5",
    ),
    (
        "data: {name: digits, augment: {crop_scale: [0.9, 0.1]}}",
        "5:44: data.augment.crop_scale: range [0.9, 0.1] is the wrong way round; write [0.1, 0.9]",
    ),
    (
        "data: {name: digits, augment: {crop_scale: [0.1, 0.9], crop_padding: 4}}",
        "5:70: data.augment.crop_padding: 4 pixels cannot be combined with crop_scale, which crops already; remove one",
    ),
    (
        "tracking: {uri: 'postgresql://me:pw7@db/ml'}",
        "5:17: tracking.uri: 'postgresql://***@db/ml' holds a password, which would be stored with the run; leave it out, and set",
    ),
    ("tracking: 'http://bob:pw7@h'", "5:11: tracking: expected a section of settings; got 'http://***@h'"),
    (
        "space: {gate.target: {step: [0, 1, 1.0e-30]}}",
        "5:22: space.gate.target: step range [0, 1, 1e-30] has 1e+30 steps, but at most 1,000,000 are allowed",
    ),
    (
        "tracking: {uri: mlflow.db}",
        "5:17: tracking.uri: 'mlflow.db' is a path and no URI; for a database write sqlite:///PATH",
    ),
    ("presets: 3", "5:10: presets: expected NAME: settings; got 3"),
    ("presets: {a: 3}", "5:14: presets.a: expected settings; got 3"),
    ("presets: {a: {presets: {}}}", "5:15: presets.a.presets: a preset cannot hold presets; remove it"),
]


@pytest.mark.parametrize(("line", "message"), BAD_VALUES, ids=[line for line, _ in BAD_VALUES])
def test_bad_input_is_pointed_at(sweep: Path, line: str, message: str) -> None:
    section = line.partition(":")[0]
    head = ["\n" if written.startswith(f"{section}:") else written for written in HEAD.splitlines(keepends=True)]
    found = complaint(sweep, f"{''.join(head)}{line}\n")
    assert found.startswith(f"sweep.yaml:{message}")
    assert "\n" not in found


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"budget: {{trials: {'9' * 400}}}", "5:18: the number 999999999999... has more than 18 digits"),
        ("budget: {trials: 999999999999}", "5:18: budget.trials: must be at most 1000000000; got 999999999999"),
        ("measure: {threads: 5000}", "5:20: measure.threads: must be at most 4096; got 5000"),
        (f"measure: {{batch_sizes: {'[' * 5000}{']' * 5000}}}", "5: is nested too deeply"),
        (f"measure: {{batch_sizes: [{'x, ' * 20_000}]}}", "holds more than 10,000 values"),
        (f"space: {{gate.target: {{choice: {[number / 4096 for number in range(1001)]}}}}}", "can have at most 1,000"),
        (f"name: {'x' * 300_000}", "characters; a sweep file has at most 250,000"),
    ],
    ids=["digits", "count", "threads", "depth", "values", "choices", "characters"],
)
def test_excessive_input_is_refused_with_a_short_message(sweep: Path, line: str, message: str) -> None:
    section = line.partition(":")[0]
    head = ["\n" if written.startswith(f"{section}:") else written for written in HEAD.splitlines(keepends=True)]
    found = complaint(sweep, f"{''.join(head)}{line}\n")
    assert message in found
    assert len(found) < 300


def test_of_many_problems_the_first_ones_are_listed(sweep: Path) -> None:
    found = complaint(sweep, HEAD + "".join(f"unknown{number}: 1\n" for number in range(100))).splitlines()
    assert len(found) == 21
    assert found[-1] == "... and 80 more problems"
    assert "unknown0" in found[0]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("version: 1", "version: 2", "sweep.yaml:1:10: version: this release reads version 1; got 2"),
        ("name: t", "name: a/b", "sweep.yaml:2:7: name: 'a/b' is not a valid name; use 1 to 64 letters"),
        ("name: t", "name: 12", "sweep.yaml:2:7: name: expected text; got 12; to mean text, quote it: '12'"),
        ("name: t\n", "", "sweep.yaml:1:1: name: is required and missing (Name of the run"),
        ("{model: ds_tiny}", "{workers: 1}", "sweep.yaml:4:1: supernet.model: is required and missing"),
        (
            "{model: ds_tiny}",
            "{model: ds_tny}",
            "sweep.yaml:4:19: supernet.model: unknown model 'ds_tny'; did you mean 'ds_tiny'? "
            "known models: ds_tiny, ds_mbnet, ds_resnet, ds_vit, mobilenet_v2, checkpoint",
        ),
        (
            "name: digits",
            "name: mnist",
            "sweep.yaml:3:14: data.name: unknown data 'mnist'; known: cifar10, cifar100, digits, image_folder, parquet",
        ),
        ("name: digits", "name: image_folder", "sweep.yaml:3:1: data.image_size: an image folder needs it"),
        (
            "name: digits",
            "name: cifar10, path: $NOWHERE/x",
            "sweep.yaml:3:29: data.path: the environment variable NOWHERE is not set",
        ),
        (
            "name: digits",
            "name: digits, splits: {val: 2.5}",
            "sweep.yaml:3:36: data.splits.val: expected a fraction between 0 and 1, a whole "
            "number of images, or null; got 2.5",
        ),
    ],
)
def test_what_every_sweep_needs_is_asked_for(sweep: Path, old: str, new: str, message: str) -> None:
    found = complaint(sweep, HEAD.replace(old, new))
    assert found.startswith(message)
    assert "\n" not in found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "sweep.yaml: is empty; a sweep file needs at least version, name, data.name and supernet.model"),
        ("# only a comment\n", "sweep.yaml: is empty"),
        ("- a\n- b\n", "sweep.yaml:1:1: expected settings 'key: value', at least version, name"),
        ("just words", "sweep.yaml:1:1: expected settings 'key: value'"),
        (HEAD + "seed: 1\nseed: 2\n", "sweep.yaml:6:1: the key 'seed' was given before, in line 5; keep one"),
        (HEAD + "gate:\n\ttarget: 1\n", "sweep.yaml:6:1: the indentation has a tab"),
        (HEAD + "seed: [1\n", "sweep.yaml:6:1: is not YAML"),
    ],
)
def test_a_file_that_is_no_sweep_is_refused(sweep: Path, text: str, message: str) -> None:
    assert complaint(sweep, text).startswith(message)


def test_a_missing_file_is_a_usage_error(sweep: Path) -> None:
    with pytest.raises(ConfigError, match=r"^sweep\.yaml: there is no such file") as caught:
        load_config(sweep)
    assert caught.value.exit_code == 2


def test_all_problems_are_listed_in_the_order_of_the_file(sweep: Path) -> None:
    text = HEAD + "seed: x\nspace:\n  gate.lr: 1\n  gate.target: {uniform: [1, 0]}\nbudget: {trials: 0, trails: 1}\n"
    lines = complaint(sweep, text, overrides=["gate.target=9"]).splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        "sweep.yaml:5:7",
        "sweep.yaml:8:16",
        "sweep.yaml:9:18",
        "sweep.yaml:9:21",
        "--set gate.target=9",
    ]


def test_all_rules_broken_by_the_space_are_listed(sweep: Path) -> None:
    text = HEAD + "space:\n  gate.lr: 1\n  gate.target: {uniform: [0, 2]}\n  gate.sgs.strategy: {choice: [a, b]}\n"
    assert [line.split(" ")[0] for line in complaint(sweep, text).splitlines()] == [
        "sweep.yaml:6:12:",
        "sweep.yaml:7:16:",
        "sweep.yaml:8:22:",
        "sweep.yaml:8:22:",
    ]


def test_options_belong_to_the_sampler_that_was_named_with_them(sweep: Path) -> None:
    text = HEAD + "sampler: {name: tpe, options: {n_ei_candidates: 9}, startup: 3}\n"
    assert load(sweep, text, overrides=["sampler.startup=4"]).config.sampler.options == {"n_ei_candidates": 9}
    changed = load(sweep, text, overrides=["sampler.name=nsga2"]).config.sampler
    assert (changed.name, changed.options, changed.startup) == ("nsga2", {}, 3)


def test_a_condition_of_the_file_follows_what_set_fixes(sweep: Path) -> None:
    text = HEAD + (
        "space:\n  gate.router: {choice: [gate, cascade]}\n  gate.target: {uniform: [0, 1]}\n"
        "  gate.sgs.t_easy: {uniform: [0, 1], when: {gate.router: gate}}\n"
    )
    fixed = load(sweep, text, overrides=["space.gate.router=cascade"])
    assert list(resolve_space(fixed.config)) == ["gate.router", "gate.target"]
    assert any("space.gate.sgs.t_easy is never drawn" in warning for warning in fixed.warnings)
    narrowed = complaint(sweep, text, overrides=["space.gate.router={choice: [gates, cascade]}"])
    assert "gate.router never is 'gate'; did you mean 'gates'? its choices: gates, cascade" in narrowed


def test_the_papers_preset_fixes_what_it_says_of_swept_supernets_too(sweep: Path) -> None:
    text = (
        HEAD
        + "space: {gate.target: {uniform: [0, 1]}, supernet.train.lr: {choice: [0.1, 0.2]}, gate.router: {choice: [gate, gates]}}\n"
    )
    space = load(sweep, text, preset="paper").config.space
    assert space["supernet.train.lr"] == Distribution("fixed", (0.08,))
    assert space["gate.router"] == Distribution("fixed", ("gate",))
    assert space["gate.target"].kind == "uniform"


def test_a_mistake_in_a_preset_is_found_without_choosing_it(sweep: Path) -> None:
    text = HEAD + "presets:\n  good: {seed: 1}\n  bad:\n    supernet:\n      trian: 1\n"
    expected = "sweep.yaml:9:7: supernet.trian: unknown key 'trian'; did you mean 'train'?"
    assert complaint(sweep, text).startswith(expected)
    assert complaint(sweep, text, preset="good").startswith(expected)
    assert complaint(sweep, text).endswith("(with --preset bad)")
    assert complaint(sweep, text, preset="bad").startswith(expected)


def test_a_preset_that_breaks_a_rule_of_the_file_is_named(sweep: Path) -> None:
    text = HEAD.replace("{model: ds_tiny}", "{model: ds_tiny, train: {warmup_epochs: 9}}")
    found = complaint(sweep, text + "presets: {short: {supernet: {train: {epochs: 2}}}}\n")
    assert found == (
        "sweep.yaml:4:51: supernet.train.warmup_epochs: "
        "9 epochs of warm-up do not fit into 2 epochs of training (with --preset short)"
    )


def test_an_unknown_preset_is_answered_with_the_known_ones(sweep: Path) -> None:
    text = HEAD + "presets: {smoke: {}, full: {}}\n"
    message = complaint(sweep, text, preset="smok")
    assert message == "sweep.yaml:5:1: unknown preset 'smok'; did you mean 'smoke'? known presets: smoke, full, paper"
    assert complaint(sweep, HEAD, preset="smoke") == "sweep.yaml: unknown preset 'smoke'; known presets: paper"


# The built-in preset `paper`.
PUBLISHED = {
    "data.augment.randaugment_ops": 2,
    "supernet.train.optimizer": "sgd",
    "supernet.train.momentum": 0.9,
    "supernet.train.lr": 0.08,
    "supernet.train.batch_size": 512,
    "supernet.train.weight_decay": 1e-4,
    "supernet.train.schedule": "cosine",
    "supernet.train.warmup_epochs": 5,
    "supernet.train.epochs": 150,
    "supernet.train.label_smoothing": 0.1,
    "supernet.recalibration.images": None,
    "supernet.bootstrapping.ema_decay": 0.997,
    "supernet.bootstrapping.ema_warmup": False,
    "supernet.bootstrapping.soft_ramp_epochs": 0,
    "supernet.bootstrapping.trust": "full",
    "supernet.bootstrapping.largest_first": 0,
    "gate.losses.cls": 1,
    "gate.losses.sgs": 1,
    "gate.losses.complexity": 0.5,
    "gate.losses.form": "paper",
    "gate.losses.quality": 0,
    "gate.sgs.t_easy": 0,
    "gate.sgs.t_hard": 0,
    "gate.sgs.target": "extremes",
    "gate.optimizer.name": "sgd",
    "gate.optimizer.lr": 0.08,
    "gate.optimizer.weight_decay": 0.01,
    "gate.router": "gate",
    "gate.trainer": "end_to_end",
    "gate.end_to_end.epochs": 30,
    "gate.optimizer.batch_size": 512,
    "gate.temperature.start": 1,
    "gate.temperature.end": 1,
    "gate.routing.beam": 4,
    "gate.routing.stride": 1,
}


def value_at(config: SweepConfig, dotted: str) -> Any:
    found: Any = config
    for key in dotted.split("."):
        found = getattr(found, key)
    return found


def test_the_paper_preset_gives_the_published_settings_to_every_file(sweep: Path) -> None:
    others = (
        "{model: ds_tiny, weights: student, train: {lr: 1, accumulate: 2}, bootstrapping: {mode: ieb, num_random: 3}}"
    )
    for text in (HEAD, HEAD.replace("{model: ds_tiny}", others), (EXAMPLES / "cifar10.yaml").read_text("utf-8")):
        loaded = load(sweep, text, preset="paper")
        assert {key: value_at(loaded.config, key) for key in PUBLISHED} == PUBLISHED
        assert {loaded.origins[key] for key in PUBLISHED} == {"preset paper"}
        regime = resolve_regime(loaded.config.supernet)
        assert (regime.widths, regime.num_random, regime.teacher) == ("sandwich", 2, "ema")
        again = load(sweep, to_yaml(loaded.config))
        assert again.config == loaded.config


def test_the_paper_preset_fixes_in_the_space_what_it_says_of_the_gate(sweep: Path) -> None:
    loaded = load(sweep, HEAD, preset="paper")
    swept = {key for key, distribution in loaded.config.space.items() if distribution.kind != "fixed"}
    assert swept == {"gate.target", "gate.sgs.strategy"}
    assert loaded.config.space["gate.optimizer.lr"] == Distribution("fixed", (0.08,))
    assert loaded.origins["space.gate.optimizer.lr"] == "preset paper"
    space = "space: {gate.target: {uniform: [0, 1]}, gate.losses.complexity: {uniform: [0, 1]}}\n"
    config = load(sweep, HEAD + space, preset="paper", overrides=["space.gate.losses.sgs={uniform: [0, 1]}"]).config
    assert {key: distribution.kind for key, distribution in config.space.items()} == {
        "gate.target": "uniform",
        "gate.losses.complexity": "fixed",
        "gate.losses.sgs": "uniform",
    }


def test_settings_on_the_command_line_win_over_the_paper_preset(sweep: Path) -> None:
    overrides = ["supernet.regime=ieb", "supernet.train.batch_size=64"]
    config = load(sweep, HEAD, preset="paper", overrides=overrides).config
    assert resolve_regime(config.supernet).teacher == "ema_ensemble"
    assert config.supernet.train.lr == 0.08, "the learning rate is not scaled with the batch"
    message = complaint(sweep, HEAD, preset="paper", overrides=["supernet.train.epochs=3"])
    assert message.startswith("preset paper: supernet.train.warmup_epochs: 5 epochs of warm-up do not fit into 3")


def test_a_files_own_preset_hides_the_built_in_one_of_its_name(sweep: Path) -> None:
    config = load(sweep, HEAD + "presets: {paper: {supernet: {train: {epochs: 7}}}}\n", preset="paper").config
    assert (config.supernet.train.epochs, config.supernet.train.lr) == (7, None)


def test_models_are_checked_only_against_given_names(sweep: Path) -> None:
    text = HEAD.replace("ds_tiny", "anything")
    assert load(sweep, text, known_models=None).config.supernet.model == "anything"


def test_the_data_folder_comes_from_the_environment_where_it_is_not_given(sweep: Path) -> None:
    text = HEAD.replace("digits", "cifar10")
    environ = {"DSNET_DATA": "/images"}
    loaded = load(sweep, text, environ=environ)
    assert (loaded.config.data.path, loaded.origins["data.path"]) == ("/images", "$DSNET_DATA")
    loaded = load(sweep, text, environ=environ, flags={"data.path": Path("mine")})
    assert (loaded.config.data.path, loaded.origins["data.path"]) == ("mine", "flag")
    assert load(sweep, HEAD, environ=environ).config.data.path is None, "digits needs no folder"
    assert load(sweep, text).config.data.path is None


def test_paths_are_expanded(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    text = HEAD.replace("digits", "cifar10, path: ~/data") + "storage: {runs: '$DISK/${SUB}/runs'}\n"
    text = text.replace("ds_tiny}", "ds_tiny, init_from: '~/$SUB/final'}")
    config = load(sweep, text, environ={"DISK": "/disk", "SUB": "s"}).config
    assert config.supernet.init_from == "/home/me/s/final"
    assert config.data.path == "/home/me/data"
    assert config.storage.runs == "/disk/s/runs"


def test_a_setting_that_the_space_sweeps_anyway_is_warned_about(sweep: Path) -> None:
    (warning,) = load(sweep, HEAD, overrides=["gate.target=0.3"]).warnings
    assert (
        warning
        == "--set gate.target is not used: space sweeps it; to set a fixed value, write --set space.gate.target=VALUE"
    )


def test_warnings_come_with_the_configuration(sweep: Path) -> None:
    assert "lower sampler.startup" in load(sweep, HEAD, flags={"budget.trials": 4}).warnings[0]


# The examples.
EXAMPLE_CASES = [
    ("digits", None),
    ("digits", "paper"),
    ("cifar10", None),
    ("cifar10", "smoke"),
    ("cifar10", "resnet"),
    ("cifar10", "resnet-smoke"),
    ("cifar10", "kernels-smoke"),
    ("cifar10", "vit-smoke"),
    ("cifar10", "full"),
    ("cifar10", "paper"),
    ("pretrained", None),
    ("pretrained", "smoke"),
    ("pretrained", "full"),
    ("structures", None),
    ("structures", "cifar10"),
    *(("sp_net", preset) for preset in (None, "resnet50", "vgg", "mobilenet_v1", "mobilenet_v2", "smoke")),
]


@pytest.mark.parametrize(("name", "preset"), EXAMPLE_CASES)
def test_examples_load_and_their_resolved_form_loads_as_the_same(sweep: Path, name: str, preset: str | None) -> None:
    known = (*MODELS, "mobilenet_v1", "resnet50", "vgg19_gap")
    loaded = load_config(EXAMPLES / f"{name}.yaml", preset=preset, known_models=known, environ={})
    assert loaded.warnings == ()
    again = load(sweep, to_yaml(loaded.config), known_models=known)
    assert again.config == loaded.config
    assert {origin.split(":")[0] for origin in again.origins.values()} == {"sweep.yaml"}


@pytest.mark.parametrize("name", ["digits", "cifar10", "pretrained", "sp_net"])
def test_examples_satisfy_the_json_schema(name: str) -> None:
    jsonschema.validate(read_yaml_file(EXAMPLES / f"{name}.yaml").data, json_schema())


def test_the_digits_example_is_the_sweep_that_the_release_promises() -> None:
    config = load_config(EXAMPLES / "digits.yaml", known_models=MODELS, environ={}).config
    assert config.budget.trials >= 60
    assert {"gate.target", "gate.sgs.t_easy", "gate.sgs.t_hard", "gate.sgs.strategy", "gate.optimizer.lr"} <= set(
        config.space
    )
    assert any(key.startswith("gate.routing.") for key in config.space)
    assert [metric.name for metric in config.metrics] == ["top1", "madds_m"]


# Mutations: any change of an example gives a configuration or a ConfigError.
def _paths(node: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from _paths(value, (*path, key))


STRANGE: list[Any] = [None, True, 0, -1, 1.5, 10**30, "", "x", "no", [], [1], ["a", None], {}, {"x": 1}, [[{}]]]
STRANGE += [{"uniform": [1, 0]}, {"int": "x"}, {"choice": [{}]}]


def config_or_message(path: Path, preset: str | None = None) -> SweepConfig | str:
    try:
        return load_config(path, preset=preset, known_models=MODELS, environ={}).config
    except ConfigError as error:
        return str(error)


def _mutate(data: dict[str, Any], rng: random.Random) -> None:
    path = rng.choice(sorted(_paths(data), key=str))
    parent: Any = data
    for key in path[:-1]:
        parent = parent[key]
    kind = rng.choice(["drop", "replace", "rename"])
    if kind == "replace" or (kind == "rename" and isinstance(parent, list)):
        parent[path[-1]] = rng.choice(STRANGE)
        return
    value = parent.pop(path[-1])
    if kind == "rename":
        letters = list(str(path[-1]))
        rng.shuffle(letters)
        parent["".join(letters)] = value


def check_mutated(path: Path, case: tuple[str, str | None], seed: int, num_mutations: int) -> None:
    """Change the structure of an example in some places; it is a configuration, or refused by
    name."""
    name, preset = case
    data = copy.deepcopy(read_yaml_file(EXAMPLES / f"{name}.yaml").data)
    assert isinstance(data, dict)
    rng = random.Random(seed)
    for _ in range(num_mutations):
        _mutate(data, rng)
    with path.open("w", encoding="utf-8") as stream:
        YAML(typ="safe", pure=True).dump(data, stream)
    answer = config_or_message(path, preset)
    if isinstance(answer, str):
        assert all(line.startswith((str(path), "preset paper: ")) for line in answer.splitlines())
    else:
        assert SweepConfig.model_validate(answer.model_dump(mode="json")) == answer


def check_scribbled(path: Path, name: str, seed: int) -> None:
    """Change bytes of an example in some places; it is a configuration, or refused by name."""
    raw = bytearray((EXAMPLES / f"{name}.yaml").read_bytes())
    rng = random.Random(seed)
    for _ in range(rng.randint(1, 4)):
        position = rng.randrange(len(raw))
        raw[position : position + rng.choice([0, 1, 5])] = rng.choice(
            [b"", b":", b"\t", b"\n", b"{", b"- ", b"\xff", b"'", b"0"]
        )
    path.write_bytes(raw)
    answer = config_or_message(path)
    assert isinstance(answer, SweepConfig) or answer.startswith(str(path))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.sampled_from(EXAMPLE_CASES), st.integers(0, 2**32), st.integers(1, 3))
def test_a_mutated_example_is_a_config_or_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[str, str | None], seed: int, num_mutations: int
) -> None:
    check_mutated(tmp_path_factory.mktemp("mutated", numbered=True) / "m.yaml", case, seed, num_mutations)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["digits", "cifar10"]), st.integers(0, 2**32))
def test_a_scribbled_example_is_a_config_or_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, name: str, seed: int
) -> None:
    check_scribbled(tmp_path_factory.mktemp("scribbled", numbered=True) / "s.yaml", name, seed)


def test_an_absolute_target_takes_the_place_of_the_one_that_the_default_space_sweeps(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text("version: 1\nname: a\ndata: {name: digits}\nsupernet: {model: ds_tiny}\n", encoding="utf-8")
    assert "gate.target" in load_config(path).config.space
    config = load_config(path, overrides=["gate.target_madds_m=0.15"]).config
    assert config.gate.target_madds_m == 0.15
    assert "gate.target" not in config.space
    assert "gate.sgs.t_easy" in config.space


def test_a_file_without_a_space_sweeps_the_kinds_of_router_and_each_setting_only_for_those_that_read_it(
    sweep: Path,
) -> None:
    config = load(sweep, HEAD).config
    space = resolve_space(config)
    assert space["gate.router"] == Distribution("choice", ("gate", "evidence_gate", "cascade", "learned_cascade"))
    assert space["gate.target"].when == ()
    trained = (("gate.router", ("gate", "evidence_gate", "learned_cascade")),)
    assert {key for key in space if space[key].when == trained} == set(space) - {"gate.router", "gate.target"}
    assert [point["gate.router"] for point in enqueued_points(config)] == ["gate", "gate"], "the published settings"
    assert resolve_trials(config) >= 2 * resolve_cohort(config), "a cohort that draws, and at least one that learns"


@pytest.mark.parametrize(
    ("gate", "kind", "keys"),
    [
        ("{router: gate}", "gate", 6),
        ("{router: evidence_gates}", "evidence_gates", 6),
        ("{router: cascade}", "cascade", 1),
        ("{trainer: end_to_end}", "gate", 6),
    ],
)
def test_a_router_that_is_given_is_not_swept_and_neither_is_what_it_does_not_read(
    sweep: Path, gate: str, kind: str, keys: int
) -> None:
    loaded = load(sweep, HEAD + f"gate: {gate}\n")
    assert "gate.router" not in loaded.config.space
    assert (loaded.config.gate.router, len(loaded.config.space)) == (kind, keys)
    assert loaded.warnings == ()
    assert load(sweep, HEAD, overrides=[f"gate={gate}"]).config == loaded.config


def test_kinds_of_router_that_the_command_line_sweeps_keep_what_they_read(sweep: Path) -> None:
    text = HEAD + "gate: {router: cascade}\n"
    space = load(sweep, text, overrides=["space.gate.router={choice: [gates, cascade]}"]).config.space
    assert space["gate.router"] == Distribution("choice", ("gates", "cascade"))
    assert "gate.sgs.t_easy" in space


def test_the_paper_preset_leaves_a_file_without_a_space_nothing_but_the_published_gate(sweep: Path) -> None:
    config = load(sweep, HEAD, preset="paper").config
    assert (config.gate.router, config.gate.trainer) == ("gate", "end_to_end")
    assert "gate.router" not in config.space
    assert config.space["gate.sgs.t_easy"] == Distribution("fixed", (0.0,))


def test_a_network_by_import_path_is_imported_and_may_be_made_for_the_images_of_its_task_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_model(model: str, options: str = "{}") -> SweepConfig:
        text = f"version: 1\nname: own\ndata: {{name: digits}}\nsupernet:\n  model: {model}\n  options: {options}\n"
        (tmp_path / "own.yaml").write_text(text, encoding="utf-8")
        return load_config(tmp_path / "own.yaml", known_models=MODELS, environ={}).config

    assert load_model("tests.dsnet.nets:one_channel").supernet.model == "tests.dsnet.nets:one_channel"
    with pytest.raises(ConfigError, match=r"own\.yaml:5:10: supernet\.model: .*nothing' cannot be imported"):
        load_model("tests.dsnet.nets:nothing")
    with pytest.raises(
        ConfigError, match=r"own\.yaml:6.*supernet\.options\.ratio: unknown option.*did you mean 'ratios'"
    ):
        load_model("tests.dsnet.nets:one_channel", "{ratio: [1.0]}")
    monkeypatch.delenv("DSNET_ALLOW_IMPORTS")
    with pytest.raises(ConfigError, match=r"supernet\.model: .*DSNET_ALLOW_IMPORTS=1.*--allow-imports"):
        load_model("tests.dsnet.nets:one_channel")


@pytest.mark.parametrize(
    ("text", "own_code", "own_network"),
    [
        ("supernet: {model: ds_tiny}\n", False, False),
        ("supernet: {model: 'tests.dsnet.nets:one_channel'}\n", True, True),
        ("supernet: {model: ds_tiny, structure: {method: 'own_methods:mine', targets: [0.5, 1.0]}}\n", True, False),
        (
            "supernet: {model: ds_tiny, structure: {method: multi_base, targets: [0.5, 1.0], score: 'own_scores:mine'}}\n",
            True,
            False,
        ),
        (
            "supernet: {model: ds_tiny, structure: {targets: [0.5, 1.0]}}\n"
            "space: {supernet.structure.method: {choice: [uniform, 'own_methods:mine']}, gate.target: 0.5}\n"
            "supernets: {number: 2}\n",
            True,
            False,
        ),
    ],
)
def test_printed_commands_have_the_flag_where_a_sweep_uses_code_of_the_user(
    sweep: Path, text: str, own_code: bool, own_network: bool
) -> None:
    config = load(sweep, f"version: 1\nname: own\ndata: {{name: digits}}\n{text}", known_models=None).config
    assert (has_own_code(config), has_own_network(config)) == (own_code, own_network)
    printed = launch_command(config, Path("my sweeps/own.yaml"))
    assert printed == "dsnet-orch launch 'my sweeps/own.yaml'" + (" --allow-imports" if own_code else "")


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("part", range(10))
def test_ten_thousand_mutations_are_configs_or_config_errors(tmp_path: Path, part: int) -> None:
    rng = random.Random(part)
    for _ in range(500):
        check_mutated(tmp_path / "m.yaml", rng.choice(EXAMPLE_CASES), rng.randrange(2**32), rng.randint(1, 3))
        check_scribbled(tmp_path / "s.yaml", rng.choice(["digits", "cifar10"]), rng.randrange(2**32))
