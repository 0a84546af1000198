"""`dsnet-orch measure`: which of its ways is asked for, and the front of a run on another
device."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from dsnet.errors import ConfigError, NotFoundError
from dsnet.measure.kit import SCRIPT, read_result, write_kit
from dsnet.measure.latency import measure_samples
from dsnet.network.supernet import Supernet
from dsnet.stored.checkpoint import load_supernet
from dsnet.stored.names import FINAL
from dsnet.wording import plural
from orchestration.commands.measure_again import measure_again
from orchestration.commands.tables import Column, show_table
from orchestration.commands.terminal import percent, print_json, show_measured_again, tell
from orchestration.prepare.preparation import other_latency_settings
from orchestration.progress import ProgressView, Task
from orchestration.results.elsewhere import (
    TimedElsewhere,
    fronts_of,
    store_kit,
    store_timing,
    stored_kits,
    stored_timings,
)
from orchestration.results.run import RunResults
from orchestration.runs.lock import DriverLock
from search.front.latency_front import TimedPoint

KIT_ENGINE = "onnxruntime"
"""The engine that the script of a kit uses."""
COLUMNS = (
    Column("point", is_text=True),
    Column("top-1\u00a0%"),
    Column("MAdds M"),
    Column("ms there [95\u00a0%]"),
    Column("static, as accurate", is_text=True),
    Column("its ms"),
    Column("on front", is_text=True),
)


@dataclass(frozen=True)
class MeasureOptions:
    """Options of `dsnet-orch measure`."""

    device: str | None = None
    engine: str | None = None
    threads: int | None = None
    kit: Path | None = None
    """Folder that receives a kit."""
    result: Path | None = None
    """A result of a kit's script."""
    stored: bool = False
    """Show what is stored, without timing."""
    as_json: bool = False

    @property
    def ways(self) -> tuple[str, ...]:
        """The options that ask for one way of measuring each, as they are written."""
        asked = {
            "--device, --engine or --threads": (self.device, self.engine, self.threads) != (None, None, None),
            "--export-kit": self.kit is not None,
            "--import": self.result is not None,
            "--stored": self.stored,
        }
        return tuple(name for name, is_asked in asked.items() if is_asked)


def measure_run(results: RunResults, options: MeasureOptions, progress: ProgressView) -> None:
    """Measure a run in the way that is asked for, and print the outcome.

    Raises:
        ConfigError: options that exclude each other, or an impossible setting.
        NotFoundError: a stage has not finished, or nothing is stored.
        LockedError: a driver is at work.
        DataError: a result cannot be imported.
    """
    ways = options.ways
    if len(ways) > 1:
        raise ConfigError(f"{ways[0]} and {ways[1]} exclude each other; give one of them")
    if options.kit is not None:
        if options.as_json:
            raise ConfigError("--export-kit prints a folder only; leave out --json")
        export_kit(results, options.kit)
    elif ways:
        show_elsewhere(results, _timings(results, options, progress), as_json=options.as_json)
    elif options.as_json:
        raise ConfigError(
            "--json prints timings on other devices: add --device, --engine, --threads, --import or --stored"
        )
    else:
        show_measured_again(measure_again(results, progress))


def _timings(results: RunResults, options: MeasureOptions, progress: ProgressView) -> list[TimedElsewhere]:
    if options.result is not None:
        samples = read_result(options.result, stored_kits(results))
        return [store_timing(results, KIT_ENGINE, samples, is_by_kit=True)]
    if not options.stored:
        return [measure_elsewhere(results, options, progress)]
    timings = stored_timings(results)
    if not timings:
        raise NotFoundError(
            f"run {results.run.name!r} has no timing on another device; "
            "time it with --engine, --device or --threads, or export a kit with --export-kit"
        )
    return timings


def measure_elsewhere(results: RunResults, options: MeasureOptions, progress: ProgressView) -> TimedElsewhere:
    """Time the parts of the supernet with another device, engine or number of threads of this
    machine, as the measure stage does, and store the times. It needs no images.

    Raises:
        NotFoundError: the run has not finished its measure or table stage.
        LockedError: a driver is at work.
        ConfigError, PreflightError: see `other_latency_settings`.
    """
    run = results.run
    settings = other_latency_settings(
        results.config, device=options.device, engine=options.engine, threads=options.threads
    )
    for stage in ("measure", "table"):
        results.done_key(stage)  # the front there needs both, so that nothing is timed in vain
    with DriverLock(run, f"dsnet-orch measure {run.name}"):
        supernet = _supernet(results)
        with progress.bar(Task("measure: latency", settings.num_rounds, "round")) as bar:
            samples = measure_samples(
                supernet,
                supernet.spec.image_size,
                settings,
                lambda done, total: bar.update(done),
            )
        return store_timing(results, settings.engine, samples, is_by_kit=False)


