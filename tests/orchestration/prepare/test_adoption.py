"""Output of `python -m dsnet.training` as finished stages of a sweep."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsnet.errors import CheckpointError
from dsnet.files import file_sha256, read_json
from dsnet.measure.latency_table import LatencyTable
from dsnet.standalone.output_folder import RESULT_VERSIONS, OutputFolder
from dsnet.standalone.resolved import StandaloneConfig
from dsnet.standalone.stages import run_standalone
from dsnet.structure.search import load_structure
from orchestration.config.sweep import SweepConfig
from orchestration.prepare.adoption import Adoption, Wanted, adopt, find_adoption, standalone_config
from orchestration.prepare.preparation import Prepared, prepare, stage_definitions
from orchestration.runs.folder import RunDir
from orchestration.runs.manifest import Manifest
from orchestration.runs.stages import plan_stages

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


def standalone(config: SweepConfig) -> StandaloneConfig:
    """What `plan --resolved` writes."""
    return standalone_config(prepare(config).config)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_standalone(standalone(sweep()), tmp_path_factory.mktemp("made") / "out", device="cpu").path


def found(config: SweepConfig) -> tuple[Adoption | None, Prepared]:
    prepared = prepare(config)
    assert config.supernet.init_from is not None
    measure = standalone_config(prepared.config).measure
    where = Path(config.supernet.init_from)
    declared = prepared.subnets if prepared.structure is None else prepared.structure.problem.subnets
    structure = config.supernet.structure.settings()
    return find_adoption(
        where, Wanted(prepared.supernet_run, declared, structure, prepared.fingerprint), measure
    ), prepared


def test_the_written_configuration_is_complete_and_survives_json() -> None:
    written = standalone(sweep(train={"lr": 0.05}))
    assert written.supernet.train.lr == 0.05
    assert StandaloneConfig.from_json(written.to_json()) == written
    plain = prepare(sweep(train={"lr": 0.05}))
    assert written.supernet_run(plain.image_set, plain.normalization) == plain.supernet_run


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
        again[name].folder.check()
        for file, path in again[name].folder.outputs().items():
            assert path.read_bytes() == (made / name / file).read_bytes()
    assert run.curves_jsonl(again["supernet"].key).is_file()
    assert adopt(run, again, adoption) == []


STRUCTURE = {
    "method": "greedy",
    "targets": [0.5, 1.0],
    "step": 24,
    "levels": 3,
    "pin": "gate",
    "holdout": 0.2,
    "epochs": 1,
}


def test_a_choice_of_sub_networks_is_taken_over_with_its_supernet(tmp_path: Path) -> None:
    made = run_standalone(standalone(sweep(structure=STRUCTURE)), tmp_path / "out", device="cpu").path
    adoption, prepared = found(sweep(init_from=str(made), structure=STRUCTURE))
    assert adoption is not None
    assert adoption.stages == ("structure", "supernet", "measure", "table")
    definitions = stage_definitions(prepared)
    run = RunDir(tmp_path, "t")
    run.create()
    Manifest(run.manifest_path).create(seed=0, hardware={})
    plans = {plan.name: plan for plan in plan_stages(run, definitions)}
    afresh = stage_definitions(prepare(sweep(structure=STRUCTURE)))
    assert {name: plan.key for name, plan in plans.items()} == {
        plan.name: plan.key for plan in plan_stages(run, afresh)
    }
    assert found(sweep(init_from=str(made), structure={**STRUCTURE, "order": "random"}))[0] is None
    assert found(sweep(init_from=str(made)))[0] is None
    assert adopt(run, plans, adoption) == list(adoption.stages)
    shutil.rmtree(made)
    later = prepare(sweep(init_from=str(made), structure=STRUCTURE), run, lambda text: None)
    assert {plan.name: plan.is_done for plan in plan_stages(run, stage_definitions(later))} == {
        **dict.fromkeys(adoption.stages, True),
        "search": False,
    }
    assert later.subnets == load_structure(plans["structure"].folder.path).subnets


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


@pytest.mark.parametrize("measure", [{"repeats": 2}, {"devices": {"server": {"threads": 2}}}])
def test_another_measurement_is_made_anew(made: Path, measure: dict[str, Any]) -> None:
    adoption, _ = found(sweep(init_from=str(made), measure=measure))
    assert adoption is not None
    assert adoption.stages == ("supernet", "table")


def test_tables_of_named_devices_are_taken_over_where_all_devices_are_the_same(made: Path, tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path / "copy")
    shutil.copytree(made, folder.path)
    two = {"devices": {"server": {"device": "cpu", "threads": 2}}}
    rewrite(folder.resolved_path, **standalone(sweep(measure=two)).to_json())
    shutil.rmtree(folder.measure)
    run_standalone(standalone(sweep(measure=two)), folder.path, device="cpu")
    adoption, prepared = found(sweep(init_from=str(folder.path), measure=two))
    assert adoption is not None
    assert adoption.stages == ("supernet", "measure", "table")
    run = RunDir(tmp_path, "t")
    run.create()
    Manifest(run.manifest_path).create(seed=0, hardware={})
    plans = {plan.name: plan for plan in plan_stages(run, stage_definitions(replace(prepared, adoption=adoption)))}
    adopt(run, plans, adoption)
    outputs = plans["measure"].folder.outputs()
    assert set(outputs) == {"subnets.json", "train_sample.json", "latency.json", "latency-server.json"}
    assert LatencyTable.from_json(read_json(run.latency_json(plans["measure"].key, "server"))).threads == 2
    for other in ({}, {"devices": {"server": {"threads": 1}}}, {"devices": {"other": {"threads": 2}}}):
        again, _ = found(sweep(init_from=str(folder.path), measure=other))
        assert again is not None
        assert again.stages == ("supernet", "table")


def test_a_checkpoint_alone_is_never_adopted(made: Path) -> None:
    assert found(sweep(init_from=str(made / "supernet")))[0] is None
    assert found(sweep(init_from=str(made / "supernet" / "final.json")))[0] is None


def test_what_started_from_weights_is_adopted_with_their_record(made: Path, tmp_path: Path) -> None:
    settings = {"train": {"lr": 0.02}}
    second = run_standalone(standalone(sweep(init_from=str(made), **settings)), tmp_path / "second", device="cpu")
    adoption, _ = found(sweep(init_from=str(second.path), **settings))
    assert adoption is not None
    assert adoption.origin == found(sweep(init_from=str(made), **settings))[1].start.origin  # type: ignore[union-attr]


def test_crops_by_scale_go_the_whole_way(tmp_path: Path) -> None:
    data = {"augment": {"crop_scale": [0.2, 1]}}
    written = standalone(sweep(data=data))
    assert StandaloneConfig.from_json(json.loads(json.dumps(written.to_json()))) == written
    out = run_standalone(written, tmp_path / "out", device="cpu").path
    adoption, _ = found(sweep(data=data, init_from=str(out)))
    assert adoption is not None
    assert adoption.stages == ("supernet", "measure", "table")
    assert found(sweep(data={"augment": {"crop_scale": [0.3, 1]}}, init_from=str(out)))[0] is None


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**read_json(path), **changes}), encoding="utf-8")


def of_another_schema(folder: OutputFolder) -> None:
    rewrite(folder.manifest_path, schema=2)


def of_other_results(folder: OutputFolder) -> None:
    rewrite(folder.manifest_path, result_versions={"supernet": 99})


def with_no_manifest_of_ours(folder: OutputFolder) -> None:
    folder.manifest_path.write_text(json.dumps({"stages": {"supernet": {"dir": "supernet"}}}), encoding="utf-8")


def of_another_configuration_version(folder: OutputFolder) -> None:
    rewrite(folder.resolved_path, version=2)


def with_an_unknown_section(folder: OutputFolder) -> None:
    rewrite(folder.resolved_path, weather="fine")


def with_an_unknown_setting_of_training(folder: OutputFolder) -> None:
    path = folder.supernet / "final.json"
    run = read_json(path)["run"]
    rewrite(path, run={**run, "bootstrapping": {**run["bootstrapping"], "mood": "good"}})
    with folder.held():
        manifest = folder.manifest()
    entry = manifest["stages"]["supernet"]
    entry["files"]["final.json"] |= {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    rewrite(folder.manifest_path, stages=manifest["stages"])


@pytest.mark.parametrize(
    "change",
    [
        of_another_schema,
        of_other_results,
        with_no_manifest_of_ours,
        of_another_configuration_version,
        with_an_unknown_section,
        with_an_unknown_setting_of_training,
    ],
)
def test_what_another_release_wrote_gives_start_weights_alone(
    made: Path, tmp_path: Path, change: Callable[[OutputFolder], None]
) -> None:
    folder = OutputFolder(tmp_path / "copy")
    shutil.copytree(made, folder.path)
    assert found(sweep(init_from=str(folder.path)))[0] is not None
    change(folder)
    adoption, prepared = found(sweep(init_from=str(folder.path)))
    assert adoption is None
    assert prepared.start is not None


def with_an_older_table(folder: OutputFolder) -> None:
    """As the release before wrote it: versions of the stages beside them, not in them, and another
    version of the table."""
    manifest = read_json(folder.manifest_path)
    stages = {
        name: {key: entry[key] for key in entry if key != "version"} for name, entry in manifest["stages"].items()
    }
    rewrite(folder.manifest_path, stages=stages, result_versions={**RESULT_VERSIONS, "table": 1})


def test_of_an_older_release_the_supernet_is_taken_over_and_the_table_is_made_again(made: Path, tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path / "copy")
    shutil.copytree(made, folder.path)
    with_an_older_table(folder)
    adoption, prepared = found(sweep(init_from=str(folder.path)))
    assert adoption is not None
    assert (adoption.stages, adoption.outdated) == (("supernet", "measure"), ("table",))
    run = RunDir(tmp_path, "t")
    run.create()
    Manifest(run.manifest_path).create(seed=0, hardware={})
    definitions = stage_definitions(replace(prepared, adoption=adoption))
    adopt(run, {plan.name: plan for plan in plan_stages(run, definitions)}, adoption)
    again = {plan.name: plan.is_done for plan in plan_stages(run, definitions)}
    assert again == {"supernet": True, "measure": True, "table": False, "search": False}


def test_the_standalone_command_goes_on_with_an_older_folder_and_makes_its_table_again(
    made: Path, tmp_path: Path
) -> None:
    folder = OutputFolder(tmp_path / "copy")
    shutil.copytree(made, folder.path)
    with_an_older_table(folder)
    (folder.table / "gate.safetensors").write_bytes(b"older rows")
    before = {path.name: file_sha256(path) for path in folder.supernet.iterdir()}
    said: list[str] = []
    run_standalone(standalone(sweep()), folder.path, device="cpu", say=said.append)
    assert "table: made by another release, which gives other results; made again" in said
    assert not any(text.startswith(("supernet:", "measure:")) for text in said)
    assert {path.name: file_sha256(path) for path in folder.supernet.iterdir()} == before
    assert (folder.table / "gate.safetensors").read_bytes() == (made / "table" / "gate.safetensors").read_bytes()
    assert found(sweep(init_from=str(folder.path)))[0].stages == ("supernet", "measure", "table")  # type: ignore[union-attr]


def test_an_older_table_that_was_not_finished_is_not_gone_on_with(made: Path, tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path / "copy")
    shutil.copytree(made, folder.path)
    with_an_older_table(folder)
    run_standalone(standalone(sweep()), folder.path, device="cpu")
    stages = read_json(folder.manifest_path)["stages"]
    rewrite(folder.manifest_path, stages={**stages, "table": {**stages["table"], "status": "running", "version": 1}})
    (folder.table / "piece").write_text("older rows")
    run_standalone(standalone(sweep()), folder.path, device="cpu")
    assert not (folder.table / "piece").exists()


@pytest.mark.parametrize("file", ["manifest.json", "resolved.json", "supernet/final.json"])
def test_torn_files_of_this_release_are_refused(made: Path, tmp_path: Path, file: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(made, copy)
    text = (copy / file).read_text(encoding="utf-8")
    (copy / file).write_text(text[:-3] + "   ", encoding="utf-8")  # of the same size
    with pytest.raises(CheckpointError, match="not valid JSON"):
        found(sweep(init_from=str(copy)))


def test_what_was_measured_of_another_supernet_is_not_adopted(made: Path, tmp_path: Path) -> None:
    copy = OutputFolder(tmp_path / "copy")
    shutil.copytree(made, copy.path)
    rewrite(copy.supernet / "final.json")  # indented otherwise: another size, hence trained again
    run_standalone(standalone(sweep()), copy.path, device="cpu")
    stages = copy.manifest()["stages"]
    rewrite(copy.manifest_path, stages={**stages, "table": {**stages["table"], "supernet": "0" * 64}})
    adoption, _ = found(sweep(init_from=str(copy.path)))
    assert adoption is not None
    assert adoption.stages == ("supernet", "measure")


def test_a_file_that_was_exchanged_is_not_copied(made: Path, tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path / "copy")
    run_standalone(standalone(sweep()), folder.path, device="cpu")
    adoption, prepared = found(sweep(init_from=str(folder.path)))
    assert adoption is not None
    damaged = folder.measure / "subnets.json"
    damaged.write_bytes(damaged.read_bytes().replace(b"1", b"2"))
    run = RunDir(tmp_path, "t")
    run.create()
    Manifest(run.manifest_path).create(seed=0, hardware={})
    definitions = stage_definitions(replace(prepared, start=None))
    plans = {plan.name: plan for plan in plan_stages(run, definitions)}
    with pytest.raises(CheckpointError, match="has changed since its training wrote it"):
        adopt(run, plans, adoption)
    again = {plan.name: plan.is_done for plan in plan_stages(run, definitions)}
    assert again == {"supernet": True, "measure": False, "table": False, "search": False}
