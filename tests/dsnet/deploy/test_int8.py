"""Bundles in int8: quantised once, divided into segments, and run like those in float32."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsnet.data.tensors import TensorData
from dsnet.deploy import int8
from dsnet.deploy.bundle import Bundle, check_bundle_examples, load_bundle, stored_examples, stored_parts
from dsnet.deploy.engines import TORCH, graph_engines
from dsnet.deploy.exporters import CheckedExporter, DataExporter, exporters
from dsnet.deploy.int8 import calibration_images, quantized
from dsnet.deploy.layout import INT8
from dsnet.deploy.onnx_files import LISTING, needed_parts
from dsnet.deploy.onnx_graphs import IMAGES, Names, SegmentGraphs
from dsnet.deploy.precisions import compare_rounded, read_accuracy, store_accuracy
from dsnet.errors import CheckpointError, ConfigError, DsnetError, VerificationError
from dsnet.image_size import ImageSize, image_size_of
from dsnet.measure.evaluate import GivenSegments, build_routing_table
from dsnet.network.supernet import Supernet
from dsnet.routers.cascade import CascadeRouter
from dsnet.routers.fixed import FixedRouter
from dsnet.routing.table_routing import run_on_table
from dsnet.space.route_tree import GateBranches, RouteTree
from tests.dsnet.deploy.test_bundle import CLAIMS, save
from tests.dsnet.deploy.test_engines import saved_with_routers
from tests.dsnet.samples import random_pixels, small_supernet, tensor_data, three_gate_supernet

onnx = pytest.importorskip("onnx", reason="extra deploy is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="extra deploy is not installed")
pytestmark = pytest.mark.slow

SUPERNETS: dict[str, Callable[[], Supernet]] = {
    "one gate": small_supernet,
    "three gates": lambda: three_gate_supernet(image_size=(12, 20), paths=[[0, 0, 0], [0, 1, 0], [1, 0, 1]]),
}
KINDS = {"one gate": ("gate", "evidence_gate", "cascade"), "three gates": ("gates", "cascade")}


def images_of(split: str, count: int, seed: int = 0, size: ImageSize = 16) -> TensorData:
    """A split of random images."""
    data = tensor_data(count, size, split=split)
    part = data.splits[split]._replace(images=random_pixels(count, size, seed=seed))
    return replace(data, splits=MappingProxyType({split: part}))


def in_int8(path: Path, gate: TensorData | None = None) -> Path:
    """The bundle with int8 graphs, which are checked."""
    exporter, folder = exporters()["onnx_int8"], path / "onnx_int8"
    assert isinstance(exporter, DataExporter)
    assert isinstance(exporter, CheckedExporter)
    folder.mkdir()
    size = image_size_of(load_bundle(path, engine=TORCH).image_shape)
    exporter.write_with(path, folder, gate or images_of("gate", 64, size=size))
    assert exporter.check(path, folder) == 16
    return path


EXPORTED: list[SegmentGraphs] = []
"""The graphs in float32 of the bundles below; most of the time of an export is spent on them."""


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """A bundle in int8 with several routers, by the name of its supernet; only to be read."""
    base, export = tmp_path_factory.mktemp("int8"), SegmentGraphs.of

    def exported(*args: Any, **options: Any) -> SegmentGraphs:
        EXPORTED.append(export(*args, **options))
        return EXPORTED[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SegmentGraphs, "of", exported)
        yield cache(lambda name: in_int8(saved_with_routers(base / name, SUPERNETS[name](), KINDS[name])))


@pytest.fixture
def folder(folder_of: Callable[[str], Path]) -> Path:
    return folder_of("one gate")


def opened(path: Path) -> Bundle:
    return load_bundle(path, engine="onnxruntime", precision=INT8, threads=1)


def session(file: Path) -> Callable[..., list[Tensor]]:
    """A graph in ONNX Runtime alone: its input -> its outputs."""
    own = onnxruntime.InferenceSession(file)
    name = own.get_inputs()[0].name
    return lambda x: [torch.from_numpy(value) for value in own.run(None, {name: x.numpy()})]


def test_the_dynamic_network_gives_what_the_graphs_give_by_hand(folder: Path) -> None:
    """A cascade, whose decision is computed here from the logits of its first route."""
    bundle = opened(folder).at("cascade")
    router = bundle.net.router
    assert isinstance(router, CascadeRouter)
    pixels = random_pixels(40, seed=9)
    answer, graphs = bundle(pixels), folder / "onnx_int8"
    features = session(graphs / "segment-0-0.onnx")(bundle.normalization.apply(pixels))[0]
    first, second = (session(graphs / f"tail-{route}.onnx")(features)[0] for route in (router.first, router.second))
    goes_on = first.softmax(1).amax(1).double() < router.threshold
    expected = torch.where(goes_on[:, None], second, first)
    assert 0 < int(goes_on.sum()) < len(pixels)
    assert answer.routes.tolist() == torch.where(goes_on, router.second, router.first).tolist()
    torch.testing.assert_close(answer.probabilities, expected.softmax(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SUPERNETS)
def test_the_table_of_int8_graphs_tells_what_every_router_does(folder_of: Callable[[str], Path], name: str) -> None:
    bundle = opened(folder_of(name))
    val = images_of("val", 50, seed=4, size=image_size_of(bundle.image_shape))
    stored = stored_parts(bundle.path)
    given = GivenSegments(bundle.net.segments, needed_parts([point.router for point in stored.points]))
    table = build_routing_table(stored.supernet, val, "val", bundle.normalization, given=given)
    taken = set()
    for point in bundle.operating_points:
        answer, run = bundle.at(point.name)(val.images("val")), run_on_table(point.router, table)
        assert answer.routes.tolist() == run.routes.tolist()
        assert answer.classes.tolist() == table.predicted[np.arange(50), run.routes].tolist()
        assert answer.madds.tolist() == run.madds.tolist()
        taken |= set(run.routes.tolist())
    assert len(taken) > 1
    for route in range(table.num_routes):  # the static sub-networks of the same graphs
        static = bundle.net.with_router(FixedRouter(route))(bundle.normalization.apply(val.images("val")))
        np.testing.assert_allclose(table.logits[:, route], static.logits.half(), rtol=1e-2, atol=1e-2)


def test_products_of_the_network_are_int8_and_what_decides_is_not(folder: Path) -> None:
    """Weights are within 7 bits: then no pair of products overflows 16 bits on any processor."""
    for file in (folder / "onnx_int8").glob("*.onnx"):
        graph = onnx.load(file).graph
        maker = {output: node for node in graph.node for output in node.output}
        weights = {own.name: onnx.numpy_helper.to_array(own) for own in graph.initializer}
        quantized = 0
        for node in graph.node:
            inputs = [maker[name] for name in node.input[:2] if name in maker]
            is_int8 = [each.op_type == "DequantizeLinear" for each in inputs]
            if node.op_type == "Conv":
                assert is_int8 == [True, True], f"{file.name}: {node.name}"
                weight = weights[inputs[1].input[0]]
                assert weight.dtype == np.int8
                assert len(weights[inputs[1].input[1]]) == len(weight), "one scale for each channel"
                assert 2 * 255 * np.abs(weight.astype(int)).max() < 2**15
                quantized += 1
            elif node.output[0].startswith("logits"):
                assert (node.op_type, any(is_int8)) == ("Gemm", False), "the classifier"
        assert quantized
        if file.name == "segment-0-0.onnx":
            relu = maker["hidden_0_0"]
            layer = maker[relu.input[0]]
            assert (relu.op_type, layer.op_type) == ("Relu", "Gemm"), "the hidden vector is not rounded"
            assert layer.input[1] in weights


def test_the_engine_runs_them_in_integers(folder: Path, tmp_path: Path) -> None:
    file = folder / "onnx_int8" / "tail-1.onnx"
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    operations = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    wanted = sum(node.op_type == "Conv" for node in onnx.load(file).graph.node)
    assert operations.count("QLinearConv") == wanted > 0


def test_equal_graphs_and_images_give_equal_files(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SegmentGraphs, "of", lambda *args, **options: EXPORTED[0])
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    shutil.rmtree(again / "onnx_int8")
    in_int8(again)
    for file in (folder / "onnx_int8").iterdir():
        assert file.read_bytes() == (again / "onnx_int8" / file.name).read_bytes(), file.name


def test_calibration_draws_the_same_images_and_no_more_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = random_pixels(20)
    assert torch.equal(calibration_images(pixels), pixels)
    monkeypatch.setattr(int8, "NUM_CALIBRATION_IMAGES", 7)
    drawn = calibration_images(pixels)
    assert torch.equal(drawn, calibration_images(pixels))
    rows = [next(row for row, image in enumerate(pixels) if torch.equal(image, own)) for own in drawn]
    assert len(set(rows)) == 7


def test_a_changed_or_missing_file_is_refused(folder: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    file = copied / "onnx_int8" / "tail-1.onnx"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"onnx_int8/tail-1\.onnx: missing, or not the file that was exported"):
        opened(copied)
    file.write_bytes(content)
    answers = copied / "onnx_int8" / "answers.safetensors"
    content = answers.read_bytes()
    answers.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"answers\.safetensors"):
        check_bundle_examples(opened(copied))
    answers.write_bytes(content)
    store_accuracy(copied / "onnx_int8", {"points": {}})
    listing = copied / "onnx_int8" / LISTING
    listing.write_text(listing.read_text() + "\n")
    with pytest.raises(CheckpointError, match="measured with other graphs"):
        read_accuracy(copied / "onnx_int8")


def test_bundles_that_cannot_run_in_int8_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown precision 'int7'.*int8"):
        load_bundle(folder, precision="int7")
    with pytest.raises(ConfigError, match=r"precision int8 needs an inference engine on the CPU.*torch runs float32"):
        load_bundle(folder, engine=TORCH, precision=INT8)
    plain = save(tmp_path / "plain")
    with pytest.raises(ConfigError, match=r"plain has no folder onnx_int8; export it with .*--format onnx_int8"):
        load_bundle(plain, precision=INT8)
    with pytest.raises(CheckpointError, match="no bundle here"):
        load_bundle(tmp_path / "nothing", precision=INT8)
    with pytest.raises(ConfigError, match="format onnx_int8 needs images of the run"):
        exporters()["onnx_int8"].write(plain, tmp_path)


def test_claims_in_int8_are_those_that_were_measured_in_int8(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "claims"
    shutil.copytree(folder, path)
    point = opened(path).operating_point.name
    assert opened(path).claims == {"data": CLAIMS["data"]}
    assert "its accuracy was not measured" in str(load_bundle(path))
    own = {
        "num_images": 50,
        "top1": 0.31,
        "top1_interval": [0.2, 0.4],
        "madds_m": 0.25,
        "float32_top1": 0.5,
        "difference": -0.19,
        "difference_interval": [-0.3, -0.1],
        "same_route_share": 1.0,
        "gain_over_static": -0.02,
        "gain_over_static_interval": [-0.05, 0.01],
    }
    store_accuracy(path / "onnx_int8", {"points": {point: {"val": own}}})
    assert opened(path).operating_point.top1 == 0.31
    assert load_bundle(path).operating_point.top1 == CLAIMS["val"]["top1"]
    for precision in ("float32", INT8):
        text = re.sub(r"\s+", " ", str(load_bundle(path, precision=precision)))
        assert "loses accuracy: top-1 31.0 % on val" in text
        assert "difference -19.0 points [95 %: -30.0, -10.0]" in text
        assert "no better than the static int8 sub-networks at equal MAdds (-2.0 points [95 %: -5.0, +1.0])" in text


def test_a_step_of_rounding_is_allowed_and_no_more() -> None:
    routes, logits = torch.arange(16) % 2, torch.randn(16, 10, generator=torch.Generator().manual_seed(0))
    scale = float(logits.abs().max())
    other = routes.clone()
    other[:2] = 1 - other[:2]
    away = logits.clone()
    away[:2] += 100  # another route gives other logits
    away[5, 3] += 0.04 * scale
    compare_rounded("here", other, away, routes, logits)
    away[5, 3] += 0.02 * scale
    with pytest.raises(VerificationError, match=r"here: the logits of an example differ by 0\.06 .*more than 0\.05"):
        compare_rounded("here", routes, away.where(torch.arange(16)[:, None] > 1, logits), routes, logits)
    other[2] = 1 - other[2]
    with pytest.raises(VerificationError, match=r"here: 3 of 16 examples took another route .* at most 12\.5 %"):
        compare_rounded("here", other, logits, routes, logits)


def test_every_engine_gives_the_stored_answers(folder: Path) -> None:
    for engine in (each.name for each in graph_engines() if each.is_installed):
        bundle = load_bundle(folder, engine=engine, precision=INT8)
        assert (bundle.engine, bundle.precision) == (engine, INT8)
        assert check_bundle_examples(bundle) == 16
    for examples in stored_examples(opened(folder)):
        exact = next(own for own in stored_examples(load_bundle(folder, engine=TORCH)) if own.point == examples.point)
        assert torch.equal(examples.images, exact.images)
        assert not torch.equal(examples.logits, exact.logits)


def test_a_network_without_products_is_refused() -> None:
    """Only a classifier behind a pooling, which stays in float32."""
    helper, numbers = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [
        helper.make_node("Identity", [IMAGES], ["features_0_0"], "copy"),
        helper.make_node("GlobalAveragePool", ["features_0_0"], ["pooled"], "pool"),
        helper.make_node("Flatten", ["pooled"], ["vector"], "flatten"),
        helper.make_node("MatMul", ["vector", "weight"], ["logits_0"], "classify"),
    ]
    outputs = [helper.make_tensor_value_info(name, numbers, None) for name in ("features_0_0", "logits_0")]
    weight = onnx.numpy_helper.from_array(np.ones((3, 10), np.float32), "weight")
    inputs = [helper.make_tensor_value_info(IMAGES, numbers, ["batch", 3, 4, 4])]
    model = helper.make_model(helper.make_graph(nodes, "classifier", inputs, outputs, [weight]))
    names = Names(RouteTree((GateBranches((0,), (0,)),)), ())
    with pytest.raises(DsnetError, match="no convolution or matrix product but the classifiers"):
        quantized(SegmentGraphs(names, model), torch.zeros(2, 3, 4, 4))
