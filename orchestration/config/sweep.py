"""The whole of sweep.yaml as one frozen, strict, typed object; config_loading.py reads files into it.

Strict means: no unknown key, no silent conversion ("3" is not 3, 1 is not true), and every range checked when an object
is built. Only a whole number where a real one is wanted is taken as it is meant.
"""

from __future__ import annotations

import io
import os
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cache
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BeforeValidator,
    Field,
    JsonValue,
    PlainSerializer,
    PlainValidator,
    StringConstraints,
    WithJsonSchema,
    model_validator,
)
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import RoundTripRepresenter

from dsnet.errors import ConfigError
from dsnet.wording import shown, way_out
from orchestration.config.default_space import default_space
from orchestration.config.distribution import DISTRIBUTION_SCHEMA, Distribution
from orchestration.config.sections import (
    CHECKPOINT_MODEL,
    LARGEST_RATE,
    NAME_PATTERN,
    OBJECTIVE_GOALS,
    REGIME_KEYS,
    AugmentConfig,
    BootstrappingConfig,
    BrokenRule,
    BudgetConfig,
    Constraint,
    DataConfig,
    Device,
    DeviceConfig,
    ExportConfig,
    GateConfig,
    HardConstraint,
    KeyPath,
    MeasureConfig,
    MetricConfig,
    PlateauConfig,
    PrunerConfig,
    RayConfig,
    SamplerConfig,
    Section,
    StorageConfig,
    SupernetConfig,
    SupernetsConfig,
    TrackingConfig,
    TrainConfig,
    TrialConfig,
    goal_of,
    is_nullable,
    refuse,
    requirement,
    resolve_regime,
    section_class,
    walk_fields,
)
from orchestration.config.space import (
    absolute_targets,
    cycle_problems,
    entry_problems,
    gate_problems,
    is_of_supernet,
    point_problems,
    possible_routers,
    published_points,
    resolve,
    supernet_problems,
    supernet_warnings,
    sweepable_keys,
    unread_warnings,
)
from search.conditions.constraints import BASELINE, ConstraintSet
from search.conditions.expressions import Comparison, parse_comparison
from search.front.pareto import parse_pick
from search.study.halving import ParetoHalving

__all__ = [
    "CHECKPOINT_MODEL",
    "LARGEST_RATE",
    "NAME_PATTERN",
    "OBJECTIVE_GOALS",
    "REGIME_KEYS",
    "AugmentConfig",
    "BootstrappingConfig",
    "BrokenRule",
    "DeviceConfig",
    "GateConfig",
    "HardConstraint",
    "MeasureConfig",
    "MetricConfig",
    "PlateauConfig",
    "PrunerConfig",
    "SamplerConfig",
    "Section",
    "SupernetConfig",
    "SupernetsConfig",
    "SweepConfig",
    "TrainConfig",
    "absolute_targets",
    "conditions",
    "config_warnings",
    "constraint_set",
    "enqueued_points",
    "gate_space",
    "goal_of",
    "halving_rungs",
    "is_nullable",
    "json_schema",
    "known_fields",
    "metric_names",
    "possible_routers",
    "requirement",
    "resolve_cohort",
    "resolve_cores",
    "resolve_halving",
    "resolve_regime",
    "resolve_space",
    "resolve_timeout_s",
    "resolve_trials",
    "section_class",
    "stage_subset",
    "supernet_space",
    "sweepable_keys",
    "target_set",
    "to_yaml",
]

Stage = Literal["supernet", "measure", "table", "search", "verify"]
SCHEDULERS = ("none", "asha", "median", "hyperband")
"""Of supernets, by short names; others by their import path."""
ACCURACIES = ("top1", "top5")
"""Metrics that grow while a trial trains."""
LEARNING_SAMPLERS = ("tpe", "nsga2", "nsga3", "gp")
"""Those that suggest from what earlier cohorts gave."""


def _version(value: object) -> object:
    if type(value) is not int or value != 1:
        raise ValueError(f"this release reads version 1; got {shown(value)}")
    return value


