"""One contract for every engine: routes and logits of torch, for every kind of router."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsnet.deploy import engines as engines_module
from dsnet.deploy.bundle import Bundle, check_bundle_examples, check_onnx, load_bundle, score_bundle
from dsnet.deploy.dynamic import DynamicNet
from dsnet.deploy.engines import TORCH, Engine, chosen_engine, engine_names, graph_engines
from dsnet.deploy.exporters import exporters
from dsnet.deploy.onnx_files import LISTING, GraphSegments, write_graphs
from dsnet.deploy.operating_points import OperatingPoint
from dsnet.errors import CheckpointError, ConfigError
from dsnet.families import create
from dsnet.image_size import image_size_of
from dsnet.network.batchnorm import recalibrate
from dsnet.network.supernet import Supernet
from dsnet.routers.base import Evidence, Executed
from dsnet.routers.fixed import FixedRouter
from dsnet.space.route_tree import RouteTree
from tests.dsnet.cases import KERNEL_OPTIONS, KERNELS
from tests.dsnet.deploy.test_bundle import gate, save
from tests.dsnet.samples import (
    NORMALIZATION,
    ROUTER_KINDS,
    random_labels,
    random_pixels,
    random_supernet_router,
    shaken,
    small_supernet,
    task,
    three_gate_supernet,
)

pytest.importorskip("onnx", reason="extra deploy is not installed")

ENGINES = [engine.name for engine in graph_engines() if engine.is_installed]
TOKENS: Mapping[str, Any] = {"patch": 8, "dim": 16, "heads": 2, "depth": 2, "gates": [1], "ratios": [0.5, 1.0]}
"""Options of a small vision transformer: most of the time of an export is that of its layers."""
SUPERNETS: dict[str, Callable[[], Supernet]] = {
    "one gate": small_supernet,
    "three gates": partial(three_gate_supernet, image_size=(12, 20)),
    "kernels": lambda: shaken(create(KERNELS, task(), {**KERNEL_OPTIONS, "kernels": [3, 5], "gates": ["stem"]})).eval(),
    "tokens": lambda: shaken(create("ds_vit", task(), TOKENS)).eval(),
}
"""Supernets by name, one of them for images that are no squares."""


def with_graphs(folder: Path) -> Path:
    """A bundle with ONNX files."""
    (folder / "onnx").mkdir()
    exporters()["onnx"].write(folder, folder / "onnx")
    assert check_onnx(folder, folder / "onnx") == 16
    return folder


def saved_with_routers(folder: Path, supernet: Supernet, kinds: Sequence[str] = tuple(ROUTER_KINDS)) -> Path:
    """A bundle with an operating point for every kind of router, named after it."""
    recalibrate(supernet, [NORMALIZATION.apply(random_pixels(64, supernet.spec.image_size))])
    everything = range(len(supernet.subnets))
    first, *others = (OperatingPoint(kind, random_supernet_router(kind, supernet, 3, everything), {}) for kind in kinds)
    return save(folder, supernet, router=first.router, point_name=first.name, further_points=others)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The bundle of every router for a supernet by its name; only to be read."""
    base = tmp_path_factory.mktemp("graphs")
    return cache(lambda name: with_graphs(saved_with_routers(base / name, SUPERNETS[name]())))


@pytest.fixture
def folder(folder_of: Callable[[str], Path]) -> Path:
    """The bundle whose graphs are a trunk and the tails of the routes."""
    return folder_of("one gate")


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A bundle of its own, to be damaged."""
    for file in folder.rglob("*"):
        if file.is_file():
            target = tmp_path / "bundle" / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return tmp_path / "bundle"


def assert_same(bundle: Bundle, expected: Bundle, num_images: int) -> None:
    pixels = random_pixels(num_images, image_size_of(bundle.image_shape), seed=num_images)
    answer, wanted = bundle(pixels), expected(pixels)
    assert answer.routes.tolist() == wanted.routes.tolist()
    assert answer.madds.tolist() == wanted.madds.tolist()
    torch.testing.assert_close(answer.probabilities, wanted.probabilities, rtol=1e-4, atol=1e-4)


def test_the_default_is_the_engine_where_it_is_possible(folder: Path, tmp_path: Path) -> None:
    assert load_bundle(folder).engine == ENGINES[0] == "onnxruntime"
    assert load_bundle(folder, engine=TORCH).engine == TORCH
    save(tmp_path / "plain")
    assert load_bundle(tmp_path / "plain").engine == TORCH


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", SUPERNETS)
def test_every_router_takes_its_routes_in_every_engine(
    folder_of: Callable[[str], Path], name: str, engine: str
) -> None:
    """Routers that decide once, at every gate, and after the answer of a route."""
    own, ours = (load_bundle(folder_of(name), engine=each) for each in (TORCH, engine))
    assert check_bundle_examples(ours) == 16
    taken = set()
    for kind in ROUTER_KINDS:
        for size in (0, 1, 2, 17):
            assert_same(ours.at(kind), own.at(kind), size)
        taken |= set(ours.at(kind)(random_pixels(64, image_size_of(ours.image_shape))).routes.tolist())
    assert len(taken) > 1


@pytest.mark.parametrize("engine", ENGINES)
def test_an_image_costs_one_call_for_each_route_that_it_runs(
    folder: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graphs decide: the routers themselves are not asked, except where they decide at every
    gate."""

    def refuse(*_: object) -> None:
        raise AssertionError("the router was asked")

    own, ours = (load_bundle(folder, engine=each) for each in (TORCH, engine))
    kinds = [kind for kind in ROUTER_KINDS if own.at(kind).net.router.num_gates == 1]
    assert {"gate", "evidence_gate", "cascade", "learned_cascade"} <= set(kinds)
    pixels = random_pixels(9)
    expected = {kind: own.at(kind)(pixels) for kind in kinds}
    for kind in kinds:
        monkeypatch.setattr(type(ours.at(kind).net.router), "step", refuse)
        assert ours.at(kind)(pixels).routes.tolist() == expected[kind].routes.tolist()


