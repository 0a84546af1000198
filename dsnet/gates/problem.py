"""The learning problem of a router on a routing table: its decisions, their choices, and the cost
and targets of each route.

The loss is defined in docs/methods.md, section 5.

All kinds of router have a problem of the same form. A decision is a node with a head on some
features and a branch per choice; a branch leads to a route, or to a node of the next gate. A gate
that decides once has one node, whose choices are the routes; one gate per stage makes a tree of
nodes; a learned cascade has one node, whose features come from the first route's answer and whose
choices are to stop or to run a wider route.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from numpy.typing import NDArray
from torch import Tensor

from dsnet.gates.settings import GateSettings
from dsnet.routers.base import Executed
from dsnet.routers.cascade import CASCADE_EVIDENCE, answer_features
from dsnet.routers.gate import RICH_EVIDENCE
from dsnet.routers.kinds import RouterKind
from dsnet.routing.routing_table import RoutingTable

CONSTANT = 1e-6
"""A feature is constant if its standard deviation is at most this share of its root mean square."""


@dataclass(frozen=True)
class Scaling:
    """Scaling of features to unit size for training; it can be folded exactly into a head's first
    layer."""

    mean: Float[Tensor, " features"]
    """[D]; zero for a head without biases."""
    scale: Float[Tensor, " features"]
    """[D]; inf for a feature that is constant in training, so that it is ignored even where it
    varies on another split."""

    @classmethod
    def of(cls, features: Float[Tensor, "images features"], *, is_centred: bool) -> Scaling:
        """Measure the scaling on training features [N, D]: the standard deviation, or the root mean
        square for a head that cannot centre."""
        exact = features.double()
        mean = exact.mean(0) if is_centred else torch.zeros(features.shape[1], dtype=torch.float64)
        scale = (exact - mean).square().mean(0).sqrt()
        is_constant = scale <= CONSTANT * exact.square().mean(0).sqrt()
        return cls(mean.float(), torch.where(is_constant, torch.inf, scale).float())

    def apply(self, features: Float[Tensor, "images features"]) -> Float[Tensor, "images features"]:
        """Scale features, [N, D] -> [N, D]."""
        return (features - self.mean) / self.scale


@dataclass(frozen=True)
class Node:
    """One decision of a router."""

    gate: int
    node: int
    """Number of the node at its gate."""
    head: int
    """Index of the head that decides; nodes may share one."""
    leaves: tuple[tuple[int, int], ...]
    """(choice, route) of the branches that end on a route."""
    children: tuple[tuple[int, int], ...]
    """(choice, position in the problem's nodes) of the branches that lead to another decision."""
    num_choices: int


@dataclass(frozen=True)
class Problem:
    """The decisions of one kind of router, the same for all its trials (those of a learned cascade
    depend on its first route)."""

    nodes: tuple[Node, ...]
    """The nodes, each after the nodes that lead to it; every image starts at the first."""
    num_heads: int
    is_perceptron: bool
    first: int | None = None
    """The route that a cascade runs first; None for other kinds."""

    def routes_behind(self, node: Node) -> dict[int, list[int]]:
        """Each choice of a node, with all routes that are still possible after it."""
        routes = {choice: [route] for choice, route in node.leaves}
        for choice, child in node.children:
            routes[choice] = [route for behind in self.routes_behind(self.nodes[child]).values() for route in behind]
        return routes


def problem_of(
    table: RoutingTable, kind: RouterKind, first: int | None = None, num_options: int | None = None
) -> Problem:
    """The decisions of a kind of router on a table's tree.

    Args:
        table: routing table of any split.
        kind: the kind of router.
        first: the route that a cascade runs first; None for other kinds.
        num_options: for a router that decides once, the number of routes that its program holds if
            these are fewer than the table's; routes are then numbered among these. None = all
            routes of the table.
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
        head = position if is_perceptron else gate  # the length of richer evidence differs between nodes
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


def node_features(table: RoutingTable, problem: Problem) -> list[Float32[Tensor, "images _features"]]:
    """For each node the input features of its head for every image, float32 [N, D].

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
            "use gate.router gates, or fewer supernet.options.paths"
        ) from None


def stored_answer(table: RoutingTable, route: int) -> Executed:
    """The stored answers of a route to every image, in the form that a cascade reads."""
    # Copied, because arrays in a shared store are read-only, of which torch would warn.
    names = ("confidence", "margin", "entropy")
    stored = {name: torch.from_numpy(getattr(table, name)[:, route].copy()) for name in names}
    routes = torch.full((table.num_images,), route, dtype=torch.int64)
    return Executed(routes, torch.from_numpy(table.logits[:, route].copy()), stored)


