"""A sweep as the commands work with it, the same for one supernet and for several.

Commands distinguish the two kinds in the functions of this module only; so do the launch and the
rows of MLflow. Heavy imports happen inside the methods, so that each command loads only what it
needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dsnet.errors import ConfigError
from dsnet.wording import plural
from orchestration.config.resolve import supernet_space
from orchestration.results.protocol import Results
from orchestration.results.run import RunResults
from orchestration.runs.folder import RunDir
from orchestration.supernets.results import SupernetSweepResults, results_at

if TYPE_CHECKING:
    from orchestration.config.loading import LoadedConfig
    from orchestration.config.sweep import SweepConfig
    from orchestration.pipeline.export import Formats


class Sweep(Protocol):
    """A sweep that was launched, with everything that commands do with it."""

    @property
    def results(self) -> Results:
        """The results so far."""
        ...

    def show_launch(self, bundles: Sequence[Path]) -> None:
        """Print the front, warnings about the training, and where the files are."""
        ...

    def show_status(self, *, as_json: bool) -> None:
        """Print how far the sweep has come."""
        ...

    def show_front(self, picks: Sequence[str], *, as_json: bool) -> None:
        """Print the front, or the picked gates of it."""
        ...

    def draw_front(self, path: Path) -> Path:
        """Draw the front into a file, whose suffix decides the format."""
        ...

    def export(self, picks: Sequence[str], folder: Path | None, further: Sequence[str]) -> list[Path]:
        """Write bundles of picked gates, in the formats of `export.formats` and in further ones;
        returns their folders."""
        ...

    def report(self) -> Path:
        """Write the report again; returns its path."""
        ...

    def only_supernet(self, why: str) -> RunResults:
        """The results of the sweep's only supernet, for commands about one.

        Args:
            why: the end of a sentence about the sweep that is refused, "but ...".

        Raises:
            ConfigError: the sweep has several supernets; the message names the run of one.
        """
        ...


class SweepOfOne:
    """A sweep of the gates of one supernet."""

    def __init__(self, results: RunResults) -> None:
        self.results = results

    def show_launch(self, bundles: Sequence[Path]) -> None:
        """Print the front, warnings about the training, and where the files are."""
        from orchestration.commands.terminal import show_launch

        show_launch(self.results, bundles)

    def show_status(self, *, as_json: bool) -> None:
        """Print stages, trials and front."""
        from orchestration.commands.terminal import show_status

        show_status(self.results, as_json=as_json)

    def show_front(self, picks: Sequence[str], *, as_json: bool) -> None:
        """Print the front beside its controls."""
        from orchestration.commands.terminal import say_dominated, show_front

        show_front(self.results, picks, as_json=as_json)
        if not as_json:
            say_dominated(self.results)

    def draw_front(self, path: Path) -> Path:
        """Draw the front into a file."""
        from orchestration.results.report import draw_front

        return draw_front(self.results, path)

    def export(self, picks: Sequence[str], folder: Path | None, further: Sequence[str]) -> list[Path]:
        """Write bundles of picked trials."""
        from orchestration.commands.planning import prepare_again
        from orchestration.pipeline.export import export_picks

        folder = folder or self.results.run.export_dir
        return export_picks(prepare_again(self.results), self.results, picks, folder, _formats(self.results, further))

    def report(self) -> Path:
        """Write points and report again."""
        from orchestration.commands.planning import report_again

        return report_again(self.results)

    def only_supernet(self, why: str) -> RunResults:
        """The results of the run."""
        return self.results


class SweepOfSeveral:
    """A sweep of several supernets and of the gates of each."""

    def __init__(self, results: SupernetSweepResults) -> None:
        self.results = results

    def show_launch(self, bundles: Sequence[Path]) -> None:
        """Print the front over all supernets, warnings about those on it, and where the files
        are."""
        from orchestration.commands.supernet_tables import show_supernets_launch

        show_supernets_launch(self.results, bundles)

    def show_status(self, *, as_json: bool) -> None:
        """Print the state of each supernet, the numbers of trials, and the front."""
        from orchestration.commands.supernet_tables import show_supernets_status

        show_supernets_status(self.results, as_json=as_json)

    def show_front(self, picks: Sequence[str], *, as_json: bool) -> None:
        """Print the front over all supernets."""
        from orchestration.commands.supernet_tables import show_supernets_front
        from orchestration.commands.terminal import say_dominated

        show_supernets_front(self.results, picks, as_json=as_json)
        if not as_json:
            say_dominated(self.results)

    def draw_front(self, path: Path) -> Path:
        """Draw the front over all supernets into a file."""
        from orchestration.supernets.report import draw_supernets

        return draw_supernets(self.results, path)

    def export(self, picks: Sequence[str], folder: Path | None, further: Sequence[str]) -> list[Path]:
        """Write bundles of picked gates of any of the supernets."""
        from orchestration.commands.plan_supernets import export_supernets_again

        return export_supernets_again(self.results, picks, folder, _formats(self.results, further))

    def report(self) -> Path:
        """Write points and reports of the sweep and of its supernets again."""
        from orchestration.commands.plan_supernets import report_supernets_again

        return report_supernets_again(self.results)

    def only_supernet(self, why: str) -> RunResults:
        """Refuse: the sweep has several supernets.

        Raises:
            ConfigError: always; the message names the run of one.
        """
        run = self.results.run
        raise ConfigError(
            f"{run.name} is a sweep of several supernets, but {why}; name its run, e.g. "
            f"{run.supernets_dir / self.results.entries[0].name}"
        )


def _formats(results: Results, further: Sequence[str]) -> Formats:
    """The formats of `export.formats` and further ones; measured accuracies are said on stderr."""
    from orchestration.commands.messages import complain
    from orchestration.pipeline.export import Formats

    return Formats(results.config.export.formats, further, say=complain)


def open_sweep(run: str, runs: str) -> Sweep:
    """Open a run of either kind.

    Args:
        run: its path, or its name below the runs folder (`NAME/supernets/MEMBER` too).
        runs: the runs folder.

    Raises:
        NotFoundError: there is no such run.
    """
    return sweep_of(results_at(find_run(run, runs)))


def find_run(run: str, runs: str) -> RunDir:
    """The folder of a run, which need not exist; arguments as for `open_sweep`."""
    below = Path(runs) / run
    path = next((path.absolute() for path in (Path(run), below) if (path / "manifest.json").is_file()), below)
    return RunDir(path.parent, path.name)


def sweep_of(results: Results) -> Sweep:
    """The sweep that results belong to."""
    if isinstance(results, SupernetSweepResults):
        return SweepOfSeveral(results)
    assert isinstance(results, RunResults)
    return SweepOfOne(results)


@dataclass(frozen=True)
class PlanOptions:
    """Options of `dsnet-orch plan`."""

    is_dry: bool = False
    """Time no steps, and forecast nothing."""
    as_json: bool = False
    everything: bool = False
    """Show every setting and every sub-network."""
    standalone: Path | None = None
    """Also write here what `python -m dsnet.training` takes; for one supernet only."""


def show_plan_of(loaded: LoadedConfig, options: PlanOptions) -> None:
    """Print what a launch of either kind would do.

    Raises:
        ConfigError: the standalone configuration of several supernets is asked for.
        DataError, PreflightError: as a launch would.
    """
    if supernet_space(loaded.config):
        from orchestration.commands.plan_supernets import plan_supernets
        from orchestration.commands.supernet_tables import show_supernets_plan

        if options.standalone is not None:
            raise ConfigError(
                "--resolved describes one supernet, but `space` has supernet.* parameters; replace them by fixed values first"
            )
        several = plan_supernets(loaded, is_dry=options.is_dry)
        show_supernets_plan(several, as_json=options.as_json, everything=options.everything)
        return
    from orchestration.commands.plan_view import show_plan
    from orchestration.commands.planning import make_plan

    plan = make_plan(loaded, is_dry=options.is_dry)
    if options.standalone is not None:
        from dsnet.files import atomic_write_json
        from orchestration.prepare.adoption import standalone_config

        atomic_write_json(options.standalone, standalone_config(plan.config).to_json())
    show_plan(plan, as_json=options.as_json, everything=options.everything)


def check_sweep(config: SweepConfig) -> str:
    """Check what can be checked without data; returns the number of trials, in words.

    Raises:
        ConfigError: settings that a sweep of several supernets does not support.
    """
    trials = plural(config.budget.trials, "trial")
    if not supernet_space(config):
        return trials
    from orchestration.supernets.launch import check_supernets

    check_supernets(config)
    return f"up to {plural(config.supernets.number, 'supernet')}, {trials} for each"
