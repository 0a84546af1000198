"""An existing run without the file that its supernet began with."""

from __future__ import annotations

import html
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dsnet.errors import CheckpointError
from dsnet.families import Task, create, rebuild
from dsnet.standalone.stages import run_standalone
from dsnet.stored.checkpoint import save_supernet
from orchestration.config.supernet import CHECKPOINT_MODEL
from orchestration.config.sweep import SweepConfig
from orchestration.prepare.adoption import adopt, standalone_config
from orchestration.prepare.preparation import Prepared, prepare, stage_definitions
from orchestration.runs.folder import RunDir
from orchestration.runs.manifest import Manifest
from orchestration.runs.stages import StagePlan, plan_stages, run_stage
from tests.orchestration.samples import SWEEP, WITHOUT_MLFLOW, Finished, call, problems_of_message, write_sweep

OPTIONS = {"num_routes": 3, "width": 0.5}


def sweep(**supernet: Any) -> SweepConfig:
    model = {"model": "ds_tiny"} if "model" in supernet else {"model": "ds_tiny", "options": OPTIONS}
    return SweepConfig.model_validate(
        {
            "version": 1,
            "name": "t",
            "data": {"name": "digits", "limit": 60},
            "supernet": {"device": "cpu", "train": {"epochs": 2, "batch_size": 20}, **model, **supernet},
            "measure": {"repeats": 1, "warmup": 0, "batch_sizes": [1], "group_sizes": [1]},
        }
    )


def opened(folder: Path) -> RunDir:
    run = RunDir(folder, "t")
    run.create()
    Manifest(run.manifest_path).create(seed=0, hardware={})
    return run


def plans_of(run: RunDir, prepared: Prepared) -> dict[str, StagePlan]:
    return {plan.name: plan for plan in plan_stages(run, stage_definitions(prepared))}


def finish_supernet(run: RunDir, prepared: Prepared) -> None:
    """What the supernet stage leaves, without the training."""

    def save(folder: Path) -> Sequence[Path]:
        save_supernet(folder / "final", rebuild(prepared.subnets), {"run": prepared.supernet_run.to_json()})
        return [folder / "final.safetensors", folder / "final.json"]

    run_stage(run, plans_of(run, prepared)["supernet"], save)


def source_in(folder: Path) -> Path:
    supernet = create("ds_tiny", Task(num_classes=10, in_channels=1, image_size=8), OPTIONS, seed=7)
    folder.mkdir()
    save_supernet(folder / "final", supernet, {})
    return folder


@pytest.mark.parametrize("supernet", [{}, {"model": CHECKPOINT_MODEL}])
def test_a_finished_supernet_stands_in_for_start_weights_that_are_gone(
    tmp_path: Path, supernet: dict[str, Any]
) -> None:
    source, run = source_in(tmp_path / "source"), opened(tmp_path / "runs")
    config = sweep(init_from=str(source), **supernet)
    before = prepare(config, run)
    finish_supernet(run, before)
    shutil.rmtree(source)
    warnings: list[str] = []
    after = prepare(config, run, warnings.append)
    assert stage_definitions(after) == stage_definitions(before)
    assert plans_of(run, after)["supernet"].is_done
    assert after.subnets == before.subnets
    assert after.normalization == before.normalization
    assert after.supernet_run == before.supernet_run
    assert len(warnings) == 1
    assert str(source) in warnings[0]


def test_nothing_else_is_trained_where_the_start_weights_are_gone(tmp_path: Path) -> None:
    source, run = source_in(tmp_path / "source"), opened(tmp_path / "runs")
    config = sweep(init_from=str(source))
    shutil.move(source, tmp_path / "elsewhere")
    gone = r"supernet\.init_from: no finished checkpoint"
    for where in (None, RunDir(tmp_path / "runs", "new"), run):
        with pytest.raises(CheckpointError, match=gone):
            prepare(config, where)
    finish_supernet(run, prepare(sweep(init_from=str(tmp_path / "elsewhere")), run))
    prepare(config, run)
    for other in ({"train": {"epochs": 3, "batch_size": 20}}, {"options": {"num_routes": 4}}):
        with pytest.raises(CheckpointError, match=gone):
            prepare(sweep(**{"init_from": str(source), **other}), run)
    (key,) = [plan.key for plan in plans_of(run, prepare(config, run)).values() if plan.name == "supernet"]
    (run.stage_dir("supernet", key) / "done").unlink()
    with pytest.raises(CheckpointError, match=gone):
        prepare(config, run)


