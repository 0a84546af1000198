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
from dsnet.data.settings import IMAGENET_VALUES, WrittenNormalization, written_normalization
from dsnet.errors import ConfigError, DataError
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


# As written in `data.normalization`, for pixels in 0..1.


def test_a_written_normalisation_is_that_of_torchvision() -> None:
    written = written_normalization({"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]})
    assert written == written_normalization("imagenet") == IMAGENET_VALUES
    found = Normalization.from_written(IMAGENET_VALUES)
    assert found == Normalization((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_VALUES.mean, IMAGENET_VALUES.std))
    torch.testing.assert_close(found.apply(images), (images / 255 - mean) / std, rtol=1e-5, atol=1e-5)
    assert found.in_words() == "mean 0.485 0.456 0.406, std 0.229 0.224 0.225"
    assert written_normalization(None) is None


def test_pixels_that_are_not_divided_can_be_written() -> None:
    """A network that was trained on 0..255 minus a mean has deviation 1/255."""
    caffe = Normalization.from_written(WrittenNormalization(mean=(0.4,), std=(1 / 255,)))
    assert caffe.mean == (102.0,)
    assert caffe.std == pytest.approx((1.0,), abs=1e-8)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (
            {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]},
            r"normalization.mean: \[123.675, 116.28, 103.53\] is not in the unit .* 0..1, .* divided by 255: \[0.485, 0.456, 0.406\]",
        ),
        ({"mean": [0.5], "std": [64]}, r"normalization.std: \[64.*\] is not in the unit .* \[0.251\]"),
        ({"mean": [0.5, 0.5], "std": [0.5]}, r"normalization.std: mean has 2 and std 1 values; both need one for each"),
        ({"mean": [0.5], "std": [0]}, r"normalization.std: .* not above 0"),
        ({"mean": [-0.5], "std": [0.5]}, r"normalization.mean: .* below 0"),
        ({"mean": [], "std": []}, r"normalization.mean is .*, but must be a list of at least 1 value"),
        ({"mean": [0.5]}, r"normalization.std: missing"),
        ({"mean": 0.5, "std": [0.5]}, r"normalization.mean is 0.5, but must be a list"),
        ({"mean": [0.5], "std": [0.5], "unit": 1}, r"normalization.unit: unknown setting; known: mean, std"),
        ("cifar10", r"normalization: expected imagenet, \{mean: .* or null; got 'cifar10'"),
        ([0.5], r"normalization: expected imagenet, .*; got \[0.5\]"),
    ],
)
def test_a_normalisation_that_cannot_be_meant_is_refused(written: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        written_normalization(written)


def test_a_normalisation_needs_the_channels_of_the_images() -> None:
    assert IMAGENET_VALUES.for_channels(3) is IMAGENET_VALUES
    with pytest.raises(ConfigError, match="has 3 values each of mean and std, but the images have 1 channel: write"):
        IMAGENET_VALUES.for_channels(1)
