"""Features of any shape at a gate: images of channels, tokens and vectors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsnet.deploy.dynamic import DynamicNet
from dsnet.gates.mixing import Chooser, GatedSupernet
from dsnet.measure.evaluate import build_routing_table
from dsnet.network.supernet import TrunkOutput
from tests.dsnet.samples import NORMALIZATION, random_images, random_supernet_router, tensor_data
from tests.dsnet.tokens import SIZE, tokens

each_shape = pytest.mark.parametrize("pooled", [False, True], ids=["tokens", "pooled"])


def output(features: Tensor) -> TrunkOutput:
    return TrunkOutput.pooled(features, 5)


def test_the_evidence_of_tokens_is_over_the_tokens() -> None:
    features = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    as_image = output(features.transpose(1, 2)[..., None])
    for part in ("mean", "deviation", "maximum", "hidden"):
        torch.testing.assert_close(output(features).evidence(part), as_image.evidence(part), rtol=1e-12, atol=1e-12)


def test_the_evidence_of_vectors_is_the_value_and_no_deviation() -> None:
    features = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    found = output(features)
    assert torch.equal(found.evidence("mean"), features)
    assert torch.equal(found.evidence("maximum"), features)
    assert torch.equal(found.evidence("deviation"), torch.zeros(4, 3))
    assert torch.equal(found.hidden, torch.cat([features, torch.zeros(4, 2)], 1))


def test_features_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"features at a gate must be .* but are \[2, 3, 4, 5, 6\]"):
        output(torch.zeros(2, 3, 4, 5, 6))


@each_shape
@torch.no_grad()
def test_dynamic_inference_gathers_features_of_any_shape(pooled: bool) -> None:
    net = tokens(pooled=pooled)
    for kind in ("gates", "evidence_gates"):
        router = random_supernet_router(kind, net)
        images = random_images(16, SIZE, seed=4)
        for cut in (False, True):
            answer = DynamicNet(net, router, cut_weights=cut, fold_bn=False)(images)
            assert len(set(answer.routes.tolist())) > 2
            for image, route, logits in zip(images, answer.routes.tolist(), answer.logits, strict=True):
                torch.testing.assert_close(logits, net(image[None], net.subnets[route])[0], rtol=1e-4, atol=1e-5)


@each_shape
def test_the_table_has_the_evidence_of_every_node(pooled: bool) -> None:
    net = tokens(pooled=pooled)
    data = tensor_data(6, SIZE)
    table = build_routing_table(net, data, "val", NORMALIZATION)
    assert table.part("deviation", 2, 0).any() != pooled
    assert table.part("mean", 1, 0).shape == (6, 3)


@each_shape
def test_mixing_pads_no_channels_that_a_norm_sees(pooled: bool) -> None:
    net = tokens(pooled=pooled).requires_grad_(False)
    gated = GatedSupernet(net, range(len(net.subnets)), decides_once=False)
    draw = torch.Generator().manual_seed(3)
    images = random_images(16, SIZE, seed=2)
    choosers = [
        Chooser(torch.randn(rows, hidden, generator=draw).requires_grad_(), torch.randn(16, rows, generator=draw), 1.0)
        for rows, hidden in gated.head_shapes
    ]
    mixed = gated.mix_segments(net.upto_gate(0, images, net.subnets[0]), choosers)
    routes = mixed.positions.tolist()
    assert len(set(routes)) > 3
    for image, route, logits in zip(images, routes, mixed.logits, strict=True):
        torch.testing.assert_close(logits, net(image[None], net.subnets[route])[0], rtol=1e-4, atol=1e-5)
    mixed.logits.square().sum().backward()
    assert all(chooser.weight.grad is not None and chooser.weight.grad.any() for chooser in choosers)
