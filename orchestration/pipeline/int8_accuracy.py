"""The measurement of a bundle in int8: its accuracy, with routing tables of its int8 graphs, beside
the controls in int8, and its time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsnet.data.tensors import TensorData
from dsnet.deploy.bundle import Bundle, bundle_with_graphs, stored_parts
from dsnet.deploy.engines import TORCH, graph_engines
from dsnet.deploy.int8 import write_int8_graphs
from dsnet.deploy.layout import INT8
from dsnet.deploy.onnx_files import GraphSegments, needed_parts
from dsnet.deploy.precisions import accuracy_sentence, store_accuracy
from dsnet.errors import VerificationError
from dsnet.image_size import image_size_of
from dsnet.measure.evaluate import EVALUATION_BATCH, GivenSegments, build_routing_table
from dsnet.measure.latency import device_name
from dsnet.network.precision import exact_float32
from dsnet.network.supernet import Supernet, restrict
from dsnet.routers.base import Router
from dsnet.routing.routing_table import RoutingTable
from dsnet.routing.table_routing import run_on_table
from dsnet.space.route_tree import RouteTree
from orchestration.pipeline.int8_latency import latency_sentences, time_precisions
from orchestration.prepare.preparation import Prepared, other_latency_settings
from orchestration.results.run import RunResults
from orchestration.runs.manifest import Manifest
from search.front.precisions import RunOnTable, StaticTables, line_routes, precision_claims, static_claims

MAX_DIFFERENT = 0.01
"""Largest share of the images that grouped inference may route or classify differently than the
table says. The sums of integers are equal, but float32 values between them may differ in the last
bit with the size of a group, and be rounded to another step of an activation."""


@dataclass(frozen=True)
class BundleSource:
    """The run of which a bundle was made."""

    prepared: Prepared
    results: RunResults
    supernet: Supernet
    """The run's trained supernet, with all routes of its tables."""
    routers: Mapping[str, Router]
    """The routers of the operating points by name, over these routes."""


def measure_int8(path: Path, folder: Path, source: BundleSource, say: Callable[[str], None]) -> None:
    """Measure a bundle with its int8 graphs, and write `accuracy.json` beside them.

    On `val`, and on `test` where the claims of a point hold it, every route runs on every image,
    and each router is scored on this table, whose evidence is that of these graphs. The static
    sub-networks beside it are those of the bundle and those on the static line of the run, in int8
    too. Reading `test` is counted in the manifest of the run.

    Args:
        path: the bundle's folder.
        folder: with the graphs.
        source: the run.
        say: called with a sentence for each point.

    Raises:
        VerificationError: grouped inference does not give what the table says.
    """
    bundle = bundle_with_graphs(path, folder, graph_engines()[0], INT8)
    results, data = source.results, source.prepared.data
    key = results.done_key("table")
    tables = {"val": results.run.table(key, "val")}
    stored = stored_parts(path)
    if any("test" in point.claims for point in stored.points):
        Manifest(results.run.manifest_path).count_test_opening(f"export: {path.name} in {INT8}")
        tables["test"], data = results.run.sealed_table(key), source.prepared.open_test()
    float32 = {split: RoutingTable.load(table) for split, table in tables.items()}
    own = {split: _table(stored.supernet, bundle, data, split) for split in tables}
    further = further_static(source, bundle, data, float32["val"], list(tables))
    static = {split: StaticTables((own[split], *further.get(split, ()))) for split in tables}
    points: dict[str, dict[str, Any]] = {}
    for point in bundle.operating_points:
        points[point.name] = {}
        for split, table in own.items():
            run = RunOnTable(table, run_on_table(point.router, table))
            before = RunOnTable(float32[split], run_on_table(source.routers[point.name], float32[split]))
            points[point.name][split] = {
                **precision_claims(run, before, static["val"], static[split]),
                **_check_dynamic(bundle.at(point.name), run, data.images(split)),
            }
        name = path.name if len(bundle.operating_points) == 1 else f"{path.name}, {point.name}"
        say(f"{name} in {accuracy_sentence(INT8, points[point.name])}")
    order = source.supernet.subnets.by_madds(image_size_of(data.image_shape))
    widest = restrict(source.supernet, [order[-1]]).cpu().eval()
    settings = other_latency_settings(results.config, device="cpu", engine=TORCH)
    timed = time_precisions(path, folder, widest, data, settings)
    for point in bundle.operating_points:
        for sentence in latency_sentences(timed, point.name):
            say(sentence)
    if timed["unreliable"] is not None:
        say(f"these times are unreliable: {timed['unreliable']}")
    content = {
        "precision": INT8,
        "measured_on": device_name(torch.device("cpu"), graph_engines()[0]),
        "points": points,
        "latency": timed,
        "static": {split: static_claims(static[split], float32[split]) for split in tables},
    }
    store_accuracy(folder, content)


def _table(supernet: Supernet, bundle: Bundle, data: TensorData, split: str) -> RoutingTable:
    """The routing table of a bundle's own segments."""
    parts = needed_parts([point.router for point in bundle.operating_points])
    return build_routing_table(
        supernet, data, split, bundle.normalization, given=GivenSegments(bundle.net.segments, parts)
    )


def further_static(
    source: BundleSource, bundle: Bundle, data: TensorData, val: RoutingTable, splits: Sequence[str]
) -> dict[str, tuple[RoutingTable, ...]]:
    """The int8 tables of the sub-networks on the static line of the run that a bundle does not
    have, which are quantised as the bundle's are, but not kept.

    Args:
        source: the run.
        bundle: the bundle, in int8.
        data: the images of the splits and of `gate`.
        val: the run's table of `val`.
        splits: the splits.

    Returns:
        one table for each split; nothing if the bundle has all of them.
    """
    routes = line_routes(val, bundle.route_names)
    if not routes:
        return {}
    supernet = restrict(source.supernet, routes).cpu().eval()
    with TemporaryDirectory(prefix="dsnet-static-") as name:
        write_int8_graphs(supernet, [], bundle.normalization, data, Path(name))
        segments = GraphSegments(
            Path(name), RouteTree.of(supernet.subnets), [], graph_engines()[0], torch.get_num_threads()
        )
    return {
        split: (build_routing_table(supernet, data, split, bundle.normalization, given=GivenSegments(segments, [])),)
        for split in splits
    }


@exact_float32()
@torch.inference_mode()
def _check_dynamic(bundle: Bundle, told: RunOnTable, images: Tensor) -> dict[str, float]:
    """Run the dynamic network on all images, grouped by route, and compare it with the table;
    returns the shares of the images that take another route and get another class.

    Raises:
        VerificationError: a share is above `MAX_DIFFERENT`.
    """
    outputs = [bundle.net(bundle.normalization.apply(part.cpu())) for part in images.split(EVALUATION_BATCH)]
    routes = torch.cat([output.routes for output in outputs]).numpy()
    classes = torch.cat([output.logits.argmax(1) for output in outputs]).numpy()
    rows = np.arange(len(routes))
    shares = {
        "other_route_when_grouped": float((routes != told.run.routes).mean()),
        "other_class_when_grouped": float((classes != told.table.predicted[rows, told.run.routes]).mean()),
    }
    if max(shares.values()) > MAX_DIFFERENT:
        raise VerificationError(
            f"{bundle.path}: in {bundle.precision}, grouped inference on {told.table.split} gives another route for "
            f"{100 * shares['other_route_when_grouped']:.2g} % and another class for {100 * shares['other_class_when_grouped']:.2g} % "
            f"of the images than the routing table of the same graphs; at most {100 * MAX_DIFFERENT:g} % may differ"
        )
    return shares
