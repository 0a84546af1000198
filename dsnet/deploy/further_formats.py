"""A bundle in the formats of other programs: whole classifiers of one image, and static
sub-networks, each checked with the bundle's examples.

Every file takes pixels, uint8 of the bundle's shape (format `onnx_photo`: a photo of any size), and
nothing else of the bundle is needed to run it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor, nn

from dsnet.deploy.bundle import (
    Bundle,
    Examples,
    StoredParts,
    compare_examples,
    follow,
    load_bundle,
    stored_examples,
    stored_parts,
)
from dsnet.deploy.engines import TORCH, Graph, graph_engines
from dsnet.deploy.materialize import materialize
from dsnet.deploy.one_image import PIXELS, Normalize, on_pixels, single_graphs, torch_program
from dsnet.deploy.onnx_graphs import SegmentGraphs, traced
from dsnet.deploy.photo_input import PHOTO, check_photos, with_photo_input
from dsnet.errors import VerificationError
from dsnet.image_size import image_size_of
from dsnet.network.precision import exact_float32
from dsnet.routers.base import Router

if TYPE_CHECKING:
    from onnx import ModelProto

ONE = "classifier"
"""Name of the file of a bundle with one operating point; of several, each has the name of its
point."""
ONNX, PROGRAM = ".onnx", ".pt2"
"""Suffixes of ONNX graphs and of programs of torch."""
THREADS = 1
"""Threads of an engine for the check of a file."""
MEAN_PIXEL_TOLERANCE = 4.0
"""Mean difference of pixels, 0..255, that a resizing inside of a graph may have: the centre is cut
out at whole pixels, and engines round differently."""
_LARGER = (150, 131)
"""Width and height of the photos with which it is checked."""

Run = Callable[[UInt8[Tensor, "1 channels height width"]], tuple[Float[Tensor, "1 classes"], Int64[Tensor, " 1"]]]
"""A classifier of one image: pixels -> logits and route."""


def write_single(path: Path, folder: Path) -> None:
    """Write one ONNX graph for each operating point (`dsnet.deploy.one_image`).

    Args:
        path: the bundle's folder.
        folder: receives the files.

    Raises:
        ConfigError: a router cannot be one graph.
        DsnetError: the packages are missing, or the network cannot be exported.
    """
    for name, model in _single_graphs(stored_parts(path)):
        (folder / f"{name}{ONNX}").write_bytes(model.SerializeToString())


def write_photo(path: Path, folder: Path) -> None:
    """Write one ONNX graph for each operating point that takes a photo of any size.

    Arguments and errors: as `write_single`; ConfigError also where the images are no RGB photos.
    """
    parts = stored_parts(path)
    decoder = check_photos(parts.photos)
    for name, model in _single_graphs(parts):
        whole = with_photo_input(model, PIXELS, decoder)
        (folder / f"{name}{ONNX}").write_bytes(whole.SerializeToString())


def write_program(path: Path, folder: Path) -> None:
    """Write one program of `torch.export` for each operating point.

    Arguments and errors: as `write_single`.
    """
    parts = stored_parts(path)
    for name, router in _named(parts):
        program = torch_program(parts.supernet, router, parts.normalization, parts.image_shape)
        torch.export.save(program, folder / f"{name}{PROGRAM}")


def write_static(path: Path, folder: Path) -> None:
    """Write every route as a static network for batches of any size, without any gate: an ONNX
    graph and a program of `torch.export`.

    Arguments and errors: as `write_single`.
    """
    parts = stored_parts(path)
    graphs = SegmentGraphs.of(parts.supernet, (), image_size_of(parts.image_shape))
    for route, subnet in enumerate(parts.supernet.subnets):
        model = on_pixels(graphs.static(route), parts.normalization)
        (folder / f"{subnet.name}{ONNX}").write_bytes(model.SerializeToString())
        network = materialize(parts.supernet, subnet, fold_bn=True)
        module = nn.Sequential(Normalize(parts.normalization), network).eval()
        example = torch.zeros(2, *parts.image_shape, dtype=torch.uint8)
        program = traced(module, example, {0: torch.export.Dim("batch")})
        torch.export.save(program, folder / f"{subnet.name}{PROGRAM}")


def check_single(path: Path, folder: Path) -> int:
    """Run the examples with the ONNX graphs in every engine that is installed.

    Args:
        path: the bundle's folder.
        folder: the folder of the files.

    Returns:
        The number of examples.

    Raises:
        VerificationError: a file is missing, or gives another route or logit.
    """
    return _check_classifiers(path, folder, ONNX, lambda file: [partial(_run_graph, graph) for graph in _opened(file)])


def check_program(path: Path, folder: Path) -> int:
    """The same for programs of torch.

    Arguments and errors: as `check_single`.
    """
    return _check_classifiers(path, folder, PROGRAM, lambda file: [torch.export.load(file).module()])


def check_photo(path: Path, folder: Path) -> int:
    """Run photos, which are enlarged examples, with the ONNX graphs in ONNX Runtime: the pixels
    inside the graph must be near those of the bundle's decoder, and routes and logits those that
    the bundle gives for these pixels.

    OpenVINO resizes without antialiasing, so that large photos would look different to the network.

    Arguments and errors: as `check_single`.
    """
    bundle, count = load_bundle(path, engine=TORCH), 0
    for examples in stored_examples(bundle):
        own, count = bundle.at(examples.point), len(examples.images)
        file = _file(bundle, folder, examples.point, ONNX)
        for graph in _opened(file, only="onnxruntime"):
            for image in examples.images:
                photo = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(_LARGER, Image.Resampling.BICUBIC)
                logits, route, pixels = map(torch.from_numpy, graph({PHOTO: np.asarray(photo)}))
                wanted = bundle.photo_decoder.of_photo(photo)
                away = float((pixels[0].float() - wanted.float()).abs().mean())
                if not away <= MEAN_PIXEL_TOLERANCE:
                    raise VerificationError(
                        f"{folder}: the pixels of a photo differ by {away:.2g} of 255 in the mean, more than {MEAN_PIXEL_TOLERANCE:g}"
                    )
                answer = own.net(own.normalization.apply(pixels))
                expected = Examples(examples.point, pixels, answer.routes, answer.logits)
                _compare(own, str(folder), expected, logits, route)
    return count


def check_static(path: Path, folder: Path) -> int:
    """Run the examples with every static network, as ONNX graph and as program, against the
    network itself.

    Arguments and errors: as `check_single`.
    """
    bundle, parts = load_bundle(path, engine=TORCH), stored_parts(path)
    images = next(stored_examples(bundle)).images
    for route, subnet in enumerate(parts.supernet.subnets):
        with torch.inference_mode():
            logits = materialize(parts.supernet, subnet)(parts.normalization.apply(images))
        routes = torch.full((len(images),), route)
        runs = [
            lambda pixels, graph=graph: torch.from_numpy(next(iter(graph({PIXELS: pixels.numpy()}))))
            for graph in _opened(_existing(folder / f"{subnet.name}{ONNX}"))
        ]
        runs.append(torch.export.load(_existing(folder / f"{subnet.name}{PROGRAM}")).module())
        for run in runs:
            compare_examples(
                str(folder), bundle.route_names, Examples(subnet.name, images, routes, logits), routes, run(images)
            )
    return len(images)


@exact_float32()
@torch.no_grad()
def _check_classifiers(path: Path, folder: Path, suffix: str, opened: Callable[[Path], Sequence[Run]]) -> int:
    bundle, count = load_bundle(path, engine=TORCH), 0
    for examples in stored_examples(bundle):
        count = len(examples.images)
        if count == 0:
            continue
        file = _file(bundle, folder, examples.point, suffix)
        for run in opened(file):
            answers = [run(image[None]) for image in examples.images]
            logits, routes = (torch.cat(values) for values in zip(*answers, strict=True))
            _compare(bundle.at(examples.point), str(file), examples, logits, routes)
    return count


def _compare(bundle: Bundle, where: str, expected: Examples, logits: Tensor, routes: Tensor) -> None:
    """Compare answers with expected ones; where the routes differ, and the router's decision is a
    tie, the logits must be those of the route that was taken."""
    wanted, wanted_logits = expected.routes.clone(), expected.logits.clone()
    for route in routes[routes != wanted].unique().tolist():
        rows = (routes == route) & (wanted != route)
        again_logits, again_routes = follow(bundle, expected.images[rows], route)
        wanted[rows], wanted_logits[rows] = again_routes, again_logits
    own = Examples(expected.point, expected.images, wanted, wanted_logits)
    compare_examples(where, bundle.route_names, own, routes, logits)


def _named(parts: StoredParts) -> Iterator[tuple[str, Router]]:
    """The names of the files, and their routers."""
    for point in parts.points:
        yield (ONE if len(parts.points) == 1 else point.name), point.router


def _file(bundle: Bundle, folder: Path, point: str, suffix: str) -> Path:
    """The file of an operating point."""
    return _existing(folder / f"{ONE if len(bundle.operating_points) == 1 else point}{suffix}")


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise VerificationError(f"{file}: missing; export the bundle again")
    return file


def _single_graphs(parts: StoredParts) -> Iterator[tuple[str, ModelProto]]:
    names, routers = zip(*_named(parts), strict=True)
    yield from zip(names, single_graphs(parts.supernet, routers, parts.normalization, parts.image_shape), strict=True)


def _opened(file: Path, only: str = "") -> list[Graph]:
    """A graph in every engine that is installed, or in one of them alone."""
    engines = [engine for engine in graph_engines() if engine.is_installed and only in ("", engine.name)]
    return [engine.open(file, THREADS) for engine in engines]


def _run_graph(graph: Graph, pixels: Tensor) -> tuple[Tensor, Tensor]:
    logits, route = graph({PIXELS: pixels.numpy()})
    return torch.from_numpy(logits), torch.from_numpy(route)
