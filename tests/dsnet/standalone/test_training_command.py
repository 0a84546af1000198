"""`python -m dsnet.training`: the same results however often it is interrupted, and clear
refusals."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import make_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dsnet.arithmetic import MKL_MODE, arithmetic_facts, mkl_mode
from dsnet.data.normalization import Normalization
from dsnet.data.registry import load_images
from dsnet.data.splits import make_splits
from dsnet.data.tensors import TensorData
from dsnet.errors import CheckpointError, ConfigError, DataError, LockedError, PreflightError, StoppedError
from dsnet.files import read_json
from dsnet.measure.evaluate import build_routing_table, measure_subnets, subnet_accuracy
from dsnet.measure.latency_table import LatencyTable
from dsnet.routing.routing_table import RoutingTable
from dsnet.space.cost import subnet_cost
from dsnet.standalone import __main__ as command
from dsnet.standalone import stages as standalone
from dsnet.standalone.output_folder import OutputFolder
from dsnet.standalone.resolved import StandaloneConfig
from dsnet.standalone.stages import run_standalone
from dsnet.stored.checkpoint import load_supernet, save_supernet
from dsnet.strict_json import read_strictly
from tests.full_disk import FullDisk

CONFIG: dict[str, Any] = {
    "seed": 5,
    "data": {"name": "digits", "limit": 90, "augment": {"cutout": 2}},
    "supernet": {
        "model": "ds_tiny",
        "options": {"width": 0.5, "num_routes": 3, "dropout": 0.2},
        "train": {"epochs": 3, "batch_size": 24, "lr": 0.05},
        "recalibration": {"batch_size": 30},
    },
    "measure": {"repeats": 1, "warmup": 0, "batch_sizes": [1], "group_sizes": [1, 2]},
}


NUM_WRITES = "num_writes"
"""Name of the file beside the output of `at_once` with its number of writes."""


def changed(**paths: Any) -> dict[str, Any]:
    """CONFIG with other values at dotted keys, whose dots are written as two underscores."""
    content = json.loads(json.dumps(CONFIG))
    for path, value in paths.items():
        *sections, last = path.split("__")
        place = content
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return content


def config(**paths: Any) -> StandaloneConfig:
    return StandaloneConfig.from_json(changed(**paths))


def results(out: Path) -> dict[str, object]:
    """Everything that must not depend on interruptions, to the bit."""
    names = ("supernet/final.safetensors", "supernet/final.json", "measure/subnets.json")
    tables = {split: table_content(out / "table" / f"{split}.safetensors") for split in ("gate", "val")}
    return {**{name: (out / name).read_bytes() for name in names}, **tables}


def table_content(path: Path) -> object:
    """A table's bits. Not the file's: the order of two entries of its header is random."""
    table = RoutingTable.load(path)
    return table.meta(), {name: (str(value.dtype), value.tobytes()) for name, value in table.arrays().items()}


def curves(out: Path) -> list[dict[str, Any]]:
    lines = (out / "supernet" / "curves.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "time_ms"} for line in lines]


class StopAt:
    """Returns True from the n-th call on."""

    def __init__(self, question: int) -> None:
        self.question = question
        self.count = 0

    def __call__(self) -> bool:
        self.count += 1
        return self.count >= self.question


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """The number of threads decides the last bits, and the command sets it for its process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSNET_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def at_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("at-once") / "out"
    disk = FullDisk(out, 10**9)
    with disk.installed():
        assert run_standalone(config(), out, device="cpu").is_done("table")
    (out.parent / NUM_WRITES).write_text(str(disk.num_writes))
    return out


