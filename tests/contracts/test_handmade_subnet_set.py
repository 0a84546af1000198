"""A set of sub-networks as pruning or search would produce it works in every part of the core.

docs/definitions.md, SubnetSet, requires it. Widths after the gate are not monotone in each other,
the declared order is not that of MAdds, the writers of a residual stream differ in width, and the
channels of the supernet are in another order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsnet.data.training_images import InMemoryImages
from dsnet.deploy.bundle import BundleContents, check_bundle_examples, check_bundle_files, load_bundle, save_bundle
from dsnet.deploy.dynamic import DynamicNet
from dsnet.deploy.materialize import materialize
from dsnet.families import layout, rebuild
from dsnet.gates.fit import fit_gate
from dsnet.gates.problem import sgs_targets
from dsnet.gates.settings import GateSettings
from dsnet.measure.evaluate import build_routing_table
from dsnet.measure.latency import measure_latency
from dsnet.measure.settings import LatencySettings
from dsnet.network.batchnorm import recalibrate
from dsnet.network.supernet import Supernet, restrict
from dsnet.routing.routing_table import RoutingTable
from dsnet.space.cost import subnet_cost
from dsnet.space.spec import Subnet
from dsnet.space.subnet_set import SubnetSet
from dsnet.stored.checkpoint import load_supernet, save_supernet
from dsnet.structure.filters import order_groups
from dsnet.structure.order import reorder
from dsnet.training.supernet import train_supernet
from tests.dsnet.samples import (
    NORMALIZATION,
    ROUTER_KINDS,
    random_images,
    random_labels,
    random_pixels,
    shaken,
    small_run,
    task,
    tensor_data,
)

SETTINGS = GateSettings(steps=30, batch_size=16, target=0.4)


@dataclass(frozen=True)
class Handmade:
    """Members for a family's supernet: a wide, a narrow ("tiny"), and others that are wide in
    different places."""

    family: str
    options: Mapping[str, Any]
    widths: Mapping[str, tuple[int, ...]]

    def subnets(self) -> SubnetSet:
        """The members as a set, without a teacher."""
        spec = layout(self.family, task(), self.options, "private_stats").spec
        return SubnetSet(spec, tuple(Subnet(name, widths) for name, widths in self.widths.items()))

    def supernet(self) -> Supernet:
        """A supernet for them, in eval mode."""
        return shaken(rebuild(self.subnets()), seed=3).eval()


SMALL_RESNET = {"depth": 14, "width": 0.5, "ratios": [0.5, 1.0]}
SETS = {
    # Groups of 12, 24, 96 and 192 channels; the gate after the second.
    "separable": Handmade(
        "ds_tiny",
        {},
        {
            "wide then narrow": (8, 20, 96, 30),
            "narrow then wide": (8, 20, 10, 192),
            "tiny": (8, 20, 9, 17),
            "middle": (8, 20, 41, 80),
        },
    ),
    # One group per stage, of 8, 16 and 32 channels after a stem of 8; the first gate after the
    # stem.
    "tied streams": Handmade(
        "ds_resnet",
        SMALL_RESNET,
        {
            "wide then narrow": (8, 8, 5, 32),
            "narrow then wide": (8, 3, 16, 9),
            "tiny": (8, 3, 4, 5),
            "middle": (8, 6, 7, 20),
        },
    ),
    # Two blocks per stage with their own inner and outer group each: writers of one stream differ.
    "padded streams": Handmade(
        "ds_resnet",
        {**SMALL_RESNET, "streams": "padded"},
        {
            "wide then narrow": (8, 8, 3, 4, 7, 5, 16, 16, 6, 32, 10, 7, 31),
            "narrow then wide": (8, 2, 8, 8, 3, 16, 5, 2, 12, 9, 32, 30, 11),
            "tiny": (8, 2, 3, 2, 2, 3, 4, 3, 5, 5, 6, 4, 7),
            "middle": (8, 4, 5, 6, 5, 9, 9, 10, 8, 17, 15, 20, 18),
        },
    ),
    # An inner group and a stream per stage, which need not go together.
    "bottlenecks": Handmade(
        "ds_resnet",
        {"depth": 50, "width": 0.125, "ratios": [0.5, 1.0]},
        {
            "wide then narrow": (8, 8, 9, 5, 64, 32, 40, 7, 256),
            "narrow then wide": (8, 3, 32, 16, 20, 9, 128, 64, 30),
            "tiny": (8, 2, 5, 3, 7, 4, 9, 5, 11),
            "middle": (8, 5, 16, 9, 33, 17, 65, 33, 100),
        },
    ),
}


@pytest.fixture(params=SETS)
def handmade(request: pytest.FixtureRequest) -> Handmade:
    """One handmade set, for each of the sets."""
    return SETS[request.param]


def permuted(supernet: Supernet) -> Supernet:
    """The same functions with the channels of every group in another order within each nested
    slice."""
    generator = torch.Generator().manual_seed(11)
    groups = supernet.spec.groups
    orders: dict[int, tuple[int, ...]] = {}
    for stream in order_groups(supernet):
        ends = {0, *(groups[group].max_width for group in stream)}
        ends |= {subnet.widths[group] for subnet in supernet.subnets.all for group in stream}
        parts = [low + torch.randperm(high - low, generator=generator) for low, high in pairwise(sorted(ends))]
        order = tuple(torch.cat(parts).tolist())
        orders |= {group: order[: groups[group].max_width] for group in stream}
    return reorder(supernet, tuple(orders[group] for group in range(len(groups))))


def test_declared_ids_stay_and_cost_orders_separately(handmade: Handmade) -> None:
    subnets = handmade.subnets()
    costs = [subnet_cost(subnets.spec, subnet, 16).madds for subnet in subnets]
    assert costs != sorted(costs)
    assert list(subnets.by_madds()) == sorted(range(4), key=lambda k: costs[k])
    assert subnets.by_madds()[0] == 2
    assert subnets.largest == subnets[subnets.by_madds()[-1]]
    assert subnets.prefix_upto(0) == subnets[0].widths[: subnets.spec.gates[0].num_prefix_groups]


@pytest.mark.slow
@torch.no_grad()
def test_sliced_equals_materialised_and_restricted(handmade: Handmade) -> None:
    supernet, images = handmade.supernet(), random_images(3)
    small = restrict(supernet, [1, 3])
    for subnet in supernet.subnets:
        expected = supernet(images, subnet)
        torch.testing.assert_close(materialize(supernet, subnet)(images), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(materialize(supernet, subnet, fold_bn=True)(images), expected, rtol=1e-5, atol=1e-5)
        if subnet.name in ("narrow then wide", "middle"):
            own = next(item for item in small.subnets if item.name == subnet.name)
            assert torch.equal(small(images, own), expected)


@torch.no_grad()
def test_another_channel_order_gives_the_same_functions(handmade: Handmade) -> None:
    supernet, images = handmade.supernet(), random_images(3)
    other = permuted(supernet)
    assert not torch.equal(other.state_dict()["classifier.weight"], supernet.state_dict()["classifier.weight"])
    for subnet in supernet.subnets:
        torch.testing.assert_close(other(images, subnet), supernet(images, subnet), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_another_channel_order_gives_the_same_recalibration_and_table(handmade: Handmade) -> None:
    supernet = handmade.supernet()
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


@pytest.mark.slow
def test_training_takes_the_costliest_member_as_the_largest(handmade: Handmade, tmp_path: Path) -> None:
    supernet, run = rebuild(handmade.subnets()), small_run()
    data = InMemoryImages(random_pixels(32), random_labels(32), run.augmentation)
    stem = train_supernet(supernet, data, run, folder=tmp_path)
    assert stem is not None
    trained, _ = load_supernet(stem)
    assert trained.subnets == handmade.subnets()
    first_line = (tmp_path / "curves.jsonl").read_text().splitlines()[0]
    assert f'"loss/{handmade.subnets().largest.name}"' in first_line
    assert '"loss/tiny"' in first_line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("made", "kind"),
    # Blocks do not depend on the kind of router: beside one set two kinds are enough, one that
    # decides at every gate and one that reads outputs.
    [
        (made, kind)
        for made in SETS
        for kind in (ROUTER_KINDS if made == "tied streams" else ("gates", "learned_cascade"))
    ],
)
def test_it_goes_from_table_to_bundle(made: str, tmp_path: Path, kind: str) -> None:
    handmade = SETS[made]
    supernet = permuted(handmade.supernet())
    recalibrate(supernet, [random_images(16, seed=4)])
    save_supernet(tmp_path / "net", supernet)
    supernet, _ = load_supernet(tmp_path / "net")
    data = tensor_data(40)
    build_routing_table(supernet, data, "val", NORMALIZATION).save(tmp_path / "val.safetensors")
    table = RoutingTable.load(tmp_path / "val.safetensors")
    assert table.routes == tuple(subnet.name for subnet in handmade.subnets())
    images, rows = NORMALIZATION.apply(data.images("val")), np.arange(40)
    # All routes, then a routing space whose ids do not rise with MAdds.
    for routes in ((), (0, 1, 2)):
        fit = fit_gate(table, table, replace(SETTINGS, router=kind, routes=routes))
        clear = ~fit.run.is_tie
        assert clear.sum() > 30
        assert fit.run.ran.any(0).sum() > 1
        output = DynamicNet(supernet, fit.router)(images)
        assert output.routes.numpy()[clear].tolist() == fit.run.routes[clear].tolist()
        assert output.logits.argmax(1).tolist() == table.predicted[rows, output.routes].tolist()
        assert output.madds.numpy()[clear].tolist() == fit.run.madds[clear].tolist()
        assert fit.metrics["madds_m"] == pytest.approx(fit.run.madds.mean() / 1e6)
    contents = BundleContents(
        supernet=supernet,
        router=fit.router,
        normalization=NORMALIZATION,
        class_names=data.class_names,
        examples=data.images("val")[:16],
    )
    save_bundle(tmp_path / "bundle", contents, claims={"val": {"top1": fit.metrics["top1"]}}, gate_yaml="")
    bundle = load_bundle(tmp_path / "bundle")
    check_bundle_files(bundle)
    assert check_bundle_examples(bundle) == 16
    answer = bundle(data.images("val"))
    names = [bundle.route_names[route] for route in answer.routes.tolist()]
    assert names == [table.routes[route] for route in output.routes.tolist()]
    assert answer.madds.tolist() == output.madds.tolist()


def test_sgs_takes_smallest_and_largest_by_cost_not_by_id(handmade: Handmade) -> None:
    supernet = handmade.supernet()
    table = build_routing_table(supernet, tensor_data(30), "val", NORMALIZATION)
    order = supernet.subnets.by_madds()
    targets = sgs_targets(table, range(4), SETTINGS)
    easy = table.correct1[:, order[0]]
    assert set(targets[easy].tolist()) <= {order[0]}
    assert set(targets[~easy].tolist()) == {order[-1]}


def test_latency_is_measured_for_every_member(handmade: Handmade) -> None:
    settings = LatencySettings(batch_sizes=(1,), group_sizes=(1,), repeats=1, warmup=0)
    table = measure_latency(handmade.supernet(), 16, settings)
    assert set(table.subnets[1]) == {subnet.name for subnet in handmade.subnets()}
