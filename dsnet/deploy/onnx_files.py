"""The ONNX graphs of a bundle: their files, and the segments that an engine runs from them.

The folder `onnx` of a bundle, and `onnx_int8` with quantised graphs (`dsnet.deploy.int8`), has a
graph for every segment up to a gate, and one for the rest of every route after the first gate.
Where a router decides at several gates, or there are many routes, there is a graph for every
segment between gates instead, so that routes share them. A router that decides once also has a
graph of everything up to and with its decision, so that an image costs one call for each route that
it runs. `graphs.json` lists the graphs with their SHA-256.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from dsnet.deploy.engines import Graph
from dsnet.deploy.segments import Entry, EntryOutput, run_rest
from dsnet.errors import CheckpointError
from dsnet.files import atomic_write_json, file_sha256, read_object, understood
from dsnet.image_size import ImageSize
from dsnet.routers.base import Router
from dsnet.space.route_tree import RouteTree

if TYPE_CHECKING:
    from onnx import ModelProto

    from dsnet.deploy.engines import Engine
    from dsnet.deploy.onnx_graphs import SegmentGraphs
    from dsnet.network.supernet import Supernet

FOLDER = "onnx"
"""Name of the folder in a bundle."""
LISTING = "graphs.json"
VERSION = 1
MANY_ROUTES = 8
"""Number of routes above which they share graphs, because each graph has weights of its own."""
MANY_ROUTERS = 8
"""Number of routers above which they have no graphs of their own, for the same reason."""


TensorCall = Callable[[Float[Tensor, "batch ..."]], list[Float[Tensor, "batch ..."]]]
"""A graph with one input: a tensor on the CPU -> its outputs."""


def write_graphs(supernet: Supernet, routers: Sequence[Router], image_size: ImageSize, folder: Path) -> SegmentGraphs:
    """Write the ONNX graphs of a supernet.

    Args:
        supernet: on the CPU; every member is a route.
        routers: the routers that run with the graphs.
        image_size: size of the images.
        folder: receives the files.

    Returns:
        the graphs, from which others can be taken.

    Raises:
        DsnetError: the packages are missing, or the network cannot be exported.
    """
    from dsnet.deploy.onnx_graphs import SegmentGraphs

    graphs = SegmentGraphs.of(supernet, needed_parts(routers), image_size, deciding_routers(routers))
    store_graphs(graphs, routers, folder)
    return graphs


def needed_parts(routers: Sequence[Router]) -> list[str]:
    """The parts of the evidence that any of the routers reads, sorted."""
    return sorted({part for router in routers for part in router.needs})


def deciding_routers(routers: Sequence[Router]) -> Sequence[Router]:
    """The routers whose decisions are in the graphs: all, or none where there are too many."""
    return routers if len(routers) <= MANY_ROUTERS else ()


def store_graphs(graphs: SegmentGraphs, routers: Sequence[Router], folder: Path) -> None:
    """Divide exported graphs into the files that `GraphSegments` opens.

    Args:
        graphs: exported for the `deciding_routers`, with the parts of the evidence that `routers`
            read.
        routers: the routers that run with the graphs.
        folder: receives the files.
    """
    from dsnet.deploy.onnx_graphs import first_route

    parts, tree = needed_parts(routers), graphs.names.tree
    has_tails = tree.num_routes <= MANY_ROUTES and all(router.num_gates == 1 for router in routers)
    written = {}
    for name, model in _graphs(graphs, has_tails, parts):
        file = folder / f"{name}.onnx"
        file.write_bytes(model.SerializeToString())
        written[name] = {"input": model.graph.input[0].name, "sha256": file_sha256(file)}
    for number, router in enumerate(deciding_routers(routers)):
        if entry_name(number) in written:
            written[entry_name(number)]["after"] = first_route(router)
    atomic_write_json(
        folder / LISTING, {"version": VERSION, "evidence": parts, "has_tails": has_tails, "graphs": written}
    )


def open_model(model: ModelProto, engine: Engine, threads: int) -> TensorCall:
    """Open a graph with one input in an engine.

    Args:
        model: the graph.
        engine: the engine.
        threads: threads of one call.
    """
    with TemporaryDirectory(prefix="dsnet-graph-") as folder:
        file = Path(folder) / "graph.onnx"
        file.write_bytes(model.SerializeToString())
        return _on_tensors(engine.open(file, threads), model.graph.input[0].name)


def _on_tensors(graph: Graph, input_name: str) -> TensorCall:
    return lambda x: [torch.from_numpy(value) for value in graph({input_name: x.contiguous().numpy()})]


def _graphs(graphs: SegmentGraphs, has_tails: bool, parts: Sequence[str]) -> Iterator[tuple[str, ModelProto]]:
    """Every graph with its name."""
    tree = graphs.names.tree
    for gate, branches in enumerate(tree.gates[:1] if has_tails else tree.gates):
        for node in range(branches.num_nodes):
            yield segment_name(gate, node), graphs.segment(gate, node, parts)
    for route in range(tree.num_routes):
        yield (tail_name(route), graphs.tail(route)) if has_tails else (head_name(route), graphs.head(route))
    for number in sorted({decision.router for decision in graphs.names.decisions}):
        entry = graphs.entry(number)
        if entry is not None:
            yield entry_name(number), entry


def segment_name(gate: int, node: int) -> str:
    """The name of the graph that ends at a node of a gate; the first one is `segment-0-0`."""
    return f"segment-{gate}-{node}"


def tail_name(route: int) -> str:
    """The name of the graph of everything after the first gate of a route."""
    return f"tail-{route}"


def head_name(route: int) -> str:
    """The name of the graph of everything after the last gate of a route."""
    return f"head-{route}"


def entry_name(router: int) -> str:
    """The name of the graph of everything up to the decision of a router."""
    return f"entry-{router}"


@dataclass(frozen=True)
class GraphOutput:
    """The output of a segment; see `dsnet.network.supernet.TrunkOutput`."""

    features: Float[Tensor, "batch ..."]
    parts: Mapping[str, Float[Tensor, "batch _features"]]

    def evidence(self, part: str) -> Float[Tensor, "batch features"]:
        """One part of the evidence that the graph gives."""
        return self.parts[part]


class GraphSegments:
    """Segments that an engine runs; see `dsnet.deploy.segments.Segments`.

    The graphs are opened once; calls from several threads are allowed.
    """

    is_channels_last = False

    def __init__(self, folder: Path, tree: RouteTree, routers: Sequence[Router], engine: Engine, threads: int) -> None:
        """Open all graphs.

        Args:
            folder: the folder with the graphs.
            tree: the tree of the bundle's routes.
            routers: those for which the graphs were written, in their order.
            engine: the engine.
            threads: threads of one call.

        Raises:
            CheckpointError: a file is missing or is not the one that was exported.
        """
        self._tree = tree
        self._listing = _listing(folder)
        self.shares_segments = not self._listing["has_tails"]
        self._graphs = {
            name: _on_tensors(engine.open(folder / f"{name}.onnx", threads), own["input"])
            for name, own in self._listing["graphs"].items()
        }

        self._routers = tuple(routers)

    def entry(self, router: Router) -> Entry | None:
        """See `Segments.entry`; for the routers for which the graphs were written."""
        number = next((index for index, own in enumerate(self._routers) if own is router), None)
        graph = None if number is None else self._graphs.get(entry_name(number))
        if number is None or graph is None:
            return None
        after = self._listing["graphs"][entry_name(number)].get("after")
        return partial(_run_entry, graph, after)

    @cached_property
    def _parts(self) -> tuple[str, ...]:
        return tuple(self._listing["evidence"])

    def upto_gate(self, gate: int, node: int, x: Float[Tensor, "batch ..."]) -> GraphOutput:
        """See `Segments.upto_gate`."""
        features, *parts = self._graphs[segment_name(gate, node)](x)
        return GraphOutput(features, dict(zip(self._parts, parts, strict=True)))

    def head(self, route: int, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        """See `Segments.head`."""
        (logits,) = self._graphs[head_name(route)](x)
        return logits

    def rest(self, gate: int, route: int, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        """See `Segments.rest`."""
        if not self.shares_segments:
            (logits,) = self._graphs[tail_name(route)](x)
            return logits
        return run_rest(self, self._tree, gate, route, x)

    def check_mode(self) -> None:
        """Do nothing: graphs are always in eval mode."""


def _run_entry(graph: TensorCall, after: int | None, images: Tensor) -> EntryOutput:
    features, routes, *logits = graph(images)
    return EntryOutput(features, routes.tolist(), None if after is None else (after, logits[0]))


def _listing(folder: Path) -> Mapping[str, Any]:
    """The list of graphs, whose files are compared with their hashes."""
    path = folder / LISTING
    listing = read_object(path)
    if listing.get("version") != VERSION:
        raise CheckpointError(f"{path}: version {listing.get('version')!r}, but this release reads {VERSION}")
    with understood(path):
        recorded = {name: str(own["sha256"]) for name, own in listing["graphs"].items()}
    for name, sha256 in recorded.items():
        file = folder / f"{name}.onnx"
        if not file.is_file() or file_sha256(file) != sha256:
            raise CheckpointError(f"{file}: missing, or not the file that was exported; export the bundle again")
    return listing
