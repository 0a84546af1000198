"""The data and the file of a run's report, from its results."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from dashboards.classes import ClassesInfo
from dashboards.front import (
    Curve,
    DynamicPoint,
    FrontInfo,
    FrontPanel,
    Further,
    dynamic_points,
    front_figure,
    static_points,
)
from dashboards.headline import Estimate, Headline, Latency, Row, Scores
from dashboards.hypervolume import HypervolumeInfo
from dashboards.images import write_figure
from dashboards.report import ReportData, build_report
from dashboards.routers import RouterResult, RoutersInfo, routers_figure
from dashboards.routes import RoutesInfo
from dashboards.speedups import SpeedupsInfo, speed_panel, speedups_figure
from dashboards.training import TrainingInfo, training_info
from dashboards.widths import LatencySeries, WidthsInfo
from dsnet.data.registry import find_data_set
from dsnet.errors import NotFoundError
from dsnet.files import atomic_write_text, read_json_lines, understood
from dsnet.measure.latency_table import LatencyTable, latency_metric
from dsnet.measure.settings import MAIN_DEVICE
from dsnet.metrics import metric_noun, top1_by_class
from dsnet.routing.table_routing import run_on_table
from dsnet.routing.table_run import static_run
from dsnet.wording import plural
from orchestration.config.command_lines import command_line, has_own_code, has_own_network, launch_command
from orchestration.config.sweep import SweepConfig
from orchestration.results.dominated import allowed_static, dominated_warnings
from orchestration.results.mlflow_store import browsing_commands
from orchestration.results.run import RunResults
from orchestration.results.search_end import read_end
from orchestration.results.structure import structure_of, training_cost
from orchestration.results.timing_doubt import timing_doubt
from orchestration.results.training_review import review
from orchestration.results.trial_list import broken_constraints
from orchestration.results.verified import Verified
from orchestration.runs.folder import RunDir
from search.front.analysis_records import Interval, PointAnalysis, RouterShare, SplitAnalysis, is_collapsed, optimism
from search.front.controls import StaticLine
from search.front.pareto import hypervolume, hypervolume_trace
from search.front.points import PointRow, trial_name
from search.front.statistics import wilson_interval
from search.study.study import TrialRecord
from search.training_checks import TrainingWarning

MIN_CLASSES_OF_TOP5 = 10
"""Smallest number of classes with which top-5 tells sub-networks apart."""


def write_report(results: RunResults, class_names: tuple[str, ...], notes: tuple[str, ...], status: str) -> Path:
    """Build report.html of a run from its results so far; returns its path."""
    atomic_write_text(results.run.report_html, build_report(report_data(results, class_names, notes, status)))
    return results.run.report_html


def report_data(results: RunResults, class_names: tuple[str, ...], notes: tuple[str, ...], status: str) -> ReportData:
    """The content of the report; parts without results stay empty."""
    manifest, config = results.manifest, results.config
    made = results.supernet
    return ReportData(
        run_name=results.run.name,
        status=status,  # type: ignore[arg-type]
        created=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        data_name=config.data.name,
        model=_model_name(results),
        headline=headline(results),
        num_completed=len(results.completed),
        num_failed=len(results.failed),
        num_pruned=len(results.pruned),
        num_infeasible=len(results.completed) - len(results.feasible),
        constraints=constraints_of(results),
        endings=endings_of(results),
        num_test_openings=manifest["test_openings"],
        front=front_info(results),
        hypervolume=hypervolume_of(results),
        routes=routes_of(results, class_names),
        classes=classes_of(results, class_names),
        routers=routers_of(results),
        speedups=speedups_of(results),
        widths=widths_of(results),
        structure=structure_of(results),
        training=training_of(results),
        naming="" if made is None or config.supernet.structure.is_chosen else made.naming,
        training_cost="" if (cost := training_cost(results)) is None else str(cost),
        making=() if made is None else made.lines(config.supernet.init_from),
        notes=training_notes(results)
        + _timing_notes(results)
        + notes
        + _objective_notes(results)
        + _sample_notes(results),
        commands=commands_of(results),
        versions=tuple((key, str(value)) for key, value in manifest["versions"].items()),
        hardware=tuple((key, str(value)) for key, value in manifest["hardware"].items() if value is not None),
        seeds=(
            ("seed", str(manifest["seed"])),
            *((key, str(value)[:16]) for key, value in manifest["data_hashes"].items()),
        ),
    )


def commands_of(results: RunResults) -> tuple[tuple[str, str], ...]:
    """(what it does, command) pairs for working with the run from any folder."""
    run, own_code = results.run, has_own_code(results.config)
    return (
        ("Continue this run", launch_command(results.config, run.sweep_yaml)),
        ("Show the front on the terminal", command_line("pareto", run.path)),
        (
            "Export the gates on the front as bundles",
            command_line("export", run.path, "--pick", "all", own_code=own_code),
        ),
        *bundle_commands(run, results.config),
        *browsing_commands(results.config, run),
    )


def bundle_commands(run: RunDir, config: SweepConfig) -> tuple[tuple[str, str], ...]:
    """(what it does, command) pairs for using the bundle of the knee; empty if a launch does not
    export it."""
    if not {"knee", "all"} & set(config.export.picks):
        return ()
    bundle, own_code = run.knee_bundle, has_own_network(config)
    photos = (
        "Classify photos with the bundle of the knee",
        command_line("predict", bundle, "PHOTO...", own_code=own_code),
    )
    serve = ("Answer HTTP requests with the bundle of the knee", command_line("serve", bundle, own_code=own_code))
    return (photos, serve) if find_data_set(config.data.name).has_photos else (serve,)


def _model_name(results: RunResults) -> str:
    """The family's name; for a network from a checkpoint, once it is known."""
    model, made = results.config.supernet.model, results.supernet
    return model if made is None or model == made.spec.family else f"{made.spec.family} (of a {model})"


