"""What a router learns on a routing table: decisions, what they may choose, what each choice costs
and answers.

The loss is defined in docs/methods.md, section 5.

Every kind of router is the same problem. A decision is a node with a head on some features and a
branch per choice; a branch leads to a route, or to the next gate's node. A gate that decides once
has one node, whose choices are the routes; one gate per stage makes a tree of nodes; a learned
cascade has one node, whose features come from the first route's answer and whose choices are to
stop or to go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsnet.gates.settings import GateSettings
from dsnet.routers.base import Executed
from dsnet.routers.cascade import CASCADE_EVIDENCE, answer_features
from dsnet.routers.gate import RICH_EVIDENCE
from dsnet.routers.kinds import RouterKind
from dsnet.routing.routing_table import RoutingTable

CONSTANT = 1e-6
"""A feature whose spread is a smaller share of its root mean square says nothing."""


@dataclass(frozen=True)
class Scaling:
    """How features are brought to unit size for training; it folds exactly into a head's first
    layer."""

    mean: Tensor
    """[D]; zero for a head without biases."""
    scale: Tensor
    """[D]; inf for a constant feature, of which nothing can be learnt: it shall not count where
    another split has it alive."""

    @classmethod
    def of(cls, features: Tensor, *, is_centred: bool) -> Scaling:
        """From the features [N, D] that train: standard deviations, or root mean squares where the
        head cannot centre."""
        exact = features.double()
        mean = exact.mean(0) if is_centred else torch.zeros(features.shape[1], dtype=torch.float64)
        scale = (exact - mean).square().mean(0).sqrt()
        is_constant = scale <= CONSTANT * exact.square().mean(0).sqrt()
        return cls(mean.float(), torch.where(is_constant, torch.inf, scale).float())

    def apply(self, features: Tensor) -> Tensor:
        """[N, D] -> [N, D]."""
        return (features - self.mean) / self.scale


@dataclass(frozen=True)
class Node:
    """One decision."""

    gate: int
    node: int
    """Its number at the gate."""
    head: int
    """Which head decides; nodes may share one."""
    leaves: tuple[tuple[int, int], ...]
    """(choice, route) of the branches that end."""
    children: tuple[tuple[int, int], ...]
    """(choice, position in the problem's nodes) of those that lead to another decision."""
    num_choices: int


@dataclass(frozen=True)
class Problem:
    """The decisions of one kind of router, the same for all its trials (a learned cascade's depend
    on its first route)."""

    nodes: tuple[Node, ...]
    """Each after the nodes that lead to it; the first is where every image begins."""
    num_heads: int
    is_perceptron: bool
    first: int | None = None
    """The route that a learned cascade has run."""

    def routes_behind(self, node: Node) -> dict[int, list[int]]:
        """choice -> every route that is still possible after it."""
        routes = {choice: [route] for choice, route in node.leaves}
        for choice, child in node.children:
            routes[choice] = [route for behind in self.routes_behind(self.nodes[child]).values() for route in behind]
        return routes


def problem_of(
    table: RoutingTable, kind: RouterKind, first: int | None = None, num_options: int | None = None
) -> Problem:
    """The decisions of a kind of router on a table's tree.

    Args:
        table: any split's.
        kind: of the router.
        first: the route that a learned cascade runs first.
        num_options: of a router that decides once, where its program holds fewer routes than the
            table; their numbers are then places among those. None = all of the table's.
    """
    is_perceptron = kind.head == "perceptron"
    if not kind.is_tree:
        num_leaves = table.num_routes if num_options is None else num_options
        leaves = tuple((place, place) for place in range(num_leaves))
        return Problem((Node(0, 0, 0, leaves, (), num_leaves),), 1, is_perceptron, first)
    nodes: list[Node] = []
    positions = {
        (gate, node): position
        for position, (gate, node) in enumerate(
            (gate, node) for gate, branches in enumerate(table.tree.gates) for node in range(branches.num_nodes)
        )
    }
    for (gate, number), position in positions.items():
        branches = table.tree.gates[gate]
        is_last = gate + 1 == len(table.tree.gates)
        branch = tuple(
            (choice, route if is_last else positions[gate + 1, table.tree.gates[gate + 1].node_of[route]])
            for choice, route in sorted(branches.first_routes(number).items())
        )
        head = position if is_perceptron else gate  # richer evidence has another length at each node
        nodes.append(
            Node(
                gate,
                number,
                head,
                branch if is_last else (),
                () if is_last else branch,
                branches.num_choices,
            )
        )
    return Problem(tuple(nodes), len(nodes) if is_perceptron else len(table.tree.gates), is_perceptron)


def node_features(table: RoutingTable, problem: Problem) -> list[Tensor]:
    """For each node what its head reads of every image, float32 [N, D].

    Raises:
        ValueError: the table keeps too little evidence for this kind of router.
    """
    if problem.first is not None:
        answer = stored_answer(table, problem.first)
        parts = [answer_features(answer, table.num_classes), *(_part(table, name, 0, 0) for name in CASCADE_EVIDENCE)]
        return [torch.cat(parts, dim=1)]
    names = RICH_EVIDENCE if problem.is_perceptron else ("hidden",)
    return [torch.cat([_part(table, name, node.gate, node.node) for name in names], dim=1) for node in problem.nodes]


def _part(table: RoutingTable, name: str, gate: int, node: int) -> Tensor:
    try:
        return torch.from_numpy(table.part(name, gate, node).copy())
    except KeyError:
        raise ValueError(
            f"the routing table holds no {name} at gate {gate}: with {table.num_routes} paths it would be too large; "
            "use gate.router gates, or fewer paths"
        ) from None


def stored_answer(table: RoutingTable, route: int) -> Executed:
    """What a route said to every image, as a cascade sees it."""
    # Copies: arrays in a shared store are read-only, which torch warns of.
    names = ("confidence", "margin", "entropy")
    stored = {name: torch.from_numpy(getattr(table, name)[:, route].copy()) for name in names}
    routes = torch.full((table.num_images,), route, dtype=torch.int64)
    return Executed(routes, torch.from_numpy(table.logits[:, route].copy()), stored)


@dataclass(frozen=True)
class Costs:
    """What ending on each route costs an image, decisions included, and the target in the same
    unit.

    The target is defined in docs/definitions.md, Target.
    """

    madds: NDArray[np.float64]
    """[K] of all routes of the table; those outside the routing space are not read."""
    target: float
    """Clamped into the routing space's range."""
    is_clamped: bool
    widest: float
    """MAdds of the costliest member of the whole set."""


def costs_of(
    table: RoutingTable, settings: GateSettings, routes: Sequence[int], decision: NDArray[np.int64], first: int | None
) -> Costs:
    """Costs and target of a trial.

    Args:
        table: any split's.
        settings: the target.
        routes: the routing space.
        decision: [K] MAdds of all decisions on the way to each route.
        first: the route that a cascade runs first, which all its other routes pay for too.
    """
    madds = table.madds.astype(np.float64) + decision
    if first is not None:
        is_other = np.arange(table.num_routes) != first
        madds += is_other * (table.madds[first] - table.trunk_madds)
    low, high = float(table.madds.min()), float(table.madds.max())
    wanted = settings.wanted_madds(low, high)
    inside = madds[list(routes)]
    target = min(max(wanted, float(inside.min())), float(inside.max()))
    return Costs(madds, target, target != wanted, high)


def routing_space(table: RoutingTable, settings: GateSettings) -> tuple[int, ...]:
    """The trial's routes: as set, or all.

    Raises:
        ValueError: an id that the table does not hold, or not increasing ids.
    """
    routes = settings.routes or tuple(range(table.num_routes))
    if list(routes) != sorted(set(routes)) or not 0 <= routes[0] <= routes[-1] < table.num_routes:
        raise ValueError(
            f"the routing space {routes} (gate.routing) must be increasing ids in 0..{table.num_routes - 1}"
        )
    return routes


def sgs_targets(
    table: RoutingTable, routes: Sequence[int], settings: GateSettings, madds: NDArray[np.float64] | None = None
) -> NDArray[np.int64]:
    """[N] the route that sandwich gate sparsification asks for (precedence easy > hard >
    dependent).

    Smallest and largest are the routing space's cheapest and costliest route; `cheapest` falls back
    to the strategy where no route is right.

    Args:
        table: of the images.
        routes: the routing space.
        settings: strategy, target and thresholds.
        madds: [K] what each route costs; the table's own where not given (a cascade pays for its
            first route too).
    """
    cost = table.madds if madds is None else madds
    columns = np.array(routes)[np.argsort(cost[list(routes)], kind="stable")]
    correct = torch.from_numpy(table.correct1[:, columns])
    probability = torch.from_numpy(np.exp(-table.ce[:, columns[[0, -1]]]))
    return columns[sgs_places(correct, probability, settings).numpy()].astype(np.int64)


def sgs_places(correct: Tensor, probability: Tensor, settings: GateSettings) -> Tensor:
    """int64 [N] which of R routes, from the cheapest to the costliest, SGS asks for (precedence
    easy > hard > dependent).

    Args:
        correct: bool [N, R].
        probability: [N, 2] of the label, by the cheapest and the costliest route.
        settings: strategy, target and thresholds.
    """
    largest = correct.shape[1] - 1
    given_up = largest if settings.strategy == "try_best" else 0
    if settings.sgs_target == "cheapest":
        return torch.where(correct.any(1), correct.int().argmax(1), given_up)
    easy = correct[:, 0] & (probability[:, 0] >= settings.t_easy)
    hard = ~correct[:, -1] | (probability[:, 1] < settings.t_hard)
    return torch.where(easy, 0, torch.where(hard, given_up, largest))


def beam(table: RoutingTable, size: int) -> tuple[int, ...]:
    """The `size` routes that lie nearest below the upper concave envelope of (MAdds, top-1), both
    extremes of MAdds among them; by MAdds.

    Raises:
        ValueError: fewer than 2 routes are asked for.
    """
    if size < 2:
        raise ValueError(f"gate.routing.beam is {size}, but must be at least 2: the cheapest and the widest route stay")
    top1 = table.top1()
    order = np.lexsort((-top1, table.madds))  # of equally dear routes the best first
    cost, top1 = table.madds[order].astype(np.float64), top1[order]
    hull = _hull(cost, top1)
    below = np.interp(cost, cost[hull], top1[hull]) - top1
    below[[hull[0], hull[-1]]] = -1.0
    kept = np.sort(np.argsort(below, kind="stable")[:size])
    return tuple(int(route) for route in order[kept])


def _hull(x: NDArray[np.float64], y: NDArray[np.float64]) -> list[int]:
    """Corners of the upper concave envelope of points by rising x, and falling y where x is
    equal."""
    hull: list[int] = []
    for index in np.unique(x, return_index=True)[1]:
        while len(hull) > 1 and (y[hull[-1]] - y[hull[-2]]) * (x[index] - x[hull[-2]]) <= (y[index] - y[hull[-2]]) * (
            x[hull[-1]] - x[hull[-2]]
        ):
            hull.pop()
        hull.append(int(index))
    return hull
