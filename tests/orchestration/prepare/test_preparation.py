"""From the configuration to the core's own terms: training settings, stage keys, start weights."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dsnet.data.normalization import Normalization
from dsnet.data.training_images import InMemoryImages
from dsnet.errors import CheckpointError, ConfigError
from dsnet.families import Task, create, rebuild
from dsnet.network.plain import make_plain
from dsnet.stored.checkpoint import save_supernet
from dsnet.structure.methods import structure_method
from dsnet.training.settings import REGIMES, Regime
from dsnet.training.start import CHECKPOINT_MODEL as CORE_CHECKPOINT_MODEL
from dsnet.training.supernet_run import SupernetRun
from orchestration.config.stage_keys import stage_subset
from orchestration.config.supernet import CHECKPOINT_MODEL
from orchestration.config.sweep import SweepConfig
from orchestration.prepare.adoption import standalone_config
from orchestration.prepare.preparation import Prepared, prepare, stage_definitions, supernet_record
from orchestration.runs.folder import RunDir
from orchestration.runs.manifest import Manifest
from orchestration.runs.stages import plan_stages, run_stage

RECORDED = Normalization((30.0,), (60.0,))


def prepared_with(supernet: dict[str, Any], **sections: Any) -> Prepared:
    """Digits, few of them, on a small network."""
    settings: dict[str, Any] = {"version": 1, "name": "t", "data": {"name": "digits", "limit": 60}}
    options = {} if supernet.get("model") == CHECKPOINT_MODEL else {"options": {"num_routes": 3, "width": 0.5}}
    written = {"model": "ds_tiny", "device": "cpu", **options, **supernet}
    return prepare(SweepConfig.model_validate({**settings, "supernet": written, **sections}))


def supernet_key_parts(prepared: Prepared) -> dict[str, Any]:
    return dict(stage_definitions(prepared)[0].config)


def checkpoint(stem: Path, *, num_classes: int = 10, seed: int = 7, in_channels: int = 1, **meta: Any) -> Path:
    """A stored ds_tiny of 3 routes and half the width."""
    task = Task(num_classes=num_classes, in_channels=in_channels, image_size=8)
    supernet = create("ds_tiny", task, {"num_routes": 3, "width": 0.5}, seed=seed)
    save_supernet(stem, supernet, meta)
    return stem


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"gate": {"routing": {"beam": 2, "first": 2}}},
            "gate.routing.first: 2 names .* has 3 here, of which gate.routing.beam keeps 2",
        ),
        ({"gate": {"routing": {"beam": 2, "last": -3}}}, "gate.routing.last: -3 names no sub-network; .* lie in -2..1"),
        (
            {"gate": {"routing": {"last": 2}}, "space": {"gate.routing.beam": {"int": [2, 5]}}},
            "gate.routing.last: 2 names",
        ),
        ({"gate": {"routing": {"last": 3, "beam": 9}}}, r"has 3 here, so it must lie in -3\.\.2"),
    ],
)
def test_routes_are_counted_in_what_the_beam_leaves(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepared_with({}, **sections)
    assert prepared_with({}, gate={"routing": {"beam": 2, "first": 1, "last": 1}})


def test_a_network_with_a_single_sub_network_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    full = create("ds_tiny", Task(10, 1, 8), {"num_routes": 3, "width": 0.5})
    save_supernet(tmp_path / "one", rebuild(full.subnets.subset([1])), {})
    with pytest.raises(ConfigError, match=r"model checkpoint: subnet-01 is the only .* nothing to choose; .*options"):
        prepared_with({"model": CHECKPOINT_MODEL, "init_from": str(tmp_path / "one")})


def test_a_penalty_on_scales_needs_batch_norm(tmp_path: Path) -> None:
    train = {"gamma_l1": 1e-4}
    assert prepared_with({"train": train}).supernet_run.train.gamma_l1 == 1e-4
    with pytest.raises(ConfigError, match=r"gamma_l1 is 0.0001, but this network has no BatchNorm"):
        prepared_with({"train": {**train, "bn": "group_norm"}})


def test_training_settings_arrive_in_the_core() -> None:
    prepared = prepared_with(
        {
            "regime": "us_net",
            "train": {"num_random": 1, "schedule": "one_cycle", "accumulate": 2, "precision": "bf16"},
            "bootstrapping": {"ema_decay": 0.9, "teacher_min_updates": 3},
            "recalibration": {"images": 50},
        },
        data={
            "name": "digits",
            "limit": 60,
            "augment": {"crop_scale": [0.5, 1], "erasing": 0.25, "randaugment_ops": 1},
        },
        seed=5,
    )
    run = prepared.supernet_run
    assert run.regime == replace(REGIMES["us_net"], num_random=1)
    assert (run.train.schedule, run.train.accumulate, run.train.precision) == ("one_cycle", 2, "bf16")
    assert (run.bootstrapping.ema_decay, run.bootstrapping.teacher_min_updates) == (0.9, 3)
    assert (run.augmentation.crop_scale, run.augmentation.erasing, run.augmentation.crop_padding) == ((0.5, 1), 0.25, 0)
    assert (run.recalibration_images, run.seed, dict(run.origin)) == (50, 5, {})
    assert SupernetRun.from_json(run.to_json()) == run


def test_the_regime_decides_how_the_network_is_laid_out() -> None:
    assert prepared_with({"regime": "s_net"}).subnets.spec.norm == "private_affine"
    assert prepared_with({"regime": "s_net", "train": {"bn": "group_norm"}}).subnets.spec.norm == "group_norm"
    assert prepared_with({}).subnets.spec.norm == "private_stats"


@pytest.mark.parametrize("written", [{"regime": "ib"}, {"bootstrapping": {"mode": "ib", "num_random": 3}}])
def test_two_ways_to_write_a_regime_are_one_stage(written: dict[str, Any]) -> None:
    assert stage_definitions(prepared_with(written)) == stage_definitions(prepared_with({}))


@pytest.mark.parametrize(
    "written", [{"regime": "ieb"}, {"train": {"bn": "group_norm"}}, {"train": {"accumulate": 2}}, {"regime": "ce"}]
)
def test_another_training_is_another_stage(written: dict[str, Any]) -> None:
    assert supernet_key_parts(prepared_with(written)) != supernet_key_parts(prepared_with({}))


def test_the_training_split_is_handed_to_the_loop_without_a_copy() -> None:
    prepared = prepared_with({})
    run = prepared.supernet_run
    data = prepared.training_images()
    assert isinstance(data, InMemoryImages)
    assert data.images.data_ptr() == prepared.data.images("train").data_ptr()
    assert torch.equal(data.labels, prepared.data.labels("train"))
    assert data.augmentation == run.augmentation


def test_a_streamed_folder_keeps_its_training_split_in_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSNET_CACHE", str(tmp_path / "cache"))
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        folder = tmp_path / "images" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number:02d}.png")
    data = {"name": "image_folder", "path": str(tmp_path / "images"), "image_size": 8}
    streamed, in_memory = (prepared_with({}, data={**data, "stream": stream}) for stream in (True, False))
    assert set(streamed.data.splits) == {"gate", "val"}
    assert streamed.splits.hash == in_memory.splits.hash
    assert torch.equal(streamed.data.images("val"), in_memory.data.images("val"))
    assert set(streamed.open_test().splits) == {"gate", "val", "test"}
    images = streamed.training_images()
    (clean,) = images.clean([torch.arange(len(images.labels))], torch.device("cpu"))
    assert torch.equal(clean, in_memory.data.images("train"))
    assert torch.equal(images.labels, in_memory.data.labels("train"))
    assert [plan.config for plan in stage_definitions(streamed)] != [
        plan.config for plan in stage_definitions(in_memory)
    ]


# Start weights.


def test_fresh_weights_have_no_origin() -> None:
    prepared = prepared_with({})
    assert prepared.start is None
    assert supernet_key_parts(prepared)["start"] is None


def test_start_weights_enter_the_key_by_their_content_and_not_by_their_path(tmp_path: Path) -> None:
    here = checkpoint(tmp_path / "here")
    for suffix in (".safetensors", ".json"):
        shutil.copy(here.with_suffix(suffix), tmp_path / f"there{suffix}")
    other = checkpoint(tmp_path / "other", seed=8)
    keys = [supernet_key_parts(prepared_with({"init_from": str(path)})) for path in (here, tmp_path / "there", other)]
    assert keys[0] == keys[1]
    assert keys[0]["start"] != keys[2]["start"]
    assert {**keys[0], "start": None} == supernet_key_parts(prepared_with({}))


def test_what_a_checkpoint_records_of_normalisation_holds(tmp_path: Path) -> None:
    stem = checkpoint(tmp_path / "final", run={"normalization": RECORDED.to_json()})
    prepared = prepared_with({"init_from": str(tmp_path)})
    run = prepared.supernet_run
    assert prepared.normalization == run.normalization == RECORDED
    assert prepared.start is not None
    assert prepared.start.path == stem
    assert prepared.start.fresh == ()
    assert run.origin["sha256"] == prepared.start.sha256
    unknown = prepared_with({"init_from": str(checkpoint(tmp_path / "bare"))})
    assert unknown.normalization == Normalization.from_images(unknown.data.images("train"))


WRITTEN = {"mean": [0.2], "std": [0.4]}


def with_normalization(written: object, supernet: dict[str, Any] | None = None) -> Prepared:
    return prepared_with(supernet or {}, data={"name": "digits", "limit": 60, "normalization": written})


def test_a_written_normalisation_arrives_everywhere_and_wins(tmp_path: Path) -> None:
    checkpoint(tmp_path / "final", run={"normalization": RECORDED.to_json()})
    wanted = Normalization((51.0,), (102.0,))
    prepared = with_normalization(WRITTEN)
    assert prepared.normalization == prepared.supernet_run.normalization == wanted
    assert prepared.chosen_normalization.reason == "by data.normalization"
    assert standalone_config(prepared.config).data.normalization == WRITTEN
    greedy = {"structure": {"method": "greedy", "targets": [0.5, 1.0], "pin": "gate"}}
    chosen = with_normalization(WRITTEN, greedy).structure
    assert chosen is not None
    (base,) = structure_method("greedy").bases(chosen.problem)
    assert base.run.normalization == wanted
    other = with_normalization(WRITTEN, {"init_from": str(tmp_path)})
    assert other.normalization == wanted
    (warning,) = [text for text in other.warnings() if "normalization" in text]
    assert "data.normalization (mean 0.2, std 0.4) replaces" in warning
    assert "final was trained (mean 0.118, std 0.235)" in warning


@pytest.mark.parametrize("supernet", [{}, {"structure": {"method": "uniform", "targets": [0.5, 1.0], "pin": "gate"}}])
def test_a_written_normalisation_is_part_of_the_key_and_null_is_not(supernet: dict[str, Any]) -> None:
    null, written = with_normalization(None, supernet), with_normalization(WRITTEN, supernet)
    assert supernet_key_parts(null) == supernet_key_parts(prepared_with(supernet))
    assert "normalization" not in supernet_key_parts(null).get("data", {})
    assert supernet_key_parts(written)["data"]["normalization"] == {"mean": (0.2,), "std": (0.4,)}
    assert supernet_record(written).key != supernet_record(null).key


def test_two_ways_to_write_a_normalisation_are_one_stage() -> None:
    values = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    keys = [
        stage_subset(
            SweepConfig.model_validate(
                {
                    "version": 1,
                    "name": "t",
                    "data": {"name": "cifar10", "normalization": written},
                    "supernet": {"model": "ds_tiny"},
                }
            ),
            "supernet",
        )
        for written in ("imagenet", values)
    ]
    assert keys[0] == keys[1]


def test_a_normalisation_of_other_channels_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.normalization has 3 values .* have 1 channel"):
        with_normalization("imagenet")


def test_weights_that_record_no_normalisation_give_a_warning(tmp_path: Path) -> None:
    bare = {"init_from": str(checkpoint(tmp_path / "bare"))}
    prepared = prepared_with(bare)
    assert prepared.chosen_normalization.reason == "mean and deviation of train, as bare records none"
    (warning,) = [text for text in prepared.warnings() if "normalised" in text]
    assert "supernet.init_from: bare does not record how" in warning
    assert "write data.normalization: imagenet, or {mean: [...], std: [...]}" in warning
    assert with_normalization(WRITTEN, bare).warnings() == ()
    fresh = prepared_with({})
    assert (fresh.warnings(), fresh.chosen_normalization.reason) == ((), "mean and deviation of train")


PLAIN: dict[str, Any] = {"model": "tests.dsnet.nets:Residual", "options": {"step": 2}}


def test_a_plain_state_dict_starts_with_a_smaller_learning_rate(tmp_path: Path) -> None:
    """A checkpoint of a supernet keeps the usual one."""
    torch.save(make_plain(PLAIN["model"], 10, 1, 0).state_dict(), tmp_path / "net.pth")
    fresh = prepared_with(PLAIN)
    plain = prepared_with({**PLAIN, "init_from": str(tmp_path / "net.pth")})
    save_supernet(tmp_path / "final", rebuild(fresh.subnets), {})
    stored = prepared_with({**PLAIN, "init_from": str(tmp_path)})
    rates = [each.supernet_run.train.lr for each in (fresh, plain, stored)]
    assert rates == [0.057, 0.014, 0.057]  # at batch 16
    assert "0.08 for fresh weights" in plain.derived["supernet.train.lr"].reason
    assert plain.start is not None
    assert plain.start.fresh == ()
    assert (
        prepared_with({**PLAIN, "init_from": str(tmp_path / "net.pth"), "train": {"lr": 0.05}})
        .derived.keys()
        .isdisjoint({"supernet.train.lr"})
    )


def test_a_run_continues_where_the_state_dict_is_gone(tmp_path: Path) -> None:
    source = tmp_path / "net.pth"
    torch.save(make_plain(PLAIN["model"], 10, 1, 0).state_dict(), source)
    settings = {
        "version": 1,
        "name": "t",
        "data": {"name": "digits", "limit": 60},
        "supernet": {"device": "cpu", **PLAIN, "init_from": str(source)},
    }
    config = SweepConfig.model_validate(settings)
    run = RunDir(tmp_path / "runs", "t")
    before = prepare(config, run)
    (plan, *_) = plan_stages(run, stage_definitions(before))
    run.path.mkdir(parents=True)
    Manifest(run.manifest_path).create(seed=0, hardware={})

    def trained(folder: Path) -> list[Path]:
        save_supernet(folder / "final", rebuild(before.subnets), {"run": before.supernet_run.to_json()})
        return [folder / "final.safetensors", folder / "final.json"]

    run_stage(run, plan, trained)
    source.unlink()
    said: list[str] = []
    after = prepare(config, run, said.append)
    assert after.supernet_run.train.lr == before.supernet_run.train.lr == 0.014
    assert supernet_record(after).key == supernet_record(before).key
    assert "does not exist any more; run 't' continues" in said[0]


def test_a_relative_path_is_made_absolute_for_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path / "final")
    monkeypatch.chdir(tmp_path)
    start = prepared_with({"init_from": "final"}).start
    assert start is not None
    assert start.path == tmp_path / "final"


def test_the_model_checkpoint_takes_the_network_that_is_stored(tmp_path: Path) -> None:
    stem = checkpoint(tmp_path / "final", num_classes=4)
    taken, same = prepared_with({"model": CHECKPOINT_MODEL, "init_from": str(stem)}), prepared_with({})
    assert CHECKPOINT_MODEL == CORE_CHECKPOINT_MODEL
    assert taken.subnets == same.subnets
    assert taken.start is not None
    assert set(taken.start.fresh) == {"classifier.weight", "classifier.bias"}
    with pytest.raises(ConfigError, match=r"supernet\.train.bn is 'group_norm', but the network of"):
        prepared_with({"model": CHECKPOINT_MODEL, "init_from": str(stem), "train": {"bn": "group_norm"}})


def test_weights_are_taken_as_they_are_only_with_the_same_classes(tmp_path: Path) -> None:
    as_they_are = {"train": {"epochs": 0}, "recalibration": {"images": 0}}
    run = prepared_with({"init_from": str(checkpoint(tmp_path / "same")), **as_they_are}).supernet_run
    assert (run.train.epochs, run.recalibration_images) == (0, 0)
    with pytest.raises(ConfigError, match=r"supernet\.train.epochs is 0, but .* does not have the 10 classes"):
        prepared_with({"init_from": str(checkpoint(tmp_path / "other", num_classes=4)), **as_they_are})


def test_start_weights_that_do_not_fit_are_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"supernet\.init_from"):
        prepared_with({"init_from": str(tmp_path / "nowhere")})
    with pytest.raises(CheckpointError, match="does not fit"):
        prepared_with({"init_from": str(checkpoint(tmp_path / "final")), "options": {"num_routes": 3, "width": 1.0}})
    stem = checkpoint(tmp_path / "colour", in_channels=3)
    with pytest.raises(ConfigError, match="reads images of 3 channel"):
        prepared_with({"init_from": str(stem), "model": CHECKPOINT_MODEL})


def test_without_a_regime_the_core_gets_in_place_bootstrapping() -> None:
    assert prepared_with({}).supernet_run.regime == Regime() == REGIMES["ib"]


@pytest.mark.parametrize(
    ("gate", "space", "said"),
    [
        ({"router": "gates"}, {}, ["gate.router gates: ds_tiny has one gate, so gates equals gate"]),
        (
            {},
            {"gate.router": {"choice": ["gate", "evidence_gates"]}},
            ["gate.router evidence_gates: ds_tiny has one gate, so evidence_gates equals evidence_gate"],
        ),
        ({"target_madds_m": 1000.0}, {}, ["gate.target_madds_m 1000 lies outside the sub-networks'"]),
        ({"router": "cascade"}, {}, []),
    ],
)
def test_routers_that_the_network_cannot_use_are_warned_about(
    gate: dict[str, Any], space: dict[str, Any], said: list[str]
) -> None:
    swept = space or {"gate.sgs.t_easy": {"uniform": [0.0, 0.5]}}
    warnings = prepared_with({}, gate=gate, space=swept).warnings()
    assert len(warnings) == len(said)
    for warning, start in zip(warnings, said, strict=True):
        assert warning.startswith(start)


def test_a_condition_finer_than_one_image_of_val_is_warned_about() -> None:
    num_val = len(prepared_with({}).splits.val)
    fine, coarse = 0.5 / num_val, 2.0 / num_val
    for constraint, is_warned in (
        (f"top1 >= baseline.top1 - {fine:.6f}", True),
        (f"top1 >= baseline.top1 - {coarse:.6f}", False),
        ("top1 >= baseline.top1", False),
        ("madds_m <= 0.0001", False),
    ):
        warnings = prepared_with({}, constraints=[constraint]).warnings()
        assert any("too fine for the" in warning and constraint in warning for warning in warnings) == is_warned


def test_conditions_that_nothing_on_this_network_can_hold_are_warned_about() -> None:
    hopeless = prepared_with({}, constraints=["top1 >= 95"], budget={"trials": 4, "target": ["madds_m <= 0.0001"]})
    first, second = (warning for warning in hopeless.warnings() if "no router of this network can satisfy" in warning)
    assert first.startswith("constraints: ")
    assert "top1 >= 95 (reachable values: top1 0 to 1)" in first
    assert second.startswith("budget.target: ")
    assert "madds_m <= 0.0001" in second
    open_to_all = prepared_with({}, constraints=["top1 >= 0.95"], budget={"trials": 4, "target": ["madds_m <= 1000"]})
    assert not any("can hold" in warning for warning in open_to_all.warnings())


@pytest.mark.parametrize(
    ("gate", "space", "said"),
    [
        ({}, {"gate.target": 0.5}, None),
        ({"router": "gate", "routing": {"first": 2}}, {"gate.target": 0.5}, None),
        ({"router": "cascade", "routing": {"first": 2}}, {"gate.target": 0.5}, "1 of 1 setting of"),
        (
            {},
            {
                "gate.router": {"choice": ["gate", "cascade"]},
                "gate.routing.first": {"int": [0, 2]},
                "gate.routing.stride": {"int": [1, 3]},
            },
            # First 2; first 1 with a stride of 2 or 3; first 0 with a stride of 3: one of three.
            "6 of 18 settings of router and routing leave too few of the 3 sub-networks",
        ),
    ],
)
def test_a_space_in_which_trials_have_too_few_routes_is_warned_about(
    gate: dict[str, Any], space: dict[str, Any], said: str | None
) -> None:
    warnings = [
        text for text in prepared_with({}, gate=gate, space=space).warnings() if text.startswith("gate.routing:")
    ]
    assert [said in text for text in warnings] == ([] if said is None else [True])


def test_the_views_are_part_of_the_key_where_the_teacher_has_its_own() -> None:
    same, own = prepared_with({}), prepared_with({"regime": "mvco"})
    assert "views" not in supernet_key_parts(same)["supernet"]["regime"]
    assert supernet_key_parts(own)["supernet"]["regime"]["views"] == "own"
    assert SupernetRun.from_json(own.supernet_run.to_json()) == own.supernet_run
    assert "views" not in same.supernet_run.to_json()["regime"]


def test_two_views_of_images_that_nothing_augments_are_told() -> None:
    data = {"name": "digits", "limit": 60, "augment": {"crop_padding": 0, "flip": False}}
    (warning,) = [text for text in prepared_with({"regime": "mvco"}, data=data).warnings() if "views" in text]
    assert "both views are equal" in warning
    assert not any("views" in text for text in prepared_with({"regime": "mvco"}).warnings())
