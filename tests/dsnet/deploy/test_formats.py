"""Bundles in the formats of other programs: each file alone gives what the bundle gives."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image

from dsnet.data.photos import PhotoDecoder
from dsnet.deploy.bundle import load_bundle
from dsnet.deploy.engines import TORCH
from dsnet.deploy.exporters import CheckedExporter, exporters
from dsnet.errors import ConfigError, VerificationError
from dsnet.image_size import ImageSize, image_size_of
from dsnet.routers.fixed import FixedRouter
from tests.docs.blocks import blocks
from tests.dsnet.cases import OBLONG
from tests.dsnet.deploy.test_bundle import save
from tests.dsnet.deploy.test_engines import SUPERNETS, saved_with_routers
from tests.dsnet.samples import random_pixels, small_supernet

onnx = pytest.importorskip("onnx", reason="extra deploy is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="extra deploy is not installed")
pytestmark = pytest.mark.slow

ONE_IMAGE = ("onnx_single", "torch_export")
KINDS = {
    "one gate": ("gate", "evidence_gate", "cascade", "learned_cascade"),
    "three gates": ("gates", "cascade"),
    "kernels": ("gate", "cascade"),
    "tokens": ("gate", "cascade"),
}


@pytest.fixture(scope="module")
def bundle_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A bundle with a point for each of several kinds of router, by the name of the supernet."""
    base = tmp_path_factory.mktemp("formats")
    return cache(lambda name: saved_with_routers(base / name, SUPERNETS[name](), KINDS[name]))


def written(bundle: Path, name: str) -> Path:
    exporter, folder = exporters()[name], bundle / name
    if not folder.exists():
        folder.mkdir()
        exporter.write(bundle, folder)
    return folder


@pytest.mark.parametrize("name", SUPERNETS)
@pytest.mark.parametrize("kind", ONE_IMAGE)
def test_one_file_decides_and_classifies_as_the_bundle_does(
    bundle_of: Callable[[str], Path], kind: str, name: str
) -> None:
    path = bundle_of(name)
    folder, exporter = written(path, kind), exporters()[kind]
    assert isinstance(exporter, CheckedExporter)
    assert exporter.check(path, folder) == 16
    bundle = load_bundle(path, engine=TORCH)
    pixels = random_pixels(12, image_size_of(bundle.image_shape), seed=5)
    taken = set()
    for point in bundle.operating_points:
        expected = bundle.at(point.name)(pixels)
        taken |= set(expected.routes.tolist())
        for row, image in enumerate(pixels.split(1)):
            logits, route = _run(folder, point.name, image)
            assert int(route) == int(expected.routes[row])
            torch.testing.assert_close(logits.softmax(1)[0], expected.probabilities[row], rtol=1e-4, atol=1e-4)
    assert len(taken) > 1


@cache
def _opened(file: Path) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    if file.suffix == ".pt2":
        return torch.export.load(file).module()  # type: ignore[return-value]
    session = onnxruntime.InferenceSession(file)

    def run(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, route = session.run(None, {"pixels": pixels.numpy()})
        return torch.from_numpy(logits), torch.from_numpy(route)

    return run


def _run(folder: Path, point: str, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    (file,) = folder.glob(f"{point}.*")
    return _opened(file)(image)


def test_a_branch_uses_the_weights_that_were_used_before_it(bundle_of: Callable[[str], Path]) -> None:
    for file in written(bundle_of("three gates"), "onnx_single").iterdir():
        assert _count_branches(onnx.load(file).graph, frozenset()) > 1


def _count_branches(graph: onnx.GraphProto, outside: frozenset[str]) -> int:
    """The number of ends of a graph, in which no large weight may be once more that exists outside
    of it."""
    own = {weight.name for weight in graph.initializer if len(weight.raw_data) > 256}
    assert not own & outside
    inner = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return sum(_count_branches(each, outside | own) for each in inner) if inner else 1


def test_static_networks_take_batches_of_any_size(tmp_path: Path) -> None:
    path = save(tmp_path / "oblong", small_supernet(image_size=OBLONG))
    folder, exporter = written(path, "static"), exporters()["static"]
    assert isinstance(exporter, CheckedExporter)
    assert exporter.check(path, folder) == 16
    bundle, pixels = load_bundle(path, engine=TORCH), random_pixels(5, OBLONG, seed=8)
    for route, name in enumerate(bundle.route_names):
        expected = bundle.net.with_router(FixedRouter(route))(bundle.normalization.apply(pixels)).logits
        session = onnxruntime.InferenceSession(folder / f"{name}.onnx")
        (logits,) = session.run(None, {"pixels": pixels.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-3, atol=1e-4)
        program = torch.export.load(folder / f"{name}.pt2").module()
        torch.testing.assert_close(program(pixels), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("size", "crop_fraction"), [(16, 1.0), (OBLONG, 0.875)])
def test_the_documented_program_takes_a_photo_with_onnx_runtime_alone(
    tmp_path: Path, size: ImageSize, crop_fraction: float
) -> None:
    supernet = small_supernet(image_size=size)
    decoder = PhotoDecoder(3, size, size, crop_fraction)
    path = save(tmp_path / "runs" / "network" / "export" / "knee", supernet, photos=decoder)
    folder, exporter = written(path, "onnx_photo"), exporters()["onnx_photo"]
    assert isinstance(exporter, CheckedExporter)
    assert exporter.check(path, folder) == 16
    photo = tmp_path / "photos" / "photo.jpg"
    photo.parent.mkdir()
    Image.fromarray(random_pixels(1, size=64)[0].permute(1, 2, 0).numpy()).resize((90, 61)).save(photo)
    (documented,) = (block.text for block in blocks("python") if "onnx_photo" in block.text)
    script = documented + "import sys\nassert not {'torch', 'dsnet'} & set(sys.modules)\n"
    command = [sys.executable, "-I", "-c", script]
    home = {**os.environ, "HOME": str(tmp_path)}
    answer = subprocess.run(command, cwd=tmp_path, env=home, capture_output=True, text=True, check=True)
    (expected,) = load_bundle(path, engine=TORCH).predict([photo])
    label, probability, route = answer.stdout.split()
    assert (label, route) == (expected.class_name, expected.route)
    assert float(probability) == pytest.approx(expected.probability, abs=0.05)


def test_what_is_not_the_exported_file_or_cannot_be_written_is_told(tmp_path: Path) -> None:
    path = save(tmp_path / "grey", small_supernet(), photos=PhotoDecoder(3, 8, 16))
    with pytest.raises(ConfigError, match="format onnx_photo is for RGB photos that are resized once"):
        written(path, "onnx_photo")
    folder, exporter = written(path, "onnx_single"), exporters()["onnx_single"]
    assert isinstance(exporter, CheckedExporter)
    other = save(tmp_path / "other", small_supernet(seed=7))
    with pytest.raises(VerificationError, match="example 0"):
        exporter.check(other, folder)
    (folder / "classifier.onnx").unlink()
    with pytest.raises(VerificationError, match=r"classifier\.onnx: missing; export the bundle again"):
        exporter.check(path, folder)
