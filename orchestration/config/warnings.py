"""Warnings about settings that are allowed, but probably not meant."""

from __future__ import annotations

from collections.abc import Iterator

from dsnet.metrics import share_names
from dsnet.routers.kinds import router_kind
from dsnet.settings import Device
from dsnet.structure.settings import StructureSettings
from dsnet.training.settings import EMA_TEACHERS, TrainSettings
from dsnet.wording import plural
from orchestration.config.objectives import HardConstraint
from orchestration.config.resolve import enqueued_points, gate_space, halving_rungs, resolve_cohort, supernet_space
from orchestration.config.space import (
    possible_routers,
    supernet_warnings,
    unread_warnings,
)
from orchestration.config.supernet import (
    SupernetConfig,
    SupernetsConfig,
    resolve_regime,
)
from orchestration.config.sweep import (
    LEARNING_SAMPLERS,
    SweepConfig,
    _longest_training,
    _names_in_conditions,
)
from search.conditions.expressions import parse_comparison


def config_warnings(config: SweepConfig) -> list[str]:
    """Warnings about settings that are allowed, but probably not meant."""
    return [
        *_structure_warnings(config),
        *_sampler_warnings(config),
        *_stopping_warnings(config),
        *_space_warnings(config),
        *_training_warnings(config.supernet),
        *supernet_warnings(config.supernet, config.space),
    ]


def _structure_warnings(config: SweepConfig) -> Iterator[str]:
    """Warnings about settings that no method reads with which a supernet may be made."""
    section = StructureSettings.SECTION
    swept, own = config.space.get(f"{section}.method"), config.supernet.structure.method
    methods = [own] if swept is None else [str(value) for value in swept.edge_values()]
    readers = f"method {own} does not read it" if swept is None else "none of the methods in space reads it"
    for name, reader in config.supernet.structure.settings().unread(methods):
        yield f"{section}.{name} has no effect: {readers}; choose method {reader}, or remove it"


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
            "the sweep ends before a plateau can be detected"
        )
    rungs, names = halving_rungs(config), _names_in_conditions(config)
    for each in config.constraints if rungs else ():
        if isinstance(each, HardConstraint) and parse_comparison(each.hard, names).names & share_names():
            yield (
                f"constraints: hard '{each.hard}' is also judged after {rungs[0]} epochs and at every further rung of pareto_halving: "
                "a trial that would satisfy it at its end may be ended; write it without hard"
            )
    if config.sampler.enqueue and num_first >= budget.trials:
        yield f"sampler.enqueue has {plural(num_first, 'point')} and budget.trials is {budget.trials}: no trial is left for the search"
    if supernet_space(config):
        yield from _scheduler_warnings(config)
    elif config.supernets != SupernetsConfig():
        yield "section supernets has no effect: space has no supernet.* key"


def _scheduler_warnings(config: SweepConfig) -> Iterator[str]:
    """Warnings about settings with which a scheduler stops no training."""
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
        # The images' order is the same for all trials; the seed draws a perceptron's first weights
        # and end-to-end noise.
        if gate.trainer == "table" and router_kind(router).head in ("none", "linear"):
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
    for name in ("soft_weight", "temperature"):
        value = getattr(supernet.train, name)
        if regime.teacher == "none" and value != getattr(TrainSettings, name):
            yield f"supernet.train.{name} {value:g} is not used: with teacher none, all sub-networks learn from the labels"
    if supernet.train.precision == "bf16" and _trains_on_cpu(supernet.device):
        yield "supernet.train.precision bf16 on a CPU: slower than float32 below large batches"
    if regime.norm == "recalibrate" and regime.teacher in EMA_TEACHERS:
        yield (
            f"supernet.train.bn recalibrate with teacher {regime.teacher}: "
            "the EMA copy keeps no statistics while it trains, and always normalises by the batch"
        )


def _trains_on_cpu(device: Device) -> bool:
    if device == "auto":
        import torch

        return not torch.cuda.is_available()
    return device == "cpu"
