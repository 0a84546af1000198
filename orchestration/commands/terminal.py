"""Output of commands on stdout: tables for people, JSON for scripts."""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dsnet.data.registry import find_data_set
from dsnet.data.settings import FEW_IMAGES
from dsnet.import_path import ALLOW_IMPORTS
from dsnet.measure.latency_table import latency_metric
from dsnet.measure.settings import MAIN_DEVICE
from dsnet.metrics import is_share, metric_label
from dsnet.wording import duration, plural, signed
from orchestration.commands import tables
from orchestration.commands.tables import Column, terminal_width
from orchestration.config.command_lines import command_line, has_own_network, launch_command
from orchestration.config.store_uri import database_of, is_server, shown_uri
from orchestration.output.console import Console
from orchestration.progress import json_state, read_task_state
from orchestration.results.mlflow_store import store_uri
from orchestration.runs.folder import RunDir
from orchestration.runs.lock import read_lock
from orchestration.wrapping import wrapped
from search.front.analysis_records import optimism
from search.front.points import trial_name

if TYPE_CHECKING:
    from pathlib import Path

    from dsnet.measure.latency_table import LatencyTable
    from orchestration.commands.bundle_check import Check
    from orchestration.commands.measure_again import MeasuredAgain
    from orchestration.results.protocol import Results
    from orchestration.results.run import RunResults
    from orchestration.results.trial_list import ListedTrial, Selection, TrialList
    from orchestration.results.verified import DynamicLatency, Verified
    from search.training_checks import TrainingWarning


MAX_LISTED = 8
"""Largest number of trials or reasons that are listed one by one."""
INDENT = " " * 10
"""Indentation of continuation lines under a leading word such as `report runs/...`."""


def _console() -> Console:
    """The console on stdout; on a pipe a table keeps its whole width, so that nothing is cut or
    wrapped."""
    is_terminal = sys.stdout.isatty()
    return Console(highlight=False, width=None if is_terminal else 1000)


def say(text: str = "") -> None:
    """Print a line without wrapping it, so that a path or command can be copied as a whole.

    If it does not fit, a remark in parentheses after three spaces gets a line of its own.
    """
    width = terminal_width()
    place, gap, remark = text.partition("   (")
    if gap and width is not None and len(text) > width:
        text = f"{place}\n{INDENT}({remark}"
    _console().print(text, markup=False, soft_wrap=True)


