"""Settings that a sweep leaves to its data: filled in before stage keys, in what plan shows and in
what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsnet.errors import ConfigError
from dsnet.standalone.resolved import StandaloneConfig
from dsnet.training.data_defaults import DERIVED_KEYS
from orchestration.config.stage_keys import stage_subset
from orchestration.config.sweep import SweepConfig
from orchestration.prepare.preparation import Prepared, prepare, stage_definitions
from orchestration.runs.stages import stage_key
from tests.orchestration.samples import call, write_sweep

WRITTEN = {
    "train": {"epochs": 30, "batch_size": 64, "lr": 0.1, "weight_decay": 1e-4, "warmup_epochs": 2, "num_random": 2},
    "recalibration": {"images": None},
    "bootstrapping": {"trust": "full"},
}
MINIMAL = "version: 1\nname: minimal\ndata: {name: digits}\nsupernet: {model: ds_tiny}\n"


def sweep(supernet: dict[str, Any], **sections: Any) -> SweepConfig:
    settings = {"version": 1, "name": "t", "data": {"name": "digits"}, **sections}
    return SweepConfig.model_validate({**settings, "supernet": {"model": "ds_tiny", "device": "cpu", **supernet}})


def supernet_key(prepared: Prepared) -> str:
    definition = stage_definitions(prepared)[0]
    return stage_key("supernet", 1, definition.config, "data", [])


def test_a_file_that_writes_all_of_them_has_the_stage_key_that_it_always_had() -> None:
    config = sweep(WRITTEN, data={"name": "digits", "augment": {"randaugment_ops": 0}})
    key = stage_key("supernet", 1, stage_subset(config, "supernet"), "data", [])
    assert key == "0a2a1c81c1df4d25246df57672376f2f879d707ddd40bbba59db52aba464eb77"
    prepared = prepare(config)
    assert prepared.config == config
    assert not set(prepared.derived) & set(DERIVED_KEYS)
    assert prepared.decided_by_data() == ""
    assert supernet_key(prepare(sweep(WRITTEN))) == supernet_key(prepared)  # the only operations that digits would get


def test_what_the_data_decide_enters_the_stage_key_as_if_it_had_been_written() -> None:
    left_open = prepare(sweep({}))
    train = left_open.config.supernet.train
    names = ("epochs", "batch_size", "lr", "weight_decay", "warmup_epochs")
    assert None not in [getattr(train, name) for name in names]
    same = {"train": {name: getattr(train, name) for name in names}, "recalibration": {"images": None}}
    assert supernet_key(prepare(sweep(same))) == supernet_key(left_open)
    assert supernet_key(prepare(sweep({}, data={"name": "digits", "limit": 60}))) != supernet_key(left_open)
    assert left_open.supernet_run.train.epochs == train.epochs
    assert f"batch_size {train.batch_size}, epochs {train.epochs}, " in left_open.decided_by_data()
    again = prepare(SweepConfig.model_validate(left_open.config.model_dump(mode="json")))
    assert stage_definitions(again) == stage_definitions(left_open)


@pytest.mark.parametrize("images", [7, None])
def test_a_number_of_images_and_all_of_them_can_be_asked_for(images: int | None) -> None:
    prepared = prepare(sweep({"recalibration": {"images": images}}))
    assert prepared.supernet_run.recalibration_images == images
    assert "supernet.recalibration.images" not in prepared.derived


def test_a_batch_that_workers_cannot_share_is_told_with_its_origin() -> None:
    with pytest.raises(ConfigError, match=r"3 workers.*supernet\.train\.batch_size 32 follows from the data"):
        prepare(sweep({"workers": 3}))


def test_a_set_of_a_few_images_can_be_prepared() -> None:
    tiny = {"name": "digits", "limit": 10}
    prepared = prepare(sweep({}, data=tiny))
    batch_size = prepared.config.supernet.train.batch_size
    assert batch_size is not None
    assert 2 <= batch_size <= 10


def test_the_published_preset_leaves_nothing_of_the_training_to_the_data(tmp_path: Path) -> None:
    write_sweep(tmp_path, MINIMAL)
    settings = call(tmp_path, "plan", "tiny.yaml", "--dry", "--preset", "paper", "--json").json["settings"]
    assert {settings[key]["origin"] for key in DERIVED_KEYS} == {"preset paper"}
    assert settings["supernet.recalibration.images"]["value"] is None


def test_plan_tells_what_the_data_decided_and_why_and_writes_it_for_a_machine_without_ray(tmp_path: Path) -> None:
    write_sweep(tmp_path, MINIMAL)
    written = ["--set", "supernet.train.epochs=3"]
    settings = call(tmp_path, "plan", "tiny.yaml", "--dry", *written, "--json", "--resolved", "resolved.json").json[
        "settings"
    ]
    assert settings["supernet.train.epochs"] == {"value": 3, "origin": "--set"}
    decided = {key for key, setting in settings.items() if setting["origin"] == "data"}
    augment = {"data.augment.crop_padding", "data.augment.flip"}
    assert decided == augment | set(DERIVED_KEYS) - {"supernet.train.epochs"}
    assert all(settings[key]["reason"] for key in decided)
    assert (settings["data.augment.crop_padding"]["value"], settings["data.augment.flip"]["value"]) == (1, False)
    resolved = StandaloneConfig.from_json(json.loads((tmp_path / "resolved.json").read_text(encoding="utf-8")))
    train = resolved.supernet.train
    assert (train.epochs, train.batch_size, train.lr) == (
        3,
        settings["supernet.train.batch_size"]["value"],
        settings["supernet.train.lr"]["value"],
    )
