"""From a plain network to a supernet with chosen sub-networks: before training, the widest one
gives the answers of the source."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dsnet.data.images import ImageSet
from dsnet.data.settings import SplitSizes
from dsnet.data.sources import InMemorySource
from dsnet.data.splits import Splits, make_splits
from dsnet.families import Task, layout
from dsnet.network.plain import make_plain
from dsnet.network.supernet import Supernet
from dsnet.stored.checkpoint import load_supernet
from dsnet.stored.names import FINAL, STRUCTURE
from dsnet.structure import noise
from dsnet.structure.method import Base, StructureProblem
from dsnet.structure.scoring import HoldOutScorer
from dsnet.structure.search import load_structure
from dsnet.structure.settings import BY_IMAGES, StructureSettings
from dsnet.structure.stage import BASES, StructureWork
from dsnet.training.start import first_weights, load_start
from dsnet.training.supernet import train_supernet
from tests.dsnet.samples import small_run
from tests.dsnet.structure.problems import NET

EXAMPLES = Path(__file__).parents[3] / "examples"
SIZE = 16


@cache
def pretrain_script() -> ModuleType:
    """examples/pretrain.py as a module."""
    spec = importlib.util.spec_from_file_location("pretrain", EXAMPLES / "pretrain.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def images_of_two_classes() -> InMemorySource:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (60, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    return InMemorySource(ImageSet.create("cifar10", pixels, torch.arange(60) % 2, ["a", "b"], np.arange(60) >= 50))


def used(module: nn.Module) -> nn.Module:
    """The module with statistics and scales of BatchNorm that differ between channels."""
    generator = torch.Generator().manual_seed(3)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.running_mean, norm.running_var, norm.weight.data):
                assert tensor is not None
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return module.eval()


def chosen(model: str, source: Path, folder: Path, **settings: Any) -> Supernet:
    """The supernet with which joint training begins, after a structure stage in this process."""
    images = images_of_two_classes()
    splits = make_splits(images.labels.numpy(), images.official_test, SplitSizes(train=30, gate=10, val=10))
    subnets = layout(model, Task(2, 3, SIZE), {"step": 2})
    own = StructureSettings(**{"step": 2, "levels": 2, "targets": (0.5, 1.0), "epochs": 1, "holdout": 0.4, **settings})
    run = small_run()
    problem = StructureProblem(subnets, own, replace(run, train=replace(run.train, batch_size=8)), SIZE)

    def train(base: Base, place: Path, stem: Path | None, kept: Splits) -> None:
        start = None if stem is None else load_start(stem)
        first, _ = first_weights(base.subnets, base.run.seed, start)
        train_supernet(first, images.training_images(kept, base.run.augmentation), base.run, folder=place)

    @contextmanager
    def scorer(network: Supernet, held: Any) -> Iterator[Any]:
        scores = HoldOutScorer(network, *held, problem.run.normalization)
        yield lambda candidates: [scores.score(each.widths) for each in candidates]

    StructureWork(problem, images, splits, source, folder, train, scorer, lambda: False).choose()
    return load_supernet(folder / STRUCTURE)[0].eval()


@torch.no_grad()
def assert_same_answers(supernet: Supernet, source: nn.Module) -> None:
    images = torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    wanted: Tensor = source(images)
    assert wanted.std() > 0.01
    torch.testing.assert_close(supernet(images, supernet.subnets.largest), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["none", "weight_l1", "bn_gamma", "random", "taylor", "noise"])
@pytest.mark.parametrize("method", ["uniform", "greedy"])
def test_the_widest_gives_the_answers_of_a_plain_state_dict(
    method: str, order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy trains a network of its own, and with `fresh` begins with the source again."""
    monkeypatch.setattr(noise, "STEPS", 4)
    source = used(make_plain(NET, 2, 3, 5))
    torch.save(source.state_dict(), tmp_path / "net.pth")
    settings = {"method": method, "order": order, "start": "fresh"}
    supernet = chosen(NET, tmp_path / "net.pth", tmp_path / "structure", **settings)
    assert len(supernet.subnets) == 2
    assert_same_answers(supernet, source)
    first = next(supernet.parameters())
    assert torch.equal(first, next(source.parameters())) == (order == "none")  # sorted, but the same function
    spent = load_structure(tmp_path / "structure").summary["train_madds"]
    assert (spent > 0) == (method == "greedy" or order in BY_IMAGES)


def test_greedy_goes_on_with_the_network_that_it_trained(tmp_path: Path) -> None:
    source = used(make_plain(NET, 2, 3, 5))
    torch.save(source.state_dict(), tmp_path / "net.pth")
    folder = tmp_path / "structure"
    supernet = chosen(NET, tmp_path / "net.pth", folder, method="greedy", order="weight_l1")
    base = load_supernet(folder / BASES / "us_net" / FINAL)[0].eval()
    images = torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        answers = base(images, base.subnets.largest)
        torch.testing.assert_close(supernet(images, supernet.subnets.largest), answers, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(answers, source(images), atol=1e-3)


@pytest.mark.slow
def test_the_network_of_the_example_is_the_zoos(tmp_path: Path) -> None:
    """examples/pretrain.py imports nothing of the project, and its state dict fits mobilenet_v2."""
    text = (EXAMPLES / "pretrain.py").read_text(encoding="utf-8")
    assert not any(line.split()[:1] in (["import"], ["from"]) and "dsnet" in line for line in text.splitlines())
    torch.manual_seed(1)
    source = pretrain_script().MobileNetV2(2)
    zoo = make_plain("mobilenet_v2", 2, 3, 0).state_dict()
    assert [(name, tensor.shape) for name, tensor in source.state_dict().items()] == [
        (name, tensor.shape) for name, tensor in zoo.items()
    ]
    torch.save(used(source).state_dict(), tmp_path / "net.pth")
    supernet = chosen(
        "mobilenet_v2", tmp_path / "net.pth", tmp_path / "structure", method="uniform", step=8, order="weight_l1"
    )
    assert_same_answers(supernet, source)


@pytest.mark.slow
def test_the_example_trains_on_a_folder_of_photos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 32, 40, 3), dtype=np.uint8)
    for name, photos in zip(("cat", "dog"), pixels, strict=True):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number, photo in enumerate(photos):
            Image.fromarray(photo).save(tmp_path / "photos" / name / f"{number}.jpg")
    out = tmp_path / "net.pth"
    arguments = ["--data", str(tmp_path / "photos"), "--image-size", "32", "--epochs", "1", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["pretrain.py", *arguments])
    pretrain_script().main()
    assert capsys.readouterr().out.endswith(f"wrote {out}\n")
    start = load_start(out)
    _, fresh = first_weights(layout("mobilenet_v2", Task(2, 3, 32)), 0, start)
    assert fresh == []
