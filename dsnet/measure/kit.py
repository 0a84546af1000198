"""A folder that times the parts of a supernet on a device where dsnet-orch cannot run, and its
result.

The kit has the ONNX graphs of the trunk, of the rest of every route and of every static
sub-network, a description `kit.json` with the plan of the timing and the SHA-256 of every file,
example images with the outputs that they must give, and the script `time_kit.py`, which needs only
numpy and onnxruntime. The script writes `result.json`.

A kit holds no router, so that it serves every front of the supernet, and the time of a decision is
not in its result.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from dsnet.deploy.onnx_files import tail_name
from dsnet.deploy.onnx_graphs import OPSET
from dsnet.deploy.segments import CutSegments
from dsnet.errors import ConfigError, DataError
from dsnet.files import atomic_write_bytes, atomic_write_json, file_sha256, writing
from dsnet.image_size import ImageSize, height_and_width
from dsnet.measure.engine_parts import HIDDEN, PartGraphs
from dsnet.measure.latency import MIN_REPEATS, TRUNK, LatencySamples, Rounds
from dsnet.measure.latency_table import MachineLoad
from dsnet.measure.settings import LatencySettings
from dsnet.measure.time_kit import DESCRIPTION, KIT_VERSION
from dsnet.network.supernet import Supernet
from dsnet.space.route_tree import RouteTree

if TYPE_CHECKING:
    from onnx import ModelProto

SCRIPT = "time_kit.py"
EXAMPLES = "examples.npz"
TOLERANCE = 1e-3
"""Largest difference of an output on the device from the stored one, relative to the largest stored
value of this output."""
NUM_EXAMPLES = 2
"""Number of example images."""
IR_VERSION = 8
"""Version of the file format of the graphs: that of the first release with `OPSET`, so that an
older onnxruntime on the device can read them."""
IMAGES, FEATURES = "images", "features"
"""Names of the inputs that the script makes: random images, and the features that the trunk gives
for them."""


@dataclass(frozen=True)
class _KitGraph:
    """A graph of a kit."""

    name: str
    timed: str
    """Its name among the timed calls: `TRUNK`, or a route."""
    model: ModelProto
    feed: str
    """`IMAGES` or `FEATURES`."""
    example_outputs: tuple[str, ...]
    sizes: tuple[int, ...]
    """Numbers of images."""

    def describe(self) -> dict[str, Any]:
        """Its entry in the description."""
        return {
            "name": self.name,
            "file": f"{self.name}.onnx",
            "timed": self.timed,
            "input": self.model.graph.input[0].name,
            "outputs": [output.name for output in self.model.graph.output],
            "feed": self.feed,
            "example_input": self.feed,
            "example_outputs": list(self.example_outputs),
            "sizes": list(self.sizes),
        }


def write_kit(supernet: Supernet, image_size: ImageSize, settings: LatencySettings, folder: Path) -> Path:
    """Write a kit.

    Args:
        supernet: trained and recalibrated, on the CPU; not changed.
        image_size: size of the images.
        settings: sizes, repeats and warm-up; device, engine and threads are those of the device.
        folder: receives the kit; must be empty or not exist.

    Returns:
        the description.

    Raises:
        ConfigError: the folder has files in it.
        DsnetError: the packages are missing, or the network cannot be exported.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not an empty folder; name a new one")
    graphs = PartGraphs.of(supernet, image_size)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        copyfile(Path(__file__).with_name(SCRIPT), folder / SCRIPT)
        np.savez(folder / EXAMPLES, **_examples(supernet, image_size))  # type: ignore[arg-type]
    described = []
    for graph in _kit_graphs(graphs, settings):
        graph.model.ir_version = IR_VERSION
        described.append(graph.describe())
        atomic_write_bytes(folder / described[-1]["file"], graph.model.SerializeToString())
    files = [SCRIPT, EXAMPLES, *(graph["file"] for graph in described)]
    content = {
        "version": KIT_VERSION,
        "shape": [supernet.spec.in_channels, *height_and_width(image_size)],
        "opset": OPSET,
        "rounds": max(settings.repeats, MIN_REPEATS),
        "warmup": settings.warmup,
        "seed": 0,
        "tolerance": TOLERANCE,
        "examples": EXAMPLES,
        "graphs": described,
        "files": {name: file_sha256(folder / name) for name in files},
    }
    atomic_write_json(folder / DESCRIPTION, content)
    return folder / DESCRIPTION


def group_sizes(settings: LatencySettings) -> tuple[int, ...]:
    """The numbers of images for which parts are timed: those of the settings, up to the first one
    that reaches the largest batch."""
    largest = max(settings.batch_sizes)
    enough = next((size for size in settings.group_sizes if size >= largest), settings.group_sizes[-1])
    return tuple(size for size in settings.group_sizes if size <= enough)


