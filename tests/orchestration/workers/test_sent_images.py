"""A streamed training split on another machine: its files are looked up there, and compared."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dsnet.data.settings import Augmentation
from dsnet.data.training_images import StreamedImages
from dsnet.errors import DataError
from orchestration.workers.sent_images import SentFiles


def picture(path: Path, seed: int) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return tmp_path / "driver" / "photos"


@pytest.fixture
def sent(here: Path) -> SentFiles:
    """As it arrives in a worker."""
    files = tuple(picture(here / "train" / kind / f"{number}.png", number) for kind in "ab" for number in range(3))
    images = StreamedImages(files, torch.tensor([0, 0, 0, 1, 1, 1]), 8, Augmentation())
    return pickle.loads(pickle.dumps(SentFiles.of(images, str(here))))  # noqa: S301 - our own bytes, as Ray sends them


def pixels(images: StreamedImages) -> torch.Tensor:
    return next(iter(images.clean([torch.arange(len(images.files))], torch.device("cpu"))))


def test_the_files_are_those_of_the_same_path(sent: SentFiles, here: Path) -> None:
    found = sent.found_here()
    assert all(Path(file).is_relative_to(here) for file in found.files)
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_without_that_path_they_are_those_of_the_machines_own_variable(
    sent: SentFiles, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = pixels(sent.found_here())
    there = tmp_path / "worker" / "somewhere"
    shutil.copytree(here, there, copy_function=shutil.copyfile)  # with other times
    shutil.rmtree(here)
    monkeypatch.setenv("DSNET_DATA", str(there))
    found = sent.found_here()
    assert all(Path(file).is_relative_to(there) for file in found.files)
    assert torch.equal(pixels(found), before)


@pytest.mark.parametrize("change", ["another size", "a file less", "nothing there"])
def test_other_files_are_refused_with_the_name_of_the_machine(
    sent: SentFiles, here: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "node-7")
    monkeypatch.delenv("DSNET_DATA", raising=False)
    one = here / "train" / "a" / "0.png"
    if change == "another size":
        one.write_bytes(one.read_bytes() + b" ")
    elif change == "a file less":
        one.unlink()
    else:
        shutil.rmtree(here)
    with pytest.raises(DataError, match=r"data\.path: .*the machine node-7 of the Ray cluster") as caught:
        sent.found_here()
    assert "set data.stream: false" in str(caught.value)
