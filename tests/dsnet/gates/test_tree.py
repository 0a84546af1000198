"""One gate per stage at a price: routes, costs and softmax against path by path enumeration, and
the deployed router."""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dsnet.deploy.dynamic import DynamicNet
from dsnet.families import create
from dsnet.gates.fit import fit_gate
from dsnet.gates.problem import node_features, problem_of
from dsnet.gates.settings import GateSettings
from dsnet.gates.tree import PricedTree
from dsnet.measure.evaluate import build_routing_table
from dsnet.routers.head import Head
from dsnet.routers.kinds import router_kind
from dsnet.routers.tree import GatesRouter
from dsnet.routing.table_routing import run_on_table
from tests.dsnet.samples import NORMALIZATION, random_head, random_table, task, tensor_data

SPACES = (tuple(range(8)), (0, 1, 6), (3,), (1, 2, 4, 7))


class Case:
    """Random heads of a kind on a table of three gates."""

    def __init__(self, kind: str, routes: tuple[int, ...], seed: int = 0) -> None:
        self.table = random_table(50, 8, seed=seed, num_gates=3)
        self.routes = routes
        self.problem = problem_of(self.table, router_kind(kind))
        features = node_features(self.table, self.problem)
        generator = torch.Generator().manual_seed(seed)
        units = 4 if kind == "evidence_gates" else None
        sizes = {node.head: own.shape[1] for node, own in zip(self.problem.nodes, features, strict=True)}
        self.heads = [random_head(generator, sizes[head], 2, units) for head in range(self.problem.num_heads)]
        self.madds = self.table.madds.astype(np.float64) + 40.0
        self.logits = [
            self.heads[node.head](own).numpy() for node, own in zip(self.problem.nodes, features, strict=True)
        ]

    @cached_property
    def priced(self) -> PricedTree:
        return PricedTree(self.problem, self.routes, self.madds, self.logits)

    def scores(self, beta: float) -> dict[tuple[int, int], NDArray[np.float64]]:
        """(gate, node) -> [N, 2] calibrated scores, -inf where no route of the space is behind."""
        result = {}
        for node, logits in zip(self.problem.nodes, self.logits, strict=True):
            gate = self.table.tree.gates[node.gate]
            own = np.full_like(logits, -np.inf)
            for choice in range(2):
                behind = [r for r in self.routes if (gate.node_of[r], gate.choice_of[r]) == (node.node, choice)]
                if behind:
                    price = self.madds[behind].mean() / self.madds[list(self.routes)].max()
                    own[:, choice] = logits[:, choice] - beta * price
            result[node.gate, node.node] = own
        return result


@pytest.mark.parametrize("kind", ["gates", "evidence_gates"])
@pytest.mark.parametrize("routes", SPACES)
@pytest.mark.parametrize("beta", [-3.0, 0.0, 0.7])
def test_every_image_follows_its_best_branches(kind: str, routes: tuple[int, ...], beta: float) -> None:
    case = Case(kind, routes)
    scores = case.scores(beta)
    met = case.priced.routes_at(beta)
    for image, taken in enumerate(met):
        assert taken in routes
        for number, gate in enumerate(case.table.tree.gates):
            own = scores[number, gate.node_of[taken]][image]
            assert gate.choice_of[taken] == int(np.argmax(own))
    assert case.priced.mean_cost(beta) == pytest.approx(case.madds[met].mean())


@pytest.mark.parametrize("kind", ["gates", "evidence_gates"])
@pytest.mark.parametrize("routes", SPACES)
def test_the_deployed_router_takes_the_same_routes_and_counts_every_head(kind: str, routes: tuple[int, ...]) -> None:
    case = Case(kind, routes)
    router = case.priced.router(0.4, case.table, case.heads)
    assert isinstance(router, GatesRouter)
    assert router.kind == kind
    run = run_on_table(router, case.table)
    np.testing.assert_array_equal(run.routes, case.priced.routes_at(0.4))
    for route in routes:
        expected = 0
        for gate, branches in enumerate(case.table.tree.gates):
            node = branches.node_of[route]
            position = next(i for i, own in enumerate(case.problem.nodes) if (own.gate, own.node) == (gate, node))
            expected += case.heads[case.problem.nodes[position].head].madds
            expected += 2 * case.table.gates[gate].pooling_madds[node] if kind == "evidence_gates" else 0
        assert int(router.decision_madds(torch.tensor([route]))[0]) == expected


@pytest.mark.parametrize("routes", SPACES)
def test_the_softmax_is_the_product_along_each_path(routes: tuple[int, ...]) -> None:
    case = Case("gates", routes)
    scores = case.scores(0.3)
    met = case.priced.softmax(0.3, temperature=0.6)
    np.testing.assert_allclose(met.sum(1), 1.0)
    for column, route in enumerate(routes):
        p = np.ones(case.table.num_images)
        for number, gate in enumerate(case.table.tree.gates):
            own = torch.from_numpy(scores[number, gate.node_of[route]] / 0.6).softmax(1).numpy()
            p *= own[:, gate.choice_of[route]]
        np.testing.assert_allclose(met[:, column], p)


@pytest.mark.parametrize("routes", SPACES)
def test_beyond_the_bound_price_alone_decides(routes: tuple[int, ...]) -> None:
    case = Case("gates", routes)
    case.logits[0] *= 50.0
    for sign in (-1.0, 1.0):
        assert len(set(case.priced.routes_at(sign * case.priced.bound).tolist())) == 1
    cheap, dear = (case.madds[case.priced.routes_at(sign * case.priced.bound)[0]] for sign in (1.0, -1.0))
    assert cheap <= dear
    if routes == SPACES[0]:
        assert (cheap, dear) == (case.madds.min(), case.madds.max())


def test_with_one_gate_the_mean_cost_falls_with_the_price() -> None:
    table = random_table(50, 5)
    problem = problem_of(table, router_kind("gates"))
    (features,) = node_features(table, problem)
    logits = Head(torch.randn((5, 6), generator=torch.Generator().manual_seed(0), dtype=torch.float64))(features)
    priced = PricedTree(problem, tuple(range(5)), table.madds.astype(np.float64), [logits.numpy()])
    means = [priced.mean_cost(beta) for beta in np.linspace(-9, 9, 60)]
    assert all(after <= before for before, after in pairwise(means))
    assert means[0] > means[-1]


@pytest.mark.slow
def test_256_paths_through_four_gates_train_on_the_table_and_run_as_it_says() -> None:
    options = {"depth": 18, "width": 0.25, "ratios": [0.25, 0.5, 0.75, 1.0], "paths": "all"}
    supernet = create("ds_resnet", task(), options, seed=0).eval()
    data = tensor_data(24)
    table = build_routing_table(supernet, data, "val", NORMALIZATION)
    assert [gate.num_nodes for gate in table.tree.gates] == [1, 4, 16, 64]
    fit = fit_gate(table, table, GateSettings(router="gates", steps=20))
    output = DynamicNet(supernet, fit.router)(NORMALIZATION.apply(data.images("val")))
    same = output.routes.numpy() == fit.run.routes
    assert (same | fit.run.is_tie).all()
    assert (output.madds.numpy()[same] == fit.run.madds[same]).all()
    assert abs(fit.metrics["madds_m"] - fit.metrics["target_madds_m"]) < 0.05 * fit.metrics["target_madds_m"]