def test_an_output_folder_that_was_taken_over_may_go(tmp_path: Path) -> None:
    made = run_standalone(standalone_config(prepare(sweep()).config), tmp_path / "made", device="cpu").path
    run, config = opened(tmp_path / "runs"), sweep(init_from=str(made))
    before = prepare(config, run)
    assert before.adoption is not None
    assert adopt(run, plans_of(run, before), before.adoption) == ["supernet", "measure", "table"]
    shutil.rmtree(made)
    warnings: list[str] = []
    after = prepare(config, run, warnings.append)
    assert [plan.is_done for plan in plans_of(run, after).values()] == [True, True, True, False]
    assert (after.start, len(warnings)) == (None, 1)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_finished_run_is_reported_exported_and_launched_again_without_what_it_began_with(
    finished: Finished, tmp_path: Path
) -> None:
    folder = finished.copy(tmp_path / "sweep")
    source = tmp_path / "source"
    shutil.copytree(finished.run.path / "supernet", source / "supernet")
    taken = {"init_from": source, "train.epochs": 0, "train.warmup_epochs": 0, "recalibration.images": 0}
    overrides = [part for key, value in taken.items() for part in ("--set", f"supernet.{key}={value}")]
    settings = ["--name", "taken", "--trials", "4", *overrides, *WITHOUT_MLFLOW]
    first = call(folder, "launch", SWEEP, *settings)
    assert first.code == 0, first.err
    assert "supernet: used unchanged" in first.err
    shutil.rmtree(source)
    for command in (["report", "taken"], ["export", "taken"], ["launch", SWEEP, *settings]):
        answer = call(folder, *command)
        assert answer.code == 0, answer.err
        assert answer.err.count(f"{source} does not exist any more") == 1
    assert "supernet.init_from" in (folder / "runs" / "taken" / "report.html").read_text(encoding="utf-8")
    answer = call(folder, "launch", SWEEP, *settings, "--set", "seed=3")
    assert answer.code == 3
    assert problems_of_message(answer, ["supernet.init_from", str(source)]) == []


def test_the_commands_of_a_report_work_from_any_folder(finished: Finished, tmp_path: Path) -> None:
    folder = finished.copy(tmp_path / "a folder")
    assert call(folder, "report", "tiny").code == 0
    page = (folder / "runs" / "tiny" / "report.html").read_text(encoding="utf-8")
    commands = [shlex.split(html.unescape(text)) for text in re.findall(r"<pre>(dsnet-orch [^<]*)</pre>", page)]
    assert [command[1] for command in commands] == ["launch", "pareto", "export", "serve", "ui"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for command in commands[1:3]:
        answer = call(elsewhere, *command[1:])
        assert answer.code == 0, answer.err
    assert commands[0][2] == str(folder / "runs" / "tiny" / "sweep.yaml")
    assert commands[3][2:] == [str(folder / "runs" / "tiny" / "export" / "knee")]
    assert commands[4][2:] == [str(folder / "runs" / "tiny")]


@pytest.mark.slow
def test_the_plan_of_a_plain_network_lists_the_places_for_gates(tmp_path: Path) -> None:
    text = """
version: 1
name: plain
data: {name: digits, limit: 60}
supernet: {model: resnet18, options: {gates: [layer3, entry], ratios: [0.5, 1.0], paths: all}, train: {epochs: 1}}
"""
    write_sweep(tmp_path, text)
    plan = call(tmp_path, "plan", SWEEP, "--json", "--dry").json
    places = {place["name"]: place for place in plan["gate_places"]}
    assert [subnet["name"] for subnet in plan["subnets"]] == ["0.5-0.5", "0.5-1", "1-0.5", "1-1"]
    assert "layer4" not in places, "nothing that can be sliced comes after it"
    third = places["layer3"]
    assert (third["node"], third["channels"], third["size"]) == ("layer3_1_relu_1", 256, [1, 1])
    widest = plan["subnets"][-1]["madds_m"]
    evidence = (8 * 8 + 256) / 1e6
    assert third["madds_m_before"] + third["madds_m_after"] == pytest.approx(widest - evidence)
    shown = call(tmp_path, "plan", SWEEP, "--dry").out
    assert re.search(r"place for a gate +channels +size +M MAdds before +after", shown)
    assert re.search(rf"layer3 +256 +1 x 1 +{third['madds_m_before']:.4g} +{third['madds_m_after']:.4g}", shown)
