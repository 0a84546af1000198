"""What commands print on stdout: tables for people, JSON for scripts."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from orchestration.rundir import read_lock
from search.points import trial_name

if TYPE_CHECKING:
    from orchestration.bundle_check import Check
    from orchestration.pipeline import LaunchResult
    from orchestration.planning import SweepPlan
    from orchestration.results import RunResults, Verified


_STAGE_COLUMNS = ("stage", "status", "key", "because")


def _console() -> Console:
    """On a pipe a table keeps its whole width: nothing is cut or wrapped."""
    is_terminal = sys.stdout.isatty()
    return Console(highlight=False, width=None if is_terminal else 200)


def _say(text: str = "") -> None:
    _console().print(text, markup=False, soft_wrap=True)


def warn(text: str) -> None:
    """A warning on stderr: stdout is for data."""
    Console(stderr=True, highlight=False).print(f"warning: {text}", markup=False, soft_wrap=True)


def _print_json(value: Any) -> None:
    _say(json.dumps(value, indent=1, allow_nan=False))


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None, num_left: int = 1) -> None:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < num_left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    _console().print(table)


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction as percent; '-' where there is none."""
    return "-" if value is None else f"{100 * value:.{digits}f}"


def _interval(interval: Any) -> str:
    return (
        "-" if interval is None else f"{100 * interval.value:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
    )


def _signed(interval: Any) -> str:
    return (
        "-"
        if interval is None
        else f"{100 * interval.value:+.1f} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"
    )


def show_launch(result: LaunchResult) -> None:
    """The front, and where everything is and how to open it."""
    run = result.run
    show_front(result.results, (), as_json=False)
    _say()
    _say(f"report    {run.report_html}   (open it in a browser; it needs no network)")
    for bundle in result.bundles:
        _say(f'bundle    {bundle}   (python: dsnet.load_bundle("{bundle}"))')
    _say(f"points    {run.points_parquet}")
    if result.results.config.tracking.mlflow:
        _say(
            f"mlflow    {result.results.config.tracking.uri or run.root / 'mlflow.db'}   (open: dsnet-orch ui --runs {run.root})"
        )


def front_rows(results: RunResults) -> list[dict[str, Any]]:
    """One JSON-able row per gate of the front, cheapest first, everything that was found out about it."""
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
                row[f"{split}_analysis"] = asdict(next(point for point in analysis.points if point.slot == slot))
            row["latency"] = {
                str(size): {
                    "gate_ms": timings[slot].median_ms,
                    "widest_ms": verified.latency.widest[size].median_ms,
                    "cheapest_ms": verified.latency.cheapest[size].median_ms,
                }
                for size, timings in verified.latency.gates.items()
            }
        rows.append(row)
    return rows


def show_front(results: RunResults, picks: Sequence[str], *, as_json: bool) -> None:
    """The front as a table, with the static baseline above it."""
    from orchestration.results import picked_slots

    rows = front_rows(results)
    if picks:
        wanted = [trial_name(slot) for slot in picked_slots(results, picks)]
        rows = [row for row in rows if row["name"] in wanted]
    if as_json:
        _print_json(rows)
    elif picks and not rows:
        _say("none of these trials is on the front; `trials` lists them all, and `export --pick` takes any of them")
    elif results.verified is None:
        lines = [
            (row["name"], row["router"], percent(row["val"]["top1"]), f"{row['val']['madds_m']:.4g}") for row in rows
        ]
        title = f"{results.run.name}: {len(rows)} gates on the front (not verified yet)"
        _table(("gate", "router", "top-1 val %", "MAdds M"), lines, title, num_left=2)
    else:
        _show_verified(results, results.verified, rows)


def _show_verified(results: RunResults, verified: Verified, rows: Sequence[Mapping[str, Any]]) -> None:
    size = max(verified.latency.gates)
    widest_ms, cheapest_ms = verified.latency.widest[size].median_ms, verified.latency.cheapest[size].median_ms
    baseline = verified.test.routes.index(results.widest.name)
    columns: tuple[str, ...] = (
        "gate",
        "router",
        "val %",
        "test % [95 %]",
        "MAdds M",
        "over static, points [95 %]",
        "random %",
        "reachable %",
        "oracle %",
    )
    columns += (f"ms/batch {size}", "speed-up", "ceiling")
    lines: list[tuple[str, ...]] = [
        (
            f"{results.widest.name} (static)",
            "",
            percent(verified.val.static_top1[baseline].value),
            _interval(verified.test.static_top1[baseline]),
            f"{verified.test.static_madds_m[baseline]:.4g}",
            *("", "", "", ""),
            f"{widest_ms:.2f}",
            "1.00x",
            "",
        )
    ]
    points = {point.slot: point for point in verified.test.points}
    for row in rows:
        if row["slot"] not in points:
            continue
        point = points[row["slot"]]
        gate_ms = verified.latency.gates[size][row["slot"]].median_ms
        lines.append(
            (
                row["name"] + (" (one route)" if point.is_collapsed else ""),
                point.router,
                percent(row["val"]["top1"]),
                _interval(point.top1),
                f"{point.metrics['madds_m']:.4g}",
                _signed(point.gain),
                percent(point.random_top1),
                percent(point.reachable_top1),
                percent(point.oracle_top1),
                f"{gate_ms:.2f}",
                f"{widest_ms / gate_ms:.2f}x",
                f"{widest_ms / cheapest_ms:.2f}x",
            )
        )
    title = f"{results.run.name}: gates of the front, chosen on val, run on {verified.test.num_images} test images"
    _table(columns, lines, title, num_left=2)
    if len(points) < len(results.front):
        _say(
            f"{len(points)} of the front's {len(results.front)} gates ran on test, evenly along it (budget.verify); the others: --json"
        )
    if verified.num_openings > 1:
        _say(f"test was read {verified.num_openings} times: numbers chosen after the first time are optimistic")


