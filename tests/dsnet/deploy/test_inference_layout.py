"""The layout that makes cut modules fast does not change their results."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dsnet.deploy.inference_layout import PointwiseConv2d, lay_out_for_inference
from dsnet.deploy.materialize import materialize
from dsnet.network.transformer import PlainBlock
from tests.dsnet.samples import random_images, small_supernet


@settings(deadline=None)  # the first product of a process takes longest
@given(st.integers(0, 20), st.integers(1, 7), st.integers(1, 5), st.booleans(), st.booleans())
def test_a_pointwise_convolution_is_that_convolution(
    batch: int, channels: int, side: int, has_bias: bool, is_channels_last: bool
) -> None:
    conv = nn.Conv2d(channels, 6, 1, bias=has_bias).double()
    x = torch.randn(batch, channels, side, side + 1, dtype=torch.float64)
    x = x.to(memory_format=torch.channels_last) if is_channels_last else x
    with torch.no_grad():
        y = PointwiseConv2d.of(conv)(x)
        torch.testing.assert_close(y, conv(x), rtol=1e-12, atol=1e-12)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_only_convolutions_of_single_positions_become_products() -> None:
    net = nn.Sequential(
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, 1, stride=2),
        nn.Conv2d(4, 4, 1, groups=2),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Sequential(nn.Conv2d(4, 5, 1, bias=False)),
    ).eval()
    x = torch.randn(3, 4, 6, 6)
    with torch.no_grad():
        expected = net(x)
        fast = lay_out_for_inference(net)
        torch.testing.assert_close(fast(x), expected, rtol=1e-5, atol=1e-6)
    is_product = [isinstance(part, PointwiseConv2d) for part in fast.modules() if isinstance(part, nn.Conv2d)]
    assert is_product == [True, False, False, False, True]
    assert not any(part.training for part in fast.modules())


@torch.no_grad()
def test_attention_in_one_operation_gives_the_same() -> None:
    supernet, images = small_supernet("ds_vit"), random_images(5)
    for subnet in supernet.subnets:
        plain = materialize(supernet, subnet)
        expected = plain(images)
        fast = lay_out_for_inference(plain)
        blocks = [part for part in fast.modules() if isinstance(part, PlainBlock)]
        assert blocks
        assert all(block.is_fused for block in blocks)
        torch.testing.assert_close(fast(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["ds_mbnet", "ds_resnet"])
@torch.no_grad()
def test_a_folded_subnet_stays_channels_last_from_end_to_end(family: str) -> None:
    supernet = small_supernet(family)
    net = materialize(supernet, supernet.subnets[-1], fold_bn=True)
    met: list[bool] = []
    for part in net.modules():
        if isinstance(part, nn.Conv2d):
            part.register_forward_hook(lambda module, inputs, output: met.append(_is_last(output)))
    net(random_images(3))
    assert met
    assert all(met)


def _is_last(x: torch.Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)
