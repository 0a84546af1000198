"""The sweep file that `init` writes: valid as it is, and fitted to the images."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dsnet.data.cifar10 import CLASS_NAMES
from dsnet.families import family_names
from dsnet.network.plain import make_plain
from orchestration.config.loading import load_config
from tests.dsnet.cases import TRACED
from tests.dsnet.data.folders import GREY, fill
from tests.orchestration.samples import call


def photos(root: Path, **counts: int) -> Path:
    for name, count in counts.items():
        fill(root / name, count, size=(70, 90), colour=GREY)
    return root


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSNET_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("cache")
def test_the_file_fits_the_folder_and_is_planned_as_it_is(tmp_path: Path) -> None:
    folder = photos(tmp_path / "My photos: 2", cats=31, dogs=9)
    answer = call(tmp_path, "init", "--data", folder)
    assert answer.code == 0, answer.err
    assert "dsnet-orch launch My-photos-2.yaml" in answer.out
    file = tmp_path / "My-photos-2.yaml"
    config = load_config(file).config
    assert (config.name, config.data.path, config.data.image_size) == ("My-photos-2", str(folder), 64)
    assert (config.supernet.model, config.supernet.options["stem"]) == ("ds_resnet", "large")
    assert config.supernet.train.epochs is None
    text = file.read_text(encoding="utf-8")
    for told in (
        "40 pictures in 2 classes, 90 x 70 pixels (height x width), grey",
        "cats 31, dogs 9",
        "unbalanced",
        "train 22",
    ):
        assert told in text
    (whole,) = re.findall(r"(?m)^  # image_size: (\[.*\])    # ", text)
    assert json.loads(whole) == [84, 64], "the shape of all pictures"
    taller = call(tmp_path, "plan", file.name, "--dry", "--set", f"data.image_size={whole}")
    assert "84 x 64 pixels (height x width), 3 channels: train 22" in " ".join(taller.out.split()), taller.err
    plan = call(tmp_path, "plan", file.name, "--dry", "--json").json
    assert plan["data"]["num_images"] == {"train": 22, "gate": 6, "val": 6, "test": 6}
    assert plan["data"]["classes"] == ["cats", "dogs"]
    settings = plan["settings"]
    for key in ("batch_size", "epochs", "warmup_epochs", "lr"):
        setting = settings[f"supernet.train.{key}"]
        assert f"    # {key}: {setting['value']}    # {setting['reason']}" in text


def test_the_commented_settings_can_be_used_as_they_stand(tmp_path: Path) -> None:
    call(tmp_path, "init", "--data", photos(tmp_path / "p", a=20, b=20), "--name", "mine", "--out", "sweeps/x.yaml")
    file = tmp_path / "sweeps" / "x.yaml"
    head, _, settings = file.read_text(encoding="utf-8").partition("to set another value:")
    file.write_text(head + re.sub(r"(?m)^( +)# ", r"\1", settings), encoding="utf-8")
    config = load_config(file).config
    assert config.name == "mine"
    assert config.supernet.train.epochs
    assert config.supernet.train.channels_last
    assert config.supernet.recalibration.images is None


def test_a_file_that_is_there_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    folder = photos(tmp_path / "p", a=5, b=5)
    (tmp_path / "p.yaml").write_text("mine", encoding="utf-8")
    answer = call(tmp_path, "init", "--data", folder)
    assert answer.code == 2
    assert "--force" in answer.err
    assert (tmp_path / "p.yaml").read_text(encoding="utf-8") == "mine"
    assert call(tmp_path, "init", "--data", folder, "--force").code == 0
    assert load_config(tmp_path / "p.yaml").config.name == "p"


@pytest.mark.parametrize("counts", [{"a": 30, "rare": 1}, {"a": 2, "b": 2}])
def test_too_few_images_of_a_class_are_told_before_a_file_is_written(tmp_path: Path, counts: dict[str, int]) -> None:
    answer = call(tmp_path, "init", "--data", photos(tmp_path / "p", **counts))
    assert answer.code == 3
    rarest = min(counts, key=lambda name: counts[name])
    assert f"class '{rarest}' has {counts[rarest]}" in answer.err
    assert not (tmp_path / "p.yaml").exists()


def test_a_file_for_cifar10_leaves_size_and_splits_as_they_are(tmp_path: Path) -> None:
    write_parquet(tmp_path / "c10" / "train.parquet", 10, CLASS_NAMES)
    assert call(tmp_path, "init", "--data", tmp_path / "c10").code == 0
    config = load_config(tmp_path / "c10.yaml").config
    assert (config.data.name, config.data.image_size, config.supernet.options["stem"]) == ("cifar10", None, "small")


def write_parquet(file: Path, count: int, names: Sequence[str]) -> None:
    """A shard of the hub with grey images of 16 x 16 pixels."""
    buffer = io.BytesIO()
    Image.new("L", (16, 16), 99).save(buffer, "PNG")
    table = pa.table(
        {
            "image": [{"bytes": buffer.getvalue(), "path": None}] * count,
            "label": [row % len(names) for row in range(count)],
        }
    )
    features = {"label": {"names": list(names), "_type": "ClassLabel"}}
    file.parent.mkdir(parents=True)
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}), file)


@pytest.mark.usefixtures("cache")
def test_a_file_for_parquet_files_of_the_hub_says_what_they_hold(tmp_path: Path) -> None:
    write_parquet(tmp_path / "mnist" / "train-00000-of-00001.parquet", 40, ("3", "7"))
    answer = call(tmp_path, "init", "--data", tmp_path / "mnist")
    assert answer.code == 0, answer.err
    config = load_config(tmp_path / "mnist.yaml").config
    assert (config.data.name, config.data.image_size) == ("parquet", None)
    text = (tmp_path / "mnist.yaml").read_text(encoding="utf-8")
    assert "40 images of 16 x 16 pixels in 2 classes." in text
    assert "the columns are image and label" in text


@pytest.mark.usefixtures("cache")
def test_a_network_of_the_user_is_written_with_its_weights_and_budgets(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", cats=20, dogs=20)
    torch.save(make_plain("mobilenet_v2", 2, 3, 0).state_dict(), tmp_path / "net.pth")
    options = ("--model", "mobilenet_v2", "--init-from", "net.pth", "--targets", "0.3,0.6, 1")
    answer = call(tmp_path, "init", "--data", folder, *options)
    assert answer.code == 0, answer.err
    config = load_config(tmp_path / "photos.yaml", known_models=family_names()).config
    supernet = config.supernet
    assert (supernet.model, dict(supernet.options), supernet.init_from) == (
        "mobilenet_v2",
        {},
        str(tmp_path / "net.pth"),
    )
    assert (supernet.structure.method, supernet.structure.targets) == ("uniform", (0.3, 0.6, 1.0))
    assert supernet.structure.order == "weight_l1"
    text = (tmp_path / "photos.yaml").read_text(encoding="utf-8")
    assert "normalization: null    # of the pixels, as in the training of the weights: imagenet" in text
    plan = call(tmp_path, "plan", "photos.yaml", "--dry", "--json")
    assert "does not record how the images of its training were normalised" in plan.err
    made = plan.json["supernet"]
    assert made["sub-networks"].startswith(
        "chosen by uniform for 0.3, 0.6, 1 of the widest's MAdds, channels sorted by"
    )
    assert made["start weights"].startswith("net.pth (sha256 ")
    assert made["normalization"].endswith("(mean and deviation of train, as net.pth records none)")
    assert [row["name"] for row in plan.json["subnets"]] == ["0.3", "0.6", "1"]


def test_the_next_commands_for_a_module_of_the_user_can_be_copied(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", cats=20, dogs=20)
    answer = call(tmp_path, "init", "--data", folder, "--model", TRACED[0], "--allow-imports")
    assert answer.out.splitlines()[-2:] == [
        "  dsnet-orch plan photos.yaml --allow-imports",
        "  dsnet-orch launch photos.yaml --allow-imports",
    ]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--targets", "0.3,2"), 2, "'0.3,2' is not a list of shares above 0 and at most 1"),
        (("--targets", "half"), 2, "'half' is not a list of shares"),
        (("--model", "mobilnet_v2"), 2, "did you mean 'mobilenet_v2'"),
        (("--init-from", "nowhere.pth"), 3, "no finished checkpoint at nowhere.pth"),
    ],
)
def test_a_network_that_is_not_there_is_refused(
    tmp_path: Path, options: tuple[str, ...], code: int, message: str
) -> None:
    answer = call(tmp_path, "init", "--data", photos(tmp_path / "p", a=20, b=20), *options)
    assert (answer.code, message in answer.err) == (code, True), answer.err
    assert not (tmp_path / "p.yaml").exists()
