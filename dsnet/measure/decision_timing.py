"""What a router's decisions take beside the network: reading the evidence, deciding, and telling the host how to group the images."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from dsnet.deploy.segments import CutSegments, rows_by
from dsnet.gates.problem import CASCADE_EVIDENCE
from dsnet.network.supernet import TrunkOutput
from dsnet.routers import (
    RICH_EVIDENCE,
    STOP,
    CascadeRouter,
    Evidence,
    EvidenceGateRouter,
    Executed,
    GateRouter,
    GatesRouter,
    Head,
    LearnedCascadeRouter,
    Router,
)
from dsnet.routers.cascade import num_answer_features
from dsnet.space.spec import SupernetSpec

HIDDEN_UNITS = 32
"""Of the perceptrons that are timed, as `gate.perceptron.hidden_units` has by default: at these sizes it is the calls that cost."""


def decision_calls(
    spec: SupernetSpec, segments: CutSegments, trunk: TrunkOutput, logits: torch.Tensor
) -> Mapping[str, Callable[[], object]]:
    """For each kind of router (`ROUTER_KINDS`) all decisions on the way to its answer, ready to be timed.

    The routers choose among all routes and have weights of zero: what they decide does not matter, and what a decision takes does not
    depend on it. One gate per stage decides at every gate of the last route's path, for all images together.

    Args:
        spec: of the supernet.
        segments: cut out of it.
        trunk: what the first gate hands over for a batch of B images.
        logits: [B, num_classes] as a route answers, for the cascades.
    """
    outputs = _along_last_route(segments, trunk)
    routers = _routers(spec, segments, outputs)
    return {kind: _decisions(router, outputs, logits) for kind, router in routers.items()}


def _along_last_route(segments: CutSegments, trunk: TrunkOutput) -> list[TrunkOutput]:
    """What every gate hands over on the path of the last route."""
    outputs = [trunk]
    for gate, branches in enumerate(segments.tree.gates[1:], start=1):
        outputs.append(segments.upto_gate(gate, branches.node_of[-1], outputs[-1].features))
    return outputs


def _routers(spec: SupernetSpec, segments: CutSegments, outputs: list[TrunkOutput]) -> dict[str, Router]:
    tree = segments.tree
    num_routes = tree.num_routes
    routes = tuple(range(num_routes))
    rich = [sum(output.evidence(part).shape[1] for part in RICH_EVIDENCE) for output in outputs]
    hidden = [output.hidden.shape[1] for output in outputs]
    answer = num_answer_features(spec.num_classes) + hidden[0]
    price = _zeros(num_routes)
    linear = [Head(_zeros(gate.num_choices, size)) for gate, size in zip(tree.gates, hidden, strict=True)]
    deep = [_perceptron(gate.num_choices, size) for gate, size in zip(tree.gates, rich, strict=True)]
    # Only the nodes on the last route's path are asked, so that the others may borrow their heads.
    offsets = tuple((_zeros(gate.num_choices),) * gate.num_nodes for gate in tree.gates)
    by_node = [
        tuple((head,) * gate.num_nodes for head, gate in zip(heads, tree.gates, strict=True))
        for heads in (linear, deep)
    ]
    return {
        "gate": GateRouter(_zeros(num_routes, hidden[0]), price, routes),
        "evidence_gate": EvidenceGateRouter(_perceptron(num_routes, rich[0]), price, routes, 0),
        "gates": GatesRouter(tree, routes, by_node[0], offsets),
        "evidence_gates": GatesRouter(tree, routes, by_node[1], offsets, RICH_EVIDENCE),
        "cascade": CascadeRouter(0, num_routes - 1, 0.5),
        "learned_cascade": LearnedCascadeRouter(
            0, _perceptron(num_routes, answer), price, routes, spec.num_classes, CASCADE_EVIDENCE
        ),
    }


def _zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def _perceptron(num_options: int, num_features: int) -> Head:
    units = HIDDEN_UNITS
    return Head(_zeros(num_options, units), _zeros(num_options), _zeros(units, num_features), _zeros(units))


def _decisions(router: Router, outputs: list[TrunkOutput], logits: torch.Tensor) -> Callable[[], object]:
    """All decisions of one router, each as dynamic inference asks for it and takes its answer to the host."""
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
