"""ONNX graphs of the segments of a supernet between its gates, and of the decisions of routers.

All of them are exported as one graph, because most of the time of an export does not depend on its
size, and the graph is then divided by the names of its tensors. Every graph takes batches of any
size; BatchNorm is folded into the convolutions. The decisions are those of `Router.step`, traced.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn

from dsnet.deploy.segments import CutSegments
from dsnet.errors import DsnetError
from dsnet.image_size import ImageSize, height_and_width
from dsnet.network.blocks import fold_batch_norms
from dsnet.network.supernet import Supernet
from dsnet.routers.base import STOP, Evidence, Executed, Router
from dsnet.space.route_tree import RouteTree
from dsnet.wording import first_line

if TYPE_CHECKING:
    from onnx import ModelProto

IMAGES = "images"
"""Name of the input of the first segment: normalised images, float32 [B, C, H, W]."""
OPSET = 18
"""Version of the operators: the oldest in which the exporter writes."""
_log = logging.getLogger(__name__)
_EXAMPLES = 2
"""Images with which the network is traced; a batch of one could be taken for a constant."""


@dataclass(frozen=True)
class Decision:
    """A decision of a router for the images at a node of a gate."""

    router: int
    """The router's number."""
    gate: int
    node: int
    route: int
    """One of the router's routes through the node."""
    after: int | None = None
    """The route that has run before, whose answer it reads; None if none has run."""

    @property
    def name(self) -> str:
        """Name of its tensor: int64 [B] routes, or STOP."""
        return f"route_{self.router}_{self.gate}_{self.node}" + ("" if self.after is None else f"_after_{self.after}")


def first_route(router: Router) -> int | None:
    """The route that a router runs first for every image before it decides; None if it decides at
    once, or if this is not known."""
    first = getattr(router, "first", None)
    return first if router.max_runs == 2 and router.num_gates == 1 and isinstance(first, int) else None


def has_decisions(router: Router) -> bool:
    """Whether the decisions of a router can be in a graph: not where it has a single route, or runs
    several in an order that is not known."""
    return len(router.routes) > 1 and (router.max_runs == 1 or first_route(router) is not None)


def decisions(router: Router, number: int, tree: RouteTree) -> Iterator[Decision]:
    """The decisions of a router that can be in a graph, by gate and node."""
    if not has_decisions(router):
        return
    first = first_route(router)
    if first is not None:
        yield Decision(number, 0, 0, first, after=first)
    else:
        for gate in range(router.num_gates):
            node_of = tree.gates[gate].node_of
            yield from (
                Decision(number, gate, node, route)
                for node, route in sorted({node_of[route]: route for route in reversed(router.routes)}.items())
            )


@dataclass(frozen=True)
class Names:
    """Names of the tensors between segments."""

    tree: RouteTree
    parts: tuple[str, ...]
    """The parts of the evidence that are given at every gate."""
    decisions: tuple[Decision, ...] = ()

    def features(self, gate: int, node: int) -> str:
        """The features at a node of a gate, the input of the segments after it."""
        return f"features_{gate}_{node}"

    def evidence(self, gate: int, node: int, part: str) -> str:
        """A part of the evidence there."""
        return f"{part}_{gate}_{node}"

    def logits(self, route: int) -> str:
        """The logits of a route."""
        return f"logits_{route}"

    def before(self, gate: int, node: int) -> str:
        """The input of the segment that ends at a node of a gate."""
        if gate == 0:
            return IMAGES
        route = self.tree.gates[gate].node_of.index(node)
        return self.features(gate - 1, self.tree.gates[gate - 1].node_of[route])

    @property
    def outputs(self) -> Iterator[str]:
        """All outputs, in the order in which `_Segments` returns them."""
        for gate, branches in enumerate(self.tree.gates):
            for node in range(branches.num_nodes):
                yield self.features(gate, node)
                yield from (self.evidence(gate, node, part) for part in self.parts)
        yield from (self.logits(route) for route in range(self.tree.num_routes))
        yield from (decision.name for decision in self.decisions)


def folded_segments(supernet: Supernet, tree: RouteTree) -> CutSegments:
    """The segments of a supernet with BatchNorm folded in, for a trace: in the layout of plain
    modules, not in that of `CutSegments(fold_bn=True)`."""
    segments = CutSegments(supernet, tree, fold_bn=False)
    fold_batch_norms(segments)
    return segments


