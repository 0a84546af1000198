"""Analytic cost against the published figures and against counted forwards."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dsnet.deploy.materialize import materialize
from dsnet.families import Task, create, layout
from dsnet.image_size import ImageSize
from dsnet.network.supernet import restrict
from dsnet.network.tracing import FUSED
from dsnet.space.cost import evidence_channels, gate_madds, pooling_madds, shared_params, subnet_cost
from dsnet.space.spec import Subnet
from tests.dsnet.cases import CASES, OBLONG, ONE_NORM_CASES, Case
from tests.dsnet.samples import random_images, small_supernet

PUBLISHED_MADDS_M = (132.9, 152.9, 175.2, 199.6, 226.2, 255.1, 286.2, 319.4, 354.9, 392.6, 432.5, 474.6, 518.9, 565.4)
"""DS-MBNet at 224 pixels and 1,000 classes (docs/methods.md, section 2)."""


_POOLING = (
    torch.ops.aten.max_pool2d_with_indices.default,
    torch.ops.aten._adaptive_avg_pool2d.default,
    torch.ops.aten.amax.default,
)


class PooledElements(TorchDispatchMode):
    """Counts the elements that pooling reads; FlopCounterMode knows products only."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_mean = func is torch.ops.aten.mean.dim and args[0].ndim >= 3
        if is_mean or func in _POOLING:
            self.count += args[0].numel()
        return func(*args, **(kwargs or {}))


def counted_madds(call: Any) -> int:
    """MACs of convolutions and linear layers plus pooled elements of one call."""
    counter = FlopCounterMode(display=False, custom_mapping=FUSED)
    pooled = PooledElements()
    with counter, pooled, torch.no_grad():
        call()
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2 + pooled.count


def test_ds_mbnet_has_the_published_madds_to_the_digit() -> None:
    subnets = layout("ds_mbnet", Task(1000, 3, 224))
    met = tuple(round(subnet_cost(subnets.spec, subnet, 224).madds / 1e6, 1) for subnet in subnets)
    assert met == PUBLISHED_MADDS_M


def test_ds_mbnet_largest_has_the_published_madds_and_parameters() -> None:
    subnets = layout("ds_mbnet", Task(1000, 3, 224))
    assert subnets.teacher is not None
    cost = subnet_cost(subnets.spec, subnets.teacher, 224)
    assert round(cost.madds / 1e6, 1) == 819.9
    assert cost.params + gate_madds(subnets.spec.gates[0].hidden, 4) == 7_676_204
    assert gate_madds(subnets.spec.gates[0].hidden, 4) == 264


def test_ds_mbnet_trunk_is_31_percent_of_the_cheapest_route() -> None:
    subnets = layout("ds_mbnet", Task(1000, 3, 224))
    costs = [subnet_cost(subnets.spec, subnet, 224) for subnet in subnets]
    assert {round(cost.trunk_madds / 1e6, 1) for cost in costs} == {40.6}
    assert round(costs[0].trunk_madds / costs[0].madds, 2) == 0.31


def test_ds_mbnet_has_the_parity_madds_at_64_pixels() -> None:
    subnets = layout("ds_mbnet", Task(10, 3, 64))
    assert subnet_cost(subnets.spec, subnets[0], 64).madds == 11_611_904
    assert subnet_cost(subnets.spec, subnets.largest, 64).madds == 68_678_336


@pytest.mark.slow
@pytest.mark.parametrize(("size", "num_classes"), [(9, 1), ((23, 14), 100)])
@pytest.mark.parametrize("case", ONE_NORM_CASES, ids=str)
def test_analytic_madds_equal_a_counted_forward(case: Case, size: ImageSize, num_classes: int) -> None:
    supernet = case.supernet(num_classes=num_classes)
    size = case.runs_at(size)
    images = random_images(1, size)
    for subnet in supernet.subnets.all:
        counted = counted_madds(lambda subnet=subnet: supernet(images, subnet))
        assert counted == subnet_cost(supernet.spec, subnet, size).madds


@pytest.mark.slow
@pytest.mark.parametrize("fold_bn", [False, True])
@pytest.mark.parametrize("case", ONE_NORM_CASES, ids=str)
def test_analytic_madds_equal_a_counted_forward_of_the_materialised_module(case: Case, fold_bn: bool) -> None:
    supernet = case.supernet()
    size = case.runs_at(OBLONG)
    images = random_images(1, size)
    for subnet in (supernet.subnets[0], supernet.subnets.largest):
        plain = materialize(supernet, subnet, fold_bn=fold_bn)
        counted = counted_madds(lambda plain=plain: plain(images))
        assert counted == subnet_cost(supernet.spec, subnet, size).madds


