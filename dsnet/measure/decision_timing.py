"""Timing of a router's decisions in torch, apart from the network: reading the evidence, deciding,
and transferring the routes to the host, which groups the images.

In an engine, the decision is in the graph of everything up to it (`dsnet.measure.engine_parts`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from dsnet.deploy.segments import CutSegments, rows_by
from dsnet.network.supernet import TrunkOutput
from dsnet.routers.base import STOP, Evidence, Executed, NetworkShape, Router
from dsnet.routers.gate import RICH_EVIDENCE
from dsnet.routers.kinds import router_kinds
from dsnet.space.spec import SupernetSpec


def timed_routers(spec: SupernetSpec, segments: CutSegments, trunk: TrunkOutput) -> dict[str, Router]:
    """A router of each kind, by kind, whose decisions are timed.

    They choose among all routes and have weights of zero, because the time of a decision does not
    depend on its result.

    Args:
        spec: specification of the supernet.
        segments: segments of the supernet.
        trunk: output of the trunk for any images.
    """
    outputs = _along_last_route(segments, trunk)
    shape = NetworkShape(
        tree=segments.tree,
        num_classes=spec.num_classes,
        hidden=tuple(output.hidden.shape[1] for output in outputs),
        rich=tuple(sum(output.evidence(part).shape[1] for part in RICH_EVIDENCE) for output in outputs),
    )
    return {name: kind.router_class.untrained(kind, shape) for name, kind in router_kinds().items()}


def decision_calls(
    routers: Mapping[str, Router],
    segments: CutSegments,
    trunk: TrunkOutput,
    logits: Float[Tensor, "batch classes"],
) -> Mapping[str, Callable[[], object]]:
    """For each router a call in torch that makes all decisions on the way to an answer, to be
    timed.

    A router with one gate per stage decides at every gate on the path of the last route, for all
    images together.

    Args:
        routers: see `timed_routers`.
        segments: segments of the supernet.
        trunk: output of the trunk for a batch of B images.
        logits: [B, num_classes] answer of a route, for the cascades.
    """
    outputs = _along_last_route(segments, trunk)
    return {kind: _decisions(router, outputs, logits) for kind, router in routers.items()}


def _along_last_route(segments: CutSegments, trunk: TrunkOutput) -> list[TrunkOutput]:
    """Output of the segment before each gate on the path of the last route."""
    outputs = [trunk]
    for gate, branches in enumerate(segments.tree.gates[1:], start=1):
        outputs.append(segments.upto_gate(gate, branches.node_of[-1], outputs[-1].features))
    return outputs


def _decisions(router: Router, outputs: list[TrunkOutput], logits: torch.Tensor) -> Callable[[], object]:
    """A call that makes all decisions of one router, each as in dynamic inference, with the
    transfer of the routes to the host."""
    size, device = len(logits), logits.device
    routes = torch.zeros(size, dtype=torch.int64, device=device)

    def evidence_at(gate: int, route: int) -> Evidence:
        parts = {part: outputs[gate].evidence(part) for part in router.needs}
        return Evidence(parts, size, device, gate, route)

    def decide() -> None:
        first = evidence_at(0, STOP)
        rows_by(router.step(first, ()).tolist())
        for gate in range(1, router.num_gates):
            rows_by(router.step(evidence_at(gate, router.routes[-1]), ()).tolist())
        for _ in range(1, router.max_runs):
            rows_by(router.step(first, (Executed(routes, logits),)).tolist())

    return decide
