"""The report and the figure of a sweep of supernets, from its results."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from dashboards.front import DynamicPoint, dynamic_points, static_points
from dashboards.headline import Headline, Row
from dashboards.images import write_figure
from dashboards.supernets import (
    SupernetInfo,
    SupernetsInfo,
    SupernetsReport,
    build_supernets_report,
    supernets_figure,
)
from dsnet.errors import NotFoundError
from dsnet.files import atomic_write_text
from orchestration.config.command_lines import command_line, has_own_code, launch_command
from orchestration.results.dominated import dominated_warnings
from orchestration.results.mlflow_store import browsing_commands
from orchestration.results.report import bundle_commands, capital, headline, note_of_warning
from orchestration.results.run import RunResults
from orchestration.results.structure import training_cost
from orchestration.results.timing_doubt import timing_noise
from orchestration.results.training_review import review
from orchestration.supernets.entries import MemberEntry
from orchestration.supernets.results import SupernetSweepResults
from search.front.pareto import REFERENCE_MARGIN, hypervolume
from search.front.points import trial_name
from search.training_checks import TrainingWarning

"""The reference point of the hypervolume has this many times the MAdds of the widest sub-network of
all supernets."""


def write_supernets_report(results: SupernetSweepResults, notes: tuple[str, ...], status: str) -> Path:
    """Build report.html of a sweep of supernets; returns its path."""
    atomic_write_text(results.run.report_html, build_supernets_report(report_data(results, notes, status)))
    return results.run.report_html


def report_data(results: SupernetSweepResults, notes: tuple[str, ...], status: str) -> SupernetsReport:
    """The content of the report; parts without results stay empty."""
    manifest, config = results.manifest, results.config
    return SupernetsReport(
        run_name=results.run.name,
        status=status,  # type: ignore[arg-type]
        created=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        data_name=config.data.name,
        model=config.supernet.model,
        info=supernets_info(results),
        headline=global_headline(results),
        scheduler=config.supernets.scheduler,
        num_test_openings=manifest["test_openings"],
        objectives=tuple(metric.name for metric in config.metrics),
        notes=sweep_training_notes(results) + _timing_notes(results) + notes + _sample_notes(results),
        commands=_commands(results),
        facts=(
            *((key, str(value)) for key, value in manifest["hardware"].items() if value is not None),
            ("seed", str(manifest["seed"])),
            *((key, str(value)[:16]) for key, value in manifest["data_hashes"].items()),
            *((key, str(value)) for key, value in manifest["versions"].items()),
        ),
    )


def supernets_info(results: SupernetSweepResults) -> SupernetsInfo:
    """All supernets with their points, on `val` and, once verified, on `test`."""
    members = results.supernets
    verified = [member.verified for member in members.values() if member.verified is not None]
    return SupernetsInfo(
        supernets=tuple(_supernet(results, entry) for entry in results.entries),
        num_chosen_images=max((member.num_val for member in members.values()), default=0),
        num_reported_images=verified[0].test.num_images if results.is_verified and verified else 0,
    )


def _supernet(results: SupernetSweepResults, entry: MemberEntry) -> SupernetInfo:
    info = SupernetInfo(
        name=entry.name,
        settings=tuple(entry.settings.items()),
        state=entry.state,  # type: ignore[arg-type]
        reason=entry.reason or "",
        reports=entry.reports,
        epochs=entry.epochs,
    )
    member = results.supernets.get(entry.name)
    if member is None or not member.subnets:
        return info
    rows, kind, cost = member.points(), member.config.gate.router, training_cost(member)
    intervals = _intervals(member)
    link = member.run.report_html.relative_to(results.run.path).as_posix()
    return replace(
        info,
        choice_madds=None if cost is None else cost.choice,
        training_madds=None if cost is None else cost.joint,
        static_hypervolume=static_hypervolumes(results)[entry.name],
        num_trials=len(member.records),
        num_failed=len(member.failed),
        static=static_points(rows, "val"),
        reported_static=static_points(rows, "test"),
        chosen=_on_front(results, entry.name, dynamic_points(rows, "val", intervals.get("val", {}), kind)),
        reported=_on_front(results, entry.name, dynamic_points(rows, "test", intervals.get("test", {}), kind)),
        link=link if member.run.report_html.is_file() else None,
    )


def _intervals(member: RunResults) -> dict[str, dict[str, tuple[float, float]]]:
    if member.verified is None:
        return {}
    return {
        analysis.split: {trial_name(point.slot): (point.top1.low, point.top1.high) for point in analysis.points}
        for analysis in (member.verified.val, member.verified.test)
    }


def _on_front(
    results: SupernetSweepResults, supernet: str, points: tuple[DynamicPoint, ...]
) -> tuple[DynamicPoint, ...]:
    """The same points, with `is_front` relative to the front over all supernets."""
    names = {trial_name(gate.slot) for gate in results.front_gates if gate.supernet == supernet}
    return tuple(replace(point, is_front=point.name in names, supernet=supernet) for point in points)


def static_hypervolumes(results: SupernetSweepResults) -> dict[str, float]:
    """Static hypervolume of each measured supernet on `val`, as a share of the whole box between
    the reference point and a perfect network without cost.

    The reference is the same for all, so that the values compare: top-1 of 0, and 1.05 x the MAdds
    of the widest sub-network of all supernets.
    """
    measured = {name: member.members for name, member in results.supernets.items() if member.subnets}
    bound = REFERENCE_MARGIN * max((subnet.madds / 1e6 for own in measured.values() for subnet in own), default=1.0)
    return {
        name: hypervolume([[subnet.top1, subnet.madds / 1e6] for subnet in own], ("maximize", "minimize"), (0.0, bound))
        / bound
        for name, own in measured.items()
    }


def global_headline(results: SupernetSweepResults) -> Headline:
    """The table of the front over all supernets; each gate's controls come from its own
    supernet."""
    rows: list[Row] = []
    baselines: list[Row] = []
    for name, member in results.supernets.items():
        slots = [gate.slot for gate in results.front_sample if gate.supernet == name]
        if not slots:
            continue
        own = headline(member)
        kept = {trial_name(slot) for slot in slots}
        rows += [_of_supernet(row, name) for row in own.rows if row.name in kept]
        if own.baseline is not None:
            baselines.append(_of_supernet(own.baseline, name))
    best = max(baselines, key=lambda row: row.chosen.top1.value, default=None)
    return Headline(
        baseline=best,
        rows=tuple(sorted(rows, key=lambda row: row.chosen.madds_m)),
        knee=None if results.knee is None else results.knee.name,
        warnings=tuple(f"{capital(text)}." for text in dominated_warnings(results)),
    )


def _of_supernet(row: Row, name: str) -> Row:
    return replace(row, name=f"{name}/{row.name}")


def draw_supernets(results: SupernetSweepResults, path: Path) -> Path:
    """Draw the front over all supernets into a file; its suffix decides the format.

    Raises:
        NotFoundError: no supernet is measured yet.
        PreflightError: an image format whose tools are not installed.
    """
    if not any(member.subnets for member in results.supernets.values()):
        raise NotFoundError(
            f"run {results.run.name!r} has no measured supernet yet; continue it with: "
            f"{launch_command(results.config, results.run.sweep_yaml)}"
        )
    return write_figure(supernets_figure(supernets_info(results)), path)


def sweep_training_notes(results: SupernetSweepResults) -> tuple[str, ...]:
    """Warnings about the training of the supernets, in sentences."""
    return tuple(note_of_warning(warning, whose) for whose, warning in sweep_warnings(results))


def sweep_warnings(results: SupernetSweepResults) -> tuple[tuple[str, TrainingWarning], ...]:
    """(whose, warning) for the training of the supernets: each kind of warning once, with the
    labels of the supernets that have it and the numbers of the first."""
    found: dict[str, list[tuple[str, TrainingWarning]]] = {}
    for name, member in results.supernets.items():
        for warning in review(member):
            found.setdefault(warning.code, []).append((name, warning))
    return tuple((_whose(results, [name for name, _ in same]), same[0][1]) for same in found.values())


def _whose(results: SupernetSweepResults, names: Sequence[str]) -> str:
    return f"{_labels(results, names)}: " + (f"(numbers of {names[0]}) " if len(names) > 1 else "")


def _labels(results: SupernetSweepResults, names: Iterable[str]) -> str:
    return ", ".join(results.entry(name).label for name in names)


def _timing_notes(results: SupernetSweepResults) -> tuple[str, ...]:
    """A note that names the supernets whose times are unreliable; none if there are none."""
    noise = {name: found for name, own in results.supernets.items() if (found := timing_noise(own)) is not None}
    if not noise:
        return ()
    first = next(iter(noise))
    own = results.supernets[first]
    return (
        f"The latencies of {_labels(results, noise)} are unreliable, because the machine was busy or its times varied "
        f"({first}: {noise[first]}); measure each again on an idle machine: "
        f"{command_line('measure', own.run.path, own_code=has_own_code(own.config))}",
    )


def _sample_notes(results: SupernetSweepResults) -> tuple[str, ...]:
    if not results.is_verified or len(results.front_sample) == len(results.front_gates):
        return ()
    return (
        f"{len(results.front_sample)} of the front's {len(results.front_gates)} gates, spaced evenly, ran on test (budget.verify).",
    )


def _commands(results: SupernetSweepResults) -> tuple[tuple[str, str], ...]:
    run, own_code = results.run, has_own_code(results.config)
    example = next(
        (gate.supernet for gate in results.front_gates), results.entries[0].name if results.entries else "s0"
    )
    return (
        ("Continue this sweep", launch_command(results.config, run.sweep_yaml)),
        ("Show the front on the terminal", command_line("pareto", run.path)),
        ("Show one supernet", command_line("pareto", run.supernets_dir / example)),
        (
            "Export the gates on the front as bundles",
            command_line("export", run.path, "--pick", "all", own_code=own_code),
        ),
        *bundle_commands(run, results.config),
        (
            "Browse the trials of all supernets as one Optuna study",
            f"optuna-dashboard {shlex.quote(str(run.merged_journal))}",
        ),
        *browsing_commands(results.config, run),
    )
