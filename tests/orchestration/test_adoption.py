"""Output of `python -m dsnet.training` as finished stages of a sweep."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsnet.errors import CheckpointError
from dsnet.training.output_folder import OutputFolder
from dsnet.training.resolved import StandaloneConfig
from dsnet.training.standalone import run_standalone
from orchestration.adoption import Adoption, adopt, find_adoption, standalone_config
from orchestration.config import SweepConfig
from orchestration.preparation import Prepared, prepare, stage_definitions, supernet_run
from orchestration.rundir import Manifest, RunDir
from orchestration.stages import plan_stages

SWEEP: dict[str, Any] = {
    "version": 1,
    "name": "t",
    "data": {"name": "digits", "limit": 60},
    "supernet": {
        "model": "ds_tiny",
        "options": {"num_routes": 3, "width": 0.5},
        "device": "cpu",
        "train": {"epochs": 2, "batch_size": 20},
    },
    "measure": {"repeats": 1, "warmup": 0, "batch_sizes": [1], "group_sizes": [1]},
}


def sweep(measure: dict[str, Any] | None = None, data: dict[str, Any] | None = None, **supernet: Any) -> SweepConfig:
    train = {**SWEEP["supernet"]["train"], **supernet.pop("train", {})}
    sections = {
        "supernet": {**SWEEP["supernet"], **supernet, "train": train},
        "measure": {**SWEEP["measure"], **(measure or {})},
        "data": {**SWEEP["data"], **(data or {})},
    }
    return SweepConfig.model_validate({**SWEEP, **sections})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_standalone(standalone_config(sweep()), tmp_path_factory.mktemp("made") / "out", device="cpu").path


def found(config: SweepConfig) -> tuple[Adoption | None, Prepared]:
    prepared = prepare(config)
    assert config.supernet.init_from is not None
    measure = standalone_config(config).measure
    where = Path(config.supernet.init_from)
    return find_adoption(where, supernet_run(prepared), prepared.subnets, prepared.fingerprint, measure), prepared


def test_the_written_configuration_is_complete_and_survives_json() -> None:
    written = standalone_config(sweep(train={"lr": 0.05}))
    assert written.supernet.train.lr == 0.05
    assert StandaloneConfig.from_json(written.to_json()) == written
    plain = prepare(sweep(train={"lr": 0.05}))
    assert written.supernet_run(plain.image_set, plain.normalization) == supernet_run(plain)


def test_what_the_same_settings_made_becomes_finished_stages_under_the_key_of_training_afresh(
    made: Path, tmp_path: Path
) -> None:
    adoption, prepared = found(sweep(init_from=str(made), keep_checkpoints=1, train={"checkpoint_every": 2}))
    assert adoption is not None
    assert (adoption.stages, dict(adoption.origin)) == (("supernet", "measure", "table"), {})
    definitions = stage_definitions(replace(prepared, start=None))
    afresh = stage_definitions(prepare(sweep()))
    run = RunDir(tmp_path, "t")
    run.create()
    Manifest(run.manifest_path).create(seed=0, hardware={})
    plans = {plan.name: plan for plan in plan_stages(run, definitions)}
    assert {name: plan.key for name, plan in plans.items()} == {
        plan.name: plan.key for plan in plan_stages(run, afresh)
    }
    assert adopt(run, plans, adoption) == ["supernet", "measure", "table"]
    again = {plan.name: plan for plan in plan_stages(run, definitions)}
    for name in adoption.stages:
        assert again[name].is_done
        again[name].folder.check_hashes()
        for file, path in again[name].folder.outputs().items():
            assert path.read_bytes() == (made / name / file).read_bytes()
    assert run.curves_jsonl(again["supernet"].key).is_file()
    assert adopt(run, again, adoption) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"lr": 0.05}},
        {"train": {"epochs": 1}},
        {"train": {"epochs": 0}},
        {"options": {"num_routes": 3, "width": 0.5, "dropout": 0.5}},
        {"data": {"limit": 50}},
        {"data": {"augment": {"cutout": 3}}},
    ],
)
def test_other_settings_take_start_weights_alone(made: Path, changes: dict[str, Any]) -> None:
    adoption, prepared = found(sweep(init_from=str(made), **changes))
    assert adoption is None
    assert prepared.start is not None


def test_another_measurement_is_made_anew(made: Path) -> None:
    adoption, _ = found(sweep(init_from=str(made), measure={"repeats": 2}))
    assert adoption is not None
    assert adoption.stages == ("supernet", "table")


def test_a_checkpoint_alone_is_never_adopted(made: Path) -> None:
    assert found(sweep(init_from=str(made / "supernet")))[0] is None
    assert found(sweep(init_from=str(made / "supernet" / "final.json")))[0] is None


def test_what_started_from_weights_is_adopted_with_their_record(made: Path, tmp_path: Path) -> None:
    settings = {"train": {"lr": 0.02}}
    second = run_standalone(
        standalone_config(sweep(init_from=str(made), **settings)), tmp_path / "second", device="cpu"
    )
    adoption, _ = found(sweep(init_from=str(second.path), **settings))
    assert adoption is not None
    assert adoption.origin == found(sweep(init_from=str(made), **settings))[1].start.origin  # type: ignore[union-attr]


def test_a_file_that_was_exchanged_is_not_copied(made: Path, tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path / "copy")
    run_standalone(standalone_config(sweep()), folder.path, device="cpu")
    adoption, prepared = found(sweep(init_from=str(folder.path)))
    assert adoption is not None
    damaged = folder.measure / "subnets.json"
    damaged.write_bytes(damaged.read_bytes().replace(b"1", b"2"))
    run = RunDir(tmp_path, "t")
    run.create()
    Manifest(run.manifest_path).create(seed=0, hardware={})
    definitions = stage_definitions(replace(prepared, start=None))
    plans = {plan.name: plan for plan in plan_stages(run, definitions)}
    with pytest.raises(CheckpointError, match="not the file that its training wrote"):
        adopt(run, plans, adoption)
    again = {plan.name: plan.is_done for plan in plan_stages(run, definitions)}
    assert again == {"supernet": True, "measure": False, "table": False, "search": False}
