"""The whole of sweep.yaml as one frozen, strict, typed object; `orchestration.config.loading` reads
files into it.

Strict means: no unknown key, no silent conversion ("3" is not 3, 1 is not true), and every range is
checked when an object is built. The only exception: a whole number is accepted for a real one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

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

from dsnet.errors import ConfigError
from dsnet.metrics import metrics
from dsnet.settings import DEFAULT_SEED, Seed
from dsnet.wording import shown, way_out
from orchestration.config.data import DataConfig
from orchestration.config.default_space import default_space
from orchestration.config.distribution import DISTRIBUTION_SCHEMA, Distribution
from orchestration.config.export import ExportConfig
from orchestration.config.gate import GateConfig
from orchestration.config.measure import MeasureConfig
from orchestration.config.objectives import Constraint, MetricConfig
from orchestration.config.platform import RayConfig, StorageConfig, TrackingConfig
from orchestration.config.schedulers import SCHEDULER_OPTIONS, check_scheduler
from orchestration.config.section import (
    FROM_LIST,
    NAME_PATTERN,
    BrokenRule,
    KeyPath,
    Section,
    refuse,
)
from orchestration.config.space import (
    cycle_problems,
    entry_problems,
    gate_part,
    gate_problems,
    point_problems,
    supernet_problems,
)
from orchestration.config.store_uri import URI_VARIABLE, has_secret, shown_uri, uri_problem
from orchestration.config.supernet import (
    SupernetConfig,
    SupernetsConfig,
)
from orchestration.config.trials import BudgetConfig, PrunerConfig, SamplerConfig, TrialConfig
from search.conditions.constraints import BASELINE
from search.conditions.expressions import parse_comparison
from search.front.pareto import parse_pick

SCHEDULERS = tuple(SCHEDULER_OPTIONS)
"""Short names of schedulers of supernets; others are named by their import path."""
LEARNING_SAMPLERS = ("tpe", "nsga2", "nsga3", "gp")
"""Samplers whose suggestions depend on the results of earlier cohorts."""


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
    """A sweep file. Only version, name, data.name and supernet.model have no default."""

    version: Annotated[Literal[1], BeforeValidator(_version)]
    """Version of this file's format."""
    name: Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
    """Name of the run and of its folder: 1 to 64 letters, digits, '.', '_' or '-', not starting
    with '.'."""
    seed: Seed = DEFAULT_SEED
    """Seed of all random numbers, 0 to 2^32 - 1."""
    data: DataConfig
    supernet: SupernetConfig
    gate: GateConfig = GateConfig()
    space: dict[str, SpaceEntry] = Field(default_factory=default_space, min_length=1)
    """Dotted key below `gate.` or `supernet.` -> distribution. A `space` in the file replaces the
    default one, which sweeps the kind of router (gate, evidence_gate, cascade, learned_cascade),
    the target, the SGS settings and the learning rate."""
    metrics: Annotated[tuple[MetricConfig, ...], Field(strict=False, min_length=2, max_length=3)] = _DEFAULT_METRICS
    """The 2 or 3 objectives, at least one to maximise and one to minimise."""
    constraints: Annotated[tuple[Constraint, ...], FROM_LIST] = ()
    """Conditions on metrics and `baseline.METRIC`, the value of the widest route: "top1 >=
    baseline.top1 - 0.003". A trial that violates one is never on the front. {hard: "params_m <= 5"}
    also ends a trial that violates it, and is refused if no trial can satisfy it."""
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
    """Name -> settings that override the file with --preset NAME. Empty in a resolved file."""

    @model_validator(mode="before")
    @classmethod
    def _what_is_given_is_not_swept_by_default(cls, data: Any) -> Any:
        return {**data, "space": default_space([data])} if isinstance(data, Mapping) and "space" not in data else data

    @model_validator(mode="after")
    def _fits_together(self) -> SweepConfig:
        problems = [*entry_problems(self.space), *_metric_problems(self)]
        problems += _tracking_problems(self)
        if not problems:
            problems += cycle_problems(self.space)
        if not problems:
            problems += [*gate_problems(self.gate, self.space), *supernet_problems(self.supernet, self.space)]
            problems += [*_condition_problems(self), *_search_problems(self), *_pick_problems(self)]
        refuse(*problems)
        return self


def metric_names(config: SweepConfig) -> tuple[str, ...]:
    """Every metric of a sweep that may be an objective or be part of a condition."""
    latencies = ["latency_ms", *(f"latency_ms_batch{size}" for size in config.measure.batch_sizes if size > 1)]
    on_devices = [f"{name}.{device}" for device in config.measure.devices for name in latencies]
    return (*metrics(), *latencies, *on_devices)


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
    """Errors: constraints and targets that cannot be read, or that are repeated."""
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
                yield BrokenRule((*path, index), f"'{comparison}' is written twice; remove one of the two")
            seen.append(comparison.text)


def _search_problems(config: SweepConfig) -> Iterator[BrokenRule]:
    """Errors: settings that the sampler, the pruner or the scheduler does not support."""
    yield from _sampler_problems(config)
    if config.sampler.enqueue:
        yield from point_problems(gate_part(config.space), config.sampler.enqueue, ("sampler", "enqueue"))
    if config.pruner.name == "pareto_halving":
        yield from _halving_problems(config)
    yield from _scheduler_problems(config)


def _halving_problems(config: SweepConfig) -> Iterator[BrokenRule]:
    name, first, epochs = ("pruner", "name"), config.pruner.first_epochs, config.gate.end_to_end.epochs
    if config.gate.trainer != "end_to_end":
        message = (
            "pareto_halving ends long trials early; those of gate.trainer table take a fraction of a second; write none"
        )
        yield BrokenRule(name, message, others=(("gate", "trainer"),))
    elif first >= epochs:
        message = f"{first} is not below gate.end_to_end.epochs {epochs}, so no trial would be ended early; lower it"
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
        space = {key: distribution.written() for key, distribution in gate_part(config.space).items()}
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


def _tracking_problems(config: SweepConfig) -> Iterator[BrokenRule]:
    if (uri := config.tracking.uri) is not None:
        problem = uri_problem(uri)
        if has_secret(uri):
            problem = (
                f"{shown_uri(uri)!r} holds a password, which would be stored with the run; leave it out, and set the environment "
                f"variables MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or {URI_VARIABLE} to the whole URI"
            )
        if problem is not None:
            yield BrokenRule(("tracking", "uri"), problem)
    if config.export.register_as is not None and not config.tracking.mlflow:
        path: KeyPath = ("export", "register_as")
        message = "a model is registered in MLflow, but tracking.mlflow is false; set it to true, or this to null"
        yield BrokenRule(path, message, (("tracking", "mlflow"),))


def _longest_training(config: SweepConfig) -> int | None:
    """Epochs of the supernet that trains longest; None if the data decide."""
    swept = config.space.get("supernet.train.epochs")
    return config.supernet.train.epochs if swept is None else max(int(value) for value in swept.edge_values())