def training_notes(results: RunResults) -> tuple[str, ...]:
    """Warnings about the training of the supernet, in sentences."""
    return tuple(note_of_warning(warning) for warning in review(results))


def note_of_warning(warning: TrainingWarning, whose: str = "") -> str:
    """A warning in sentences; `whose` comes before it."""
    return f"{whose}{capital(warning.text)}. What to do: {warning.way_out}."


def _timing_notes(results: RunResults) -> tuple[str, ...]:
    doubt = timing_doubt(results)
    return () if doubt is None else (f"{capital(doubt)}.",)


def capital(text: str) -> str:
    """The text with a capital first letter, unless it begins with the name of a sub-network or
    trial."""
    return text if {"-", "_"} & set(text.split(" ", 1)[0]) else text[:1].upper() + text[1:]


def _sample_notes(results: RunResults) -> tuple[str, ...]:
    if results.verified is None or len(results.front_sample) == len(results.front):
        return ()
    return (
        f"{len(results.front_sample)} of the front's {len(results.front)} gates, evenly spaced along it, ran on test (budget.verify); "
        "the tables and figures for test show these.",
    )


def _objective_notes(results: RunResults) -> tuple[str, ...]:
    names = [metric.name for metric in results.config.metrics]
    if set(names) == {"top1", "madds_m"}:
        return ()
    drawn = "the figure shows top-1 against MAdds"
    further = further_objective(results)
    if further is not None:
        drawn += f", with {metric_noun(further.metric)} as colour" + (
            " and in a row of its own" if further.is_latency else ""
        )
    return (f"The front was chosen by {', '.join(names[:-1])} and {names[-1]}; {drawn}.",)


def further_objective(results: RunResults) -> Further | None:
    """The first objective other than top-1 and MAdds, which the front's figure shows too."""
    others = [metric for metric in results.config.metrics if metric.name not in ("top1", "madds_m")]
    return Further(others[0].name, others[0].goal) if others else None


def constraints_of(results: RunResults) -> tuple[tuple[str, int], ...]:
    """(constraint, completed trials that violate it), in the order of the configuration."""
    completed = results.completed
    texts = dict.fromkeys(text for record in completed for text in record.constraints)
    return tuple((text, sum(text in broken_constraints(record) for record in completed)) for text in texts)