SpaceEntry = Annotated[
    Distribution,
    PlainValidator(Distribution.parse),
    PlainSerializer(Distribution.written),
    WithJsonSchema(DISTRIBUTION_SCHEMA),
]


_DEFAULT_METRICS = (
    MetricConfig(name="top1", goal="maximize", ref=0.0),
    MetricConfig(name="madds_m", goal="minimize"),
)


class SweepConfig(Section):
    """A whole sweep. Only version, name, data.name and supernet.model have no default."""

    version: Annotated[Literal[1], BeforeValidator(_version)]
    """Version of this file's format."""
    name: Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
    """Name of the run and of its folder: 1 to 64 letters, digits, '.', '_' or '-', not starting with '.'."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """All randomness derives from it, 0 to 2^32 - 1."""
    data: DataConfig
    supernet: SupernetConfig
    gate: GateConfig = GateConfig()
    space: dict[str, SpaceEntry] = Field(default_factory=default_space, min_length=1)
    """Dotted key below `gate.` or `supernet.` -> distribution. A `space` in the file replaces the default one, which sweeps the kind of
    router (gate, evidence_gate, cascade, learned_cascade), the target, the SGS settings and the learning rate."""
    metrics: Annotated[tuple[MetricConfig, ...], Field(strict=False, min_length=2, max_length=3)] = _DEFAULT_METRICS
    """The 2 or 3 objectives, at least one to maximise and one to minimise."""
    constraints: Annotated[tuple[Constraint, ...], Field(strict=False)] = ()
    """Conditions over metrics and `baseline.METRIC`, the widest routable sub-network's: "top1 >= baseline.top1 - 0.003". A trial that
    breaks one is never on the front; {hard: "params_m <= 5"} ends a trial at once, and the sweep where nothing can hold it."""
    sampler: SamplerConfig = SamplerConfig()
    budget: BudgetConfig = BudgetConfig()
    pruner: PrunerConfig = PrunerConfig()
    trial: TrialConfig = TrialConfig()
    measure: MeasureConfig = MeasureConfig()
    supernets: SupernetsConfig = SupernetsConfig()
    ray: RayConfig = RayConfig()
    storage: StorageConfig = StorageConfig()
    tracking: TrackingConfig = TrackingConfig()
    export: ExportConfig = ExportConfig()
    presets: dict[str, dict[str, JsonValue]] = Field(default_factory=dict)
    """Name -> settings laid over the file by --preset NAME. Empty in a resolved file."""

    @model_validator(mode="before")
    @classmethod
    def _what_is_given_is_not_swept_by_default(cls, data: Any) -> Any:
        return {**data, "space": default_space([data])} if isinstance(data, Mapping) and "space" not in data else data

    @model_validator(mode="after")
    def _fits_together(self) -> SweepConfig:
        problems = [*entry_problems(self.space), *_metric_problems(self)]
        if not problems:
            problems += cycle_problems(self.space)
        if not problems:
            problems += [*gate_problems(self.gate, self.space), *supernet_problems(self.supernet, self.space)]
            problems += [*_condition_problems(self), *_search_problems(self), *_pick_problems(self)]
        refuse(*problems)
        return self


def metric_names(config: SweepConfig) -> tuple[str, ...]:
    """Every metric of a sweep that may be an objective or stand in a condition."""
    latencies = ["latency_ms", *(f"latency_ms_batch{size}" for size in config.measure.batch_sizes if size > 1)]
    on_devices = [f"{name}.{device}" for device in config.measure.devices for name in latencies]
    return (*OBJECTIVE_GOALS, *latencies[1:], *on_devices)


def _metric_problems(config: SweepConfig) -> Iterator[BrokenRule]:
    known, met = metric_names(config), [metric.name for metric in config.metrics]
    for index, name in enumerate(met):
        path: KeyPath = ("metrics", index, "name")
        if name not in known:
            device = name.partition(".")[2]
            if device and device not in config.measure.devices:
                devices = list(config.measure.devices)
                hint = way_out(device, devices) if devices else "; measure.devices names none"
                yield BrokenRule(
                    path, f"'{name}' is measured on no device '{device}'{hint}", others=(("measure", "devices"),)
                )
            else:
                sizes = ", ".join(map(str, config.measure.batch_sizes))
                message = f"'{name}' is not measured: measure.batch_sizes are {sizes}; add the size there, or choose one of them"
                if name.partition(".")[0] == "latency_ms_batch1":
                    message = f"one image's latency is called '{name.replace('_batch1', '')}'"
                yield BrokenRule(path, message, others=(("measure", "batch_sizes"),))
        if name in met[:index]:
            yield BrokenRule(path, f"{name} is an objective already; remove it here")
    if {metric.goal for metric in config.metrics} != {"maximize", "minimize"}:
        message = f"expected at least one metric to maximize and one to minimize; got {' and '.join(met)}"
        yield BrokenRule(("metrics",), message)


def _names_in_conditions(config: SweepConfig) -> tuple[str, ...]:
    names = metric_names(config)
    return (*names, *(f"{BASELINE}{name}" for name in names))


def _condition_problems(config: SweepConfig) -> Iterator[BrokenRule]:
    """Constraints and targets that cannot be read, or stand there twice."""
    names = _names_in_conditions(config)
    constraints = [text if isinstance(text, str) else text.hard for text in config.constraints]
    for path, texts in ((("constraints",), constraints), (("budget", "target"), list(config.budget.target))):
        seen: list[str] = []
        for index, text in enumerate(texts):
            try:
                comparison = parse_comparison(text, names)
            except ConfigError as error:
                yield BrokenRule((*path, index), str(error))
                continue
            if comparison.text in seen:
                yield BrokenRule((*path, index), f"'{comparison}' stands there already; remove one of the two")
            seen.append(comparison.text)


def _search_problems(config: SweepConfig) -> Iterator[BrokenRule]:
    """What sampler, pruner and scheduler cannot do."""
    yield from _sampler_problems(config)
    if config.sampler.enqueue:
        yield from point_problems(gate_space(config), config.sampler.enqueue, ("sampler", "enqueue"))
    if config.pruner.name == "pareto_halving":
        yield from _halving_problems(config)
    yield from _scheduler_problems(config)


def _halving_problems(config: SweepConfig) -> Iterator[BrokenRule]:
    name, first, epochs = ("pruner", "name"), config.pruner.first_epochs, config.gate.end_to_end.epochs
    if config.gate.trainer != "end_to_end":
        message = (
            "pareto_halving ends long trials early; those of gate.trainer table take a fraction of a second: write none"
        )
        yield BrokenRule(name, message, others=(("gate", "trainer"),))
    elif first >= epochs:
        message = f"{first} is not below gate.end_to_end.epochs {epochs}: nothing would be ended early; lower it"
        yield BrokenRule(("pruner", "first_epochs"), message, others=(("gate", "end_to_end", "epochs"),))
    if config.sampler.order == "asynchronous":
        message = "pareto_halving compares the trials of a cohort; write sampler.order cohorts, or pruner.name none"
        yield BrokenRule(name, message, others=(("sampler", "order"),))


def _scheduler_problems(config: SweepConfig) -> Iterator[BrokenRule]:
    scheduler, options = config.supernets.scheduler, config.supernets.options
    if scheduler not in SCHEDULERS and not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", scheduler):
        message = f"unknown scheduler '{scheduler}'{way_out(scheduler, SCHEDULERS, 'known, beside import paths')}"
        yield BrokenRule(("supernets", "scheduler"), message)
    if scheduler == "none" and options:
        yield BrokenRule(("supernets", "options"), "scheduler none takes no options; remove them, or name a scheduler")
    elif scheduler in SCHEDULERS and options:
        yield from _scheduler_option_problems(config)


def _scheduler_option_problems(config: SweepConfig) -> Iterator[BrokenRule]:
    # Imported here: training needs torch, which `dsnet-orch schema` and --help do without.
    from orchestration.config.schedulers import check_scheduler

    scheduler, options = config.supernets.scheduler, config.supernets.options
    path: KeyPath = ("supernets", "options")
    try:
        check_scheduler(scheduler, options)
    except ConfigError as error:
        match = re.match(r"supernets\.options\.(\w+):? ?", str(error))
        named = (path, str(error)) if match is None else ((*path, match[1]), str(error)[match.end() :])
        yield BrokenRule(*named)
    grace, epochs = options.get("grace_period"), _longest_training(config)
    if scheduler == "asha" and isinstance(grace, int) and epochs is not None and grace > epochs:
        message = f"{grace} is above supernet.train.epochs {epochs}; lower it"
        yield BrokenRule((*path, "grace_period"), message, others=(("supernet", "train", "epochs"),))


def _sampler_problems(config: SweepConfig) -> Iterator[BrokenRule]:
    # Imported here: samplers need Optuna, which `dsnet-orch schema` and --help do without.
    from search.suggest.samplers import SamplerSettings, check_sampler, num_points
    from search.suggest.space import parse_space

    sampler = config.sampler
    settings = SamplerSettings(sampler.name, sampler.options, sampler.startup)
    try:
        check_sampler(settings, len(config.metrics))
        space = {key: distribution.written() for key, distribution in gate_space(config).items()}
        if space:
            num_points(settings, parse_space(space))
    except ConfigError as error:
        match = re.match(r"sampler\.(name|options\.(\w+)):? ?", str(error))
        if match is None:
            yield BrokenRule(("space",), str(error).removeprefix("space: "))
        elif match[2] in sampler.options:
            yield BrokenRule(("sampler", "options", match[2]), str(error)[match.end() :])
        else:
            yield BrokenRule(("sampler", "name"), str(error)[match.end() :])


def _pick_problems(config: SweepConfig) -> Iterator[BrokenRule]:
    for index, text in enumerate(config.export.picks):
        try:
            parse_pick(text, metrics=metric_names(config))
        except ConfigError as error:
            yield BrokenRule(("export", "picks", index), str(error))


@cache
def known_fields() -> Mapping[str, FieldInfo]:
    """Every dotted key of sweep.yaml, sections included, with its field."""
    return types.MappingProxyType(dict(walk_fields(SweepConfig, "")))


def resolve_space(config: SweepConfig) -> dict[str, Distribution]:
    """The space as it is searched: where the router is swept, each key only for the kinds of router that read it; conditions on fixed
    keys decided."""
    return resolve(config.space)


def supernet_space(config: SweepConfig) -> dict[str, Distribution]:
    """The part of `resolve_space` that says which supernets are trained; empty for a sweep of gates under one."""
    return {key: distribution for key, distribution in resolve_space(config).items() if is_of_supernet(key)}


def gate_space(config: SweepConfig) -> dict[str, Distribution]:
    """The part of `resolve_space` that is searched under each supernet."""
    return {key: distribution for key, distribution in resolve_space(config).items() if not is_of_supernet(key)}


def constraint_set(config: SweepConfig, baseline: Mapping[str, float]) -> ConstraintSet:
    """`constraints`, ready for trials.

    Args:
        config: of the sweep.
        baseline: "baseline.top1" -> value.

    Raises:
        ConfigError: a condition reads a metric of the baseline that is not there.
    """
    names = _names_in_conditions(config)
    soft = tuple(parse_comparison(text, names) for text in config.constraints if isinstance(text, str))
    hard = tuple(parse_comparison(each.hard, names) for each in config.constraints if isinstance(each, HardConstraint))
    return ConstraintSet(soft, hard, baseline)


def target_set(config: SweepConfig, baseline: Mapping[str, float]) -> ConstraintSet:
    """`budget.target`, as conditions that one trial must hold together; with none of them nothing is ever enough.

    Raises:
        ConfigError: as `constraint_set`.
    """
    names = _names_in_conditions(config)
    return ConstraintSet(tuple(parse_comparison(text, names) for text in config.budget.target), (), baseline)


def conditions(config: SweepConfig) -> tuple[Comparison, ...]:
    """All conditions of the sweep: `constraints`, then `budget.target`."""
    names = _names_in_conditions(config)
    texts = [each if isinstance(each, str) else each.hard for each in config.constraints]
    return tuple(parse_comparison(text, names) for text in (*texts, *config.budget.target))


def enqueued_points(config: SweepConfig) -> list[dict[str, Any]]:
    """The points that are tried first: `sampler.enqueue`, or the published settings as far as the space holds them.

    A grid has its own points, and gets none by default; nor does a space in which nothing varies.
    """
    space = gate_space(config)
    if config.sampler.enqueue is not None:
        return [dict(point) for point in config.sampler.enqueue]
    if config.sampler.name == "grid":
        return []
    return list(published_points(config.gate, space))


def resolve_halving(config: SweepConfig) -> ParetoHalving | None:
    """The pruner of end-to-end trials; None without one."""
    pruner = config.pruner
    if pruner.name == "none":
        return None
    return ParetoHalving.geometric(pruner.factor, pruner.first_epochs, config.gate.end_to_end.epochs)


def halving_rungs(config: SweepConfig) -> tuple[int, ...]:
    """Epochs at which pareto_halving compares end-to-end trials, rising and below their full length; empty without a pruner."""
    halving = resolve_halving(config)
    return () if halving is None else halving.rungs


def resolve_trials(config: SweepConfig) -> int:
    """`budget.trials`; with a pruner rounded up to whole cohorts, which are compared as a whole: a longer sweep prunes the same trials."""
    trials, cohort = config.budget.trials, resolve_cohort(config)
    return -(-trials // cohort) * cohort if halving_rungs(config) else trials


def resolve_cohort(config: SweepConfig) -> int:
    """`sampler.cohort`, or its default for the sampler and the way in which trials are trained (CONTRACTS, Search)."""
    is_slow = config.gate.trainer == "end_to_end" or config.sampler.name == "gp"
    return config.sampler.cohort or (8 if is_slow else 64)


def resolve_timeout_s(config: SweepConfig) -> float:
    """`trial.timeout_s`, or its default for the way in which trials are trained."""
    return config.trial.timeout_s or (120.0 if config.gate.trainer == "table" else 4 * 3600.0)


def resolve_cores(config: SweepConfig) -> int:
    """`ray.num_cpus`, or the cores that this process may use: fewer than the machine has in a container or under `taskset`."""
    return config.ray.num_cpus or len(os.sched_getaffinity(0))


def config_warnings(config: SweepConfig) -> list[str]:
    """What is allowed, but is probably not meant."""
    return [
        *_sampler_warnings(config),
        *_stopping_warnings(config),
        *_space_warnings(config),
        *_training_warnings(config.supernet),
        *supernet_warnings(config.supernet, config.space),
    ]


def _sampler_warnings(config: SweepConfig) -> Iterator[str]:
    sampler, trials, cohort = config.sampler, config.budget.trials, resolve_cohort(config)
    if sampler.name in ("tpe", "gp") and sampler.startup >= trials:
        yield (
            f"sampler.startup {sampler.startup} is not below budget.trials {trials}: {sampler.name} will learn nothing, and all trials but "
            "those of sampler.enqueue will be random; lower sampler.startup or raise budget.trials"
        )
    elif sampler.name in LEARNING_SAMPLERS and sampler.order == "cohorts" and cohort >= trials:
        yield (
            f"sampler.cohort {cohort} is not below budget.trials {trials}: all trials will be random, as {sampler.name} "
            "learns from earlier cohorts; lower sampler.cohort or raise budget.trials"
        )
    if sampler.order == "asynchronous":
        yield (
            "sampler.order asynchronous: suggestions depend on which trial finishes first; "
            "the same sweep gives another front the next time, and so does one that was stopped and continued"
        )
    continuous = [key for key, distribution in gate_space(config).items() if distribution.size is None]
    if sampler.name == "grid" and continuous and "points" not in sampler.options:
        from search.suggest.grid import DEFAULT_POINTS

        yield (
            f"sampler grid takes {DEFAULT_POINTS} values each of {', '.join(continuous)}, which are continuous; "
            "say how many with sampler.options.points"
        )


def _stopping_warnings(config: SweepConfig) -> Iterator[str]:
    budget, num_first = config.budget, len(enqueued_points(config))
    if budget.plateau is not None and budget.plateau.trials >= budget.trials:
        yield (
            f"budget.plateau.trials {budget.plateau.trials} is not below budget.trials {budget.trials}: "
            "the sweep ends before a plateau can be seen"
        )
    rungs, names = halving_rungs(config), _names_in_conditions(config)
    for each in config.constraints if rungs else ():
        if isinstance(each, HardConstraint) and parse_comparison(each.hard, names).names & set(ACCURACIES):
            yield (
                f"constraints: hard '{each.hard}' is also judged after {rungs[0]} epochs and at every further rung of pareto_halving: "
                "trials that would hold it at their end are ended; write it without hard"
            )
    if config.sampler.enqueue and num_first >= budget.trials:
        yield f"sampler.enqueue holds {num_first} points, and budget.trials is {budget.trials}: nothing is left to search"
    if supernet_space(config):
        yield from _scheduler_warnings(config)
    elif config.supernets != SupernetsConfig():
        yield "supernets is not read: space holds no supernet.* key"


def _longest_training(config: SweepConfig) -> int | None:
    """Epochs of the supernet that trains longest; None where the data will say."""
    swept = config.space.get("supernet.train.epochs")
    return config.supernet.train.epochs if swept is None else max(int(value) for value in swept.edge_values())


def _scheduler_warnings(config: SweepConfig) -> Iterator[str]:
    """Settings with which a scheduler ends no training."""
    rules, epochs = config.supernets, _longest_training(config)
    if rules.scheduler == "none" or epochs is None:
        return
    grace = rules.options.get("grace_period", 0)
    for key, value in (("report_every", rules.report_every), ("options.grace_period", grace)):
        if isinstance(value, int | float) and value >= epochs:
            yield f"supernets.{key} {value} is not below supernet.train.epochs {epochs}: the scheduler stops nothing"


def _space_warnings(config: SweepConfig) -> Iterator[str]:
    gate, space = config.gate, config.space
    if all(distribution.kind == "fixed" for distribution in gate_space(config).values()):
        (router,) = possible_routers(gate, space)
        # The images' order is the same for all trials; the seed draws a perceptron's first weights and end-to-end noise.
        if gate.trainer == "table" and router not in ("evidence_gate", "evidence_gates", "learned_cascade"):
            yield f"space holds fixed values only: all trials will be equal, as router {router} draws nothing from its seed"
        else:
            yield "space holds fixed values only: all trials differ by their seed alone"
    yield from unread_warnings(gate, space)


def _training_warnings(supernet: SupernetConfig) -> Iterator[str]:
    regime = resolve_regime(supernet)
    for section in ("train", "bootstrapping"):
        number = getattr(supernet, section).num_random
        if number and regime.widths == "all":
            yield f"supernet.{section}.num_random {number} is not used: with widths all, every sub-network trains in every step"
    if supernet.train.precision == "bf16" and _trains_on_cpu(supernet.device):
        yield "supernet.train.precision bf16 on a CPU: slower than float32 below large batches"
    if regime.norm == "recalibrate" and regime.teacher in ("ema", "ema_ensemble"):
        yield (
            f"supernet.train.bn recalibrate with teacher {regime.teacher}: "
            "the EMA copy keeps no statistics while it trains, and always normalises by the batch"
        )


def _trains_on_cpu(device: Device) -> bool:
    if device == "auto":
        import torch

        return not torch.cuda.is_available()
    return device == "cpu"


# Settings of the supernet that say where and how safely it is trained, not what is trained; and those that stand
# for something else: the names of a regime for its parts, the path of a checkpoint for its tensors.
_NOT_IN_SUPERNET_KEY: dict[str, Any] = {
    "workers": True,
    "threads": True,
    "device": True,
    "keep_checkpoints": True,
    "init_from": True,
    "regime": True,
    "train": {"checkpoint_every", "widths", "num_random", "teacher", "bn"},
    "bootstrapping": {"mode", "num_random"},
}


def stage_subset(config: SweepConfig, stage: Stage) -> dict[str, JsonValue]:
    """The part of the configuration that a stage's result depends on and that enters its key, JSON-able.

    Parents, the fingerprints of the data and of the start weights (hence no `data.path`, `data.crop_fraction` or `supernet.init_from`)
    and the stage's version are the pipeline's to add.
    Ray, workers, the device of training, budget, tracking and export never enter: the same sweep done elsewhere, or
    for longer, is the same sweep.
    """
    if stage == "supernet":
        from dsnet.training.settings import without_published  # torch comes with it

        supernet = config.supernet.model_dump(mode="json", exclude=_NOT_IN_SUPERNET_KEY)
        supernet["bootstrapping"] = without_published(supernet["bootstrapping"])
        return {
            "seed": config.seed,
            "data": config.data.model_dump(mode="json", exclude={"path", "crop_fraction"}),
            "supernet": {**supernet, "regime": asdict(resolve_regime(config.supernet))},
        }
    if stage == "measure":
        return {"measure": _measure_subset(config)}
    if stage == "search":
        return _search_subset(config)
    if stage == "verify":
        return {"measure": {key: value for key, value in _measure_subset(config).items() if key != "group_sizes"}}
    if stage == "table":
        return {}
    raise ValueError(f"unknown stage {stage!r}; known: {', '.join(get_args(Stage))}")


def _measure_subset(config: SweepConfig) -> dict[str, JsonValue]:
    """Without `devices` where there are none: what was measured before they existed stays valid."""
    return config.measure.model_dump(mode="json", exclude=set() if config.measure.devices else {"devices"})


def _search_subset(config: SweepConfig) -> dict[str, JsonValue]:
    """As the search understands it: what a default stands for in place of the default, and no reference point, which scores it only."""
    subset: dict[str, Any] = config.model_dump(
        mode="json", include={"seed", "gate", "constraints", "sampler", "pruner"}
    )
    subset["space"] = {key: distribution.written() for key, distribution in resolve_space(config).items()}
    subset["metrics"] = [{"name": metric.name, "goal": metric.goal} for metric in config.metrics]
    subset["sampler"] |= {"cohort": resolve_cohort(config), "enqueue": enqueued_points(config)}
    rungs = list(halving_rungs(config))
    subset["pruner"] = {"name": "none"}
    if config.pruner.name != "none":
        subset["pruner"] = {"name": config.pruner.name, "factor": config.pruner.factor, "rungs": rungs}
    if config.gate.trainer == "table":
        del subset["gate"]["end_to_end"]
    else:
        del subset["gate"]["end_to_end"]["threads"]
    return subset


def to_yaml(config: SweepConfig) -> str:
    """The configuration as a complete sweep.yaml, in the order of the schema; reading it back gives an equal object."""
    plain = config.model_dump(mode="json", exclude=set() if config.presets else {"presets"})
    writer = YAML(typ="rt", pure=True)
    writer.width = 120
    writer.allow_unicode = True
    writer.representer.add_representer(type(None), _null)
    stream = io.StringIO()
    writer.dump(_styled(plain), stream)
    return "# Resolved by dsnet-orch: every setting of this sweep.\n" + stream.getvalue()


def _null(representer: RoundTripRepresenter, value: None) -> ScalarNode:
    return representer.represent_scalar("tag:yaml.org,2002:null", "null")


def _styled(value: Any, *, is_top: bool = True) -> Any:
    """Block style for sections, flow style for lists and for mappings that hold a list only, such as distributions."""
    if isinstance(value, list):
        sequence = CommentedSeq(_styled(item, is_top=False) for item in value)
        if not any(isinstance(item, dict) for item in value):
            sequence.fa.set_flow_style()
        return sequence
    if isinstance(value, dict):
        mapping = CommentedMap((key, _styled(item, is_top=False)) for key, item in value.items())
        if not value or (not is_top and len(value) == 1 and isinstance(next(iter(value.values())), list)):
            mapping.fa.set_flow_style()
        return mapping
    return value


def json_schema() -> dict[str, Any]:
    """JSON Schema of sweep.yaml, for editors that complete and check while one types."""
    schema = SweepConfig.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "dsnet-orch sweep"}
