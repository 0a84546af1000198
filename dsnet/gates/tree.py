"""Calibration and deployment of routers with one gate per stage: decisions at every gate for any
price of compute (beta)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float64, Int64
from numpy.typing import NDArray

from dsnet.gates.problem import Node, Problem
from dsnet.routers.gate import RICH_EVIDENCE
from dsnet.routers.head import Head
from dsnet.routers.tree import GatesRouter
from dsnet.routing.routing_table import RoutingTable

NUM_EXTRA_POOLINGS = 2
"""Number of poolings that richer evidence needs beside the mean, which the attention computes:
deviation and maximum."""
Floats = NDArray[np.float64]


class PricedTree:
    """A tree of gates on the images of one split: each node decides by argmax_c(l_c - beta *
    price_c).

    The price of a branch is the mean cost of the routes behind it, relative to the costliest route,
    because later gates decide which of them is taken.
    """

    def __init__(
        self,
        problem: Problem,
        routes: Sequence[int],
        madds: Float64[np.ndarray, " routes"],
        logits: Sequence[Float64[np.ndarray, "images _choices"]],
    ) -> None:
        """Compute the prices of all branches.

        Args:
            problem: the tree of decisions.
            routes: the routing space.
            madds: [K] MAdds of every route, decisions included.
            logits: for each node [N, choices].
        """
        self._problem = problem
        self._routes = tuple(routes)
        self._madds = madds
        self._logits = logits
        self._prices = [self._branch_prices(node) for node in problem.nodes]

    def _branch_prices(self, node: Node) -> Floats:
        """Prices of a node's branches, [choices]; inf for a choice that the node does not have or
        that leads out of the routing space."""
        relative = self._madds / self._madds[list(self._routes)].max()
        prices = np.full(node.num_choices, np.inf)
        for choice, behind in self._problem.routes_behind(node).items():
            inside = [route for route in behind if route in self._routes]
            if inside:
                prices[choice] = relative[inside].mean()
        return prices

    @cached_property
    def bound(self) -> float:
        """A beta beyond which the prices alone decide at every node."""
        spread = max(float(np.ptp(own)) for own in self._logits) + 1.0
        gaps = [np.diff(np.unique(own[np.isfinite(own)])).min(initial=1.0) for own in self._prices]
        return 2.0 * spread / float(min(gaps))

    def _offsets(self, position: int, beta: float) -> Floats:
        """Offsets [choices], subtracted from a node's logits; inf for a choice without a branch."""
        prices = self._prices[position]
        has_branch = np.isfinite(prices)
        return np.where(has_branch, beta * np.where(has_branch, prices, 0.0), np.inf)

    def routes_at(self, beta: float) -> Int64[np.ndarray, " images"]:
        """The route of each image, [N]."""
        place = np.zeros(len(self._logits[0]), dtype=np.int64)
        taken = np.full(len(place), -1, dtype=np.int64)
        for position, node in enumerate(self._problem.nodes):
            here = np.flatnonzero(place == position)
            if len(here) == 0:
                continue
            choices = (self._logits[position][here] - self._offsets(position, beta)).argmax(1)
            target = np.full(node.num_choices, -1, dtype=np.int64)
            for choice, end in (*node.children, *node.leaves):
                target[choice] = end
            ends = place if node.children else taken
            ends[here] = target[choices]
            if node.leaves:
                place[here] = -1
        return taken

    def mean_cost(self, beta: float) -> float:
        """Mean MAdds of the images, decisions included."""
        return float(self._madds[self.routes_at(beta)].mean())

    def softmax(self, beta: float, temperature: float) -> Float64[np.ndarray, "images routes"]:
        """Probability of each route of the routing space, [N, R], if every gate drew from its
        softmax."""
        reach = {0: np.ones(len(self._logits[0]))}
        ends: dict[int, Floats] = {}
        for position, node in enumerate(self._problem.nodes):
            if not np.isfinite(self._prices[position]).any():
                continue
            scores = (self._logits[position] - self._offsets(position, beta)) / temperature
            q = torch.from_numpy(scores).softmax(1).numpy() * reach[position][:, None]
            reach |= {child: q[:, choice] for choice, child in node.children}
            ends |= {route: q[:, choice] for choice, route in node.leaves}
        return np.column_stack([ends[route] for route in self._routes])

    def router(self, beta: float, table: RoutingTable, heads: Sequence[Head]) -> GatesRouter:
        """The router to deploy: heads and offsets at every node that the routing space reaches.

        Args:
            beta: price of compute.
            table: routing table of any split, for the tree and the cost of pooling.
            heads: heads of the problem, in order.
        """
        tree = table.tree.subset(self._routes)
        position_of = {(node.gate, node.node): position for position, node in enumerate(self._problem.nodes)}
        positions = [
            [
                position_of[gate, table.tree.gates[gate].node_of[self._routes[branches.node_of.index(node)]]]
                for node in range(branches.num_nodes)
            ]
            for gate, branches in enumerate(tree.gates)
        ]
        nodes = self._problem.nodes
        pooling: tuple[tuple[int, ...], ...] = ()
        if self._problem.is_perceptron:
            pooling = tuple(
                tuple(NUM_EXTRA_POOLINGS * table.gates[gate].pooling_madds[nodes[position].node] for position in row)
                for gate, row in enumerate(positions)
            )
        return GatesRouter(
            tree=tree,
            routes=self._routes,
            heads=tuple(tuple(heads[nodes[position].head] for position in row) for row in positions),
            offsets=tuple(
                tuple(torch.from_numpy(self._offsets(position, beta)) for position in row) for row in positions
            ),
            needs=RICH_EVIDENCE if self._problem.is_perceptron else ("hidden",),
            pooling_madds=pooling,
        )
