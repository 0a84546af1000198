"""Grouped dynamic inference against each image alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from dsnet.cost import subnet_cost
from dsnet.dynamic import MAX_ROUNDS, DynamicNet
from dsnet.families import family_names
from dsnet.routers import STOP, CascadeRouter, Executed, GateRouter
from dsnet.supernet import Supernet
from tests.dsnet.samples import random_images, small_supernet


@dataclass(frozen=True)
class Scripted:
    """A router that follows a list of routes per round, whatever it sees."""

    rounds: tuple[tuple[int, ...], ...]
    decision_madds: int = 0
    needs: tuple[str, ...] = ()

    def step(self, evidence: Mapping[str, Tensor], executed: Sequence[Executed]) -> Tensor:
        """The next line of the script; its last line for ever."""
        return torch.tensor(self.rounds[min(len(executed), len(self.rounds) - 1)])

    def to_arrays(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Scripts are not stored."""
        return {}, {}


def spreading_gate(supernet: Supernet, num_images: int = 64) -> GateRouter:
    """A random gate, its offsets set so that every route is taken by some image."""
    hidden = supernet.trunk(random_images(num_images), supernet.subnets[0]).hidden.double()
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn((len(supernet.subnets), hidden.shape[1]), generator=generator, dtype=torch.float64)
    return GateRouter(weight, (hidden @ weight.T).mean(0).detach(), tuple(range(len(supernet.subnets))))


@pytest.mark.parametrize(("cut_weights", "fold_bn"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("family", family_names())
@torch.no_grad()
def test_grouped_equals_each_image_alone(family: str, cut_weights: bool, fold_bn: bool) -> None:
    supernet = small_supernet(family)
    router = spreading_gate(supernet)
    net = DynamicNet(supernet, router, cut_weights=cut_weights, fold_bn=fold_bn)
    for batch_size in (64, 7, 1):
        images = random_images(64)[:batch_size]
        output = net(images)
        routes = router.step({"hidden": supernet.trunk(images, supernet.subnets[0]).hidden}, ())
        assert output.routes.tolist() == routes.tolist()
        for row in range(batch_size):
            subnet = supernet.subnets[int(routes[row])]
            alone = supernet(images[row : row + 1], subnet)[0]
            torch.testing.assert_close(output.logits[row], alone, rtol=1e-5, atol=1e-5)
            cost = subnet_cost(supernet.spec, subnet, 16).madds + router.decision_madds
            assert int(output.madds[row]) == cost
        if batch_size == 64:
            assert set(routes.tolist()) == set(range(len(supernet.subnets)))


@pytest.mark.parametrize("cut_weights", [True, False])
def test_an_empty_batch_gives_empty_answers(cut_weights: bool) -> None:
    supernet = small_supernet()
    output = DynamicNet(supernet, spreading_gate(supernet), cut_weights=cut_weights)(random_images(4)[:0])
    assert [tuple(value.shape) for value in output] == [(0, 10), (0,), (0,)]
    assert output.routes.dtype == output.madds.dtype == torch.int64


def test_order_of_the_batch_is_preserved() -> None:
    supernet = small_supernet()
    net = DynamicNet(supernet, spreading_gate(supernet))
    images = random_images(20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    straight, shuffled = net(images), net(images[order])
    assert torch.equal(shuffled.routes, straight.routes[order])
    torch.testing.assert_close(shuffled.logits, straight.logits[order], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_cascade_equals_a_loop_and_pays_for_the_trunk_once() -> None:
    supernet = small_supernet()
    images = random_images(24)
    confidence = supernet(images, supernet.subnets[0]).softmax(1).amax(1)
    router = CascadeRouter(0, 2, float(confidence.median()))
    output = DynamicNet(supernet, router, fold_bn=False)(images)
    costs = [subnet_cost(supernet.spec, subnet, 16) for subnet in supernet.subnets]
    for row in range(24):
        image = images[row : row + 1]
        logits, route, madds = supernet(image, supernet.subnets[0])[0], 0, costs[0].madds
        if float(confidence[row]) < router.threshold:
            logits, route = supernet(image, supernet.subnets[2])[0], 2
            madds += costs[2].madds - costs[2].trunk_madds
        torch.testing.assert_close(output.logits[row], logits, rtol=1e-5, atol=1e-5)
        assert (int(output.routes[row]), int(output.madds[row])) == (route, madds)
    assert set(output.routes.tolist()) == {0, 2}


def test_madds_are_those_of_the_image_size_it_is_told() -> None:
    supernet = small_supernet()
    router = spreading_gate(supernet)
    output = DynamicNet(supernet, router, image_size=23)(random_images(5, 23))
    expected = [
        subnet_cost(supernet.spec, supernet.subnets[route], 23).madds + router.decision_madds
        for route in output.routes.tolist()
    ]
    assert output.madds.tolist() == expected


@torch.no_grad()
def test_an_image_that_stopped_is_left_alone_whatever_the_router_says_later() -> None:
    supernet = small_supernet()
    images = random_images(3)
    router = Scripted(((0, 0, 0), (1, STOP, 2), (2, 2, STOP), (STOP, 1, 1), (STOP, STOP, STOP)))
    output = DynamicNet(supernet, router, fold_bn=False)(images)
    assert output.routes.tolist() == [2, 0, 2]
    for row, route in enumerate(output.routes.tolist()):
        alone = supernet(images[row : row + 1], supernet.subnets[route])[0]
        torch.testing.assert_close(output.logits[row], alone, rtol=1e-5, atol=1e-5)
    costs = [subnet_cost(supernet.spec, subnet, 16) for subnet in supernet.subnets]
    tails = [cost.madds - cost.trunk_madds for cost in costs]
    trunk = costs[0].trunk_madds
    assert output.madds.tolist() == [trunk + sum(tails), trunk + tails[0], trunk + tails[0] + tails[2]]


def test_a_router_that_never_stops_is_an_error() -> None:
    net = DynamicNet(small_supernet(), Scripted(((0, 1),)))
    with pytest.raises(RuntimeError, match=f"Scripted did not stop after {MAX_ROUNDS} rounds"):
        net(random_images(2))


def test_training_mode_is_refused() -> None:
    supernet = small_supernet()
    net = DynamicNet(supernet, spreading_gate(supernet)).train()
    with pytest.raises(RuntimeError, match="evaluation only"):
        net(random_images(1))
    sliced = DynamicNet(supernet, spreading_gate(supernet), cut_weights=False)
    supernet.train()  # the net slices this very supernet
    with pytest.raises(RuntimeError, match="evaluation only"):
        sliced(random_images(1))


def test_cut_weights_are_copies() -> None:
    supernet = small_supernet()
    net = DynamicNet(supernet, spreading_gate(supernet))
    before = net(random_images(4)).logits
    for parameter in supernet.parameters():
        parameter.data.zero_()
    assert torch.equal(net(random_images(4)).logits, before)
