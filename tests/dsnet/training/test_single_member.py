"""A set with a single sub-network: training is that of the plain network, evaluation works, and no
router is trained over it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dsnet.deploy.materialize import materialize
from dsnet.families import layout, rebuild
from dsnet.gates.end_to_end import GateObjective
from dsnet.gates.fit import fit_gates
from dsnet.gates.settings import GateSettings
from dsnet.measure.evaluate import measure_subnets
from dsnet.measure.latency import measure_latency
from dsnet.measure.settings import LatencySettings
from dsnet.network.batchnorm import recalibrate
from dsnet.network.supernet import Supernet
from dsnet.space.cost import subnet_cost
from dsnet.space.spec import Subnet
from dsnet.space.subnet_set import SubnetSet
from dsnet.training.losses import smoothed_one_hot, soft_cross_entropy
from dsnet.training.optimization import learning_rate, make_optimizer
from dsnet.training.settings import REGIMES, BootstrapSettings, RegimeName, TrainSettings
from dsnet.training.supernet import _Session
from dsnet.training.supernet_run import SupernetRun
from dsnet.training.workers import SingleWorker
from tests.dsnet.cases import FAMILIES
from tests.dsnet.samples import (
    NORMALIZATION,
    ROUTER_KINDS,
    SMALL_OPTIONS,
    random_images,
    random_labels,
    shaken,
    small_run,
    small_set,
    supernet_table,
    task,
    tensor_data,
    without_dropout,
)

BATCH, STEPS_PER_EPOCH = 8, 5
ROUNDED = ("ds_vit",)
"""Families whose matrix products of sliced weights some processors (AMD) round differently than
those of contiguous ones, in the last bit."""


def single(family: str, norm: str | None = None, *, with_twin: bool = False) -> Supernet:
    """A supernet whose only member is narrower than its weights; `with_twin` adds a teacher of the
    same widths."""
    full = layout(family, task(), SMALL_OPTIONS.get(family, {}), norm)
    member = full[0]
    twin = Subnet("largest", member.widths) if with_twin else None
    return shaken(rebuild(SubnetSet(full.spec, (member,), twin), torch.Generator().manual_seed(5)), 5).train()


def settings_of(regime: RegimeName, train: Mapping[str, Any]) -> SupernetRun:
    settings = TrainSettings(epochs=2, batch_size=BATCH, lr=0.05, warmup_epochs=1.0, **train)
    bootstrapping = BootstrapSettings(soft_ramp_epochs=1.0)
    return small_run(regime=REGIMES[regime], train=settings, bootstrapping=bootstrapping)


def plain_step(
    plain: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], step: int, settings: TrainSettings
) -> Tensor:
    """A step of SGD as anyone writes it; returns the mean loss."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, 2 * STEPS_PER_EPOCH, STEPS_PER_EPOCH, settings)
    optimizer.zero_grad(set_to_none=True)
    losses = []
    share = BATCH // settings.accumulate
    for images, labels in zip(batch[0].split(share), batch[1].split(share), strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16"):
            logits = plain(images)
        loss = soft_cross_entropy(logits.float(), smoothed_one_hot(labels, 10, settings.label_smoothing))
        (loss / settings.accumulate).backward()
        losses.append(loss.detach())
    optimizer.step()
    return torch.stack(losses).mean()


def assert_same(net: Supernet, ours: Tensor, plain: Tensor, name: str) -> None:
    if net.spec.family in ROUNDED:
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6, msg=lambda text: f"{name}: {text}")
    else:
        assert torch.equal(ours, plain), name


def assert_trains_as_the_plain_network(net: Supernet, regime: RegimeName, train: Mapping[str, Any]) -> None:
    member = net.subnets[0]
    run = settings_of(regime, train)
    plain = materialize(net, member).train().requires_grad_(True)
    optimizer = make_optimizer(plain, run.train)
    session = _Session(net, run, STEPS_PER_EPOCH, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    before = {name: value.clone() for name, value in net.named_buffers()}
    for step in range(3):
        batch = random_images(BATCH, seed=step), random_labels(BATCH, seed=step)
        losses = session.update(*batch, session.plan(session.draw(generator)), SingleWorker())
        assert list(losses) == [net.subnets.largest.name]
        assert_same(net, *losses.values(), plain_step(plain, optimizer, batch, step, run.train), "loss")
    trained = materialize(net, member).state_dict()
    is_recalibrated = net.spec.norm == "recalibrate"
    for name, value in plain.state_dict().items():
        if not (is_recalibrated and ("running_" in name or "num_batches" in name)):
            assert_same(net, trained[name], value, name)
    if is_recalibrated:  # training leaves the statistics alone
        assert all(torch.equal(value, before[name]) for name, value in net.named_buffers())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("regime", REGIMES)
def test_a_single_member_trains_as_the_plain_network(family: str, regime: RegimeName) -> None:
    assert_trains_as_the_plain_network(without_dropout(single(family, REGIMES[regime].norm)), regime, {})


@pytest.mark.slow
@pytest.mark.parametrize("train", [{"accumulate": 2}, {"precision": "bf16"}, {"optimizer": "adamw"}], ids=str)
def test_a_single_member_trains_as_the_plain_network_whatever_the_optimisation(train: Mapping[str, Any]) -> None:
    assert_trains_as_the_plain_network(single("ds_tiny"), "ib", train)


@pytest.mark.parametrize("regime", REGIMES)
def test_a_teacher_of_the_same_widths_is_the_same_network(regime: RegimeName) -> None:
    """Names do not make two networks of one: it is trained once, not twice."""
    assert_trains_as_the_plain_network(single("ds_tiny", with_twin=True), regime, {})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_member_is_evaluated_tabled_and_timed(family: str) -> None:
    net = single(family)
    recalibrate(net, [random_images(16)])
    (member,) = net.subnets
    data, table = tensor_data(24), supernet_table(net.eval())
    (row,) = measure_subnets(net, data, "val", NORMALIZATION)["subnets"]
    assert table.routes == (member.name,)
    assert row["top1"] == table.top1()[0]
    assert row["madds"] == table.madds[0] == subnet_cost(net.spec, member, 16).madds
    assert {(gate.num_nodes, gate.num_choices) for gate in table.tree.gates} == {(1, 1)}
    latency = measure_latency(net, 16, LatencySettings(repeats=3, warmup=1, batch_sizes=(1,), group_sizes=(1,)))
    assert latency.ideal_ms(1, np.array([1.0]), table.routes) > 0


@pytest.mark.parametrize("kind", ROUTER_KINDS)
def test_a_router_over_the_only_route_of_a_network_is_refused(kind: str) -> None:
    full = small_set("ds_tiny")
    net = single("ds_tiny").eval()
    table = supernet_table(net)
    (error,) = fit_gates(table, table, [GateSettings(router=kind, steps=2)])
    assert isinstance(error, ValueError)
    assert f"{full[0].name} is the only sub-network: a router has nothing to choose" in str(error)


def test_a_gate_is_not_trained_end_to_end_over_the_only_route_of_a_network() -> None:
    with pytest.raises(ValueError, match="subnet-00 is the only sub-network: a router has nothing to choose"):
        GateObjective(single("ds_tiny").eval(), GateSettings(), 16)
