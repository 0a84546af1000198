"""Grouped dynamic inference against each image alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsnet.deploy.dynamic import DynamicNet
from dsnet.deploy.materialize import materialize, materialize_head, materialize_upto_gate
from dsnet.network.supernet import Supernet
from dsnet.routers.base import STOP, Evidence, Executed, Router
from dsnet.routers.cascade import CascadeRouter
from dsnet.routers.gate import GateRouter
from dsnet.routing.table_routing import run_on_table
from dsnet.space.cost import subnet_cost
from dsnet.space.route_tree import RouteTree
from tests.dsnet.cases import FAMILIES
from tests.dsnet.samples import (
    NORMALIZATION,
    ROUTER_KINDS,
    lively_supernet,
    random_images,
    random_router,
    random_supernet_router,
    small_supernet,
    supernet_table,
    tensor_data,
    three_gate_supernet,
)


@dataclass(frozen=True)
class Scripted:
    """A router that follows a list of routes per round, whatever its input."""

    rounds: tuple[tuple[int, ...], ...]

    kind = "scripted"
    needs = ()
    num_gates = 1
    max_runs = 4
    routes = (0, 1, 2)
    tie = 1e-5

    def decision_madds(self, routes: Tensor) -> Tensor:
        """As many as the route's number."""
        return routes

    def step(self, evidence: Evidence, executed: Sequence[Executed]) -> Tensor:
        """The next line of the script; its last line for ever."""
        return torch.tensor(self.rounds[min(len(executed), len(self.rounds) - 1)])

    def margin(self, evidence: Evidence, executed: Sequence[Executed]) -> Tensor:
        """No choice."""
        return evidence.same(1) * torch.inf

    def over(self, position: Mapping[int, int]) -> Scripted:
        """Scripts are not renumbered."""
        return self

    def to_arrays(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Scripts are not stored."""
        return {}, {}


def spreading_gate(supernet: Supernet, num_images: int = 64) -> GateRouter:
    """A random gate, its offsets set so that every route is taken by some image."""
    hidden = supernet.trunk(random_images(num_images), supernet.subnets[0]).hidden.double()
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn((len(supernet.subnets), hidden.shape[1]), generator=generator, dtype=torch.float64)
    return GateRouter(weight, (hidden @ weight.T).mean(0).detach(), tuple(range(len(supernet.subnets))))


def evidence_of(supernet: Supernet, images: Tensor, router: Router) -> Evidence:
    """The evidence at the first gate."""
    trunk = supernet.trunk(images, supernet.subnets[0])
    return Evidence({part: trunk.evidence(part) for part in router.needs}, len(images))


def decision_cost(router: GateRouter) -> int:
    """MAdds of a decision: those of its head."""
    return router.weight.numel()


@pytest.mark.slow
@pytest.mark.parametrize(("is_whole", "cut_weights"), [(True, True), (False, False), (False, True)])
@pytest.mark.parametrize("kind", ROUTER_KINDS)
@pytest.mark.parametrize("make", [lively_supernet, three_gate_supernet])
@torch.no_grad()
def test_every_router_runs_what_it_chooses_on_the_routing_table(
    kind: str, make: Callable[[], Supernet], is_whole: bool, cut_weights: bool
) -> None:
    supernet = make()
    table = supernet_table(supernet, 24)
    router = random_router(kind, table, routes=None if is_whole else range(1, table.num_routes))
    expected = run_on_table(router, table)
    images = NORMALIZATION.apply(tensor_data(24).images("val"))
    net = DynamicNet(supernet, router, cut_weights=cut_weights)
    decided = ~expected.is_tie
    assert decided.any()
    assert len(set(expected.routes.tolist())) > 1
    for start, stop in ((0, 24), (3, 8), (5, 6)):
        output = net(images[start:stop])
        for row, image in enumerate(range(start, stop)):
            route = int(output.routes[row])
            alone = supernet(images[image : image + 1], supernet.subnets[route])[0]
            torch.testing.assert_close(output.logits[row], alone, rtol=1e-5, atol=1e-5)
            if decided[image]:
                assert (route, int(output.madds[row])) == (expected.routes[image], expected.madds[image])


def test_cut_segments_take_the_memory_of_the_tree() -> None:
    supernet = three_gate_supernet(paths="all")
    router = random_supernet_router("gates", supernet)
    tree, members = RouteTree.of(supernet.subnets), supernet.subnets
    expected = 0
    for gate, branches in enumerate(tree.gates):
        expected += sum(
            num_bytes(materialize_upto_gate(supernet, gate, members[branches.routes_at(node)[0]], fold_bn=True))
            for node in range(branches.num_nodes)
        )
    expected += sum(num_bytes(materialize_head(supernet, subnet, fold_bn=True)) for subnet in members)
    net = DynamicNet(supernet, router)
    assert net.memory_bytes == expected
    assert net.memory_bytes < sum(num_bytes(materialize(supernet, subnet, fold_bn=True)) for subnet in members)
    assert net.with_router(random_supernet_router("cascade", supernet)).memory_bytes == expected
    sliced = DynamicNet(supernet, router, cut_weights=False)
    assert sliced.memory_bytes == num_bytes(supernet) < net.memory_bytes


def num_bytes(module: nn.Module) -> int:
    return sum(value.nbytes for value in module.state_dict().values())


@pytest.mark.slow
@pytest.mark.parametrize(("cut_weights", "fold_bn"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_grouped_equals_each_image_alone(family: str, cut_weights: bool, fold_bn: bool) -> None:
    supernet = small_supernet(family)
    router = spreading_gate(supernet)
    net = DynamicNet(supernet, router, cut_weights=cut_weights, fold_bn=fold_bn)
    for batch_size in (64, 7, 1):
        images = random_images(64)[:batch_size]
        output = net(images)
        routes = router.step(evidence_of(supernet, images, router), ())
        assert output.routes.tolist() == routes.tolist()
        for row in range(batch_size):
            subnet = supernet.subnets[int(routes[row])]
            alone = supernet(images[row : row + 1], subnet)[0]
            torch.testing.assert_close(output.logits[row], alone, rtol=1e-5, atol=1e-5)
            cost = subnet_cost(supernet.spec, subnet, 16).madds + decision_cost(router)
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
    router = CascadeRouter(0, 2, float(confidence.sort().values[11:13].mean()))  # no image is on the threshold
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
        subnet_cost(supernet.spec, supernet.subnets[route], 23).madds + decision_cost(router)
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
    decisions = [2, 0, 2]  # those of the last route
    executed = [sum(tails), tails[0], tails[0] + tails[2]]
    assert output.madds.tolist() == [
        trunk + cost + decision for cost, decision in zip(executed, decisions, strict=True)
    ]


def test_a_router_is_not_asked_again_after_as_many_routes_as_it_runs_at_most() -> None:
    supernet = small_supernet()
    output = DynamicNet(supernet, Scripted(((0, 1), (1, 2), (2, 0), (1, 1), (0, 0))))(random_images(2))
    costs = [subnet_cost(supernet.spec, subnet, 16) for subnet in supernet.subnets]
    tails = [cost.madds - cost.trunk_madds for cost in costs]
    assert output.routes.tolist() == [1, 1]
    runs = [tails[0] + 2 * tails[1] + tails[2], 2 * tails[1] + tails[2] + tails[0]]
    assert output.madds.tolist() == [costs[0].trunk_madds + run + 1 for run in runs]


def test_a_router_that_stops_before_any_route_ran_is_an_error() -> None:
    net = DynamicNet(small_supernet(), Scripted(((0, STOP),)))
    with pytest.raises(RuntimeError, match="Scripted stops before any route has run"):
        net(random_images(2))


def test_training_mode_is_refused() -> None:
    supernet = small_supernet()
    net = DynamicNet(supernet, spreading_gate(supernet)).train()
    with pytest.raises(RuntimeError, match="evaluation only"):
        net(random_images(1))
    sliced = DynamicNet(supernet, spreading_gate(supernet), cut_weights=False)
    supernet.train()  # the net uses slices of this supernet
    with pytest.raises(RuntimeError, match="evaluation only"):
        sliced(random_images(1))


def test_cut_weights_are_copies() -> None:
    supernet = small_supernet()
    net = DynamicNet(supernet, spreading_gate(supernet))
    before = net(random_images(4)).logits
    for parameter in supernet.parameters():
        parameter.data.zero_()
    assert torch.equal(net(random_images(4)).logits, before)