@dataclass(frozen=True)
class Costs:
    """Costs of an image that ends on each route, decisions included, and the target, all in MAdds.

    The target is defined in docs/definitions.md, Target.
    """

    madds: Float64[np.ndarray, " routes"]
    """[K]: costs of all routes of the table; those outside the routing space are not used."""
    target: float
    """Target MAdds, clamped into the range of the routing space."""
    is_clamped: bool
    """Whether clamping has changed the target."""
    widest: float
    """MAdds of the costliest member of the whole set."""


def costs_of(
    table: RoutingTable,
    settings: GateSettings,
    routes: Sequence[int],
    decision: Int64[np.ndarray, " routes"],
    first: int | None,
) -> Costs:
    """Costs and target of a trial.

    Args:
        table: routing table of any split.
        settings: settings with the target.
        routes: the routing space.
        decision: [K] MAdds of all decisions on the way to each route.
        first: the route that a cascade runs first; its cost beyond the trunk is added to that of
            all other routes. None for other kinds.
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


def check_choice(names: Sequence[str]) -> None:
    """Check that a network has several routes, so that a router can choose between them.

    A routing space may have one route of several: such a router is a static network with a head.

    Args:
        names: names of all routes of the network.

    Raises:
        ValueError: there is only one.
    """
    if len(names) == 1:
        raise ValueError(
            f"{names[0]} is the only sub-network: a router has nothing to choose; "
            "give the network at least one more (supernet.options)"
        )


def routing_space(table: RoutingTable, settings: GateSettings) -> tuple[int, ...]:
    """The routes of a trial: those in the settings, or all.

    Raises:
        ValueError: the ids do not increase, the table does not hold one of them, or it has a
            single route.
    """
    check_choice(table.routes)
    routes = settings.routes or tuple(range(table.num_routes))
    if list(routes) != sorted(set(routes)) or not 0 <= routes[0] <= routes[-1] < table.num_routes:
        raise ValueError(
            f"the routing space {routes} (gate.routing) must be increasing ids in 0..{table.num_routes - 1}"
        )
    return routes


def sgs_targets(
    table: RoutingTable,
    routes: Sequence[int],
    settings: GateSettings,
    madds: Float64[np.ndarray, " routes"] | None = None,
) -> Int64[np.ndarray, " images"]:
    """Target routes [N] of sandwich gate sparsification (precedence easy > hard > dependent).

    The smallest and largest route are the cheapest and the costliest of the routing space;
    `cheapest` falls back to the strategy where no route is right.

    Args:
        table: routing table of the images.
        routes: the routing space.
        settings: strategy, target and thresholds.
        madds: [K] cost of each route, needed for cascades, whose routes include the cost of the
            first one; None = the MAdds of the table.
    """
    cost = table.madds if madds is None else madds
    columns = np.array(routes)[np.argsort(cost[list(routes)], kind="stable")]
    correct = torch.from_numpy(table.correct1[:, columns])
    probability = torch.from_numpy(np.exp(-table.ce[:, columns[[0, -1]]]))
    return columns[sgs_places(correct, probability, settings).numpy()].astype(np.int64)


def sgs_places(
    correct: Bool[Tensor, "images routes"], probability: Float[Tensor, "images 2"], settings: GateSettings
) -> Int64[Tensor, " images"]:
    """SGS targets as positions, int64 [N], among R routes ordered from the cheapest to the
    costliest (precedence easy > hard > dependent).

    Args:
        correct: bool [N, R], whether each route is right.
        probability: [N, 2] probability of the label by the cheapest and by the costliest route.
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
    """The `size` routes nearest to the upper concave envelope of (MAdds, top-1), in the order of
    MAdds; both ends of the envelope are always among them.

    Raises:
        ValueError: `size` is less than 2.
    """
    if size < 2:
        raise ValueError(
            f"gate.routing.beam is {size}, but must be at least 2: the cheapest and the widest route are always kept"
        )
    top1 = table.top1()
    order = np.lexsort((-top1, table.madds))  # among routes of equal cost the best first
    cost, top1 = table.madds[order].astype(np.float64), top1[order]
    hull = _hull(cost, top1)
    below = np.interp(cost, cost[hull], top1[hull]) - top1
    below[[hull[0], hull[-1]]] = -1.0
    kept = np.sort(np.argsort(below, kind="stable")[:size])
    return tuple(int(route) for route in order[kept])


def _hull(x: NDArray[np.float64], y: NDArray[np.float64]) -> list[int]:
    """Indices of the corners of the upper concave envelope of points, which must be ordered by
    rising x, and by falling y where x is equal."""
    hull: list[int] = []
    for index in np.unique(x, return_index=True)[1]:
        while len(hull) > 1 and (y[hull[-1]] - y[hull[-2]]) * (x[index] - x[hull[-2]]) <= (y[index] - y[hull[-2]]) * (
            x[hull[-1]] - x[hull[-2]]
        ):
            hull.pop()
        hull.append(int(index))
    return hull