def test_the_results_are_those_of_the_pipeline_s_functions(at_once: Path, tmp_path: Path) -> None:
    supernet, meta = load_supernet(at_once / "supernet" / "final")
    images = load_images("digits")
    splits = make_splits(images.labels.numpy(), images.official_test, seed=5, limit=90)
    data = TensorData.from_images(images, splits)
    normalization = Normalization.from_images(data.images("train"))
    assert meta["run"]["normalization"] == normalization.to_json()
    for split in ("gate", "val"):
        build_routing_table(supernet, data, split, normalization).save(tmp_path / split)
        assert table_content(at_once / "table" / f"{split}.safetensors") == table_content(tmp_path / split)
    assert read_json(at_once / "measure" / "subnets.json") == measure_subnets(supernet, data, "val", normalization)
    widest = supernet.subnets[supernet.subnets.by_madds()[-1]]
    top1, _ = subnet_accuracy(supernet, widest, data, "train", normalization)
    sample = {"split": "train", "num_images": data.num_images("train"), "name": widest.name, "top1": top1}
    assert read_json(at_once / "measure" / "train_sample.json") == sample
    latency = LatencyTable.from_json(read_json(at_once / "measure" / "latency.json"))
    assert set(latency.subnets) == {1}
    assert set(latency.tails) == {1, 2}


def test_images_that_are_no_squares_are_trained_measured_and_tabled(tmp_path: Path) -> None:
    settings = config(data__image_size=[8, 12], data__limit=60, supernet__train__epochs=1)
    assert StandaloneConfig.from_json(json.loads(json.dumps(settings.to_json()))) == settings
    folder = run_standalone(settings, tmp_path / "out", device="cpu")
    supernet, _ = load_supernet(folder.supernet / "final")
    assert supernet.spec.image_size == (8, 12)
    costs = [subnet_cost(supernet.spec, subnet, (8, 12)).madds for subnet in supernet.subnets]
    table = RoutingTable.load(folder.path / "table" / "val.safetensors")
    assert table.madds.tolist() == costs
    measured = read_json(folder.measure / "subnets.json")
    assert str(costs[-1]) in json.dumps(measured)
    latency = LatencyTable.from_json(read_json(folder.measure / "latency.json"))
    assert set(latency.tails[2]) == {subnet.name for subnet in supernet.subnets}


def test_the_manifest_records_mkls_mode(at_once: Path) -> None:
    assert read_json(at_once / "manifest.json")["arithmetic"] == arithmetic_facts()


@pytest.mark.skipif(mkl_mode() is None, reason="MKL does not run on this processor")
def test_the_command_chooses_mkls_mode_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MKL_MODE)
    assert command.main(["--config", "none.json", "--out", "none", "--max-seconds", "0"]) == ConfigError.exit_code
    assert os.environ[MKL_MODE] == mkl_mode()


@pytest.mark.slow
def test_every_named_device_has_its_table_and_one_that_is_there_is_not_timed_again(
    at_once: Path, tmp_path: Path
) -> None:
    settings = config(measure__devices={"two": {"device": "cpu", "threads": 2}, "auto": {"device": "auto"}})
    assert StandaloneConfig.from_json(json.loads(json.dumps(settings.to_json()))) == settings
    assert settings.changes(config()) == [
        f"measure.devices.{name}.{key}" for name in ("auto", "two") for key in ("device", "threads")
    ]
    out = tmp_path / "out"
    measure = out / "measure"
    with pytest.raises(StoppedError):
        run_standalone(settings, out, device="cpu", should_stop=lambda: (measure / "latency-two.json").exists())
    first = {name: (measure / name).read_bytes() for name in ("latency.json", "latency-two.json")}
    assert not (measure / "latency-auto.json").exists()
    folder = run_standalone(settings, out, device="cpu")
    assert {name: (measure / name).read_bytes() for name in first} == first
    tables = {
        name: LatencyTable.from_json(read_json(measure / f"latency{name}.json")) for name in ("", "-two", "-auto")
    }
    assert {name: table.threads for name, table in tables.items()} == {"": 1, "-two": 2, "-auto": 1}
    assert set(folder.manifest()["stages"]["measure"]["files"]) == {
        "subnets.json",
        "train_sample.json",
        "latency.json",
        "latency-two.json",
        "latency-auto.json",
    }
    assert results(out) == results(at_once)


