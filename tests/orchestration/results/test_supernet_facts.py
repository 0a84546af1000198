"""How a supernet was made, in words and as MLflow's parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dsnet.families import rebuild
from dsnet.stored.checkpoint import save_supernet
from orchestration.config.supernet import CHECKPOINT_MODEL
from orchestration.config.sweep import SweepConfig
from orchestration.pipeline.supernet import done_sentence
from orchestration.prepare.preparation import Prepared, prepare
from orchestration.results.supernet_facts import SupernetFacts, dry_layout, resolved_settings
from tests.orchestration.samples import Finished


def config_with(supernet: dict[str, Any]) -> SweepConfig:
    settings = {"version": 1, "name": "t", "data": {"name": "digits", "limit": 60}}
    return SweepConfig.model_validate({**settings, "supernet": {"model": "ds_tiny", "device": "cpu", **supernet}})


def stored(folder: Path, prepared: Prepared) -> Path:
    """A finished supernet stage with untrained weights."""
    save_supernet(folder / "final", rebuild(prepared.subnets), {"run": prepared.supernet_run.to_json()})
    return folder


def test_a_regime_is_told_by_what_it_comes_to() -> None:
    train = {"epochs": 30, "batch_size": 32, "lr": 0.1}
    lines = dict(SupernetFacts.of_prepared(prepare(config_with({"train": train}))).lines(None))
    assert lines["network"] == "ds_tiny with 6 sub-networks, norm private_stats"
    assert lines["supernet regime"] == "ib: widths sandwich, num_random 3, teacher ema"
    assert lines["supernet training"].startswith("30 epochs, 32 images a step, sgd, lr 0.1 (cosine), precision float32")
    assert (lines["start weights"], lines["BatchNorm statistics"]) == (
        "fresh",
        "estimated again on all training images",
    )
    own = SupernetFacts.of_prepared(prepare(config_with({"regime": "s_net", "train": {"teacher": "ema"}})))
    assert dict(own.lines(None))["supernet regime"] == "of its own: widths all, teacher ema"
    assert dict(own.lines(None))["network"].endswith("norm private_affine")


def test_a_stage_tells_what_its_preparation_told(tmp_path: Path) -> None:
    prepared = prepare(config_with({"train": {"precision": "bf16", "bn": "group_norm"}}))
    facts = SupernetFacts.of_prepared(prepared)
    assert SupernetFacts.of_stage(stored(tmp_path, prepared)) == facts
    assert dict(facts.lines(None))["BatchNorm statistics"] == "none"
    assert "precision bf16" in dict(facts.lines(None))["supernet training"]


def test_what_another_release_recorded_is_not_guessed(tmp_path: Path) -> None:
    save_supernet(tmp_path / "final", rebuild(prepare(config_with({})).subnets), {"run": {"weather": "fine"}})
    assert SupernetFacts.of_stage(tmp_path) is None


@pytest.mark.parametrize(
    ("images", "statistics", "done"),
    [
        (0, "those of the start weights", "used unchanged"),
        (50, "estimated again on 50 training images", "not trained; recalibrated in 3 s"),
    ],
)
def test_weights_that_were_taken_over_are_not_called_trained(
    tmp_path: Path, images: int, statistics: str, done: str
) -> None:
    source = str(stored(tmp_path, prepare(config_with({}))))
    taken = {"init_from": source, "train": {"epochs": 0}, "recalibration": {"images": images}}
    prepared = prepare(config_with({"model": CHECKPOINT_MODEL, **taken}))
    facts = SupernetFacts.of_prepared(prepared)
    lines = dict(facts.lines(source))
    assert "supernet regime" not in lines
    assert lines["network"].startswith("ds_tiny with 6 sub-networks")
    assert lines["supernet training"] == "0 epochs: the start weights as they are"
    assert prepared.start is not None
    assert (
        lines["start weights"]
        == f"final.safetensors (sha256 {prepared.start.sha256[:12]}), by supernet.init_from {source}"
    )
    assert lines["BatchNorm statistics"] == statistics
    assert done_sentence(facts, 3.2) == done


def test_a_supernet_that_was_trained_is_called_so() -> None:
    assert done_sentence(SupernetFacts.of_prepared(prepare(config_with({}))), 11.4) == "trained in 11 s"


def test_only_names_that_need_it_are_explained() -> None:
    resnet = config_with({"model": "ds_resnet", "options": {"depth": 8}})
    assert "path-013" in SupernetFacts.of_prepared(prepare(resnet)).naming
    assert SupernetFacts.of_prepared(prepare(config_with({}))).naming == ""


def test_the_settings_of_a_regime_stand_in_the_place_of_nulls() -> None:
    named = resolved_settings(config_with({"regime": "us_net"}))["train"]
    assert {name: named[name] for name in ("widths", "num_random", "teacher", "bn")} == {
        "widths": "sandwich",
        "num_random": 2,
        "teacher": "inplace",
        "bn": "recalibrate",
    }
    paths = {"model": "ds_resnet", "options": {"depth": 8, "ratios": [0.5, 1.0], "paths": "all"}}
    assert resolved_settings(config_with(paths))["train"]["bn"] == "group_norm"
    taken = config_with({"model": CHECKPOINT_MODEL, "init_from": "anywhere"})
    assert dry_layout(taken) is None
    assert resolved_settings(taken)["train"]["bn"] == CHECKPOINT_MODEL


def test_a_finished_run_tells_how_its_supernet_was_made(finished: Finished) -> None:
    facts = finished.results.supernet
    assert facts is not None
    assert facts.run.train.epochs == 8
    html = finished.run.report_html.read_text(encoding="utf-8")
    for what, how in facts.lines(None):
        assert f"<dt>{what}</dt><dd>{how}</dd>" in html
