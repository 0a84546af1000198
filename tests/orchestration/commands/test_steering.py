"""More trials for a run, and enqueued points: through the command line, on a run that has ended."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml

from dsnet.errors import PreflightError
from orchestration.commands.steering import changed_point, extended
from orchestration.config.resolve import resolve_cohort, resolve_trials
from orchestration.pipeline.search import trials_left
from orchestration.prepare.preparation import prepare, stage_definitions
from orchestration.results.search_end import read_end, write_end
from orchestration.runs.lock import DriverLock
from orchestration.runs.queue import read_queue
from orchestration.runs.stages import StageDir, plan_stages
from orchestration.workers.runtime import RaySettings
from search.front.points import trial_name
from search.suggest.space import parse_space
from tests.orchestration.samples import AT_WORK, Finished, call, record_config, results_in

SPACE = parse_space(
    {
        "gate.router": {"choice": ["gate", "cascade"]},
        "gate.target": {"uniform": [0.0, 1.0]},
        "gate.optimizer.name": {"choice": ["adam", "sgd"], "when": {"gate.router": "gate"}},
        "gate.optimizer.lr": {"loguniform": [0.001, 0.3], "when": {"gate.optimizer.name": "sgd"}},
    }
)
GATE: dict[str, Any] = {
    "gate.router": "gate",
    "gate.target": 0.5,
    "gate.optimizer.name": "sgd",
    "gate.optimizer.lr": 0.1,
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, GATE),
        ({"gate.target": 0.25}, {**GATE, "gate.target": 0.25}),
        ({"gate.router": "cascade"}, {"gate.router": "cascade", "gate.target": 0.5}),
        (
            {"gate.optimizer.name": "adam"},
            {key: value for key, value in GATE.items() if "lr" not in key} | {"gate.optimizer.name": "adam"},
        ),
        (
            {"gate.router": "cascade", "gate.optimizer.lr": 0.2},
            {"gate.router": "cascade", "gate.target": 0.5, "gate.optimizer.lr": 0.2},
        ),
        ({"gate.targt": 0.2}, {**GATE, "gate.targt": 0.2}),
    ],
)
def test_a_trial_is_changed_and_loses_what_no_longer_exists_but_nothing_that_was_asked_for(
    changes: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert changed_point(GATE, changes, SPACE) == expected


def queue(folder: Path) -> list[dict[str, Any]]:
    run = results_in(folder).run
    return [item["params"] for item in read_queue(run.queue_jsonl(results_in(folder).done_key("search")))]


@pytest.mark.ray
def test_a_value_that_might_not_be_tried_at_all_is_refused(finished: Finished, tmp_path: Path) -> None:
    folder = finished.copy(tmp_path)
    sweep = results_in(folder).run.sweep_yaml
    config = yaml.safe_load(sweep.read_text(encoding="utf-8"))
    config["space"] = {
        "gate.target": {"uniform": [0.05, 0.9]},
        "gate.sgs.target": {"choice": ["extremes", "cheapest"]},
        "gate.sgs.t_easy": {"uniform": [0.0, 0.9], "when": {"gate.sgs.target": "extremes"}},
    }
    sweep.write_text(yaml.safe_dump(config), encoding="utf-8")
    record_config(sweep)
    alone = call(folder, "enqueue", "tiny", "--set", "gate.sgs.t_easy=0.5")
    assert alone.code == 2
    assert (
        "gate.sgs.t_easy is only used when gate.sgs.target is extremes; add gate.sgs.target to the point" in alone.err
    )
    assert queue(folder) == []
    both = call(folder, "enqueue", "tiny", "--set", "gate.sgs.t_easy=0.5", "--set", "gate.sgs.target=extremes")
    assert both.code == 0


@pytest.mark.ray
def test_points_that_wait_are_counted_in_the_status_and_in_the_way_to_have_them_tried(
    finished: Finished, tmp_path: Path
) -> None:
    folder = finished.copy(tmp_path)
    for number in (1, 2):
        answer = call(folder, "enqueue", "tiny", "--set", "gate.target=0.3")
        assert f"--trials +{number}" in answer.out
    assert call(folder, "status", "tiny", "--json").json["trials"]["enqueued"] == 2
    assert "2 points to try next" in call(folder, "status", "tiny").out


@pytest.mark.ray
def test_points_are_checked_and_enqueued_from_values_a_file_and_a_trial(finished: Finished, tmp_path: Path) -> None:
    folder = finished.copy(tmp_path)
    answer = call(folder, "enqueue", "tiny", "--set", "gate.target=0.25", "--set", "gate.sgs.strategy=give_up")
    assert answer.code == 0, answer.err
    assert "the budget of 12 trials is used up" in answer.out
    assert "extend" in answer.out
    points = [{"gate.target": 0.5}, {"gate.target": 0.75, "gate.sgs.t_easy": 0}]
    (folder / "points.json").write_text(json.dumps(points), encoding="utf-8")
    assert call(folder, "enqueue", "tiny", "--from", "points.json").code == 0
    assert call(folder, "enqueue", "tiny", "--like", "trial-0003", "--set", "gate.target=0.125").code == 0
    assert call(folder, "enqueue", "tiny", "--like", "knee", "--set", "gate.target=0.625").code == 0
    third = dict(finished.results.record(3).params)
    assert finished.results.knee is not None
    knee = dict(finished.results.record(finished.results.knee).params)
    assert queue(folder) == [
        {"gate.target": 0.25, "gate.sgs.strategy": "give_up"},
        {"gate.target": 0.5},
        {"gate.target": 0.75, "gate.sgs.t_easy": 0.0},
        {**third, "gate.target": 0.125},
        {**knee, "gate.target": 0.625},
    ]
    assert isinstance(queue(folder)[2]["gate.sgs.t_easy"], float)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--set", "gate.targt=0.3"], 2, "'gate.targt' is not in the space; did you mean 'gate.target'?"),
        (["--set", "gate.target=7"], 2, "gate.target = 7 is outside the space; it takes 0.05..0.9"),
        (["--set", "gate.target=[1]"], 2, "gate.target"),
        (["--set", "gate.target="], 2, "gate.target"),
        (["--set", "gate.target"], 2, "--set gate.target: expected KEY=VALUE"),
        ([], 2, "nothing to enqueue"),
        (["--like", "trial-0099"], 9, "no such trial"),
        (["--from", "none.yaml"], 2, "--from none.yaml: cannot be read"),
        (["--from", "tiny.yaml"], 2, "--from tiny.yaml: expected a list of points"),
        (["--from", "tiny.yaml", "--set", "gate.target=0.3"], 2, "--from cannot be combined"),
    ],
)
def test_what_cannot_be_tried_is_refused_and_nothing_is_enqueued(
    finished: Finished, arguments: list[str], code: int, message: str
) -> None:
    answer = call(finished.folder, "enqueue", "tiny", *arguments)
    assert answer.code == code
    assert message in answer.err
    assert "Traceback" not in answer.err
    assert not finished.run.queue_jsonl(finished.results.done_key("search")).exists()


@pytest.mark.ray
def test_a_running_sweep_is_told_apart_from_one_that_waits(finished: Finished, tmp_path: Path) -> None:
    folder = finished.copy(tmp_path)
    run = results_in(folder).run
    sweep = run.sweep_yaml.read_text(encoding="utf-8")
    run.sweep_yaml.write_text(sweep.replace("trials: 12", "trials: 13"), encoding="utf-8")
    record_config(run.sweep_yaml)
    assert "in the next launch" in call(folder, "enqueue", "tiny", "--set", "gate.target=0.3").out
    with DriverLock(run, "a test"):
        answer = call(folder, "enqueue", "tiny", "--set", "gate.target=0.4")
    assert "the sweep is running" in answer.out
    assert "next cohort" in answer.out
    two = json.dumps([{"gate.target": 0.5}, {"gate.target": 0.6}])
    (folder / "points.json").write_text(two, encoding="utf-8")
    assert "the budget has 1 trial left" in call(folder, "enqueue", "tiny", "--from", "points.json").out
    assert len(queue(folder)) == 4


@pytest.mark.ray
def test_a_grid_that_is_at_its_end_goes_on_for_a_point_that_was_enqueued(finished: Finished, tmp_path: Path) -> None:
    folder = finished.copy(tmp_path)
    run = results_in(folder).run
    sweep = run.sweep_yaml.read_text(encoding="utf-8")
    run.sweep_yaml.write_text(sweep.replace("trials: 12", "trials: 20"), encoding="utf-8")
    record_config(run.sweep_yaml)
    config = results_in(folder).config
    plan = next(plan for plan in plan_stages(run, stage_definitions(prepare(config))) if plan.name == "search")
    path = run.search_end_json(plan.key)
    write_end(path, replace(read_end(path), reason="space"))
    StageDir(path.parent).finish([path, run.study_journal(plan.key)], 1.0)
    assert trials_left(run, plan, config) == 0
    answer = call(folder, "enqueue", "tiny", "--set", "gate.target=0.3")
    assert "in the next launch" in answer.out
    assert trials_left(run, plan, config) > 0


@pytest.mark.ray
@pytest.mark.parametrize(("reason", "rule"), [("plateau", {"trials": 4, "gain": 0.5}), ("target", ["top1 >= 0.01"])])
def test_points_after_a_stop_rule_come_with_the_command_that_removes_the_rule(
    reason: str, rule: Any, finished: Finished, tmp_path: Path
) -> None:
    folder = finished.copy(tmp_path)
    run = results_in(folder).run
    sweep = yaml.safe_load(run.sweep_yaml.read_text(encoding="utf-8"))
    sweep["budget"] |= {"trials": 20, reason: rule}
    run.sweep_yaml.write_text(yaml.safe_dump(sweep), encoding="utf-8")
    record_config(run.sweep_yaml)
    results = results_in(folder)
    plan = next(plan for plan in plan_stages(run, stage_definitions(prepare(results.config))) if plan.name == "search")
    path = run.search_end_json(plan.key)
    end = read_end(path)
    rules = {**end.rules, **results.config.budget.model_dump(mode="json", include={"plateau", "target"})}
    write_end(path, replace(end, reason=reason, rules=rules))
    StageDir(path.parent).finish([path, run.study_journal(plan.key)], 1.0)
    answer = call(folder, "enqueue", "tiny", "--set", "gate.target=0.3")
    program, command, found, *options = shlex.split(answer.out.strip().rpartition(": ")[2])
    assert (program, command, found) == ("dsnet-orch", "extend", str(results.run.path))
    assert options[:3] == ["--trials", "+1", "--set"]
    assert trials_left(run, plan, extended(results, "+1")) == 0, "with the rule it would stop at once"
    assert trials_left(run, plan, extended(results, "+1", options[3:])) == 9


@pytest.mark.ray
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trials", "12"], "already has a budget of 12 trials"),
        (["--trials", "+0"], "already has a budget of 12 trials"),
        (["--trials", "-3"], "expected +N"),
        (["--trials", "some"], "expected +N"),
        (["--trials", "+3", "--set", "seed=3"], "extend only changes budget.* settings"),
        (["--trials", "+3", "--set", "budget.trials=40"], "--trials already sets this"),
    ],
)
def test_a_budget_is_only_raised(finished: Finished, arguments: list[str], message: str) -> None:
    answer = call(finished.folder, "extend", "tiny", *arguments)
    assert answer.code == 2
    assert message in answer.err


@pytest.mark.ray
def test_an_extended_run_that_a_stop_rule_ends_at_once_names_the_option_that_removes_the_rule(
    finished: Finished, tmp_path: Path
) -> None:
    folder = finished.copy(tmp_path)
    rule = "budget.plateau={trials: 4, gain: 1.0}"
    answer = call(folder, "extend", "tiny", "--trials", "+4", "--set", rule)
    assert answer.code == 0, answer.err
    assert "(budget.plateau) after 12 trials; to add trials" in answer.err
    assert "--trials +N --set budget.plateau=null" in answer.err
    assert len(results_in(folder).records) == 12


@pytest.mark.ray
def test_one_trial_more_is_a_cohort_more_where_cohorts_are_compared_as_a_whole(
    finished: Finished, tmp_path: Path
) -> None:
    folder = finished.copy(tmp_path)
    path = results_in(folder).run.sweep_yaml
    text = path.read_text(encoding="utf-8")
    for plain, halved in (
        ("trainer: table", "trainer: end_to_end"),
        ("pruner:\n  name: none", "pruner:\n  name: pareto_halving"),
    ):
        assert plain in text
        text = text.replace(plain, halved)
    path.write_text(text, encoding="utf-8")
    record_config(path)
    results = results_in(folder)
    cohort = resolve_cohort(results.config)
    before = resolve_trials(results.config)
    assert before % cohort == 0
    assert resolve_trials(extended(results, "+1")) == before + cohort


@pytest.mark.ray
def test_an_extended_run_keeps_its_trials_tries_the_points_and_says_that_test_was_read_again(
    finished: Finished, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(
        finished.folder, moved, ignore=AT_WORK
    )  # the stored sweep still names the folder where it was launched
    before = results_in(moved).records
    wanted = {"gate.target": 0.25, "gate.sgs.strategy": "give_up"}
    call(moved, "enqueue", "tiny", *[word for key, value in wanted.items() for word in ("--set", f"{key}={value}")])
    answer = call(moved, "extend", "tiny", "--trials", "+2")
    assert answer.code == 0, answer.err
    assert "budget raised from 12 to 14 trials" in answer.err
    assert "test was already read once" in answer.err
    assert "in an earlier launch" in answer.err, "what stays on the front is not run again"
    results = results_in(moved)
    assert results.records[:12] == before
    assert len(results.records) == results.config.budget.trials == 14
    assert wanted.items() <= dict(results.record(12).params).items()
    assert results.manifest["test_openings"] == 2
    assert "test was read 2 times" in call(moved, "pareto", "tiny").out
    assert "was read 2 times" in results.run.report_html.read_text(encoding="utf-8")
    assert trial_name(13) in call(moved, "trials", "tiny").out
    assert len(finished.results.records) == 12


@pytest.mark.ray
def test_a_run_whose_extension_cannot_start_keeps_its_budget(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finished.copy(tmp_path)
    run = results_in(folder).run
    before = run.sweep_yaml.read_bytes()

    def refuse(settings: RaySettings) -> NoReturn:
        assert run.sweep_yaml.read_bytes() != before, "the fault comes after the larger budget was written"
        raise PreflightError("Ray could not be started on this machine")

    with monkeypatch.context() as patch:
        patch.setattr("orchestration.pipeline.launch.ray_session", refuse)
        answer = call(folder, "extend", "tiny", "--trials", "+2")
    assert answer.code == 3
    assert "Ray could not be started" in answer.err
    assert "the budget of run 'tiny' stays 12 trials" in answer.err
    assert run.sweep_yaml.read_bytes() == before
