"""Commands that look at a sweep or a run without running stages: plan, report, and what they
share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsnet.dotted import flatten
from dsnet.errors import DataError, NonFiniteLossError, NothingFeasibleError
from dsnet.space.cost import subnet_cost
from orchestration.commands.messages import warn
from orchestration.config.loading import LoadedConfig
from orchestration.config.sweep import SweepConfig
from orchestration.pipeline.forecast import Forecast, forecast
from orchestration.pipeline.search import continued, refuse_impossible_layout
from orchestration.prepare.preparation import Images, Prepared, load_images, prepare, stage_definitions
from orchestration.results.report import write_report
from orchestration.results.run import RunResults
from orchestration.results.supernet_facts import SupernetFacts
from orchestration.runs.folder import RunDir
from orchestration.runs.stages import StagePlan, plan_stages
from search.front.points_file import save_points

FROM_THE_DATA = "data"
"""Origin of a setting that is not written and is derived from the images."""


@dataclass(frozen=True)
class SweepPlan:
    """The plan of a launch."""

    config: SweepConfig
    """The configuration with defaults derived from the data filled in."""
    origins: dict[str, str]
    prepared: Prepared
    supernet: SupernetFacts
    run: RunDir
    stages: tuple[StagePlan, ...]
    routes: tuple[tuple[str, float, float], ...]
    """(name, M MAdds, M parameters) of each sub-network, the teacher last."""
    forecast: Forecast | None = None
    """Estimated time, memory and disk; None if nothing was timed."""

    def settings(self) -> dict[str, dict[str, Any]]:
        """Every setting with its value and origin, and the reason if the data decided it."""
        derived = self.prepared.derived
        settings: dict[str, dict[str, Any]] = {}
        for key, value in flatten(self.config.model_dump(mode="json"), whole=("space", "supernet.options")).items():
            settings[key] = {"value": value, "origin": self.origins.get(key, "default")}
            if key in derived:
                settings[key] |= {"value": derived[key].value, "reason": derived[key].reason}
        return settings


def make_plan(loaded: LoadedConfig, *, is_dry: bool = False) -> SweepPlan:
    """Load the data, lay out the network, and compare the stages' keys with what the run folder
    has; writes nothing to it.

    Args:
        loaded: the sweep.
        is_dry: time no steps, and forecast nothing.

    Raises:
        DataError, ConfigError, PreflightError: as a launch would.
    """
    run = RunDir(Path(loaded.config.storage.runs), loaded.config.name)
    prepared = prepare(loaded.config, run, warn)
    config = prepared.config
    for warning in prepared.warnings():
        warn(warning)
    try:
        refuse_impossible_layout(config, prepared.subnets, prepared.image_size)
    except NothingFeasibleError as error:  # the plan is still shown: its costs help to change the sweep
        warn(f"a launch would fail immediately: {error}")
    spec = prepared.subnets.spec
    costs = [(subnet.name, subnet_cost(spec, subnet, prepared.image_size)) for subnet in prepared.subnets.all]
    *others, search = plan_stages(run, stage_definitions(prepared))
    stages = (*others, continued(run, search, config))
    return SweepPlan(
        config,
        {**loaded.origins, **dict.fromkeys(prepared.derived, FROM_THE_DATA)},
        prepared,
        SupernetFacts.of_prepared(prepared),
        run,
        stages,
        tuple((name, cost.madds / 1e6, cost.params / 1e6) for name, cost in costs),
        None if is_dry else unless_it_diverges(lambda: forecast(prepared, stages)),
    )


def unless_it_diverges(make: Callable[[], Forecast | None]) -> Forecast | None:
    """The forecast; None, with a warning, if the timed steps end in NaN, so that the plan is still
    shown."""
    try:
        return make()
    except NonFiniteLossError as error:
        warn(f"no forecast: the training diverges in its first steps ({error})")
        return None


def prepare_again(results: RunResults) -> Prepared:
    """Load the data and lay out the network of an existing run.

    Raises:
        DataError: the data is not what the run was made with.
    """
    images = load_images(results.config)
    check_same_data(results.run, results.manifest, images)
    return prepare(results.config, results.run, warn, images)


def check_same_data(run: RunDir, manifest: Mapping[str, Any], images: Images) -> None:
    """Check that the data are those with which the run was made.

    Raises:
        DataError: its fingerprint differs.
    """
    recorded = manifest["data_hashes"]
    if recorded.get("images") != images.image_set.fingerprint or recorded.get("splits") != images.splits.hash:
        raise DataError(
            f"the images of {images.image_set.name} are not those of run {run.name!r} "
            "(their fingerprints differ); set DSNET_DATA or --data to the original files"
        )


def report_again(results: RunResults) -> Path:
    """Write points.parquet and report.html from the present results of a run."""
    prepared = prepare_again(results)
    save_points(results.run.points_parquet, results.points())
    status = "complete" if results.verified is not None else "stopped"
    return write_report(results, prepared.image_set.class_names, prepared.notes(), status)
