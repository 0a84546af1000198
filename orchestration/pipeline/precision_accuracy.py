"""The accuracy of a bundle in another precision than float32: measured with routing tables of its
own graphs, beside the controls of that precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsnet.data.tensors import TensorData
from dsnet.deploy.bundle import Bundle, bundle_with_graphs, stored_parts
from dsnet.deploy.engines import graph_engines
from dsnet.deploy.onnx_files import needed_parts
from dsnet.deploy.precisions import accuracy_sentence, store_accuracy
from dsnet.errors import VerificationError
from dsnet.measure.evaluate import EVALUATION_BATCH, build_routing_table
from dsnet.measure.latency import device_name
from dsnet.network.precision import exact_float32
from dsnet.routers.base import Router
from dsnet.routing.routing_table import RoutingTable
from dsnet.routing.table_routing import run_on_table
from orchestration.prepare.preparation import Prepared
from orchestration.results.run import RunResults
from orchestration.runs.manifest import Manifest
from search.front.precisions import RunOnTable, line_without, precision_claims, static_claims

MAX_DIFFERENT = 0.01
"""Largest share of the images that grouped inference may route or classify differently than the
table says. The sums of integers are equal, but float32 values between them may differ in the last
bit with the size of a group, and be rounded to another step of an activation."""


def measure_precision(
    bundle: Path,
    folder: Path,
    precision: str,
    prepared: Prepared,
    results: RunResults,
    routers: Mapping[str, Router],
    say: Callable[[str], None],
) -> None:
    """Measure a bundle with the graphs of a precision, and write `accuracy.json` beside them.

    On `val`, and on `test` where the claims of a point hold it: every route runs on every image,
    and each router is scored on this table, whose evidence is that of these graphs. Reading `test`
    is counted in the manifest of the run.

    Args:
        bundle: the bundle's folder.
        folder: with the graphs.
        precision: their precision.
        prepared: the run's data.
        results: the run.
        routers: the routers of the points by name, over the routes of the run's tables.
        say: called with a sentence for each point.

    Raises:
        VerificationError: grouped inference does not give what the table says.
    """
    engine = graph_engines()[0]
    own = bundle_with_graphs(bundle, folder, engine, precision)
    key = results.done_key("table")
    tables = {"val": results.run.table(key, "val")}
    data = prepared.data
    if any("test" in point.claims for point in stored_parts(bundle).points):
        Manifest(results.run.manifest_path).count_test_opening(f"export: {bundle.name} in {precision}")
        tables["test"], data = results.run.sealed_table(key), prepared.open_test()
    before = {split: RoutingTable.load(path) for split, path in tables.items()}
    after = {split: _table(bundle, own, data, split) for split in tables}
    points: dict[str, dict[str, Any]] = {}
    for point in own.operating_points:
        points[point.name] = {}
        for split, table in after.items():
            run = RunOnTable(table, run_on_table(point.router, table))
            claims = precision_claims(
                run, RunOnTable(before[split], run_on_table(routers[point.name], before[split])), after["val"]
            )
            claims |= _check_dynamic(own.at(point.name), run, data.images(split), precision)
            points[point.name][split] = claims
        say(f"{bundle.name}{'' if len(routers) == 1 else f', {point.name}'} in {accuracy_sentence(precision, points[point.name])}")
    content = {
        "precision": precision,
        "measured_on": device_name(torch.device("cpu"), engine),
        "points": points,
        "static": {split: static_claims(after[split], before[split]) for split in tables},
        "not_in_static_line": list(line_without(own.route_names, before["val"])),
    }
    store_accuracy(folder, content)


def _table(path: Path, bundle: Bundle, data: TensorData, split: str) -> RoutingTable:
    """The routing table of a bundle's own segments."""
    parts = stored_parts(path)
    return build_routing_table(
        parts.supernet,
        data,
        split,
        bundle.normalization,
        segments=bundle.net.segments,
        parts=needed_parts([point.router for point in bundle.operating_points]),
    )


@exact_float32()
@torch.inference_mode()
def _check_dynamic(bundle: Bundle, told: RunOnTable, images: Tensor, precision: str) -> dict[str, float]:
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
            f"{bundle.path}: in {precision}, grouped inference on {told.table.split} gives another route for "
            f"{100 * shares['other_route_when_grouped']:.2g} % and another class for {100 * shares['other_class_when_grouped']:.2g} % "
            f"of the images than the routing table of the same graphs; at most {100 * MAX_DIFFERENT:g} % may differ"
        )
    return shares
