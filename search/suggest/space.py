"""The search space: conversion of the configuration's form to Optuna distributions. All ranges
include both ends.

A dimension may have conditions: it exists only in points where its parents have certain values. A
parent is itself a dimension whose values can be listed: choice, fixed or int.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial

from dsnet.errors import ConfigError
from dsnet.wording import did_you_mean, way_out

Scalar = float | int | str | bool
"""A value of a parameter."""
Conditions = tuple[tuple[str, tuple[Scalar, ...]], ...]
"""Conditions of a dimension, all of which must hold: (parent, values that it may have)."""
MAX_BRANCHES = 100_000
"""Maximum number of combinations of the parents' values."""


@dataclass(frozen=True)
class Space:
    """The dimensions that a sweep varies, in the order of the file, but with parents before their
    children.

    Attributes:
        written: the space as written in the configuration, e.g. {"gate.target": {"uniform": [0.05,
            0.9]}}; JSON-able.
        distributions: Optuna distributions by name. A fixed value is a choice of one, so that the
            study shows it.
        conditions: conditions by name, for the dimensions that have any.
    """

    written: Mapping[str, Any]
    distributions: Mapping[str, BaseDistribution]
    conditions: Mapping[str, Conditions] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """SHA-256 of the written space, including its order; spaces with the same hash give the
        same suggestions."""
        canonical = json.dumps(list(self.written.items()), separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def free(self) -> dict[str, BaseDistribution]:
        """The dimensions with more than one value."""
        return {name: distribution for name, distribution in self.distributions.items() if not distribution.single()}

    @cached_property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The free dimensions grouped by the branches in which they exist, in order of each group's
        first dimension."""
        grouped: dict[tuple[bool, ...], list[str]] = {}
        for name in self.free:
            grouped.setdefault(tuple(self.has(name, branch) for branch in self.branches), []).append(name)
        return tuple(tuple(names) for names in grouped.values())

    def has(self, name: str, point: Mapping[str, Scalar]) -> bool:
        """Whether a dimension exists in a point, which must hold the existing dimensions before
        it."""
        return all(parent in point and point[parent] in values for parent, values in self.conditions.get(name, ()))

    @cached_property
    def branches(self) -> tuple[dict[str, Scalar], ...]:
        """All combinations of the values of existing parents; a single empty one if the space has
        no conditions.

        Raises:
            ConfigError: there are more than `MAX_BRANCHES`.
        """
        parents = {parent for conditions in self.conditions.values() for parent, _ in conditions}
        found = tuple(
            itertools.islice(self._branches([name for name in self.distributions if name in parents]), MAX_BRANCHES + 1)
        )
        if len(found) > MAX_BRANCHES:
            raise ConfigError(
                f"space: {', '.join(sorted(parents))}, on which other dimensions depend, have more than "
                f"{MAX_BRANCHES:,} combinations of values; give them fewer values"
            )
        return found

    def _branches(self, parents: Sequence[str]) -> Iterator[dict[str, Scalar]]:
        ways: Iterator[dict[str, Scalar]] = iter([{}])
        for parent in parents:
            ways = self._set(ways, parent)
        return ways

    def _set(self, ways: Iterator[dict[str, Scalar]], parent: str) -> Iterator[dict[str, Scalar]]:
        for way in ways:
            if self.has(parent, way):
                distribution = self.distributions[parent]
                yield from ({**way, parent: nth_value(distribution, k)} for k in range(num_values(distribution)))
            else:
                yield way


def parse_space(written: Mapping[str, Any]) -> Space:
    """Read the `space` section.

    Args:
        written: dotted name -> {kind: arguments}, or a plain value that stays fixed. Kinds: uniform
            [low, high], loguniform [low, high] (low > 0), int [low, high] or [low, high, step],
            step [low, high, step], choice [a, b, ...], fixed value. Conditions may be given beside
            the kind as `when: {parent: value or list of values}`.

    Raises:
        ConfigError: an entry is invalid or its conditions can never hold; the message names it.
    """
    if not written:
        raise ConfigError(
            "space: nothing to search over; name at least one setting, e.g. gate.target: {uniform: [0.05, 0.9]}"
        )
    distributions = {name: _parse_entry(name, entry) for name, entry in written.items()}
    conditions = {
        name: _parse_when(name, entry["when"], distributions) for name, entry in written.items() if _has_when(entry)
    }
    order = _parents_first(distributions, conditions)
    space = Space(dict(written), {name: distributions[name] for name in order}, conditions)
    for name in conditions:
        if not any(space.has(name, branch) for branch in space.branches):
            raise ConfigError(f"space.{name}: its conditions can never hold together: {_in_words(conditions[name])}")
    return space


def suggest(trial: Trial, space: Space) -> dict[str, Scalar]:
    """Suggest a value of every existing dimension for `trial`, in the order of the space.

    The order matters: a sampler that draws dimensions one by one consumes its random numbers in
    this order.
    """
    point: dict[str, Scalar] = {}
    for name, distribution in space.distributions.items():
        if space.has(name, point):
            point[name] = _suggest_one(trial, name, distribution)
    return point


def num_values(distribution: BaseDistribution, num_continuous: int = 1) -> int:
    """Number of values of a dimension; `num_continuous` if it has no steps."""
    match distribution:
        case CategoricalDistribution(choices=choices):
            return len(choices)
        case IntDistribution(low=low, high=high, step=step):
            return (high - low) // step + 1
        case FloatDistribution(low=low, high=high, step=None):
            return 1 if low == high else num_continuous
        case FloatDistribution(low=low, high=high, step=float(step)):
            return round((high - low) / step) + 1
    raise TypeError(f"no values of {distribution!r}")


def nth_value(distribution: BaseDistribution, index: int, num_continuous: int = 1) -> Any:
    """The value of a dimension with a given index, in rising order or in the order of its choice.

    Args:
        distribution: distribution of the dimension.
        index: 0 <= index < `num_values`.
        num_continuous: >= 1; number of values of a dimension without steps, evenly spaced (by ratio
            for loguniform), including both ends; 1 gives its middle.
    """
    match distribution:
        case CategoricalDistribution(choices=choices):
            return choices[index]
        case IntDistribution(low=low, step=step):
            return low + index * step
        case FloatDistribution(low=low, high=high, step=float(step)):
            return min(high, low + index * step)  # the same expression as in Optuna
    return at_share(distribution, 0.5 if num_continuous == 1 else index / (num_continuous - 1))


def at_share(distribution: BaseDistribution, share: float) -> Any:
    """The quantile of a dimension at `share`, 0..1; discrete values have equal shares."""
    if not isinstance(distribution, FloatDistribution) or distribution.step is not None:
        number = num_values(distribution)
        return nth_value(distribution, min(number - 1, int(share * number)))
    low, high = distribution.low, distribution.high
    if share in (0.0, 1.0):
        return high if share else low  # exactly, without the rounding of the logarithm
    value = low * (high / low) ** share if distribution.log else low + share * (high - low)
    return min(high, max(low, value))


def check_point(space: Space, point: Mapping[str, Scalar]) -> None:
    """Check a point that is to be enqueued; it may lack dimensions, which are drawn.

    Raises:
        ConfigError: a key is not in the space, a value is outside its dimension, or a dimension
            cannot exist together with the point's other values.
    """
    for name, value in point.items():
        distribution = space.distributions.get(name)
        if distribution is None:
            hint = did_you_mean(name, list(space.distributions)) or ";"
            raise ConfigError(f"'{name}' is not in the space{hint} it holds {', '.join(space.distributions)}")
        if not _holds(distribution, value):
            raise ConfigError(f"{name} = {value!r} is outside the space; it takes {_range_of(distribution)}")
        violated = _violated_condition(space, name, point)
        if violated is not None:
            raise ConfigError(
                f"{name} is only tried when {_in_words((violated,))}, which is not so in this point; leave it out"
            )


def _violated_condition(space: Space, name: str, point: Mapping[str, Scalar]) -> tuple[str, tuple[Scalar, ...]] | None:
    """The first condition of a dimension, or of its parents, that the point's values violate; None
    if there is none."""
    for parent, values in space.conditions.get(name, ()):
        if parent in point and point[parent] not in values:
            return parent, values
        above = _violated_condition(space, parent, point)
        if above is not None:
            return above
    return None


def _holds(distribution: BaseDistribution, value: Scalar) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    if isinstance(value, bool | str) or not math.isfinite(value):
        return False
    if isinstance(distribution, IntDistribution) and value != int(value):
        return False
    return distribution._contains(float(value))


def _range_of(distribution: BaseDistribution) -> str:
    match distribution:
        case CategoricalDistribution(choices=choices):
            return ", ".join(map(repr, choices))
        case IntDistribution(low=low, high=high, step=step):
            return f"whole numbers {low}..{high}" + (f" in steps of {step}" if step != 1 else "")
        case FloatDistribution(low=low, high=high, step=step):
            return f"{low:g}..{high:g}" + ("" if step is None else f" in steps of {step:g}")
    raise TypeError(f"no range of {distribution!r}")


def _in_words(conditions: Conditions) -> str:
    return " and ".join(f"{parent} is {' or '.join(map(str, values))}" for parent, values in conditions)


def _suggest_one(trial: Trial, name: str, distribution: BaseDistribution) -> Any:
    match distribution:
        case FloatDistribution(low=low, high=high, log=log, step=step):
            return trial.suggest_float(name, low, high, log=log, step=step)
        case IntDistribution(low=low, high=high, step=step):
            return trial.suggest_int(name, low, high, step=step)
        case CategoricalDistribution(choices=choices):
            return trial.suggest_categorical(name, choices)
    raise TypeError(f"no way to suggest from {distribution!r}")


def _has_when(entry: Any) -> bool:
    return isinstance(entry, Mapping) and "when" in entry


def _parse_when(name: str, when: Any, distributions: Mapping[str, BaseDistribution]) -> Conditions:
    """Read one entry's conditions; each value is replaced by the parent's equal value, since 1 ==
    True in Python."""
    if not isinstance(when, Mapping) or not when:
        raise ConfigError(f"space.{name}: write the condition as when: {{other.setting: value}}; got {when!r}")
    conditions = []
    for parent, wanted in when.items():
        if parent not in distributions:
            hint = did_you_mean(str(parent), [other for other in distributions if other != name])
            raise ConfigError(f"space.{name}: when names '{parent}', which is not in the space{hint}")
        if isinstance(distributions[parent], FloatDistribution):
            raise ConfigError(
                f"space.{name}: when names {parent}, whose values cannot be listed; a condition needs a choice, fixed or int"
            )
        values = wanted if isinstance(wanted, Sequence) and not isinstance(wanted, str) else [wanted]
        conditions.append((parent, tuple(_own_value(name, parent, value, distributions[parent]) for value in values)))
        if not values:
            raise ConfigError(f"space.{name}: when lists no value of {parent}, so that the condition could never hold")
    return tuple(conditions)


def _own_value(name: str, parent: str, value: Any, distribution: BaseDistribution) -> Scalar:
    if _is_scalar(value) and _holds(distribution, value):
        if not isinstance(distribution, CategoricalDistribution):
            return int(value)
        own: Scalar = distribution.choices[distribution.choices.index(value)]  # type: ignore[assignment]
        return own
    raise ConfigError(f"space.{name}: when {parent} is {value!r}, but it only takes {_range_of(distribution)}")


def _parents_first(distributions: Mapping[str, BaseDistribution], conditions: Mapping[str, Conditions]) -> list[str]:
    """The names in the given order, but each after its parents.

    Raises:
        ConfigError: a dimension depends on itself.
    """
    order: list[str] = []

    def place(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            cycle = " -> ".join((*path[path.index(name) :], name))
            raise ConfigError(f"space.{name}: the conditions form a cycle: {cycle}; remove one `when`")
        if name not in order:
            for parent, _ in conditions.get(name, ()):
                place(parent, (*path, name))
            order.append(name)

    for name in distributions:
        place(name, ())
    return order


def _parse_entry(name: str, entry: Any) -> BaseDistribution:
    if _is_scalar(entry):
        return _fixed(name, entry)
    kinds = {key: value for key, value in entry.items() if key != "when"} if isinstance(entry, Mapping) else {}
    if len(kinds) != 1:
        raise ConfigError(
            f"space.{name}: expected one distribution such as {{uniform: [0.1, 0.9]}}, or a value; got {entry!r}"
        )
    kind, arguments = next(iter(kinds.items()))
    parse = _KINDS.get(kind)
    if parse is None:
        raise ConfigError(f"space.{name}: unknown distribution '{kind}'{way_out(str(kind), list(_KINDS))}")
    return parse(name, arguments)


def _uniform(name: str, arguments: Any) -> BaseDistribution:
    low, high = _range(name, "uniform", arguments, form="[low, high]", lengths=(2,))
    return FloatDistribution(float(low), float(high))


def _loguniform(name: str, arguments: Any) -> BaseDistribution:
    low, high = _range(name, "loguniform", arguments, form="[low, high]", lengths=(2,))
    if low <= 0:
        raise ConfigError(f"space.{name}: loguniform must start above 0; got {arguments!r}")
    return FloatDistribution(float(low), float(high), log=True)


def _int(name: str, arguments: Any) -> BaseDistribution:
    low, high, *step = _range(name, "int", arguments, form="[low, high] or [low, high, step]", lengths=(2, 3))
    if not all(isinstance(value, int) for value in arguments):
        raise ConfigError(f"space.{name}: int takes whole numbers; got {arguments!r}")
    return IntDistribution(int(low), int(high), step=int(step[0]) if step else 1)


def _step(name: str, arguments: Any) -> BaseDistribution:
    low, high, step = _range(name, "step", arguments, form="[low, high, step]", lengths=(3,))
    return FloatDistribution(float(low), float(high), step=float(step))


def _choice(name: str, arguments: Any) -> BaseDistribution:
    if not isinstance(arguments, Sequence) or isinstance(arguments, str) or not arguments:
        raise ConfigError(f"space.{name}: choice takes a list such as [a, b]; got {arguments!r}")
    for index, value in enumerate(arguments):
        if not _is_scalar(value):
            raise ConfigError(f"space.{name}: a choice must be a number, text, true or false; got {value!r}")
        if value in arguments[:index]:  # 1 == 1.0 == True: the study could not tell them apart either
            raise ConfigError(f"space.{name}: choice holds {value!r} twice in {arguments!r}")
    return CategoricalDistribution(tuple(arguments))


def _fixed(name: str, argument: Any) -> BaseDistribution:
    if not _is_scalar(argument):
        raise ConfigError(f"space.{name}: a fixed value must be a number, text, true or false; got {argument!r}")
    return CategoricalDistribution((argument,))


_KINDS: Mapping[str, Callable[[str, Any], BaseDistribution]] = {
    "uniform": _uniform,
    "loguniform": _loguniform,
    "int": _int,
    "step": _step,
    "choice": _choice,
    "fixed": _fixed,
}


def _range(name: str, kind: str, arguments: Any, *, form: str, lengths: tuple[int, ...]) -> list[float]:
    """Read the numbers of a range: low <= high and, if given, a step that leads exactly from low to
    high."""
    if not isinstance(arguments, Sequence) or len(arguments) not in lengths or not all(map(_is_finite, arguments)):
        raise ConfigError(f"space.{name}: {kind} is written {kind}: {form} with finite numbers; got {arguments!r}")
    low, high, *step = arguments
    if low > high:
        raise ConfigError(f"space.{name}: {kind} {list(arguments)} is the wrong way round; write {[high, low, *step]}")
    if step:
        _check_step(name, kind, low, high, step[0])
    return list(arguments)


def _check_step(name: str, kind: str, low: float, high: float, step: float) -> None:
    if step <= 0:
        raise ConfigError(f"space.{name}: {kind} needs a step above 0; got {step}")
    low_, high_, step_ = (
        Decimal(str(value)) for value in (low, high, step)
    )  # 0.3 is 3 x 0.1 as written, not as floats
    if (high_ - low_) % step_ != 0:
        last = high_ - (high_ - low_) % step_
        raise ConfigError(
            f"space.{name}: {kind} [{low}, {high}, {step}] does not reach its end {high}; "
            f"end it at {last} or {last + step_}"
        )


def _is_scalar(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
