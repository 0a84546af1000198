"""Resizing and cropping of a photo inside an ONNX graph, so that one call takes a photo of any
size."""

from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING, Any

from dsnet.data.decoding import kept_share
from dsnet.data.photos import PhotoDecoder
from dsnet.errors import ConfigError
from dsnet.image_size import height_and_width

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

    The centre is resized with antialiasing, as `dsnet.data.decoding.centre_crop` does, with one
    difference: it is cut out at whole pixels.

    Args:
        model: the graph, of which nothing is changed.
        pixels: its input, uint8 [1, 3, height, width].
        decoder: says how photos are cropped and resized.

    Returns:
        the graph, which also gives the pixels as its last output.

    Raises:
        ConfigError: as `check_photos`.
    """
    from onnx import TensorProto as Type
    from onnx import checker, helper

    size = height_and_width(check_photos(decoder).image_size)
    kept = kept_share(decoder.image_size, decoder.crop_fraction)
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
    # The largest part of the photo with the shape of the result is `unit` times `shape`.
    shape = [side / gcd(*size) for side in size]
    unit = step("ReduceMin", step("Div", step("Cast", sides, to=Type.FLOAT), constant(Type.FLOAT, *shape)), keepdims=1)
    wanted = step("Mul", unit, constant(Type.FLOAT, *(kept * side for side in shape)))
    part = step("Cast", step("Round", wanted), to=integer)
    begin = step("Div", step("Sub", sides, part), two)
    cut = step("Slice", PHOTO, begin, step("Add", begin, part), constant(integer, 0, 1))
    planes = step("Unsqueeze", step("Transpose", cut, perm=[2, 0, 1]), constant(integer, 0))
    resized = step("Resize", planes, "", "", constant(integer, 1, 3, *size), mode="linear", antialias=1)
    nodes.append(helper.make_node("Identity", [resized], [pixels]))
    graph = helper.make_graph(
        [*nodes, *model.graph.node],
        model.graph.name,
        [helper.make_tensor_value_info(PHOTO, Type.UINT8, ("height", "width", 3))],
        [*model.graph.output, helper.make_tensor_value_info(pixels, Type.UINT8, (1, 3, *size))],
        [*weights, *model.graph.initializer],
    )
    whole = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    checker.check_model(whole)
    return whole
