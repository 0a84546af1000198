"""A supernet whose gates choose by straight-through weights: forward it slices, backward every
choice of a gate is heard.

Ours (docs/methods.md, section 4: published is a straight-through one-hot choice, by code that masks
channels): at a gate, all its choices run the segment that follows it, on the images that are at
this node. Their results, padded with zero channels to the widest, are added up with the one-hot
weights. What goes on to the next gate is hence exactly the chosen segment's result, and the
gradient of a weight is what the later network would make of that choice's result. Layers take their
input width from the tensor, so that the zero channels change nothing forward, and let a narrow
choice learn what more channels would have brought.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from dsnet.gates.gumbel import straight_through
from dsnet.network.prefix_tree import each_logits
from dsnet.network.supernet import Supernet, TrunkOutput
from dsnet.space.route_tree import GateBranches, RouteTree
from dsnet.space.spec import Subnet


@dataclass(frozen=True)
class Chooser:
    """One gate's slimming head in one step of training."""

    weight: Tensor
    """[K, hidden], for raw hidden vectors."""
    noise: Tensor
    """[B, K] Gumbel noise of every image of the batch; zeros for none."""
    temperature: float

    def logits(self, hidden: Tensor, allowed: Tensor) -> Tensor:
        """[b, hidden] -> [b, K]; -inf where `allowed` (bool [K]) says no."""
        return (hidden @ self.weight.T).masked_fill(~allowed, -torch.inf)

    def weights(self, hidden: Tensor, allowed: Tensor, rows: Tensor) -> Tensor:
        """Straight-through weights [b, K] of the images `rows` of the batch."""
        return straight_through(self.logits(hidden, allowed), self.noise[rows], self.temperature)


@dataclass(frozen=True)
class Answers:
    """What some routes, run one by one without gradients, say to a batch."""

    logits: Tensor
    """[B, number of these routes, num_classes], in the order in which they were asked for."""
    hidden: Mapping[tuple[int, int], Tensor]
    """[B, hidden] at every (gate, node) that they pass."""
    trunk: TrunkOutput
    """At the first gate."""


@dataclass(frozen=True)
class Mixed:
    """What the chosen routes say to a batch."""

    logits: Tensor
    """[B, num_classes]: in value those of each image's route; gradients reach all heads on its
    way."""
    weights: tuple[Tensor, ...]
    """[B, K] of each gate."""
    positions: Tensor
    """int64 [B]: each image's route, as a position in the routing space."""


@dataclass(frozen=True)
class _Group:
    """The images of a batch that are at one node of a gate."""

    node: int
    rows: Tensor
    """int64 [b]"""
    features: Tensor
    """[b, c, H, W], zero channels behind those of their own width."""
    hidden: Tensor
    """[b, hidden]"""


