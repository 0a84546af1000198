"""A supernet whose gates choose by straight-through weights: the forward pass has the value of the
chosen slices, and in the backward pass every choice of a gate gets a gradient.

This is ours (docs/methods.md, section 4; published is a straight-through one-hot choice, with code
that masks channels). At a gate, all its choices run the segment that follows it, on the images that
are at this node. Their results, padded with zero channels to the widest, are added up with the
one-hot weights. The next gate hence gets exactly the result of the chosen segment, and the gradient
with respect to a weight is the first-order effect of that choice's result on the loss.

Where every layer treats channels alone (`Supernet.ignores_zero_channels`), the zero channels stay:
layers take their input width from the tensor, the forward result does not change, and a narrow
choice still learns what more channels would have contributed. In other networks a norm across
channels, such as LayerNorm, would feel them; there only the channels of the chosen path go on, and
the gradient is that of these channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from dsnet.gates.gumbel import straight_through
from dsnet.network.features import channel_axis, padded, spread
from dsnet.network.prefix_tree import each_logits
from dsnet.network.supernet import Supernet, TrunkOutput
from dsnet.space.route_tree import GateBranches, RouteTree
from dsnet.space.spec import Subnet


@dataclass(frozen=True)
class Chooser:
    """One gate's slimming head in one step of training."""

    weight: Float[Tensor, "choices hidden"]
    """[K, hidden], for raw hidden vectors."""
    noise: Float[Tensor, "batch choices"]
    """[B, K] Gumbel noise of every image of the batch; zeros for none."""
    temperature: float

    def logits(
        self, hidden: Float[Tensor, "rows hidden"], allowed: Bool[Tensor, " choices"]
    ) -> Float[Tensor, "rows choices"]:
        """Logits of hidden vectors, [b, hidden] -> [b, K]; -inf where `allowed` (bool [K]) is
        False."""
        return (hidden @ self.weight.T).masked_fill(~allowed, -torch.inf)

    def weights(
        self, hidden: Float[Tensor, "rows hidden"], allowed: Bool[Tensor, " choices"], rows: Int64[Tensor, " rows"]
    ) -> Float[Tensor, "rows choices"]:
        """Straight-through weights [b, K] of the images `rows` of the batch."""
        return straight_through(self.logits(hidden, allowed), self.noise[rows], self.temperature)


@dataclass(frozen=True)
class Answers:
    """Logits and hidden vectors of some routes for a batch, computed without gradients."""

    logits: Float[Tensor, "batch routes classes"]
    """[B, number of these routes, num_classes], in the order in which they were requested."""
    hidden: Mapping[tuple[int, int], Float[Tensor, "batch _hidden"]]
    """[B, hidden] at every (gate, node) that the routes pass."""
    trunk: TrunkOutput
    """Output of the trunk at the first gate."""


@dataclass(frozen=True)
class Mixed:
    """Logits of a batch by the chosen routes, with gradients for the choices."""

    logits: Float[Tensor, "batch classes"]
    """[B, num_classes]: their values are those of each image's route; gradients reach all heads on
    the way."""
    weights: tuple[Float[Tensor, "batch _choices"], ...]
    """Straight-through weights [B, K] of each gate."""
    positions: Int64[Tensor, " batch"]
    """int64 [B]: each image's route, as a position in the routing space."""


@dataclass(frozen=True)
class _Group:
    """The images of a batch that are at one node of a gate."""

    node: int
    rows: Tensor
    """int64 [b]: rows of the batch."""
    features: Tensor
    """[b, ...], with the channels of the chosen path; further channels are zero."""
    hidden: Tensor
    """[b, hidden]"""


class _Mixture(NamedTuple):
    """The mixed results of the segment after a gate at one node."""

    parts: tuple[Tensor, ...]
    """(features, hidden), or (logits,) after the last gate."""
    sizes: tuple[int, ...]
    """Number of channels of each choice's own result."""


