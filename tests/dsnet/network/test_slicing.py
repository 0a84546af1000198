"""Corners of weights, and their gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsnet.network.slicing import corner, gradients_added_in_place

LAYOUTS = (torch.contiguous_format, torch.channels_last)


def weight(layout: torch.memory_format = torch.contiguous_format) -> nn.Parameter:
    values = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return nn.Parameter(values.contiguous(memory_format=layout))


def gradient(parameter: nn.Parameter, sizes: list[tuple[int, ...]], *, in_place: bool) -> Tensor:
    """Gradient of a sum of convolutions, each with a corner of the parameter."""
    images = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for num_out, num_in in sizes:
        if in_place:
            with gradients_added_in_place():
                part = corner(parameter, num_out, num_in)
        else:
            part = parameter[:num_out, :num_in]
        F.conv2d(images[:, :num_in], part).square().sum().backward()
    assert parameter.grad is not None
    return parameter.grad


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", [[(2, 3)], [(6, 5), (2, 3)], [(2, 3), (6, 5)], [(4, 5), (6, 2), (2, 3)]])
def test_gradients_equal_those_of_plain_slices(layout: torch.memory_format, sizes: list[tuple[int, ...]]) -> None:
    met = gradient(weight(layout), sizes, in_place=True)
    torch.testing.assert_close(met, gradient(weight(), sizes, in_place=False), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_corner_is_contiguous_in_its_weights_own_order(layout: torch.memory_format) -> None:
    with gradients_added_in_place():
        part = corner(weight(layout), 2, 3)
    assert part.is_contiguous(memory_format=layout)
    assert torch.equal(part, weight()[:2, :3])


def test_nothing_is_copied_where_nothing_is_cut_off() -> None:
    parameter = weight()
    with gradients_added_in_place():
        assert corner(parameter, 6, 5) is parameter
        assert corner(parameter, 6) is parameter


def test_elsewhere_autograd_sees_the_slice() -> None:
    parameter = weight()
    (found,) = torch.autograd.grad(corner(parameter, 2, 3).sum(), parameter)
    expected = torch.zeros_like(parameter)
    expected[:2, :3] = 1.0
    assert torch.equal(found, expected)
    with gradients_added_in_place():
        pass
    assert corner(parameter, 2, 3).grad_fn is not None
    assert corner(parameter, 2, 3).data_ptr() == parameter.data_ptr()  # a view again, outside


def test_frozen_weights_and_no_grad_give_plain_views() -> None:
    frozen = weight().requires_grad_(False)
    with gradients_added_in_place():
        assert corner(frozen, 2, 3).data_ptr() == frozen.data_ptr()
        with torch.no_grad():
            parameter = weight()
            assert corner(parameter, 2, 3).data_ptr() == parameter.data_ptr()
