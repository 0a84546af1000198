"""Dynamic inference that is really sliced: shared trunk on the batch, decide, group by choice, run each group, scatter back.

The published dynamic mode computes every channel and masks (METHODS 6); here an image pays only for the route it takes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dsnet.cost import subnet_cost
from dsnet.materialize import materialize_tail, materialize_trunk
from dsnet.routers import STOP, Executed, Router
from dsnet.supernet import Supernet

MAX_ROUNDS = 16
"""No router runs more routes one after another for one image; a router that never stops is a fault."""


class DynamicOutput(NamedTuple):
    """What a dynamic network answers to a batch, in the batch's order."""

    logits: Tensor
    """[B, num_classes]"""
    routes: Tensor
    """int64 [B]: the route whose logits these are."""
    madds: Tensor
    """int64 [B]: everything executed for the image: trunk once, the decision, each tail run."""


@dataclass(frozen=True)
class _Costs:
    trunk: int
    tails: Tensor
    """int64 [K]"""


class DynamicNet(nn.Module):
    """A supernet with a router: classifies each image by the sub-network that the router picks for it.

    Args:
        supernet: trained and recalibrated; its set is what the router's route ids mean.
        router: decides.
        cut_weights: hold a contiguous copy of each route's weights (faster, more memory) instead of slicing on the fly.
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
        self.router = router
        self.subnets = supernet.subnets
        self.num_classes = supernet.spec.num_classes
        self._costs = _Costs(costs[0].trunk_madds, torch.tensor([cost.madds - cost.trunk_madds for cost in costs]))
        self.cut_weights = cut_weights
        if cut_weights:
            self.cut_trunk = materialize_trunk(supernet, supernet.subnets[0], fold_bn=fold_bn)
            self.cut_tails = nn.ModuleList(
                materialize_tail(supernet, subnet, fold_bn=fold_bn) for subnet in supernet.subnets
            )
        else:
            self.supernet = supernet
        self.eval()

    def with_router(self, router: Router) -> DynamicNet:
        """The same network, weights shared, under another router: many gates cost the memory of one."""
        twin = copy.copy(self)
        twin.router = router
        return twin

    @torch.inference_mode()
    def forward(self, images: Tensor) -> DynamicOutput:
        """Classify normalised images [B, C, H, W] float; B may be 0.

        Raises:
            RuntimeError: in training mode.
        """
        if self.training or (not self.cut_weights and self.supernet.training):
            raise RuntimeError(
                "dynamic inference is for evaluation only; call .eval() first (gates train on the routing table)"
            )
        num_images = len(images)
        if num_images == 0:
            empty = torch.zeros(0, dtype=torch.int64, device=images.device)
            return DynamicOutput(images.new_zeros(0, self.num_classes), empty, empty)
        trunk = self.cut_trunk(images) if self.cut_weights else self.supernet.trunk(images, self.subnets[0])
        evidence = {part: trunk.evidence(part) for part in self.router.needs}
        madds = torch.full(
            (num_images,), self._costs.trunk + self.router.decision_madds, dtype=torch.int64, device=images.device
        )
        tails = self._costs.tails.to(images.device)
        logits = images.new_zeros(num_images, self.num_classes)
        routes = torch.full((num_images,), STOP, dtype=torch.int64, device=images.device)
        executed: list[Executed] = []
        for _ in range(MAX_ROUNDS):
            chosen = self.router.step(evidence, executed)
            if executed:
                chosen = torch.where(executed[-1].routes == STOP, STOP, chosen)
            if not self._run_groups(trunk.features, chosen, logits):
                return DynamicOutput(logits, routes, madds)
            running = chosen != STOP
            routes = torch.where(running, chosen, routes)
            madds = madds + torch.where(running, tails[chosen.clamp_min(0)], 0)
            executed.append(Executed(chosen, logits.clone()))
        raise RuntimeError(f"the router {type(self.router).__name__} did not stop after {MAX_ROUNDS} rounds")

    def _run_groups(self, features: Tensor, chosen: Tensor, logits: Tensor) -> bool:
        """Run every chosen tail on its group and write the logits in place; False where nothing was left to run."""
        order = torch.argsort(chosen, stable=True)
        values, counts = torch.unique_consecutive(chosen[order], return_counts=True)
        start = 0
        ran = False
        for route, count in zip(values.tolist(), counts.tolist(), strict=True):
            rows = order[start : start + count]
            start += count
            if route == STOP:
                continue
            ran = True
            if count == len(chosen):  # one group: nothing to gather or scatter
                logits.copy_(self._tail(features, route))
            else:
                logits.index_copy_(0, rows, self._tail(features.index_select(0, rows), route))
        return ran

    def _tail(self, features: Tensor, route: int) -> Tensor:
        if self.cut_weights:
            return self.cut_tails[route](features)
        return self.supernet.tail(features, self.subnets[route])