def show_plan(plan: SweepPlan, *, as_json: bool) -> None:
    """Stages and why they would run; sub-networks; every setting with its origin."""
    values = _leaves(plan.config.model_dump(mode="json"))
    made = plan.supernet.lines(plan.config.supernet.init_from)
    stages = [(stage.name, stage.status, stage.key, tuple(stage.reasons)) for stage in plan.stages]
    if as_json:
        settings = {key: {"value": value, "origin": plan.origins.get(key, "default")} for key, value in values.items()}
        routes = [{"name": name, "madds_m": madds, "params_m": params} for name, madds, params in plan.routes]
        _print_json(
            {
                "run": str(plan.run.path),
                "stages": [dict(zip(_STAGE_COLUMNS, stage, strict=True)) for stage in stages],
                "subnets": routes,
                "supernet": dict(made),
                "settings": settings,
            }
        )
        return
    splits = plan.prepared.splits
    _say(f"run       {plan.run.path}")
    sizes = ", ".join(f"{split} {len(splits[split])}" for split in ("train", "gate", "val", "test"))
    _say(f"data      {plan.prepared.image_set.name} {plan.prepared.image_set.image_shape}: {sizes} (sealed)")
    _say()
    _table(("supernet", ""), [(what.removeprefix("supernet "), how) for what, how in made], num_left=2)
    _say()
    _table(
        ("sub-network", "MAdds M", "params M"),
        [(name, f"{madds:.4g}", f"{params:.4g}") for name, madds, params in plan.routes],
    )
    if plan.supernet.naming:
        _say(plan.supernet.naming)
    _say()
    lines = [(name, status, key[:12], "; ".join(reasons)) for name, status, key, reasons in stages]
    _table(_STAGE_COLUMNS, [*lines, ("verify", "when the front is known", "", "")], num_left=4)
    _say()
    _table(
        ("setting", "value", "from"),
        [(key, json.dumps(value), plan.origins.get(key, "default")) for key, value in values.items()],
        num_left=3,
    )


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value and prefix + key not in ("space", "supernet.options"):
            leaves |= _leaves(value, f"{prefix}{key}.")
        elif isinstance(value, Mapping) and value:
            leaves |= {f"{prefix}{key}.{name}": item for name, item in value.items()}
        else:
            leaves[prefix + key] = value
    return leaves


def show_status(results: RunResults, *, as_json: bool) -> None:
    """Stages, trials and who drives the run."""
    manifest = results.manifest
    holder = read_lock(results.run.lock_path)
    driver = (
        None
        if holder is None
        else f"{holder}" + ("" if holder.is_on_another_host() or holder.is_alive() else ", which is gone")
    )
    stages = {
        name: {"status": entry["status"], "seconds": entry["seconds"], "key": entry["key"]}
        for name, entry in manifest["stages"].items()
    }
    num_failed = len(results.records) - len(results.completed)
    content = {
        "run": str(results.run.path),
        "driver": driver,
        "stages": stages,
        "trials": {"completed": len(results.completed), "failed": num_failed, "budget": results.config.budget.trials},
        "front": [trial_name(slot) for slot in results.front],
        "is_verified": results.verified is not None,
        "test_openings": manifest["test_openings"],
    }
    if as_json:
        _print_json(content)
        return
    _say(f"run       {results.run.path}")
    _say(f"driver    {driver or 'none'}")
    _table(
        ("stage", "status", "seconds"),
        [(name, s["status"], "" if s["seconds"] is None else f"{s['seconds']:.1f}") for name, s in stages.items()],
    )
    failed = f", {num_failed} failed" if num_failed else ""
    _say(f"trials    {len(results.completed)} completed{failed}, of {results.config.budget.trials}")
    _say(f"front     {len(results.front)} gates" + ("" if results.verified else ", not verified yet"))
    if results.verified is None and driver is None:
        _say(f"continue  dsnet-orch launch {results.run.sweep_yaml}")


def show_trials(results: RunResults, *, as_json: bool) -> None:
    """All finished trials."""
    if as_json:
        _print_json(
            [
                {
                    "name": trial_name(r.slot),
                    "state": r.state,
                    "reason": r.reason,
                    "params": dict(r.params),
                    "metrics": dict(r.metrics),
                    "duration_s": r.duration_s,
                }
                for r in results.records
            ]
        )
        return
    keys = list(results.records[0].params) if results.records else []
    lines = []
    for record in results.records:
        scores = (
            (percent(record.metrics.get("top1")), f"{record.metrics['madds_m']:.4g}")
            if record.state == "complete"
            else ("failed", "")
        )
        mark = "*" if record.slot in results.front else ""
        lines.append((trial_name(record.slot) + mark, *scores, *(_short(record.params.get(key)) for key in keys)))
    _table(("trial", "top-1 val %", "MAdds M", *(key.removeprefix("gate.") for key in keys)), lines)
    _say("* on the front")
    for record in results.records:
        if record.state == "failed":
            _say(f"{trial_name(record.slot)} failed: {record.reason}")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def show_checks(checks: Sequence[Check], *, as_json: bool) -> None:
    """What was checked of a bundle, and with which result."""
    if as_json:
        _print_json([asdict(check) for check in checks])
        return
    for check in checks:
        _say(f"ok    {check.name}: {check.finding}")
