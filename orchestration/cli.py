"""The command line: options to calls, errors to exit codes. Heavy imports happen inside the
commands, so that --help is quick."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsnet.arithmetic import fix_arithmetic
from dsnet.deploy.layout import FLOAT32
from dsnet.errors import ClusterLostError, DsnetError, StoppedError, StorageError
from dsnet.image_size import ImageSize, normal_size
from dsnet.import_path import ALLOW_IMPORTS
from dsnet.storage_faults import disk_error, storage_error
from orchestration.output.lasting_stderr import lasting_stderr
from orchestration.runs.supervisor import tell_command
from orchestration.serving.settings import ServeSettings

if TYPE_CHECKING:
    from dsnet.stop_signals import StopRequest
    from orchestration.config.loading import LoadedConfig
    from orchestration.config.sweep import SweepConfig
    from orchestration.runs.folder import RunDir

MAX_DIGITS = 9
"""Digits of a number of pixels on the command line; the settings' own limit is far below."""
EXIT_INTERNAL = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
DEBUG_VARIABLE = "DSNET_DEBUG"

SWEEP = click.argument("sweep", type=click.Path(path_type=Path))
RUN = click.argument("run")
RUNS = click.option("--runs", default="runs", show_default=True, help="The runs folder.")


def _set_allow_imports(_: click.Context, __: click.Parameter, is_allowed: bool) -> None:
    if is_allowed:
        os.environ[ALLOW_IMPORTS] = "1"  # also for the processes that this one starts


def _shares(_: click.Context, __: click.Parameter, text: str | None) -> tuple[float, ...]:
    """Numbers in (0, 1] that are separated by commas."""
    try:
        found = tuple(float(part) for part in (text or "").split(",") if part.strip())
    except ValueError:
        found = (0.0,)
    if not all(0 < share <= 1 for share in found):
        raise click.BadParameter(f"{text!r} is not a list of shares above 0 and at most 1, such as 0.3,0.6,1")
    return found


def _image_size(_: click.Context, __: click.Parameter, text: str) -> ImageSize:
    """The size that a number or HEIGHTxWIDTH stands for."""
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() and len(side) <= MAX_DIGITS for side in sides):
        raise click.BadParameter(f"{text!r} is not a number of pixels or HEIGHTxWIDTH, such as 224 or 192x256")
    return int(sides[0]) if len(sides) == 1 else normal_size([int(side) for side in sides])


IMPORTS = click.option(
    "--allow-imports",
    is_flag=True,
    expose_value=False,
    callback=_set_allow_imports,
    help=f"Allow a network by import path, which runs code of yours; {ALLOW_IMPORTS}=1 in the environment does the same.",
)
POSITIVE = click.FloatRange(min=0, min_open=True)
PRECISION = click.option(
    "--precision",
    default=FLOAT32,
    show_default=True,
    help="float32, or int8 for a bundle with the format onnx_int8.",
)
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


