"""Commands that look at a sweep of supernets without running stages: plan, report, export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsnet.dotted import flatten
from dsnet.space.cost import subnet_cost
from orchestration.commands.messages import warn
from orchestration.commands.plan_view import effective_values
from orchestration.commands.planning import (
    FROM_THE_DATA,
    check_same_data,
    report_again,
    unless_it_diverges,
)
from orchestration.config.loading import LoadedConfig
from orchestration.config.sweep import SweepConfig
from orchestration.pipeline.export import Formats
from orchestration.pipeline.forecast import Forecast, forecast_supernets
from orchestration.pipeline.launch import anchored
from orchestration.pipeline.search import continued
from orchestration.prepare.preparation import Images, load_images, prepare, stage_definitions
from orchestration.runs.folder import RunDir
from orchestration.runs.stages import StagePlan, plan_stages
from orchestration.supernets.launch import check_supernets, export_gates, picked_supernets, tune_member, tune_rules
from orchestration.supernets.members import Member, draw_members
from orchestration.supernets.report import write_supernets_report
from orchestration.supernets.results import SupernetSweepResults
from orchestration.workers.tune_ledger import MemberFate
from orchestration.workers.tune_supernets import stored_fates
from search.front.points_file import save_points


@dataclass(frozen=True)
class SupernetsPlan:
    """The plan of a launch of a sweep of supernets."""

    config: SweepConfig
    origins: Mapping[str, str]
    run: RunDir
    members: tuple[Member, ...]
    stages: Mapping[str, tuple[StagePlan, ...]]
    """Stage plans of each valid member."""
    fates: Mapping[str, MemberFate]
    """Fates that earlier launches have decided."""
    madds_m: Mapping[str, tuple[float, float]]
    """(cheapest, widest) sub-network of each member, in millions of MAdds."""
    forecast: Forecast | None = None
    """Upper bound of the costs, as if no supernet were stopped early; None if it was not wanted or
    nothing is left to do."""

    def settings(self) -> dict[str, dict[str, Any]]:
        """Every setting with its value and origin; `effective` is what a null stands for, over all
        valid supernets."""
        prepared = [member.prepared for member in self.members if member.prepared is not None]
        effective = _of_all([effective_values(self.config, each) for each in prepared])
        derived = _of_all([{key: each.value for key, each in one.derived.items()} for one in prepared])
        reasons = _of_all([{key: each.reason for key, each in one.derived.items()} for one in prepared])
        settings: dict[str, dict[str, Any]] = {}
        for key, value in flatten(self.config.model_dump(mode="json"), whole=("space", "supernet.options")).items():
            settings[key] = {"value": value, "origin": self.origins.get(key, "default")}
            if key in derived and key not in self.config.space:
                settings[key] |= {"value": derived[key], "origin": FROM_THE_DATA, "reason": reasons[key]}
            if settings[key]["value"] is None and key in effective:
                settings[key]["effective"] = effective[key]
        return settings


def _of_all(mappings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """For each key the value common to all mappings; if they differ, a text with each distinct
    value."""
    found: dict[str, Any] = {}
    for key in dict.fromkeys(key for mapping in mappings for key in mapping):
        values = list({repr(mapping[key]): mapping[key] for mapping in mappings if key in mapping}.values())
        found[key] = values[0] if len(values) == 1 else " or ".join(map(str, values))
    return found


def plan_supernets(loaded: LoadedConfig, *, is_dry: bool = False) -> SupernetsPlan:
    """Load the data, draw the supernets, and compare the stages' keys with what the run folder has;
    writes nothing.

    Args:
        loaded: the sweep.
        is_dry: time no steps, and forecast nothing.

    Raises:
        DataError, ConfigError, PreflightError: as a launch would.
    """
    config = anchored(loaded.config)
    check_supernets(config)
    run = RunDir(Path(config.storage.runs), config.name)
    members = draw_members(config, run, load_images(config), warn)
    for warning in dict.fromkeys(text for member in members if member.prepared for text in member.prepared.warnings()):
        warn(warning)
    stages: dict[str, tuple[StagePlan, ...]] = {}
    madds_m: dict[str, tuple[float, float]] = {}
    tuned = []
    for member in members:
        if member.prepared is None:
            continue
        *others, search = plan_stages(member.run, stage_definitions(member.prepared))
        stages[member.name] = (*others, continued(member.run, search, member.config))
        prepared = member.prepared
        costs = [subnet_cost(prepared.subnets.spec, item, prepared.image_size).madds / 1e6 for item in prepared.subnets]
        madds_m[member.name] = (min(costs), max(costs))
        training = next(plan for plan in others if plan.name == "supernet")
        tuned.append(tune_member(member, training, run.stop_path, 1))
    fates = stored_fates(tuned, tune_rules(config), run.tune_dir)
    left = [
        (member.prepared, stages[member.name])
        for member in members
        if member.prepared is not None and (member.name not in fates or fates[member.name].state == "trained")
    ]
    found = None if is_dry else unless_it_diverges(lambda: forecast_supernets(left, config.supernets.concurrent))
    return SupernetsPlan(loaded.config, loaded.origins, run, members, stages, fates, madds_m, found)


def _images_again(results: SupernetSweepResults) -> Images:
    """Load the data of an existing sweep and check that they are the same.

    Raises:
        DataError: the data is not what the sweep was made with.
    """
    images = load_images(results.config)
    check_same_data(results.run, results.manifest, images)
    return images


def report_supernets_again(results: SupernetSweepResults) -> Path:
    """Write points.parquet and report.html of the sweep and of its members from the present
    results."""
    for member in results.supernets.values():
        report_again(member)
    save_points(results.run.points_parquet, results.points())
    images = _images_again(results)
    notes: tuple[str, ...] = ()
    for member in results.supernets.values():
        notes = prepare(member.config, member.run, warn, images).notes()
        break
    return write_supernets_report(results, notes, "complete" if results.is_verified else "stopped")


def export_supernets_again(
    results: SupernetSweepResults, picks: Sequence[str], folder: Path | None, formats: Formats
) -> list[Path]:
    """Write bundles of picked gates, or sets of operating points, of any of the supernets; returns
    their folders."""
    images = _images_again(results)
    wanted = picked_supernets(results, picks)
    prepared = {
        name: prepare(member.config, member.run, warn, images)
        for name, member in results.supernets.items()
        if name in wanted
    }
    return export_gates(results, picks, prepared, folder or results.run.export_dir, formats)
