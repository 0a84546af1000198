"""Image sets: the fingerprint of the data; resizing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsnet.data.images import ImageSet


def make_set(**changes: object) -> ImageSet:
    fields: dict = {
        "name": "small",
        "images": torch.arange(4 * 3 * 8 * 8, dtype=torch.int64).remainder(256).to(torch.uint8).reshape(4, 3, 8, 8),
        "labels": torch.tensor([0, 1, 0, 1]),
        "class_names": ("a", "b"),
        "official_test": np.array([False, False, True, True]),
    }
    return ImageSet.create(**{**fields, **changes})


def one_pixel_changed() -> torch.Tensor:
    images = make_set().images.clone()
    images[3, 2, 7, 7] += 1
    return images


def test_the_same_data_has_the_same_fingerprint_whatever_its_name() -> None:
    assert make_set().fingerprint == make_set(name="copy").fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"images": one_pixel_changed()},
        {"images": make_set().images.reshape(4, 3, 4, 16)},
        {"labels": torch.tensor([0, 1, 1, 0])},
        {"class_names": ("a", "c")},
        {"official_test": np.array([False, True, True, True])},
        {"official_test": None},
    ],
    ids=["pixel", "shape", "label", "class name", "official test", "no official test"],
)
def test_any_change_of_the_data_changes_the_fingerprint(change: dict) -> None:
    assert make_set(**change).fingerprint != make_set().fingerprint


def test_images_in_another_memory_layout_have_the_same_fingerprint() -> None:
    images = make_set().images.contiguous(memory_format=torch.channels_last)
    image_set = make_set(images=images)
    assert image_set.fingerprint == make_set().fingerprint
    assert image_set.images.is_contiguous()


def test_resizing_to_the_same_size_is_the_set_itself() -> None:
    image_set = make_set()
    assert image_set.resized(8) is image_set


def test_halving_averages_smooth_areas_and_keeps_everything_but_the_pixels() -> None:
    flat = torch.tensor([10, 90, 200, 255], dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8)
    image_set = make_set(images=flat).resized(4)
    assert image_set.image_shape == (3, 4, 4)
    assert torch.equal(image_set.images, flat[:, :, :4, :4])
    assert torch.equal(image_set.labels, make_set().labels)
    assert image_set.official_test is not None
    assert image_set.official_test.tolist() == [False, False, True, True]
    assert image_set.fingerprint != make_set(images=flat).fingerprint


def test_resizing_down_is_antialiased() -> None:
    stripes = torch.tensor([0, 255], dtype=torch.uint8).repeat(8).expand(1, 1, 16, 16)
    resized = make_set(images=stripes, labels=torch.tensor([0]), official_test=None).resized(8)
    assert int(resized.images.min()) > 100
    assert int(resized.images.max()) < 156


def test_many_images_are_resized_like_one() -> None:
    images = torch.randint(0, 256, (1030, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = torch.zeros(1030, dtype=torch.int64)
    resized = make_set(images=images, labels=labels, official_test=None).resized(6).images
    for row in (0, 1023, 1024, 1029):
        alone = make_set(images=images[row : row + 1], labels=labels[:1], official_test=None).resized(6).images
        assert torch.equal(resized[row], alone[0])
