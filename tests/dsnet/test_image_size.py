"""Sizes of images: one form for squares and one for all others, whatever they come from."""

from __future__ import annotations

import json

import pytest

from dsnet.families import Task
from dsnet.image_size import (
    ImageSize,
    height_and_width,
    image_size_of,
    normal_size,
    shorter_side,
    size_in_words,
)


@pytest.mark.parametrize(
    ("written", "size", "both", "words"),
    [
        (32, 32, (32, 32), "32 x 32 pixels"),
        ([32, 32], 32, (32, 32), "32 x 32 pixels"),
        ((24, 48), (24, 48), (24, 48), "24 x 48 pixels (height x width)"),
        ([48, 24], (48, 24), (48, 24), "48 x 24 pixels (height x width)"),
    ],
)
def test_a_size_has_one_form(written: int | list[int], size: ImageSize, both: tuple[int, int], words: str) -> None:
    assert normal_size(written) == size
    assert type(normal_size(written)) is type(size)
    assert image_size_of((7, 3, *both)) == size
    assert height_and_width(size) == both
    assert shorter_side(size) == min(both)
    assert size_in_words(size) == words
    assert normal_size(json.loads(json.dumps(size))) == size
    assert hash(Task(10, 3, written)) == hash(Task(10, 3, size))  # type: ignore[arg-type]


@pytest.mark.parametrize("written", ["32", [32], [8, 8, 8], (8.0, 9), [[8], 9], [None, 8]])
def test_what_is_no_size_is_refused(written: list[int]) -> None:
    with pytest.raises(ValueError, match="must be a number of pixels, or height and width"):
        normal_size(written)
