"""Evaluation of a sweep's conditions on trials."""

from __future__ import annotations

import math

import pytest

from dsnet.errors import ConfigError
from search.conditions.constraints import ConstraintSet
from search.conditions.expressions import parse_comparison

NAMES = ("top1", "madds_m", "params_m", "baseline.top1")


def constraints(*, soft: tuple[str, ...] = (), hard: tuple[str, ...] = (), **baseline: float) -> ConstraintSet:
    return ConstraintSet(
        tuple(parse_comparison(text, NAMES) for text in soft),
        tuple(parse_comparison(text, NAMES) for text in hard),
        {f"baseline.{name}": value for name, value in baseline.items()},
    )


BOTH = constraints(soft=("top1 >= baseline.top1 - 0.01", "madds_m <= 180"), hard=("params_m <= 5",), top1=0.8)


def test_violations_have_the_same_names_for_every_trial_and_tell_broken_from_held() -> None:
    good, bad = {"top1": 0.79, "madds_m": 180, "params_m": 5}, {"top1": 0.7, "madds_m": 360, "params_m": 4}
    names = ["top1 >= baseline.top1 - 0.01", "madds_m <= 180", "params_m <= 5"]
    assert list(BOTH.violations(good)) == list(BOTH.violations(bad)) == names
    assert all(violation <= 1e-12 for violation in BOTH.violations(good).values())
    assert BOTH.violations(bad)["madds_m <= 180"] == 0.5
    assert BOTH.violations(bad)["params_m <= 5"] < 0
    assert BOTH.hold({"top1": 0.8, "madds_m": 100, "params_m": 1})
    assert not BOTH.hold(bad)


def test_a_missing_metric_is_not_a_held_condition() -> None:
    violations = BOTH.violations({"top1": 0.9, "madds_m": 100})
    assert math.isnan(violations["params_m <= 5"])
    assert not BOTH.hold({"top1": 0.9, "madds_m": 100})


def test_the_metrics_of_a_trial_are_never_taken_for_those_of_the_baseline() -> None:
    assert BOTH.violations({"top1": 0.7, "baseline.top1": 0.0})["top1 >= baseline.top1 - 0.01"] > 0


@pytest.mark.parametrize(
    ("text", "metrics", "expected"),
    [
        ("params_m <= 5", {"params_m": 5.0}, None),
        ("params_m <= 5", {"params_m": 6.25}, "violates params_m <= 5: it is 6.25"),
        ("params_m <= 5", {"params_m": math.nan}, "violates params_m <= 5: it is nan"),
        ("params_m <= 5", {"top1": 0.1}, None),
        ("top1 >= baseline.top1", {"top1": 0.5}, "violates top1 >= baseline.top1: baseline.top1 is 0.8, top1 is 0.5"),
    ],
)
def test_a_broken_hard_constraint_is_told_with_its_value(
    text: str, metrics: dict[str, float], expected: str | None
) -> None:
    assert constraints(hard=(text,), top1=0.8).broken(metrics) == expected


def test_a_soft_constraint_ends_no_trial() -> None:
    soft = constraints(soft=("params_m <= 5",))
    assert soft.broken({"params_m": 9.0}) is None
    assert soft.impossible({"params_m": (8.0, 9.0)}) == ()


def test_only_what_nothing_can_hold_is_impossible() -> None:
    hard = constraints(hard=("params_m <= 5", "top1 >= baseline.top1 + 0.1", "madds_m <= 50"), top1=0.8)
    ranges = {"params_m": (5.0, 9.0), "madds_m": (60.0, 200.0), "top1": (0.0, 0.95)}
    assert hard.impossible(ranges) == ("madds_m <= 50",)
    assert hard.impossible({**ranges, "top1": (0.0, 0.89)}) == ("top1 >= baseline.top1 + 0.1", "madds_m <= 50")
    assert hard.impossible({}) == ()


def test_a_baseline_that_was_not_measured_is_found_before_any_trial() -> None:
    with pytest.raises(ConfigError, match=r"baseline\.top1 was not measured; known: none"):
        constraints(soft=("top1 >= baseline.top1",))


def test_without_conditions_everything_is_allowed() -> None:
    empty = ConstraintSet()
    assert (empty.violations({}), empty.broken({}), empty.impossible({}), empty.hold({})) == ({}, None, (), True)
