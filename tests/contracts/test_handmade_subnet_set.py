"""A set of sub-networks as pruning or search would leave it goes through every part of the core (CONTRACTS, SubnetSet).

Widths after the gate are not monotone in each other, the declared order is not that of MAdds, and the channels of the supernet
stand in another order.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dsnet.batchnorm import recalibrate
from dsnet.bundle import check_bundle_examples, check_bundle_files, load_bundle, save_bundle
from dsnet.checkpoint import load_supernet, save_supernet
from dsnet.cost import subnet_cost
from dsnet.dynamic import DynamicNet
from dsnet.families import layout, rebuild
from dsnet.latency import LatencySettings, measure_latency
from dsnet.materialize import materialize
from dsnet.routing_table import RoutingTable
from dsnet.space import Subnet, SubnetSet
from dsnet.supernet import Supernet, restrict
from dsnet.training.evaluate import build_routing_table
from dsnet.training.gate import GateSettings, calibrated_router, choose_routes, fit_gate, sgs_targets, train_gate
from dsnet.training.supernet import train_supernet
from tests.dsnet.samples import (
    NORMALIZATION,
    random_images,
    random_labels,
    random_pixels,
    shaken,
    small_run,
    task,
    tensor_data,
)

SETTINGS = GateSettings(steps=30, batch_size=16, target=0.4)


def handmade_set() -> SubnetSet:
    """Four members of ds_tiny's shape; no teacher."""
    spec = layout("ds_tiny", task()).spec  # groups of 12, 24, 96 and 192 channels; the gate after the second
    members = (
        Subnet("wide then narrow", (8, 20, 96, 30)),
        Subnet("narrow then wide", (8, 20, 10, 192)),
        Subnet("tiny", (8, 20, 9, 17)),
        Subnet("middle", (8, 20, 41, 80)),
    )
    return SubnetSet(spec, members)


def handmade_supernet() -> Supernet:
    return shaken(rebuild(handmade_set()), seed=3).eval()


def block_permutation(boundaries: list[int], generator: torch.Generator) -> Tensor:
    """A permutation of the channels that keeps every prefix up to a boundary a set."""
    ends = [0, *boundaries]
    parts = [low + torch.randperm(high - low, generator=generator) for low, high in pairwise(ends)]
    return torch.cat(parts)


def permuted(supernet: Supernet) -> Supernet:
    """The same functions with the channels of every group in another order within each nested slice."""
    generator = torch.Generator().manual_seed(11)
    orders = []
    for index, group in enumerate(supernet.spec.groups):
        widths = {subnet.widths[index] for subnet in supernet.subnets.all} | {group.max_width}
        orders.append(block_permutation(sorted(widths), generator))
    state = dict(supernet.state_dict())

    def reorder(name: str, dimension: int, group: int) -> None:
        length = state[name].shape[dimension]
        state[name] = state[name].index_select(dimension, orders[group][:length])

    def reorder_norm(bank: str, group: int) -> None:
        for name in [name for name in state if name.startswith(f"{bank}.") and ".updates_" not in name]:
            reorder(name, 0, group)

    reorder("stem.weight", 0, 0)
    reorder_norm("stem_norm", 0)
    for number, block in enumerate(supernet.spec.layout["blocks"]):
        source, target, name = block["in_group"], block["out_group"], f"blocks.{number}"
        reorder(f"{name}.depthwise.weight", 0, source)
        reorder_norm(f"{name}.depthwise_norm", source)
        reorder(f"{name}.attention.reduce_weight", 1, source)
        reorder(f"{name}.attention.expand_weight", 0, source)
        reorder(f"{name}.attention.expand_bias", 0, source)
        reorder(f"{name}.pointwise.weight", 1, source)
        reorder(f"{name}.pointwise.weight", 0, target)
        reorder_norm(f"{name}.pointwise_norm", target)
    reorder("classifier.weight", 1, len(orders) - 1)
    other = rebuild(supernet.subnets).eval()
    other.load_state_dict(state)
    return other


def test_declared_ids_stay_and_cost_orders_separately() -> None:
    subnets = handmade_set()
    costs = [subnet_cost(subnets.spec, subnet, 16).madds for subnet in subnets]
    assert costs != sorted(costs)
    assert list(subnets.by_madds()) == sorted(range(4), key=lambda k: costs[k])
    assert subnets.by_madds()[0] == 2
    assert subnets.largest == subnets[subnets.by_madds()[-1]]
    assert subnets.prefix_upto(0) == (8, 20)


