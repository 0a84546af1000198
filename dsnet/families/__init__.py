"""Architecture families, registered by name.

A new family is one file in this folder that calls `register` when it is imported.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from dsnet.errors import ConfigError
from dsnet.image_size import ImageSize, normal_size
from dsnet.network.supernet import Supernet
from dsnet.plugins import load_plugins
from dsnet.space.entry_gate import differs_before_gates, with_entry_gate
from dsnet.space.spec import SupernetSpec
from dsnet.space.subnet_set import SubnetSet
from dsnet.wording import way_out


@dataclass(frozen=True)
class Task:
    """Properties of a task on which a network's input and output depend."""

    num_classes: int
    in_channels: int
    image_size: ImageSize

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", normal_size(self.image_size))


@dataclass(frozen=True)
class GatePlace:
    """A place in a network at which it can have a gate."""

    name: str
    """Its name in `supernet.options.gates`."""
    node: str
    """The name of the operation whose output the gate reads."""
    channels: int
    size: tuple[int, int]
    """Height and width of the features there."""
    madds_before: int
    """MAdds of the widest sub-network before it."""
    madds_after: int
    is_main: bool
    """Whether a short list has it."""


def with_task(spec: SupernetSpec, task: Task) -> SupernetSpec:
    """The spec for other images and classes, where operations do not depend on them."""
    return replace(spec, num_classes=task.num_classes, image_size=task.image_size)


@dataclass(frozen=True)
class Family:
    """One architecture family."""

    name: str
    defaults: Mapping[str, Any]
    """Every option with its default; other options are refused."""
    layout: Callable[[Task, Mapping[str, Any]], SubnetSet]
    """Function (task, complete options) -> sub-networks with their spec, without weights; it raises
    ValueError for a bad option. The spec's `norm` is the family's default."""
    build: Callable[[SupernetSpec, SubnetSet, torch.Generator], Supernet]
    for_task: Callable[[SupernetSpec, Task], SupernetSpec] = with_task
    """Function (spec, task with as many image channels) -> the spec of the same network for the
    task's image size and number of classes."""
    naming: str = ""
    """A sentence that explains the names of its sub-networks; empty where they are plain
    numbers."""
    gate_places: Callable[[SupernetSpec], tuple[GatePlace, ...]] = lambda _: ()
    """Function (spec) -> the places at which its network can have gates, where these can be
    chosen."""


_FAMILIES: dict[str, Family] = {}
_RESOLVERS: list[Callable[[str], Family | None]] = []


def register(family: Family) -> None:
    """Register a family.

    Raises:
        ValueError: a family of this name is registered already.
    """
    if family.name in _FAMILIES:
        raise ValueError(f"the family {family.name!r} is registered twice")
    _FAMILIES[family.name] = family


def register_resolver(resolver: Callable[[str], Family | None]) -> None:
    """Register a function that makes the family of a name that is not registered, or returns
    None."""
    _RESOLVERS.append(resolver)


def family_names() -> tuple[str, ...]:
    """The names of all registered families, sorted."""
    load_plugins()
    return tuple(sorted(_FAMILIES))


def get_family(name: str) -> Family:
    """The family registered as `name`, or made for it by a resolver.

    Raises:
        ConfigError: no family has this name.
    """
    names = family_names()
    if name in names:
        return _FAMILIES[name]
    family = next((found for resolver in _RESOLVERS if (found := resolver(name)) is not None), None)
    if family is None:
        raise ConfigError(f"unknown model {name!r}{way_out(name, names)}")
    return family


def unknown_options(name: str, options: Mapping[str, Any]) -> dict[str, str]:
    """The options that a family does not have: name -> error message without the setting's key."""
    known = list(get_family(name).defaults)
    return {key: f"unknown option of {name}{way_out(str(key), known)}" for key in options if key not in known}


def layout(name: str, task: Task, options: Mapping[str, Any] | None = None, norm: str | None = None) -> SubnetSet:
    """The sub-networks of a family for a task, and through them the spec, without building weights.

    Args:
        name: the family's registered name.
        task: the task's classes and images.
        options: options of the family; options that are not given take its defaults.
        norm: one of `dsnet.space.spec.NORMS`; None for the family's default.

    Sub-networks that differ before the first gate of the family get an entry gate.

    Raises:
        ConfigError: unknown family or option, or an option out of its range.
    """
    family = get_family(name)
    options = dict(options or {})
    for key, message in unknown_options(name, options).items():
        raise ConfigError(f"supernet.options.{key}: {message}")
    try:
        subnets = family.layout(task, {**family.defaults, **options})
        if differs_before_gates(subnets):
            subnets = with_entry_gate(subnets)
        if norm is None or norm == subnets.spec.norm:
            return subnets
        return replace(subnets, spec=replace(subnets.spec, norm=norm))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"supernet.options of {name}: {error}") from error


def create(
    name: str, task: Task, options: Mapping[str, Any] | None = None, *, norm: str | None = None, seed: int = 0
) -> Supernet:
    """Build a freshly initialised supernet; equal seeds give equal weights.

    Raises:
        ConfigError: as `layout`.
    """
    return rebuild(layout(name, task, options, norm), torch.Generator().manual_seed(seed))


def rebuild(subnets: SubnetSet, generator: torch.Generator | None = None) -> Supernet:
    """Build the supernet of a (stored) set of sub-networks, with fresh weights.

    Raises:
        ConfigError: its family is not registered.
    """
    family = get_family(subnets.spec.family)
    return family.build(subnets.spec, subnets, generator if generator is not None else torch.Generator().manual_seed(0))


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
