"""The command line: options to calls, errors to exit codes. Heavy imports happen inside the commands, so that --help is quick."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsnet.errors import DsnetError, StoppedError

if TYPE_CHECKING:
    from orchestration.config_loading import LoadedConfig
    from orchestration.results import RunResults
    from orchestration.rundir import RunDir
    from orchestration.signals import StopRequest

EXIT_INTERNAL = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
DEBUG_VARIABLE = "DSNET_DEBUG"

SWEEP = click.argument("sweep", type=click.Path(path_type=Path))
RUN = click.argument("run")
RUNS = click.option("--runs", default="runs", show_default=True, help="The runs folder.")
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


def config_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that change a configuration."""
    options = [
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            help="Override a setting, e.g. --set budget.trials=100.",
        ),
        click.option("--preset", help="A preset of the file, or `paper`: the published settings."),
        click.option("--data", "data_path", help="Folder of the images (data.path)."),
        click.option("--name", help="Name of the run."),
        click.option("--runs", default=None, help="The runs folder (storage.runs)."),
        click.option("--trials", type=int, help="Number of trials (budget.trials)."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog="Exit codes are listed in docs/cli.md.")
@click.version_option(package_name="dsnet-orch")
def cli() -> None:
    """Train a slimmable supernet, sweep input-adaptive gates over it, measure everything, export what is Pareto-optimal."""


def main() -> None:
    """Entry point: run the command and turn errors into exit codes."""
    try:
        code = cli.main(standalone_mode=False)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(EXIT_USAGE)
    except DsnetError as error:
        _fail(error)
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left; nothing is wrong
        sys.exit(0)
    except Exception as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        click.echo(
            f"internal error: {type(error).__name__}: {error}\nThis is a fault of dsnet-orch. {DEBUG_VARIABLE}=1 shows where.",
            err=True,
        )
        sys.exit(EXIT_INTERNAL)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(error: DsnetError) -> None:
    if os.environ.get(DEBUG_VARIABLE):
        import traceback

        traceback.print_exception(error)
    click.echo(f"error: {error}", err=True)


def _load(
    sweep: Path,
    overrides: tuple[str, ...],
    preset: str | None,
    data_path: str | None,
    name: str | None,
    runs: str | None,
    trials: int | None,
) -> LoadedConfig:
    from dsnet.families import family_names
    from orchestration.config_loading import load_config

    flags = {"data.path": data_path, "name": name, "storage.runs": runs, "budget.trials": trials}
    loaded = load_config(sweep, overrides=overrides, flags=flags, preset=preset, known_models=family_names())
    for warning in loaded.warnings:
        click.echo(f"warning: {warning}", err=True)
    return loaded


def _open_run(run: str, runs: str) -> RunResults:
    from orchestration.results import RunResults
    from orchestration.rundir import RunDir

    path = Path(run)
    if (path / "manifest.json").is_file():
        path = path.absolute()
        return RunResults(RunDir(path.parent, path.name))
    return RunResults(RunDir(Path(runs), run))


@cli.command()
@SWEEP
@config_options
@click.option(
    "--take-over", is_flag=True, help="Take a run whose lock another host holds (be sure that its driver is gone)."
)
def launch(sweep: Path, take_over: bool, **options: Any) -> int:
    """Run a sweep, or continue it where it was stopped."""
    _quiet_platforms()
    from orchestration.pipeline import check_failures
    from orchestration.pipeline import launch as run_launch
    from orchestration.progress import TerminalProgress
    from orchestration.signals import stop_on_signals
    from orchestration.terminal import show_launch

    config = _load(sweep, **options).config
    progress = TerminalProgress()
    command = shlex.join(["dsnet-orch", *sys.argv[1:]])
    requests: list[StopRequest] = []

    @contextmanager
    def stop(run: RunDir) -> Iterator[StopRequest]:
        def first(name: str) -> None:
            progress.say(f"{name}: stopping at the next step or trial (again to stop at once) ...")

        with stop_on_signals(run.stop_requested, first) as request:
            requests.append(request)
            yield request

    try:
        result = run_launch(config, command=command, progress=progress, stop=stop, take_over=take_over)
    except (StoppedError, KeyboardInterrupt):
        click.echo(f"stopped; nothing is lost. Continue with:\n  {command}", err=True)
        return requests[-1].exit_code if requests else EXIT_INTERRUPTED
    show_launch(result)
    check_failures(result)
    return 0


@cli.command()
@SWEEP
@config_options
@AS_JSON
@click.option(
    "--resolved",
    type=click.Path(path_type=Path),
    help="Also write what `python -m dsnet.training --config` takes: Stage I, measure and table without Ray.",
)
def plan(sweep: Path, as_json: bool, resolved: Path | None, **options: Any) -> None:
    """Show what a launch would do: every setting with its origin, and each stage with the reason why it would run."""
    from orchestration.planning import make_plan
    from orchestration.terminal import show_plan

    loaded = _load(sweep, **options)
    if resolved is not None:
        from dsnet.files import atomic_write_json
        from orchestration.adoption import standalone_config

        atomic_write_json(resolved, standalone_config(loaded.config).to_json())
    show_plan(make_plan(loaded), as_json=as_json)


@cli.command()
@SWEEP
@config_options
def validate(sweep: Path, **options: Any) -> None:
    """Check a sweep file without reading data or running anything."""
    config = _load(sweep, **options).config
    click.echo(
        f"{sweep}: fine ({config.name}: {config.supernet.model} on {config.data.name}, {config.budget.trials} trials)"
    )


@cli.command()
def schema() -> None:
    """Print the JSON schema of sweep files, for editors."""
    import json

    from orchestration.config import json_schema

    click.echo(json.dumps(json_schema(), indent=2))


