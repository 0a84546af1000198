"""Normalisation: against numpy, through JSON to the bit, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dsnet.data.normalization import Normalization
from dsnet.errors import DataError
from tests.shapes import unchecked_shapes

pixels = hnp.arrays(np.uint8, st.tuples(st.integers(1, 5), st.integers(1, 3), st.just(4), st.integers(1, 6)))


@settings(deadline=None)
@given(images=pixels)
def test_statistics_equal_numpys_in_float64(images: np.ndarray) -> None:
    normalization = Normalization.from_images(torch.from_numpy(images))
    std = images.std(axis=(0, 2, 3), dtype=np.float64)
    assert np.allclose(normalization.mean, images.mean(axis=(0, 2, 3), dtype=np.float64), rtol=1e-12, atol=1e-12)
    assert np.allclose(normalization.std, np.where(std == 0, 1.0, std), rtol=1e-9)


@settings(deadline=None)
@given(images=pixels)
def test_a_normalization_read_back_from_json_gives_the_same_bits(images: np.ndarray) -> None:
    batch = torch.from_numpy(images)
    normalization = Normalization.from_images(batch)
    again = Normalization.from_json(json.loads(json.dumps(normalization.to_json())))
    assert again == normalization
    assert torch.equal(again.apply(batch), normalization.apply(batch))


def test_normalised_training_images_have_mean_zero_and_deviation_one() -> None:
    images = torch.randint(0, 256, (50, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    result = Normalization.from_images(images).apply(images)
    assert result.dtype == torch.float32
    assert torch.allclose(result.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(result.std(dim=(0, 2, 3), unbiased=False), torch.ones(3), atol=1e-5)


def test_an_image_is_normalised_the_same_alone_and_in_a_batch() -> None:
    images = torch.randint(0, 256, (9, 3, 5, 7), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    normalization = Normalization((120.1, 30.7, 99.9), (60.3, 1.1, 77.0))
    together = normalization.apply(images)
    assert all(torch.equal(normalization.apply(images[i : i + 1])[0], together[i]) for i in range(9))


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 3, 4, 4),
        torch.zeros(2, 1, 4, 4, dtype=torch.uint8),
        torch.zeros(3, 4, 4, dtype=torch.uint8),
    ],
)
def test_images_of_another_type_or_shape_are_refused(images: torch.Tensor) -> None:
    with unchecked_shapes(), pytest.raises(DataError, match=r"must be uint8 \[batch, 3, height, width\], are"):
        Normalization((0.0,) * 3, (1.0,) * 3).apply(images)


@pytest.mark.parametrize(
    "record",
    [
        {"mean": [1.0]},
        {"mean": [1.0], "std": [0.0]},
        {"mean": [1.0], "std": [1.0, 2.0]},
        {"mean": [], "std": []},
        {"mean": [float("nan")], "std": [1.0]},
        {"mean": ["x"], "std": [1.0]},
        {"mean": 3, "std": 1},
    ],
)
def test_a_broken_record_is_refused(record: dict) -> None:
    with pytest.raises(DataError, match="normalization"):
        Normalization.from_json(record)
