"""Base of the core's settings, and the types of their values.

A type holds the bounds or the choices of one value. A class of settings is a frozen dataclass with
such types; its values are checked when an object is built. The sections of sweep.yaml have the same
types and take their defaults from these classes, so that no bound, choice or default is written
twice. This module needs no torch or pydantic.
"""

from __future__ import annotations

import math
import operator
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from functools import cache
from itertools import repeat
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, GroupedMetadata, Gt, Le, Lt, MaxLen, MinLen

from dsnet.errors import ConfigError
from dsnet.wording import plural, way_out

Fraction = Annotated[float, Ge(0), Le(1)]
PositiveFraction = Annotated[float, Gt(0), Le(1)]
FractionBelowOne = Annotated[float, Ge(0), Lt(1)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
LARGEST_COUNT = 10**9
"""Largest number of anything: far above any useful value; products of much larger ones overflow."""
MAX_THREADS = 4096
PositiveInt = Annotated[int, Ge(1), Le(LARGEST_COUNT)]
NonNegativeInt = Annotated[int, Ge(0), Le(LARGEST_COUNT)]
NumThreads = Annotated[int, Ge(1), Le(MAX_THREADS)]
LARGEST_RATE = 1e6
"""Largest learning rate and weight decay: far above any useful value; much larger ones overflow
float32 in the optimiser."""
LearningRate = Annotated[float, Gt(0), Le(LARGEST_RATE)]
WeightDecay = Annotated[float, Ge(0), Le(LARGEST_RATE)]
Seed = Annotated[int, Ge(0), Lt(2**32)]
DEFAULT_SEED = 0
Device = Literal["auto", "cpu", "cuda"]
"""`auto` is cuda where there is one (`dsnet.environment.resolve_device`)."""


@dataclass(frozen=True)
class OneOf:
    """Choices of a text value that are known only at run time, such as registered names."""

    names: Callable[[], Sequence[str]]


class SettingError(ConfigError, ValueError):
    """The value of a setting is not allowed."""


class Settings:
    """Base of frozen dataclasses of settings: every field is checked against its type when an
    object is built. Rules between fields belong in `__post_init__`, after that of this class."""

    SECTION: ClassVar[str] = ""
    """Dotted key of the section of sweep.yaml that holds the fields, for messages."""
    KEYS: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Field -> dotted key, for fields with another name or another section in sweep.yaml."""

    def __post_init__(self) -> None:
        check_fields(self, dotted_keys(type(self)).__getitem__)  # type: ignore[arg-type] # a class has a hash


@cache
def dotted_keys(settings: type[Settings]) -> Mapping[str, str]:
    """The dotted key of every field, in the order of the fields."""
    prefix = f"{settings.SECTION}." if settings.SECTION else ""
    names = [field.name for field in fields(settings)]  # type: ignore[arg-type] # a dataclass
    return MappingProxyType({name: settings.KEYS.get(name, prefix + name) for name in names})


@cache
def types_of(settings: type) -> Mapping[str, Any]:
    """The type of every field of a dataclass, with its bounds."""
    hints = get_type_hints(settings, include_extras=True)
    return MappingProxyType({field.name: hints[field.name] for field in fields(settings)})


def check_fields(settings: object, key_of: Callable[[str], str]) -> None:
    """Check every field of a dataclass against its type.

    Args:
        settings: the object.
        key_of: the dotted key of a field, for messages.

    Raises:
        SettingError: a value has another type, or lies outside its bounds or choices; the message
            says the key, the value, and what is allowed.
    """
    for name, wanted, test in _tests_of(type(settings)):  # type: ignore[arg-type] # a class has a hash
        value = getattr(settings, name)
        if not test(value):
            check_value(key_of(name), value, wanted)


@cache
def _tests_of(settings: type) -> Sequence[tuple[str, Any, Test]]:
    return [(name, wanted, _test(wanted)) for name, wanted in types_of(settings).items()]


def check_value(key: str, value: object, wanted: Any) -> None:
    """Check one value against a type with bounds.

    Args:
        key: the dotted key of the setting, for the message.
        value: the value; a boolean is not a number, and numbers must be finite.
        wanted: the type.

    Raises:
        SettingError: as `check_fields`.
    """
    if fits(value, wanted):
        return
    members = alternatives(wanted)
    plain = [each for each in members if each is not type(None)]
    or_null = " or null" if len(plain) < len(members) else ""
    if len(plain) > 1:
        raise SettingError(f"{key} is {value!r}, but must be {' or '.join(map(_described_fully, plain))}{or_null}")
    base, bounds = split_bounds(plain[0])
    for index, (item, kind) in enumerate(_items(value, base)):
        check_value(f"{key}[{index}]", item, kind)
    choices = _choices(base, bounds)
    if choices is not None:
        raise SettingError(f"{key} is {value!r}{way_out(str(value), choices)}")
    allowed = _limits(bounds, value) if fits_type(value, base) else described(base)
    raise SettingError(f"{key} is {value!r}, but must be {allowed}{or_null}")


def fits(value: object, wanted: Any) -> bool:
    """Whether a value is of a type and within its bounds."""
    return _test(wanted)(value)


def fits_type(value: object, wanted: Any) -> bool:
    """Whether a value is of a type, without its bounds: an integer counts as a float, a boolean
    does not, and a list counts as a tuple."""
    return _type_test(wanted)(value)


Test = Callable[[Any], bool]


def _test(wanted: Any) -> Test:
    """The test of `fits` for one type, built once: analysing a type takes a hundred times as long
    as testing a value."""
    if _is_union(wanted):
        tests = [_test(each) for each in get_args(wanted)]
        return lambda value: any(test(value) for test in tests)
    base, bounds = split_bounds(wanted)
    tests = [_type_test(base), *(_bound_test(bound) for bound in bounds)]
    if get_origin(base) is Literal:
        tests.append(get_args(base).__contains__)
    if get_origin(base) is tuple:
        *of_items, last = get_args(base)
        if last is Ellipsis:
            of_item = _test(of_items[0])
            tests.append(lambda value: all(map(of_item, value)))
        else:
            of_each = [_test(item) for item in (*of_items, last)]
            tests.append(lambda value: all(test(item) for test, item in zip(of_each, value, strict=True)))
    if len(tests) == 1:
        return tests[0]
    return lambda value: all(test(value) for test in tests)


def _type_test(wanted: Any) -> Test:
    base, _ = split_bounds(wanted)
    if _is_union(base):
        tests = [_type_test(each) for each in get_args(base)]
        return lambda value: any(test(value) for test in tests)
    if base is Any:
        return lambda value: True
    if base is float:
        return _is_real
    if base is int:
        return lambda value: isinstance(value, int) and not isinstance(value, bool)
    kind = get_origin(base) or base
    kinds = str if kind is Literal else (list, tuple) if kind is tuple else kind
    return lambda value: isinstance(value, kinds)


def _is_real(value: object) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 2**63  # larger ones have no float
    return isinstance(value, float) and math.isfinite(value)


_COMPARISONS: Mapping[type, tuple[Callable[[Any, Any], bool], str]] = {
    Ge: (operator.ge, "at least"),
    Gt: (operator.gt, "above"),
    Le: (operator.le, "at most"),
    Lt: (operator.lt, "below"),
}


def _bound_test(bound: Any) -> Test:
    if isinstance(bound, OneOf):
        return lambda value: value in bound.names()
    if isinstance(bound, MinLen):
        return lambda value: len(value) >= bound.min_length
    if isinstance(bound, MaxLen):
        return lambda value: len(value) <= bound.max_length
    if type(bound) not in _COMPARISONS:
        raise TypeError(f"{bound!r} is not a supported bound of a setting")
    holds, _ = _COMPARISONS[type(bound)]
    (limit,) = astuple(bound)
    return lambda value: holds(value, limit)


_DESCRIPTIONS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def described(wanted: Any) -> str:
    """A type in words, without its bounds."""
    wanted, _ = split_bounds(wanted)
    if _is_union(wanted):
        return " or ".join(map(described, get_args(wanted)))
    if get_origin(wanted) is Literal:
        return "text"
    return _DESCRIPTIONS.get(wanted, "a list" if get_origin(wanted) is tuple else "a JSON object")


def alternatives(wanted: Any) -> tuple[Any, ...]:
    """The members of a union, including those of nested unions; any other type alone."""
    return tuple(part for each in get_args(wanted) for part in alternatives(each)) if _is_union(wanted) else (wanted,)


def split_bounds(wanted: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type without its bounds, and its bounds (`annotated_types`, `OneOf`); the length of a tuple
    of several types is one."""
    base, *bounds = get_args(wanted) if get_origin(wanted) is Annotated else (wanted,)
    found = tuple(part for each in bounds for part in (each if isinstance(each, GroupedMetadata) else (each,)))
    if get_origin(base) is tuple and (types_of_items := get_args(base))[-1] is not Ellipsis:
        found = (MinLen(len(types_of_items)), MaxLen(len(types_of_items)), *found)
    return base, found


def _is_union(wanted: Any) -> bool:
    return get_origin(wanted) in (Union, types.UnionType)


def _choices(base: Any, bounds: Sequence[Any]) -> Sequence[str] | None:
    if get_origin(base) is Literal:
        return get_args(base)
    return next((each.names() for each in bounds if isinstance(each, OneOf)), None)


def _items(value: object, base: Any) -> Iterator[tuple[object, Any]]:
    """The items of a value with their types, if the type is a tuple; else none."""
    if get_origin(base) is tuple and isinstance(value, list | tuple):
        kinds = get_args(base)
        yield from zip(value, repeat(kinds[0]) if kinds[-1] is Ellipsis else kinds, strict=False)


def _limits(bounds: Sequence[Any], value: object = None) -> str:
    """Bounds in words, e.g. `at least 0 and below 1`; `LARGEST_COUNT` only if the value is above
    it."""
    shortest = [each.min_length for each in bounds if isinstance(each, MinLen)]
    longest = [each.max_length for each in bounds if isinstance(each, MaxLen)]
    if shortest or longest:
        fewest, most = max(shortest, default=0), min(longest, default=None)
        return f"a list of {_count(fewest, most)}"
    is_excessive = isinstance(value, int) and value > LARGEST_COUNT
    named = [each for each in bounds if is_excessive or each != Le(LARGEST_COUNT)]
    limits = [(_COMPARISONS[type(each)][1], *astuple(each)) for each in named]
    return " and ".join(
        f"{word} {limit:g}" if isinstance(limit, float) else f"{word} {limit}" for word, limit in limits
    )


def _count(fewest: int, most: int | None) -> str:
    if most is None:
        return f"at least {plural(fewest, 'value')}"
    return plural(most, "value") if fewest == most else f"{fewest} to {plural(most, 'value')}"


def _described_fully(wanted: Any) -> str:
    base, bounds = split_bounds(wanted)
    choices = _choices(base, bounds)
    if choices is not None:
        return f"one of {', '.join(choices)}"
    limits = _limits(bounds)
    return f"{described(base)} {'of ' if limits.startswith('at') else ''}{limits}".rstrip()
