"""Output of `plan`: the data, the network, the stages and costs of a launch, and the settings.

`orchestration.commands.supernet_tables` prints the plan of a sweep of supernets with the same
parts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dsnet.image_size import image_size_of, size_in_words
from dsnet.space.spec import ChannelGroup, Op, SupernetSpec
from dsnet.wording import duration, plural, size
from orchestration.commands.tables import Column, show_table, terminal_width
from orchestration.commands.terminal import print_json, say, tell
from orchestration.config.resolve import (
    enqueued_points,
    resolve_cohort,
    resolve_cores,
    resolve_threads,
    resolve_timeout_s,
)
from orchestration.config.supernet import resolve_regime
from orchestration.config.sweep import SweepConfig
from orchestration.pipeline.forecast import Forecast
from orchestration.wrapping import wrapped

if TYPE_CHECKING:
    from orchestration.commands.planning import SweepPlan
    from orchestration.prepare.preparation import Prepared
    from orchestration.results.supernet_facts import SupernetFacts
    from orchestration.runs.folder import RunDir

MAX_SUBNETS = 16
"""Number of sub-networks that are listed without --all."""
MAX_CLASSES = 30
"""Number of classes that are named without --all."""
SPLITS = ("train", "gate", "val", "test")
_FILE_LINE = re.compile(r"^.+:(\d+)$")
"""Matches an origin that is a line of the sweep file; the file's name is left out, because the user
has just typed it."""
_WRITERS = ("conv", "depthwise", "grouped", "linear")
"""Kinds of the operations that write the channels of a group."""
_SETTING = Column("setting", is_text=True)
_VALUE = Column("value", is_text=True, wraps=True)


def show_plan(plan: SweepPlan, *, as_json: bool, everything: bool = False) -> None:
    """Print the plan of a sweep of gates under one supernet.

    Args:
        plan: result of `make_plan`.
        as_json: for scripts, always complete.
        everything: also show settings with default values, and every sub-network.
    """
    if as_json:
        print_json(plan_content(plan))
        return
    show_data(plan.run, plan.prepared, everything=everything)
    say()
    made = plan.supernet.lines(plan.config.supernet.init_from)
    network = [(what.removeprefix("supernet "), how) for what, how in made]
    show_table((Column("supernet", is_text=True), Column("", is_text=True, wraps=True)), network, rest="")
    say()
    _show_subnets(plan, everything)
    _show_groups(plan.prepared.subnets.spec, everything)
    _show_places(plan.supernet, everything)
    say()
    _show_stages(plan)
    say()
    show_settings(plan_settings(plan), everything=everything)


def plan_content(plan: SweepPlan) -> dict[str, Any]:
    """The plan as JSON."""
    data = plan.prepared
    return {
        "run": str(plan.run.path),
        "data": data_content(data),
        "stages": [
            {"stage": stage.name, "status": stage.status, "key": stage.key, "because": list(stage.reasons)}
            for stage in plan.stages
        ],
        "forecast": None if plan.forecast is None else plan.forecast.to_json(),
        "subnets": [{"name": name, "madds_m": madds, "params_m": params} for name, madds, params in plan.routes],
        "groups": [
            {
                "name": group.name,
                "kind": group.kind,
                "channels": group.max_width,
                "layers": list(layers),
                "pinned": group.pinned or None,
            }
            for group, layers in group_layers(data.subnets.spec)
        ],
        "gate_places": [
            {
                "name": place.name,
                "node": place.node,
                "channels": place.channels,
                "size": list(place.size),
                "madds_m_before": place.madds_before / 1e6,
                "madds_m_after": place.madds_after / 1e6,
            }
            for place in plan.supernet.gate_places
        ],
        "supernet": dict(plan.supernet.lines(plan.config.supernet.init_from)),
        "settings": plan_settings(plan),
    }


def data_content(prepared: Prepared) -> dict[str, Any]:
    """Facts about the data as JSON."""
    return {
        "name": prepared.image_set.name,
        "image_shape": list(prepared.image_set.image_shape),
        "classes": list(prepared.image_set.class_names),
        "num_images": {split: len(prepared.splits[split]) for split in SPLITS},
    }


def plan_settings(plan: SweepPlan) -> dict[str, dict[str, Any]]:
    """Every setting with its value and origin; `reason` if the data decided it, `effective` is what
    a null stands for."""
    settings = plan.settings()
    for key, meant in effective_values(plan.config, plan.prepared).items():
        if key in settings and settings[key]["value"] is None:
            settings[key]["effective"] = meant
    return settings


def effective_values(config: SweepConfig, prepared: Prepared) -> dict[str, Any]:
    """The values that nulls stand for, given the prepared supernet."""
    supernet = prepared.config.supernet
    regime = resolve_regime(supernet)
    cores = resolve_cores(config)
    points = plural(len(enqueued_points(config)), "point")
    return {
        "data.image_size": prepared.image_size,
        **{f"data.splits.{split}": len(prepared.splits[split]) for split in SPLITS},
        "supernet.regime": supernet.regime or "ib",
        "supernet.threads": resolve_threads(config, cores),
        "supernet.train.widths": regime.widths,
        "supernet.train.num_random": regime.num_random,
        "supernet.train.teacher": regime.teacher,
        "supernet.train.views": regime.views,
        "supernet.train.bn": prepared.subnets.spec.norm,
        "supernet.recalibration.images": "all",
        "sampler.cohort": resolve_cohort(config),
        "sampler.enqueue": f"the published settings ({points})",
        "trial.timeout_s": resolve_timeout_s(config),
        "ray.num_cpus": cores,
        "ray.trial_actors": cores,
        "tracking.uri": f"sqlite in {config.storage.runs}",
        "tracking.experiment": config.name,
    }


def show_data(run: RunDir, prepared: Prepared, *, everything: bool) -> None:
    """Print the run folder, the images, their splits and their classes."""
    images, splits = prepared.image_set, prepared.splits
    channels, size = images.image_shape[0], size_in_words(image_size_of(images.image_shape))
    names = images.class_names if everything else images.class_names[:MAX_CLASSES]
    more = (
        f" and {len(images.class_names) - len(names)} more; --all shows all of them"
        if len(names) < len(images.class_names)
        else ""
    )
    sizes = ", ".join(f"{split} {len(splits[split])}" for split in SPLITS)
    say_row("run", str(run.path))
    say_row("data", f"{images.name}, {size}, {plural(channels, 'channel')}: {sizes} (sealed)")
    for note in prepared.notes():
        say_row("note", note)
    say_row("classes", f"{len(images.class_names)}: {', '.join(names)}{more}")


def say_row(what: str, text: str) -> None:
    """Print a name and its text, whose further lines are indented below its beginning."""
    width = terminal_width()
    first, *others = wrapped(text, None if width is None else max(20, width - 10))
    say(f"{what:<10}{first}")
    for line in others:
        say(f"{'':<10}{line}")


def _show_subnets(plan: SweepPlan, everything: bool) -> None:
    routes = plan.routes
    if not everything and len(routes) > MAX_SUBNETS:
        routes = routes[:MAX_SUBNETS]
    columns = (Column("sub-network", is_text=True), Column("MAdds M"), Column("params M"))
    show_table(columns, [(name, f"{madds:.4g}", f"{params:.4g}") for name, madds, params in routes], rest="")
    if len(routes) < len(plan.routes):
        say(f"... and {len(plan.routes) - len(routes)} more; --all shows all of them")
    if about := _about_subnets(plan):
        tell(about)


def _about_subnets(plan: SweepPlan) -> str:
    """A sentence about where the sub-networks come from, or about their names; empty where both are
    plain."""
    structure = plan.prepared.structure
    if structure is None:
        return plan.supernet.naming
    method = f"supernet.structure.method {structure.problem.settings.method}"
    if plan.prepared.start is not None:
        return f"These are the sub-networks that {method} has chosen."
    return f"These are estimates: {method} chooses the sub-networks when the sweep is launched."


def group_layers(spec: SupernetSpec) -> list[tuple[ChannelGroup, tuple[str, ...]]]:
    """The channel groups with the layers that write their channels, and so are sliced together, or
    whose kernels have their size."""

    def has(op: Op, number: int) -> bool:
        return (op.out_group == number and op.kind in _WRITERS) or op.kernel_group == number

    return [(group, tuple(op.name for op in spec.ops if has(op, number))) for number, group in enumerate(spec.groups)]


def _show_groups(spec: SupernetSpec, everything: bool) -> None:
    """Print the channel groups that are never sliced; with --all every group."""
    shown = [item for item in group_layers(spec) if everything or item[0].pinned]
    if not shown:
        return
    num_pinned = sum(bool(group.pinned) for group in spec.groups)
    say()
    columns = (
        Column("channel group", is_text=True),
        Column("channels"),
        Column("layers that write it", is_text=True, wraps=True),
        Column("pinned", is_text=True, wraps=True),
    )
    show_table(
        columns,
        [(group.name, _width_in_words(group), ", ".join(layers), group.pinned) for group, layers in shown],
        rest="",
    )
    if num_pinned:
        tell(
            f"{num_pinned} of {plural(len(spec.groups), 'channel group')} are pinned: every sub-network has all their channels"
        )


def _width_in_words(group: ChannelGroup) -> str:
    """The largest width of a group, with its unit where that is not channels."""
    return str(group.max_width) if group.unit == "channel" else plural(group.max_width, group.unit)


def _show_places(facts: SupernetFacts, everything: bool) -> None:
    """Print the places at which the network can have gates; without --all a short list."""
    places = facts.gate_places
    shown = [place for place in places if everything or place.is_main]
    if not shown:
        return
    say()
    columns = (
        Column("place for a gate", is_text=True),
        Column("channels"),
        Column("size"),
        Column("M MAdds before"),
        Column("after"),
    )
    rows = [
        (
            place.name,
            str(place.channels),
            f"{place.size[0]} x {place.size[1]}",
            f"{place.madds_before / 1e6:.4g}",
            f"{place.madds_after / 1e6:.4g}",
        )
        for place in shown
    ]
    show_table(columns, rows, rest="")
    if len(shown) < len(places):
        say(f"... and {len(places) - len(shown)} more; --all shows all of them")
    tell("supernet.options.gates takes these names; MAdds are those of the widest sub-network")


def _show_stages(plan: SweepPlan) -> None:
    """Print each stage with its estimated costs and the reasons why it would run."""
    told = [(stage.name, stage.status, stage.key[:12], "; ".join(stage.reasons)) for stage in plan.stages]
    lines = [
        (name, status, *_taken(plan.forecast, name), key, why)
        for name, status, key, why in [*told, ("verify", "after the search", "", "")]
    ]
    columns = [
        Column("stage", is_text=True),
        Column("status", is_text=True, wraps=True),
        *((Column("time"), Column("memory"), Column("disk")) if plan.forecast is not None else ()),
        Column("key", is_text=True, drop=1),
        Column("because", is_text=True, wraps=True),
    ]
    show_table(columns, lines)
    if plan.forecast is not None:
        say_row("forecast", f"about {forecast_text(plan.forecast)}")


def forecast_text(found: Forecast) -> str:
    """A text about time, memory and disk, and how the steps were timed."""
    gpu = f", {size(found.gpu_bytes)} of GPU memory" if found.gpu_bytes else ""
    return (
        f"{duration(found.seconds)}, {size(found.memory_bytes)} of memory{gpu}, {size(found.disk_bytes)} on disk; "
        f"{found.timed}"
    )


def _taken(forecast: Forecast | None, name: str) -> tuple[str, ...]:
    if forecast is None:
        return ()
    stage = forecast.of(name)
    if stage is None or not stage.seconds:
        return ("", "", "")
    return (duration(stage.seconds), size(stage.memory_bytes), size(stage.disk_bytes))


def show_settings(settings: Mapping[str, Mapping[str, Any]], *, everything: bool) -> None:
    """Print the settings that are written, those that were derived from the data, and either all
    others or only their number."""
    groups: dict[str, list[tuple[str, str, str]]] = {"chosen": [], "data": [], "default": []}
    for key, setting in settings.items():
        if f"space.{key}" in settings:  # every trial or supernet has its own value
            continue
        origin = setting["origin"]
        group = origin if origin in ("data", "default") else "chosen"
        groups[group].append((key, _value(setting), setting.get("reason", _FILE_LINE.sub(r"line \1", origin))))
    show_table((_SETTING, _VALUE, Column("from", is_text=True)), groups["chosen"], rest="")
    if groups["data"]:
        say()
        columns = (Column("derived from the data", is_text=True), _VALUE, Column("reason", is_text=True, wraps=True))
        show_table(columns, groups["data"], rest="")
    say()
    if everything:
        show_table((Column("default", is_text=True), _VALUE), [row[:2] for row in groups["default"]], rest="")
    else:
        say(f"{plural(len(groups['default']), 'other setting')} at their defaults; --all shows them")


def _value(setting: Mapping[str, Any]) -> str:
    value = setting.get("effective", setting["value"])
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)
