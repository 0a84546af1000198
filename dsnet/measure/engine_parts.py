"""The parts of the dynamic network and the static sub-networks as graphs of an inference engine, to
be timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from dsnet.deploy.engines import Engine
from dsnet.deploy.onnx_files import GraphOutput, TensorCall, open_model
from dsnet.deploy.onnx_graphs import SegmentGraphs
from dsnet.network.supernet import Supernet

if TYPE_CHECKING:
    from onnx import ModelProto

HIDDEN = "hidden"
"""The part of the evidence that the graph of the trunk gives, as the trunk of torch does; the
other parts are pooled by the decisions."""


@dataclass(frozen=True)
class PartGraphs:
    """Graphs that are timed; every one takes batches of any size."""

    trunk: ModelProto
    """Images -> features and hidden vector of the first gate."""
    tails: Mapping[str, ModelProto]
    """Route -> its features of the first gate -> logits."""
    whole: Mapping[str, ModelProto]
    """Static sub-network -> images -> logits, without any gate."""

    @classmethod
    def of(cls, supernet: Supernet, image_size: int) -> PartGraphs:
        """Export every part.

        Args:
            supernet: trained and recalibrated, on the CPU; not changed.
            image_size: side in pixels.

        Raises:
            DsnetError: the packages are missing, or the network cannot be exported.
        """
        graphs = SegmentGraphs.of(supernet, (HIDDEN,), image_size)
        routes = [subnet.name for subnet in supernet.subnets]
        return cls(
            trunk=graphs.segment(0, 0),
            tails={name: graphs.tail(k) for k, name in enumerate(routes)},
            whole={name: graphs.static(k) for k, name in enumerate(routes)},
        )


@dataclass(frozen=True)
class EngineParts:
    """Graphs that are ready to run; every one takes a batch on the CPU."""

    trunk: Callable[[Float[Tensor, "batch ..."]], GraphOutput]
    """Images -> features and hidden vector of the first gate."""
    tails: Mapping[str, Callable[[Float[Tensor, "batch ..."]], Float[Tensor, "batch classes"]]]
    """Route -> its features of the first gate -> logits."""
    whole: Mapping[str, Callable[[Float[Tensor, "batch ..."]], Float[Tensor, "batch classes"]]]
    """Static sub-network -> images -> logits, as one graph without any gate."""

    @classmethod
    def open(cls, supernet: Supernet, image_size: int, engine: Engine, threads: int) -> EngineParts:
        """Export every part, and open it in an engine.

        Args:
            supernet: trained and recalibrated, on the CPU; not changed.
            image_size: side in pixels.
            engine: the engine.
            threads: threads of one call.

        Raises:
            DsnetError: the packages are missing, or the network cannot be exported.
        """
        graphs = PartGraphs.of(supernet, image_size)
        return cls(
            trunk=_trunk(open_model(graphs.trunk, engine, threads)),
            tails={name: _only(open_model(model, engine, threads)) for name, model in graphs.tails.items()},
            whole={name: _only(open_model(model, engine, threads)) for name, model in graphs.whole.items()},
        )


def _trunk(call: TensorCall) -> Callable[[Tensor], GraphOutput]:
    def run(images: Tensor) -> GraphOutput:
        features, hidden = call(images)
        return GraphOutput(features, {HIDDEN: hidden})

    return run


def _only(call: TensorCall) -> Callable[[Tensor], Tensor]:
    return lambda x: call(x)[0]
