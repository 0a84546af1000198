"""Numbers and text as displayed."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashboards.theme import cost_colours, finite, percent, plain, significant
from dsnet.wording import plural, signed


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.6, "0.600"), (0.03684, "0.0368"), (18.0, "18.0"), (565.4, "565"), (1234.4, "1,234"), (0.0, "0.00")],
)
def test_three_digits_are_shown_at_ordinary_sizes(value: float, shown: str) -> None:
    assert significant(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(0.74, "+0.7"), (-0.74, "-0.7"), (-0.01, "0.0"), (0.0, "0.0"), (0.04, "0.0")]
)
def test_a_difference_has_a_plain_sign_unless_it_rounds_to_zero(value: float, shown: str) -> None:
    assert signed(value) == shown


def test_percent_and_counts_read_well() -> None:
    assert percent(0.9634) == "96.3 %"
    assert percent(-0.001, 0) == "0 %"
    assert percent(-0.012, 0) == "-1 %"
    assert (plural(1, "image"), plural(5000, "image"), plural(0, "image")) == ("1 image", "5,000 images", "0 images")


def test_what_is_not_finite_is_missing() -> None:
    assert [finite(v) for v in (None, math.nan, math.inf, 0.0)] == [None, None, None, 0.0]


@given(st.text())
def test_text_from_outside_keeps_no_angle_bracket(text: str) -> None:
    assert not set(plain(text)) & set("<>")


@given(st.integers(0, 40))
def test_there_is_one_distinct_colour_per_route(num_routes: int) -> None:
    assert len(set(cost_colours(num_routes))) == num_routes
