"""Losses against sums written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from dsnet.gates.losses import complexity
from dsnet.training.losses import smoothed_one_hot, soft_cross_entropy


def test_smoothed_targets_are_a_distribution_with_the_label_ahead() -> None:
    target = smoothed_one_hot(torch.tensor([2, 0]), 4, 0.1)
    expected = torch.tensor([[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]])
    torch.testing.assert_close(target, expected)
    assert torch.equal(smoothed_one_hot(torch.tensor([1]), 3, 0.0), torch.tensor([[0.0, 1.0, 0.0]]))


def test_soft_cross_entropy_equals_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((5, 4), generator=generator, dtype=torch.float64)
    target = torch.rand((5, 4), generator=generator, dtype=torch.float64)
    target = target / target.sum(1, keepdim=True)
    total = 0.0
    for row in range(5):
        normaliser = math.log(sum(math.exp(value) for value in logits[row].tolist()))
        total -= sum(float(target[row, c]) * (float(logits[row, c]) - normaliser) for c in range(4))
    assert float(soft_cross_entropy(logits, target)) == pytest.approx(total / 5, rel=1e-12)


def test_smoothed_cross_entropy_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn((6, 5), generator=generator), torch.randint(5, (6,), generator=generator)
    met = soft_cross_entropy(logits, smoothed_one_hot(labels, 5, 0.1))
    torch.testing.assert_close(met, F.cross_entropy(logits, labels, label_smoothing=0.1))


@pytest.mark.parametrize(
    ("form", "expected_m", "value"),
    [
        ("hinge", 150.0, 0.25),
        ("hinge", 50.0, 0.0),
        ("quadratic", 150.0, 0.25),
        ("quadratic", 50.0, 0.25),
        ("paper", 282.7, (282.7e6 / 1e9) ** 2),
        ("paper_raw", 500.0, 0.25),
    ],
)
def test_complexity_forms(form: str, expected_m: float, value: float) -> None:
    met = complexity(torch.tensor(expected_m * 1e6, dtype=torch.float64), 100e6, 565.4e6, form)
    assert float(met) == pytest.approx(value, rel=1e-9)


def test_the_paper_form_scales_with_the_widest_sub_network() -> None:
    half = torch.tensor(0.5e6, dtype=torch.float64)
    full = torch.tensor(0.5 * 565.4e6, dtype=torch.float64)
    assert float(complexity(half, 1.0, 1e6, "paper")) == pytest.approx(float(complexity(full, 1.0, 565.4e6, "paper")))


def test_unknown_complexity_form_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown complexity form 'cubic'; known: hinge"):
        complexity(torch.tensor(1.0), 1.0, 1.0, "cubic")
