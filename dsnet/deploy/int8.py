"""The segments of a bundle in int8: static quantisation by ONNX Runtime, calibrated on `gate`.

The exported graph of all segments is quantised once and then divided, so that the trunk has the
same numbers in every file, and so that every route is calibrated with the features that reach it.
Convolutions and matrix products of the network are quantised; the classifiers, the layers between a
pooling and the evidence of a gate (attention), and the decisions themselves stay in float32, so
that a decision is not quantised beyond the features that it reads.

Activations are uint8 with an offset: ONNX Runtime leaves most convolutions of int8 activations in
float32 on x86, while it runs those of uint8 in integers everywhere. Weights are int8 in -64..64
with one scale per output channel, because x86 processors without VNNI add pairs of products in 16
bits: 2 * 255 * 64 fits, 2 * 255 * 127 does not, and would be cut off. With this range every
processor computes the same sums.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from dsnet.data.normalization import Normalization
from dsnet.data.tensors import TensorData
from dsnet.deploy.bundle import bundle_with_graphs, check_graphs, load_bundle, stored_examples, stored_parts
from dsnet.deploy.engines import TORCH, graph_engines
from dsnet.deploy.layout import INT8
from dsnet.deploy.onnx_files import deciding_routers, needed_parts, store_graphs
from dsnet.deploy.onnx_graphs import IMAGES, Names, SegmentGraphs
from dsnet.deploy.operating_points import prefix_of
from dsnet.deploy.precisions import store_answers
from dsnet.errors import DsnetError
from dsnet.image_size import image_size_of
from dsnet.network.supernet import Supernet
from dsnet.routers.base import Router

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

NUM_CALIBRATION_IMAGES = 512
"""Images of `gate` from which the ranges of activations are taken, drawn with `CALIBRATION_SEED`;
all of them if there are fewer."""
CALIBRATION_SEED = 0
_BATCH = 32
_PRODUCTS = ("Conv", "Gemm", "MatMul")
_QUANTIZED = (*_PRODUCTS, "Relu", "Clip")
"""Operations that are quantised; activations are merged into the products before them."""
_POOLINGS = ("ReduceMean", "ReduceMax", "GlobalAveragePool", "GlobalMaxPool", "AveragePool", "MaxPool")


def write_int8(path: Path, folder: Path, data: TensorData) -> None:
    """Write the ONNX graphs of a bundle in int8, and the answers that they give to its examples.

    Equal bundles and images give equal files.

    Args:
        path: the bundle's folder.
        folder: receives the files.
        data: the images of the run, with `gate`.

    Raises:
        DsnetError: the packages are missing, or the network cannot be exported or quantised.
    """
    stored = stored_parts(path)
    write_int8_graphs(stored.supernet, [point.router for point in stored.points], stored.normalization, data, folder)
    _store_answers(path, folder)


def write_int8_graphs(
    supernet: Supernet, routers: Sequence[Router], normalization: Normalization, data: TensorData, folder: Path
) -> None:
    """Write the graphs of a supernet in int8; as `dsnet.deploy.onnx_files.write_graphs`.

    Args:
        supernet: on the CPU; every member is a route.
        routers: the routers that run with the graphs.
        normalization: the normalisation of the images.
        data: the images of the run, with `gate`.
        folder: receives the files.

    Raises:
        DsnetError: as `write_int8`.
    """
    # With `hidden`, the layers of an attention are found also where no router reads their result.
    parts = sorted({*needed_parts(routers), "hidden"})
    graphs = SegmentGraphs.of(supernet, parts, image_size_of(data.image_shape), deciding_routers(routers))
    images = normalization.apply(calibration_images(data.images("gate")))
    store_graphs(quantized(graphs, images), routers, folder)


def calibration_images(
    images: UInt8[Tensor, "images channels height width"],
) -> UInt8[Tensor, "drawn channels height width"]:
    """Draw the images for calibration, `NUM_CALIBRATION_IMAGES` or all of them."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(CALIBRATION_SEED))
    return images[order[:NUM_CALIBRATION_IMAGES].sort().values.to(images.device)].cpu()


