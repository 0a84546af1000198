"""Output about a sweep of supernets: the tables of any run, with the supernet of each line."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dsnet.wording import plural
from orchestration.commands.plan_view import forecast_text, say_row, show_data, show_settings
from orchestration.commands.tables import Column
from orchestration.commands.terminal import (
    INDENT,
    FurtherColumns,
    driver_text,
    front_rows,
    is_running,
    percent,
    print_json,
    result_warnings,
    say,
    say_mlflow,
    say_places,
    say_progress,
    say_result_warnings,
    say_training_warnings,
    short,
    show_table,
    tell,
)
from orchestration.config.command_lines import launch_command
from orchestration.progress import json_state, read_task_state
from orchestration.runs.folder import RunDir
from orchestration.runs.manifest import Manifest
from search.front.points import trial_name

if TYPE_CHECKING:
    from pathlib import Path

    from orchestration.commands.plan_supernets import SupernetsPlan
    from orchestration.supernets.entries import MemberEntry
    from orchestration.supernets.members import Member
    from orchestration.supernets.results import SupernetSweepResults


def show_supernets_launch(results: SupernetSweepResults, bundles: Sequence[Path]) -> None:
    """Print the front over all supernets, warnings about the supernets on it, and where the files
    are."""
    from orchestration.supernets.report import sweep_warnings

    run = results.run
    show_supernets_front(results, (), as_json=False)
    say()
    for whose, warning in sweep_warnings(results):
        say_training_warnings([warning], whose)
    say_result_warnings(results)
    say_places(results, bundles)
    say(f"study     {run.merged_journal}   (trials of all supernets; open it with optuna-dashboard)")
    say(
        f"supernets {run.supernets_dir}   (one run for each supernet; show one with: dsnet-orch pareto {run.supernets_dir}/NAME)"
    )
    say_mlflow(results)


def supernet_front_rows(results: SupernetSweepResults) -> list[dict[str, Any]]:
    """One JSON-able row per gate of the front over all supernets, cheapest first."""
    own = {
        (name, row["slot"]): row
        for name, member in results.supernets.items()
        if member.subnets
        for row in front_rows(member)
    }
    rows = [
        {
            **own[gate.supernet, gate.slot],
            "name": gate.name,
            "supernet": gate.supernet,
            "settings": _settings(results, gate),
        }
        for gate in results.front_gates
    ]
    return sorted(rows, key=lambda row: row["val"]["madds_m"])


def _settings(results: SupernetSweepResults, gate: Any) -> dict[str, Any]:
    return dict(results.entry(gate.supernet).settings)


def show_supernets_front(results: SupernetSweepResults, picks: Sequence[str], *, as_json: bool) -> None:
    """The front over all supernets as a table; a gate's name begins with its supernet."""
    rows = supernet_front_rows(results)
    if picks:
        wanted = [gate.name for gate in results.picked(picks)]
        rows = [row for row in rows if row["name"] in wanted]
    if as_json:
        print_json(
            {
                "run": str(results.run.path),
                "objectives": [{"metric": metric.name, "goal": metric.goal} for metric in results.config.metrics],
                "is_verified": results.is_verified,
                "test_openings": results.manifest["test_openings"],
                "front": rows,
            }
        )
        return
    if picks and not rows:
        tell(
            "none of these gates is on the front; `dsnet-orch trials` lists all trials, and `dsnet-orch export --pick` exports any of them"
        )
        return
    further = FurtherColumns.of(results.config.metrics, map(_test_metrics, rows))
    numbers = ("top-1\u00a0% val", "top-1\u00a0% test [95\u00a0%]", "MAdds M val", *further.titles)
    columns = ("supernet", "gate", "router", *numbers)
    lines = [
        (
            results.entry(row["supernet"]).label,
            trial_name(row["slot"]),
            row["router"],
            percent(row["val"]["top1"]),
            _on_test(row),
            f"{row['val']['madds_m']:.4g}",
            *further.cells(row["val"], _test_metrics(row)),
        )
        for row in rows
    ]
    verified = "" if results.is_verified else " (not verified yet)"
    num_measured = sum(bool(member.subnets) for member in results.supernets.values())
    if not rows:
        say(f"{results.run.name}: no gate on the front yet")
        return
    title = f"{results.run.name}: one front over {plural(num_measured, 'supernet')}, chosen on val{verified}"
    show_table(columns, lines, title, num_left=3)
    _show_openings(results)


