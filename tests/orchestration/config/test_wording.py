"""Numbers in messages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsnet.wording import duration, first_line, prefixed, size


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 s"),
        (0.4, "0.4 s"),
        (42.4, "42 s"),
        (59.6, "1 min"),
        (200, "3 min 20 s"),
        (3599.6, "1 h"),
        (7500, "2 h 5 min"),
        (86390, "1 d"),
        (100_000, "1 d 4 h"),
    ],
)
def test_a_duration_has_two_units_at_most(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@given(st.floats(1, 1e7))
def test_a_duration_is_true_to_half_of_its_smallest_unit(seconds: float) -> None:
    parts = duration(seconds).split()
    units = {"s": 1, "min": 60, "h": 3600, "d": 86400}
    numbers = list(zip(map(float, parts[::2]), parts[1::2], strict=True))
    told = sum(number * units[unit] for number, unit in numbers)
    largest = units[numbers[0][1]]
    coarse = {1: 1, 60: 1, 3600: 60, 86400: 3600}[largest]
    assert abs(told - seconds) <= coarse / 2


def test_a_size_has_a_decimal_below_ten() -> None:
    assert [size(count) for count in (10, 2**20, 30 * 2**20, 3 * 2**30)] == ["1 KiB", "1.0 MiB", "30 MiB", "3.0 GiB"]


@pytest.mark.parametrize(
    ("value", "text"), [(39.5e9, "39.5 G"), (5.634e15, "5.63 P"), (0.0, "0 M"), (2.5e5, "0.25 M"), (-3e12, "-3 T")]
)
def test_large_numbers_have_an_si_prefix(value: float, text: str) -> None:
    assert prefixed(value) == text


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("  one sentence.\nand details"), "one sentence."),
        (KeyError(), "KeyError"),
        (ValueError("word " * 100), " ".join(["word"] * 59) + " ..."),
        (ValueError("w" * 400), "w" * 296 + " ..."),
    ],
)
def test_the_first_line_of_a_message_ends_after_a_whole_word(error: Exception, line: str) -> None:
    assert first_line(error) == line
    assert len(line) <= 300
