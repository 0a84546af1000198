"""Augmentation of whole batches against an oracle that treats one image after the other."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsnet.data import Augmentation, ImageSet, augment, load_images
from dsnet.data.augment import AugmentationDraw, apply_augmentation, draw_augmentation
from dsnet.errors import ConfigError


def random_images(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    # 1..255: a zero in the result is then always padding or cutout
    return torch.randint(1, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def augment_one_by_one(images: torch.Tensor, draw: AugmentationDraw, augmentation: Augmentation) -> np.ndarray:
    """Pad, slice, mirror and cut each image in numpy."""
    _, _, height, width = images.shape
    padding = augmentation.crop_padding
    mode: Literal["reflect", "constant"] = "reflect" if padding < min(height, width) else "constant"
    finished = []
    for index, image in enumerate(images.numpy()):
        padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)), mode=mode)
        top, left = int(draw.top[index]), int(draw.left[index])
        crop = padded[:, top : top + height, left : left + width]
        if augmentation.flip and draw.is_flipped[index]:
            crop = crop[:, :, ::-1]
        crop = crop.copy()
        if augmentation.cutout:
            first_row = int(draw.cutout_row[index]) - augmentation.cutout // 2
            first_column = int(draw.cutout_column[index]) - augmentation.cutout // 2
            for row in range(first_row, first_row + augmentation.cutout):
                for column in range(first_column, first_column + augmentation.cutout):
                    if 0 <= row < height and 0 <= column < width:
                        crop[:, row, column] = 0
        finished.append(crop)
    return np.stack(finished)


@settings(max_examples=150, deadline=None)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    channels=st.integers(1, 3),
    augmentation=st.builds(Augmentation, st.integers(0, 12), st.booleans(), st.integers(0, 6)),
    is_float=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_batch_is_augmented_like_each_image_alone(
    size: tuple[int, int], channels: int, augmentation: Augmentation, is_float: bool, seed: int
) -> None:
    images = random_images((6, channels, *size), seed)
    images = images.float() / 7 if is_float else images
    draw = draw_augmentation(images, generator(seed), augmentation)
    result = apply_augmentation(images, draw, augmentation)
    assert result.dtype == images.dtype
    assert np.array_equal(result.numpy(), augment_one_by_one(images, draw, augmentation))


def test_the_default_augmentation_changes_nothing() -> None:
    images = random_images((5, 3, 8, 8))
    assert torch.equal(augment(images, generator(), Augmentation()), images)


def test_augmenting_leaves_the_batch_it_is_given_alone() -> None:
    images = random_images((5, 3, 8, 8))
    before = images.clone()
    augment(images, generator(), Augmentation(2, True, 3))
    assert torch.equal(images, before)


def test_the_same_generator_state_gives_the_same_batch_and_another_gives_another() -> None:
    images = random_images((20, 3, 8, 8))
    augmentation = Augmentation(2, True, 3)
    first, again = augment(images, generator(1), augmentation), augment(images, generator(1), augmentation)
    assert torch.equal(first, again)
    assert not torch.equal(first, augment(images, generator(2), augmentation))


def test_the_global_generator_is_not_touched() -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    augment(random_images((5, 3, 8, 8)), generator(), Augmentation(2, True, 3))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_every_crop_position_and_both_directions_occur() -> None:
    images = random_images((1, 1, 8, 8)).expand(4000, -1, -1, -1)
    draw = draw_augmentation(images, generator(), Augmentation(2, True))
    positions = torch.bincount(draw.top * 5 + draw.left, minlength=25)
    assert positions.min() > 100  # 160 expected
    assert 1850 < int(draw.is_flipped.sum()) < 2150


def test_each_image_of_a_batch_is_drawn_for_itself() -> None:
    images = random_images((1, 1, 8, 8)).expand(50, -1, -1, -1)
    result = augment(images, generator(), Augmentation(2, True))
    assert len({image.numpy().tobytes() for image in result}) > 20


def test_padding_as_large_as_the_image_is_filled_with_zeros() -> None:
    images = random_images((50, 1, 4, 4))
    result = augment(images, generator(), Augmentation(crop_padding=4))
    assert bool((result == 0).any())


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.augment\.crop_padding is -1"):
        Augmentation(crop_padding=-1)
    with pytest.raises(ConfigError, match=r"data\.augment\.cutout is -1"):
        Augmentation(cutout=-1)


def test_defaults_mirror_photographs_but_not_digits() -> None:
    photographs = ImageSet.create("cifar10", random_images((2, 3, 32, 32)), torch.tensor([0, 1]), ["cat", "dog"])
    assert Augmentation.for_images(photographs) == Augmentation(crop_padding=4, flip=True, cutout=0)
    assert Augmentation.for_images(load_images("digits")) == Augmentation(crop_padding=1, flip=False, cutout=0)
    assert Augmentation.for_images(photographs, crop_padding=0, flip=False, cutout=8) == Augmentation(0, False, 8)
