"""The time of a bundle in int8, beside that in float32 and beside the widest static sub-network of
its run in both, all timed together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor

from dsnet.data.normalization import Normalization
from dsnet.data.tensors import TensorData
from dsnet.deploy.bundle import bundle_with_graphs, stored_parts
from dsnet.deploy.engines import Engine, graph_engines
from dsnet.deploy.int8 import calibration_images, quantized
from dsnet.deploy.layout import FLOAT32, INT8
from dsnet.deploy.onnx_files import open_model, write_graphs
from dsnet.deploy.onnx_graphs import SegmentGraphs
from dsnet.image_size import image_size_of
from dsnet.measure.latency import device_name, time_rounds
from dsnet.measure.latency_table import MachineLoad, Timing, noise_of
from dsnet.measure.settings import LatencySettings
from dsnet.network.supernet import Supernet
from orchestration.pipeline.agreement import drawn_batches, over_batches
from search.front.statistics import bootstrap_interval

WIDEST = "widest"
"""The name of the static sub-network among those of the operating points."""
MIN_ROUNDS = 15
BUDGET_S = 20.0
"""Seconds for each batch size, beyond `MIN_ROUNDS` rounds."""
NUM_RESAMPLES = 1000

Nets = Mapping[str, Mapping[str, Callable[[Tensor], object]]]
"""Precision -> operating point or `WIDEST` -> network."""


def time_precisions(
    path: Path, folder: Path, widest: Supernet, data: TensorData, settings: LatencySettings
) -> dict[str, Any]:
    """Time the operating points of a bundle and a static sub-network in float32 and in int8,
    interleaved, on images of `val`, because routes depend on the images.

    Args:
        path: the bundle's folder.
        folder: with the int8 graphs.
        widest: a supernet whose only sub-network is the static one.
        data: the images of `val`, and of `gate` for the calibration of the static sub-network.
        settings: threads, batch sizes, repeats.

    Returns:
        the device, the threads, what was unreliable (None: nothing), and `ms`: batch size -> name
        -> the milliseconds of a batch in each precision, and int8 over float32 as `ratio` with its
        interval over the rounds.
    """
    engine = graph_engines()[0]
    stored = stored_parts(path)
    images = data.images("val").cpu()
    with TemporaryDirectory(prefix="dsnet-float32-") as name:
        routers = [point.router for point in stored.points]
        write_graphs(stored.supernet, routers, image_size_of(data.image_shape), Path(name))
        nets = {
            precision: _points_of(path, graphs, engine, precision, settings.threads)
            for precision, graphs in ((FLOAT32, Path(name)), (INT8, folder))
        }
    static = _static_in_both(widest, stored.normalization, data, engine, settings.threads)
    nets = {precision: {**nets[precision], WIDEST: static[precision]} for precision in nets}
    timings = {str(size): _timed(nets, stored.normalization, images, size, settings) for size in settings.batch_sizes}
    seen = [Timing(**row[precision]) for rows in timings.values() for row in rows.values() for precision in nets]
    return {
        "device": device_name(torch.device("cpu"), engine),
        "threads": settings.threads,
        "unreliable": noise_of(seen, MachineLoad.now()),
        "ms": timings,
    }


def latency_sentences(timed: Mapping[str, Any], point: str) -> list[str]:
    """The measured times of a point, a sentence for each batch size.

    Args:
        timed: result of `time_precisions`.
        point: name of the operating point.
    """
    told = []
    for size, rows in timed["ms"].items():
        own, widest = rows[point], rows[WIDEST]
        low, high = own["ratio_interval"]
        images = "one image" if size == "1" else f"{size} images"
        told.append(
            f"{images}: {INT8} takes {own['ratio']:.2f}x [{low:.2f}, {high:.2f}] the time of {FLOAT32} "
            f"({own[INT8]['median_ms']:.3g} ms and {own[FLOAT32]['median_ms']:.3g} ms; widest static sub-network "
            f"{widest[INT8]['median_ms']:.3g} ms and {widest[FLOAT32]['median_ms']:.3g} ms)"
        )
    return told


def _points_of(
    path: Path, graphs: Path, engine: Engine, precision: str, threads: int
) -> dict[str, Callable[[Tensor], object]]:
    bundle = bundle_with_graphs(path, graphs, engine, precision, threads)
    return {point.name: bundle.at(point.name).net for point in bundle.operating_points}


def _static_in_both(
    supernet: Supernet, normalization: Normalization, data: TensorData, engine: Engine, threads: int
) -> dict[str, Callable[[Tensor], object]]:
    float32 = SegmentGraphs.of(supernet, ["hidden"], image_size_of(data.image_shape))
    int8 = quantized(float32, normalization.apply(calibration_images(data.images("gate"))))
    return {
        precision: open_model(graphs.static(0), engine, threads)
        for precision, graphs in ((FLOAT32, float32), (INT8, int8))
    }


@torch.inference_mode()
def _timed(
    nets: Nets, normalization: Normalization, images: UInt8[Tensor, "N C H W"], size: int, settings: LatencySettings
) -> dict[str, Any]:
    batches = [normalization.apply(part) for part in drawn_batches(images, size)]
    calls = {
        f"{precision} {name}": over_batches(net, batches) for precision, of in nets.items() for name, net in of.items()
    }
    rounds = time_rounds(calls, repeats=max(MIN_ROUNDS, settings.repeats), warmup=settings.warmup, budget_s=BUDGET_S)
    ms = {name: np.array(values) / len(batches) for name, values in rounds.items()}
    rows: dict[str, Any] = {}
    for name in nets[FLOAT32]:
        float32, int8 = (ms[f"{precision} {name}"] for precision in (FLOAT32, INT8))
        ratio, interval = _ratio(int8, float32)
        summaries = Timing.by_call({FLOAT32: float32.tolist(), INT8: int8.tolist()})
        rows[name] = {
            **{precision: vars(timing) for precision, timing in summaries.items()},
            "ratio": ratio,
            "ratio_interval": interval,
        }
    return rows


def _ratio(top: NDArray[np.float64], bottom: NDArray[np.float64]) -> tuple[float, tuple[float, float]]:
    """The ratio of two medians, with its 95 % interval over the rounds, which are resampled
    jointly."""
    pairs = np.stack([top, bottom])
    drawn = np.random.default_rng(0).integers(pairs.shape[1], size=(NUM_RESAMPLES, pairs.shape[1]))
    medians = np.median(pairs[:, drawn], axis=-1)
    low, high = bootstrap_interval(medians[0] / medians[1])
    whole = np.median(pairs, axis=1)
    return float(whole[0] / whole[1]), (float(low), float(high))
