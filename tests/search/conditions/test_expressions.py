"""Conditions: the value is that of an independent evaluation, the interval bound is sound, and
errors name the column."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dsnet.errors import ConfigError
from search.conditions.expressions import (
    LEAST_BROKEN_VIOLATION,
    LEAST_VIOLATION,
    MAX_DEPTH,
    MAX_LENGTH,
    ORDERS,
    Comparison,
    parse_comparison,
)

NAMES = ("top1", "madds_m", "latency_ms.server", "baseline.top1")
Values = Mapping[str, float]
Side = tuple[str, Callable[[Values], Any]]
"""A text and a function with the same meaning, built together, so that no parser is needed for the
expected value."""

NUMBERS = st.integers(0, 4000).map(lambda count: count / 16)
"""Sums and products of a few of these are exact in floating point."""


def _number(number: float) -> Side:
    return repr(number), lambda values: Fraction(number)


def _name(name: str) -> Side:
    return name, lambda values: Fraction(values[name])


def _signed(sign: str, inner: Side) -> Side:
    text, value = inner
    return f"{sign}({text})", lambda values: -value(values) if sign == "-" else value(values)


def _joined(left: Side, operator: str, right: Side) -> Side:
    """With parentheses around both, which the grammar's own precedence does without."""
    (one, first), (other, second) = left, right
    meanings: dict[str, Callable[[Any, Any], Any]] = {
        "+": lambda a, b: a + b,
        "-": lambda a, b: a - b,
        "*": lambda a, b: a * b,
    }
    return f"({one}) {operator} ({other})", lambda values: meanings[operator](first(values), second(values))


SIDES = st.recursive(
    st.one_of(NUMBERS.map(_number), st.sampled_from(NAMES).map(_name)),
    lambda inner: st.one_of(
        st.builds(_joined, inner, st.sampled_from("+-*"), inner), st.builds(_signed, st.sampled_from("+-"), inner)
    ),
    max_leaves=4,
)
VALUES = st.fixed_dictionaries(dict.fromkeys(NAMES, NUMBERS))


def read(text: str) -> Comparison:
    return parse_comparison(text, NAMES)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(SIDES, st.sampled_from(ORDERS), SIDES, VALUES)
def test_a_condition_holds_exactly_where_exact_arithmetic_says_so(
    left: Side, order: str, right: Side, values: Values
) -> None:
    text = f"{left[0]} {order} {right[0]}"
    assume(len(text) <= MAX_LENGTH and any(name in text for name in NAMES))
    one, other = left[1](values), right[1](values)
    expected = {"<=": one <= other, ">=": one >= other, "<": one < other, ">": one > other}[order]
    comparison = read(text)
    assert comparison.holds(values) == expected
    assert (comparison.violation(values) <= 0) == expected
    assert LEAST_VIOLATION <= comparison.violation(values) <= -LEAST_VIOLATION
    assert comparison.names == {name for name in NAMES if name in text.replace("baseline.top1", "")} | (
        {"baseline.top1"} if "baseline.top1" in text else set()
    )


@pytest.mark.parametrize(
    "text",
    [
        "top1 - madds_m - 1 / 2 / 4 <= 2 + 3 * -madds_m",
        "-top1 * madds_m + 6 / 2 * 3 >= 1.5e1 - -2",
        "top1/madds_m*2<.5",
        "(top1 - (madds_m - 1)) / 2 > +7.",
    ],
)
@pytest.mark.parametrize(("top1", "madds_m"), [(0.5, 2.0), (8.0, 0.25), (3.0, 3.0), (-1.0, 16.0)])
def test_precedence_is_that_of_arithmetic(text: str, top1: float, madds_m: float) -> None:
    values = {"top1": top1, "madds_m": madds_m}
    expected = eval(text, {"__builtins__": {}}, values)  # noqa: S307 - a text of this file, evaluated by Python itself
    assert read(text).holds(values) is expected


