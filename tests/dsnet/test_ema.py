"""The EMA teacher against a plain recurrence."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dsnet.ema import ema_decay, frozen_copy, update_ema
from tests.dsnet.samples import random_images, small_supernet


def test_warm_up_follows_the_stated_formula() -> None:
    assert [ema_decay(step, 0.997, True) for step in (0, 1, 8, 100)] == [0.1, 2 / 11, 0.5, 101 / 110]
    assert ema_decay(10_000, 0.997, True) == 0.997
    assert ema_decay(0, 0.997, False) == 0.997


def test_update_equals_the_recurrence_for_parameters_and_float_buffers() -> None:
    generator = torch.Generator().manual_seed(0)
    student = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    ema = frozen_copy(student)
    expected = {name: value.clone().double() for name, value in ema.state_dict().items()}
    for step in range(5):
        for parameter in student.parameters():
            parameter.data.normal_(generator=generator)
        student(torch.randn((6, 3), generator=generator))
        decay = ema_decay(step, 0.5, True)
        update_ema(ema, student, decay)
        for name, value in student.state_dict().items():
            is_float = value.is_floating_point()
            expected[name] = decay * expected[name] + (1 - decay) * value.double() if is_float else value.double()
    for name, value in ema.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-6)


def test_integer_buffers_are_copied() -> None:
    student = small_supernet()
    ema = frozen_copy(student)
    student.train()
    for _ in range(3):
        student(random_images(4), student.subnets[0])
    update_ema(ema, student, 0.9)
    updates = {name: value for name, value in ema.state_dict().items() if ".updates_" in name}
    assert updates
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in updates.items())
    assert max(int(value) for value in updates.values()) == 3


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_extreme_decays_take_one_side(decay: float) -> None:
    student, ema = small_supernet(seed=0), small_supernet(seed=1)
    expected = small_supernet(seed=int(decay)).state_dict()
    update_ema(ema, student, decay)
    assert all(torch.equal(value, expected[name]) for name, value in ema.state_dict().items())


def test_a_frozen_copy_shares_nothing_and_needs_no_gradient() -> None:
    student = small_supernet().train()
    ema = frozen_copy(student)
    assert student.training
    assert not ema.training
    assert not any(p.requires_grad for p in ema.parameters())
    pointers = {value.data_ptr() for value in student.state_dict().values() if value.numel() > 1}
    assert not pointers & {value.data_ptr() for value in ema.state_dict().values() if value.numel() > 1}
