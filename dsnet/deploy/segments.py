"""The segments of a supernet between its gates, as the routes of a set run them: cut out as plain modules, or sliced on the fly.

Routes that agree up to a gate share everything before it: each segment is there once for every distinct prefix of widths, so that many
paths cost the memory of their tree, not of their sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from dsnet.deploy.materialize import materialize_head, materialize_upto_gate
from dsnet.network.supernet import PlainFeatures, Supernet, TrunkOutput
from dsnet.space.route_tree import RouteTree


class Segments(Protocol):
    """What dynamic inference runs."""

    def upto_gate(self, gate: int, node: int, x: Tensor) -> TrunkOutput:
        """From the images (gate 0) or what gate `gate - 1` handed over, up to a node of gate `gate`."""
        ...

    def head(self, route: int, x: Tensor) -> Tensor:
        """From what the last gate handed over to the logits of a route."""
        ...

    def check_mode(self) -> None:
        """Raise RuntimeError where the network is in training mode."""
        ...


class CutSegments(nn.Module):
    """Each segment with its own contiguous weights, in eval mode.

    Args:
        supernet: where the weights come from; they are copied.
        tree: of its members.
        fold_bn: fold BatchNorm into the convolutions.
    """

    def __init__(self, supernet: Supernet, tree: RouteTree, *, fold_bn: bool = True) -> None:
        super().__init__()
        members = supernet.subnets
        self.tree = tree
        self.nodes = nn.ModuleList(
            nn.ModuleList(
                materialize_upto_gate(supernet, gate, members[branches.routes_at(node)[0]], fold_bn=fold_bn)
                for node in range(branches.num_nodes)
            )
            for gate, branches in enumerate(tree.gates)
        )
        self.heads = nn.ModuleList(materialize_head(supernet, subnet, fold_bn=fold_bn) for subnet in members)
        # Looked up in every call: a ModuleList of ModuleLists costs microseconds, which batch 1 feels.
        self._nodes: tuple[tuple[nn.Module, ...], ...] = tuple(tuple(row) for row in self.nodes)  # type: ignore[arg-type]
        self._heads = tuple(self.heads)

    @property
    def trunk(self) -> nn.Module:
        """Everything before the first gate: images -> TrunkOutput."""
        return self._nodes[0][0]

    def upto_gate(self, gate: int, node: int, x: Tensor) -> TrunkOutput:
        """Run one segment."""
        return self._nodes[gate][node](x)

    def head(self, route: int, x: Tensor) -> Tensor:
        """Run the last segment."""
        return self._heads[route](x)

    def tail(self, route: int) -> nn.Module:
        """Everything after the first gate on one route, made of the shared segments: features -> logits."""
        between = [
            PlainFeatures(self._nodes[gate][branches.node_of[route]])
            for gate, branches in enumerate(self.tree.gates)
            if gate > 0
        ]
        return nn.Sequential(*between, self._heads[route]).eval() if between else self._heads[route]

    def check_mode(self) -> None:
        """Cut segments have no training mode of their own."""


class SlicedSegments(nn.Module):
    """Each segment sliced out of the supernet's shared weights in every call: no copies, but slower."""

    def __init__(self, supernet: Supernet, tree: RouteTree) -> None:
        super().__init__()
        self.supernet = supernet
        self.tree = tree

    def upto_gate(self, gate: int, node: int, x: Tensor) -> TrunkOutput:
        """Run one segment."""
        route = self.tree.gates[gate].node_of.index(node)
        return self.supernet.upto_gate(gate, x, self.supernet.subnets[route])

    def head(self, route: int, x: Tensor) -> Tensor:
        """Run the last segment."""
        return self.supernet.head(x, self.supernet.subnets[route])

    def check_mode(self) -> None:
        """The supernet is shared: somebody else may have set it to training."""
        if self.supernet.training:
            raise RuntimeError("dynamic inference is for evaluation only, but the supernet that it slices is training")


def rows_by(keys: Sequence[int]) -> dict[int, list[int]]:
    """The positions of each key."""
    groups: dict[int, list[int]] = {}
    for row, key in enumerate(keys):
        groups.setdefault(key, []).append(row)
    return groups
