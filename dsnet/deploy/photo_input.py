"""Resizing and cropping of a photo inside an ONNX graph, so that one call takes a photo of any
size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dsnet.data.photos import PhotoDecoder
from dsnet.errors import ConfigError

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

PHOTO = "photo"
"""Name of the input: uint8 [height, width, 3], RGB, upright."""
_PREFIX = "photo_"


def check_photos(decoder: PhotoDecoder | None) -> PhotoDecoder:
    """The decoder of a bundle's photos, if a graph can do what it does.

    Raises:
        ConfigError: it cannot.
    """
    if decoder is None or decoder.channels != 3 or decoder.native_size != decoder.image_size:
        raise ConfigError(
            "format onnx_photo is for RGB photos that are resized once; this bundle's images are grey, or resized from another size "
            "first: use format onnx_single, which takes pixels of the network's size"
        )
    return decoder


def with_photo_input(model: ModelProto, pixels: str, decoder: PhotoDecoder) -> ModelProto:
    """A graph with a photo as its input in place of pixels.

    The centre square is resized with antialiasing, as `dsnet.data.decoding.centre_square` does,
    with one difference: the square is cut out at whole pixels.

    Args:
        model: the graph, of which nothing is changed.
        pixels: its input, uint8 [1, 3, size, size].
        decoder: says how photos are cropped and resized.

    Returns:
        the graph, which also gives the pixels as its last output.

    Raises:
        ConfigError: as `check_photos`.
    """
    from onnx import TensorProto as Type
    from onnx import checker, helper

    size = check_photos(decoder).image_size
    kept = size / round(size / decoder.crop_fraction)
    weights: list[TensorProto] = []
    nodes: list[NodeProto] = []

    def constant(kind: int, *values: float) -> str:
        weights.append(helper.make_tensor(f"{_PREFIX}constant_{len(weights)}", kind, (len(values),), values))
        return weights[-1].name

    def step(kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"{_PREFIX}{len(nodes)}"
        nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    two, integer = constant(Type.INT64, 2), Type.INT64
    sides = step("Slice", step("Shape", PHOTO), constant(integer, 0), two)
    shorter = step("Cast", step("ReduceMin", sides, keepdims=1), to=Type.FLOAT)
    square = step("Cast", step("Round", step("Mul", shorter, constant(Type.FLOAT, kept))), to=integer)
    begin = step("Div", step("Sub", sides, square), two)
    cut = step("Slice", PHOTO, begin, step("Add", begin, square), constant(integer, 0, 1))
    planes = step("Unsqueeze", step("Transpose", cut, perm=[2, 0, 1]), constant(integer, 0))
    shape = constant(integer, 1, 3, size, size)
    resized = step("Resize", planes, "", "", shape, mode="linear", antialias=1)
    nodes.append(helper.make_node("Identity", [resized], [pixels]))
    graph = helper.make_graph(
        [*nodes, *model.graph.node],
        model.graph.name,
        [helper.make_tensor_value_info(PHOTO, Type.UINT8, ("height", "width", 3))],
        [*model.graph.output, helper.make_tensor_value_info(pixels, Type.UINT8, (1, 3, size, size))],
        [*weights, *model.graph.initializer],
    )
    whole = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    checker.check_model(whole)
    return whole