def _on_test(row: Mapping[str, Any]) -> str:
    analysis = row.get("test_analysis")
    if analysis is None:
        return "-"
    top1 = analysis["top1"]
    return f"{100 * top1['value']:.1f} [{100 * top1['low']:.1f}, {100 * top1['high']:.1f}]"


def _test_metrics(row: Mapping[str, Any]) -> Mapping[str, float]:
    """The metrics of a gate on `test`; empty if it did not run there."""
    metrics: Mapping[str, float] = row.get("test_analysis", {}).get("metrics", {})
    return metrics


def _show_openings(results: SupernetSweepResults) -> None:
    openings = results.manifest["test_openings"]
    if openings > 1:
        tell(f"test was read {openings} times; results of choices made after the first time are optimistic")


def show_supernets_status(results: SupernetSweepResults, *, as_json: bool) -> None:
    """Print the state of each supernet, the numbers of trials, and the driver of the sweep."""
    from orchestration.supernets.report import sweep_warnings

    driver = driver_text(results.run)
    members = [_status(results, entry) for entry in results.entries]
    content = {
        "run": str(results.run.path),
        "driver": driver,
        "progress": None if results.is_verified else json_state(read_task_state(results.run.progress_json)),
        "supernets": members,
        "trials": {
            "finished": results.num_trials,
            "failed": results.num_failed,
            "budget": results.config.budget.trials,
        },
        "front": [gate.name for gate in results.front_gates],
        "is_verified": results.is_verified,
        "test_openings": results.manifest["test_openings"],
        "result_warnings": result_warnings(results),
    }
    if as_json:
        print_json(content)
        return
    say(f"run       {results.run.path}")
    tell(f"driver    {driver or 'none'}", INDENT)
    say_progress(results.run, is_finished=results.is_verified)
    lines = [
        (item["name"], item["told"], item["state"], item["epochs"], str(item["trials"]), str(item["front"]))
        for item in members
    ]
    settings = Column("settings", is_text=True, wraps=True)
    show_table(("supernet", settings, "state", "epochs", "trials", "on the front"), lines, num_left=3)
    for item in members:
        label = results.entry(item["name"]).label
        if item["reason"]:
            tell(f"{label} {item['state']}: {item['reason']}")
    say(f"trials    {results.num_trials} finished; {results.config.budget.trials} for each trained supernet")
    say(f"front     {plural(len(results.front_gates), 'gate')}" + ("" if results.is_verified else ", not verified yet"))
    for whose, warning in sweep_warnings(results):
        say_training_warnings([warning], whose)
    say_result_warnings(results)
    journal = results.run.merged_journal
    if journal.is_file():
        say(f"study     {journal}   (open: optuna-dashboard {shlex.quote(str(journal))})")
    if not results.is_verified and not is_running(results.run):
        say(f"continue  {launch_command(results.config, results.run.sweep_yaml)}")


def _status(results: SupernetSweepResults, entry: MemberEntry) -> dict[str, Any]:
    from orchestration.results.training_review import review

    member = results.supernets.get(entry.name)
    state, done = state_and_epochs(results.run, entry)
    return {
        "name": entry.name,
        "settings": dict(entry.settings),
        "told": told(entry.settings),
        "state": state,
        "reason": entry.reason,
        "epochs": f"{done}/{entry.epochs}",
        "reports": [list(report) for report in entry.reports],
        "trials": 0 if member is None else len(member.records),
        "front": sum(gate.supernet == entry.name for gate in results.front_gates),
        "run": str(RunDir(results.run.supernets_dir, entry.name).path),
        "warnings": [] if member is None else [warning.to_json() for warning in review(member)],
    }