def tell(text: str, indent: str = "") -> None:
    """Print prose, wrapped between words at the terminal's width; further lines begin with
    `indent`."""
    width = terminal_width()
    first, *others = wrapped(text, None if width is None else width - len(indent))
    for line in (first, *(indent + other for other in others)):
        _console().print(line, markup=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print a value as JSON; a list has a line for each item, which is quick for thousands."""
    if isinstance(value, list) and value:
        text = "[\n" + ",\n".join(json.dumps(item, allow_nan=False) for item in value) + "\n]"
    else:
        text = json.dumps(value, indent=1, allow_nan=False)
    sys.stdout.write(f"{text}\n")


def show_table(
    columns: Sequence[str | Column], rows: Sequence[Sequence[str]], title: str | None = None, num_left: int = 1
) -> frozenset[str]:
    """Print a table; of the columns given by their title alone the first `num_left` are text, the
    others numbers. Returns the titles of the columns for which there was room."""
    known = [
        column if isinstance(column, Column) else Column(column, is_text=number < num_left)
        for number, column in enumerate(columns)
    ]
    return tables.show_table(known, rows, title)


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction as percent; '-' if there is none."""
    return "-" if value is None else f"{100 * value:.{digits}f}"


def _interval(interval: Any) -> str:
    return (
        "-" if interval is None else f"{100 * interval.value:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
    )


def _signed(interval: Any) -> str:
    if interval is None:
        return "-"
    value, low, high = (signed(100 * number) for number in (interval.value, interval.low, interval.high))
    return f"{value} [{low}, {high}]"


def say_training_warnings(warnings: Sequence[TrainingWarning], whose: str = "") -> None:
    """Print the warnings about the training of a supernet, one line each."""
    for warning in warnings:
        tell(f"warning   {whose}{warning}", INDENT)


def say_dominated(results: Results) -> None:
    """Print a warning for each exported gate that a static sub-network dominates."""
    from orchestration.results.dominated import dominated_warnings

    _say_warnings(dominated_warnings(results))


def say_result_warnings(results: Results) -> None:
    """Print the warnings about the front and the exported bundles of a sweep, one line each."""
    _say_warnings(result_warnings(results))


def _say_warnings(texts: Sequence[str]) -> None:
    for text in texts:
        tell(f"warning   {text}", INDENT)


def result_warnings(results: Results) -> list[str]:
    """Warnings about gates that a static sub-network dominates, and about bundles of earlier
    settings."""
    from orchestration.results.dominated import dominated_warnings
    from orchestration.results.exported import damaged_warning, outdated_warning

    of_bundles = (outdated_warning(results), damaged_warning(results))
    return [*dominated_warnings(results), *(text for text in of_bundles if text is not None)]


def show_launch(results: RunResults, bundles: Sequence[Path]) -> None:
    """Print the front, warnings about its supernet, and where the files are and how to open
    them."""
    from orchestration.results.training_review import review

    show_front(results, (), as_json=False)
    say()
    say_training_warnings(review(results))
    say_result_warnings(results)
    say_places(results, bundles)
    say_mlflow(results)


def say_places(results: Results, bundles: Sequence[Path]) -> None:
    """Print the paths of report, bundles and points of a run, and how to open them."""
    run, own_code = results.run, has_own_network(results.config)
    python = f"python, with {ALLOW_IMPORTS}=1" if own_code else "python"
    say(f"report    {run.report_html}   (open it in a browser; it works offline)")
    for bundle in bundles:
        say(f'bundle    {bundle}   ({python}: dsnet.load_bundle("{bundle}"))')
    if bundles and find_data_set(results.config.data.name).has_photos:
        say(f"photos    {command_line('predict', bundles[0], 'PHOTO...', own_code=own_code)}")
    say(f"points    {run.points_parquet}")


def say_mlflow(results: Results) -> None:
    """Print where a run is in MLflow; nothing if it is not tracked."""
    if results.config.tracking.mlflow:
        uri = store_uri(results.config, results.run)
        how = "open it in a browser" if is_server(uri) else f"open: {command_line('ui', results.run.path)}"
        say(f"mlflow    {database_of(uri) or shown_uri(uri)}   ({how})")


def front_rows(results: RunResults) -> list[dict[str, Any]]:
    """One JSON-able row per gate of the front, cheapest first, with every result about it."""
    verified = results.verified
    rows = []
    for slot in sorted(results.front, key=lambda slot: results.record(slot).metrics["madds_m"]):
        record = results.record(slot)
        row: dict[str, Any] = {
            "name": trial_name(slot),
            "slot": slot,
            "router": results.router_kind(slot),
            "params": dict(record.params),
            "val": dict(record.metrics),
        }
        if verified is not None and slot in verified.front:
            for split in ("val", "test"):
                analysis = getattr(verified, split)
                point = next(point for point in analysis.points if point.slot == slot)
                row[f"{split}_analysis"] = {**asdict(point), "ties": [trial_name(tied) for tied in point.ties]}
            by_device = {name: _latency_json(own, slot) for name, own in verified.latencies.items()}
            row["latency"], row["device_latency"] = by_device.pop(MAIN_DEVICE), by_device
        rows.append(row)
    return rows


def _latency_json(latency: DynamicLatency, slot: int) -> dict[str, dict[str, float]]:
    """By batch size the latency of a batch in ms: measured, summed from the measured parts, and of
    the static extremes."""
    return {
        str(size): {
            "gate_ms": timings[slot].median_ms,
            "ideal_ms": latency.ideal[size][slot],
            "widest_ms": latency.widest[size].median_ms,
            "cheapest_ms": latency.cheapest[size].median_ms,
        }
        for size, timings in latency.gates.items()
    }


def front_content(results: RunResults, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The front as JSON: its gates, its optimism, and the accuracy of each kind of router on both
    splits."""
    verified = results.verified
    found = None if verified is None else optimism(verified.val, verified.test)
    return {
        "run": str(results.run.path),
        "objectives": [{"metric": metric.name, "goal": metric.goal} for metric in results.config.metrics],
        "is_verified": verified is not None,
        "test_openings": results.manifest["test_openings"],
        "front": list(rows),
        "optimism": None if found is None else asdict(found),
        "routers": {}
        if verified is None
        else {
            analysis.split: [{**asdict(share), "name": trial_name(share.slot)} for share in analysis.routers]
            for analysis in (verified.val, verified.test)
        },
    }


def show_front(results: RunResults, picks: Sequence[str], *, as_json: bool) -> None:
    """The front as a table, with the static baseline above it."""
    from orchestration.results.run import picked_slots

    rows = front_rows(results)
    if picks:
        wanted = [trial_name(slot) for slot in picked_slots(results, picks)]
        rows = [row for row in rows if row["name"] in wanted]
    if as_json:
        print_json(front_content(results, rows))
    elif picks and not rows:
        tell(
            "none of these trials is on the front; `dsnet-orch trials` lists all trials, and `dsnet-orch export --pick` exports any of them"
        )
    elif results.verified is None:
        _show_unverified(results, rows)
    else:
        _show_verified(results, results.verified, rows)


@dataclass(frozen=True)
class FurtherColumns:
    """The columns of a front's table for the objectives other than top-1 and MAdds."""

    metrics: tuple[str, ...]
    on_test: frozenset[str]
    """The metrics that also have a column for `test`."""

    @classmethod
    def of(cls, objectives: Iterable[Any], tested: Iterable[Mapping[str, float]] = ()) -> FurtherColumns:
        """The columns for the objectives of a configuration.

        Args:
            objectives: `metrics` of the configuration.
            tested: the metrics of gates on `test`, as far as they are known.
        """
        names = tuple(metric.name for metric in objectives if metric.name not in ("top1", "madds_m"))
        known = {name for metrics in tested for name in metrics}
        return cls(names, frozenset(names) & known)

    @property
    def titles(self) -> tuple[str, ...]:
        """The title of each column."""
        return tuple(
            f"{metric_label(name)} {split}" for name in self.metrics for split in ("val", *self._further_split(name))
        )

    def cells(self, val: Mapping[str, float], test: Mapping[str, float]) -> tuple[str, ...]:
        """The texts of a row, from its metrics on `val` and on `test`; '-' for a value that is not
        known."""
        return tuple(
            metric_text(name, metrics.get(name))
            for name in self.metrics
            for metrics in (val, *(test for _ in self._further_split(name)))
        )

    def _further_split(self, name: str) -> tuple[str, ...]:
        return ("test",) if name in self.on_test else ()


def _show_unverified(results: RunResults, rows: Sequence[Mapping[str, Any]]) -> None:
    further = FurtherColumns.of(results.config.metrics)
    lines = [
        (
            row["name"],
            row["router"],
            *(metric_text(name, row["val"].get(name)) for name in ("top1", "madds_m")),
            *further.cells(row["val"], {}),
        )
        for row in rows
    ]
    title = f"{results.run.name}: {plural(len(rows), 'gate')} on the front (not verified yet)"
    if not rows:
        say(title)
        if not results.records:
            tell(f"no trial has finished yet; continue with: {launch_command(results.config, results.run.sweep_yaml)}")
        return
    show_table(("gate", "router", "top-1\u00a0% val", "MAdds M", *further.titles), lines, title, num_left=2)


def _show_verified(results: RunResults, verified: Verified, rows: Sequence[Mapping[str, Any]]) -> None:
    from orchestration.results.timing_doubt import timing_doubt

    size = max(verified.latency.gates)
    widest_ms = verified.latency.widest[size].median_ms
    baseline = verified.test.routes.index(results.widest.name)
    further = FurtherColumns.of(results.config.metrics, (point.metrics for point in verified.test.points))
    static_madds = [f"{analysis.static_madds_m[baseline]:.4g}" for analysis in (verified.val, verified.test)]
    reached: list[tuple[str, ...]] = [
        (
            f"{results.widest.name} (static)",
            "",
            percent(verified.val.static_top1[baseline].value),
            _interval(verified.test.static_top1[baseline]),
            *static_madds,
            *further.cells(results.baseline, verified.test.static_metrics(results.widest.name)),
            f"{widest_ms:.2f}",
            "1.00x",
        )
    ]
    standing: list[tuple[str, ...]] = []
    chosen = {point.slot: point for point in verified.val.points}
    reported = {point.slot: point for point in verified.test.points}
    shown = [row for row in rows if row["slot"] in reported]
    for row in shown:
        before, point = chosen[row["slot"]], reported[row["slot"]]
        gate_ms = verified.latency.gates[size][row["slot"]].median_ms
        name = row["name"] + (" (collapsed)" if point.is_collapsed else "")
        reached.append(
            (
                name,
                point.router,
                percent(before.top1.value),
                _interval(point.top1),
                f"{before.metrics['madds_m']:.4g}",
                f"{point.metrics['madds_m']:.4g}",
                *further.cells(row["val"], point.metrics),
                f"{gate_ms:.2f}",
                f"{widest_ms / gate_ms:.2f}x",
            )
        )
        standing.append(
            (
                name,
                _signed(point.over_widest),
                _signed(point.gain),
                percent(point.random_top1),
                percent(point.reachable_top1),
                percent(point.oracle_top1),
                percent(before.stability, 0),
                percent(point.stability, 0),
                str(len(before.ties)),
                str(len(point.ties)),
            )
        )
    title = f"{results.run.name}: gates on the front, chosen on val and run on {verified.test.num_images} test images"
    columns = (
        Column("top-1\u00a0% val"),
        Column("top-1\u00a0% test [95\u00a0%]"),
        Column("MAdds M val", drop=3),
        Column("MAdds M test"),
        *map(Column, further.titles),
        Column(f"ms/batch {size}", drop=2),
        Column("speed-up", drop=1),
    )
    titles = show_table(("gate", "router", *columns), reached, title, num_left=2)
    say()
    columns = (
        Column("over widest, points [95\u00a0%]"),
        Column("over static, points [95\u00a0%]"),
        Column("random\u00a0%"),
        Column("reachable\u00a0%"),
        Column("oracle\u00a0%"),
        Column("on front\u00a0% val", drop=1),
        Column("on front\u00a0% test", drop=1),
        Column("tied val", drop=2),
        Column("tied test", drop=2),
    )
    titles |= show_table(("gate, on test", *columns), standing)
    slots = [row["slot"] for row in shown]
    has_latencies = len(verified.latencies) > 1 or any(metric.startswith("latency_ms") for metric in further.metrics)
    if has_latencies:
        say()
        _show_latencies(verified, slots)
    say()
    doubt = timing_doubt(results) if has_latencies or {f"ms/batch {size}", "speed-up"} & titles else None
    for text in (
        *_gate_lines(verified, slots, titles),
        *(() if doubt is None else (doubt,)),
        *_standing_lines(verified, slots, titles),
        *_split_lines(results, verified),
    ):
        tell(text)


def _gate_lines(verified: Verified, slots: Sequence[int], titles: Collection[str]) -> list[str]:
    """Lines that explain the marks, the speed-up and the mean over classes, as far as the table
    shows them."""
    lines = []
    if any(point.is_collapsed for point in verified.test.points if point.slot in slots):
        lines.append(
            "collapsed: one route answers more than 99 % of the images, so that the router only adds its own cost to that static "
            "sub-network"
        )
    if "speed-up" in titles:
        size = max(verified.latency.gates)
        most = verified.latency.widest[size].median_ms / verified.latency.cheapest[size].median_ms
        lines.append(
            f"speed-up: latency of the widest static sub-network over that of the gate, at batch size {size}; at most "
            f"{most:.2f}x, which the cheapest static sub-network has"
        )
    if any(title.startswith(metric_label("balanced_top1")) for title in titles):
        lines.append("balanced top-1: mean over the classes of the top-1 within each class")
    return lines


def _split_lines(results: RunResults, verified: Verified) -> list[str]:
    """Lines about the splits: how much of the front ran on test, few images, repeated reading."""
    lines = []
    if len(verified.test.points) < len(results.front):
        lines.append(
            f"{len(verified.test.points)} of the front's {len(results.front)} gates, evenly spaced along it, ran on test "
            "(budget.verify); --json shows all of them"
        )
    fewest = min(verified.val.num_images, verified.test.num_images)
    if fewest < FEW_IMAGES:
        lines.append(
            f"few images: {verified.val.num_images} in val and {verified.test.num_images} in test; one image changes top-1 by "
            f"{100 / fewest:.1f} points, so that differences between routers are uncertain"
        )
    if verified.num_openings > 1:
        lines.append(
            f"test was read {verified.num_openings} times; results of choices made after the first time are optimistic"
        )
    return lines


def _show_latencies(verified: Verified, slots: Sequence[int]) -> None:
    """Print for every device and batch size the estimated latency, which objectives use, and the
    measured one; and what each device and its engine are."""
    timed = [(name, own, size) for name, own in verified.latencies.items() for size in own.gates]
    columns = [
        text
        for name, _, size in timed
        for text in (latency_metric(size, name), f"{latency_metric(size, name)} measured")
    ]
    lines = [
        (
            trial_name(slot),
            *(f"{ms:.3g}" for _, own, size in timed for ms in (own.ideal[size][slot], own.gates[size][slot].median_ms)),
        )
        for slot in slots
    ]
    title = (
        f"latency of a batch on {verified.latency.split} in ms: estimated from measured parts, as objectives use "
        "it, and measured as a whole"
    )
    show_table(("gate", *columns), lines, title)
    for name, own in verified.latencies.items():
        tell(f"{latency_metric(device=name)}: {own.device}, {plural(own.threads, 'thread')}")


def _standing_lines(verified: Verified, slots: Sequence[int], titles: Collection[str]) -> list[str]:
    """Lines that qualify the columns of the table with these titles: the controls, the optimism of
    `val`, and which gates are tied."""
    found = optimism(verified.val, verified.test)
    lines = [
        "over widest, over static: top-1 minus that of the widest static sub-network, and minus that of the static line, a random "
        "mix of two static sub-networks with the same mean MAdds; paired over the images",
        "random: top-1 if each route gets the same share of the images as from the gate, but at random",
        "reachable: top-1 of the best router that we found with access to the outputs of all routes, at the mean MAdds of the gate; "
        "an estimate and not a bound, so that a gate may be better",
        "oracle: top-1 of routing that knows the labels, at the mean MAdds of the gate",
    ]
    if found is not None:
        lines.append(
            f"optimism: top-1 on val minus top-1 on test, mean of {plural(len(verified.test.points), 'gate')}: {_signed(found)} points "
            "(unpaired: the two splits share no image)"
        )
    if any(title.startswith("on front") for title in titles):
        lines.append(
            "on front: share of bootstrap resamples of the images in which no other gate of the table dominates this one"
        )
    for analysis in (verified.val, verified.test):
        if f"tied {analysis.split}" not in titles:
            continue
        groups = [point for point in analysis.points if point.ties and point.slot in slots]
        for point in groups[:MAX_LISTED]:
            named = ", ".join(trial_name(slot) for slot in point.ties[:MAX_LISTED])
            lines.append(f"tied on {analysis.split}: {trial_name(point.slot)} with {named}{_and_more(point.ties)}")
        if len(groups) > MAX_LISTED:
            lines.append(
                f"... and {len(groups) - MAX_LISTED} more gates with ties on {analysis.split}; --json shows all of them"
            )
    return lines


def _and_more(listed: Sequence[Any]) -> str:
    return f" and {len(listed) - MAX_LISTED} more" if len(listed) > MAX_LISTED else ""


def show_status(results: RunResults, *, as_json: bool) -> None:
    """Print stages, trials, the driver of the run, and warnings about its training."""
    from orchestration.results.training_review import review

    warnings = review(results)
    manifest = results.manifest
    driver = driver_text(results.run)
    task = read_task_state(results.run.progress_json)
    is_driven = is_running(results.run)
    stages = {
        name: {
            "status": "stopped" if entry["status"] == "running" and not is_driven else entry["status"],
            "seconds": entry["seconds"],
            "key": entry["key"],
        }
        for name, entry in manifest["stages"].items()
    }
    num_infeasible = len(results.completed) - len(results.feasible)
    content = {
        "run": str(results.run.path),
        "driver": driver,
        "progress": None if results.verified else json_state(task),
        "stages": stages,
        "trials": {
            "completed": len(results.completed),
            "infeasible": num_infeasible,
            "pruned": len(results.pruned),
            "failed": len(results.failed),
            "enqueued": results.num_waiting,
            "budget": results.config.budget.trials,
        },
        "front": [trial_name(slot) for slot in results.front],
        "is_verified": results.verified is not None,
        "test_openings": manifest["test_openings"],
        "warnings": [warning.to_json() for warning in warnings],
        "result_warnings": result_warnings(results),
    }
    journal = results.run.study_journal(results.stage_key("search") or "")
    if journal.is_file():
        content["journal"] = str(journal)
    if as_json:
        print_json(content)
        return
    say(f"run       {results.run.path}")
    tell(f"driver    {driver or 'none'}", INDENT)
    say_progress(results.run, is_finished=results.verified is not None)
    show_table(
        ("stage", "status", "time"),
        [
            (name, stage["status"], "" if stage["seconds"] is None else duration(stage["seconds"]))
            for name, stage in stages.items()
        ],
        num_left=2,
    )
    counts = f"{len(results.completed)} completed" + (f" ({num_infeasible} infeasible)" if num_infeasible else "")
    counts += f", {len(results.pruned)} pruned" if results.pruned else ""
    counts += f", {len(results.failed)} failed" if results.failed else ""
    end = f", ended by {results.search_end}" if results.search_end not in (None, "trials") else ""
    say(f"trials    {counts}, of {results.config.budget.trials}{end}")
    if results.num_waiting:
        say(f"enqueued  {plural(results.num_waiting, 'point')} to try next")
    say(f"front     {plural(len(results.front), 'gate')}" + ("" if results.verified else ", not verified yet"))
    say_training_warnings(warnings)
    say_result_warnings(results)
    if journal.is_file():
        say(f"study     {journal}   (open: optuna-dashboard {shlex.quote(str(journal))})")
    if results.verified is not None:
        say_places(results, [path for path in (results.run.knee_bundle,) if path.exists()])
        say_mlflow(results)
    elif not is_driven:
        say(f"continue  {launch_command(results.config, results.run.sweep_yaml)}")


def driver_text(run: RunDir) -> str | None:
    """The current or last driver of a run; None if no lock is recorded."""
    holder = read_lock(run.lock_path)
    if holder is None:
        return None
    return f"{holder}" + ("" if is_running(run) else ", which no longer runs")


def is_running(run: RunDir) -> bool:
    """Whether a driver holds the run; a driver on another host is taken to be alive."""
    holder = read_lock(run.lock_path)
    return holder is not None and holder.is_running()


def progress_text(run: RunDir, *, is_finished: bool) -> str | None:
    """Progress of the newest task of a run, and its remaining time; None if none is known or
    nothing is left to do."""
    state = read_task_state(run.progress_json)
    if state is None or (is_finished and not is_running(run)):
        return None
    return str(state) if is_running(run) else f"{state} after it is continued" if state.left_s else str(state)


def say_progress(run: RunDir, *, is_finished: bool) -> None:
    """Print the progress line of `status`."""
    text = progress_text(run, is_finished=is_finished)
    if text is not None:
        say(f"progress  {text}")


def show_trials(trials: TrialList, selection: Selection, *, as_json: bool) -> None:
    """Print the selected finished trials."""
    from orchestration.results.trial_list import json_row

    chosen = trials.select(selection)
    if as_json:
        print_json([json_row(trial) for trial in chosen])
        return
    metrics = _listed_metrics(trials, selection)
    keys = list(dict.fromkeys(key for trial in trials.trials for key in trial.record.params))
    params = [
        [short(trial.record.params[key]) if key in trial.record.params else "-" for key in keys] for trial in chosen
    ]
    has_origin = any(trial.supernet is not None for trial in chosen)
    lines = [
        (
            trial.name + ("*" if trial.is_front else ""),
            trial.standing,
            *((trial.supernet or "-",) if has_origin else ()),
            *(metric_text(name, trial.record.metrics.get(name)) for name in metrics),
            *values,
        )
        for trial, values in zip(chosen, params, strict=True)
    ]
    origin = (Column("supernet", is_text=True, drop=ORIGIN),) if has_origin else ()
    show_table(
        ("trial", "state", *origin, *map(metric_head, metrics), *_param_columns(keys, params)), lines, num_left=2
    )
    tell(
        "* on the front"
        + (f"; {len(chosen)} of {len(trials.trials)} trials" if len(chosen) < len(trials.trials) else "")
    )
    _say_reasons(chosen)


ORIGIN, CONSTANT, VARIED = 3, 2, 1
"""Order in which columns of `trials` are left out, largest first: the supernet, which the trial's
name begins with; parameters that never vary; parameters that vary."""


def _param_columns(keys: Sequence[str], params: Sequence[Sequence[str]]) -> list[Column]:
    """Columns for the parameters of trials, in order of their keys."""
    seen = [{values[position] for values in params} for position in range(len(keys))]
    return [
        Column(
            key.removeprefix("gate."),
            is_text=not all(map(_is_number, values)),
            drop=VARIED if len(values) > 1 else CONSTANT,
        )
        for key, values in zip(keys, seen, strict=True)
    ]


def _is_number(text: str) -> bool:
    """Whether a cell holds a number or nothing."""
    try:
        return text == "-" or float(text) is not None
    except ValueError:
        return False


def _listed_metrics(trials: TrialList, selection: Selection) -> list[str]:
    """Columns for top-1 and MAdds, the objectives, and the metrics used for sorting or in
    conditions."""
    known = list(dict.fromkeys(name for trial in trials.trials for name in trial.record.metrics))
    asked = [name for name in known if any(_is_named(name, text) for text in selection.where)]
    if selection.sort in known:
        asked.append(str(selection.sort))
    return list(dict.fromkeys(["top1", "madds_m", *(name for name, _ in trials.objectives), *asked]))


def _is_named(metric: str, text: str) -> bool:
    return metric in re.findall(r"[A-Za-z_][A-Za-z0-9_.]*", text)


def _say_reasons(trials: Sequence[ListedTrial]) -> None:
    """Print why trials failed, were pruned or are infeasible: one by one if they are few, else by
    reason."""
    for standing in ("failed", "pruned", "infeasible"):
        own = [trial for trial in trials if trial.standing == standing]
        if len(own) <= MAX_LISTED:
            for trial in own:
                tell(f"{trial.name} {standing}: {trial.reason}")
            continue
        counts = Counter(str(trial.reason) for trial in own).most_common()
        for reason, number in counts[:MAX_LISTED]:
            tell(f"{number} {standing}: {reason}")
        if len(counts) > MAX_LISTED:
            say(f"... and {len(counts) - MAX_LISTED} more reasons; --json shows all of them")


def metric_head(name: str) -> str:
    """The title of a metric's column."""
    return f"{metric_label(name)} val" if is_share(name) else metric_label(name)


def metric_text(name: str, value: float | None) -> str:
    """A metric for display: accuracies in percent; '-' if there is none."""
    if value is None or math.isnan(value):
        return "-"
    return percent(value) if is_share(name) else f"{value:.4g}"


def short(value: Any) -> str:
    """A value shortened for a narrow column."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def show_checks(checks: Sequence[Check], *, as_json: bool) -> None:
    """Print the checks of a bundle with their findings."""
    if as_json:
        print_json([asdict(check) for check in checks])
        return
    for check in checks:
        tell(f"{'warning' if check.is_warning else 'ok   '} {check.name}: {check.finding}")


def show_measured_again(again: MeasuredAgain) -> None:
    """Print the first timing beside the new one, the widest sub-network last, and what it means for
    the study."""
    for name, after in again.after.items():
        before = again.before[name]
        sizes = list(after.subnets)
        columns = [text for size in sizes for text in (f"ms/batch {size} before", f"{size} now", f"{size} spread")]
        lines = [
            (subnet, *(text for size in sizes for text in _times(before, after, size, subnet)))
            for subnet in after.subnets[sizes[0]]
        ]
        title = f"{after.device}, {plural(after.threads, 'thread')}" + (f" ({name})" if name else "")
        show_table(("sub-network", *columns), lines, title)
        if after.noise is not None:
            tell(f"the times are still unreliable: {after.noise}")
    tell(again.study)


def _times(before: LatencyTable, after: LatencyTable, size: int, subnet: str) -> tuple[str, str, str]:
    first, now = before.subnets[size][subnet], after.subnets[size][subnet]
    return f"{first.median_ms:.4g}", f"{now.median_ms:.4g}", percent(now.iqr_ms / now.median_ms, 0) + " %"