def config_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that change a configuration."""
    options = [
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            help="Set a value of the sweep file, e.g. --set budget.trials=100.",
        ),
        click.option("--preset", help="Apply a preset of the sweep file, or `paper`, the published settings."),
        click.option("--data", "data_path", help="Folder with the images (data.path)."),
        click.option("--name", help="Name of the run."),
        click.option("--runs", default=None, help="The runs folder (storage.runs)."),
        click.option("--trials", type=int, help="Number of trials (budget.trials)."),
        IMPORTS,
    ]
    for option in reversed(options):
        function = option(function)
    return function


class _WholeSummaries(click.Group):
    """A group whose help shows the first sentence of every command whole; click cuts it at the
    width of the terminal."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands."""
        rows = [(name, self.commands[name].get_short_help_str(limit=1000)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(
    cls=_WholeSummaries,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes are listed in docs/cli.md.",
)
@click.version_option(package_name="dsnet-orch")
def cli() -> None:
    """Train a slimmable supernet, search for gates that choose a sub-network for each image, and
    export the Pareto-optimal ones."""


def main() -> None:
    """Entry point: run the command and turn errors into exit codes."""
    fix_arithmetic()
    try:
        code = cli.main(standalone_mode=False)
        sys.stdout.flush()  # a full disk behind a redirection is noticed here
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
        # The reader of the pipe has ended; this is not an error.
        _drop_stdout()
        sys.exit(0)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is reported
        sys.exit(_other_error(error))
    sys.exit(code if isinstance(code, int) else 0)


def _other_error(error: Exception) -> int:
    """Report an error that is not of ours; returns the exit code."""
    fault = _stdout_fault(error) or storage_error(error)
    if fault is not None:
        _fail(fault)
        return fault.exit_code
    if os.environ.get(DEBUG_VARIABLE):
        raise error
    click.echo(
        f"internal error: {type(error).__name__}: {error}\nThis is a bug in dsnet-orch. Set {DEBUG_VARIABLE}=1 to see the traceback.",
        err=True,
    )
    return EXIT_INTERNAL


def _stdout_fault(error: Exception) -> StorageError | None:
    """The fault of storage for which stdout cannot be written, if that is the error; what stdout
    still holds is dropped then, or Python would fail again at its end."""
    if not isinstance(error, OSError) or error.filename is not None or disk_error(error) is None:
        return None
    try:
        os.write(sys.stdout.fileno(), b"\n")  # the error does not say which file it is about
    except OSError as again:
        if again.errno == error.errno:
            _drop_stdout()
            return storage_error(error, Path("/dev/stdout"), "write")
    return None


def _drop_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(error: DsnetError) -> None:
    from orchestration.commands.messages import complain

    if os.environ.get(DEBUG_VARIABLE):
        import traceback

        traceback.print_exception(error)
    complain(f"error: {error}")


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
    from orchestration.commands.messages import warn
    from orchestration.config.loading import load_config

    flags = {"data.path": data_path, "name": name, "storage.runs": runs, "budget.trials": trials}
    loaded = load_config(sweep, overrides=overrides, flags=flags, preset=preset, known_models=family_names())
    for warning in loaded.warnings:
        warn(warning)
    return loaded


@cli.command()
@SWEEP
@config_options
@click.option(
    "--take-over",
    is_flag=True,
    help="Take over the lock of a driver on another host; make sure that it no longer runs.",
)
def launch(sweep: Path, take_over: bool, **options: Any) -> int:
    """Run a sweep, or continue it where it stopped."""
    _quiet_platforms()
    return _run(_load(sweep, **options).config, take_over=take_over)


def _run(config: SweepConfig, *, take_over: bool, again: str | None = None) -> int:
    """Run the stages of a sweep; returns the exit code.

    Args:
        config: resolved.
        take_over: take the lock of another host.
        again: command that continues it after a stop; None = the user's own command.
    """
    from dsnet.stop_signals import stop_on_signals
    from orchestration.commands.ending import Ending
    from orchestration.commands.sweep import sweep_of
    from orchestration.pipeline.launch import check_failures
    from orchestration.progress import TerminalProgress
    from orchestration.supernets.launch import launch_sweep
    from orchestration.workers.last_resort import end_if_left_open, ended_in_time
    from orchestration.workers.runtime import is_left_open

    progress = TerminalProgress()
    command = shlex.join(["dsnet-orch", *sys.argv[1:]])
    ending = Ending(progress, again or command)
    tell_command(again or command)

    @contextmanager
    def stop(run: RunDir) -> Iterator[StopRequest]:
        with stop_on_signals(run.stop_requested, ending.hear) as ending.request:
            yield ending.request

    with lasting_stderr(sys.stderr), ended_in_time(lambda: ending.request, ending.tell_lost):
        try:
            result = launch_sweep(config, command=command, progress=progress, stop=stop, take_over=take_over)
        except (StoppedError, KeyboardInterrupt) as error:
            return end_if_left_open(ending.tell(error))
        except DsnetError as error:
            if is_left_open():
                _fail(error)
                end_if_left_open(error.exit_code)
            raise
    sweep_of(result.results).show_launch(result.bundles)
    check_failures(result.results)
    return 0


@cli.command()
@IMPORTS
@RUN
@RUNS
@click.option(
    "--trials", required=True, metavar="+N|N", help="+N: number of additional trials; N: total number of trials."
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Also change another setting of the budget, e.g. budget.plateau=null.",
)
@click.option(
    "--take-over",
    is_flag=True,
    help="Take over the lock of a driver on another host; make sure that it no longer runs.",
)
def extend(run: str, runs: str, trials: str, overrides: tuple[str, ...], take_over: bool) -> int:
    """Raise the trial budget of a run and continue it; finished trials are kept."""
    _quiet_platforms()
    from orchestration.commands.messages import complain
    from orchestration.commands.steering import budget_kept_on_failed_start, extended, extension_notes
    from orchestration.commands.sweep import open_sweep
    from orchestration.config.command_lines import launch_command

    results = open_sweep(run, runs).results
    config = extended(results, trials, overrides)
    for note in extension_notes(results, config):
        complain(note)
    with budget_kept_on_failed_start(results):
        return _run(config, take_over=take_over, again=launch_command(config, results.run.sweep_yaml))


@cli.command()
@RUN
@RUNS
@click.option(
    "--set", "values", multiple=True, metavar="KEY=VALUE", help="Value of one parameter, e.g. gate.target=0.3."
)
@click.option(
    "--from",
    "source",
    type=click.Path(path_type=Path),
    help="File with a YAML or JSON list of points, e.g. - {gate.target: 0.3}.",
)
@click.option(
    "--like", metavar="TRIAL", help="Start from the parameters of this trial: knee, or a name such as trial-0042."
)
def enqueue(run: str, runs: str, values: tuple[str, ...], source: Path | None, like: str | None) -> None:
    """Add points to be tried next; the sampler draws the parameters that a point leaves out."""
    from orchestration.commands.steering import enqueue_points, read_points, set_values
    from orchestration.commands.sweep import open_sweep

    if source is not None and (values or like):
        raise click.UsageError("--from cannot be combined with --set or --like; write all values into the file")
    points = read_points(source) if source is not None else [set_values(values)]
    for line in enqueue_points(open_sweep(run, runs).only_supernet("a point belongs to one of them"), points, like):
        click.echo(line)


@cli.command()
@SWEEP
@config_options
@AS_JSON
@click.option(
    "--resolved",
    type=click.Path(path_type=Path),
    help="Also write this file for `python -m dsnet.training --config`, which trains and measures the supernet without Ray.",
)
@click.option("--dry", "is_dry", is_flag=True, help="Skip the forecast, which times a few training steps.")
@click.option("--all", "everything", is_flag=True, help="Show every setting and every sub-network.")
def plan(sweep: Path, as_json: bool, resolved: Path | None, is_dry: bool, everything: bool, **options: Any) -> None:
    """Show the stages, time, memory and disk space of a launch, and the origin of its settings."""
    from orchestration.commands.sweep import PlanOptions, show_plan_of

    show_plan_of(_load(sweep, **options), PlanOptions(is_dry, as_json, everything, resolved))


@cli.command()
@SWEEP
@config_options
def validate(sweep: Path, **options: Any) -> None:
    """Check a sweep file without reading data or running anything."""
    from orchestration.commands.sweep import check_sweep

    config = _load(sweep, **options).config
    trials = check_sweep(config)
    click.echo(f"{sweep}: valid ({config.name}: {config.supernet.model} on {config.data.name}, {trials})")


@cli.command()
def schema() -> None:
    """Print the JSON schema of sweep files, for editors."""
    import json

    from orchestration.config.written import json_schema

    click.echo(json.dumps(json_schema(), indent=2))


@cli.command()
@click.option("--data", "folder", required=True, type=click.Path(path_type=Path), help="Folder with the images.")
@click.option("--out", type=click.Path(path_type=Path), help="File to write [default: NAME.yaml].")
@click.option("--name", help="Name of the sweep [default: name of the folder].")
@click.option("--model", help="Your network: resnet50, mobilenet_v2, ..., or an import path [default: ds_resnet].")
@click.option("--init-from", type=click.Path(path_type=Path), help="Its trained weights: a state dict or a checkpoint.")
@click.option("--targets", callback=_shares, help="MAdds of the sub-networks as shares of its own: 0.3,0.6,1.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@IMPORTS
def init(
    folder: Path,
    out: Path | None,
    name: str | None,
    model: str | None,
    init_from: Path | None,
    targets: tuple[float, ...],
    force: bool,
) -> None:
    """Inspect a folder of images and write a sweep file for it."""
    from dsnet.import_path import is_model_path
    from orchestration.commands.init import MODEL, Network, init_sweep
    from orchestration.commands.terminal import tell
    from orchestration.config.command_lines import command_line

    network = Network(model or MODEL, init_from, targets)
    path, seen = init_sweep(folder, out, name, network, overwrite=force)
    for line in seen.lines:
        tell(line)
    click.echo(f"wrote {path}; next:")
    for command in ("plan", "launch"):
        click.echo(f"  {command_line(command, path, own_code=is_model_path(network.model))}")


@cli.command("import-checkpoint")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write [default: named after the file].")
@click.option("--name", help="Name of the sweep [default: name of the folder].")
@click.option("--classes", type=click.IntRange(min=1), help="Number of classes [default: that of the checkpoint].")
@click.option(
    "--image-size",
    callback=_image_size,
    default="224",
    show_default=True,
    help="Side of the images in pixels, or HEIGHTxWIDTH, such as 192x256.",
)
@click.option("--ema", is_flag=True, help="Use the exponential moving average of the weights (state_dict_ema).")
@click.option(
    "--data", help="Folder of held-out images with one folder per class [default: $DSNET_DATA, or `launch --data`]."
)
def import_checkpoint(checkpoint: Path, out: Path | None, name: str | None, **options: Any) -> None:
    """Make a sweep from a released DS-Net checkpoint, so that no supernet is trained, and print the
    path of its sweep file."""
    from orchestration.commands.import_checkpoint import ImportSettings
    from orchestration.commands.import_checkpoint import import_checkpoint as make_import
    from orchestration.config.command_lines import command_line

    folder = out if out is not None else Path(checkpoint.name.split(".")[0] + "-imported")
    settings = ImportSettings(
        name=name if name is not None else folder.name,
        num_classes=options["classes"],
        image_size=options["image_size"],
        ema=options["ema"],
        data=options["data"],
    )
    imported = make_import(checkpoint, folder, settings)
    click.echo(f"{imported.summary()}; continue with:\n  {command_line('launch', imported.sweep)}", err=True)
    click.echo(imported.sweep)


@cli.command()
@RUN
@RUNS
@click.option(
    "--watch",
    is_flag=True,
    help="Wait until the run begins, and update the view until the launch ends.",
)
@AS_JSON
def status(run: str, runs: str, watch: bool, as_json: bool) -> None:
    """Show the progress of a run."""
    from orchestration.commands.sweep import find_run, open_sweep
    from orchestration.commands.watching import watch_status

    def show() -> None:
        open_sweep(run, runs).show_status(as_json=as_json)

    if watch and as_json:
        raise click.UsageError(
            "--watch cannot be combined with --json; call `dsnet-orch status --json` repeatedly instead"
        )
    if watch:
        watch_status(lambda: find_run(run, runs), show)
    else:
        show()


@cli.command()
@RUN
@RUNS
@click.option(
    "--state",
    type=click.Choice(("complete", "feasible", "infeasible", "failed", "pruned")),
    help="Show only trials of this state; complete trials are feasible or infeasible.",
)
@click.option(
    "--where",
    multiple=True,
    help='Show only trials that satisfy this condition, e.g. "madds_m<=200" or "top1>=baseline.top1-0.003"; repeat it for several.',
)
@click.option("--sort", metavar="METRIC", help="Sort by a metric or parameter, best first [default: by number].")
@click.option("--limit", type=click.IntRange(min=1), help="Show at most this many trials.")
@AS_JSON
def trials(
    run: str, runs: str, state: str | None, where: tuple[str, ...], sort: str | None, limit: int | None, as_json: bool
) -> None:
    """List the trials of a run with their states, metrics and parameters."""
    from orchestration.commands.sweep import open_sweep
    from orchestration.commands.terminal import show_trials
    from orchestration.results.trial_list import Selection, TrialList

    selection = Selection(state, where, sort, limit)
    show_trials(TrialList.of(open_sweep(run, runs).results), selection, as_json=as_json)


@cli.command()
@RUN
@RUNS
@click.option(
    "--pick",
    "picks",
    multiple=True,
    help='Show only these gates: knee, all, trial-0042, or "max:top1 where madds_m<=0.1".',
)
@click.option(
    "--figure",
    type=click.Path(path_type=Path),
    help="Also draw the front to this file: .html, .json, .svg or .png (the last two need kaleido and Chrome or Chromium).",
)
@click.option(
    "--routers-figure",
    type=click.Path(path_type=Path),
    help="Also draw the accuracy of each kind of router at three MAdds budgets to this file.",
)
@click.option(
    "--speed-figure",
    type=click.Path(path_type=Path),
    help="Also draw the accuracy of each kind of router over its speed-up to this file.",
)
@AS_JSON
def pareto(
    run: str,
    runs: str,
    picks: tuple[str, ...],
    figure: Path | None,
    routers_figure: Path | None,
    speed_figure: Path | None,
    as_json: bool,
) -> None:
    """Show the Pareto front of a run on val and test, with baselines and controls."""
    from orchestration.commands.sweep import open_sweep

    figures = {"--routers-figure": routers_figure, "--speed-figure": speed_figure}
    of_one = {option: path for option, path in figures.items() if path is not None}
    if figure is not None or of_one:
        from dashboards.images import check_suffix

        for path in (figure, *of_one.values()):
            if path is not None:
                check_suffix(path)

    sweep = open_sweep(run, runs)
    drawn = [(option, path, sweep.only_supernet(f"{option} draws one")) for option, path in of_one.items()]
    sweep.show_front(picks, as_json=as_json)
    if figure is not None:
        click.echo(sweep.draw_front(figure), err=True)
    for option, path, results in drawn:
        from orchestration.results.report import draw_routers, draw_speedups

        draw = draw_routers if option == "--routers-figure" else draw_speedups
        click.echo(draw(results, path), err=True)


@cli.command()
@IMPORTS
@RUN
@RUNS
@click.option(
    "--pick",
    "picks",
    multiple=True,
    default=("knee",),
    show_default=True,
    help="Gates to export: knee, all, trial-NNNN, or 'max:METRIC where CONDITION' (also min:). One bundle with several "
    "operating points: members (all static sub-networks) or front (all gates of the front).",
)
@click.option(
    "--format",
    "formats",
    multiple=True,
    help="Additional format of each bundle, beside those of export.formats and of earlier exports, which are kept: onnx, "
    "onnx_single, onnx_photo, torch_export, static, onnx_int8, or that of a plugin. May be given several times.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for the bundles, one folder each [default: export/ of the run].",
)
@click.option(
    "--register",
    metavar="NAME",
    help="Register each bundle in MLflow as a version of this model [default: export.register_as].",
)
def export(
    run: str, runs: str, picks: tuple[str, ...], formats: tuple[str, ...], out: Path | None, register: str | None
) -> None:
    """Export gates or static sub-networks of a run as bundles for `dsnet.load_bundle`, and print
    their folders. Those in the folder of a tracked run are also its logged models in MLflow."""
    from dsnet.deploy.exporters import check_format
    from orchestration.commands.messages import complain, warn
    from orchestration.commands.mlflow import BundleLog
    from orchestration.commands.sweep import open_sweep

    further = tuple(map(check_format, formats))
    sweep = open_sweep(run, runs)
    log = BundleLog(sweep.results, register)
    complain(f"exporting {', '.join(picks)}{' with ' + ', '.join(further) if further else ''} ...")
    paths = sweep.export(picks, out, further)
    for path in paths:
        click.echo(path)
    warning = log.write(paths, out)
    if warning is not None:
        warn(warning)


@cli.command()
@IMPORTS
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--data",
    "data_path",
    is_flag=False,
    flag_value="",
    default=None,
    help="Also check the accuracy, on the images in this folder; without a value, on the run's own data.",
)
@AS_JSON
def verify(path: Path, data_path: str | None, as_json: bool) -> None:
    """Check the files and stored examples of a bundle and, with --data, its recorded accuracy and
    MAdds."""
    from orchestration.commands.bundle_check import check_bundle
    from orchestration.commands.terminal import show_checks

    show_checks(check_bundle(path, data_path), as_json=as_json)


@cli.command()
@IMPORTS
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("photos", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "--budget-madds", "madds_m", type=POSITIVE, help="Use the best operating point of at most so many million MAdds."
)
@click.option(
    "--budget-latency",
    "latency_ms",
    type=POSITIVE,
    help="Use the best operating point of at most so many ms at batch 1.",
)
@click.option("--json", "form", flag_value="json", help="Print JSON.")
@click.option("--csv", "form", flag_value="csv", help="Print CSV with a header.")
@PRECISION
@click.option(
    "--engine",
    default="auto",
    show_default=True,
    help="Inference engine: onnxruntime, openvino or torch; auto is the first of these that is installed and can run "
    "the bundle.",
)
def predict(
    bundle: Path,
    photos: tuple[Path, ...],
    madds_m: float | None,
    latency_ms: float | None,
    form: str | None,
    precision: str,
    engine: str,
) -> int:
    """Classify photos with a bundle.

    PHOTOS are image files of any size, or folders of them. Each is decoded and resized like the
    training images. Photos that cannot be read are listed on stderr; the others are classified,
    and the exit code is 3.
    """
    from orchestration.commands.predict import predict_files

    _check_one_budget(madds_m, latency_ms)
    return predict_files(
        bundle, photos, form=form, madds_m=madds_m, latency_ms=latency_ms, precision=precision, engine=engine
    )


@cli.command()
@IMPORTS
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=ServeSettings.port,
    show_default=True,
    help="Port on 127.0.0.1; if it is in use, a free port is taken.",
)
@click.option(
    "--replicas",
    type=click.IntRange(1),
    default=ServeSettings.replicas,
    show_default=True,
    help="Processes with the bundle.",
)
@click.option("--threads", type=click.IntRange(1), help="Threads of one batch [default: all CPUs / replicas].")
@click.option(
    "--batch",
    type=click.IntRange(1),
    default=ServeSettings.max_batch,
    show_default=True,
    help="Largest number of images in a batch.",
)
@click.option(
    "--wait-ms",
    type=click.FloatRange(0),
    default=ServeSettings.wait_ms,
    show_default=True,
    help="How long an incomplete batch waits for further images.",
)
@click.option(
    "--queue",
    type=click.IntRange(1),
    default=ServeSettings.max_queue,
    show_default=True,
    help="Images that a replica accepts at a time; further requests get status 503.",
)
@click.option(
    "--max-mib",
    type=click.IntRange(1),
    default=ServeSettings.max_mib,
    show_default=True,
    help="Largest body of a request in MiB.",
)
@click.option("--budget-madds", "madds_m", type=POSITIVE, help="Budget of requests without one, in million MAdds.")
@click.option("--budget-latency", "latency_ms", type=POSITIVE, help="Budget of requests without one, in ms at batch 1.")
@PRECISION
def serve(bundle: Path, batch: int, queue: int, **options: Any) -> None:
    """Answer HTTP requests with a bundle on 127.0.0.1 until Ctrl-C.

    POST an image file, or JSON with pixels, to /predict; /healthz and /metrics (for Prometheus) say
    how it is. Requests that arrive together are answered in batches.
    """
    _quiet_platforms()
    from orchestration.commands.terminal import say
    from orchestration.serving.command import serve_until_stopped
    from orchestration.workers.last_resort import end_if_left_open

    _check_one_budget(options["madds_m"], options["latency_ms"])
    try:
        serve_until_stopped(bundle, ServeSettings(max_batch=batch, max_queue=queue, **options), say)
    except ClusterLostError as error:
        _fail(error)
        end_if_left_open(error.exit_code)
        raise SystemExit(error.exit_code) from error
    end_if_left_open(0)


def _check_one_budget(madds_m: float | None, latency_ms: float | None) -> None:
    if madds_m is not None and latency_ms is not None:
        raise click.UsageError("--budget-madds and --budget-latency are two budgets; give one of them")


@cli.command()
@IMPORTS
@RUN
@RUNS
@click.option("--device", type=click.Choice(("cpu", "cuda", "auto")), help="Time on this device of this machine.")
@click.option("--engine", help="Time with this engine: torch or onnxruntime.")
@click.option("--threads", type=click.IntRange(1), help="Time with this number of threads.")
@click.option(
    "--export-kit",
    "kit",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Write ONNX files and a script of numpy and onnxruntime alone that times them on a device which cannot run dsnet-orch.",
)
@click.option(
    "--import",
    "result",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Read the result.json of such a script, and show the front on its device.",
)
@click.option("--stored", is_flag=True, help="Show the timings of all other devices again, without timing.")
@AS_JSON
def measure(run: str, runs: str, kit: Path | None, result: Path | None, **options: Any) -> None:
    """Measure the latency of a run's sub-networks and front again, without training; or on another
    device, and say which gates leave the front there.

    Without options everything is timed again on the devices of the sweep. With --device, --engine
    or --threads the parts of the supernet are timed on this machine, which needs the folder of the
    run and no images.
    """
    from orchestration.commands.measure_elsewhere import MeasureOptions, measure_run
    from orchestration.commands.sweep import open_sweep
    from orchestration.progress import TerminalProgress

    results = open_sweep(run, runs).only_supernet("one is measured at a time")
    measure_run(results, MeasureOptions(kit=kit, result=result, **options), TerminalProgress())


@cli.command()
@IMPORTS
@RUN
@RUNS
def report(run: str, runs: str) -> None:
    """Build report.html of a run again, and print its path."""
    from orchestration.commands.sweep import open_sweep

    click.echo(open_sweep(run, runs).report())


@cli.command()
@RUN
@RUNS
def sync(run: str, runs: str) -> None:
    """Write a run to MLflow again, without duplicating what is already there."""
    _quiet_platforms()
    from orchestration.commands.mlflow import sync_again
    from orchestration.commands.sweep import open_sweep

    click.echo(sync_again(open_sweep(run, runs).results))


@cli.command()
@click.argument("run", required=False)
@RUNS
@click.option(
    "--port",
    type=int,
    default=5000,
    show_default=True,
    help="Port of the server; if it is in use, a free port is taken.",
)
@click.option("--no-open", is_flag=True, help="Print the link without opening a browser.")
def ui(run: str | None, runs: str, port: int, no_open: bool) -> None:
    """Serve MLflow on 127.0.0.1 until Ctrl-C, and open the chart of a run [default: the newest]."""
    _quiet_platforms()
    from orchestration.commands.mlflow import newest_pages, pages_of
    from orchestration.commands.sweep import open_sweep
    from orchestration.commands.terminal import say
    from orchestration.pipeline.signals import wait_for_stop
    from orchestration.tracking.links import open_in_browser
    from orchestration.tracking.server import serve_ui
    from orchestration.tracking.view import EXPERIMENTS_PATH

    click.echo("starting MLflow ...", err=True)
    pages = newest_pages(Path(runs)) if run is None else pages_of(open_sweep(run, runs).results)
    with serve_ui(pages.uri, pages.artifacts, port) as url:
        for link in pages.links:
            click.echo(f"{link.name}: {url}{link.path}")
        if not pages.links:
            click.echo("no run has a chart in MLflow yet; create one with: dsnet-orch ui RUN")
        for path in dict.fromkeys(link.runs for link in pages.links):
            say(f"all runs: {url}{path}")
        say(f"all of MLflow: {url}{EXPERIMENTS_PATH}   (stop it with Ctrl-C)")
        if pages.links and not no_open:
            open_in_browser(url + pages.links[0].path)
        wait_for_stop()
        click.echo("stopping ...", err=True)


def _quiet_platforms() -> None:
    """Settings that Ray and MLflow read when they are imported."""
    from orchestration.environment import prepare_environment
    from orchestration.tracking.store import mlflow_environment

    prepare_environment()
    os.environ.update(mlflow_environment())


if __name__ == "__main__":
    main()
