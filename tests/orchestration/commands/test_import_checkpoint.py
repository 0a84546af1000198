"""A released checkpoint becomes a sweep that skips Stage I."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dsnet.data.image_folder import decode_file, list_image_folder
from dsnet.training.start import load_start
from orchestration.commands.import_checkpoint import IMAGENET
from orchestration.config.loading import load_config
from orchestration.prepare.preparation import prepare
from tests.dsnet.stored.released import AVERAGED, NUM_CLASSES, RELEASED, SIZE, STUDENT, TEACHER, whole_checkpoint
from tests.orchestration.samples import call


@pytest.fixture
def released(tmp_path: Path) -> Path:
    path = tmp_path / "model_best.pth.tar"
    torch.save(whole_checkpoint(), path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Held-out images of as many classes as the checkpoint has."""
    random = np.random.default_rng(0)
    for label in range(NUM_CLASSES):
        (tmp_path / "images" / f"class{label}").mkdir(parents=True)
        for number in range(20):
            pixels = random.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / f"class{label}" / f"{number}.png")
    return tmp_path / "images"


def options(**values: object) -> list[str]:
    given = {"classes": NUM_CLASSES, "image-size": SIZE, **values}
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


@pytest.mark.slow
@pytest.mark.parametrize("averaged", [False, True])
def test_the_sweep_begins_with_the_checkpoints_weights(
    tmp_path: Path, released: Path, folder: Path, averaged: bool
) -> None:
    flags = [*options(data=folder, name="published"), *(["--ema"] if averaged else [])]
    answer = call(tmp_path, "import-checkpoint", str(released), *flags)
    assert answer.code == 0, answer.err
    sweep = tmp_path / answer.out.strip()
    assert sweep == tmp_path / "model_best-imported" / "sweep.yaml"
    assert "14 sub-networks of " in answer.err
    assert f"dsnet-orch launch {answer.out.strip()}" in answer.err

    prepared = prepare(load_config(sweep).config)
    assert prepared.config.name == "published"
    assert prepared.subnets.members == STUDENT.subnets.members
    assert prepared.normalization == IMAGENET
    assert prepared.config.data.crop_fraction == 0.875
    val = prepared.splits.val.tolist()
    file = list_image_folder(folder).files[val[0]]
    assert np.array_equal(prepared.data.images("val")[0].numpy(), decode_file(file, SIZE, 0.875))
    assert not np.array_equal(prepared.data.images("val")[0].numpy(), decode_file(file, SIZE))
    run = prepared.supernet_run
    assert (run.train.epochs, run.recalibration_images) == (0, 0)
    expected = (TEACHER if averaged else STUDENT).state_dict()
    met = load_start(sweep.parent / "final").tensors
    assert met.keys() == expected.keys()
    assert all(torch.equal(met[name], value) for name, value in expected.items())


def test_a_second_import_leaves_the_first_alone(tmp_path: Path, released: Path) -> None:
    flags = options(out=tmp_path / "here")
    assert call(tmp_path, "import-checkpoint", str(released), *flags).code == 0
    before = (tmp_path / "here" / "final.safetensors").read_bytes()
    again = call(tmp_path, "import-checkpoint", str(released), "--ema", *flags)
    assert again.code == 2
    assert "sweep.yaml: already exists; choose another --out" in again.err
    assert (tmp_path / "here" / "final.safetensors").read_bytes() == before


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_writes_nothing(tmp_path: Path) -> None:
    broken = tmp_path / "broken.pth"
    torch.save({name: value for name, value in AVERAGED.items() if name != "conv_stem.weight"}, broken)
    answer = call(tmp_path, "import-checkpoint", str(broken), *options())
    assert answer.code != 0
    assert "missing conv_stem.weight" in answer.err
    assert not (tmp_path / "broken-imported").exists()
    wrong = call(tmp_path, "import-checkpoint", str(broken), *options(classes=1000))
    assert f"has {NUM_CLASSES} classes, but 1000 were asked for: leave out --classes" in wrong.err


def test_as_many_classes_as_the_classifier_has_need_not_be_told(tmp_path: Path, released: Path) -> None:
    answer = call(tmp_path, "import-checkpoint", str(released), "--image-size", "16x24")
    assert answer.code == 0, answer.err
    assert f"MAdds at 16 x 24 pixels (height x width), {NUM_CLASSES} classes" in answer.err
    assert load_config(tmp_path / answer.out.strip()).config.data.image_size == (16, 24)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (
            ("--image-size", "4"),
            2,
            "data.image_size: expected the side of a square or [HEIGHT, WIDTH], in pixels from 8 to 512",
        ),
        (("--image-size", "1000"), 2, "in pixels from 8 to 512, or null; got 1000"),
        (("--image-size", "8x"), 2, "'8x' is not a number of pixels or HEIGHTxWIDTH, such as 224 or 192x256"),
        (("--name", "two words"), 2, "name: 'two words' is not a valid name"),
        (("--data", "$NOT_SET_ANYWHERE/images"), 2, "the environment variable NOT_SET_ANYWHERE is not set"),
        (("--classes", "0"), 2, "--classes"),
        (
            ("--out", "model_best.pth.tar"),
            3,
            "cannot write model_best.pth.tar: a part of its path is not a folder (it is a file)",
        ),
        (
            ("--out", "model_best.pth.tar/in"),
            3,
            "a part of its path is not a folder (Not a directory). Use another folder",
        ),
        (("--out", f"{'long' * 100}"), 2, "name: 'long"),
        (
            ("--name", "fine", "--out", f"{'long' * 100}"),
            3,
            "its path is too long (File name too long). Use a folder with a shorter path",
        ),
    ],
)
def test_what_a_launch_would_refuse_is_refused_before_anything_is_written(
    tmp_path: Path, released: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], code: int, message: str
) -> None:
    monkeypatch.delenv("NOT_SET_ANYWHERE", raising=False)
    before = sorted(tmp_path.rglob("*"))
    answer = call(tmp_path, "import-checkpoint", released.name, *flags)
    assert answer.code == code
    assert message in answer.err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_checkpoint_in_our_format_is_sent_to_init_from(tmp_path: Path, released: Path) -> None:
    assert call(tmp_path, "import-checkpoint", str(released), *options(out="imported")).code == 0
    for named in ("imported", "imported/final", "imported/final.safetensors", "imported/final.json"):
        answer = call(tmp_path, "import-checkpoint", named, *options(out="again"))
        assert answer.code == 2
        assert answer.err == (
            f"error: {named}: is a checkpoint of dsnet-orch and needs no import; use it as supernet.init_from of a sweep file\n"
        )


def test_weights_that_are_not_finite_are_not_imported(tmp_path: Path) -> None:
    broken = RELEASED["conv_stem.weight"].clone()
    broken[0, 0, 0, 0] = float("nan")
    torch.save({**RELEASED, "conv_stem.weight": broken}, tmp_path / "broken.pth")
    answer = call(tmp_path, "import-checkpoint", "broken.pth", *options())
    assert answer.code == 3
    assert "broken.pth: NaN or infinity in conv_stem.weight: " in answer.err
    assert not (tmp_path / "broken-imported").exists()
