"""Tonal operations of whole batches against Pillow, one image after the other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from dsnet.data.tonal import Strength, Tone, adjust

THRESHOLD, NUM_BITS = 100, 5

PILLOW: dict[Tone, Callable[[Image.Image, float], Image.Image]] = {
    Tone.IDENTITY: lambda image, _: image,
    Tone.AUTOCONTRAST: lambda image, _: ImageOps.autocontrast(image),
    Tone.EQUALIZE: lambda image, _: ImageOps.equalize(image),
    Tone.SOLARIZE: lambda image, _: ImageOps.solarize(image, THRESHOLD),
    Tone.POSTERIZE: lambda image, _: ImageOps.posterize(image, NUM_BITS),
    Tone.CONTRAST: lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    Tone.BRIGHTNESS: lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    Tone.COLOR: lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    Tone.SHARPNESS: lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor),
}


def some_images(kind: str, channels: int = 3, size: tuple[int, int] = (21, 34), seed: int = 0) -> Tensor:
    """Five images: of every value, of a narrow range, of one colour each, or smooth."""
    generator = torch.Generator().manual_seed(seed)
    shape = (5, channels, *size)
    if kind == "noise":
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    if kind == "narrow":
        return torch.randint(90, 131, shape, generator=generator, dtype=torch.uint8)
    if kind == "flat":
        colours = torch.randint(0, 256, (5, channels, 1, 1), generator=generator, dtype=torch.uint8)
        return colours.expand(shape).contiguous()
    coarse = torch.rand((5, channels, 4, 4), generator=generator) * 255
    return torch.nn.functional.interpolate(coarse, size, mode="bilinear").to(torch.uint8)


def strength(factors: Tensor) -> Strength:
    return Strength(factors, THRESHOLD, NUM_BITS)


def with_pillow(images: Tensor, tone: Tone, factors: Tensor) -> np.ndarray:
    results = []
    for image, factor in zip(images, factors.tolist(), strict=True):
        pixels = image.permute(1, 2, 0).numpy()
        result = PILLOW[tone](Image.fromarray(pixels[..., 0] if len(image) == 1 else pixels), factor)
        array = np.asarray(result)
        results.append(array[None] if len(image) == 1 else array.transpose(2, 0, 1))
    return np.stack(results).astype(int)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["noise", "narrow", "flat", "smooth"])
@pytest.mark.parametrize("tone", list(Tone))
def test_an_operation_does_what_pillow_does(tone: Tone, kind: str, channels: int) -> None:
    images = some_images(kind, channels)
    factors = torch.tensor([0.0, 0.19, 0.7, 1.0, 1.9])
    result = adjust(images, torch.full((5,), int(tone)), strength(factors))
    assert result.dtype == torch.uint8
    difference = np.abs(result.numpy().astype(int) - with_pillow(images, tone, factors))
    # Autocontrast: Pillow's table is rounded in floating point; blends: a product that ends on a
    # whole number.
    assert difference.max() <= 1
    assert (difference > 0).mean() < (0.1 if tone == Tone.AUTOCONTRAST else 1e-3)


@settings(max_examples=40, deadline=None)
@given(
    tones=st.lists(st.integers(0, 14), min_size=5, max_size=5),
    factors=st.lists(st.floats(0, 2, width=32), min_size=5, max_size=5),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    seed=st.integers(0, 100),
)
def test_each_image_of_a_batch_gets_its_own_operation(
    tones: list[int], factors: list[float], height: int, width: int, seed: int
) -> None:
    images = some_images("noise", size=(height, width), seed=seed)
    before = images.clone()
    together = adjust(images, torch.tensor(tones), strength(torch.tensor(factors)))
    alone = [
        adjust(images[row : row + 1], torch.tensor([tones[row]]), strength(torch.tensor([factors[row]])))
        for row in range(5)
    ]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(images, before)
    is_other = torch.tensor([tone > max(Tone) for tone in tones])
    assert torch.equal(together[is_other], images[is_other])


@pytest.mark.parametrize("tone", [Tone.CONTRAST, Tone.BRIGHTNESS, Tone.COLOR, Tone.SHARPNESS])
def test_a_factor_of_one_changes_nothing(tone: Tone) -> None:
    images = some_images("noise")
    assert torch.equal(adjust(images, torch.full((5,), int(tone)), strength(torch.ones(5))), images)
