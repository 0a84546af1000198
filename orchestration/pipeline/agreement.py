"""Run the frozen front on the sealed test split, and compare the result of every image with the
routing tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsnet.data.normalization import Normalization
from dsnet.deploy.dynamic import DynamicNet
from dsnet.deploy.engines import Engine, timing_engine
from dsnet.deploy.materialize import materialize
from dsnet.deploy.onnx_files import GraphSegments, open_model, write_graphs
from dsnet.deploy.segments import Segments
from dsnet.errors import VerificationError
from dsnet.image_size import ImageSize, image_size_of
from dsnet.measure.latency import device_name, time_interleaved, waiter
from dsnet.measure.latency_table import MachineLoad, Timing
from dsnet.measure.settings import LatencySettings
from dsnet.network.precision import exact_float32
from dsnet.network.supernet import Supernet
from dsnet.routers.base import Router
from dsnet.routing.retrace import Retrace
from dsnet.routing.routing_table import RoutingTable
from dsnet.routing.table_routing import run_on_table
from dsnet.routing.table_run import TableRun
from dsnet.space.route_tree import RouteTree
from orchestration.results.verified import Agreement, DynamicLatency

CLASS_TIE = 1e-4
"""Difference between the two largest probabilities below which they count as a numerical tie."""
SINGLE_IMAGES = 32
"""Images per timed repeat at batch size 1, one after the other, because images take different
routes."""
NUM_BATCHES = 3
"""Batches per timed repeat at larger batch sizes."""
TIMING_SEED = 0
"""Seed of the draw of the timed images."""
MAX_NAMED = 5


@exact_float32()
@torch.inference_mode()
def check_agreement(
    slot: int,
    supernet: Supernet,
    router: Router,
    table: RoutingTable,
    images: Tensor,
    normalization: Normalization,
    batch_size: int = 256,
) -> Agreement:
    """Run a router through grouped dynamic inference and compare route, class and MAdds of every
    image with the table.

    Args:
        slot: the router's trial, for messages.
        supernet: trained and recalibrated.
        router: chooses the routes.
        table: routing table of the same images, in the same order.
        images: uint8 [N, C, H, W].
        normalization: normalisation with which the supernet was trained.
        batch_size: images at a time.

    Raises:
        VerificationError: an image differs without a numerical tie; the message names images.
    """
    device = next(supernet.parameters()).device
    net = DynamicNet(supernet, router, image_size=image_size_of(images.shape))
    outputs = [net(normalization.apply(part.to(device))) for part in images.split(batch_size)]
    routes = torch.cat([output.routes for output in outputs]).cpu().numpy()
    classes = torch.cat([output.logits.argmax(1) for output in outputs]).cpu().numpy()
    madds = torch.cat([output.madds for output in outputs]).cpu().numpy()
    told_run = run_on_table(router, table)
    rows = np.arange(table.num_images)
    same_route = routes == told_run.routes
    same_class = classes == table.predicted[rows, routes]
    # Each kind of difference is excused by its own kind of tie: an undecided router does not
    # explain a wrong class on the route that ran.
    retraced = _retraced(router, table, told_run, routes)
    fine_class = same_class | (table.margin[rows, routes] < CLASS_TIE)
    wrong = np.flatnonzero(~((routes == retraced.routes) & fine_class & (madds == retraced.madds)))
    if len(wrong):
        predicted = table.predicted[rows, told_run.routes]
        told = [f"{table.routes[told_run.routes[row]]} -> class {predicted[row]}" for row in wrong[:MAX_NAMED]]
        ran = [f"{table.routes[routes[row]]} -> class {classes[row]}" for row in wrong[:MAX_NAMED]]
        raise VerificationError(_mismatch(slot, wrong, table, told, ran))
    num_ties = int((~(same_route & same_class)).sum())
    correct = classes == table.labels
    return Agreement(slot, table.num_images, num_ties, float(correct.mean()), float(madds.mean() / 1e6))


class _Retraced(NamedTuple):
    routes: NDArray[np.int64]
    """Routes [N]."""
    madds: NDArray[np.int64]
    """MAdds [N]."""


def _retraced(router: Router, table: RoutingTable, told: TableRun, ran: NDArray[np.int64]) -> _Retraced:
    """Replay the table with ties broken towards the routes [N] that really ran; it equals the real
    run if only ties explain the differences."""
    routes, madds = told.routes.copy(), told.madds.copy()
    for route in np.unique(ran[ran != told.routes]):
        again = run_on_table(Retrace(router, int(route), table.tree), table)
        rows = (ran == route) & (ran != told.routes)
        routes[rows], madds[rows] = again.routes[rows], again.madds[rows]
    return _Retraced(routes, madds)


def _mismatch(slot: int, wrong: NDArray[np.intp], table: RoutingTable, told: Sequence[str], ran: Sequence[str]) -> str:
    named = "; ".join(
        f"image {table.image_ids[row]}: expected {expected}, got {met}"
        for row, expected, met in zip(wrong, told, ran, strict=False)
    )
    more = f"; and {len(wrong) - MAX_NAMED} more" if len(wrong) > MAX_NAMED else ""
    return (
        f"trial-{slot:04d}: {len(wrong)} of {table.num_images} images of {table.split} differ between the routing table and the actual "
        f"run ({named}{more}). The table or the weights have changed; delete the table folder of the run and launch again."
    )


@torch.inference_mode()
def time_front(
    supernet: Supernet,
    routers: Mapping[int, Router],
    images: Tensor,
    normalization: Normalization,
    settings: LatencySettings,
    before_each: Callable[[], None] = lambda: None,
    split: str = "test",
) -> DynamicLatency:
    """Time every router's dynamic network and the static extremes, interleaved, on real images.

    Args:
        supernet: trained and recalibrated.
        routers: by slot.
        images: uint8 [N, C, H, W] of a split: routes depend on the images.
        normalization: normalisation with which the supernet was trained.
        settings: device, engine, threads, batch sizes, repeats.
        before_each: called, untimed, before every timed call; it may raise to abort.
        split: name of the split of these images.

    Raises:
        ConfigError: the package of the engine is not installed.
        DsnetError: the network cannot be exported for the engine.
    """
    device = torch.device(settings.device)
    supernet = supernet.to(device).eval()
    order = supernet.subnets.by_madds(image_size_of(images.shape))
    engine = timing_engine(settings.engine)
    if engine is None:
        networks = _in_torch(supernet)
    else:
        networks = _in_engine(supernet, list(routers.values()), image_size_of(images.shape), engine, settings.threads)
    nets: dict[str, Callable[[Tensor], object]] = {}
    if routers:
        first = next(iter(routers.values()))
        shared = DynamicNet(supernet, first, image_size=image_size_of(images.shape), segments=networks.segments)
        nets |= {str(slot): shared.with_router(router) for slot, router in routers.items()}
    nets["widest"], nets["cheapest"] = networks.static(order[-1]), networks.static(order[0])
    synchronize = waiter(device)
    timings: dict[int, dict[str, Timing]] = {}
    threads_before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        for size in settings.batch_sizes:
            batches = [normalization.apply(part.to(device)) for part in drawn_batches(images, size)]
            calls = {name: over_batches(net, batches) for name, net in nets.items()}
            measured = time_interleaved(
                calls,
                repeats=settings.repeats,
                warmup=settings.warmup,
                synchronize=synchronize,
                before_each=before_each,
            )
            count = len(batches)
            timings[size] = {
                name: Timing(t.median_ms / count, t.iqr_ms / count, t.repeats) for name, t in measured.items()
            }
    finally:
        torch.set_num_threads(threads_before)
    return DynamicLatency(
        device_name(device, engine),
        settings.threads,
        {size: {slot: row[str(slot)] for slot in routers} for size, row in timings.items()},
        {size: row["widest"] for size, row in timings.items()},
        {size: row["cheapest"] for size, row in timings.items()},
        split=split,
        load=MachineLoad.now(),
    )


class _Networks(NamedTuple):
    """The networks of one engine."""

    segments: Segments | None
    """Segments for a dynamic network; None for those of the supernet's own weights."""
    static: Callable[[int], Callable[[Tensor], object]]
    """Route -> its static sub-network."""


