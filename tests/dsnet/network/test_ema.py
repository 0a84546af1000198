"""The EMA teacher against a plain recurrence."""

from __future__ import annotations

import pytest
import torch

from dsnet.network.ema import Ema, ema_decay
from tests.dsnet.samples import random_images, small_supernet


def test_warm_up_follows_the_stated_formula() -> None:
    assert [ema_decay(step, 0.997, True) for step in (0, 1, 8, 100)] == [0.1, 2 / 11, 0.5, 101 / 110]
    assert ema_decay(10_000, 0.997, True) == 0.997
    assert ema_decay(0, 0.997, False) == 0.997


def test_update_equals_the_recurrence_for_parameters_and_float_buffers() -> None:
    generator = torch.Generator().manual_seed(0)
    student = small_supernet().train()
    ema = Ema(student)
    expected = {name: value.clone().double() for name, value in ema.module.state_dict().items()}
    for step in range(4):
        for parameter in student.parameters():
            parameter.data.normal_(generator=generator)
        student(random_images(4, seed=step), student.subnets[step % 3])
        decay = ema_decay(step, 0.5, True)
        ema.update(decay)
        for name, value in student.state_dict().items():
            is_float = value.is_floating_point()
            expected[name] = decay * expected[name] + (1 - decay) * value.double() if is_float else value.double()
    for name, value in ema.module.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-6)
    updates = [int(value) for name, value in ema.module.state_dict().items() if ".updates_" in name]
    assert max(updates) == 4  # integer buffers are copied


def test_it_follows_a_student_whose_state_was_loaded() -> None:
    """Loading writes in place, so the pairs of tensors that were looked up once stay the right
    ones."""
    student = small_supernet(seed=0)
    ema = Ema(student)
    student.load_state_dict(small_supernet(seed=1).state_dict())
    ema.module.load_state_dict(small_supernet(seed=2).state_dict())
    ema.update(0.0)
    expected = small_supernet(seed=1).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in ema.module.state_dict().items())


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_extreme_decays_take_one_side(decay: float) -> None:
    student = small_supernet(seed=1)
    ema = Ema(student)
    student.load_state_dict(small_supernet(seed=0).state_dict())
    ema.update(decay)
    expected = small_supernet(seed=int(decay)).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in ema.module.state_dict().items())


def test_the_copy_shares_nothing_and_needs_no_gradient() -> None:
    student = small_supernet().train()
    ema = Ema(student).module
    assert student.training
    assert not ema.training
    assert not any(p.requires_grad for p in ema.parameters())
    pointers = {value.data_ptr() for value in student.state_dict().values() if value.numel() > 1}
    assert not pointers & {value.data_ptr() for value in ema.state_dict().values() if value.numel() > 1}
