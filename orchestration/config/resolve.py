"""Values derived from the settings of a sweep: spaces, conditions, points to try first, and
defaults that follow from other settings."""

from __future__ import annotations

import os
import types
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from pydantic.fields import FieldInfo

from dsnet.structure.method import Base
from orchestration.config.distribution import Distribution
from orchestration.config.objectives import HardConstraint
from orchestration.config.section import (
    walk_fields,
)
from orchestration.config.space import (
    gate_part,
    is_of_supernet,
    published_points,
    resolve,
)
from orchestration.config.sweep import SweepConfig, _names_in_conditions
from search.conditions.constraints import ConstraintSet
from search.conditions.expressions import Comparison, parse_comparison
from search.study.halving import ParetoHalving


@cache
def known_fields() -> Mapping[str, FieldInfo]:
    """The field of every dotted key of sweep.yaml, sections included."""
    return types.MappingProxyType(dict(walk_fields(SweepConfig, "")))


def resolve_space(config: SweepConfig) -> dict[str, Distribution]:
    """The space that is searched: if the router is swept, each key is drawn only for kinds of
    router that read it; conditions on fixed keys are resolved."""
    return resolve(config.space)


def supernet_space(config: SweepConfig) -> dict[str, Distribution]:
    """The part of `resolve_space` that varies the supernet; empty for a sweep of gates under one
    supernet."""
    return {key: distribution for key, distribution in resolve_space(config).items() if is_of_supernet(key)}


def gate_space(config: SweepConfig) -> dict[str, Distribution]:
    """The part of `resolve_space` that is searched under each supernet."""
    return gate_part(config.space)


def constraint_set(config: SweepConfig, baseline: Mapping[str, float]) -> ConstraintSet:
    """`constraints` in the form in which trials evaluate them.

    Args:
        config: configuration of the sweep.
        baseline: "baseline.top1" -> value.

    Raises:
        ConfigError: a condition reads a metric of the baseline that is not there.
    """
    names = _names_in_conditions(config)
    soft = tuple(parse_comparison(text, names) for text in config.constraints if isinstance(text, str))
    hard = tuple(parse_comparison(each.hard, names) for each in config.constraints if isinstance(each, HardConstraint))
    return ConstraintSet(soft, hard, baseline)


def target_set(config: SweepConfig, baseline: Mapping[str, float]) -> ConstraintSet:
    """`budget.target` as conditions that one trial must meet together; without conditions the
    target is never met.

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
    """The points that are tried first: `sampler.enqueue`, or the published settings as far as the
    space holds them.

    By default a grid gets none, because it has points of its own, and neither does a space in which
    nothing varies.
    """
    space = gate_space(config)
    if config.sampler.enqueue is not None:
        return [dict(point) for point in config.sampler.enqueue]
    if config.sampler.name == "grid":
        return []
    return list(published_points(config.gate, space))


def resolve_halving(config: SweepConfig) -> ParetoHalving | None:
    """The pruner of end-to-end trials; None if there is none."""
    pruner = config.pruner
    if pruner.name == "none":
        return None
    return ParetoHalving.geometric(pruner.factor, pruner.first_epochs, config.gate.end_to_end.epochs)


def halving_rungs(config: SweepConfig) -> tuple[int, ...]:
    """Epochs at which pareto_halving compares end-to-end trials, ascending and below their full
    length; empty without a pruner."""
    halving = resolve_halving(config)
    return () if halving is None else halving.rungs


def resolve_trials(config: SweepConfig) -> int:
    """`budget.trials`; with a pruner rounded up to whole cohorts, which are compared as a whole, so
    that a longer sweep prunes the same trials."""
    trials, cohort = config.budget.trials, resolve_cohort(config)
    return -(-trials // cohort) * cohort if halving_rungs(config) else trials


def resolve_cohort(config: SweepConfig) -> int:
    """`sampler.cohort`, or its default for the sampler and the way in which trials are trained.

    The defaults are explained in docs/definitions.md, Search.
    """
    is_slow = config.gate.trainer == "end_to_end" or config.sampler.name == "gp"
    return config.sampler.cohort or (8 if is_slow else 64)


def resolve_timeout_s(config: SweepConfig) -> float:
    """`trial.timeout_s`, or its default for the way in which trials are trained."""
    return config.trial.timeout_s or (120.0 if config.gate.trainer == "table" else 4 * 3600.0)


def resolve_side_by_side(config: SweepConfig, bases: Sequence[Base]) -> int:
    """Number of networks that the structure stage trains at a time: `structure.concurrent`, but one
    if a network starts from another one or has several workers.

    Args:
        config: configuration of the sweep.
        bases: the networks that the method trains beforehand.
    """
    is_chain = any(base.follows for base in bases) or config.supernet.workers > 1
    return 1 if is_chain else max(1, min(len(bases), config.supernet.structure.concurrent or 1))


def resolve_threads(config: SweepConfig, num_cores: int, at_a_time: int = 1) -> int:
    """Threads of each process that trains a network: `supernet.threads`, or its share of the cores.

    Args:
        config: configuration of the sweep.
        num_cores: cores of the machine or of the Ray cluster.
        at_a_time: number of networks that are trained at a time.
    """
    return config.supernet.threads or max(1, num_cores // (config.supernet.workers * at_a_time))


def resolve_cores(config: SweepConfig) -> int:
    """`ray.num_cpus`, or the cores that this process may use, which are fewer than the machine has
    in a container or under `taskset`."""
    return config.ray.num_cpus or len(os.sched_getaffinity(0))