class _Segments(nn.Module):
    """All segments of a supernet in one module: images -> every output of `Names.outputs`."""

    def __init__(self, supernet: Supernet, names: Names, routers: Sequence[Router]) -> None:
        super().__init__()
        self.segments = folded_segments(supernet, names.tree)
        self.names = names
        # Routers keep tensors that they compute once; those of a trace must not stay in them.
        self.routers = copy.deepcopy(tuple(routers))

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> tuple[Tensor, ...]:
        """See the class."""
        tree, known = self.names.tree, {IMAGES: images}
        for gate, branches in enumerate(tree.gates):
            for node in range(branches.num_nodes):
                output = self.segments.upto_gate(gate, node, known[self.names.before(gate, node)])
                known[self.names.features(gate, node)] = output.features
                for part in self.names.parts:
                    known[self.names.evidence(gate, node, part)] = output.evidence(part)
        last = len(tree.gates) - 1
        for route, node in enumerate(tree.gates[last].node_of):
            known[self.names.logits(route)] = self.segments.head(route, known[self.names.features(last, node)])
        known |= {decision.name: self._decided(decision, known) for decision in self.names.decisions}
        # Copies, because an output that is an input, as at an entry gate, has no name of its own.
        return tuple(known[name].clone() for name in self.names.outputs)

    def _decided(self, decision: Decision, known: dict[str, Tensor]) -> Tensor:
        router, gate, node = self.routers[decision.router], decision.gate, decision.node
        parts = {part: known[self.names.evidence(gate, node, part)] for part in router.needs}
        logits = None if decision.after is None else known[self.names.logits(decision.after)]
        return decided(router, decision, parts, known[self.names.features(gate, node)], logits)


def decided(
    router: Router,
    decision: Decision,
    parts: Mapping[str, Float[Tensor, "batch _features"]],
    features: Float[Tensor, "batch ..."],
    logits: Float[Tensor, "batch classes"] | None,
) -> Int64[Tensor, " batch"]:
    """The result of a decision, int64 [B], so that it can be traced.

    Args:
        router: the router.
        decision: the decision.
        parts: the parts of the evidence there that the router reads.
        features: the features there.
        logits: those of `decision.after`; None if no route has run.
    """
    route = decision.route if decision.gate else STOP
    evidence = Evidence(parts, features.shape[0], features.device, decision.gate, route)
    if logits is None or decision.after is None:
        return router.step(evidence, [])
    return router.step(evidence, [Executed(evidence.same(decision.after), logits)])


@dataclass(frozen=True, eq=False)
class SegmentGraphs:
    """The exported graph of all segments, from which those of single segments are taken."""

    names: Names
    whole: ModelProto

    @classmethod
    @torch.inference_mode(False)  # the exporter takes no tensors of inference mode
    @torch.no_grad()
    def of(
        cls,
        supernet: Supernet,
        parts: Sequence[str],
        image_size: ImageSize,
        routers: Sequence[Router] = (),
        *,
        at_every_gate: bool = False,
        must_decide: bool = False,
    ) -> SegmentGraphs:
        """Export the segments of a supernet, and the decisions of routers as far as they can be in
        a graph.

        Args:
            supernet: trained and recalibrated, on the CPU; not changed.
            parts: the parts of the evidence that the graphs give at every gate; with those that
                `routers` need.
            image_size: size of the images.
            routers: routers over the supernet's members.
            at_every_gate: whether the graphs also have the decisions of routers that decide at
                several gates.
            must_decide: whether decisions that cannot be traced are an error; else they are left
                out, and a warning is logged.

        Raises:
            DsnetError: the packages are missing, or the exporter does not know an operation.
        """
        tree = RouteTree.of(supernet.subnets)
        found = (
            each
            for number, router in enumerate(routers)
            if at_every_gate or router.num_gates == 1
            for each in decisions(router, number, tree)
        )
        names = Names(tree, tuple(parts), tuple(found))
        example = torch.zeros(_EXAMPLES, supernet.spec.in_channels, *height_and_width(image_size))

        def export(names: Names) -> SegmentGraphs:
            module = _Segments(supernet, names, routers).eval()
            return cls(names, _exported(module, example, [*names.outputs]))

        try:
            return export(names)
        except _NotTraceableError as error:
            if must_decide or not names.decisions:
                raise
            without = export(replace(names, decisions=()))
            _log.warning("%s; engines will ask the routers in Python, which is slower", error)
            return without

    def segment(self, gate: int, node: int, parts: Sequence[str] | None = None) -> ModelProto:
        """The segment that ends at a node of a gate: images, or features of the gate before -> its
        features and evidence.

        Args:
            gate: the gate.
            node: its node.
            parts: the parts of the evidence; None: all that were exported.
        """
        evidence = [self.names.evidence(gate, node, part) for part in (self.names.parts if parts is None else parts)]
        return self._part(self.names.before(gate, node), [self.names.features(gate, node), *evidence])

    def entry(self, router: int) -> ModelProto | None:
        """Everything up to the decision of a router that decides once: images -> features of the
        first gate and routes, int64 [B]. Where a route has run before it decides, the route may be
        STOP, and the logits of the route that has run come third.

        None for a router that decides at several gates, and for one without a decision in the
        graph.
        """
        own = [decision for decision in self.names.decisions if decision.router == router]
        if len({decision.gate for decision in own}) != 1:
            return None
        outputs = [self.names.features(0, 0), own[0].name]
        if own[0].after is not None:
            outputs.append(self.names.logits(own[0].after))
        return self._part(IMAGES, outputs)

    def head(self, route: int) -> ModelProto:
        """The last segment of a route: features of the last gate -> logits."""
        last = len(self.names.tree.gates) - 1
        node = self.names.tree.gates[last].node_of[route]
        return self._part(self.names.features(last, node), [self.names.logits(route)])

    def tail(self, route: int) -> ModelProto:
        """Everything after the first gate of a route: its features -> logits."""
        return self._part(self.names.features(0, 0), [self.names.logits(route)])

    def static(self, route: int) -> ModelProto:
        """A whole route without any decision: images -> logits."""
        return self._part(IMAGES, [self.names.logits(route)])

    def _part(self, first: str, outputs: Sequence[str]) -> ModelProto:
        from onnx import checker
        from onnx.utils import Extractor

        model = Extractor(self.whole).extract_model([first], list(outputs))
        checker.check_model(model)
        return model