@cli.command("import-checkpoint")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write [default: named after the file].")
@click.option("--name", help="Name of the sweep [default: the folder's].")
@click.option("--classes", type=click.IntRange(min=1), help="Classes of its classifier [default: as many as it has].")
@click.option("--image-size", default=224, show_default=True, help="Side of the images in pixels.")
@click.option("--ema", is_flag=True, help="Take the averaged weights (state_dict_ema).")
@click.option("--data", help="Folder of held-out images, a folder per class [default: $DSNET_DATA or launch --data].")
def import_checkpoint(checkpoint: Path, out: Path | None, name: str | None, **options: Any) -> None:
    """Make a sweep out of a released DS-Net checkpoint, which skips Stage I; prints the sweep file to launch."""
    from orchestration.import_checkpoint import ImportSettings
    from orchestration.import_checkpoint import import_checkpoint as make_import

    folder = out if out is not None else Path(checkpoint.name.split(".")[0] + "-imported")
    settings = ImportSettings(
        name=name if name is not None else folder.name,
        num_classes=options["classes"],
        image_size=options["image_size"],
        ema=options["ema"],
        data=options["data"],
    )
    imported = make_import(checkpoint, folder, settings)
    click.echo(f"{imported.summary()}; continue with:\n  dsnet-orch launch {imported.sweep}", err=True)
    click.echo(imported.sweep)


@cli.command()
@RUN
@RUNS
@AS_JSON
def status(run: str, runs: str, as_json: bool) -> None:
    """Show how far a run has come."""
    from orchestration.terminal import show_status

    show_status(_open_run(run, runs), as_json=as_json)


@cli.command()
@RUN
@RUNS
@AS_JSON
def trials(run: str, runs: str, as_json: bool) -> None:
    """List the trials of a run."""
    from orchestration.terminal import show_trials

    show_trials(_open_run(run, runs), as_json=as_json)


@cli.command()
@RUN
@RUNS
@click.option(
    "--pick", "picks", multiple=True, help='Show only these: knee, all, "max:top1 where madds_m<=0.1", trial-0042.'
)
@click.option(
    "--figure",
    type=click.Path(path_type=Path),
    help="Also draw the front into this file: .html, .json, or .svg and .png with the extra [images].",
)
@click.option(
    "--routers-figure",
    type=click.Path(path_type=Path),
    help="Also draw what each kind of router reaches at three budgets into this file.",
)
@AS_JSON
def pareto(
    run: str, runs: str, picks: tuple[str, ...], figure: Path | None, routers_figure: Path | None, as_json: bool
) -> None:
    """Show the front of a run: each gate on val and on test, beside what would make it unimpressive."""
    from orchestration.terminal import show_front

    results = _open_run(run, runs)
    show_front(results, picks, as_json=as_json)
    if figure is not None:
        from orchestration.reporting import draw_front

        click.echo(draw_front(results, figure), err=True)
    if routers_figure is not None:
        from orchestration.reporting import draw_routers

        click.echo(draw_routers(results, routers_figure), err=True)


@cli.command()
@RUN
@RUNS
@click.option(
    "--pick",
    "picks",
    multiple=True,
    default=("knee",),
    show_default=True,
    help="knee, all, max:METRIC [where ...], trial-NNNN.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder that receives a folder per gate [default: the run's export/].",
)
def export(run: str, runs: str, picks: tuple[str, ...], out: Path | None) -> None:
    """Export gates of a run as bundles that `dsnet.load_bundle` reads; prints their folders."""
    from orchestration.export import export_bundles
    from orchestration.planning import prepare_again
    from orchestration.results import picked_slots

    results = _open_run(run, runs)
    slots = picked_slots(results, picks)
    for path in export_bundles(prepare_again(results), results, slots, out or results.run.export_dir):
        click.echo(path)


@cli.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--data",
    "data_path",
    is_flag=False,
    flag_value="",
    default=None,
    help="Also re-check accuracy, on the data in this folder (no value: embedded data).",
)
@AS_JSON
def verify(path: Path, data_path: str | None, as_json: bool) -> None:
    """Check a bundle: its files, its stored examples and, with --data, the accuracy and MAdds that it claims."""
    from orchestration.bundle_check import check_bundle
    from orchestration.terminal import show_checks

    show_checks(check_bundle(path, data_path), as_json=as_json)


@cli.command()
@RUN
@RUNS
def report(run: str, runs: str) -> None:
    """Build a run's report.html again; prints its path."""
    from orchestration.planning import report_again

    click.echo(report_again(_open_run(run, runs)))


@cli.command()
@RUN
@RUNS
def sync(run: str, runs: str) -> None:
    """Write a run to MLflow again; what is there already is not written twice."""
    _quiet_platforms()
    from orchestration.planning import sync_again

    click.echo(sync_again(_open_run(run, runs)))


@cli.command()
@RUNS
@click.option("--port", type=int, default=5000, show_default=True, help="A free one is taken where it is busy.")
def ui(runs: str, port: int) -> None:
    """Open MLflow on 127.0.0.1 over a runs folder, until Ctrl-C."""
    _quiet_platforms()
    from orchestration.mlflow_server import serve_ui
    from orchestration.planning import existing_store
    from orchestration.signals import wait_for_stop

    uri, artifacts = existing_store(Path(runs))
    with serve_ui(uri, artifacts, port) as url:
        click.echo(f'MLflow: {url}   (choose an experiment, then "Model training"; Ctrl-C ends it)')
        wait_for_stop()


def _quiet_platforms() -> None:
    """Settings that Ray and MLflow read when they are imported."""
    from orchestration.ray_runtime import prepare_environment
    from orchestration.tracking import mlflow_environment

    prepare_environment()
    os.environ.update(mlflow_environment())