@pytest.mark.parametrize("case", ONE_NORM_CASES, ids=str)
@torch.no_grad()
def test_each_segment_costs_what_it_counts(case: Case) -> None:
    supernet = case.supernet()
    subnet = supernet.subnets[-1]
    size = case.runs_at(OBLONG)
    cost = subnet_cost(supernet.spec, subnet, size)
    features = random_images(1, size)
    for gate, madds in enumerate(cost.segments[:-1]):
        segment = supernet.cut_upto_gate(gate, subnet).eval()
        assert counted_madds(lambda segment=segment, features=features: segment(features)) == madds
        features = supernet.upto_gate(gate, features, subnet).features
    head = supernet.cut_head(subnet).eval()
    assert counted_madds(lambda: head(features)) == cost.segments[-1]
    assert sum(cost.segments) == cost.madds
    assert len(cost.segments) == len(supernet.spec.gates) + 1


@pytest.mark.parametrize("case", ONE_NORM_CASES, ids=str)
def test_a_gate_costs_what_its_head_counts(case: Case) -> None:
    spec = case.subnets().spec
    for gate in spec.gates:
        head = nn.Linear(gate.hidden, 4, bias=False)
        counted = counted_madds(lambda head=head: head(torch.zeros(1, head.in_features)))
        assert gate_madds(gate.hidden, 4) == counted == sum(p.numel() for p in head.parameters())
        (attention,) = [op for op in spec.ops if op.name == gate.attention]
        if attention.kind == "pool":  # a thumbnail of the image, or the mean of each channel
            assert attention.window is not None
            channels = attention.input_width(spec, spec.max_widths)
            assert channels * math.prod(attention.window.output) == gate.hidden
        else:
            assert attention.kind == "attention"
            assert attention.hidden == gate.hidden


@pytest.mark.parametrize("size", [OBLONG])
@pytest.mark.parametrize("case", ONE_NORM_CASES, ids=str)
@torch.no_grad()
def test_a_pooling_costs_what_the_attentions_own_pooling_counts(case: Case, size: ImageSize) -> None:
    supernet = case.supernet()
    size = case.runs_at(size)
    for subnet in (supernet.subnets[0], supernet.subnets.largest):
        features = random_images(1, size)
        for gate in range(len(supernet.spec.gates)):
            output = supernet.upto_gate(gate, features, subnet)
            pooled = PooledElements()
            with pooled:
                output.evidence("mean")
            assert pooling_madds(supernet.spec, subnet, gate, size) == pooled.count > 0
            features = output.features


@pytest.mark.parametrize("case", ONE_NORM_CASES, ids=str)
@pytest.mark.parametrize("size", [16, (24, 17)])
@torch.no_grad()
def test_the_channels_of_a_gates_evidence_are_those_that_it_pools(case: Case, size: ImageSize) -> None:
    supernet = case.supernet()
    size = case.runs_at(size)
    for subnet in supernet.subnets:
        features = random_images(1, size)
        for gate in range(len(supernet.spec.gates)):
            output = supernet.upto_gate(gate, features, subnet)
            features = output.features
            assert evidence_channels(supernet.spec, subnet, gate) == output.evidence("mean").shape[1]


def test_a_gate_without_its_attention_has_no_pooling() -> None:
    spec = small_supernet().spec
    broken = replace(spec, gates=(replace(spec.gates[0], attention="nowhere"),))
    with pytest.raises(ValueError, match="'nowhere', which ds_tiny does not have"):
        pooling_madds(broken, small_supernet().subnets[0], 0, 16)
    with pytest.raises(ValueError, match="names attention"):
        evidence_channels(broken, small_supernet().subnets[0], 0)


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, (33, 20)])
def test_full_width_ds_mbnet_equals_a_counted_forward(size: ImageSize) -> None:
    supernet = create("ds_mbnet", Task(10, 3, 32)).eval()
    images = random_images(1, size)
    for subnet in supernet.subnets.all:
        assert (
            counted_madds(lambda subnet=subnet: supernet(images, subnet))
            == subnet_cost(supernet.spec, subnet, size).madds
        )


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_analytic_parameters_equal_those_of_the_materialised_module(case: Case) -> None:
    supernet = case.supernet()
    for subnet in supernet.subnets.all:
        plain = materialize(supernet, subnet)
        assert sum(p.numel() for p in plain.parameters()) == subnet_cost(supernet.spec, subnet, 16).params


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_shared_parameters_are_those_of_the_restricted_supernet(case: Case) -> None:
    supernet = case.supernet()
    every = range(len(supernet.subnets))
    for members in ([0], [0, 1], every):
        small = restrict(supernet, list(members))
        counted = sum(p.numel() for p in small.parameters())
        assert shared_params(supernet.spec, small.subnets) == counted


def test_cost_refuses_foreign_subnets_and_sizes() -> None:
    spec = small_supernet().spec
    with pytest.raises(ValueError, match="widths"):
        subnet_cost(spec, Subnet("odd", (1,)), 16)
    with pytest.raises(ValueError, match="image_size is 0"):
        subnet_cost(spec, small_supernet().subnets[0], 0)