class GatedSupernet:
    """Some routes of a frozen supernet in eval mode, and the decisions between them."""

    def __init__(self, supernet: Supernet, routes: Sequence[int], *, decides_once: bool) -> None:
        """Args:
        supernet: frozen: no parameter may require a gradient.
        routes: the routing space.
        decides_once: the first gate chooses a whole route; else every gate chooses up to the next.

        Raises:
            ValueError: the supernet has no gate, or sub-networks that none can tell apart.
        """
        self.supernet = supernet
        self.subnets: tuple[Subnet, ...] = tuple(supernet.subnets[route] for route in routes)
        whole = RouteTree.of(supernet.subnets)
        same = GateBranches((0,) * len(routes), tuple(range(len(routes))))
        self.tree = RouteTree((same,)) if decides_once else whole.subset(routes)
        """Of the routing space; positions in it are what this class calls a route."""
        self.num_choices: tuple[int, ...] = (
            (len(routes),) if decides_once else tuple(branches.num_choices for branches in whole.gates)
        )
        """Rows of each gate's head: its choices over the whole set, as choices keep their numbers,
        or the routes."""

    @property
    def num_gates(self) -> int:
        """Gates that decide."""
        return len(self.tree.gates)

    @property
    def head_shapes(self) -> tuple[tuple[int, int], ...]:
        """(K, hidden) of each gate's head."""
        gates = self.supernet.spec.gates
        return tuple((rows, gate.hidden) for rows, gate in zip(self.num_choices, gates, strict=False))

    @cached_property
    def _first_routes(self) -> dict[tuple[int, int], dict[int, int]]:
        """For every (gate, node), by choice, the first position in the routing space that takes
        it."""
        return {
            (gate, node): branches.first_routes(node)
            for gate, branches in enumerate(self.tree.gates)
            for node in range(branches.num_nodes)
        }

    def allowed(self, gate: int, node: int) -> Tensor:
        """bool [K]: the choices that a node has."""
        has = self._first_routes[gate, node]
        return torch.tensor([choice in has for choice in range(self.num_choices[gate])], device=self._device)

    @property
    def _device(self) -> torch.device:
        return next(self.supernet.parameters()).device

    @torch.no_grad()
    def answers(self, images: Tensor, positions: Sequence[int]) -> Answers:
        """Run the routes at `positions` of the routing space on normalised images [B, C, H, W],
        what they share once."""
        trunk = self.supernet.upto_gate(0, images, self.subnets[0])
        hidden = {(0, 0): trunk.hidden}
        position_of = {subnet.name: position for position, subnet in enumerate(self.subnets)}

        def collect(gate: int, subnet: Subnet, output: TrunkOutput) -> None:
            if gate < self.num_gates:
                hidden[gate, self.tree.gates[gate].node_of[position_of[subnet.name]]] = output.hidden

        wanted = [self.subnets[position] for position in dict.fromkeys(positions)]
        said = {
            subnet.name: logits
            for subnet, logits in each_logits(self.supernet, trunk.features, wanted, gate=1, on_node=collect)
        }
        return Answers(torch.stack([said[self.subnets[p].name] for p in positions], dim=1), hidden, trunk)

    def mix_answers(self, answers: Answers, positions: Sequence[int], chooser: Chooser) -> Mixed:
        """The only gate's choice among the answers of all routes: no gradient has to pass the
        network.

        Args:
            answers: of every route of the routing space.
            positions: the routes in the order of `answers`.
            chooser: the gate's.
        """
        (branches,) = self.tree.gates
        rows = torch.arange(len(answers.logits), device=self._device)
        weights = chooser.weights(answers.hidden[0, 0], self.allowed(0, 0), rows)
        of_routes = weights[:, [branches.choice_of[position] for position in positions]]
        chosen = torch.tensor(positions, device=self._device)[of_routes.argmax(1)]
        return Mixed(torch.einsum("br,brc->bc", of_routes, answers.logits), (weights,), chosen)

    def mix_segments(self, trunk: TrunkOutput, choosers: Sequence[Chooser]) -> Mixed:
        """Every gate's choice, segment by segment, from what the first gate sees of the batch."""
        assert self.num_gates == len(self.supernet.spec.gates)
        groups = [_Group(0, torch.arange(len(trunk.hidden), device=self._device), trunk.features, trunk.hidden)]
        weights: list[Tensor] = []
        for gate, chooser in enumerate(choosers):
            chosen = [chooser.weights(group.hidden, self.allowed(gate, group.node), group.rows) for group in groups]
            weights.append(_in_order(groups, chosen))
            mixed = [self._mix(gate, group, own) for group, own in zip(groups, chosen, strict=True)]
            if gate + 1 < self.num_gates:
                groups = [
                    part
                    for group, parts, own in zip(groups, mixed, chosen, strict=True)
                    for part in self._split(gate, group, parts, own)
                ]
        last = self.num_gates - 1
        routes = [self._positions(last, group, own) for group, own in zip(groups, chosen, strict=True)]
        return Mixed(_in_order(groups, [logits for (logits,) in mixed]), tuple(weights), _in_order(groups, routes))

    def _mix(self, gate: int, group: _Group, weights: Tensor) -> tuple[Tensor, ...]:
        """The segment after `gate` by all choices of a node, added up: (features, hidden), or
        (logits,) after the last gate."""
        branch = self._first_routes[gate, group.node]
        with torch.set_grad_enabled(torch.is_grad_enabled() and group.features.requires_grad):
            results = [self._segment(gate + 1, group.features, self.subnets[position]) for position in branch.values()]
        own = weights[:, list(branch)]
        return tuple(_add_up(parts, own) for parts in zip(*results, strict=True))

    def _segment(self, number: int, features: Tensor, subnet: Subnet) -> tuple[Tensor, ...]:
        if number == self.num_gates:
            return (self.supernet.head(features, subnet),)
        output = self.supernet.upto_gate(number, features, subnet)
        return output.features, output.hidden

    def _split(self, gate: int, group: _Group, parts: tuple[Tensor, ...], weights: Tensor) -> list[_Group]:
        """Send the images of a node to the next gate's nodes."""
        features, hidden = parts
        chosen = weights.detach().argmax(1)
        arrived = []
        for choice, position in self._first_routes[gate, group.node].items():
            inside = torch.nonzero(chosen == choice)[:, 0]
            if len(inside):
                node = self.tree.gates[gate + 1].node_of[position]
                arrived.append(_Group(node, group.rows[inside], features[inside], hidden[inside]))
        return arrived

    def _positions(self, gate: int, group: _Group, weights: Tensor) -> Tensor:
        """int64 [b]: the route that each image of a node of the last gate has ended on."""
        by_choice = torch.zeros(weights.shape[1], dtype=torch.int64)
        for choice, position in self._first_routes[gate, group.node].items():
            by_choice[choice] = position
        return by_choice.to(self._device)[weights.detach().argmax(1)]


def _add_up(results: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Weighted sum of tensors [b, c_k, ...] by weights [b, k]; channels that one lacks are zero in
    it."""
    widest = max(result.shape[1] for result in results)
    terms = [
        F.pad(result, (*(0, 0) * (result.ndim - 2), 0, widest - result.shape[1]))
        * weight.reshape(-1, *(1,) * (result.ndim - 1))
        for result, weight in zip(results, weights.unbind(1), strict=True)
    ]
    return sum(terms[1:], start=terms[0])


def _in_order(groups: Sequence[_Group], values: Sequence[Tensor]) -> Tensor:
    """Rows of all groups, put back into the order of the batch."""
    return torch.cat(list(values))[torch.cat([group.rows for group in groups]).argsort()]
