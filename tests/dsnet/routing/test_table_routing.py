"""Routing on a table, against the path and cost of each image alone and against the network
itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsnet.deploy.dynamic import DynamicNet
from dsnet.network.supernet import Supernet
from dsnet.routers.base import STOP, Evidence, Executed
from dsnet.routers.cascade import CascadeRouter
from dsnet.routing.routing_table import RoutingTable
from dsnet.routing.table_routing import run_on_table
from dsnet.space.cost import subnet_cost
from tests.dsnet.samples import (
    NORMALIZATION,
    ROUTER_KINDS,
    lively_supernet,
    random_router,
    random_table,
    stored_answers,
    supernet_table,
    table_evidence,
    tensor_data,
    three_gate_supernet,
)

NUM_IMAGES = 30
each_kind = pytest.mark.parametrize("kind", ROUTER_KINDS)


@lru_cache
def network(name: str) -> Supernet:
    return three_gate_supernet() if name == "three gates" else lively_supernet(name)


@lru_cache
def table_of(name: str) -> RoutingTable:
    return supernet_table(network(name), NUM_IMAGES)


@lru_cache
def cut_network(name: str, fold_bn: bool) -> DynamicNet:
    return DynamicNet(network(name), random_router("cascade", table_of(name)), fold_bn=fold_bn)


def images() -> Tensor:
    return NORMALIZATION.apply(tensor_data(NUM_IMAGES).images("val"))


# The second spaces leave nodes out, so that the router's nodes have other numbers than the
# network's.
SPACES = (
    ("ds_tiny", None),
    ("ds_mbnet", (1, 3)),
    ("three gates", None),
    ("three gates", (1, 4, 5, 7)),
)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "space"), SPACES)
@each_kind
def test_it_equals_the_network_image_by_image(kind: str, name: str, space: tuple[int, ...] | None) -> None:
    table, supernet = table_of(name), network(name)
    router = random_router(kind, table, routes=space)
    run = run_on_table(router, table)
    assert len(set(run.routes.tolist())) > 1
    assert run.is_tie.sum() <= 2
    nets = [cut_network(name, fold_bn).with_router(router) for fold_bn in (True, False)]
    nets.append(DynamicNet(supernet, router, cut_weights=False))
    for net in nets:
        for batch_size in (7, NUM_IMAGES) if net is not nets[0] else (1, 7, NUM_IMAGES):
            outputs = [net(batch) for batch in images().split(batch_size)]
            decided = ~run.is_tie
            routes = torch.cat([output.routes for output in outputs]).numpy()
            madds = torch.cat([output.madds for output in outputs]).numpy()
            logits = torch.cat([output.logits for output in outputs]).numpy()
            np.testing.assert_array_equal(routes[decided], run.routes[decided])
            np.testing.assert_array_equal(madds[decided], run.madds[decided])
            stored = table.logits[np.arange(NUM_IMAGES), run.routes]
            np.testing.assert_allclose(logits[decided], stored[decided], rtol=2e-3, atol=2e-3)


def test_a_learned_cascade_reads_the_same_of_many_classes() -> None:
    """With many classes the table keeps the 32 largest logits only."""
    supernet = lively_supernet(num_classes=120)
    table = supernet_table(supernet, NUM_IMAGES)
    router = random_router("learned_cascade", table)
    run = run_on_table(router, table)
    assert len(set(run.routes.tolist())) > 1
    output = DynamicNet(supernet, router)(NORMALIZATION.apply(tensor_data(NUM_IMAGES, num_classes=120).images("val")))
    decided = ~run.is_tie
    assert decided.sum() >= NUM_IMAGES - 1
    np.testing.assert_array_equal(output.routes.numpy()[decided], run.routes[decided])
    np.testing.assert_array_equal(output.madds.numpy()[decided], run.madds[decided])


@pytest.mark.parametrize("name", ["ds_mbnet", "three gates"])
@each_kind
def test_an_image_pays_the_trunk_once_and_every_tail_and_decision(kind: str, name: str) -> None:
    table, supernet = table_of(name), network(name)
    router = random_router(kind, table)
    run = run_on_table(router, table)
    costs = [subnet_cost(supernet.spec, subnet, 16) for subnet in supernet.subnets]
    for image in range(NUM_IMAGES):
        ran = np.flatnonzero(run.ran[image]).tolist()
        tails = sum(costs[route].madds - costs[route].trunk_madds for route in ran)
        decisions = int(router.decision_madds(torch.tensor([run.routes[image]])))
        assert run.madds[image] == costs[0].trunk_madds + tails + decisions
        assert run.routes[image] in ran
        assert len(ran) <= (2 if "cascade" in kind else 1)


@pytest.mark.parametrize("num_gates", [1, 3])
@each_kind
def test_each_image_is_routed_on_its_own(kind: str, num_gates: int) -> None:
    table = random_table(40, 8, num_gates=num_gates)
    router = random_router(kind, table)
    run = run_on_table(router, table)
    for image in range(40):
        route = int(router.step(table_evidence(router, table, [image]), ()))
        for gate in range(1, router.num_gates):
            node = table.tree.gates[gate].node_of[route]
            route = int(router.step(table_evidence(router, table, [image], gate, route, node), ()))
        answer = stored_answers(table, torch.tensor([route]), [image])
        following = int(router.step(table_evidence(router, table, [image]), [answer]))
        ran = [route] if following == STOP else [route, following]
        assert np.flatnonzero(run.ran[image]).tolist() == sorted(ran)
        assert run.routes[image] == ran[-1]


def test_a_cascade_on_a_table_equals_its_columns() -> None:
    table = random_table(200)
    run = run_on_table(CascadeRouter(0, 2, 0.6), table)
    goes_on = table.confidence[:, 0] < 0.6
    assert 0 < goes_on.sum() < 200
    np.testing.assert_array_equal(run.routes, np.where(goes_on, 2, 0))
    np.testing.assert_array_equal(run.madds, table.madds[0] + goes_on * (table.madds[2] - 500))
    np.testing.assert_allclose(
        run.lead * CascadeRouter.tie, np.abs(table.confidence[:, 0].astype(float) - 0.6), rtol=1e-6
    )
    np.testing.assert_allclose(run.histogram, [1 - goes_on.mean(), 0, goes_on.mean(), 0])
    np.testing.assert_allclose(run.runs, [1, 0, goes_on.mean(), 0])


def test_a_confidence_at_the_threshold_is_a_tie() -> None:
    table = random_table(50)
    run = run_on_table(CascadeRouter(0, 2, float(table.confidence[7, 0]) + 1e-8), table)
    assert run.is_tie[7]
    assert run.is_tie.sum() == 1
    assert run.routes[7] == 2


@each_kind
def test_shares_are_of_the_routes_that_ran(kind: str) -> None:
    table = random_table(60)
    run = run_on_table(random_router(kind, table), table)
    assert run.histogram.sum() == pytest.approx(1.0)
    assert run.histogram.tolist() == [float((run.routes == route).mean()) for route in range(4)]
    np.testing.assert_allclose(run.runs, run.ran.mean(0))
    assert (run.runs >= run.histogram).all()


def test_a_tie_at_a_later_gate_is_a_tie() -> None:
    table = random_table(40, 8, num_gates=3)
    router = random_router("gates", table)
    leads = run_on_table(router, table).lead
    for image in range(40):
        route, smallest = -1, np.inf
        for gate in range(3):
            node = table.tree.gates[gate].node_of[route] if gate else 0
            evidence = table_evidence(router, table, [image], gate, route, node)
            smallest = min(smallest, float(router.margin(evidence, ())))
            route = int(router.step(evidence, ()))
        assert leads[image] == pytest.approx(smallest / router.tie)


@dataclass(frozen=True)
class Stubborn:
    """A router that always gives the same answer."""

    says: int

    kind = "stubborn"
    needs = ()
    num_gates = 1
    max_runs = 3
    routes = (0,)
    tie = 1e-5

    def decision_madds(self, routes: Tensor) -> Tensor:
        """None."""
        return torch.zeros_like(routes)

    def step(self, evidence: Evidence, executed: Sequence[Executed]) -> Tensor:
        """The same."""
        return evidence.same(self.says)

    def margin(self, evidence: Evidence, executed: Sequence[Executed]) -> Tensor:
        """No choice."""
        return evidence.no_choice

    def over(self, position: Mapping[int, int]) -> Stubborn:
        """The same router over another id."""
        return Stubborn(position[self.says])

    def to_arrays(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Not stored."""
        return {}, {}


