"""A run folder of the first release keeps its settings: those of its sweep.yaml, and of the
configuration that it wrote for `python -m dsnet.training`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dsnet.standalone.resolved import StandaloneConfig
from orchestration.config.loading import load_config
from orchestration.config.presets import BUILT_IN_PRESETS
from orchestration.config.supernet import resolve_regime
from orchestration.config.sweep import SweepConfig
from tests.orchestration.samples import write_sweep

BOOTSTRAPPING = {"ema_decay": 0.997, "ema_warmup": True, "soft_ramp_epochs": 0.0, "teacher_min_updates": 100}
"""All that the first release wrote out, beside the older names of two other settings."""
HEAD = "version: 1\nname: old\ndata: {name: digits}\n"


def loaded(folder: Path, supernet: dict[str, Any], **options: Any) -> SweepConfig:
    bootstrapping = {"mode": None, "num_random": None, **BOOTSTRAPPING, **supernet.pop("bootstrapping", {})}
    section = {"model": "ds_tiny", "bootstrapping": bootstrapping, **supernet}
    text = HEAD + "supernet: " + repr(section).replace("None", "null").replace("True", "true") + "\n"
    return load_config(write_sweep(folder, text), **options).config


def test_a_run_of_the_first_release_keeps_its_soft_labels_and_its_two_random_sub_networks(tmp_path: Path) -> None:
    config = loaded(tmp_path, {})
    assert (config.supernet.bootstrapping.trust, config.supernet.bootstrapping.largest_first) == ("full", 0.0)
    assert resolve_regime(config.supernet).num_random == 2
    assert loaded(tmp_path, {}, overrides=["supernet.train.num_random=4"]).supernet.train.num_random == 4


@pytest.mark.parametrize(
    ("supernet", "num_random"),
    [
        ({"train": {"num_random": 1}}, 1),
        ({"bootstrapping": {"num_random": 2}, "train": {"num_random": None}}, 2),
        ({"regime": "ce"}, 0),
        ({"regime": "us_net"}, 2),
        ({"regime": "ieb"}, 2),
        ({"train": {"widths": "all"}}, 0),
    ],
)
def test_what_its_file_says_of_the_random_sub_networks_holds(
    tmp_path: Path, supernet: dict[str, Any], num_random: int
) -> None:
    assert resolve_regime(loaded(tmp_path, supernet).supernet).num_random == num_random


def test_a_file_that_a_person_wrote_or_this_release_takes_the_defaults_of_today(tmp_path: Path) -> None:
    config = load_config(write_sweep(tmp_path, HEAD + "supernet: {model: ds_tiny}\n")).config
    assert config.supernet.bootstrapping.trust == "label_probability"
    assert resolve_regime(config.supernet).num_random == 3
    assert loaded(tmp_path, {"bootstrapping": {"trust": "label_probability"}}).supernet.bootstrapping.trust != "full"


def test_a_resolved_file_of_the_first_release_trains_as_it_did() -> None:
    def read(bootstrapping: dict[str, Any]) -> StandaloneConfig:
        supernet = {"model": "ds_tiny", "bootstrapping": bootstrapping}
        return StandaloneConfig.from_json({"data": {"name": "digits"}, "supernet": supernet})

    old = read(BOOTSTRAPPING)
    assert old.supernet.bootstrapping.trust == BUILT_IN_PRESETS["paper"]["supernet"]["bootstrapping"]["trust"] == "full"
    assert StandaloneConfig.from_json(old.to_json()) == old
    assert read({"ema_decay": 0.9}).supernet.bootstrapping.trust == "label_probability"
