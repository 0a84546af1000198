"""Types of settings with bounds: the values that they accept, and the messages about others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Gt, Len, Lt, MinLen, MultipleOf

from dsnet.errors import ConfigError
from dsnet.settings import (
    Fraction,
    LearningRate,
    NonNegativeInt,
    OneOf,
    PositiveFraction,
    PositiveInt,
    Seed,
    SettingError,
    Settings,
    check_value,
    dotted_keys,
    fits,
)

Share = Annotated[float, Gt(0), Lt(1)] | PositiveInt | None
Sizes = Annotated[tuple[PositiveInt, ...], MinLen(1)]
Pair = Annotated[tuple[PositiveFraction, ...], Len(2, 2)]
Sides = tuple[Annotated[int, Ge(8)], Annotated[int, Lt(4)]]
Registered = Annotated[str, OneOf(lambda: ("gate", "cascade"))]


@pytest.mark.parametrize(
    ("wanted", "allowed", "refused"),
    [
        (Fraction, (0, 1, 0.5), {-0.1: "at least 0 and at most 1", 1.1: "at least 0 and at most 1"}),
        (Fraction, (), {math.nan: "a number", True: "a number", "1": "a number", None: "a number"}),
        (PositiveInt, (1,), {0: "at least 1", 1.5: "a whole number", True: "a whole number"}),
        (NonNegativeInt | None, (0, None), {-1: "at least 0 or null", "x": "a whole number or null"}),
        (LearningRate, (1e-9, 1e6), {0: "above 0 and at most 1e+06", math.inf: "a number"}),
        (Seed, (2**32 - 1,), {2**32: "at least 0 and below 4294967296"}),
        (bool, (True,), {1: "true or false"}),
        (Share, (0.5, 3, None), {0: "a number above 0 and below 1 or a whole number of at least 1 or null"}),
        (Sizes, ((1, 2), [3]), {(): "a list of at least 1 value", 3: "a list"}),
        (Pair, ((0.5, 1.0),), {(0.5,): "a list of 2 values"}),
        (Sides, ((8, 3), [9, 0]), {(8,): "a list of 2 values", (8, 3, 3): "a list of 2 values", 8: "a list"}),
        (Sides | None, (None, (8, 3)), {(): "a list of 2 values or null"}),
    ],
)
def test_a_value_is_taken_or_refused_with_what_is_allowed(
    wanted: Any, allowed: tuple[object, ...], refused: dict[object, str]
) -> None:
    for value in allowed:
        check_value("a.b", value, wanted)
        assert fits(value, wanted)
    for value, limits in refused.items():
        assert not fits(value, wanted)
        with pytest.raises(SettingError) as told:
            check_value("a.b", value, wanted)
        assert str(told.value) == f"a.b is {value!r}, but must be {limits}"


@pytest.mark.parametrize(
    ("value", "wanted", "message"),
    [
        ("sdg", Literal["sgd", "adam"], "a.b is 'sdg'; did you mean 'sgd'? known: sgd, adam"),
        (3, Literal["sgd", "adam"] | None, "a.b is 3; known: sgd, adam"),
        ("gates", Registered, "a.b is 'gates'; did you mean 'gate'? known: gate, cascade"),
        ((1, 0), Sizes, "a.b[1] is 0, but must be at least 1"),
        ((0.5, "x"), Pair, "a.b[1] is 'x', but must be a number"),
    ],
)
def test_choices_are_listed_and_the_item_of_a_list_is_named(value: object, wanted: Any, message: str) -> None:
    with pytest.raises(SettingError) as told:
        check_value("a.b", value, wanted)
    assert str(told.value) == message


def test_a_bound_that_is_not_checked_here_is_no_silent_one() -> None:
    with pytest.raises(TypeError, match="MultipleOf"):
        fits(3, Annotated[int, MultipleOf(2)])


@dataclass(frozen=True)
class Speed(Settings):
    SECTION = "engine"
    KEYS = MappingProxyType({"rate": "engine.optimizer.lr"})

    steps: PositiveInt = 3
    rate: LearningRate = 0.1


def test_an_object_checks_its_fields_by_their_dotted_keys() -> None:
    assert dotted_keys(Speed) == {"steps": "engine.steps", "rate": "engine.optimizer.lr"}
    assert Speed(steps=1).steps == 1
    for error in (ConfigError, ValueError):
        with pytest.raises(error, match=r"^engine\.optimizer\.lr is 0, but must be above 0"):
            Speed(rate=0)


@pytest.mark.parametrize(
    ("value", "where"), [((7, 3), r"a\.b\[0\] is 7, .*at least 8"), ([8, 4], r"a\.b\[1\] is 4, .*below 4")]
)
def test_a_list_of_several_types_is_refused_with_the_item_that_is_wrong(value: object, where: str) -> None:
    with pytest.raises(SettingError, match=where):
        check_value("a.b", value, Sides)