def state_and_epochs(sweep: RunDir, entry: MemberEntry) -> tuple[str, int]:
    """State of a supernet ("training" while it trains), and the number of epochs that it has
    done."""
    from dsnet.stored.names import checkpoint_stems

    if entry.state == "trained":
        return entry.state, entry.epochs
    run = RunDir(sweep.supernets_dir, entry.name)
    stage = Manifest(run.manifest_path).read()["stages"].get("supernet") if run.manifest_path.is_file() else None
    if entry.state != "waiting" or stage is None or stage["status"] != "running" or not is_running(sweep):
        return entry.state, entry.reports[-1][0] if entry.reports else 0
    stems = checkpoint_stems(run.path / stage["dir"])
    return "training", int(stems[-1].name.rpartition("-")[2]) if stems else 0


def told(settings: Mapping[str, Any]) -> str:
    """Settings on one line."""
    return ", ".join(f"{key.removeprefix('supernet.')} {short(value)}" for key, value in settings.items())


def show_supernets_plan(plan: SupernetsPlan, *, as_json: bool, everything: bool = False) -> None:
    """Print the supernets of a plan, each with the stages that would run and why; then the
    settings.

    Args:
        plan: result of `plan_supernets`.
        as_json: for scripts, always complete.
        everything: also show settings with default values.
    """
    if as_json:
        print_json(_plan_content(plan))
        return
    rules, budget = plan.config.supernets, plan.config.budget
    prepared = next((member.prepared for member in plan.members if member.prepared is not None), None)
    if prepared is None:
        say_row("run", str(plan.run.path))
    else:
        show_data(plan.run, prepared, everything=everything)
    text = (
        f"{len(plan.members)} of {rules.number} drawn by {rules.sampler}, {rules.concurrent} trained at a time, scheduler "
        f"{rules.scheduler}; {budget.trials} trials for each supernet that completes its training"
    )
    say_row("supernets", text)
    say()
    columns = (
        Column("supernet", is_text=True),
        Column("settings", is_text=True, wraps=True),
        Column("state", is_text=True),
        Column("MAdds\u00a0M", is_text=True),
        Column("stages", is_text=True, wraps=True),
    )
    show_table(columns, [_planned(plan, member) for member in plan.members])
    if plan.forecast is not None:
        say_row("forecast", f"at most {forecast_text(plan.forecast)}")
    say()
    show_settings(plan.settings(), everything=everything)


def _plan_content(plan: SupernetsPlan) -> dict[str, Any]:
    """The plan as JSON."""
    members = [
        {
            "name": member.name,
            "settings": dict(member.settings),
            "problem": member.problem,
            "subnets": len(member.prepared.subnets) if member.prepared else 0,
            "madds_m": list(plan.madds_m.get(member.name, ())),
            "known": None if member.name not in plan.fates else asdict(plan.fates[member.name]),
            "stages": [
                {"stage": stage.name, "status": stage.status, "key": stage.key, "because": list(stage.reasons)}
                for stage in plan.stages.get(member.name, ())
            ],
        }
        for member in plan.members
    ]
    found = None if plan.forecast is None else plan.forecast.to_json()
    return {"run": str(plan.run.path), "supernets": members, "forecast": found, "settings": plan.settings()}


def _planned(plan: SupernetsPlan, member: Member) -> tuple[str, ...]:
    """A supernet's row: its settings, its state, the cost of its cheapest and widest sub-network,
    and its stages."""
    if member.prepared is None:
        return (member.name, told(member.settings), "invalid", "", member.problem or "")
    fate = plan.fates.get(member.name)
    names: dict[str, list[str]] = {}
    for stage in plan.stages[member.name]:
        names.setdefault(stage.status, []).append(stage.name)
    stages = "; ".join(f"{status}: {', '.join(those)}" for status, those in names.items())
    cheapest, widest = plan.madds_m[member.name]
    state = fate.state if fate is not None else "to train"
    because = fate.reason or stages if fate is not None else stages
    return (member.name, told(member.settings), state, f"{cheapest:.4g} to {widest:.4g}", because)