def export_kit(results: RunResults, folder: Path) -> None:
    """Write a kit of the run's supernet, remember it in the run, and print its folder and the next
    commands.

    Raises:
        NotFoundError: the run has not finished its supernet stage.
        ConfigError: the folder is not empty.
    """
    supernet = _supernet(results)
    settings = other_latency_settings(results.config, device="cpu", engine="torch")
    store_kit(results, write_kit(supernet, supernet.spec.image_size, settings, folder))
    run = shlex.quote(str(results.run.path))
    click.echo(
        "copy the folder to the device, which needs numpy and onnxruntime, and run there:\n"
        f"  python {SCRIPT}\n"
        "then copy its result.json back, and read it with:\n"
        f"  dsnet-orch measure {run} --import result.json",
        err=True,
    )
    click.echo(folder)


def _supernet(results: RunResults) -> Supernet:
    return load_supernet(results.run.stage_dir("supernet", results.done_key("supernet")) / FINAL)[0]


def show_elsewhere(results: RunResults, timings: Sequence[TimedElsewhere], *, as_json: bool) -> None:
    """Print the front of a run on each of several devices.

    Raises:
        NotFoundError: the run has not finished its table stage.
    """
    measured = [(timed, fronts_of(results, timed)) for timed in timings]
    if as_json:
        print_json({"measurements": [_json(timed, fronts) for timed, fronts in measured]})
        return
    for timed, fronts in measured:
        way = ", by a kit" if timed.is_by_kit else ""
        for size, points in fronts.items():
            show_table(COLUMNS, list(map(_row, points)), f"{timed.title}{way}, batch {size}")
            tell(front_sentence(points))
        for note in _notes(timed):
            tell(note)


def _notes(timed: TimedElsewhere) -> list[str]:
    notes = []
    if not timed.samples.has_decisions:
        notes.append(
            "The time of the router's decision was not measured there and is left out: a gate takes longer by it, "
            "and is faster than the static network beside it only if its decision takes less than the difference. "
            "More gates may leave the front than are listed."
        )
    noise = timed.samples.table().noise
    if noise is not None:
        notes.append(f"The times are unreliable: {noise}.")
    return notes


def _row(point: TimedPoint) -> tuple[str, ...]:
    is_own = point.static == point.name
    return (
        point.name,
        percent(point.top1),
        f"{point.madds_m:.4g}",
        f"{_ms(point.latency_ms)} [{_ms(point.low_ms)}, {_ms(point.high_ms)}]",
        "-" if point.static is None or is_own else point.static,
        "-" if point.static_ms is None or is_own else _ms(point.static_ms),
        "yes" if point.is_on_front else "no",
    )


def _ms(value: float) -> str:
    """Milliseconds with three digits, or all before the point."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def front_sentence(points: Sequence[TimedPoint]) -> str:
    """Sentences: which gates are not on the front of top-1 and latency, and for which the times do
    not decide it."""
    gates = [point for point in points if not point.is_static]
    if not gates:
        return "The run has no gates on its front yet, so that only static networks are compared."
    leaving = [point for point in gates if not point.is_on_front and point.is_sure]
    unsure = [point for point in gates if not point.is_sure]
    front = "the front of top-1 and latency there"
    if leaving:
        named = ", ".join(f"{point.name} ({point.dominated_by} dominates it)" for point in leaving)
        verb = "leave" if len(leaving) > 1 else "leaves"
        told = f"{len(leaving)} of {plural(len(gates), 'gate')} of the run's front {verb} {front}: {named}."
    else:
        told = f"No gate of the run's front ({len(gates)} in all) {'surely ' if unsure else ''}leaves {front}."
    if unsure:
        named = ", ".join(
            f"{point.name} ({'on it' if point.is_on_front else f'dominated by {point.dominated_by}'} by the medians)"
            for point in unsure
        )
        told += f" The spread of the times leaves it open for {named}."
    return told


def _json(timed: TimedElsewhere, fronts: Mapping[int, Sequence[TimedPoint]]) -> dict[str, Any]:
    samples = timed.samples
    return {
        "at": timed.at,
        "device": samples.device,
        "engine": timed.engine,
        "threads": samples.threads,
        "is_by_kit": timed.is_by_kit,
        "has_decisions": samples.has_decisions,
        "noise": samples.table().noise,
        "batches": {
            str(size): {
                "points": [asdict(point) for point in points],
                "leaving": [point.name for point in points if not (point.is_static or point.is_on_front)],
            }
            for size, points in fronts.items()
        },
    }
