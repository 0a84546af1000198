"""Losses of Stage I: distillation at a temperature, and the penalty on scales."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsnet.families import create
from dsnet.training.losses import distillation, scale_penalty, soft_cross_entropy
from tests.dsnet.samples import task


def drawn(seed: int) -> Tensor:
    return 2.0 * torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradient_of(temperature: float, weight: float) -> Tensor:
    logits = drawn(0).requires_grad_()
    soft = (drawn(1) / temperature).softmax(1)
    distillation(logits, soft, drawn(2).softmax(1), torch.full((5,), weight).double(), temperature).backward()
    assert logits.grad is not None
    return logits.grad


def test_at_temperature_1_it_is_the_cross_entropy_to_the_mixture() -> None:
    weight = torch.tensor([0.0, 0.3, 0.5, 0.9, 1.0], dtype=torch.float64)
    soft, hard = drawn(1).softmax(1), drawn(2).softmax(1)
    mixture = weight[:, None] * soft + (1 - weight[:, None]) * hard
    torch.testing.assert_close(
        distillation(drawn(0), soft, hard, weight, 1.0), soft_cross_entropy(drawn(0), mixture), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_gradient_of_the_soft_part_is_temperature_times_the_difference(temperature: float) -> None:
    """T ** 2 / T * (softmax(z / T) - softmax(t / T)) of each image."""
    expected = temperature * ((drawn(0) / temperature).softmax(1) - (drawn(1) / temperature).softmax(1)) / 5
    torch.testing.assert_close(gradient_of(temperature, 1.0), expected, rtol=1e-10, atol=1e-12)


def test_its_gradient_keeps_its_size_at_high_temperatures_and_the_labels_have_none() -> None:
    hot, hotter = gradient_of(50.0, 1.0), gradient_of(100.0, 1.0)
    assert float((hot - hotter).norm()) < 0.05 * float(hot.norm())
    torch.testing.assert_close(gradient_of(4.0, 0.0), gradient_of(1.0, 0.0), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("norm", "sets"), [("private_stats", 1), ("private_affine", 3), ("recalibrate", 1)])
def test_the_penalty_is_the_sum_of_all_absolute_scales(norm: str, sets: int) -> None:
    net = create("ds_tiny", task(), {"num_routes": 3}, norm=norm)
    scales = {name: value for name, value in net.named_parameters() if "norm.weight" in name}
    with torch.no_grad():
        for value in scales.values():
            value.neg_()
    assert scale_penalty(net.batch_norms()).item() == sum(value.numel() for value in scales.values())
    last = net.batch_norms()[-1]
    assert len(last.scales()) == (1 if sets == 1 else len(last.keys()))


def test_a_network_without_batch_norm_has_no_penalty() -> None:
    with pytest.raises(ValueError, match="no scales"):
        scale_penalty(create("ds_tiny", task(), norm="group_norm").batch_norms())
