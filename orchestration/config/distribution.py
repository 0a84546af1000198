"""Distributions: the values of one dimension of the search space, as sweep.yaml writes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import JsonValue

from dsnet.wording import shown, way_out

Scalar = bool | int | float | str
Value = Scalar | tuple[Any, ...]
"""A value of a choice; lists (width lists, say) become tuples, lists inside them too, so that a
point can be hashed."""
Conditions = tuple[tuple[str, tuple[Scalar, ...]], ...]
Kind = Literal["uniform", "loguniform", "int", "step", "choice", "fixed"]
MOST_STEPS = 1_000_000
"""Largest number of steps of a `step` range; Optuna divides it exactly, to a limited number of
digits."""
REAL_KINDS = ("uniform", "loguniform", "step")
_WRITTEN_KINDS: Mapping[str, str] = {
    "uniform": "[low, high]",
    "loguniform": "[low, high]",
    "int": "[low, high] or [low, high, step]",
    "step": "[low, high, step]",
    "choice": "[a, b, ...]",
}


@dataclass(frozen=True)
class Distribution:
    """The distribution of one dimension of the search space; ranges are inclusive at both ends.

    Attributes:
        kind: uniform, loguniform and step are real; int is whole; choice is unordered; fixed is one
            value.
        values: (low, high), (low, high, step), the choices, or the one value. `int` without a step
            has step 1. Choices may be tuples, which the file writes as lists.
        when: (key, values) pairs: drawn only in trials in which every key is drawn too and has one
            of its values.
    """

    kind: Kind
    values: tuple[Any, ...]
    when: Conditions = ()

    def __post_init__(self) -> None:
        _check_distribution(self.kind, self.values)
        if self.kind == "choice":
            object.__setattr__(self, "values", tuple(_frozen(value) for value in self.values))
        if self.kind in REAL_KINDS:
            object.__setattr__(self, "values", tuple(float(value) for value in self.values))

    @classmethod
    def parse(cls, written: object) -> Distribution:
        """Read the form of the file: `{uniform: [0.05, 0.9]}`, or a bare value that stays fixed.

        Raises:
            ValueError: the form, the kind or the range is wrong; the message says how to write it.
        """
        if isinstance(written, Distribution):
            return written
        if isinstance(written, bool | int | float | str):
            return cls("fixed", (written,))
        if isinstance(written, Mapping) and "when" in written:
            plain = cls._parse_one(
                {kind: values for kind, values in written.items() if kind != "when"}, allow_fixed=True
            )
            return replace(plain, when=_parse_conditions(written["when"]))
        return cls._parse_one(written)

    @classmethod
    def _parse_one(cls, written: object, *, allow_fixed: bool = False) -> Distribution:
        if not isinstance(written, Mapping) or len(written) != 1:
            form = "a distribution such as {uniform: [0.1, 0.9]}, or one fixed value"
            raise ValueError(f"expected {form}; got {shown(written)}")
        kind, values = next(iter(written.items()))
        if kind == "fixed" and allow_fixed:  # a bare value has no room for conditions
            return cls("fixed", (values,))
        if kind not in _WRITTEN_KINDS:
            raise ValueError(f"unknown distribution '{kind}'{way_out(str(kind), list(_WRITTEN_KINDS))}")
        if not isinstance(values, list | tuple):
            raise ValueError(f"{kind} is written {kind}: {_WRITTEN_KINDS[kind]}; got {shown(values)}")
        return cls(kind, tuple(values))

    def written(self) -> JsonValue:
        """The form that `parse` reads; a condition with one value is written as that value."""
        if self.kind == "fixed" and not self.when:
            only: JsonValue = self.values[0]
            return only
        plain: dict[str, JsonValue] = {
            self.kind: self.values[0] if self.kind == "fixed" else [thawed(value) for value in self.values]
        }
        if self.when:
            plain["when"] = {key: values[0] if len(values) == 1 else [*values] for key, values in self.when}
        return plain

    def holds(self, value: object) -> bool:
        """Whether the distribution can give exactly this value (true is not 1)."""
        if self.kind in ("choice", "fixed"):
            return any(is_same(own, _frozen(value)) for own in self.values)
        if not _is_number(value) or (self.kind == "int" and not isinstance(value, int)):
            return False
        assert isinstance(value, int | float)
        low, high, *steps = self.values
        if not low <= value <= high:
            return False
        step = steps[0] if steps else 1 if self.kind == "int" else None
        return step is None or math.isclose((value - low) / step, round((value - low) / step), abs_tol=1e-9)

    @property
    def size(self) -> int | None:
        """Number of values; None for a continuous range."""
        if self.kind in ("choice", "fixed"):
            return len(self.values)
        if self.kind in ("uniform", "loguniform"):
            return None
        low, high, *steps = self.values
        return round((high - low) / (steps[0] if steps else 1)) + 1

    def edge_values(self) -> tuple[Any, ...]:
        """The extreme values: both ends of a range, or every choice."""
        return self.values if self.kind in ("choice", "fixed") else self.values[:2]


def _parse_conditions(written: object) -> Conditions:
    """Read {key: value} or {key: [value, ...]}."""
    if not isinstance(written, Mapping) or not written:
        raise ValueError(f"when is written {{KEY: value}} or {{KEY: [value, ...]}}; got {shown(written)}")
    return tuple((str(key), _parse_condition(str(key), values)) for key, values in written.items())


def _parse_condition(key: str, written: object) -> tuple[Scalar, ...]:
    values = tuple(written) if isinstance(written, list | tuple) else (written,)
    if not values:
        raise ValueError(f"when {key}: holds no value; name those for which this is drawn")
    _check_scalars(values, f"when {key}: a value")
    for index, value in enumerate(values):
        if value in values[:index]:
            raise ValueError(f"when {key}: names {shown(value)} twice")
    return values


def is_same(one: object, other: object) -> bool:
    """Equality of values of a space: 1 equals 1.0, true does not equal 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value