@torch.no_grad()
def test_sliced_equals_materialised_and_restricted() -> None:
    supernet, images = handmade_supernet(), random_images(3)
    small = restrict(supernet, [1, 3])
    for subnet in supernet.subnets:
        expected = supernet(images, subnet)
        torch.testing.assert_close(materialize(supernet, subnet)(images), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(materialize(supernet, subnet, fold_bn=True)(images), expected, rtol=1e-5, atol=1e-5)
        if subnet.name in ("narrow then wide", "middle"):
            own = next(item for item in small.subnets if item.name == subnet.name)
            assert torch.equal(small(images, own), expected)


@torch.no_grad()
def test_another_channel_order_gives_the_same_functions() -> None:
    supernet, images = handmade_supernet(), random_images(3)
    other = permuted(supernet)
    assert not torch.equal(other.state_dict()["stem.weight"], supernet.state_dict()["stem.weight"])
    for subnet in supernet.subnets:
        torch.testing.assert_close(other(images, subnet), supernet(images, subnet), rtol=1e-4, atol=1e-4)


def test_another_channel_order_gives_the_same_recalibration_and_table() -> None:
    supernet = handmade_supernet()
    other = permuted(supernet)
    batches = [random_images(12, seed=1), random_images(12, seed=2)]
    for net in (supernet, other):
        recalibrate(net, batches)
    data = tensor_data(20)
    first, second = (build_routing_table(net, data, "val", NORMALIZATION) for net in (supernet, other))
    np.testing.assert_allclose(first.ce, second.ce, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(first.madds, second.madds)
    hidden = [table.part("hidden") for table in (first, second)]
    np.testing.assert_allclose(hidden[0], hidden[1], rtol=1e-3, atol=1e-3)


def test_training_takes_the_costliest_member_as_the_largest(tmp_path: Path) -> None:
    supernet = rebuild(handmade_set())
    stem = train_supernet(supernet, random_pixels(32), random_labels(32), small_run(), folder=tmp_path)
    assert stem is not None
    trained, _ = load_supernet(stem)
    assert trained.subnets == handmade_set()
    first_line = (tmp_path / "curves.jsonl").read_text().splitlines()[0]
    assert f'"loss/{handmade_set().largest.name}"' in first_line
    assert '"loss/tiny"' in first_line


@pytest.mark.parametrize("is_permuted", [False, True])
def test_it_goes_from_table_to_bundle(tmp_path: Path, is_permuted: bool) -> None:
    supernet = permuted(handmade_supernet()) if is_permuted else handmade_supernet()
    recalibrate(supernet, [random_images(16, seed=4)])
    save_supernet(tmp_path / "net", supernet)
    supernet, _ = load_supernet(tmp_path / "net")
    data = tensor_data(40)
    build_routing_table(supernet, data, "val", NORMALIZATION).save(tmp_path / "val.safetensors")
    table = RoutingTable.load(tmp_path / "val.safetensors")
    assert table.routes == tuple(subnet.name for subnet in handmade_set())
    result = fit_gate(table, table, SETTINGS)
    images = NORMALIZATION.apply(data.images("val"))
    output = DynamicNet(supernet, result.router)(images)
    routes = choose_routes(result.router, table)
    assert output.routes.tolist() == routes.tolist()
    assert len(set(routes.tolist())) > 1
    rows = np.arange(40)
    assert output.logits.argmax(1).tolist() == table.predicted[rows, routes].tolist()
    assert output.madds.tolist() == (table.madds[routes] + result.router.decision_madds).tolist()
    assert result.metrics["madds_m"] == pytest.approx(float(output.madds.double().mean()) / 1e6)

    # A routing space whose ids do not rise with MAdds.
    gate = GateSettings(steps=10, routes=(0, 1, 2), target=0.5)
    router, _ = calibrated_router(train_gate(table, gate), table, gate)
    save_bundle(
        tmp_path / "bundle",
        supernet,
        router,
        normalization=NORMALIZATION,
        class_names=data.class_names,
        examples=data.images("val")[:16],
        claims={"val": {"top1": result.metrics["top1"]}},
        gate_yaml="",
    )
    bundle = load_bundle(tmp_path / "bundle")
    check_bundle_files(bundle)
    assert check_bundle_examples(bundle) == 16
    answer = bundle(data.images("val"))
    expected = choose_routes(router, table)
    assert [bundle.route_names[route] for route in answer.routes.tolist()] == [table.routes[k] for k in expected]
    assert answer.madds.tolist() == (table.madds[expected] + router.decision_madds).tolist()


def test_sgs_takes_smallest_and_largest_by_cost_not_by_id() -> None:
    supernet = handmade_supernet()
    table = build_routing_table(supernet, tensor_data(30), "val", NORMALIZATION)
    order = supernet.subnets.by_madds()
    targets = sgs_targets(table, range(4), SETTINGS)
    easy = table.correct1[:, order[0]]
    assert set(targets[easy].tolist()) <= {order[0]}
    assert set(targets[~easy].tolist()) == {order[-1]}


def test_latency_is_measured_for_every_member() -> None:
    settings = LatencySettings(batch_sizes=(1,), group_sizes=(1,), repeats=1, warmup=0)
    table = measure_latency(handmade_supernet(), 16, settings)
    assert set(table.subnets[1]) == {subnet.name for subnet in handmade_set()}