def endings_of(results: RunResults) -> tuple[tuple[str, str, int], ...]:
    """(state, reason, number) of the trials that did not run to their end."""
    counts = Counter((record.state, str(record.reason)) for record in (*results.failed, *results.pruned))
    return tuple((state, reason, number) for (state, reason), number in counts.items())


def draw_front(results: RunResults, path: Path) -> Path:
    """Draw the front into a file; its suffix decides the format.

    Raises:
        NotFoundError: the run has no measured sub-networks yet.
        PreflightError: an image format whose tools are not installed.
    """
    if (info := front_info(results)) is None:
        raise _too_early(results, "has no front yet")
    return write_figure(front_figure(info), path)


def draw_routers(results: RunResults, path: Path) -> Path:
    """Draw the accuracy of each kind of router at the budgets into a file; its suffix decides the
    format.

    Raises:
        NotFoundError: the front has not been verified yet.
        PreflightError: an image format whose tools are not installed.
    """
    if (info := routers_of(results)) is None:
        raise _too_early(results, "has not been verified yet")
    return write_figure(routers_figure(info), path)


def _too_early(results: RunResults, why: str) -> NotFoundError:
    command = launch_command(results.config, results.run.sweep_yaml)
    return NotFoundError(f"run {results.run.name!r} {why}; continue it with: {command}")


def headline(results: RunResults) -> Headline:
    """The table of the front: each gate on `val` and on `test` beside its controls."""
    verified = results.verified
    knee = results.knee
    found = None if verified is None else optimism(verified.val, verified.test)
    if verified is None:
        rows = tuple(_unverified_row(results, slot) for slot in results.front_sample)
    else:
        pairs = zip(verified.val.points, verified.test.points, strict=True)
        rows = tuple(_row(results, verified, chosen, reported) for chosen, reported in pairs)
    return Headline(
        baseline=None if verified is None else _baseline(results, verified),
        rows=tuple(sorted(rows, key=lambda row: row.chosen.madds_m)),
        knee=None if knee is None else trial_name(knee),
        optimism=None if found is None else _estimate(found),
        warnings=tuple(f"{capital(text)}." for text in dominated_warnings(results)),
    )


def _estimate(interval: Interval) -> Estimate:
    return Estimate(interval.value, interval.low, interval.high)


def _scores(point: PointAnalysis) -> Scores:
    return Scores(
        top1=_estimate(point.top1),
        madds_m=point.metrics["madds_m"],
        gain=None if point.gain is None else _estimate(point.gain),
        over_widest=None if point.over_widest is None else _estimate(point.over_widest),
        random_top1=point.random_top1,
        cascade_top1=point.cascade_top1,
        oracle_top1=point.oracle_top1,
        cascade_madds_m=point.cascade_madds_m,
        oracle_share=point.clear_share_of_oracle_gap,
        stability=point.stability,
        reachable_top1=point.reachable_top1,
        reachable_share=point.clear_share_of_reachable_gap,
        is_cascade_collapsed=point.is_cascade_collapsed,
        ties=tuple(trial_name(slot) for slot in point.ties),
    )


def _row(results: RunResults, verified: Verified, chosen: PointAnalysis, reported: PointAnalysis) -> Row:
    latency = verified.latency
    size = max(latency.gates)
    return Row(
        name=trial_name(chosen.slot),
        chosen=_scores(chosen),
        reported=_scores(reported),
        latency=Latency(
            batch_size=size,
            median_ms=latency.gates[size][chosen.slot].median_ms,
            widest_ms=latency.widest[size].median_ms,
            cheapest_ms=latency.cheapest[size].median_ms,
        ),
        max_route_share=reported.metrics["max_route_share"],
        is_collapsed=reported.is_collapsed,
        router=reported.router,
        further=_further_values(results, results.record(chosen.slot).metrics),
        further_reported=_further_values(results, reported.metrics),
    )