def thawed(value: Any) -> Any:
    """A value in the form of files, with lists in place of tuples."""
    return [thawed(item) for item in value] if isinstance(value, tuple) else value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_MAX_CHOICES = 1000


def _check_distribution(kind: Kind, values: tuple[Scalar, ...]) -> None:
    if kind == "fixed":
        _check_scalars(values, "a fixed value")
    elif kind == "choice":
        _check_choices(values)
    else:
        _check_range(kind, values)


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and all(_is_plain(item) for item in value)
    return isinstance(value, str | bool) or _is_number(value)


def _check_scalars(values: tuple[Scalar, ...], what: str) -> None:
    for value in values:
        if not isinstance(value, bool | int | float | str):
            raise ValueError(f"{what} must be a number, text, true or false; got {shown(value)}")


def _check_choices(values: tuple[Any, ...]) -> None:
    for value in values:
        if not _is_plain(value):
            raise ValueError(f"a choice must be a number, text, true or false, or a list of these; got {shown(value)}")
    if not values:
        raise ValueError("choice has nothing to choose from")
    if len(values) > _MAX_CHOICES:
        raise ValueError(
            f"choice has {len(values):,} values; it can have at most {_MAX_CHOICES:,}, and a range has no limit"
        )
    for index, value in enumerate(values):
        if value in values[:index]:  # 1 == 1.0 == true: a study could not tell them apart
            raise ValueError(f"choice names {shown(value)} twice")


def _check_range(kind: Kind, values: tuple[Any, ...]) -> None:
    lengths = {"uniform": (2,), "loguniform": (2,), "int": (2, 3), "step": (3,)}[kind]
    if len(values) not in lengths:
        raise ValueError(f"{kind} is written {kind}: {_WRITTEN_KINDS[kind]}; got {shown(values)}")
    wanted = "whole numbers" if kind == "int" else "numbers"
    for value in values:
        if not _is_number(value) or (kind == "int" and not isinstance(value, int)):
            raise ValueError(f"{kind} takes {wanted}; got {shown(value)}")
    low, high = values[:2]
    if low > high:
        swapped = shown([high, low, *values[2:]])
        raise ValueError(f"{kind} range {shown(values)} is the wrong way round; write {swapped}")
    if low == high:
        raise ValueError(f"{kind} range {shown(values)} has one value only; to fix it, write {shown(low)} in its place")
    if kind == "loguniform" and low <= 0:
        raise ValueError(f"loguniform range {shown(values)} must start above 0")
    if len(values) == 3:
        _check_step(kind, values)


def _check_step(kind: Kind, values: tuple[Any, ...]) -> None:
    low, high, step = values
    if step <= 0:
        raise ValueError(f"{kind} range {shown(values)} needs a step above 0")
    num_steps = round((high - low) / step)
    if num_steps < 1 or not math.isclose(low + num_steps * step, high, rel_tol=1e-9, abs_tol=1e-12):
        raise ValueError(f"{kind} range {shown(values)} does not reach its end {shown(high)} in steps of {shown(step)}")
    if kind == "step" and num_steps > MOST_STEPS:
        raise ValueError(
            f"step range {shown(values)} has {num_steps:.3g} steps, but at most {MOST_STEPS:,} are allowed; for any number between, "
            f"write uniform: {shown([low, high])}"
        )


_PLAIN = {"type": ["number", "string", "boolean"]}
_WHEN_SCHEMA: dict[str, Any] = {
    "description": "Drawn only in trials whose other settings have these values: {gate.router: gate}, or a list of values.",
    "type": "object",
    "minProperties": 1,
    "additionalProperties": {"anyOf": [_PLAIN, {"type": "array", "minItems": 1, "items": _PLAIN}]},
}
DISTRIBUTION_SCHEMA: dict[str, Any] = {
    "description": "A distribution, inclusive at both ends, or one fixed value.",
    "anyOf": [
        _PLAIN,
        *(
            {
                "type": "object",
                "required": [kind],
                "additionalProperties": False,
                "properties": {kind: {"type": "array", "minItems": 1, "description": form}, "when": _WHEN_SCHEMA},
            }
            for kind, form in _WRITTEN_KINDS.items()
        ),
        {
            "type": "object",
            "required": ["fixed", "when"],
            "additionalProperties": False,
            "properties": {"fixed": _PLAIN, "when": _WHEN_SCHEMA},
        },
    ],
}