class _NotTraceableError(DsnetError):
    """A network or a decision that cannot be traced."""


def _exported(module: nn.Module, example: Tensor, outputs: Sequence[str]) -> ModelProto:
    model = to_onnx(traced(module, example, {0: torch.export.Dim("batch")}), IMAGES, outputs)
    _read_through_entry(model)
    return model


def to_onnx(program: torch.export.ExportedProgram, name: str, outputs: Sequence[str]) -> ModelProto:
    """The ONNX graph of a program with one input.

    Args:
        program: see `traced`.
        name: of the input.
        outputs: names of all outputs.

    Raises:
        DsnetError: the packages are missing, or the exporter does not know an operation.
    """
    try:
        with _without_notes():
            exported = torch.onnx.export(
                program,
                input_names=[name],
                output_names=list(outputs),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    except ImportError as error:
        raise DsnetError(f"ONNX files need further packages ({error}): pip install 'dsnet-orch[deploy]'") from error
    except torch.onnx.OnnxExporterError as error:
        raise DsnetError(f"the network cannot be exported to ONNX: {first_line(error)}") from error
    assert exported is not None
    model: ModelProto = exported.model_proto
    return model


def traced(
    module: nn.Module, example: Shaped[Tensor, "batch channels height width"], sizes: dict[int, Any] | None
) -> torch.export.ExportedProgram:
    """The program of a module with one input.

    Args:
        module: in eval mode.
        example: an input.
        sizes: dimensions of the input that may have other sizes; None: it has the example's.

    Raises:
        DsnetError: it cannot be traced, such as where a decision depends on values in Python.
    """
    try:
        return torch.export.export(module, (example,), dynamic_shapes=None if sizes is None else (sizes,), strict=False)
    except Exception as error:  # a user's network or router may raise anything
        raise _NotTraceableError(f"the network cannot be traced: {first_line(error)}") from error


def _read_through_entry(model: ModelProto) -> None:
    """Let every node read the features of an entry gate in place of the images, which are the same,
    so that the segments after this gate can be taken from the graph."""
    nodes = model.graph.node
    entry = next((node for node in nodes if node.op_type == "Identity" and node.input[0] == IMAGES), None)
    if entry is None:
        return
    nodes.remove(entry)
    for node in nodes:
        node.input[:] = [entry.output[0] if name == IMAGES else name for name in node.input]
    nodes.insert(0, entry)


@contextmanager
def _without_notes() -> Iterator[None]:
    """Without the exporter's notes about packages that are not installed and its own old calls."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)
