"""A whole dynamic classifier of one image as one file: an ONNX graph with `If` operators, and a
program of torch with `torch.cond`.

Both take the pixels of one image, uint8 [1, C, H, W] of the bundle's shape, and give its logits,
float32 [1, num_classes], and the route that gave them, int64 [1]. Nothing else of a bundle is
needed to run them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from dsnet.data.normalization import Normalization
from dsnet.deploy.onnx_graphs import (
    IMAGES,
    Decision,
    SegmentGraphs,
    decided,
    first_route,
    folded_segments,
    has_decisions,
    traced,
)
from dsnet.errors import ConfigError
from dsnet.image_size import image_size_of
from dsnet.network.supernet import Supernet
from dsnet.routers.base import STOP, Router
from dsnet.space.route_tree import RouteTree

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

PIXELS = "pixels"
"""Name of the input."""
OUTPUTS = ("logits", "route")
"""Names of the outputs."""


@dataclass(frozen=True)
class Branching:
    """A decision for one image, and what follows each of its results."""

    decision: Decision
    branches: tuple[tuple[tuple[int, ...], Branching | int], ...]
    """For each branch the results of the decision that lead to it, and the next decision or the
    route that is run to its end; `STOP` ends with the answer that there is."""


def branching(router: Router, tree: RouteTree, number: int = 0) -> Branching | int:
    """The decisions of a router for one image; a router with one route is that route.

    Args:
        router: the router.
        tree: the tree of the network's routes.
        number: the router's number in the names of its decisions.

    Raises:
        ConfigError: it runs several routes in an order that is not known beforehand.
    """
    if len(router.routes) == 1:
        return router.routes[0]
    if not has_decisions(router):
        raise ConfigError(
            f"a router of kind {router.kind} cannot be one graph: it runs up to {router.max_runs} routes in an order that is not "
            "known beforehand; use format onnx, where the host asks the router"
        )
    first = first_route(router)
    if first is not None:
        others = [route for route in router.routes if route != first]
        ends: list[tuple[tuple[int, ...], Branching | int]] = [((route,), route) for route in others]
        return Branching(Decision(number, 0, 0, first, first), (*ends, ((STOP,), STOP)))
    return _branching(router, tree, number, 0, router.routes)


def _branching(router: Router, tree: RouteTree, number: int, gate: int, routes: Sequence[int]) -> Branching:
    """The decision of a gate for images that may still take these routes."""
    decision = Decision(number, gate, tree.gates[gate].node_of[routes[0]], routes[0])
    if gate + 1 == router.num_gates:
        return Branching(decision, tuple(((route,), route) for route in routes))
    next_nodes = tree.gates[gate + 1].node_of
    groups = [
        tuple(route for route in routes if next_nodes[route] == node)
        for node in dict.fromkeys(next_nodes[route] for route in routes)
    ]
    return Branching(decision, tuple((group, _branching(router, tree, number, gate + 1, group)) for group in groups))


# ONNX


def single_graphs(
    supernet: Supernet, routers: Sequence[Router], normalization: Normalization, image_shape: tuple[int, int, int]
) -> Iterator[ModelProto]:
    """The ONNX graph of each router.

    Args:
        supernet: trained and recalibrated, on the CPU; every member is a route.
        routers: the routers.
        normalization: of the pixels; it becomes part of the graphs.
        image_shape: (channels, height, width).

    Raises:
        ConfigError: as `branching`.
        DsnetError: the packages are missing, or network or router cannot be exported.
    """
    tree = RouteTree.of(supernet.subnets)
    plans = [branching(router, tree, number) for number, router in enumerate(routers)]
    parts = sorted({part for router in routers for part in router.needs})
    graphs = SegmentGraphs.of(
        supernet, parts, image_size_of(image_shape), routers, at_every_gate=True, must_decide=True
    )
    gluing = _Gluing(graphs)
    for plan in plans:
        yield gluing.model(plan, normalization, image_shape)


def on_pixels(model: ModelProto, normalization: Normalization) -> ModelProto:
    """A graph whose input is pixels, uint8, in place of normalised images.

    Args:
        model: a graph with the input `IMAGES`; it is changed.
        normalization: of the pixels.
    """
    from onnx import TensorProto, helper

    graph = model.graph
    shape = [each.dim_param or each.dim_value for each in graph.input[0].type.tensor_type.shape.dim]
    nodes = [helper.make_node("Cast", [PIXELS], ["pixels_float"], to=TensorProto.FLOAT)]
    for kind, first, name, values, output in (
        ("Sub", "pixels_float", "pixel_mean", normalization.mean, "pixels_centred"),
        ("Div", "pixels_centred", "pixel_std", normalization.std, IMAGES),
    ):
        graph.initializer.append(helper.make_tensor(name, TensorProto.FLOAT, (1, len(values), 1, 1), values))
        nodes.append(helper.make_node(kind, [first, name], [output]))
    for place, node in enumerate(nodes):
        graph.node.insert(place, node)
    graph.input[0].CopyFrom(helper.make_tensor_value_info(PIXELS, TensorProto.UINT8, shape))
    return model


class _Gluing:
    """Puts the parts of an exported graph together again, with `If` operators at the decisions."""

    def __init__(self, graphs: SegmentGraphs) -> None:
        from onnx import helper
        from onnx.utils import Extractor

        self.names = graphs.names
        self.whole = graphs.whole
        self.make = helper
        self.extract = Extractor(graphs.whole).extract_model
        self.num_ends = 0

    def model(
        self, plan: Branching | int, normalization: Normalization, image_shape: tuple[int, int, int]
    ) -> ModelProto:
        """The whole graph."""
        from onnx import TensorProto, checker

        make = self.make
        graph = self._graph(plan, IMAGES, frozenset(), OUTPUTS)
        outputs = [
            make.make_tensor_value_info(OUTPUTS[0], TensorProto.FLOAT, (1, self.num_classes)),
            make.make_tensor_value_info(OUTPUTS[1], TensorProto.INT64, (1,)),
        ]
        inputs = [make.make_tensor_value_info(IMAGES, TensorProto.FLOAT, (1, *image_shape))]
        whole = make.make_graph(list(graph.node), "dsnet", inputs, outputs, list(graph.initializer))
        model = make.make_model(whole, opset_imports=self.whole.opset_import, ir_version=self.whole.ir_version)
        model = on_pixels(model, normalization)
        checker.check_model(model, full_check=True)
        return model

    @property
    def num_classes(self) -> int:
        """Number of classes, from the shape of the logits."""
        logits = next(value for value in self.whole.graph.output if value.name == self.names.logits(0))
        return int(logits.type.tensor_type.shape.dim[1].dim_value)

    def _graph(self, plan: Branching | int, first: str, known: frozenset[str], outputs: Sequence[str]) -> GraphProto:
        """A graph of what is left to do for one image.

        Args:
            plan: what is left.
            first: name of the tensor with which it begins.
            known: names of tensors that exist outside of the graph.
            outputs: names of the two outputs.
        """
        if isinstance(plan, int):
            return self._end(plan, first, known, outputs)
        decision, names = plan.decision, self.names
        features = names.features(decision.gate, decision.node)
        wanted = [features, decision.name]
        if decision.after is not None:
            wanted.append(names.logits(decision.after))
        nodes, weights = self._part(first, wanted, known)
        known = known | {name for node in nodes for name in node.output} | {weight.name for weight in weights}
        nodes += self._choice(plan, features, known, outputs, weights)
        return self._made(nodes, weights, outputs)

    def _choice(
        self, plan: Branching, features: str, known: frozenset[str], outputs: Sequence[str], weights: list[TensorProto]
    ) -> list[NodeProto]:
        """Operators that run the branch that was decided: a chain of `If`, the last branch without
        a condition. Adds its constants to `weights`."""
        (results, following), *others = plan.branches
        if following == STOP:
            after = plan.decision.after
            assert after is not None
            return self._answer(self.names.logits(after), after, outputs, weights)
        if not others:
            graph = self._graph(following, features, known, outputs)
            weights.extend(graph.initializer)
            return list(graph.node)
        self.num_ends += 1
        prefix = f"branch_{self.num_ends}"
        conditions = [f"{prefix}_is_{result}" for result in results]
        nodes = []
        for name, result in zip(conditions, results, strict=True):
            weights.append(self._integer(f"{name}_value", result))
            nodes.append(self.make.make_node("Equal", [plan.decision.name, f"{name}_value"], [name]))
        for name in conditions[1:]:
            nodes.append(self.make.make_node("Or", [conditions[0], name], [f"{conditions[0]}_or_{name}"]))
            conditions[0] = f"{conditions[0]}_or_{name}"
        own, rest = ([f"{prefix}_{kind}_{name}" for name in outputs] for kind in ("then", "else"))
        left = Branching(plan.decision, tuple(others))
        rest_weights: list[TensorProto] = []
        rest_nodes = self._choice(left, features, known, rest, rest_weights)
        nodes.append(
            self.make.make_node(
                "If",
                [conditions[0]],
                list(outputs),
                then_branch=self._graph(following, features, known, own),
                else_branch=self._made(rest_nodes, rest_weights, rest),
            )
        )
        return nodes

    def _end(self, route: int, first: str, known: frozenset[str], outputs: Sequence[str]) -> GraphProto:
        """A graph that runs a route to its end."""
        logits = self.names.logits(route)
        nodes, weights = self._part(first, [logits], known)
        nodes += self._answer(logits, route, outputs, weights)
        return self._made(nodes, weights, outputs)

    def _answer(self, logits: str, route: int, outputs: Sequence[str], weights: list[TensorProto]) -> list[NodeProto]:
        weights.append(self._integer(f"{outputs[1]}_value", route))
        return [
            self.make.make_node("Identity", [source], [output])
            for source, output in zip((logits, f"{outputs[1]}_value"), outputs, strict=True)
        ]

    def _part(
        self, first: str, wanted: Sequence[str], known: frozenset[str]
    ) -> tuple[list[NodeProto], list[TensorProto]]:
        """Operators and weights from a tensor to others, without what exists outside already."""
        graph = self.extract([first], list(wanted)).graph
        nodes = [node for node in graph.node if not known.issuperset(node.output)]
        return nodes, [weight for weight in graph.initializer if weight.name not in known]

    def _integer(self, name: str, value: int) -> TensorProto:
        from onnx import TensorProto

        return self.make.make_tensor(name, TensorProto.INT64, (1,), (value,))

    def _made(self, nodes: Sequence[NodeProto], weights: Sequence[TensorProto], outputs: Sequence[str]) -> GraphProto:
        from onnx import TensorProto

        types = (TensorProto.FLOAT, TensorProto.INT64)
        shapes: tuple[Any, Any] = ((1, self.num_classes), (1,))
        values = [
            self.make.make_tensor_value_info(name, kind, shape)
            for name, kind, shape in zip(outputs, types, shapes, strict=True)
        ]
        return self.make.make_graph(list(nodes), f"to_{outputs[0]}", [], values, list(weights))


# torch


class Normalize(nn.Module):
    """Normalisation of pixels as a module: uint8 [B, C, H, W] -> float32 of the same shape."""

    def __init__(self, normalization: Normalization) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        for name, values in (("mean", normalization.mean), ("std", normalization.std)):
            self.register_buffer(name, torch.tensor(values).reshape(1, -1, 1, 1))

    def forward(
        self, pixels: UInt8[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """See the class."""
        return (pixels.float() - self.mean) / self.std


class OneImage(nn.Module):
    """The program: pixels of one image -> logits and route."""

    def __init__(self, supernet: Supernet, router: Router, normalization: Normalization) -> None:
        """Build it.

        Args:
            supernet: as for `single_graphs`, as all arguments.
            router: the router.
            normalization: of the pixels.

        Raises:
            ConfigError: as `branching`.
        """
        super().__init__()
        tree = RouteTree.of(supernet.subnets)
        self.plan = branching(router, tree)
        self.segments = folded_segments(supernet, tree)
        self.router = copy.deepcopy(router)  # it keeps tensors that it computes once, also those of a trace
        _compute_cached(self.router, tree, *tree.gates)
        if isinstance(own_tree := getattr(self.router, "tree", None), RouteTree):
            _compute_cached(own_tree, *own_tree.gates)
        self.normalize = Normalize(normalization)

    def forward(
        self, pixels: UInt8[Tensor, "1 channels height width"]
    ) -> tuple[Float[Tensor, "1 classes"], Int64[Tensor, " 1"]]:
        """See the class."""
        return self._run(self.plan, 0, self.normalize(pixels))

    def _run(self, plan: Branching | int, gate: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Do what is left for one image; `x` is the input of the segment that ends at `gate`."""
        if isinstance(plan, int):
            return self.segments.rest(gate, plan, x), torch.full((1,), plan)
        decision = plan.decision
        output = self.segments.upto_gate(decision.gate, decision.node, x)
        after = decision.after
        logits = None if after is None else self.segments.rest(decision.gate + 1, after, output.features)
        chosen = decided(
            self.router, decision, {part: output.evidence(part) for part in self.router.needs}, output.features, logits
        )
        return self._choose(plan, plan.branches, chosen, output.features, logits)

    def _choose(
        self,
        plan: Branching,
        branches: Sequence[tuple[tuple[int, ...], Branching | int]],
        chosen: Tensor,
        features: Tensor,
        logits: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        (results, following), *others = branches

        def run(features: Tensor, chosen: Tensor, *answer: Tensor) -> tuple[Tensor, Tensor]:
            after = plan.decision.after
            if following == STOP and after is not None:
                return answer[0].clone(), torch.full((1,), after)
            return self._run(following, plan.decision.gate + 1, features)

        def run_another(features: Tensor, chosen: Tensor, *answer: Tensor) -> tuple[Tensor, Tensor]:
            return self._choose(plan, others, chosen, features, answer[0] if answer else None)

        known = (features, chosen) if logits is None else (features, chosen, logits)
        if not others:
            return run(*known)
        is_own = torch.stack([chosen[0] == result for result in results]).any()
        found: tuple[Tensor, Tensor] = torch.cond(is_own, run, run_another, known)
        return found


def _compute_cached(*objects: object) -> None:
    """Compute the cached properties of objects, because a branch of `torch.cond` cannot."""
    for each in objects:
        for name, value in vars(type(each)).items():
            if isinstance(value, cached_property):
                getattr(each, name)


@torch.inference_mode(False)  # a program takes no tensors of inference mode
@torch.no_grad()
def torch_program(
    supernet: Supernet, router: Router, normalization: Normalization, image_shape: tuple[int, int, int]
) -> torch.export.ExportedProgram:
    """The program of `torch.export`; see `single_graphs` for arguments and errors."""
    module = OneImage(supernet, router, normalization).eval()
    return traced(module, torch.zeros(1, *image_shape, dtype=torch.uint8), None)