def quantized(graphs: SegmentGraphs, images: Float[Tensor, "images channels height width"]) -> SegmentGraphs:
    """Quantise the network of exported graphs.

    Args:
        graphs: in float32; with `hidden` among the parts of the evidence.
        images: normalised images for calibration; each takes every route.

    Raises:
        DsnetError: a package is missing, or the network cannot be quantised.
    """
    try:
        import onnx
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    except ImportError as error:
        raise DsnetError(
            f"format onnx_int8 needs further packages ({error}): pip install 'dsnet-orch[deploy]'"
        ) from error
    kept = _kept_in_float(graphs.whole.graph, graphs.names)
    if all(node.op_type not in _PRODUCTS or node.name in kept for node in graphs.whole.graph.node):
        raise DsnetError("the network cannot be quantised: it has no convolution or matrix product but the classifiers")

    class Reader(CalibrationDataReader):
        """Batches of the images."""

        def __init__(self) -> None:
            self.batches = iter(images.split(_BATCH))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {IMAGES: batch.numpy()}

    with TemporaryDirectory(prefix="dsnet-int8-") as name, _without_advice():
        source, target = Path(name) / "float32.onnx", Path(name) / "int8.onnx"
        source.write_bytes(graphs.whole.SerializeToString())
        try:
            quantize_static(
                source,
                target,
                Reader(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(_QUANTIZED),
                nodes_to_exclude=sorted(kept),
                per_channel=True,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
        except Exception as error:  # an operation that it does not know may raise anything
            raise DsnetError(f"the network cannot be quantised: {type(error).__name__}: {error}") from error
        model = onnx.load(target)
    _quantize_inputs_of_segments(model, graphs.names)
    return replace(graphs, whole=model)


def _kept_in_float(graph: GraphProto, names: Names) -> set[str]:
    """Names of the nodes that are not quantised: those on which neither features nor logits depend,
    those between a pooling and the evidence, those that read the evidence, because a product rounds
    its input, and the classifiers."""
    maker = {output: node for node in graph.node for output in node.output}
    gates = [(gate, node) for gate, branches in enumerate(names.tree.gates) for node in range(branches.num_nodes)]
    features = [names.features(*place) for place in gates]
    logits = [names.logits(route) for route in range(names.tree.num_routes)]
    evidence = {names.evidence(*place, part) for place in gates for part in names.parts}
    network = {node.name for node in _before(maker, [*features, *logits])}
    read = _before(maker, evidence, is_end=lambda node: node.op_type in _POOLINGS)
    last = _before(maker, logits, is_end=lambda node: node.op_type in _PRODUCTS)
    beyond = (node for node in graph.node if not evidence.isdisjoint(node.input))
    return {node.name for node in graph.node} - network | {node.name for node in (*read, *beyond, *last)}


def _before(
    maker: dict[str, NodeProto], tensors: Collection[str], is_end: Callable[[NodeProto], bool] = lambda node: False
) -> Iterator[NodeProto]:
    """The nodes on which tensors depend, back to the first ones for which `is_end` holds."""
    waiting, seen = list(tensors), set(tensors)
    while waiting:
        node = maker.get(waiting.pop())
        if node is None:  # an input or a weight
            continue
        yield node
        further = () if is_end(node) else set(node.input) - seen
        waiting += further
        seen |= set(further)


def _quantize_inputs_of_segments(model: ModelProto, names: Names) -> None:
    """Let the segments after a gate quantise its features themselves: between two files they are
    float32, and a product whose input is not quantised in the same file would run in float32.

    The features are multiples of the step already, so that this changes no value.
    """
    from onnx import helper

    nodes = model.graph.node
    maker = {output: node for node in nodes for output in node.output}
    for gate, branches in enumerate(names.tree.gates):
        for place in range(branches.num_nodes):
            tensor = names.features(gate, place)
            node = maker[tensor]
            if node.op_type != "DequantizeLinear":
                continue
            rounded, again = f"{tensor}_int8", f"{tensor}_again"
            for other in nodes:
                other.input[:] = [again if name == tensor else name for name in other.input]
            step = node.input[1:]
            position = [id(each) for each in nodes].index(id(node))
            nodes.insert(
                position + 1, helper.make_node("QuantizeLinear", [tensor, *step], [rounded], f"{rounded}_node")
            )
            nodes.insert(position + 2, helper.make_node("DequantizeLinear", [rounded, *step], [again], f"{again}_node"))


def _store_answers(path: Path, folder: Path) -> None:
    """Store the routes and logits of the examples, as ONNX Runtime gives them in int8."""
    bundle = bundle_with_graphs(path, folder, graph_engines()[0], INT8)
    answers: dict[str, Tensor] = {}
    for number, examples in enumerate(stored_examples(load_bundle(path, engine=TORCH))):
        output = bundle.at(examples.point).net(bundle.normalization.apply(examples.images))
        answers |= {f"{prefix_of(number)}routes": output.routes.clone()}
        answers |= {f"{prefix_of(number)}logits": output.logits.clone()}
    store_answers(folder, answers)


def check_int8(path: Path, folder: Path) -> int:
    """Run the bundle's examples in int8, in every engine that is installed; returns their number.

    Raises:
        CheckpointError: a file is missing or is not the one that was exported.
        VerificationError: the answers differ by more than `check_bundle_examples` allows.
    """
    return check_graphs(path, folder, INT8)


@contextmanager
def _without_advice() -> Iterator[None]:
    """Without the quantiser's advice to run its own pre-processing, which folds what the exporter
    has folded already; it writes to the root logger."""

    def keeps(record: logging.LogRecord) -> bool:
        return "pre-processing before quantization" not in record.getMessage()

    root = logging.getLogger()
    root.addFilter(keeps)
    try:
        yield
    finally:
        root.removeFilter(keeps)
