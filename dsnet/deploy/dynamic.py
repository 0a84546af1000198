"""Dynamic inference that is really sliced: shared trunk on the batch, decide, group by choice, run each group, scatter back.

The published dynamic mode computes every channel and masks (docs/methods.md, section 6); here an image pays only for
the route it takes. With several gates the groups walk the tree of paths: images that agree so far go on together, and
routers with a decision at every gate are asked again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dsnet.deploy.segments import CutSegments, SlicedSegments, rows_by
from dsnet.network.supernet import Supernet, TrunkOutput
from dsnet.routers.base import STOP, Evidence, Executed, Router
from dsnet.space.cost import subnet_cost
from dsnet.space.route_tree import RouteTree


class DynamicOutput(NamedTuple):
    """What a dynamic network answers to a batch, in the batch's order."""

    logits: Tensor
    """[B, num_classes]"""
    routes: Tensor
    """int64 [B]: the route whose logits these are."""
    madds: Tensor
    """int64 [B]: everything executed for the image: trunk once, every decision, each tail run."""


class DynamicNet(nn.Module):
    """A supernet with a router: classifies each image by the sub-network that the router picks for it.

    Args:
        supernet: trained and recalibrated; its set is what the router's route ids mean.
        router: decides.
        cut_weights: hold a contiguous copy of each segment's weights (faster, more memory) instead of slicing on the fly.
        fold_bn: with `cut_weights`, fold BatchNorm into the convolutions.
        image_size: side in pixels, for the MAdds it reports; None takes the size the supernet was laid out for.
    """

    def __init__(
        self,
        supernet: Supernet,
        router: Router,
        *,
        cut_weights: bool = True,
        fold_bn: bool = True,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        size = supernet.spec.image_size if image_size is None else image_size
        costs = [subnet_cost(supernet.spec, subnet, size) for subnet in supernet.subnets]
        self.subnets = supernet.subnets
        self.num_classes = supernet.spec.num_classes
        self.cut_weights = cut_weights
        self.tree = RouteTree.of(supernet.subnets)
        self._trunk_madds = costs[0].trunk_madds
        self._tail_madds = [cost.madds - cost.trunk_madds for cost in costs]
        self.segments = (
            CutSegments(supernet, self.tree, fold_bn=fold_bn) if cut_weights else SlicedSegments(supernet, self.tree)
        )
        self._adopt(router)
        self.eval()

    def _adopt(self, router: Router) -> None:
        self.router = router
        # Counted once: a decision's cost is a property of the route, and counting takes longer than deciding.
        self._decision_madds = dict(
            zip(router.routes, router.decision_madds(torch.tensor(router.routes)).tolist(), strict=True)
        )

    def with_router(self, router: Router) -> DynamicNet:
        """The same network, weights shared, under another router: many gates cost the memory of one."""
        twin = copy.copy(self)
        twin._adopt(router)
        return twin

    @property
    def memory_bytes(self) -> int:
        """Of all weights and statistics that it holds, shared ones once."""
        return sum(value.nbytes for value in (*self.parameters(), *self.buffers()))

    @torch.inference_mode()
    def forward(self, images: Tensor) -> DynamicOutput:
        """Classify normalised images [B, C, H, W] float; B may be 0.

        Raises:
            RuntimeError: in training mode, or the router stops before any route has run.
        """
        if self.training:
            raise RuntimeError(
                "dynamic inference is for evaluation only; call .eval() first (gates train on the routing table)"
            )
        self.segments.check_mode()
        if len(images) == 0:
            empty = torch.zeros(0, dtype=torch.int64, device=images.device)
            return DynamicOutput(images.new_zeros(0, self.num_classes), empty, empty)
        trunk = self.segments.upto_gate(0, 0, images)
        evidence = self._evidence(trunk, 0, STOP)
        return _Rounds(self, trunk.features, evidence).run()

    def _evidence(self, output: TrunkOutput, gate: int, route: int) -> Evidence:
        parts = {part: output.evidence(part) for part in self.router.needs}
        return Evidence(parts, len(output.features), output.features.device, gate, route)


class _Rounds:
    """One batch behind the trunk: ask, run the groups, ask again, until every image has stopped.

    What decides is kept in plain lists: the host must know the routes to launch the groups, and at batch 1 each tensor operation is felt.
    """

    def __init__(self, net: DynamicNet, features: Tensor, evidence: Evidence) -> None:
        self.net = net
        self.features = features
        self.evidence = evidence
        self.routes = [STOP] * len(features)
        self.madds = [net._trunk_madds] * len(features)
        self.may_run = list(range(len(features)))
        """Not an image that has stopped, whatever the router says of it later."""
        self.executed: list[Executed] = []

    def run(self) -> DynamicOutput:
        """The batch's answers.

        Raises:
            RuntimeError: the router stops before a first route.
        """
        router = self.net.router
        for _ in range(router.max_runs):
            answer = router.step(self.evidence, self.executed)
            chosen = answer.tolist()
            rows = [row for row in self.may_run if chosen[row] != STOP]
            if not self.executed and len(rows) < len(chosen):
                raise RuntimeError(f"the router {type(router).__name__} stops before any route has run")
            if not rows:
                break
            self._execute(rows, [chosen[row] for row in rows], answer)
        return self._output()

    def _execute(self, rows: list[int], chosen: list[int], answer: Tensor) -> None:
        """Run one round: what `chosen` holds for the images `rows`; `answer` is what the router said of all."""
        is_all = len(rows) == len(self.routes)
        asks = 1 if self.executed else self.net.router.num_gates
        logits, routes = _walk(self.net, asks, 0, self.features if is_all else _gather(self.features, rows), chosen)
        for row, route in zip(rows, routes, strict=True):
            self.routes[row] = route
            self.madds[row] += self.net._tail_madds[route]
        if not is_all:
            logits = self.executed[-1].logits.index_copy(0, _index(rows, logits), logits)
            answer = torch.full_like(answer, STOP).index_copy(0, _index(rows, answer), _index(routes, answer))
        elif asks > 1:
            answer = _index(routes, answer)
        self.may_run = rows
        self.executed.append(Executed(answer, logits))

    def _output(self) -> DynamicOutput:
        last = self.executed[-1]
        decision = self.net._decision_madds
        madds = [cost + decision[route] for cost, route in zip(self.madds, self.routes, strict=True)]
        routes = last.routes if len(self.executed) == 1 else _index(self.routes, last.routes)
        return DynamicOutput(last.logits, routes, _index(madds, last.routes))


def _walk(net: DynamicNet, asks: int, gate: int, x: Tensor, chosen: list[int]) -> tuple[Tensor, list[int]]:
    """Run images that stand at one node of a gate to the end.

    Args:
        net: whose segments run.
        asks: the router decides at so many gates.
        gate: where they stand, its choice made.
        x: what the gate handed over, [b, c, H, W].
        chosen: for each, a route through the branch that it takes.

    Returns:
        logits [b, num_classes] and the routes that ran, in the order of `x`.
    """
    following = gate + 1
    if following >= asks and chosen.count(chosen[0]) == len(chosen):
        return _straight(net, following, x, chosen[0]), chosen
    if following == len(net.tree.gates):
        return _by_group(x, chosen, lambda route, group, wanted: (net.segments.head(route, group), wanted))
    node_of = net.tree.gates[following].node_of

    def branch(node: int, group: Tensor, wanted: list[int]) -> tuple[Tensor, list[int]]:
        output = net.segments.upto_gate(following, node, group)
        if following < asks:
            wanted = net.router.step(net._evidence(output, following, wanted[0]), ()).tolist()
        return _walk(net, asks, following, output.features, wanted)

    return _by_group(x, chosen, branch, node_of)


def _straight(net: DynamicNet, gate: int, x: Tensor, route: int) -> Tensor:
    """Run one route from a gate on, without asking again: logits [b, num_classes]."""
    for later in range(gate, len(net.tree.gates)):
        x = net.segments.upto_gate(later, net.tree.gates[later].node_of[route], x).features
    return net.segments.head(route, x)


_Run = Callable[[int, Tensor, list[int]], tuple[Tensor, list[int]]]


def _by_group(
    x: Tensor, chosen: list[int], run: _Run, node_of: Sequence[int] | None = None
) -> tuple[Tensor, list[int]]:
    """Run each group of images that go the same way, and put the answers back into the order of `x`.

    One gather before all groups and one after: a group is then a slice.
    """
    keys = chosen if node_of is None else [node_of[route] for route in chosen]
    groups = rows_by(keys)
    if len(groups) == 1:
        return run(keys[0], x, chosen)
    order = [row for rows in groups.values() for row in rows]
    parts = _gather(x, order).split([len(rows) for rows in groups.values()])
    answers = [
        run(key, part, [chosen[row] for row in rows]) for (key, rows), part in zip(groups.items(), parts, strict=True)
    ]
    back = sorted(range(len(order)), key=order.__getitem__)
    routes = [route for _, group in answers for route in group]
    logits = torch.cat([group for group, _ in answers]).index_select(0, _index(back, x))
    return logits, [routes[position] for position in back]


def _gather(x: Tensor, rows: list[int]) -> Tensor:
    """Some images [n, c, H, W] in channels last, as cut segments have them: torch's own selection would turn them into channels first."""
    return x.permute(0, 2, 3, 1).index_select(0, _index(rows, x)).permute(0, 3, 1, 2)


def _index(rows: list[int], like: Tensor) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=like.device)