def _kit_graphs(graphs: PartGraphs, settings: LatencySettings) -> Iterator[_KitGraph]:
    groups = group_sizes(settings)
    yield _KitGraph("trunk", TRUNK, graphs.trunk, IMAGES, (FEATURES, HIDDEN), groups)
    for k, (route, model) in enumerate(graphs.tails.items()):
        yield _KitGraph(tail_name(k), route, model, FEATURES, (_logits(k),), groups)
    for k, (route, model) in enumerate(graphs.whole.items()):
        yield _KitGraph(f"static-{k}", route, model, IMAGES, (_logits(k),), settings.batch_sizes)


def _logits(route: int) -> str:
    return f"logits_{route}"


@torch.inference_mode()
def _examples(supernet: Supernet, image_size: ImageSize) -> dict[str, NDArray[np.float32]]:
    """Random images, and what torch gives for them."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((NUM_EXAMPLES, supernet.spec.in_channels, *height_and_width(image_size)), generator=generator)
    trunk = CutSegments(supernet, RouteTree.of(supernet.subnets)).trunk(images)
    logits = {_logits(k): supernet(images, subnet) for k, subnet in enumerate(supernet.subnets.members)}
    outputs = {IMAGES: images, FEATURES: trunk.features, HIDDEN: trunk.evidence(HIDDEN), **logits}
    return {name: value.contiguous().numpy() for name, value in outputs.items()}


def read_result(path: Path, kits: Mapping[str, Mapping[str, Any]]) -> LatencySamples:
    """The times in a result of `time_kit.py`.

    Args:
        path: the file.
        kits: the descriptions of the known kits by their SHA-256.

    Raises:
        DataError: the file is damaged, incomplete, of another version or of another kit, or the
            graphs gave other outputs on the device.
    """
    data = _read(path)
    if data.get("version") != KIT_VERSION:
        raise DataError(
            f"{path}: version {data.get('version')!r}, but this release reads {KIT_VERSION}; "
            "export the kit again with this release, and run its script"
        )
    kit = kits.get(str(data.get("kit_sha256")))
    if kit is None:
        known = ", ".join(sha[:12] for sha in kits) or "none"
        raise DataError(
            f"{path}: result of kit {str(data.get('kit_sha256'))[:12]}, but the kits of this run are: {known}; "
            "name the run from which the kit was exported, or export a kit of this run and run its script"
        )
    try:
        _check_outputs(path, kit, data["deviations"])
        device, load = data["device"], data["load_average"]
        num_cores = int(device["cores"])
        return LatencySamples(
            device=f"{device['cpu']}, {num_cores} cores, ONNX Runtime {device['onnxruntime']}",
            threads=int(data["threads"]),
            whole=_rounds(path, [graph for graph in kit["graphs"] if _is_static(graph)], data["timings"]),
            parts=_rounds(path, [graph for graph in kit["graphs"] if not _is_static(graph)], data["timings"]),
            load=None if load is None else MachineLoad(float(load[0]), num_cores),
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DataError(
            f"{path}: an entry is missing or of another type ({error!r}); copy the file again, or run the script again"
        ) from error


def _is_static(graph: Mapping[str, Any]) -> bool:
    return graph["feed"] == IMAGES and graph["timed"] != TRUNK


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}; name the result.json that {SCRIPT} has written"
        ) from error
    except (ValueError, RecursionError) as error:
        reason = str(error) or "nested too deeply"
        raise DataError(f"{path} is not valid JSON ({reason}); copy the file from the device again") from error
    if not isinstance(data, dict):
        raise DataError(f"{path} is no result of {SCRIPT}; name the result.json that it has written")
    return data


def _check_outputs(path: Path, kit: Mapping[str, Any], deviations: Mapping[str, float]) -> None:
    for graph in kit["graphs"]:
        deviation = float(deviations[graph["name"]])
        if not deviation <= kit["tolerance"]:
            raise DataError(
                f"{path}: on the device the outputs of graph {graph['name']} are off by {deviation:.2g} of their largest value, "
                f"but at most {kit['tolerance']:g} is allowed; another version of onnxruntime there may help"
            )


def _rounds(path: Path, graphs: Sequence[Mapping[str, Any]], timings: Mapping[str, Any]) -> Rounds:
    """The times of graphs by number of images, checked."""
    found: dict[int, dict[str, tuple[float, ...]]] = {}
    for graph in graphs:
        for size in graph["sizes"]:
            times = timings.get(graph["name"], {}).get(str(size), [])
            where = f"{path}: graph {graph['name']} with {size} images"
            if len(times) < MIN_REPEATS:
                raise DataError(
                    f"{where} has {len(times)} rounds, but at least {MIN_REPEATS} are needed; run the script again to its end"
                )
            row = found.setdefault(size, {})
            row[graph["timed"]] = tuple(map(float, times))
            if not all(math.isfinite(ms) and ms >= 0 for ms in row[graph["timed"]]):
                raise DataError(f"{where} has a time that is no number of milliseconds; run the script again")
            if len(times) != len(next(iter(row.values()))):
                raise DataError(f"{where} has {len(times)} rounds, but other graphs have more or fewer; run it again")
    return found