class GatedSupernet:
    """Routes of a frozen supernet in eval mode, and the decisions between them."""

    def __init__(self, supernet: Supernet, routes: Sequence[int], *, decides_once: bool) -> None:
        """Prepare the routes and the decisions between them.

        Args:
            supernet: frozen: no parameter may require a gradient.
            routes: the routing space.
            decides_once: the first gate chooses a whole route; otherwise every gate chooses the
                widths up to the next gate.

        Raises:
            ValueError: the supernet has no gate, or two sub-networks with equal widths.
        """
        self.supernet = supernet
        self.subnets: tuple[Subnet, ...] = tuple(supernet.subnets[route] for route in routes)
        whole = RouteTree.of(supernet.subnets)
        same = GateBranches((0,) * len(routes), tuple(range(len(routes))))
        self.tree = RouteTree((same,)) if decides_once else whole.subset(routes)
        """Tree of the routing space; its routes are positions in the routing space."""
        self.num_choices: tuple[int, ...] = (
            (len(routes),) if decides_once else tuple(branches.num_choices for branches in whole.gates)
        )
        """Number of rows of each gate's head: its choices over the whole set, because choices keep
        their numbers in a smaller routing space; or the routes, if it decides once."""

    @property
    def num_gates(self) -> int:
        """Number of gates that decide."""
        return len(self.tree.gates)

    @property
    def head_shapes(self) -> tuple[tuple[int, int], ...]:
        """(K, hidden) of each gate's head."""
        gates = self.supernet.spec.gates
        return tuple((rows, gate.hidden) for rows, gate in zip(self.num_choices, gates, strict=False))

    @cached_property
    def _first_routes(self) -> dict[tuple[int, int], dict[int, int]]:
        """For every (gate, node): each choice and the first route (position in the routing space)
        that takes it."""
        return {
            (gate, node): branches.first_routes(node)
            for gate, branches in enumerate(self.tree.gates)
            for node in range(branches.num_nodes)
        }

    def allowed(self, gate: int, node: int) -> Bool[Tensor, " choices"]:
        """bool [K]: whether a node has each choice."""
        has = self._first_routes[gate, node]
        return torch.tensor([choice in has for choice in range(self.num_choices[gate])], device=self._device)

    @property
    def _device(self) -> torch.device:
        return next(self.supernet.parameters()).device

    @torch.no_grad()
    def answers(self, images: Float[Tensor, "batch channels height width"], positions: Sequence[int]) -> Answers:
        """Run the routes at `positions` of the routing space on normalised images [B, C, H, W];
        shared parts run once."""
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
        """Weight the answers of all routes by the choices of the only gate: no gradient has to pass
        through the network.

        Args:
            answers: answers of every route of the routing space.
            positions: the routes in the order of `answers`.
            chooser: the head of the gate.
        """
        (branches,) = self.tree.gates
        rows = torch.arange(len(answers.logits), device=self._device)
        weights = chooser.weights(answers.hidden[0, 0], self.allowed(0, 0), rows)
        of_routes = weights[:, [branches.choice_of[position] for position in positions]]
        chosen = torch.tensor(positions, device=self._device)[of_routes.argmax(1)]
        return Mixed(torch.einsum("br,brc->bc", of_routes, answers.logits), (weights,), chosen)

    def mix_segments(self, trunk: TrunkOutput, choosers: Sequence[Chooser]) -> Mixed:
        """Run the batch segment by segment, from the output of the trunk, with the choices of every
        gate."""
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
                    for group, mixture, own in zip(groups, mixed, chosen, strict=True)
                    for part in self._split(gate, group, mixture, own)
                ]
        last = self.num_gates - 1
        routes = [self._positions(last, group, own) for group, own in zip(groups, chosen, strict=True)]
        logits = [mixture.parts[0] for mixture in mixed]
        return Mixed(_in_order(groups, logits), tuple(weights), _in_order(groups, routes))

    def _mix(self, gate: int, group: _Group, weights: Tensor) -> _Mixture:
        """Weighted sum of the results of the segment after `gate` over all choices of a node."""
        branch = self._first_routes[gate, group.node]
        with torch.set_grad_enabled(torch.is_grad_enabled() and group.features.requires_grad):
            results = [self._segment(gate + 1, group.features, self.subnets[position]) for position in branch.values()]
        own = weights[:, list(branch)]
        sizes = tuple(result[0].shape[channel_axis(result[0])] for result in results)
        if gate + 1 < self.num_gates:
            results = [
                (self._placed(gate + 1, features, self.subnets[position]), hidden)
                for (features, hidden), position in zip(results, branch.values(), strict=True)
            ]
        return _Mixture(tuple(_add_up(parts, own) for parts in zip(*results, strict=True)), sizes)

    def _placed(self, gate: int, features: Tensor, subnet: Subnet) -> Tensor:
        """The features of a sub-network with each channel at its place among those of the widest,
        where it is not the first ones that it has."""
        places = self.supernet.channel_places(gate, subnet)
        return features if places is None else spread(features, places.places, places.size)

    def _own_channels(self, gate: int, features: Tensor, subnet: Subnet, size: int) -> Tensor:
        """The channels of mixed features that a sub-network has; all of them if further zeros do
        not matter."""
        places = self.supernet.channel_places(gate, subnet)
        if places is not None:
            return features.index_select(channel_axis(features), places.places)
        if self.supernet.ignores_zero_channels:
            return features
        return features.narrow(channel_axis(features), 0, size)

    def _segment(self, number: int, features: Tensor, subnet: Subnet) -> tuple[Tensor, ...]:
        if number == self.num_gates:
            return (self.supernet.head(features, subnet),)
        output = self.supernet.upto_gate(number, features, subnet)
        return output.features, output.hidden

    def _split(self, gate: int, group: _Group, mixture: _Mixture, weights: Tensor) -> list[_Group]:
        """Group the images of a node by the node of the next gate that they reach."""
        features, hidden = mixture.parts
        chosen = weights.detach().argmax(1)
        arrived = []
        branch = self._first_routes[gate, group.node]
        for (choice, position), size in zip(branch.items(), mixture.sizes, strict=True):
            inside = torch.nonzero(chosen == choice)[:, 0]
            if len(inside):
                node = self.tree.gates[gate + 1].node_of[position]
                own = self._own_channels(gate + 1, features[inside], self.subnets[position], size)
                arrived.append(_Group(node, group.rows[inside], own, hidden[inside]))
        return arrived

    def _positions(self, gate: int, group: _Group, weights: Tensor) -> Tensor:
        """int64 [b]: the route of each image of a node of the last gate, a position in the routing
        space."""
        by_choice = torch.zeros(weights.shape[1], dtype=torch.int64)
        for choice, position in self._first_routes[gate, group.node].items():
            by_choice[choice] = position
        return by_choice.to(self._device)[weights.detach().argmax(1)]


def _add_up(results: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Weighted sum of tensors of unequal numbers of channels by weights [b, k]; missing channels
    count as zero."""
    widest = max(result.shape[channel_axis(result)] for result in results)
    terms = [
        padded(result, widest) * weight.reshape(-1, *(1,) * (result.ndim - 1))
        for result, weight in zip(results, weights.unbind(1), strict=True)
    ]
    return sum(terms[1:], start=terms[0])


def _in_order(groups: Sequence[_Group], values: Sequence[Tensor]) -> Tensor:
    """Concatenate the rows of all groups in the order of the batch."""
    return torch.cat(list(values))[torch.cat([group.rows for group in groups]).argsort()]
