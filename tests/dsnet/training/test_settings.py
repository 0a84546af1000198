"""The settings of Stage I: ranges, and the way through JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, get_args

import pytest

from dsnet.errors import ConfigError
from dsnet.training.settings import (
    REGIMES,
    TEACHER_OF_MODE,
    TRAIN_ADDED,
    BootstrapMode,
    BootstrapSettings,
    Regime,
    RegimeName,
    Teacher,
    TrainSettings,
    sharing_problem,
)
from dsnet.training.supernet_run import SupernetRun
from tests.dsnet.samples import small_run


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Regime(teacher="iib"), "supernet.train.teacher is 'iib'; known: none"),
        (lambda: Regime(widths="some"), "supernet.train.widths is 'some'; known: sandwich, all"),
        (lambda: Regime(norm="instance"), "supernet.train.bn is 'instance'; known: private_stats"),
        (lambda: Regime(num_random=-1), "supernet.train.num_random is -1"),
        (
            lambda: Regime(teacher="ema_ensemble", num_random=0),
            "averages the teacher with random sub-networks and needs at least 1",
        ),
        (lambda: TrainSettings(epochs=-1), "supernet.train.epochs is -1, but must be at least 0"),
        (lambda: TrainSettings(optimizer="lion"), "supernet.train.optimizer is 'lion'; known: sgd, adamw"),
        (lambda: TrainSettings(schedule="step"), "supernet.train.schedule is 'step'"),
        (lambda: TrainSettings(precision="fp8"), "supernet.train.precision is 'fp8'; known: float32, bf16"),
        (lambda: small_run(weights="teacher"), "supernet.weights is 'teacher'"),
        (lambda: small_run(keep_checkpoints=0), "keep_checkpoints is 0"),
    ],
)
def test_settings_out_of_range_are_refused_when_built(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()


COUNT = "at least 1"
COUNT_FROM_0 = "at least 0"
BELOW_ONE = "at least 0 and below 1"
# setting: (the value at the edge that is allowed, values outside, the range in words)
TRAIN: dict[str, tuple[float, tuple[float, ...], str]] = {
    "epochs": (0, (-1,), COUNT_FROM_0),
    "batch_size": (2, (0, -4), COUNT),
    "accumulate": (1, (0,), COUNT),
    "checkpoint_every": (1, (0,), COUNT),
    "lr": (1e-9, (0, 0.0, -0.1, 1e300), "above 0 and at most 1e+06"),
    "momentum": (0, (-0.1, 1.0, 1.5), BELOW_ONE),
    "weight_decay": (0, (-1e-9, 1e300), "at least 0 and at most 1e+06"),
    "warmup_epochs": (0, (-0.5,), COUNT_FROM_0),
    "label_smoothing": (0, (-0.1, 1), BELOW_ONE),
    "soft_weight": (0, (-0.1, 1.1), "at least 0 and at most 1"),
    "temperature": (1e-9, (0, -1.0), "above 0"),
    "gamma_l1": (0, (-1e-5,), COUNT_FROM_0),
    "grad_clip": (1e-9, (0, -1.0), "above 0 or null"),
}
BOOTSTRAPPING: dict[str, tuple[float, tuple[float, ...], str]] = {
    "ema_decay": (0, (-0.1, 1.0), BELOW_ONE),
    "soft_ramp_epochs": (0, (-1,), COUNT_FROM_0),
    "largest_first": (0, (-0.1, 1.0), BELOW_ONE),
    "teacher_min_updates": (0, (-1,), COUNT_FROM_0),
}
RUN: dict[str, tuple[float, tuple[float, ...], str]] = {
    "recalibration_images": (0, (-1,), "at least 0 or null"),
    "recalibration_batch": (1, (0,), COUNT),
    "keep_checkpoints": (1, (0,), COUNT),
    "seed": (2**32 - 1, (-1, 2**32), "at least 0 and below 4294967296"),
}
KEYS = {
    "recalibration_images": "supernet.recalibration.images",
    "recalibration_batch": "supernet.recalibration.batch_size",
    "keep_checkpoints": "supernet.keep_checkpoints",
    "seed": "seed",
}
WHOLE = {"epochs", "batch_size", "accumulate", "checkpoint_every", "teacher_min_updates", "num_random", *RUN}
EVERY = [
    *((TrainSettings, "supernet.train.", name, *limits) for name, limits in TRAIN.items()),
    *((BootstrapSettings, "supernet.bootstrapping.", name, *limits) for name, limits in BOOTSTRAPPING.items()),
    *((small_run, "", name, *limits) for name, limits in RUN.items()),
    (Regime, "supernet.train.", "num_random", 0, (-1,), COUNT_FROM_0),
]


@pytest.mark.parametrize(("build", "section", "name", "edge", "outside", "limits"), EVERY)
def test_every_number_has_a_range_and_is_finite(
    build: Callable[..., Any], section: str, name: str, edge: float, outside: tuple[float, ...], limits: str
) -> None:
    assert getattr(build(**{name: edge}), name) == edge
    for value in outside:
        with pytest.raises(ConfigError) as told:
            build(**{name: value})
        assert str(told.value) == f"{section}{KEYS.get(name, name)} is {value!r}, but must be {limits}"
    kind = "a whole number" if name in WHOLE else "a number"
    for nonsense in (math.nan, math.inf, True, "1", *([1.5] if name in WHOLE else [])):
        with pytest.raises(ConfigError) as told:
            build(**{name: nonsense})
        assert str(told.value).startswith(f"{section}{KEYS.get(name, name)} is {nonsense!r}, but must be {kind}")


def test_what_may_be_left_to_its_default_may_be_null() -> None:
    assert TrainSettings(grad_clip=None).grad_clip is None
    assert small_run(recalibration_images=None).recalibration_images is None


@pytest.mark.parametrize(("batch_size", "accumulate"), [(1, 1), (32, 3), (32, 32), (2, 4)])
def test_micro_batches_are_equal_and_have_2_images_or_more(batch_size: int, accumulate: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"supernet\.train\.batch_size: {batch_size} images cannot be shared equally"
    ):
        TrainSettings(batch_size=batch_size, accumulate=accumulate)
    assert sharing_problem(4 * batch_size * accumulate, 2, accumulate) is None


def test_the_warm_up_ends_before_training_where_there_is_any() -> None:
    assert TrainSettings(epochs=3, warmup_epochs=3).warmup_epochs == 3
    assert TrainSettings(epochs=0, warmup_epochs=5).warmup_epochs == 5
    with pytest.raises(ConfigError, match=r"train\.warmup_epochs: 3\.5 epochs of warm-up do not fit into 3 epochs"):
        TrainSettings(epochs=3, warmup_epochs=3.5)


def test_every_name_of_a_regime_or_mode_has_its_parts() -> None:
    assert tuple(REGIMES) == get_args(RegimeName)
    assert tuple(TEACHER_OF_MODE) == get_args(BootstrapMode)
    assert set(TEACHER_OF_MODE.values()) == set(get_args(Teacher))


def test_settings_survive_json() -> None:
    run = small_run("ieb", origin={"file": "final.safetensors", "sha256": "ab"})
    assert SupernetRun.from_json(json.loads(json.dumps(run.to_json()))) == run
    with pytest.raises(ConfigError, match="not the settings of a supernet's training"):
        SupernetRun.from_json({**run.to_json(), "colour": "red"})


def test_records_have_newer_settings_of_the_training_only_where_they_change_it() -> None:
    """The first release had none of them, and its checkpoints continue."""
    plain = small_run()
    assert not TRAIN_ADDED.keys() & plain.to_json()["train"].keys()
    for name, value in (("soft_weight", 0.9), ("temperature", 4.0), ("gamma_l1", 1e-5)):
        changed = small_run(train=TrainSettings(**{name: value}))
        assert changed.to_json()["train"].items() >= {name: value}.items()
        assert len(TRAIN_ADDED.keys() & changed.to_json()["train"].keys()) == 1
        assert SupernetRun.from_json(json.loads(json.dumps(changed.to_json()))) == changed
    assert {getattr(TrainSettings(), name) for name in TRAIN_ADDED} == {1.0, 0.0}
    assert all(getattr(TrainSettings(), name) == value for name, value in TRAIN_ADDED.items())


def test_records_of_the_first_release_are_read_as_it_trained() -> None:
    """It had no `trust` and no `largest_first`; records of runs by the published settings still
    have neither."""
    published = small_run(bootstrapping=BootstrapSettings(trust="full"))
    assert not {"trust", "largest_first"} & published.to_json()["bootstrapping"].keys()
    assert SupernetRun.from_json(published.to_json()).bootstrapping.trust == "full"
    ours = small_run(bootstrapping=BootstrapSettings(largest_first=0.1))
    assert ours.to_json()["bootstrapping"].items() >= {"trust": "label_probability", "largest_first": 0.1}.items()
