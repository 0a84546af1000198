"""The parts of the dynamic network and the static sub-networks as graphs of an inference engine, to
be timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from jaxtyping import Float
from torch import Tensor

from dsnet.deploy.engines import Engine
from dsnet.deploy.onnx_files import GraphOutput, TensorCall, open_model
from dsnet.deploy.onnx_graphs import SegmentGraphs, first_route
from dsnet.image_size import ImageSize
from dsnet.network.supernet import Supernet
from dsnet.routers.base import Router

if TYPE_CHECKING:
    from onnx import ModelProto

HIDDEN = "hidden"
"""The part of the evidence that the graph of the trunk gives, as the trunk of torch does; the
other parts are pooled by the decisions."""


@dataclass(frozen=True)
class EntryGraph:
    """The graph of everything up to the decision of a router."""

    model: ModelProto
    first: str | None
    """The route that it runs before the decision, which reads its answer; None if it runs none."""


@dataclass(frozen=True)
class PartGraphs:
    """Graphs that are timed; every one takes batches of any size."""

    trunk: ModelProto
    """Images -> features and hidden vector of the first gate."""
    tails: Mapping[str, ModelProto]
    """Route -> its features of the first gate -> logits."""
    whole: Mapping[str, ModelProto]
    """Static sub-network -> images -> logits, without any gate."""
    entries: Mapping[str, EntryGraph] = field(default_factory=dict)
    """Kind of router -> images -> features of the first gate and its routes. A kind whose decisions
    cannot be in a graph, because there are several or they cannot be traced, has none."""

    @classmethod
    def of(cls, supernet: Supernet, image_size: ImageSize, routers: Mapping[str, Router] | None = None) -> PartGraphs:
        """Export every part.

        Args:
            supernet: trained and recalibrated, on the CPU; not changed.
            image_size: size of the images.
            routers: a router of each kind whose decision is timed.

        Raises:
            DsnetError: the packages are missing, or the network cannot be exported.
        """
        routers = routers or {}
        needed = {part for router in routers.values() for part in router.needs}
        graphs = SegmentGraphs.of(supernet, _parts(needed), image_size, list(routers.values()))
        routes = [subnet.name for subnet in supernet.subnets]
        entries = {}
        for number, (kind, router) in enumerate(routers.items()):
            if (model := graphs.entry(number)) is not None:
                first = first_route(router)
                entries[kind] = EntryGraph(model, None if first is None else routes[first])
        return cls(
            entries=entries,
            trunk=graphs.segment(0, 0, (HIDDEN,)),
            tails={name: graphs.tail(k) for k, name in enumerate(routes)},
            whole={name: graphs.static(k) for k, name in enumerate(routes)},
        )


class TimedEntry(NamedTuple):
    """Everything up to the decision of a router, ready to run."""

    call: TensorCall
    """Images -> features of the first gate, routes, and the answer of `first`, if any."""
    first: str | None
    """See `EntryGraph.first`."""


@dataclass(frozen=True)
class EngineParts:
    """Graphs that are ready to run; every one takes a batch on the CPU."""

    trunk: Callable[[Float[Tensor, "batch ..."]], GraphOutput]
    """Images -> features and hidden vector of the first gate."""
    tails: Mapping[str, Callable[[Float[Tensor, "batch ..."]], Float[Tensor, "batch classes"]]]
    """Route -> its features of the first gate -> logits."""
    whole: Mapping[str, Callable[[Float[Tensor, "batch ..."]], Float[Tensor, "batch classes"]]]
    """Static sub-network -> images -> logits, as one graph without any gate."""
    entries: Mapping[str, TimedEntry]
    """Kind of router -> everything up to its decision, as one graph."""

    @classmethod
    def open(
        cls, supernet: Supernet, image_size: ImageSize, engine: Engine, threads: int, routers: Mapping[str, Router]
    ) -> EngineParts:
        """Export every part, and open it in an engine.

        Args:
            supernet: trained and recalibrated, on the CPU; not changed.
            image_size: size of the images.
            engine: the engine.
            threads: threads of one call.
            routers: see `PartGraphs.of`.

        Raises:
            DsnetError: the packages are missing, or the network cannot be exported.
        """
        graphs = PartGraphs.of(supernet, image_size, routers)
        return cls(
            trunk=_trunk(open_model(graphs.trunk, engine, threads)),
            tails={name: _only(open_model(model, engine, threads)) for name, model in graphs.tails.items()},
            whole={name: _only(open_model(model, engine, threads)) for name, model in graphs.whole.items()},
            entries={
                kind: TimedEntry(open_model(entry.model, engine, threads), entry.first)
                for kind, entry in graphs.entries.items()
            },
        )


def _parts(needed: set[str]) -> tuple[str, ...]:
    """The parts of the evidence that the graphs have."""
    return (HIDDEN, *sorted(needed - {HIDDEN}))


def _trunk(call: TensorCall) -> Callable[[Tensor], GraphOutput]:
    def run(images: Tensor) -> GraphOutput:
        features, hidden = call(images)
        return GraphOutput(features, {HIDDEN: hidden})

    return run


def _only(call: TensorCall) -> Callable[[Tensor], Tensor]:
    return lambda x: call(x)[0]
