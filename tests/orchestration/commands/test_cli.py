"""The command line: help, what commands print for people and for scripts, and how little it imports
to do so."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from dsnet.arithmetic import MKL_MODE, mkl_mode
from dsnet.deploy.exporters import format_names
from orchestration.cli import cli
from search.front.points import trial_name
from search.front.points_file import load_points
from tests.orchestration.samples import SWEEP, TINY, Finished, call, results_in, snapshot, write_sweep

COMMANDS = sorted(cli.commands)
HEAVY = ("torch", "ray", "mlflow", "optuna", "plotly", "pandas", "sklearn", "pydantic")


def test_the_commands_are_those_of_the_documentation() -> None:
    assert {
        "launch",
        "plan",
        "validate",
        "status",
        "pareto",
        "trials",
        "export",
        "verify",
        "report",
        "sync",
        "measure",
        "ui",
    } <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, tmp_path: Path) -> None:
    answer = call(tmp_path, command, "--help")
    assert answer.code == 0
    assert answer.out.startswith("Usage:")
    assert command in answer.out
    assert cli.commands[command].help


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_top_help_shows_every_summary_whole(width: int) -> None:
    shown = CliRunner().invoke(cli, ["--help"], terminal_width=width).output
    listed = " ".join(shown.partition("Commands:")[2].split())
    for name, command in cli.commands.items():
        summary = " ".join(str(command.help).split("\n\n")[0].split())
        assert f"{name} {summary.partition('. ')[0].removesuffix('.')}" in listed
    assert "..." not in listed
    assert max(map(len, shown.splitlines())) <= width


def test_the_help_of_export_names_every_format() -> None:
    shown = re.sub(r"\s+", " ", CliRunner().invoke(cli, ["export", "--help"]).output)
    assert [name for name in format_names() if name not in shown] == []


def test_the_top_help_is_quick_imports_nothing_heavy_and_chooses_mkls_mode(tmp_path: Path) -> None:
    code = (
        "import os, sys; sys.argv = ['dsnet-orch', '--help']\n"
        "from orchestration.cli import main\n"
        "try: main()\n"
        "finally:\n"
        f"    print('HEAVY', *[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\n"
        f"    print(os.environ.get({MKL_MODE!r}), file=sys.stderr)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != MKL_MODE}
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    seconds = time.monotonic() - start
    assert done.returncode == 0
    assert all(command in done.stdout for command in COMMANDS)
    assert done.stderr.split() == ["HEAVY", str(mkl_mode())]
    assert seconds < 2.0  # 0.1 s on an idle machine


def test_the_version_is_that_of_the_package(tmp_path: Path) -> None:
    from importlib.metadata import version

    assert version("dsnet-orch") in call(tmp_path, "--version").out


def test_validate_accepts_a_good_file_without_reading_data_or_writing(tmp_path: Path) -> None:
    write_sweep(tmp_path, TINY.replace("name: digits", "name: cifar10"))
    before = snapshot(tmp_path)
    answer = call(tmp_path, "validate", SWEEP, "--trials", "7")
    assert answer.code == 0, answer.err
    assert "7 trials" in answer.out
    assert snapshot(tmp_path) == before


def test_the_schema_is_a_json_schema_of_sweep_files(tmp_path: Path) -> None:
    schema = call(tmp_path, "schema").json
    assert {"version", "name", "data", "supernet", "space"} <= schema["properties"].keys()


def test_plan_of_a_new_sweep_shows_origins_and_that_all_stages_would_run_and_writes_nothing(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    before = snapshot(tmp_path)
    plan = call(tmp_path, "plan", SWEEP, "--trials", "5", "--set", "seed=3", "--json").json
    assert snapshot(tmp_path) == before
    assert {stage["stage"]: stage["status"] for stage in plan["stages"]} == dict.fromkeys(
        ("supernet", "measure", "table", "search"), "run"
    )
    origins = {key: setting["origin"] for key, setting in plan["settings"].items()}
    assert origins["supernet.train.epochs"].startswith(SWEEP)
    assert origins["budget.trials"] == "flag"
    assert "--set" in origins["seed"]
    assert origins["supernet.train.lr"] == "data"
    assert origins["supernet.train.momentum"] == "default"
    assert plan["settings"]["budget.trials"]["value"] == 5
    assert [subnet["name"] for subnet in plan["subnets"]][:3] == ["subnet-00", "subnet-01", "subnet-02"]
    text = call(tmp_path, "plan", SWEEP, "--dry").out
    assert "it has not run yet" in text
    assert "train 200, gate 200, val 200, test 200" in text


@pytest.mark.parametrize(
    ("setting", "redone", "reason"),
    [
        ("ray.trial_actors=1", set(), ""),
        ("supernet.workers=2", set(), ""),
        ("tracking.mlflow=false", set(), ""),
        ("export.picks=[all]", set(), ""),
        ("sampler.cohort=2", {"search"}, "sampler.cohort: 4 -> 2"),
        ("space.gate.target={uniform: [0.1, 0.2]}", {"search"}, "space.gate.target.uniform"),
        ("measure.repeats=3", {"measure", "search"}, "measure.repeats: 2 -> 3"),
        ("supernet.train.epochs=3", {"supernet", "measure", "table", "search"}, "supernet.train.epochs: 8 -> 3"),
        ("seed=1", {"supernet", "measure", "table", "search"}, "seed: 0 -> 1"),
    ],
)
def test_plan_says_what_a_changed_setting_invalidates_and_why(
    finished: Finished, setting: str, redone: set[str], reason: str
) -> None:
    plan = call(finished.folder, "plan", SWEEP, "--dry", "--set", setting, "--json").json
    stages = {stage["stage"]: stage for stage in plan["stages"]}
    assert {name for name, stage in stages.items() if stage["status"] == "invalidated"} == redone
    assert {name for name, stage in stages.items() if stage["status"] == "done"} == stages.keys() - redone
    first, *others = [name for name in stages if name in redone] or [""]
    assert not first or any(reason in item for item in stages[first]["because"])
    assert all(any("which changed" in item for item in stages[name]["because"]) for name in others)


def test_plan_tells_what_a_regime_comes_to_and_what_the_names_of_subnetworks_mean(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    resnet = (
        "--set",
        "supernet.model=ds_resnet",
        "--set",
        "supernet.options={depth: 8}",
        "--set",
        "supernet.regime=us_net",
    )
    made = call(tmp_path, "plan", SWEEP, "--dry", *resnet, "--json").json["supernet"]
    assert made["network"] == "ds_resnet with 4 sub-networks, norm recalibrate"
    assert made["supernet regime"] == "us_net: widths sandwich, num_random 2, teacher inplace"
    text = call(tmp_path, "plan", SWEEP, "--dry", *resnet).out
    assert "teacher inplace" in text
    assert "path-013" in text


def test_plan_says_how_many_trials_a_larger_budget_adds(finished: Finished) -> None:
    plan = call(finished.folder, "plan", SWEEP, "--dry", "--trials", "99", "--json").json
    stages = {stage["stage"]: stage for stage in plan["stages"]}
    assert {name: stage["status"] for name, stage in stages.items()} == {
        "supernet": "done",
        "measure": "done",
        "table": "done",
        "search": "resume",
    }
    assert stages["search"]["because"] == ["87 of 99 trials remain"]


def test_status_of_a_finished_run(finished: Finished) -> None:
    status = call(finished.folder, "status", "tiny", "--json").json
    assert {name: stage["status"] for name, stage in status["stages"].items()} == dict.fromkeys(
        ("supernet", "measure", "table", "search", "verify"), "done"
    )
    assert status["trials"] == {"completed": 12, "infeasible": 0, "pruned": 0, "failed": 0, "enqueued": 0, "budget": 12}
    assert status["front"] == [trial_name(slot) for slot in finished.results.front]
    assert status["is_verified"]
    assert status["driver"] is None
    assert status["progress"] is None
    text = call(finished.folder, "status", "tiny").out
    assert "12 completed, of 12" in text
    assert status["journal"] == str(finished.run.study_journal(finished.results.done_key("search")))
    assert f"optuna-dashboard {status['journal']}" in text
    assert "not verified" not in text


def test_a_run_is_found_by_name_in_the_runs_folder_and_by_path_from_anywhere(
    finished: Finished, tmp_path: Path
) -> None:
    by_name = call(finished.folder, "status", "tiny").out
    assert call(tmp_path, "status", "tiny", "--runs", finished.run.root).out == by_name
    assert call(tmp_path, "status", finished.run.path).out == by_name


def test_pareto_shows_the_front_on_both_splits_and_a_pick_narrows_it(finished: Finished) -> None:
    results = finished.results
    content = call(finished.folder, "pareto", "tiny", "--json").json
    rows = content["front"]
    assert content["is_verified"]
    assert {row["slot"] for row in rows} == set(results.front)
    costs = [row["val"]["madds_m"] for row in rows]
    assert costs == sorted(costs)
    assert results.verified is not None
    for row in rows:
        for split in ("val", "test"):
            points = getattr(results.verified, split).points
            point = next(point for point in points if point.slot == row["slot"])
            found = row[f"{split}_analysis"]
            assert found["top1"]["value"] == point.top1.value
            assert found["stability"] == point.stability
            assert found["ties"] == [trial_name(slot) for slot in point.ties]
        assert set(row["latency"]) == {"1", "8"}
        assert all(set(own) == {"gate_ms", "ideal_ms", "widest_ms", "cheapest_ms"} for own in row["latency"].values())
        assert set(row["device_latency"]) == {"two"}
        assert set(row["device_latency"]["two"]) == {"1", "8"}
    (knee,) = call(finished.folder, "pareto", "tiny", "--pick", "knee", "--json").json["front"]
    assert knee["slot"] in results.front
    text = call(finished.folder, "pareto", "tiny").out
    assert all(trial_name(slot) in text for slot in results.front)
    assert "200 test images" in text


def test_pareto_tells_the_optimism_of_val_and_what_each_kind_of_router_reaches(finished: Finished) -> None:
    verified = finished.results.verified
    assert verified is not None
    content = call(finished.folder, "pareto", "tiny", "--json").json
    means = [np.mean([point.top1.value for point in split.points]) for split in (verified.val, verified.test)]
    assert content["optimism"]["value"] == pytest.approx(means[0] - means[1])
    assert content["optimism"]["low"] <= content["optimism"]["value"] <= content["optimism"]["high"]
    for split in ("val", "test"):
        shares = getattr(verified, split).routers
        assert [item["name"] for item in content["routers"][split]] == [trial_name(share.slot) for share in shares]
        assert [item["top1"] for item in content["routers"][split]] == [share.top1 for share in shares]
    text = call(finished.folder, "pareto", "tiny").out
    assert f"mean of {len(verified.test.points)} gates: {100 * content['optimism']['value']:+.1f}" in text


def test_pareto_draws_the_front_the_kinds_of_router_and_their_speed(finished: Finished, tmp_path: Path) -> None:
    front, routers, speed = (tmp_path / f"{name}.html" for name in ("front", "routers", "speed"))
    options = ("--figure", front, "--routers-figure", routers, "--speed-figure", speed)
    call(finished.folder, "pareto", "tiny", *options)
    assert "Accuracy against cost" in front.read_text(encoding="utf-8")
    assert "Gain of each kind of router" in routers.read_text(encoding="utf-8")
    assert "Accuracy over speed" in speed.read_text(encoding="utf-8")


def test_a_figure_of_no_known_format_is_refused_before_anything_is_printed(finished: Finished, tmp_path: Path) -> None:
    for option in ("--figure", "--routers-figure", "--speed-figure"):
        answer = call(finished.folder, "pareto", "tiny", option, tmp_path / "front.txt")
        assert (answer.code, answer.out) == (2, "")
        assert "its suffix must be one of .html, .json, .png, .svg" in answer.err


def test_trials_lists_all_of_them(finished: Finished) -> None:
    rows = call(finished.folder, "trials", "tiny", "--json").json
    assert [row["name"] for row in rows] == [trial_name(slot) for slot in range(12)]
    assert [row["metrics"] for row in rows] == [dict(record.metrics) for record in finished.results.records]
    text = call(finished.folder, "trials", "tiny").out
    assert text.count("*") == len(finished.results.front) + 1  # and the legend
    chosen = call(
        finished.folder, "trials", "tiny", "--sort", "top1", "--where", "madds_m<=baseline.madds_m", "--limit", "3"
    )
    best = sorted((record.metrics["top1"] for record in finished.results.records), reverse=True)
    assert chosen.out.splitlines()[1].split()[2] == f"{100 * best[0]:.1f}"
    assert "3 of 12 trials" in chosen.out
    assert call(finished.folder, "trials", "tiny", "--state", "failed", "--json").json == []
    answer = call(finished.folder, "trials", "tiny", "--sort", "top9")
    assert answer.code == 2
    assert "did you mean 'top" in answer.err


def test_report_builds_the_same_page_and_points_again(finished: Finished, tmp_path: Path) -> None:
    folder = finished.copy(tmp_path)
    run = results_in(folder).run
    points = load_points(run.points_parquet)
    run.points_parquet.unlink()
    run.report_html.unlink()
    answer = call(folder, "report", "tiny")
    assert answer.code == 0, answer.err
    assert answer.out.strip() == str(run.report_html)
    assert load_points(run.points_parquet) == points
    html = run.report_html.read_text(encoding="utf-8")
    assert all(trial_name(slot) in html for slot in finished.results.front)
    assert "<script src=" not in html


def test_a_fault_of_ours_is_called_so_and_shows_no_traceback_unless_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sweep(tmp_path)

    def broken(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("orchestration.cli._load", broken)
    answer = call(tmp_path, "validate", SWEEP)
    assert answer.code == 1
    assert "internal error: ZeroDivisionError: division by zero" in answer.err
    assert "Traceback" not in answer.err
    monkeypatch.setenv("DSNET_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        call(tmp_path, "validate", SWEEP)


def test_an_interrupt_before_the_run_is_opened_exits_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sweep(tmp_path)

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("orchestration.pipeline.launch.prepare", interrupted)
    answer = call(tmp_path, "launch", SWEEP)
    assert answer.code == 130
    assert not (tmp_path / "runs").exists()


def test_output_to_a_reader_that_leaves_ends_quietly(finished: Finished) -> None:
    code = "from orchestration.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "trials", "tiny", "--json"],
        cwd=finished.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    process.wait(60)
    assert "Traceback" not in errors
    assert "internal error" not in errors


def test_json_goes_to_stdout_alone(finished: Finished) -> None:
    for arguments in (["status", "tiny"], ["pareto", "tiny"], ["trials", "tiny"], ["plan", SWEEP, "--dry"]):
        answer = call(finished.folder, *arguments, "--json")
        assert answer.code == 0
        assert answer.err == ""
        assert json.loads(answer.out)