class Restless(Stubborn):
    """Stops every second image after its first route, and the rest after the second; it does not
    remember which images it has stopped."""

    routes = (0, 1, 2)

    def step(self, evidence: Evidence, executed: Sequence[Executed]) -> Tensor:
        """Routes 0, 1 and (for images that have stopped long ago) 2."""
        even = torch.arange(evidence.num_images) % 2 == 0
        answers = (evidence.same(0), torch.where(even, STOP, 1), torch.where(even, 2, STOP), evidence.same(STOP))
        return answers[len(executed)]

    def margin(self, evidence: Evidence, executed: Sequence[Executed]) -> Tensor:
        """A tie, but only in the third round, and for the images that have stopped by then."""
        even = torch.arange(evidence.num_images) % 2 == 0
        return torch.where(even & (len(executed) == 2), 0.0, evidence.no_choice)


def test_an_image_that_has_stopped_is_not_asked_again() -> None:
    run = run_on_table(Restless(0), random_table(10))
    assert run.routes.tolist() == [0, 1] * 5
    assert not run.ran[:, 2].any()
    assert not run.is_tie.any()


def test_a_router_that_never_begins_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="stops before any route has run"):
        run_on_table(Stubborn(STOP), random_table())


def test_a_router_that_never_stops_runs_as_often_as_it_may() -> None:
    class Counting(Stubborn):
        """Counts how often it is asked."""

        asked = 0

        def step(self, evidence: Evidence, executed: Sequence[Executed]) -> Tensor:
            """The same again."""
            Counting.asked += 1
            return super().step(evidence, executed)

    assert set(run_on_table(Counting(0), random_table()).routes.tolist()) == {0}
    assert Counting.asked == Stubborn.max_runs
