"""Random rectangles, resized crops and random erasing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dsnet.data.boxes import Boxes, draw_boxes, fit_boxes
from dsnet.data.erasing import draw_erasing, erase
from dsnet.data.resized_crop import CROP_ASPECTS, crop_boxes, resize_crops


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int, size: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=generator(7), dtype=torch.uint8)


@pytest.mark.parametrize("size", [(240, 320), (32, 32), (1, 1), (3, 200), (2, 3)])
def test_rectangles_lie_inside_and_have_the_area_and_aspect_asked_for(size: tuple[int, int]) -> None:
    boxes, is_found = fit_boxes(draw_boxes(3000, generator()), size, (0.1, 0.6), (0.5, 2.0))
    height, width = boxes.height[is_found], boxes.width[is_found]
    assert bool((height >= 1).all() and (width >= 1).all())
    assert bool((boxes.top >= 0).all() and ((boxes.top + boxes.height)[is_found] <= size[0]).all())
    assert bool((boxes.left >= 0).all() and ((boxes.left + boxes.width)[is_found] <= size[1]).all())
    if size == (240, 320):
        area = (height * width) / (240 * 320)
        assert 0.098 < area.min() < 0.11
        assert 0.58 < area.max() < 0.605
        assert 0.3 < area.mean() < 0.35
        aspect = width / height
        assert 0.49 < aspect.min() < 0.53
        assert 1.9 < aspect.max() < 2.03
        assert bool(is_found.all())


def test_every_place_is_equally_likely() -> None:
    boxes, is_found = fit_boxes(draw_boxes(20000, generator()), (4, 4), (0.25, 0.25), (1.0, 1.0))
    assert bool(is_found.all())
    assert set(boxes.height.tolist()) == {2}
    counts = torch.bincount(boxes.top * 3 + boxes.left, minlength=9)
    assert 2000 < counts.min() <= counts.max() < 2450  # 2,222 expected


def test_the_first_attempt_that_fits_is_taken() -> None:
    draw = draw_boxes(2, generator())
    draw.area[:] = 1.0  # the whole area: fits only where the aspect is the image's own
    draw.aspect[:] = 0.0
    draw.aspect[0, 3] = 0.5
    boxes, is_found = fit_boxes(draw, (10, 10), (0.5, 1.0), (0.5, 2.0))
    assert is_found.tolist() == [True, False]
    assert (int(boxes.height[0]), int(boxes.width[0])) == (10, 10)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((10, 100), (0, 43, 10, 13)), ((100, 10), (43, 0, 13, 10)), ((30, 33), (0, 0, 30, 33))],
)
def test_where_no_attempt_fits_the_centre_is_taken(size: tuple[int, int], expected: tuple[int, ...]) -> None:
    draw = draw_boxes(1, generator())
    draw.area[:] = 1.0
    draw.aspect[:] = 0.0 if size[1] >= size[0] else 1.0
    boxes = crop_boxes(draw, size, (1.0, 1.0))
    assert tuple(int(value) for value in (boxes.top, boxes.left, boxes.height, boxes.width)) == expected


@pytest.mark.parametrize("aspect", [0.5, 2.0])
def test_crops_have_about_the_shape_of_what_they_become(aspect: float) -> None:
    boxes = crop_boxes(draw_boxes(300, generator()), (200, 200), (0.08, 0.3), aspect)
    met = boxes.width / boxes.height / aspect
    assert CROP_ASPECTS[0] * 0.95 < met.min() < 0.8
    assert 1.25 < met.max() < CROP_ASPECTS[1] * 1.05
    draw = draw_boxes(1, generator())
    draw.area[:], draw.aspect[:] = 1.0, 0.0
    whole = crop_boxes(draw, (30, 60), (1.0, 1.0), 2.0)  # no attempt fits: the centre is taken
    assert (int(whole.height), int(whole.width)) == (30, 60)


def test_one_image_of_a_draw_gets_the_box_it_has_in_the_batch() -> None:
    draw = draw_boxes(20, generator())
    boxes = crop_boxes(draw, (57, 91), (0.08, 1.0))
    alone = crop_boxes(draw[13], (57, 91), (0.08, 1.0))
    assert (int(alone.top), int(alone.left)) == (int(boxes.top[13]), int(boxes.left[13]))
    assert (int(alone.height), int(alone.width)) == (int(boxes.height[13]), int(boxes.width[13]))
    aspect = boxes.width / boxes.height
    assert CROP_ASPECTS[0] * 0.9 < aspect.min() <= aspect.max() < CROP_ASPECTS[1] * 1.1


def test_a_crop_is_enlarged_like_pillows_bilinear() -> None:
    images = pictures(40)
    boxes = crop_boxes(draw_boxes(40, generator()), (32, 32), (0.08, 1.0))
    result = resize_crops(images, boxes).numpy().astype(int)
    for row, image in enumerate(images):
        top, left = int(boxes.top[row]), int(boxes.left[row])
        corners = (left, top, left + int(boxes.width[row]), top + int(boxes.height[row]))
        pixels = Image.fromarray(image.permute(1, 2, 0).numpy()).crop(corners)
        expected = np.asarray(pixels.resize((32, 32), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
        assert np.abs(result[row] - expected).max() <= 1


def test_the_whole_image_as_crop_is_the_image() -> None:
    images = pictures(3, 17)
    zero, whole = torch.zeros(3, dtype=torch.int64), torch.full((3,), 17)
    assert torch.equal(resize_crops(images, Boxes(zero, zero, whole, whole)), images)


def test_erasing_fills_exactly_the_rectangle_of_the_images_it_chose() -> None:
    images = pictures(200)
    draw = draw_erasing(images, generator(), 0.5)
    result = erase(images, draw)
    assert 70 < int(draw.is_erased.sum()) < 130
    for row in range(200):
        expected = images[row].clone()
        if draw.is_erased[row]:
            top, left = int(draw.boxes.top[row]), int(draw.boxes.left[row])
            rows = slice(top, top + int(draw.boxes.height[row]))
            columns = slice(left, left + int(draw.boxes.width[row]))
            expected[:, rows, columns] = draw.noise[row, :, rows, columns]
            share = expected[0, rows, columns].numel() / 1024
            assert 0.01 < share < 0.35
        assert torch.equal(result[row], expected)


def test_erased_pixels_are_evenly_random_bytes() -> None:
    draw = draw_erasing(pictures(20), generator(), 1.0)
    counts = torch.bincount(draw.noise.flatten().long(), minlength=256)
    assert 160 < counts.min() <= counts.max() < 330  # 240 expected


@pytest.mark.parametrize(("probability", "expected"), [(0.0, 0), (1.0, 300)])
def test_none_or_all_are_erased_at_the_ends_of_the_range(probability: float, expected: int) -> None:
    assert int(draw_erasing(pictures(300), generator(), probability).is_erased.sum()) == expected