def test_decisions_that_cannot_be_in_a_graph_stay_in_python(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    supernet = small_supernet()
    router = InPython(random_supernet_router("gate", supernet, 3, range(3)))
    save(tmp_path / "bundle", supernet)
    found = write_graphs(supernet, [router], 16, tmp_path)  # type: ignore[list-item]
    assert "ask the routers in Python" in caplog.text
    assert found.names.decisions == ()
    tree = RouteTree.of(supernet.subnets)
    segments = GraphSegments(tmp_path, tree, [router], graph_engines()[0], 1)  # type: ignore[list-item]
    assert segments.entry(router) is None  # type: ignore[arg-type]
    images = NORMALIZATION.apply(random_pixels(7))
    answer = DynamicNet(supernet, router, segments=segments)(images)  # type: ignore[arg-type]
    wanted = DynamicNet(supernet, router.gate)(images)
    assert answer.routes.tolist() == wanted.routes.tolist()
    torch.testing.assert_close(answer.logits, wanted.logits, rtol=1e-4, atol=1e-4)


@dataclass(frozen=True)
class InPython:
    """A gate whose decision leaves torch, as a user's router may."""

    gate: Any

    def __getattr__(self, name: str) -> Any:
        if name == "gate":  # not set yet, while it is copied
            raise AttributeError(name)
        return getattr(self.gate, name)

    def step(self, evidence: Evidence, executed: Sequence[Executed]) -> Tensor:
        return torch.tensor(self.gate.step(evidence, executed).tolist())


def test_a_static_sub_network(tmp_path: Path) -> None:
    path = with_graphs(save(tmp_path / "static", router=FixedRouter(1)))
    for engine in ENGINES:
        assert_same(load_bundle(path, engine=engine), load_bundle(path, engine=TORCH), 5)


@pytest.mark.parametrize("engine", ENGINES)
def test_eight_threads_get_the_answers_of_one(folder: Path, engine: str) -> None:
    bundle = load_bundle(folder, engine=engine, threads=1)
    batches = [random_pixels(1 + number % 5, seed=number) for number in range(64)]
    expected = [bundle(batch) for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        for answer, wanted in zip(pool.map(bundle, batches), expected, strict=True):
            assert torch.equal(answer.probabilities, wanted.probabilities)
            assert answer.routes.tolist() == wanted.routes.tolist()


SIGNAL_AFTER_USE = """
import os, signal, sys
from pathlib import Path
from dsnet.deploy.engines import chosen_engine
engine = chosen_engine(sys.argv[1], has_graphs=True, on_cpu=True)
graphs = [engine.open(Path(sys.argv[2]), 1) for _ in range(3)]
while graphs:
    del graphs[0]
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("heard")
"""


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_signal_is_heard_when_graphs_were_closed(folder: Path, engine: str) -> None:
    command = [sys.executable, "-c", SIGNAL_AFTER_USE, engine, str(folder / "onnx" / "segment-0-0.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "heard\n"), done.stderr


@pytest.mark.parametrize("engine", ENGINES)
def test_accuracy_and_cost_are_those_of_torch(folder: Path, engine: str) -> None:
    pixels, labels = random_pixels(40), random_labels(40)
    ours, own = (score_bundle(load_bundle(folder, engine=name), pixels, labels) for name in (engine, TORCH))
    assert ours == own


def test_a_changed_or_missing_graph_is_refused(copied: Path) -> None:
    file = copied / "onnx" / "tail-1.onnx"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"tail-1\.onnx: missing, or not the file that was exported"):
        load_bundle(copied)
    file.unlink()
    with pytest.raises(CheckpointError, match="export the bundle again"):
        load_bundle(copied)
    assert load_bundle(copied, engine=TORCH).engine == TORCH
    listing = json.loads((copied / "onnx" / LISTING).read_text())
    (copied / "onnx" / LISTING).write_text(json.dumps({**listing, "version": 99}))
    with pytest.raises(CheckpointError, match="version 99, but this release reads 1"):
        load_bundle(copied)


def test_engines_that_cannot_run_a_bundle_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert engine_names() == (*ENGINES, TORCH)
    with pytest.raises(ConfigError, match=r"unknown engine 'onnxruntim'.*did you mean 'onnxruntime'"):
        load_bundle(folder, engine="onnxruntim")
    save(tmp_path / "plain", router=gate(small_supernet()))
    with pytest.raises(
        ConfigError, match=r"the bundle has no ONNX files; export it with export.formats: \[bundle, onnx"
    ):
        load_bundle(tmp_path / "plain", engine=ENGINES[0])
    with pytest.raises(ConfigError, match="runs on the CPU only"):
        chosen_engine(ENGINES[0], has_graphs=True, on_cpu=False)
    assert chosen_engine("auto", has_graphs=True, on_cpu=False) is None
    missing = Engine("other", "no_such_package", lambda file, threads: lambda inputs: [])
    monkeypatch.setattr(engines_module, "_ENGINES", {"other": missing})
    assert chosen_engine("auto", has_graphs=True, on_cpu=True) is None
    with pytest.raises(ConfigError, match="package no_such_package is not installed: pip install no_such_package"):
        chosen_engine("other", has_graphs=True, on_cpu=True)
    with pytest.raises(ValueError, match="there is an engine 'torch' already"):
        engines_module.register(Engine(TORCH, "torch", missing.open))
