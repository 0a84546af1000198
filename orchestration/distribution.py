"""What one dimension of the search space draws from, as sweep.yaml writes it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import JsonValue

from orchestration.wording import shown, way_out

Scalar = bool | int | float | str
Kind = Literal["uniform", "loguniform", "int", "step", "choice", "fixed"]
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
    """What one dimension of the search space draws from; ranges are inclusive at both ends.

    Attributes:
        kind: uniform, loguniform and step are real; int is whole; choice is unordered; fixed is one value.
        values: (low, high), (low, high, step), the choices, or the one value. `int` without a step has step 1.
    """

    kind: Kind
    values: tuple[Scalar, ...]

    def __post_init__(self) -> None:
        _check_distribution(self.kind, self.values)
        if self.kind in REAL_KINDS:
            object.__setattr__(self, "values", tuple(float(value) for value in self.values))

    @classmethod
    def parse(cls, written: object) -> Distribution:
        """Read what stands in the file: `{uniform: [0.05, 0.9]}`, or a bare value that stays fixed.

        Raises:
            ValueError: the form, the kind or the range is wrong; the message says how to write it.
        """
        if isinstance(written, Distribution):
            return written
        if isinstance(written, bool | int | float | str):
            return cls("fixed", (written,))
        if not isinstance(written, Mapping) or len(written) != 1:
            form = "a distribution such as {uniform: [0.1, 0.9]}, or one fixed value"
            raise ValueError(f"expected {form}; got {shown(written)}")
        kind, values = next(iter(written.items()))
        if kind not in _WRITTEN_KINDS:
            raise ValueError(f"unknown distribution '{kind}'{way_out(str(kind), list(_WRITTEN_KINDS))}")
        if not isinstance(values, list | tuple):
            raise ValueError(f"{kind} is written {kind}: {_WRITTEN_KINDS[kind]}; got {shown(values)}")
        return cls(kind, tuple(values))

    def written(self) -> JsonValue:
        """The form that `parse` reads."""
        return self.values[0] if self.kind == "fixed" else {self.kind: list(self.values)}

    def edge_values(self) -> tuple[Scalar, ...]:
        """The values that bound all others: both ends, or every choice."""
        return self.values if self.kind in ("choice", "fixed") else self.values[:2]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_distribution(kind: Kind, values: tuple[Scalar, ...]) -> None:
    if kind == "fixed":
        _check_scalars(values, "a fixed value")
    elif kind == "choice":
        _check_choices(values)
    else:
        _check_range(kind, values)


def _check_scalars(values: tuple[Scalar, ...], what: str) -> None:
    for value in values:
        if not isinstance(value, bool | int | float | str):
            raise ValueError(f"{what} must be a number, text, true or false; got {shown(value)}")


def _check_choices(values: tuple[Scalar, ...]) -> None:
    _check_scalars(values, "a choice")
    if not values:
        raise ValueError("choice has nothing to choose from")
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


DISTRIBUTION_SCHEMA: dict[str, Any] = {
    "description": "A distribution, inclusive at both ends, or one fixed value.",
    "anyOf": [
        {"type": ["number", "string", "boolean"]},
        *(
            {
                "type": "object",
                "required": [kind],
                "additionalProperties": False,
                "properties": {kind: {"type": "array", "minItems": 1, "description": form}},
            }
            for kind, form in _WRITTEN_KINDS.items()
        ),
    ],
}
