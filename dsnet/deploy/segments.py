"""The segments of a supernet between its gates for dynamic inference: cut out as plain modules, or
sliced in every call.

Routes that agree up to a gate share everything before it: each segment exists once per distinct
prefix of widths, so that many paths share the memory of their common segments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from jaxtyping import Float
from torch import Tensor, nn

from dsnet.deploy.materialize import materialize_head, materialize_upto_gate
from dsnet.network.supernet import PlainFeatures, Supernet, TrunkOutput
from dsnet.routers.base import Router
from dsnet.space.route_tree import RouteTree


class SegmentOutput(Protocol):
    """Output of a segment that ends at a gate; see `dsnet.network.supernet.TrunkOutput`."""

    @property
    def features(self) -> Float[Tensor, "batch ..."]:
        """The input of the next segment."""
        ...

    def evidence(self, part: str) -> Float[Tensor, "batch features"]:
        """One part of the evidence that a router may read."""
        ...


class EntryOutput(NamedTuple):
    """Output of a graph that includes the decision of the router."""

    features: Float[Tensor, "batch ..."]
    """Features of the first gate."""
    routes: list[int]
    """The route to run for each image; STOP where the answer that it has is the last one."""
    answered: tuple[int, Float[Tensor, "batch classes"]] | None
    """The route that has run for all images before the decision, and its logits; None if none
    has."""


Entry = Callable[[Float[Tensor, "batch channels height width"]], EntryOutput]


class Segments(Protocol):
    """Interface of the segments that dynamic inference runs."""

    @property
    def shares_segments(self) -> bool:
        """Whether routes share what is after the first gate as far as they agree; else every route
        has it for itself."""
        ...

    @property
    def is_channels_last(self) -> bool:
        """Whether features of four dimensions are in channels last."""
        ...

    def entry(self, router: Router) -> Entry | None:
        """A function that runs everything up to the decision of a router, with the decision; None
        where the router itself must decide."""
        ...

    def upto_gate(self, gate: int, node: int, x: Float[Tensor, "batch ..."]) -> SegmentOutput:
        """Run a segment: images (gate 0) or features of gate `gate - 1` -> a node of `gate`."""
        ...

    def head(self, route: int, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        """Run a route's last segment: features of the last gate -> logits [B, num_classes]."""
        ...

    def rest(self, gate: int, route: int, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        """Run a route from the segment after gate `gate - 1` to its end, without decisions: logits
        [B, num_classes]."""
        ...

    def check_mode(self) -> None:
        """Raise RuntimeError if the network is in training mode."""
        ...


def run_rest(
    segments: Segments, tree: RouteTree, gate: int, route: int, x: Float[Tensor, "batch ..."]
) -> Float[Tensor, "batch classes"]:
    """Run a route from a gate on, one segment after another; see `Segments.rest`."""
    for later in range(gate, len(tree.gates)):
        x = segments.upto_gate(later, tree.gates[later].node_of[route], x).features
    return segments.head(route, x)


class CutSegments(nn.Module):
    """Segments as plain modules with their own contiguous weights, in eval mode.

    Args:
        supernet: the supernet, whose weights are copied.
        tree: the route tree of its members.
        fold_bn: fold BatchNorm into the convolutions.
    """

    shares_segments = True
    is_channels_last = True

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
        # Tuples for lookups in every call: a ModuleList of ModuleLists costs microseconds, which
        # matter at batch 1.
        self._nodes: tuple[tuple[nn.Module, ...], ...] = tuple(tuple(row) for row in self.nodes)  # type: ignore[arg-type]
        self._heads = tuple(self.heads)

    def entry(self, router: Router) -> None:
        """None; see `Segments.entry`."""

    @property
    def trunk(self) -> nn.Module:
        """The module before the first gate: images -> TrunkOutput."""
        return self._nodes[0][0]

    def upto_gate(self, gate: int, node: int, x: Float[Tensor, "batch ..."]) -> TrunkOutput:
        """See `Segments.upto_gate`."""
        return self._nodes[gate][node](x)

    def head(self, route: int, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        """See `Segments.head`."""
        return self._heads[route](x)

    def tail(self, route: int) -> nn.Module:
        """All segments of a route after the first gate as one module, with shared weights: features
        -> logits."""
        between = [
            PlainFeatures(self._nodes[gate][branches.node_of[route]])
            for gate, branches in enumerate(self.tree.gates)
            if gate > 0
        ]
        return nn.Sequential(*between, self._heads[route]).eval() if between else self._heads[route]

    def rest(self, gate: int, route: int, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        """See `Segments.rest`."""
        return run_rest(self, self.tree, gate, route, x)

    def check_mode(self) -> None:
        """Do nothing: cut segments are always in eval mode."""


class SlicedSegments(nn.Module):
    """Segments sliced from the supernet's weights in every call: no copies, but slower."""

    shares_segments = True
    is_channels_last = True

    def __init__(self, supernet: Supernet, tree: RouteTree) -> None:
        super().__init__()
        self.supernet = supernet
        self.tree = tree

    def entry(self, router: Router) -> None:
        """None; see `Segments.entry`."""

    def upto_gate(self, gate: int, node: int, x: Float[Tensor, "batch ..."]) -> TrunkOutput:
        """See `Segments.upto_gate`."""
        route = self.tree.gates[gate].node_of.index(node)
        return self.supernet.upto_gate(gate, x, self.supernet.subnets[route])

    def head(self, route: int, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        """See `Segments.head`."""
        return self.supernet.head(x, self.supernet.subnets[route])

    def rest(self, gate: int, route: int, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        """See `Segments.rest`."""
        return run_rest(self, self.tree, gate, route, x)

    def check_mode(self) -> None:
        """See `Segments.check_mode`; the supernet is shared, and other code may have put it in
        training mode."""
        if self.supernet.training:
            raise RuntimeError(
                "dynamic inference is for evaluation only, but the supernet is in training mode; call its .eval() first"
            )


def rows_by(keys: Sequence[int]) -> dict[int, list[int]]:
    """Key -> its positions in `keys`, in order of first appearance."""
    groups: dict[int, list[int]] = {}
    for row, key in enumerate(keys):
        groups.setdefault(key, []).append(row)
    return groups