@pytest.mark.parametrize("order", ORDERS)
def test_equal_sides_hold_unless_the_condition_is_strict(order: str) -> None:
    comparison = read(f"top1 {order} 0.25")
    assert comparison.holds({"top1": 0.25}) == ("=" in order)
    assert comparison.violation({"top1": 0.25}) == (0.0 if "=" in order else LEAST_BROKEN_VIOLATION)


def test_the_violation_is_relative_to_the_size_of_the_sides() -> None:
    assert read("madds_m <= 180").violation({"madds_m": 200}) == pytest.approx(0.1)
    assert read("top1 >= 0.9").violation({"top1": 0.45}) == pytest.approx(0.5)
    assert read("madds_m <= 180").violation({"madds_m": 90}) == pytest.approx(-0.5)
    in_millions, in_ones = read("madds_m <= 180"), read("madds_m * 1e6 <= 180 * 1e6")
    assert in_millions.violation({"madds_m": 250}) == pytest.approx(in_ones.violation({"madds_m": 250}))


def test_moving_a_term_to_the_other_side_changes_the_violation_by_no_order_of_magnitude() -> None:
    values = {"top1": 0.7, "baseline.top1": 0.75}
    together, apart = (read(text) for text in ("top1 - baseline.top1 >= 0", "top1 >= baseline.top1"))
    assert 0.4 < together.violation(values) / apart.violation(values) < 1.1


@pytest.mark.parametrize(
    ("text", "sign"), [("madds_m <= 100", 1), ("madds_m - 40 < 60", 1), ("2 * madds_m >= 200", -1)]
)
def test_a_larger_breach_of_a_bound_is_a_larger_violation(text: str, sign: int) -> None:
    excesses = [0.125, 0.5, 1.0, 20.0, 90.0]
    violations = [read(text).violation({"madds_m": 100 + sign * excess}) for excess in excesses]
    assert violations == sorted(violations)
    assert len(set(violations)) == len(violations)
    assert violations[0] > 0


def _with_quotients(side: Side, divisor: Side) -> str:
    return f"({side[0]}) / ({divisor[0]})"


RANGES = st.fixed_dictionaries({name: st.tuples(NUMBERS, NUMBERS).map(sorted).map(tuple) for name in NAMES})
SHARES = st.lists(st.floats(0, 1), min_size=len(NAMES), max_size=len(NAMES))


@pytest.mark.slow
@settings(max_examples=250, deadline=None)
@given(SIDES, st.sampled_from(ORDERS), SIDES, SIDES, RANGES, st.lists(SHARES, min_size=1, max_size=8))
def test_no_point_of_the_ranges_breaks_a_condition_by_less_than_the_bound(
    left: Side, order: str, right: Side, divisor: Side, ranges: Mapping[str, tuple[float, float]], points: Any
) -> None:
    texts = [f"{left[0]} {order} {right[0]}", f"{_with_quotients(left, divisor)} {order} {right[0]}"]
    for text in texts:
        if len(text) > MAX_LENGTH or not any(name in text for name in NAMES):
            continue
        comparison = _read_or_refuse(text)
        assume(comparison is not None)  # else the divisor is 0 whatever the metrics are
        assert comparison is not None
        bound = comparison.least_violation(ranges)
        for shares in points:
            values = {
                name: min(high, max(low, low + share * (high - low)))
                for (name, (low, high)), share in zip(ranges.items(), shares, strict=True)
            }
            violation = comparison.violation(values)
            assert math.isnan(violation) or violation >= bound


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(ORDERS), NUMBERS, RANGES)
def test_the_bound_tells_possible_from_impossible_where_every_name_stands_once(
    order: str, number: float, ranges: Mapping[str, tuple[float, float]]
) -> None:
    comparison = read(f"2 * madds_m {order} {number!r} - top1")
    corners = [{"madds_m": one, "top1": other} for one in ranges["madds_m"] for other in ranges["top1"]]
    assert (comparison.least_violation(ranges) <= 0) == any(comparison.holds(corner) for corner in corners)


