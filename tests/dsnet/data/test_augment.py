"""Augmentation of whole batches against an oracle that treats one image after the other."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dsnet.data.augment import AugmentationDraw, apply_augmentation, augment, draw_augmentation
from dsnet.data.images import ImageSet
from dsnet.data.registry import load_images
from dsnet.data.settings import Augmentation
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


@pytest.mark.parametrize("name", ["crop_padding", "cutout"])
def test_no_operation_is_larger_than_the_image(name: str) -> None:
    digits = load_images("digits")
    assert getattr(Augmentation.for_images(digits, **{name: 8}), name) == 8
    with pytest.raises(
        ConfigError, match=rf"data\.augment\.{name} is 9, but the images of digits have 8 x 8 pixels: write at most 8"
    ):
        Augmentation.for_images(digits, **{name: 9})


EVERYTHING: dict[str, Any] = {"flip": True, "cutout": 3, "randaugment_ops": 2, "erasing": 0.5}


def test_further_options_leave_the_numbers_of_crop_mirror_and_cutout_as_they_were() -> None:
    images = random_images((20, 3, 16, 16))
    few = draw_augmentation(images, generator(), Augmentation(2, True, 3))
    many = draw_augmentation(images, generator(), Augmentation(2, randaugment_magnitude=5.0, **EVERYTHING))
    for name in ("top", "left", "is_flipped", "cutout_row", "cutout_column"):
        assert torch.equal(getattr(few, name), getattr(many, name))


@pytest.mark.parametrize("crop", [{"crop_padding": 2}, {"crop_scale": (0.2, 1.0)}])
def test_with_everything_on_the_same_state_gives_the_same_batch(crop: dict[str, Any]) -> None:
    images = random_images((20, 3, 16, 16))
    augmentation = Augmentation(**crop, **EVERYTHING)
    before = images.clone()
    first, again = augment(images, generator(1), augmentation), augment(images, generator(1), augmentation)
    assert torch.equal(first, again)
    assert not torch.equal(first, augment(images, generator(2), augmentation))
    assert torch.equal(images, before)


def test_cutout_and_erasing_come_after_the_tonal_operations() -> None:
    images = random_images((50, 3, 16, 16))
    augmentation = Augmentation(cutout=6, randaugment_ops=2)
    draw = draw_augmentation(images, generator(), augmentation)
    result = apply_augmentation(images, draw, augmentation)
    for row, image in enumerate(result):
        assert not image[:, int(draw.cutout_row[row]), int(draw.cutout_column[row])].any()


class RefusesToWait(TorchDispatchMode):
    """Refuses operations whose result the host needs before it can continue: on a GPU they wait."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.num_operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_operations += 1
        assert func.overloadpacket.__name__ not in self.WAITING, func
        if func.overloadpacket.__name__ == "index":
            assert all(index is None or index.dtype != torch.bool for index in args[1]), "a mask as index"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("crop", [{"crop_padding": 2}, {"crop_scale": (0.2, 1.0)}])
def test_nothing_waits_for_the_device(crop: dict[str, Any]) -> None:
    images = random_images((20, 3, 16, 16))
    with RefusesToWait() as mode:
        augment(images, generator(), Augmentation(**crop, **EVERYTHING))
    assert mode.num_operations > 100
    with pytest.raises(AssertionError, match="_local_scalar_dense"), RefusesToWait():
        images.sum().item()


def test_operations_on_bytes_refuse_normalised_images() -> None:
    for options in ({"randaugment_ops": 1}, {"erasing": 0.1}, {"crop_scale": (0.5, 1.0)}):
        with pytest.raises(ValueError, match=r"need uint8, not torch\.float32"):
            augment(torch.rand((2, 3, 8, 8)), generator(), Augmentation(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"randaugment_ops": -1}, r"randaugment_ops is -1, but must be at least 0 and at most 14"),
        ({"randaugment_ops": 15}, r"randaugment_ops is 15, but must be at least 0 and at most 14"),
        ({"randaugment_magnitude": 10.5}, r"randaugment_magnitude is 10\.5, but must be at least 0 and at most 10"),
        ({"erasing": 1.5}, r"erasing is 1\.5, but must be at least 0 and at most 1"),
        ({"crop_scale": (0.0, 1.0)}, r"crop_scale\[0\] is 0\.0, but must be above 0 and at most 1"),
        ({"crop_scale": (0.9, 0.5)}, r"crop_scale: range \[0\.9, 0\.5\] is the wrong way round"),
        ({"crop_scale": (0.9,)}, r"crop_scale is \(0\.9,\), but must be a list of 2 values"),
        ({"crop_scale": (0.1, 1.0), "crop_padding": 4}, r"crop_padding: 4 pixels cannot be combined with crop_scale"),
    ],
)
def test_an_option_out_of_range_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Augmentation(**options)


def test_settings_survive_json() -> None:
    augmentation = Augmentation(crop_scale=(0.08, 1.0), randaugment_ops=2, erasing=0.25)
    assert Augmentation(**json.loads(json.dumps(asdict(augmentation)))) == augmentation


def test_the_default_of_padding_gives_way_to_a_resized_crop() -> None:
    photographs = ImageSet.create("cifar10", random_images((2, 3, 32, 32)), torch.tensor([0, 1]), ["cat", "dog"])
    augmentation = Augmentation.for_images(photographs, crop_scale=(0.5, 1.0), erasing=0.1)
    assert augmentation == Augmentation(0, True, crop_scale=(0.5, 1.0), erasing=0.1)