def _further_values(results: RunResults, metrics: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    """The objectives other than top-1 and MAdds, as far as they are among the metrics."""
    names = [metric.name for metric in results.config.metrics if metric.name not in ("top1", "madds_m")]
    return tuple((name, metrics[name]) for name in names if name in metrics)


def _unverified_row(results: RunResults, slot: int) -> Row:
    """Intervals without a bootstrap, before the verify stage; for an accuracy only the number of
    images is needed."""
    metrics = results.record(slot).metrics
    return Row(
        name=trial_name(slot),
        chosen=Scores(top1=Estimate(metrics["top1"], *_wilson(results, metrics["top1"])), madds_m=metrics["madds_m"]),
        max_route_share=metrics["max_route_share"],
        is_collapsed=is_collapsed(metrics),
        router=results.router_kind(slot),
        further=_further_values(results, metrics),
    )


def _wilson(results: RunResults, top1: float) -> tuple[float, float]:
    """95 % interval of an accuracy on `val`."""
    return wilson_interval(round(top1 * results.num_val), results.num_val)


def _baseline(results: RunResults, verified: Verified) -> Row:
    widest = int(np.argmax(verified.val.static_madds_m))
    scores = [
        Scores(top1=_estimate(analysis.static_top1[widest]), madds_m=analysis.static_madds_m[widest])
        for analysis in (verified.val, verified.test)
    ]
    latency = verified.latency
    size = max(latency.gates)
    widest_ms = latency.widest[size].median_ms
    return Row(
        name=verified.val.routes[widest],
        chosen=scores[0],
        reported=scores[1],
        latency=Latency(size, widest_ms, widest_ms, latency.cheapest[size].median_ms),
        further=_further_values(results, results.baseline),
        further_reported=_further_values(results, verified.test.static_metrics(results.widest.name)),
    )


def front_info(results: RunResults) -> FrontInfo | None:
    """The front's panels: `val`, and `test` once verified."""
    rows = results.points()
    if not results.subnets:
        return None
    verified = results.verified
    return FrontInfo(
        chosen=_bare_panel(results, rows) if verified is None else _panel(results, rows, verified.val),
        reported=None if verified is None else _panel(results, rows, verified.test),
        further=further_objective(results),
        objectives=tuple(metric.name for metric in results.config.metrics),
    )


def _bare_panel(results: RunResults, rows: list[PointRow]) -> FrontPanel:
    members = results.members
    madds = np.array([subnet.madds for subnet in members], dtype=float)
    top1 = np.array([subnet.top1 for subnet in members])
    line = StaticLine.through(madds, np.round(top1 * results.num_val))
    intervals = {
        trial_name(slot): _wilson(results, results.record(slot).metrics["top1"]) for slot in results.front_sample
    }
    return FrontPanel(
        split="val",
        num_images=results.num_val,
        static=static_points(rows, "val", _further_name(results)),
        static_line=Curve(_floats(line.madds / 1e6), _floats(top1[list(line.vertices)])),
        dynamic=_dynamic(results, rows, "val", intervals),
    )


def _further_name(results: RunResults) -> str | None:
    further = further_objective(results)
    return None if further is None else further.metric


def _dynamic(
    results: RunResults, rows: list[PointRow], split: str, intervals: dict[str, tuple[float, float]]
) -> tuple[DynamicPoint, ...]:
    """The trials on a split, each with the constraints that it violates."""
    broken = {trial_name(record.slot): broken_constraints(record) for record in results.completed}
    points = dynamic_points(rows, split, intervals, results.config.gate.router, _further_name(results))
    return tuple(replace(point, broken=broken[point.name]) for point in points)


def _panel(results: RunResults, rows: list[PointRow], analysis: SplitAnalysis) -> FrontPanel:
    by_name = {trial_name(point.slot): point for point in analysis.points}
    intervals = {name: (point.top1.low, point.top1.high) for name, point in by_name.items()}
    points = sorted(analysis.points, key=lambda point: point.metrics["madds_m"])
    return FrontPanel(
        split=analysis.split,
        num_images=analysis.num_images,
        static=static_points(rows, analysis.split, _further_name(results)),
        static_line=Curve(analysis.line_madds_m, analysis.line_top1),
        dynamic=tuple(
            _with_standing(point, by_name.get(point.name))
            for point in _dynamic(results, rows, analysis.split, intervals)
        ),
        random=Curve(tuple(point.metrics["madds_m"] for point in points), tuple(point.random_top1 for point in points)),
        cascade=Curve(analysis.cascade_madds_m, analysis.cascade_top1),
        reachable=Curve(analysis.reachable_madds_m, analysis.reachable_top1),
        oracle=Curve(analysis.oracle_madds_m, analysis.oracle_top1),
    )


def _with_standing(point: DynamicPoint, found: PointAnalysis | None) -> DynamicPoint:
    if found is None:
        return point
    return replace(point, stability=found.stability, ties=tuple(trial_name(slot) for slot in found.ties))


def hypervolume_of(results: RunResults) -> HypervolumeInfo | None:
    """Hypervolume of the static sub-networks and all routers so far, after each trial, of the 2 or
    3 objectives.

    A trial adds its gain over the static sub-networks and the trials before it; infeasible trials
    add nothing.
    """
    if not results.records or not results.subnets:
        return None
    metrics = results.config.metrics
    nothing = [math.nan] * len(metrics)
    values = [
        [record.metrics[metric.name] for metric in metrics] if record.is_feasible else nothing
        for record in results.records
    ]
    reference, goals, static = results.reference_point, [metric.goal for metric in metrics], _static_values(results)
    trace = hypervolume_trace([*static, *values], goals, reference)
    return HypervolumeInfo(
        slots=tuple(record.slot for record in results.records),
        hypervolume=_floats(trace[len(static) :]),
        failures=_reasons(results.failed),
        split="val",
        num_images=results.num_val,
        reference=reference,
        static_hypervolume=hypervolume(static, goals, reference) if static else 0.0,
        objectives=tuple(metric.name for metric in metrics),
        pruned=_reasons(results.pruned),
        num_infeasible=len(results.completed) - len(results.feasible),
        plateau=_plateau(results),
    )


def _plateau(results: RunResults) -> int | None:
    """Number of trials over which the stop rule found no growth; None if the search ended for
    another reason or can continue."""
    path = results.run.search_end_json(results.stage_key("search") or "")
    if not path.is_file():
        return None
    end = read_end(path)
    is_last = end.reason == "plateau" and end.trials == len(results.records)
    return int(end.rules["plateau"]["trials"]) if is_last else None


def _reasons(records: Sequence[TrialRecord]) -> tuple[tuple[int, str], ...]:
    return tuple((record.slot, str(record.reason)) for record in records)


def _static_values(results: RunResults) -> list[list[float]]:
    """The objectives of the static sub-networks that hold every constraint."""
    return [[row[metric.name] for metric in results.config.metrics] for row in allowed_static(results).values()]


def routes_of(results: RunResults, class_names: tuple[str, ...]) -> RoutesInfo | None:
    """The routes of the front's gates on `test`; None before the verify stage."""
    verified = results.verified
    if verified is None or not verified.test.points:
        return None
    test = verified.test
    order = sorted(range(len(test.points)), key=lambda index: test.points[index].metrics["madds_m"])
    by_class = np.array([test.class_counts[index] for index in order], dtype=np.int64)
    return RoutesInfo(
        split=test.split,
        num_images=test.num_images,
        routes=test.routes,
        madds_m=test.static_madds_m,
        gates=tuple(trial_name(test.points[index].slot) for index in order),
        counts=by_class.sum(1),
        classes=class_names,
        class_counts=by_class,
    )


def classes_of(results: RunResults, class_names: tuple[str, ...]) -> ClassesInfo | None:
    """The accuracy within each class on `val`, of the widest sub-network and of the router at the
    knee of the front; None before the table stage."""
    if not results.is_done("measure") or not results.is_done("table"):
        return None
    table, knee = results.val_table, results.knee
    widest = top1_by_class(static_run(table, table.routes.index(results.widest.name)), table)
    routed = {} if knee is None else top1_by_class(run_on_table(results.router(knee), table), table)
    return ClassesInfo(
        split="val",
        router="" if knee is None else trial_name(knee),
        classes=tuple(class_names[label] for label in widest),
        num_images=tuple(count for count, _ in widest.values()),
        widest=tuple(accuracy for _, accuracy in widest.values()),
        routed=tuple(accuracy for _, accuracy in routed.values()),
    )


def routers_of(results: RunResults) -> RoutersInfo | None:
    """Accuracy of each kind of router at the budgets, on `test`; None before the verify stage."""
    verified = results.verified
    if verified is None:
        return None
    test = verified.test
    return RoutersInfo(test.split, test.num_images, tuple(_router_result(share) for share in test.routers))


def _router_result(share: RouterShare) -> RouterResult:
    gain = share.gain
    return RouterResult(
        router=share.router,
        budget_share=share.budget_share,
        name=trial_name(share.slot),
        madds_m=share.madds_m,
        top1=share.top1,
        static_top1=share.static_top1,
        reachable_top1=share.reachable_top1,
        oracle_top1=share.oracle_top1,
        gain=None if gain is None else (gain.value, gain.low, gain.high),
        reachable_share=share.clear_share_of_reachable_gap,
        oracle_share=share.clear_share_of_oracle_gap,
        is_collapsed=share.is_collapsed,
    )


def speedups_of(results: RunResults) -> SpeedupsInfo | None:
    """Accuracy and speed of all trials on `val`, for the smallest and the largest batch that was
    timed; None before the first trial."""
    latency = results.latency
    if latency is None or not results.completed:
        return None
    rows, router = results.points(), results.config.gate.router
    panels = (
        speed_panel(rows, "val", size, latency_metric(size), router)
        for size in sorted({min(latency.batch_sizes), max(latency.batch_sizes)})
    )
    return SpeedupsInfo("val", results.num_val, _place_of(latency), tuple(filter(None, panels)))


def draw_speedups(results: RunResults, path: Path) -> Path:
    """Draw accuracy over speed into a file; its suffix decides the format.

    Raises:
        NotFoundError: no trial has finished yet.
        PreflightError: an image format whose tools are not installed.
    """
    if (info := speedups_of(results)) is None:
        raise _too_early(results, "has no finished trial yet")
    return write_figure(speedups_figure(info), path)


def _place_of(latency: LatencyTable) -> str:
    return f"{latency.device}, {plural(latency.threads, 'thread')}"


def widths_of(results: RunResults) -> WidthsInfo | None:
    """The static sub-networks by ascending MAdds."""
    members = results.members
    if not members:
        return None
    latency = results.newest_latencies.get(MAIN_DEVICE)
    series = []
    for size, row in () if latency is None else latency.subnets.items():
        timings = [row[subnet.name] for subnet in members]
        series.append(
            LatencySeries(
                size,
                tuple(t.median_ms for t in timings),
                tuple(t.median_ms - t.iqr_ms / 2 for t in timings),
                tuple(t.median_ms + t.iqr_ms / 2 for t in timings),
            )
        )
    return WidthsInfo(
        split="val",
        num_images=results.num_val,
        device="" if latency is None else _place_of(latency),
        subnets=tuple(subnet.name for subnet in members),
        madds_m=tuple(subnet.madds / 1e6 for subnet in members),
        params_m=tuple(subnet.params / 1e6 for subnet in members),
        top1=tuple(subnet.top1 for subnet in members),
        top5=tuple(subnet.top5 for subnet in members),
        latency=tuple(series),
        has_top5=results.trained_subnets.spec.num_classes >= MIN_CLASSES_OF_TOP5,
    )


def training_of(results: RunResults) -> TrainingInfo | None:
    """The supernet's loss curves."""
    key = results.stage_key("supernet")
    lines = [] if key is None else read_json_lines(results.run.curves_jsonl(key))
    if key is None or not lines:
        return None
    with understood(results.run.curves_jsonl(key)):
        return training_info(lines)


def _floats(values: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