def test_nothing_is_impossible_for_a_metric_whose_range_is_not_known() -> None:
    assert read("latency_ms.server <= 0.001").least_violation({}) <= 0
    assert read("1 / madds_m <= -5").least_violation({"madds_m": (-1.0, 1.0)}) <= 0


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("top1 >= 0", {"top1": math.nan}),
        ("top1 >= 0", {}),
        ("top1 >= 0", {"top1": math.inf}),
        ("1 / top1 >= 0", {"top1": 0.0}),
        ("top1 * 1e300 * 1e300 <= 1", {"top1": 1.0}),
    ],
)
def test_what_has_no_value_holds_nothing(text: str, values: Values) -> None:
    assert math.isnan(read(text).violation(values))
    assert not read(text).holds(values)


def test_conditions_are_values_that_travel_between_processes() -> None:
    comparison = read("top1  >=\tbaseline.top1 - 0.003")
    assert str(comparison) == "top1 >= baseline.top1 - 0.003"
    assert pickle.loads(pickle.dumps(comparison)) == comparison  # noqa: S301
    assert {comparison: 1}[read("top1 >= baseline.top1 - 0.003")] == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "column 1: expected a number, a metric or '('; the condition ends"),
        ("top1", "column 5: expected an operator, or one of <= >= < > and a bound; it ends"),
        ("top1 <=", "column 8: expected a number, a metric or '('; the condition ends"),
        ("<= top1", "column 1: expected a number, a metric or '('; got '<='"),
        ("top1 <= 1 <= 2", "column 11: a second '<='; write two conditions"),
        ("top1 == 1", "column 6: '=' cannot be read; write <=, >=, < or >"),
        ("top1 ≤ 1", "column 6: '≤' cannot be read; write <="),
        ("top1 >= 90%", "column 11: '%' cannot be read; accuracies are fractions"),
        ("top1 <= 2 madds_m", "column 11: expected an operator or the end; got 'madds_m'"),
        ("2top1 <= 1", "column 2: expected an operator, or one of"),
        ("(top1 <= 1", "column 7: expected ')' for the '(' in column 1; got '<='"),
        ("top1 <= (1", "column 11: expected ')' for the '(' in column 9; the condition ends"),
        ("top1 <= 1)", "column 10: expected an operator or the end; got ')'"),
        ("top1 <= 1e999", "column 9: '1e999' is too large for a number"),
        ("top1 ** 2 <= 1", "column 7: expected a number, a metric or '('; got '*'"),
        ("top1 / 0 <= 1", "column 8: this is 0, so that the division has no result"),
        ("top1 / (2 - 2) <= 1", "column 8: this is 0, so that the division has no result"),
        ("1 <= 2", "reads no metric, so that it always or never holds"),
        ("madds <= 2", "column 1: unknown metric 'madds'; did you mean 'madds_m'? known: top1, madds_m"),
        ("top1 <= baseline.top", "column 9: unknown metric 'baseline.top'; did you mean 'baseline.top1'?"),
        ("latency_ms.phone <= 2", "column 1: unknown metric 'latency_ms.phone'; did you mean 'latency_ms.server'?"),
        ("__import__('os').system('true') <= 1", 'column 12: "\'" cannot be read'),
        ("top1.__class__ <= 1", "column 1: unknown metric 'top1.__class__'"),
        ("(" * (MAX_DEPTH + 1) + "top1", f"column {MAX_DEPTH + 1}: more than {MAX_DEPTH} parentheses"),
        ("-" * (MAX_DEPTH + 1) + "top1 <= 1", f"column {MAX_DEPTH + 1}: more than {MAX_DEPTH} parentheses and signs"),
        ("top1 <= " + "1 + " * 60 + "1", f"has 249 characters, but may have at most {MAX_LENGTH}"),
    ],
)
def test_what_cannot_be_read_is_pointed_at(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def _read_or_refuse(text: str) -> Comparison | None:
    try:
        return read(text)
    except ConfigError:
        return None


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("top1madds_. ()+-*/<>=eE09'_\n٣²"), max_size=MAX_LENGTH + 5))
def test_any_text_is_a_condition_or_a_config_error(text: str) -> None:
    comparison = _read_or_refuse(text)
    if comparison is not None:
        assert comparison.names <= set(NAMES)
