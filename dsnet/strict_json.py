"""Strict reading of JSON into frozen dataclasses, without unknown keys or silent conversions. Needs
no torch or pydantic."""

from __future__ import annotations

import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from dsnet.errors import ConfigError
from dsnet.wording import way_out

T = TypeVar("T")

_WANTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def read_strictly(cls: type[T], data: object, where: str = "") -> T:
    """Build a dataclass, including nested ones, from the result of `json.loads`.

    A list is converted to a tuple and an integer to a float where the field requires it; nothing
    else is converted.

    Args:
        cls: the dataclass; its own checks run when it is built.
        data: a JSON object; missing keys take their defaults.
        where: the dotted key of `data`, for messages.

    Raises:
        ConfigError: a key is unknown or missing, or a value has the wrong type; the message names
            the dotted key.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where or 'the configuration'} is {data!r}, but must be a JSON object")
    settings = {field.name: field for field in fields(cls) if field.init}  # type: ignore[arg-type] # a dataclass
    check_known(data, settings, where)
    missing = [
        _dotted(where, name)
        for name, field in settings.items()
        if name not in data and field.default is MISSING and field.default_factory is MISSING
    ]
    if missing:
        raise ConfigError(f"{', '.join(missing)}: missing, and without a default")
    hints = get_type_hints(cls)
    return cls(**{name: _read(hints[name], value, _dotted(where, name)) for name, value in data.items()})


def check_known(data: Iterable[str], known: Iterable[str], where: str) -> None:
    """Check that all keys are known.

    Raises:
        ConfigError: a key is unknown; the message names it, the nearest known one, and all known
            ones.
    """
    names = list(known)
    for key in data:
        if key not in names:
            raise ConfigError(f"{_dotted(where, key)}: unknown setting{way_out(str(key), names)}")


@dataclass(frozen=True, kw_only=True)
class NumberRange:
    """The numbers that a setting may have; booleans, NaN and infinity are never allowed."""

    lowest: float | None = None
    """Inclusive lower limit."""
    above: float | None = None
    """Exclusive lower limit."""
    highest: float | None = None
    """Inclusive upper limit."""
    below: float | None = None
    """Exclusive upper limit."""
    is_whole: bool = False
    """Whether it must be an integer."""
    is_optional: bool = False
    """Whether None is allowed too."""

    def check(self, key: str, value: object) -> None:
        """Check that a value lies in the range.

        Raises:
            ConfigError: it does not; the message names the dotted key, the value and the range.
        """
        if value is None and self.is_optional:
            return
        or_null = " or null" if self.is_optional else ""
        wanted = int if self.is_whole else float
        if not _fits(wanted, value):
            raise ConfigError(f"{key} is {value!r}, but must be {_WANTED[wanted]}{or_null}")
        if not self._holds(cast("float", value)):
            raise ConfigError(f"{key} is {value!r}, but must be {self._limits()}{or_null}")

    def _holds(self, value: float) -> bool:
        return (
            (self.lowest is None or value >= self.lowest)
            and (self.above is None or value > self.above)
            and (self.highest is None or value <= self.highest)
            and (self.below is None or value < self.below)
        )

    def _limits(self) -> str:
        limits = {"at least": self.lowest, "above": self.above, "at most": self.highest, "below": self.below}
        return " and ".join(f"{name} {limit:g}" for name, limit in limits.items() if limit is not None)


def _dotted(where: str, name: object) -> str:
    return f"{where}.{name}" if where else str(name)


def _read(wanted: Any, value: object, where: str) -> Any:
    if is_dataclass(wanted):
        assert isinstance(wanted, type)
        return read_strictly(wanted, value, where)
    if not _fits(wanted, value):
        raise ConfigError(f"{where} is {value!r}, but must be {_described(wanted)}")
    if _is_union(wanted):  # an integer stays an integer if the union has int
        members = sorted(get_args(wanted), key=lambda each: each is float)
        return _read(next(each for each in members if _fits(each, value)), value, where)
    if get_origin(wanted) is tuple:
        assert isinstance(value, list | tuple)
        return _read_tuple(wanted, value, where)
    if get_origin(wanted) is Mapping and is_dataclass(get_args(wanted)[1]):
        return {name: _read(get_args(wanted)[1], each, _dotted(where, name)) for name, each in value.items()}  # type: ignore[attr-defined] # it fits
    return float(value) if wanted is float and isinstance(value, int) else value


def _read_tuple(wanted: Any, value: list[Any] | tuple[Any, ...], where: str) -> tuple[Any, ...]:
    items = get_args(wanted)
    items = (items[0],) * len(value) if items[-1] is Ellipsis else items
    if len(items) != len(value):
        raise ConfigError(f"{where} has {len(value)} values, but must have {len(items)}")
    return tuple(_read(item, each, f"{where}[{number}]") for number, (item, each) in enumerate(zip(items, value)))  # noqa: B905


def _is_union(wanted: Any) -> bool:
    return get_origin(wanted) in (Union, types.UnionType)


def _fits(wanted: Any, value: object) -> bool:
    if _is_union(wanted):
        return any(_fits(each, value) for each in get_args(wanted))
    if wanted is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if get_origin(wanted) is tuple:
        return isinstance(value, list | tuple)
    return isinstance(value, get_origin(wanted) or wanted)


def _described(wanted: Any) -> str:
    if _is_union(wanted):
        return " or ".join(_described(each) for each in get_args(wanted))
    return _WANTED.get(wanted, "a list" if get_origin(wanted) is tuple else "a JSON object")