def test_the_manifest_names_what_was_made_and_never_the_test_split(at_once: Path) -> None:
    manifest = read_json(at_once / "manifest.json")
    assert manifest["data"]["num_images"] == {"train": 90, "gate": 90, "val": 90}
    assert {name: entry["status"] for name, entry in manifest["stages"].items()} == dict.fromkeys(
        ("supernet", "measure", "table"), "done"
    )
    assert set(manifest["stages"]["table"]["files"]) == {"gate.safetensors", "val.safetensors"}
    assert not (at_once / "table" / "pieces").exists()
    assert StandaloneConfig.from_json(read_json(at_once / "resolved.json")) == config()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_run_cut_at_random_places_is_bit_identical(at_once: Path, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    num_calls = 0
    while True:
        try:
            run_standalone(config(), tmp_path, device="cpu", should_stop=StopAt(chance.randint(2, 32)))
            break
        except StoppedError:
            num_calls += 1
            assert num_calls < 60
    assert num_calls >= 1
    assert results(tmp_path) == results(at_once)
    assert curves(tmp_path) == curves(at_once)


@pytest.mark.slow
def test_a_table_made_in_pieces_over_several_calls_equals_the_whole(tmp_path: Path) -> None:
    settings = config(data__limit=None, supernet__train__epochs=1)
    whole = run_standalone(settings, tmp_path / "whole", device="cpu")
    for path in whole.table.iterdir():
        path.rename(tmp_path / path.name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(standalone, "PIECE_BATCHES", 1)
        assert RoutingTable.load(tmp_path / "val.safetensors").num_images > standalone.EVALUATION_BATCH
        for _ in range(3):
            with pytest.raises(StoppedError):
                run_standalone(settings, whole.path, device="cpu", should_stop=StopAt(3))
        run_standalone(settings, whole.path, device="cpu")
    for split in ("gate", "val"):
        name = f"{split}.safetensors"
        assert table_content(whole.table / name) == table_content(tmp_path / name)


def test_a_finished_folder_is_left_as_it_is(at_once: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in at_once.rglob("*") if path.parent != at_once and path.is_file()}
    run_standalone(config(data__path=None, supernet__keep_checkpoints=1), at_once, device="cpu", should_stop=StopAt(1))
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
def test_a_lost_file_is_made_again(at_once: Path, tmp_path: Path) -> None:
    first = run_standalone(config(), tmp_path, device="cpu")
    for path in (first.measure / "latency.json", first.table / "val.safetensors", first.supernet / "final.json"):
        path.unlink()
    assert not first.is_done("table")
    run_standalone(config(), tmp_path, device="cpu")
    assert results(tmp_path) == results(at_once)


@pytest.mark.parametrize("kept_size", [True, False])
@pytest.mark.parametrize(
    "name",
    ["supernet/final.safetensors", "supernet/final.json", "measure/subnets.json", "measure/latency.json",
     "table/gate.safetensors"],
)  # fmt: skip
def test_a_damaged_file_is_made_again(at_once: Path, tmp_path: Path, name: str, kept_size: bool) -> None:
    out = tmp_path / "out"
    shutil.copytree(at_once, out)
    content = bytearray((out / name).read_bytes())
    content[-3] ^= 1
    (out / name).write_bytes(content if kept_size else content[:-2])
    run_standalone(config(), out, device="cpu")
    assert all(OutputFolder(out).is_done(stage) for stage in ("supernet", "measure", "table"))
    assert results(out) == results(at_once)
    assert set(read_json(out / "measure" / "latency.json")) == set(read_json(at_once / "measure" / "latency.json"))


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    write_folder(tmp_path / "images", num_classes=2)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(PreflightError, match=r"images: holds files that .* \(class0, class1\); choose a new or empty"):
        run_standalone(config(), tmp_path / "images", device="cpu")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_first_call_that_was_killed_early_is_continued(at_once: Path, tmp_path: Path) -> None:
    for name in (".resolved.json.17-ab.tmp", ".manifest.json.17-ab.tmp"):
        (tmp_path / name).write_text("{", encoding="utf-8")
    shutil.copy(at_once / "resolved.json", tmp_path)
    with pytest.raises(StoppedError):
        run_standalone(config(), tmp_path, device="cpu", should_stop=StopAt(1))
    assert (tmp_path / "manifest.json").is_file()


def exchange_supernet(folder: OutputFolder) -> None:
    """Other weights in files of the same sizes, as a second training on a GPU gives."""
    supernet, meta = load_supernet(folder.supernet / "final")
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.mul_(-1.5)
    save_supernet(folder.supernet / "final", supernet, {name: meta[name] for name in ("run", "step")})
    folder.record("supernet", 0.0, [folder.supernet / f"final.{suffix}" for suffix in ("safetensors", "json")])
    assert folder.is_done("supernet")


def run_in_pieces(folder: OutputFolder, should_stop: Callable[[], bool] = lambda: False) -> None:
    """The stages with tables of two pieces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(standalone, "PIECE_BATCHES", 1)
        settings = config(data__limit=None, supernet__train__epochs=1)
        run_standalone(settings, folder.path, device="cpu", should_stop=should_stop)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but a trained supernet; only to be copied."""
    folder = OutputFolder(tmp_path_factory.mktemp("trained"))
    with pytest.raises(StoppedError):
        run_in_pieces(folder, lambda: folder.is_done("supernet"))
    assert not folder.is_done("measure")
    return folder.path


@pytest.fixture(scope="module")
def of_the_other(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The results of the other supernet, where there was no other one before."""
    folder = OutputFolder(shutil.copytree(trained, tmp_path_factory.mktemp("other") / "out"))
    exchange_supernet(folder)
    run_in_pieces(folder)
    return results(folder.path)


@pytest.mark.slow
@pytest.mark.parametrize("done", ["some rows", "accuracies", "a piece", "a table", "all"])
def test_what_was_made_of_another_supernet_is_made_again(
    tmp_path: Path, trained: Path, of_the_other: dict[str, object], done: str
) -> None:
    folder = OutputFolder(shutil.copytree(trained, tmp_path / "out"))
    reached = {
        "some rows": lambda: (folder.measure / "rows.json").exists(),
        "accuracies": lambda: (folder.measure / "subnets.json").exists(),
        "a piece": lambda: any(folder.table.glob("pieces/*")),
        "a table": lambda: (folder.table / "gate.safetensors").exists(),
        "all": lambda: False,
    }
    with nullcontext() if done == "all" else pytest.raises(StoppedError):
        run_in_pieces(folder, reached[done])
    exchange_supernet(folder)
    assert not folder.is_done("measure")
    assert not folder.is_done("table")
    run_in_pieces(folder)
    assert folder.is_done("measure")
    assert folder.is_done("table")
    assert results(folder.path) == of_the_other


def test_other_settings_and_other_images_need_another_folder(tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        run_standalone(config(), tmp_path, device="cpu", should_stop=StopAt(2))
    with pytest.raises(ConfigError, match=r"other settings \(measure\.repeats, supernet\.train\.lr\)"):
        run_standalone(config(measure__repeats=2, supernet__train__lr=0.1), tmp_path, device="cpu")
    manifest = read_json(tmp_path / "manifest.json")
    manifest["data"]["fingerprint"] = "0" * 64
    (tmp_path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(DataError, match="other images or splits"):
        run_standalone(config(), tmp_path, device="cpu")
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "result_versions": {}}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="another release"):
        run_standalone(config(), tmp_path, device="cpu")


def test_two_calls_never_share_a_folder(tmp_path: Path) -> None:
    with OutputFolder(tmp_path).held(), pytest.raises(LockedError, match="another call is using it"):
        run_standalone(config(), tmp_path, device="cpu")


def test_it_starts_from_an_earlier_output_with_its_normalization(at_once: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    settings = config(seed=6, supernet__init_from=str(at_once), supernet__train__epochs=1, supernet__model="ds_tiny")
    out = run_standalone(settings, tmp_path / "a", device="cpu", say=lines.append)
    run = read_json(out.supernet / "final.json")["run"]
    assert run["normalization"] == read_json(at_once / "supernet" / "final.json")["run"]["normalization"]
    assert run["origin"]["sha256"] == read_json(at_once / "supernet" / "final.json")["sha256"]
    assert any(line.startswith("supernet: starts from") for line in lines)

    kept = changed(
        supernet__model="checkpoint",
        supernet__options={},
        supernet__init_from=str(at_once),
        supernet__train__epochs=0,
        supernet__recalibration__images=0,
    )
    out = run_standalone(StandaloneConfig.from_json(kept), tmp_path / "b", device="cpu")
    assert (out.supernet / "final.safetensors").read_bytes() == (at_once / "supernet/final.safetensors").read_bytes()
    assert results(out.path)["val"] == results(at_once)["val"]


def test_a_written_normalization_is_used_and_replaces_that_of_the_start(at_once: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    written = {"mean": [0.2], "std": [0.4]}
    settings = config(
        data__normalization=written,
        supernet__init_from=str(at_once),
        supernet__train__epochs=1,
        supernet__model="ds_tiny",
    )
    assert StandaloneConfig.from_json(json.loads(json.dumps(settings.to_json()))) == settings
    assert "normalization" not in config().to_json()["data"]
    out = run_standalone(settings, tmp_path, device="cpu", say=lines.append)
    assert read_json(out.supernet / "final.json")["run"]["normalization"] == {"mean": [51.0], "std": [102.0]}
    assert any(line.startswith("warning: data.normalization (mean 0.2, std 0.4) replaces") for line in lines)


def test_with_another_class_count_the_classifier_is_trained_anew(at_once: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    write_folder(folder, num_classes=3)
    place = {"name": "image_folder", "path": str(folder), "image_size": 8}
    supernet = {**CONFIG["supernet"], "model": "checkpoint", "options": {}, "init_from": str(at_once)}
    grey = StandaloneConfig.from_json({**CONFIG, "data": place, "supernet": supernet})
    with pytest.raises(ConfigError, match=r"1 channel.*data has 3"):
        run_standalone(grey, tmp_path / "grey", device="cpu")
    colours = config(supernet__train__epochs=1)
    colours = replace(colours, data=replace(colours.data, **place, limit=None))
    write_folder(tmp_path / "four", num_classes=4)
    first = run_standalone(colours, tmp_path / "three", device="cpu")
    four = replace(
        colours,
        data=replace(colours.data, path=str(tmp_path / "four")),
        supernet=replace(colours.supernet, init_from=str(first.path)),
    )
    kept = replace(four.supernet, train=replace(four.supernet.train, epochs=0))
    with pytest.raises(ConfigError, match="does not have the 4 classes of the data"):
        run_standalone(replace(four, supernet=kept), tmp_path / "none", device="cpu")
    lines: list[str] = []
    out = run_standalone(four, tmp_path / "out", device="cpu", say=lines.append)
    assert load_supernet(out.supernet / "final")[0].spec.num_classes == 4
    assert any("newly initialised: classifier.weight, classifier.bias" in line for line in lines)


@pytest.mark.slow
def test_a_streamed_folder_trains_to_the_same_bits_in_one_call_and_in_many(tmp_path: Path) -> None:
    write_folder(tmp_path / "images", num_classes=3)
    place = {"name": "image_folder", "path": str(tmp_path / "images"), "image_size": 8, "stream": True, "limit": None}
    settings = config(supernet__train__batch_size=6)
    settings = replace(settings, data=replace(settings.data, **place))
    run_standalone(settings, tmp_path / "whole", device="cpu")
    for _ in range(2):
        with pytest.raises(StoppedError):
            run_standalone(settings, tmp_path / "cut", device="cpu", should_stop=StopAt(3))
    run_standalone(settings, tmp_path / "cut", device="cpu")
    assert results(tmp_path / "cut") == results(tmp_path / "whole")


def write_folder(folder: Path, num_classes: int) -> None:
    """Random colour images, 8 a class."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(num_classes)
    for label in range(num_classes):
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(8):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"class{label}/{number}.png")


# The configuration.


def test_a_configuration_survives_json() -> None:
    settings = config(data__splits={"gate": 0.2, "val": 100}, supernet__regime={"widths": "all", "norm": "group_norm"})
    assert StandaloneConfig.from_json(json.loads(json.dumps(settings.to_json()))) == settings


@pytest.mark.parametrize(
    ("wanted", "written", "read"),
    [
        (tuple[float, float] | None, [1, 0.5], (1.0, 0.5)),
        (tuple[float, float] | None, None, None),
        (tuple[tuple[int, ...], ...] | None, [[1, 2], []], ((1, 2), ())),
        (float | None, 3, 3.0),
        (float | int | None, 3, 3),
        (float | int | None, 0.5, 0.5),
    ],
)
def test_the_members_of_a_union_are_read_as_they_are_alone(wanted: Any, written: object, read: object) -> None:
    case: Any = make_dataclass("Case", [("value", wanted)])
    met = read_strictly(case, {"value": written}).value
    assert (met, repr(met)) == (read, repr(read))


def test_a_list_in_a_union_is_checked_like_any_other() -> None:
    case = make_dataclass("Case", [("value", tuple[float, float] | None)])
    for value, message in (
        ([1, 2, 3], "value has 3 values, but must have 2"),
        ([1, "2"], r"value\[1\] is '2', but must be a number"),
        ("12", "value is '12', but must be a list or null"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_strictly(case, {"value": value})


def test_crops_by_scale_can_be_asked_for(tmp_path: Path) -> None:
    settings = config(data__augment={"crop_scale": [0.2, 1]}, supernet__train__epochs=1)
    assert StandaloneConfig.from_json(json.loads(json.dumps(settings.to_json()))) == settings
    out = run_standalone(settings, tmp_path / "out", device="cpu")
    assert read_json(out.supernet / "final.json")["run"]["augmentation"]["crop_scale"] == [0.2, 1]
    run_standalone(settings, tmp_path / "out", device="cpu")


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ({"sead": 1}, r"^sead: unknown setting; did you mean 'seed'\? known: version, seed"),
        ({"supernet__train__epoch": 1}, r"supernet\.train\.epoch: unknown setting; did you mean 'epochs'"),
        ({"data__augment__flipp": True}, r"data\.augment\.flipp: unknown setting; did you mean 'flip'"),
        ({"supernet__train__epochs": "3"}, r"supernet\.train\.epochs is '3', but must be a whole number"),
        ({"supernet__train__epochs": True}, r"supernet\.train\.epochs is True, but must be a whole number"),
        ({"supernet__train__lr": float("nan")}, r"supernet\.train\.lr is nan, but must be a number"),
        ({"supernet__train__schedule": "linear"}, r"supernet\.train\.schedule is 'linear'; known: cosine"),
        ({"supernet__recalibration__images": -1}, r"supernet\.recalibration\.images is -1"),
        ({"measure__batch_sizes": [1, "2"]}, r"measure\.batch_sizes\[1\] is '2', but must be a whole number"),
        ({"measure__device": "gpu"}, r"measure\.device is 'gpu'; did you mean 'cpu'\? known: auto, cpu, cuda"),
        (
            {"measure__devices": {"a": {"device": "gpu"}}},
            r"measure\.devices\.a\.device is 'gpu'; did you mean 'cpu'\? known: auto, cpu, cuda",
        ),
        (
            {"measure__devices": {"a": {"thread": 2}}},
            r"measure\.devices\.a\.thread: unknown setting; did you mean 'threads'",
        ),
        (
            {"measure__devices": {"a": {"threads": "2"}}},
            r"measure\.devices\.a\.threads is '2', but must be a whole number",
        ),
        ({"measure__devices": {"a": 2}}, r"measure\.devices\.a is 2, but must be a JSON object"),
        ({"measure__devices": []}, r"measure\.devices is \[\], but must be a JSON object"),
        ({"measure__devices": {"a b": {}}}, r"measure\.devices: 'a b' is not a valid device name"),
        ({"data__augment__crop_padding": -1}, r"data\.augment\.crop_padding is -1"),
        ({"supernet__train__momentum": 1}, r"supernet\.train\.momentum is 1\.0, but must be at least 0 and below 1"),
        ({"supernet__bootstrapping__ema_decay": 2}, r"supernet\.bootstrapping\.ema_decay is 2"),
        ({"measure__repeats": 0}, r"measure\.repeats is 0, but must be at least 1"),
        ({"measure__threads": 0}, r"measure\.threads is 0, but must be at least 1"),
        ({"measure__warmup": -1}, r"measure\.warmup is -1, but must be at least 0"),
        ({"measure__batch_sizes": []}, r"measure\.batch_sizes is \(\), but must be a list of at least 1 value$"),
        ({"measure__batch_sizes": [4, 1]}, r"measure\.batch_sizes: sizes must increase; got \[4, 1\], write \[1, 4\]"),
        ({"measure__group_sizes": [2, 4]}, r"measure\.group_sizes: must start at 1; got \[2, 4\]"),
        ({"supernet__train__lr": 1e300}, r"supernet\.train\.lr is 1e\+300, but must be above 0 and at most 1e\+06"),
        (
            {"supernet__train__accumulate": 5},
            r"supernet\.train\.batch_size: 24 images cannot be shared equally among 1 worker x 5 micro-batches with at least 2 each",
        ),
        (
            {"data__augment__randaugment_ops": 99},
            r"data\.augment\.randaugment_ops is 99, but must be at least 0 and at most 14",
        ),
        ({"version": 2}, r"version is 2, but this release reads 1"),
        (
            {"data__normalization": "imagenett"},
            r"data\.normalization is 'imagenett', but must be one of imagenet or a JSON",
        ),
        ({"data__normalization": {"mean": [33]}}, r"data\.normalization\.std: missing"),
        (
            {"data__normalization": {"mean": [33], "std": [70]}},
            r"data\.normalization\.mean: \[33.*\] is not in the unit",
        ),
        ({"data": []}, r"data is \[\], but must be a JSON object"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_its_dotted_key(paths: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**paths)


def test_missing_settings_are_named() -> None:
    with pytest.raises(ConfigError, match="data, supernet: missing"):
        StandaloneConfig.from_json({})


# The command line.


def call(folder: Path, *arguments: str, content: object = CONFIG) -> int:
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return command.main(["--config", f"{folder}/config.json", "--out", f"{folder}/out", "--threads", "1", *arguments])


def test_the_command_says_one_line_of_json_and_everything_else_on_stderr(
    at_once: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(tmp_path, "--device", "cpu") == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["stages"] == dict.fromkeys(("supernet", "measure", "table"), "done")
    assert told.out.count("\n") == 1
    assert "supernet: done" in told.err
    assert results(tmp_path / "out") == results(at_once)


@pytest.mark.parametrize(
    ("content", "arguments", "code", "message"),
    [
        (changed(data__nam="digits"), (), 2, "did you mean 'name'"),
        ({**CONFIG, "data": {"name": "cifar10", "path": "/no/such/folder"}}, (), 3, "/no/such/folder"),
        (changed(supernet__init_from="/no/such/run"), (), 3, "no finished checkpoint at /no/such/run"),
        (changed(supernet__model="ds_tony"), (), 2, "did you mean 'ds_tiny'"),
        (changed(supernet__train__epochs=0), (), 2, "epochs is 0"),
        (changed(data__crop_fraction=0.5), (), 2, "data.crop_fraction: only an image_folder is cropped"),
        (CONFIG, ("--max-seconds", "0"), 2, "--max-seconds is 0"),
        (CONFIG, ("--max-seconds", "nan"), 2, "--max-seconds is nan, but must be above 0"),
        (CONFIG, ("--threads", "0"), 2, "--threads is 0"),
    ],
)
def test_errors_are_one_line_on_stderr_and_an_exit_code(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: object,
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    assert call(tmp_path, *arguments, content=content) == code
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ")
    assert message in told.err
    assert told.err.count("\n") == 1
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.slow
def test_a_call_ends_before_its_time_and_one_that_gets_nowhere_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(tmp_path, "--max-seconds", "0.001") == 6
    assert json.loads(capsys.readouterr().out)["status"] == "stopped"
    assert call(tmp_path, "--max-seconds", "0.001") == 2
    assert "nothing could be finished within --max-seconds 0.001" in capsys.readouterr().err
    assert call(tmp_path) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 6)])
def test_a_signal_stops_at_the_next_step(
    at_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    def strike(text: str) -> None:
        if text.startswith("supernet: epoch"):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(command, "_say", strike)
    assert call(tmp_path, "--device", "cpu") == code
    manifest = read_json(tmp_path / "out" / "manifest.json")
    assert manifest["stages"]["supernet"]["status"] == "running"
    monkeypatch.undo()
    assert call(tmp_path, "--device", "cpu") == 0
    assert results(tmp_path / "out") == results(at_once)


def _has_checkpoint(out: Path) -> bool:
    return any(out.glob("supernet/epoch-*.json"))


def _has_supernet(out: Path) -> bool:
    return (out / "supernet" / "final.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("seen", [_has_checkpoint, _has_supernet])
def test_a_killed_process_is_continued_to_the_same_bits(
    at_once: Path, tmp_path: Path, seen: Callable[[Path], bool]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    arguments = ["--config", "config.json", "--out", "out", "--threads", "1", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dsnet.training", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    give_up = time.monotonic() + 60
    while not seen(tmp_path / "out") and process.poll() is None and time.monotonic() < give_up:
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert seen(tmp_path / "out")
    assert call(tmp_path, "--device", "cpu") == 0
    assert results(tmp_path / "out") == results(at_once)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.45, 0.85])
def test_a_full_disk_is_said_and_the_call_afterwards_ends_with_the_same_bits(
    at_once: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], share: float
) -> None:
    num_writes = int((at_once.parent / NUM_WRITES).read_text())
    disk = FullDisk(tmp_path / "out", int(share * num_writes))
    with disk.installed():
        code = call(tmp_path, "--device", "cpu")
    assert disk.failed
    told = capsys.readouterr().err
    has_begun = (tmp_path / "out" / "manifest.json").exists()
    assert has_begun == (share > 0)
    assert code == (6 if has_begun else 3)
    assert [line for line in told.splitlines() if line.startswith("error: ")] == [
        line for line in told.splitlines() if "No space left on device" in line and str(tmp_path / "out") in line
    ]
    assert told.count("error: ") == 1
    assert ("repeat the command" in told) == has_begun
    assert call(tmp_path, "--device", "cpu") == 0
    assert results(tmp_path / "out") == results(at_once)


def test_a_call_leaves_its_reserve_free(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(tmp_path, "--min-free-mib", "1000000000") == 3
    told = capsys.readouterr().err
    assert "1,000,000,000 MiB" in told
    assert "--min-free-mib" in told
    assert not (tmp_path / "out").exists()
    assert call(tmp_path, "--min-free-mib", "-1") == ConfigError.exit_code
    free = iter([300] * 8)
    monkeypatch.setattr("dsnet.disk_room.free_bytes", lambda path: next(free, 100) * 2**20)
    assert call(tmp_path) == 6
    assert f"{tmp_path}/out has 100 MiB free, but --min-free-mib asks for 256 MiB" in capsys.readouterr().err
