"""Grouped dynamic inference: run the trunk, decide, group images, run each group sliced.

The published dynamic mode computes every channel and masks (docs/methods.md, section 6); here an
image costs only the route that it takes. With several gates the groups descend the tree of paths:
images with the same choices so far stay together, and a router with a decision at every gate
decides again at each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from dsnet.deploy.segments import CutSegments, EntryOutput, SegmentOutput, Segments, SlicedSegments, rows_by
from dsnet.image_size import ImageSize
from dsnet.network.supernet import Supernet
from dsnet.routers.base import STOP, Evidence, Executed, Router
from dsnet.space.cost import subnet_cost
from dsnet.space.route_tree import RouteTree


class DynamicOutput(NamedTuple):
    """Output of a dynamic network for a batch of B images, in the batch's order."""

    logits: Float[Tensor, "batch classes"]
    """[B, num_classes] logits of the last route that ran."""
    routes: Int64[Tensor, " batch"]
    """int64 [B] the route that gave the logits."""
    madds: Int64[Tensor, " batch"]
    """int64 [B] MAdds of everything executed for the image: the trunk once, every decision, each
    tail that ran."""


class DynamicNet(nn.Module):
    """A supernet with a router: each image is classified by the sub-network that the router chooses
    for it.

    Args:
        supernet: trained and recalibrated; the router's route ids are indices of its members.
        router: the router.
        cut_weights: hold a contiguous copy of each segment's weights (faster, more memory) instead
            of slicing in every call.
        fold_bn: with `cut_weights`, fold BatchNorm into the convolutions.
        image_size: size of the images, for the MAdds that it reports; None: the size for which the
            supernet was laid out.
        segments: what runs the segments, such as an inference engine, in place of the supernet's
            weights.
    """

    def __init__(
        self,
        supernet: Supernet,
        router: Router,
        *,
        cut_weights: bool = True,
        fold_bn: bool = True,
        image_size: ImageSize | None = None,
        segments: Segments | None = None,
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
        self.segments: Segments = segments or (
            CutSegments(supernet, self.tree, fold_bn=fold_bn) if cut_weights else SlicedSegments(supernet, self.tree)
        )
        self._set_router(router)
        self.eval()

    def _set_router(self, router: Router) -> None:
        self.router = router
        # Computed once: a decision's cost depends on the route only, and computing it takes longer
        # than deciding.
        self._decision_madds = dict(
            zip(router.routes, router.decision_madds(torch.tensor(router.routes)).tolist(), strict=True)
        )
        self._entry = self.segments.entry(router)
        # A router that has one route and reads nothing has nothing to decide: whole batches run
        # this route, as the plain sub-network does.
        has_choice = len(router.routes) > 1 or router.max_runs > 1 or bool(router.needs)
        self._only_route = None if has_choice else router.routes[0]

    def with_router(self, router: Router) -> DynamicNet:
        """The same network with another router; the weights are shared, so that many routers need
        the memory of one network."""
        twin = copy.copy(self)
        twin._set_router(router)
        return twin

    @property
    def memory_bytes(self) -> int:
        """Bytes of all weights and statistics, with shared ones counted once."""
        return sum(value.nbytes for value in (*self.parameters(), *self.buffers()))

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> DynamicOutput:
        """Classify normalised images [B, C, H, W] float; B may be 0.

        Raises:
            RuntimeError: in training mode, or the router stops before any route has run.
        """
        if self.training:
            raise RuntimeError(
                "dynamic inference is for evaluation only; call .eval() first (gates train on the routing table)"
            )
        self.segments.check_mode()
        if self._entry is not None and len(images) > 0:
            # Segments with such a graph are no modules of torch, so that nothing records gradients;
            # the context below would take 2 % of the time of a small network at batch 1.
            return self._after_entry(self._entry(images))
        return self._routed(images)

    @torch.inference_mode()
    def _routed(self, images: Float[Tensor, "batch channels height width"]) -> DynamicOutput:
        """Classify images that the router is asked about."""
        if len(images) == 0:
            empty = torch.zeros(0, dtype=torch.int64, device=images.device)
            return DynamicOutput(images.new_zeros(0, self.num_classes), empty, empty)
        trunk = self.segments.upto_gate(0, 0, images)
        if self._only_route is not None:
            return self._run_only(trunk.features, self._only_route)
        routing = _BatchRouting(self, trunk.features)
        routing.decide(self._evidence(trunk, 0, STOP))
        return routing.output()

    def _after_entry(self, entry: EntryOutput) -> DynamicOutput:
        chosen, num_images = entry.routes[0], len(entry.routes)
        if self.router.num_gates > 1 or entry.routes.count(chosen) != num_images:
            return _BatchRouting.after_entry(self, entry).output()
        # All images agree, as one image does: at batch 1 the general way takes a tenth of the time
        # of a small network.
        if entry.answered is None:
            return self._run_only(entry.features, chosen)
        first, logits = entry.answered
        if chosen == STOP:
            return self._of_one_route(logits, num_images, first)
        logits = self.segments.rest(1, chosen, entry.features)
        return self._of_one_route(logits, num_images, chosen, self._tail_madds[first])

    def _run_only(self, features: Tensor, route: int) -> DynamicOutput:
        return self._of_one_route(self.segments.rest(1, route, features), len(features), route)

    def _of_one_route(self, logits: Tensor, num_images: int, route: int, before: int = 0) -> DynamicOutput:
        """The output of a batch all of whose images took this route, after tails of `before`
        MAdds."""
        madds = self._trunk_madds + before + self._tail_madds[route] + self._decision_madds[route]
        return DynamicOutput(logits, _index([route] * num_images, logits), _index([madds] * num_images, logits))

    def _evidence(self, output: SegmentOutput, gate: int, route: int) -> Evidence:
        parts = {part: output.evidence(part) for part in self.router.needs}
        return Evidence(parts, len(output.features), output.features.device, gate, route)


class _BatchRouting:
    """Routing of one batch after the trunk: rounds of deciding and running groups until every image
    has stopped.

    Decisions are kept in plain lists: the host must know the routes to launch the groups, and at
    batch 1 every tensor operation counts.
    """

    def __init__(self, net: DynamicNet, features: Tensor) -> None:
        self.net = net
        self.features = features
        self.routes = [STOP] * len(features)
        """The route that ran last for each image."""
        self.madds = [net._trunk_madds] * len(features)
        self.logits: Tensor | None = None
        """The latest logits of each image; None before the first round."""
        self.may_run = list(range(len(features)))
        """Rows of the images that have not stopped; a router's later decisions for stopped images
        are ignored."""

    @classmethod
    def after_entry(cls, net: DynamicNet, entry: EntryOutput) -> _BatchRouting:
        """The routing of a batch whose decision was taken by the segments."""
        routing = cls(net, entry.features)
        if entry.answered is not None:
            route, routing.logits = entry.answered
            routing._note(routing.may_run, [route] * len(routing.routes))
        routing._run(entry.routes)
        return routing

    def decide(self, evidence: Evidence) -> None:
        """Let the router decide, and run the routes that it chooses, until all images have stopped.

        Raises:
            RuntimeError: the router stops before any route has run.
        """
        router = self.net.router
        executed: list[Executed] = []
        for _ in range(router.max_runs):
            chosen = router.step(evidence, executed).tolist()
            if not executed and STOP in chosen:
                raise RuntimeError(f"the router {type(router).__name__} stops before any route has run")
            ran = self._run(chosen)
            if not self.may_run:
                break
            assert self.logits is not None
            if router.max_runs > 1:
                executed.append(Executed(_index(ran, self.logits), self.logits))

    def _run(self, chosen: list[int]) -> list[int]:
        """Run one round for the images that have not stopped: the chosen routes, of which a router
        with several gates may take others from the second gate on. Returns the route that ran for
        each image, or STOP."""
        net = self.net
        rows = self.may_run = [row for row in self.may_run if chosen[row] != STOP]
        if not rows:
            return [STOP] * len(chosen)
        num_deciding = net.router.num_gates if self.logits is None else 1
        is_all = len(rows) == len(chosen)
        logits, routes = _run_from_gate(
            net,
            num_deciding,
            0,
            self.features if is_all else _gather(net, self.features, rows),
            [chosen[row] for row in rows],
        )
        self.logits = (
            logits if self.logits is None or is_all else self.logits.index_copy(0, _index(rows, logits), logits)
        )
        self._note(rows, routes)
        ran = dict(zip(rows, routes, strict=True))
        return [ran.get(row, STOP) for row in range(len(chosen))]

    def _note(self, rows: list[int], routes: list[int]) -> None:
        """Note that these images have run these routes."""
        for row, route in zip(rows, routes, strict=True):
            self.routes[row] = route
            self.madds[row] += self.net._tail_madds[route]

    def output(self) -> DynamicOutput:
        """The output of the batch."""
        assert self.logits is not None
        decision = self.net._decision_madds
        madds = [cost + decision[route] for cost, route in zip(self.madds, self.routes, strict=True)]
        return DynamicOutput(self.logits, _index(self.routes, self.logits), _index(madds, self.logits))


def _run_from_gate(
    net: DynamicNet, num_deciding: int, gate: int, x: Tensor, chosen: list[int]
) -> tuple[Tensor, list[int]]:
    """Run images that are at the same node of a gate to the end of the network.

    Args:
        net: the network.
        num_deciding: number of gates at which the router decides.
        gate: the gate that the images have passed.
        x: features of the images at this gate, [b, ...].
        chosen: for each image, a route through the branch that was chosen at this gate.

    Returns:
        logits [b, num_classes] and the routes that ran, in the order of `x`.
    """
    following = gate + 1
    if following >= num_deciding and chosen.count(chosen[0]) == len(chosen):
        return net.segments.rest(following, chosen[0], x), chosen
    if following >= num_deciding and not net.segments.shares_segments:
        return _by_group(
            net, x, chosen, lambda route, group, wanted: (net.segments.rest(following, route, group), wanted)
        )
    if following == len(net.tree.gates):
        return _by_group(net, x, chosen, lambda route, group, wanted: (net.segments.head(route, group), wanted))
    node_of = net.tree.gates[following].node_of

    def branch(node: int, group: Tensor, wanted: list[int]) -> tuple[Tensor, list[int]]:
        output = net.segments.upto_gate(following, node, group)
        if following < num_deciding:
            wanted = net.router.step(net._evidence(output, following, wanted[0]), ()).tolist()
        return _run_from_gate(net, num_deciding, following, output.features, wanted)

    return _by_group(net, x, chosen, branch, node_of)


_GroupFunction = Callable[[int, Tensor, list[int]], tuple[Tensor, list[int]]]


def _by_group(
    net: DynamicNet, x: Tensor, chosen: list[int], run: _GroupFunction, node_of: Sequence[int] | None = None
) -> tuple[Tensor, list[int]]:
    """Run each group of images with the same next branch; results in the order of `x`.

    There is one gather before all groups and one after them, so that each group is a slice.
    """
    keys = chosen if node_of is None else [node_of[route] for route in chosen]
    groups = rows_by(keys)
    if len(groups) == 1:
        return run(keys[0], x, chosen)
    order = [row for rows in groups.values() for row in rows]
    parts = _gather(net, x, order).split([len(rows) for rows in groups.values()])
    answers = [
        run(key, part, [chosen[row] for row in rows]) for (key, rows), part in zip(groups.items(), parts, strict=True)
    ]
    back = sorted(range(len(order)), key=order.__getitem__)
    routes = [route for _, group in answers for route in group]
    logits = torch.cat([group for group, _ in answers]).index_select(0, _index(back, x))
    return logits, [routes[position] for position in back]


def _gather(net: DynamicNet, x: Tensor, rows: list[int]) -> Tensor:
    """Select images; features [n, c, H, W] keep channels last, the format of cut segments, which
    `index_select` alone would change."""
    if x.ndim != 4 or not net.segments.is_channels_last:
        return x.index_select(0, _index(rows, x))
    return x.permute(0, 2, 3, 1).index_select(0, _index(rows, x)).permute(0, 3, 1, 2)


def _index(rows: list[int], like: Tensor) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=like.device)
