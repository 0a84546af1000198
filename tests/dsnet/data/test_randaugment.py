"""RandAugment-style augmentation: what is drawn, and where pixels go, against Pillow and a
pixel-by-pixel oracle."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dsnet.data import randaugment
from dsnet.data.randaugment import (
    FILL,
    Operation,
    RandAugmentDraw,
    affine_maps,
    apply_randaugment,
    draw_randaugment,
)
from dsnet.data.settings import MAX_OPERATIONS

MOVES = (
    Operation.ROTATE,
    Operation.SHEAR_X,
    Operation.SHEAR_Y,
    Operation.TRANSLATE_X,
    Operation.TRANSLATE_Y,
)


def pictures(count: int, height: int = 23, width: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def drawn(*operations: tuple[Operation, ...], sign: float = 1.0) -> RandAugmentDraw:
    operation = torch.tensor(operations)
    return RandAugmentDraw(operation, torch.full(operation.shape, sign))


def with_pillow(image: Tensor, operation: Operation, sign: float, share: float) -> np.ndarray:
    """One move about the centre with `Image.transform`, which also takes the nearest pixel."""
    _, height, width = image.shape
    angle, shear, move = math.radians(30) * sign * share, 0.3 * sign * share, 0.45 * sign * share
    a, b, d, e, dx, dy = {
        Operation.ROTATE: (math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle), 0.0, 0.0),
        Operation.SHEAR_X: (1.0, shear, 0.0, 1.0, 0.0, 0.0),
        Operation.SHEAR_Y: (1.0, 0.0, shear, 1.0, 0.0, 0.0),
        Operation.TRANSLATE_X: (1.0, 0.0, 0.0, 1.0, move * width, 0.0),
        Operation.TRANSLATE_Y: (1.0, 0.0, 0.0, 1.0, 0.0, move * height),
    }[operation]
    x, y = width / 2, height / 2
    coefficients = (a, b, x - a * x - b * y + dx, d, e, y - d * x - e * y + dy)
    moved = Image.fromarray(image.permute(1, 2, 0).numpy()).transform(
        (width, height), Image.Transform.AFFINE, coefficients, Image.Resampling.NEAREST, fillcolor=(FILL,) * 3
    )
    return np.asarray(moved).transpose(2, 0, 1)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("operation", MOVES)
def test_a_move_does_what_pillow_does(operation: Operation, sign: float) -> None:
    images = pictures(3)
    result = apply_randaugment(images, drawn(*[(operation,)] * 3, sign=sign), 7.0).numpy()
    expected = np.stack([with_pillow(image, operation, sign, 0.7) for image in images])
    # Pillow steps in 16-bit fixed point: a pixel whose source lies on the border of two may differ.
    assert (result != expected).mean() < 0.01
    assert (result != images.numpy()).mean() > 0.5


def test_several_moves_are_composed_in_their_order() -> None:
    """Following each pixel through the moves one by one, in double precision, ends at the same
    source."""
    images = pictures(1, 20, 20)
    order = (Operation.ROTATE, Operation.TRANSLATE_X, Operation.SHEAR_Y)
    result = apply_randaugment(images, drawn(order), 5.0)[0]
    angle, move, shear = math.radians(15), 0.225 * 20, 0.15
    num_checked = 0
    for row in range(20):
        for column in range(20):
            x, y = column - 9.5, row - 9.5
            y += shear * x  # the last move looks up first
            x += move
            x, y = x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)
            x, y = x + 10, y + 10
            if min(abs(x - round(x)), abs(y - round(y))) < 1e-3:
                continue
            is_inside = 0 <= x < 20 and 0 <= y < 20
            expected = images[0, :, int(y), int(x)].tolist() if is_inside else [FILL] * 3
            assert result[:, row, column].tolist() == expected
            num_checked += 1
    assert num_checked > 350


def test_operations_without_a_move_leave_every_pixel_in_its_place() -> None:
    others = [(operation, Operation.IDENTITY) for operation in Operation if operation not in MOVES]
    matrix, offset = affine_maps(drawn(*others), 0.9, torch.Size((9, 9)))
    assert torch.equal(matrix, torch.eye(2).expand(len(others), 2, 2))
    assert not offset.any()


def test_tonal_operations_apply_in_the_order_drawn() -> None:
    images = pictures(1)
    there = apply_randaugment(images, drawn((Operation.SOLARIZE, Operation.BRIGHTNESS), sign=-1.0), 5.0)
    back = apply_randaugment(images, drawn((Operation.BRIGHTNESS, Operation.SOLARIZE), sign=-1.0), 5.0)
    one_by_one = apply_randaugment(images, drawn((Operation.SOLARIZE,)), 5.0)
    one_by_one = apply_randaugment(one_by_one, drawn((Operation.BRIGHTNESS,), sign=-1.0), 5.0)
    assert torch.equal(there, one_by_one)
    assert not torch.equal(there, back)


def test_at_magnitude_0_only_autocontrast_and_equalize_change_anything() -> None:
    images = pictures(len(Operation)) // 2 + 30
    result = apply_randaugment(images, drawn(*[(operation,) for operation in Operation]), 0.0)
    changed = {operation for operation in Operation if not torch.equal(result[operation], images[operation])}
    assert changed == {Operation.AUTOCONTRAST, Operation.EQUALIZE}


def test_a_greater_magnitude_moves_an_image_further_away() -> None:
    coarse = torch.rand((len(Operation), 3, 5, 5), generator=torch.Generator().manual_seed(1)) * 200 + 20
    images = torch.nn.functional.interpolate(coarse, (32, 32), mode="bilinear").to(torch.uint8)
    draw = drawn(*[(operation,) for operation in Operation])
    weak, strong = (apply_randaugment(images, draw, magnitude).float() for magnitude in (2.0, 8.0))
    distances = [(result - images.float()).abs().mean((1, 2, 3)) for result in (weak, strong)]
    has_strength = [op for op in Operation if op not in (0, Operation.AUTOCONTRAST, Operation.EQUALIZE)]
    assert bool((distances[1] > distances[0])[has_strength].all())


def test_every_operation_and_both_signs_are_drawn_equally_often() -> None:
    draw = draw_randaugment(torch.zeros((14000, 1, 1, 1), dtype=torch.uint8), torch.Generator().manual_seed(0), 2)
    counts = torch.bincount(draw.operation.flatten(), minlength=len(Operation))
    assert len(counts) == len(Operation) == MAX_OPERATIONS
    assert 1850 < counts.min() <= counts.max() < 2150  # 2,000 expected, sigma 43
    assert set(draw.sign.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(draw.sign.mean())) < 0.03
    together = torch.bincount(draw.operation[:, 0] * 14 + draw.operation[:, 1], minlength=196)
    assert together.min() > 35  # 71 expected: the second does not depend on the first


def test_working_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(30)
    draw = draw_randaugment(images, torch.Generator().manual_seed(0), 2)
    whole = apply_randaugment(images, draw, 9.0)
    monkeypatch.setattr(randaugment, "_CPU_CHUNK", 5000)
    assert torch.equal(apply_randaugment(images, draw, 9.0), whole)