def _in_torch(supernet: Supernet) -> _Networks:
    return _Networks(None, lambda route: materialize(supernet, supernet.subnets[route], fold_bn=True))


def _in_engine(
    supernet: Supernet, routers: Sequence[Router], image_size: ImageSize, engine: Engine, threads: int
) -> _Networks:
    """The graphs that a bundle with these routers has, and static sub-networks without any gate."""
    with TemporaryDirectory(prefix="dsnet-graphs-") as name:
        folder = Path(name)
        graphs = write_graphs(supernet, routers, image_size, folder)
        segments = GraphSegments(folder, RouteTree.of(supernet.subnets), routers, engine, threads)
    return _Networks(segments, lambda route: open_model(graphs.static(route), engine, threads))


def drawn_batches(images: Tensor, size: int) -> list[Tensor]:
    """Randomly drawn batches (a split may be sorted by class, and routes depend on the image):
    `SINGLE_IMAGES` of one image, or `NUM_BATCHES` larger ones."""
    count = SINGLE_IMAGES if size == 1 else NUM_BATCHES
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(TIMING_SEED))
    rows = order[torch.arange(size * count) % len(images)]
    return list(images[rows].split(size))


def over_batches(net: Callable[[Tensor], object], batches: list[Tensor]) -> Callable[[], object]:
    """A call that runs a network on each of several batches."""

    def run() -> None:
        for batch in batches:
            net(batch)

    return run
