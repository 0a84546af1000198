"""Defaults that follow from the training images: sane for every size of data, and consistent among
themselves."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsnet.training.data_defaults import (
    ADAMW_DECAY,
    BATCH_SIZE,
    DECAY,
    DERIVED_KEYS,
    EPOCHS,
    MAX_BATCH,
    MAX_DECAY,
    MAX_EPOCHS,
    MIN_BATCH,
    MIN_DECAY,
    MIN_STEPS,
    RANDAUGMENT,
    RATE,
    RECALIBRATION,
    RECALIBRATION_IMAGES,
    USUAL_EPOCHS,
    WARMUP,
    WEIGHT_DECAY,
    DataDefault,
    DataFacts,
    data_defaults,
)
from dsnet.training.settings import TrainSettings


def facts(num_train: int = 1134, **changed: Any) -> DataFacts:
    settings = {"num_classes": 10, "smallest_class": 100, "image_size": 64, "channels": 3, "can_mirror": True}
    return DataFacts(num_train=num_train, **{**settings, "madds_m": 17.0, **changed})


def values(defaults: dict[str, DataDefault]) -> dict[str, Any]:
    return {key: default.value for key, default in defaults.items()}


def test_a_thousand_photos_get_a_small_batch_and_enough_steps() -> None:
    found = data_defaults(facts(1134), "ds_resnet")
    assert found[BATCH_SIZE].value == MIN_BATCH
    assert "1,134 images would give only 8 steps an epoch at 128" in found[BATCH_SIZE].reason
    steps_per_epoch = 1134 // found[BATCH_SIZE].value
    assert MIN_STEPS <= steps_per_epoch * found[EPOCHS].value < MIN_STEPS + steps_per_epoch
    assert f"an epoch has {steps_per_epoch}" in found[EPOCHS].reason
    assert found[RECALIBRATION].value is None
    assert found[RATE].value == 0.08


def test_trained_weights_get_a_quarter_of_the_rate() -> None:
    fresh, pretrained = (data_defaults(facts(40_000, is_pretrained=value), "resnet18") for value in (False, True))
    assert (fresh[RATE].value, pretrained[RATE].value) == (0.16, 0.04)
    assert "0.08 for fresh weights" in pretrained[RATE].reason
    written = data_defaults(facts(40_000, is_pretrained=True), "resnet18", {RATE: 0.1})
    assert RATE not in written


def test_a_large_set_gets_large_batches_and_its_rate_follows_the_root_of_the_batch() -> None:
    found = values(data_defaults(facts(40_000, madds_m=1.0), "ds_resnet"))
    assert found[BATCH_SIZE] == MAX_BATCH
    assert found[EPOCHS] == USUAL_EPOCHS
    assert found[RATE] == pytest.approx(0.16)
    assert found[RECALIBRATION] == RECALIBRATION_IMAGES


def test_weight_decay_rises_where_the_training_is_short_and_stays_as_published_where_it_is_long() -> None:
    short = data_defaults(facts(1134), "ds_resnet")[WEIGHT_DECAY]
    assert short.value == pytest.approx(DECAY / (0.08 * MIN_STEPS), rel=0.05)
    assert "0.08 x 3," in short.reason
    medium = data_defaults(facts(40_000, madds_m=1.0), "ds_resnet")[WEIGHT_DECAY]
    assert MIN_DECAY < medium.value < short.value
    published = {RATE: 0.08, EPOCHS: 150, BATCH_SIZE: 512}
    assert data_defaults(facts(1_281_167), "ds_mbnet", published)[WEIGHT_DECAY].value == MIN_DECAY
    assert data_defaults(facts(), "ds_resnet", {EPOCHS: 0})[WEIGHT_DECAY].value == MAX_DECAY
    adamw = {"supernet.train.optimizer": "adamw"}
    assert data_defaults(facts(), "ds_resnet", adamw)[WEIGHT_DECAY].value == ADAMW_DECAY


def test_a_training_that_takes_a_cpu_hours_gets_fewer_epochs_and_says_why() -> None:
    dense = data_defaults(facts(40_000, madds_m=60.0), "ds_resnet")[EPOCHS]
    depthwise = data_defaults(facts(40_000, madds_m=60.0), "ds_mbnet")[EPOCHS]
    tokens = data_defaults(facts(40_000, madds_m=60.0), "ds_vit")[EPOCHS]
    assert depthwise.value <= tokens.value < dense.value < USUAL_EPOCHS
    assert "CPU" in depthwise.reason


@pytest.mark.parametrize("num_train", [1, 2, 3, 12, 40])
def test_a_handful_of_images_makes_no_batch_larger_than_the_set(num_train: int) -> None:
    found = data_defaults(facts(num_train, smallest_class=1), "ds_resnet")
    assert 2 <= found[BATCH_SIZE].value <= max(2, num_train)
    assert found[EPOCHS].value <= MAX_EPOCHS
    assert values(found)[RECALIBRATION] is None


def test_what_somebody_wrote_is_kept_and_the_others_follow_from_it() -> None:
    found = values(data_defaults(facts(), "ds_resnet", {BATCH_SIZE: 128, EPOCHS: 4}))
    assert not {BATCH_SIZE, EPOCHS} & found.keys()
    assert found[RATE] == pytest.approx(0.16)
    assert found[WARMUP] <= 4
    beyond = values(data_defaults(facts(40), "ds_resnet", {BATCH_SIZE: 512}))
    assert 1 <= beyond[EPOCHS] <= MAX_EPOCHS
    assert values(data_defaults(facts(), "ds_resnet", {"supernet.train.optimizer": "adamw"}))[RATE] < 0.005


def test_a_warm_up_that_somebody_wrote_fits_into_the_epochs() -> None:
    found = values(data_defaults(facts(40_000, madds_m=1.0), "ds_resnet", {WARMUP: 50.0}))
    assert found[EPOCHS] >= 50


def test_digits_are_not_distorted() -> None:
    found = data_defaults(facts(988, image_size=8, channels=1, can_mirror=False), "ds_tiny")
    assert found[RANDAUGMENT].value == 0


@given(
    num_train=st.integers(1, 3_000_000),
    madds_m=st.floats(0.001, 20_000),
    family=st.sampled_from(["ds_resnet", "ds_mbnet", "ds_tiny", "another"]),
    given=st.fixed_dictionaries(
        {},
        optional={
            BATCH_SIZE: st.integers(2, 4096),
            EPOCHS: st.integers(0, 500),
            "supernet.train.accumulate": st.sampled_from([1, 2, 3, 24]),
        },
    ),
)
def test_whatever_the_data_the_settings_are_complete_and_can_train(
    num_train: int, madds_m: float, family: str, given: dict[str, Any]
) -> None:
    found = data_defaults(facts(num_train, madds_m=madds_m), family, given)
    assert found.keys() | given.keys() == {*DERIVED_KEYS, *given}
    assert all(default.reason and not default.reason.endswith(".") for default in found.values())
    merged = {**values(found), **given}
    accumulate = given.get("supernet.train.accumulate", 1)
    if BATCH_SIZE in given:
        accumulate = 1
    train = TrainSettings(
        epochs=merged[EPOCHS],
        batch_size=merged[BATCH_SIZE],
        lr=merged[RATE],
        warmup_epochs=merged[WARMUP],
        accumulate=accumulate,
    )
    if EPOCHS not in given:
        assert 1 <= train.epochs <= MAX_EPOCHS


def test_the_defaults_need_no_torch() -> None:
    code = "import sys, dsnet.training.data_defaults; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
