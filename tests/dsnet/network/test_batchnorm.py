"""Recalibration against torch's own cumulative BatchNorm."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsnet.deploy.materialize import materialize
from dsnet.network.batchnorm import recalibrate
from dsnet.network.layers import BN_MOMENTUM
from tests.dsnet.cases import BANKED_CASES, BANKED_FAMILIES, CASES, Case
from tests.dsnet.samples import random_images, small_supernet


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("case", BANKED_CASES, ids=str)
def test_every_set_equals_the_cumulative_average_of_each_sub_network_alone(case: Case) -> None:
    supernet = case.supernet()
    batches = [2.0 * random_images(count, 16, seed) + 1.0 for seed, count in enumerate((6, 6, 4))]
    plain = {}
    for subnet in supernet.subnets.all:
        module = materialize(supernet, subnet).train()
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.reset_running_stats()
                norm.momentum = None
        for images in batches:
            module(images)
        plain[subnet.name] = module
    recalibrate(supernet, iter(batches))
    for subnet in supernet.subnets.all:
        for met, expected in zip(materialize(supernet, subnet).modules(), plain[subnet.name].modules(), strict=True):
            if isinstance(met, nn.BatchNorm2d) and isinstance(expected, nn.BatchNorm2d):
                assert _times_each_batch_was_seen(met.num_batches_tracked, batches) >= 1
                torch.testing.assert_close(met.running_mean, expected.running_mean, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(met.running_var, expected.running_var, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_stem_equals_means_and_unbiased_variances_by_hand() -> None:
    supernet = small_supernet()
    batches = [random_images(5, seed=seed) for seed in range(3)]
    largest = supernet.subnets.largest
    weight = supernet.get_parameter("stem.weight")
    outputs = [F.conv2d(images, weight, padding=1).double().transpose(0, 1).flatten(1) for images in batches]
    recalibrate(supernet, batches)
    mean, variance, updates = supernet.batch_norms()[0].statistics(largest.prefix(1))
    torch.testing.assert_close(mean.double(), sum(o.mean(1) for o in outputs) / 3, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(variance.double(), sum(o.var(1) for o in outputs) / 3, rtol=1e-5, atol=1e-6)
    assert int(updates) == 3


@pytest.mark.slow
@pytest.mark.parametrize("case", BANKED_CASES, ids=str)
def test_every_set_of_every_sub_network_is_touched_and_nothing_else(case: Case) -> None:
    supernet = case.supernet()
    before = {name: value.clone() for name, value in supernet.state_dict().items()}
    recalibrate(supernet, [random_images(8), random_images(8, seed=1)])
    for name, value in supernet.state_dict().items():
        is_statistic = name.rpartition(".")[2].startswith(("mean_", "var_", "updates_"))
        assert torch.equal(value, before[name]) != is_statistic, name


def _times_each_batch_was_seen(updates: Tensor | None, batches: list[Tensor]) -> int:
    """Sub-networks that agree beyond a gate update what they share in turn: every batch equally
    often, so the average is the same."""
    assert updates is not None
    times, rest = divmod(int(updates), len(batches))
    assert rest == 0
    return times


@pytest.mark.parametrize("family", BANKED_FAMILIES)
def test_what_is_shared_up_to_a_gate_sees_each_batch_once(family: str) -> None:
    supernet = small_supernet(family)
    recalibrate(supernet, [random_images(8), random_images(8, seed=1)])
    counts = [int(value) for name, value in supernet.named_buffers() if ".updates_" in name]
    assert set(counts) == {2}


def test_old_statistics_do_not_matter_and_modes_are_restored() -> None:
    images = [random_images(8)]
    first, second = small_supernet(seed=0), small_supernet(seed=0)
    recalibrate(first, images)
    recalibrate(second, [random_images(8, seed=9)])
    recalibrate(second, images)
    others = second.state_dict()
    assert all(torch.equal(value, others[name]) for name, value in first.state_dict().items())
    assert not first.training
    assert {norm.momentum for norm in first.batch_norms()} == {BN_MOMENTUM}
    first.train()
    recalibrate(first, images)
    assert first.training


def test_no_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        recalibrate(small_supernet(), [])


@pytest.mark.parametrize("case", [case for case in CASES if case not in BANKED_CASES], ids=str)
def test_a_supernet_without_statistics_stays_as_it_is_and_runs_nothing(case: Case) -> None:
    supernet = case.supernet()
    before = {name: value.clone() for name, value in supernet.state_dict().items()}

    def no_images() -> Iterator[Tensor]:
        raise AssertionError("recalibration read a batch that it has no use for")
        yield

    recalibrate(supernet, no_images())
    assert not supernet.batch_norms()
    assert all(torch.equal(value, before[name]) for name, value in supernet.state_dict().items())
