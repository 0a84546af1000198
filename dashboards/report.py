"""Offline HTML report of a run: headline numbers beside their controls, then all figures.

`ReportData` holds its content; parts may be missing, and the report then says so. Accuracies are
fractions in the data and percent on the page, costs are millions of MAdds per image, latencies
milliseconds per batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Final, Literal

from dashboards.classes import MAX_CLASSES, ClassesInfo, classes_table
from dashboards.front import FrontInfo, front_figure
from dashboards.headline import NOT_VERIFIED, Headline, headline_section
from dashboards.hypervolume import HypervolumeInfo, hypervolume_figure
from dashboards.page import chart, definition_list, page
from dashboards.routers import RoutersInfo, routers_figure, routers_table
from dashboards.routes import RoutesInfo, class_routes_figure, routes_figure
from dashboards.speedups import SpeedupsInfo, speedups_figure
from dashboards.structure import StructureInfo, channels_figure, search_figure
from dashboards.theme import significant
from dashboards.training import TrainingInfo, training_figure
from dashboards.widths import WidthsInfo, widths_figure
from dsnet.metrics import metric_noun
from dsnet.wording import plural

MAX_ENDINGS: Final = 12
"""Maximum number of listed reasons why trials ended early."""


@dataclass(frozen=True)
class ReportData:
    """Content of the report."""

    run_name: str
    status: Literal["running", "stopped", "complete", "failed"]
    created: str
    """Time at which the report was made, as displayed."""
    data_name: str
    model: str
    headline: Headline = field(default_factory=Headline)
    num_completed: int = 0
    num_failed: int = 0
    num_pruned: int = 0
    """Trials that were ended early."""
    num_infeasible: int = 0
    """Completed trials that violate a constraint and therefore cannot be on the front."""
    constraints: tuple[tuple[str, int], ...] = ()
    """(constraint, number of completed trials that violate it)."""
    endings: tuple[tuple[str, str, int], ...] = ()
    """("pruned" or "failed", reason, number of trials that ended for it)."""
    num_test_openings: int = 0
    """Number of times the sealed split was read; after more than once its numbers are
    optimistic."""
    front: FrontInfo | None = None
    hypervolume: HypervolumeInfo | None = None
    routers: RoutersInfo | None = None
    speedups: SpeedupsInfo | None = None
    routes: RoutesInfo | None = None
    classes: ClassesInfo | None = None
    widths: WidthsInfo | None = None
    structure: StructureInfo | None = None
    training: TrainingInfo | None = None
    naming: str = ""
    """Explanation of the sub-networks' names."""
    notes: tuple[str, ...] = ()
    """Warnings that qualify the numbers, e.g. 'smoke result: 270 images a split'; shown at the
    top."""
    commands: tuple[tuple[str, str], ...] = ()
    """(description, command), e.g. ('Continue this run', 'dsnet-orch launch ...')."""
    training_cost: str = ""
    """Cost of the supernet's training and of the choice of its sub-networks; empty if it is
    unknown."""
    making: tuple[tuple[str, str], ...] = ()
    """Facts about the training of the supernet: (name, value)."""
    versions: tuple[tuple[str, str], ...] = ()
    hardware: tuple[tuple[str, str], ...] = ()
    seeds: tuple[tuple[str, str], ...] = ()
    """Seeds and hashes on which the numbers depend: (name, value)."""


def build_report(data: ReportData) -> str:
    """Build the report as one self-contained HTML document of about 5 MB (mostly plotly.js)."""
    sections = [
        _notes(data),
        headline_section(data.headline),
        _front_section(data),
        _routers_section(data),
        _speedups_section(data),
        _hypervolume_section(data),
        _routes_section(data),
        _classes_section(data),
        _widths_section(data),
        _structure_section(data),
        _training_section(data),
        _commands(data),
    ]
    return page(f"{data.run_name} · dsnet-orch", _header(data), "\n".join(filter(None, sections)), _footer(data))


def _header(data: ReportData) -> str:
    trials = plural(data.num_completed, "completed trial")
    trials += f" ({data.num_infeasible:,} infeasible)" if data.num_infeasible else ""
    failed = f", {data.num_failed:,} failed" if data.num_failed else ""
    failed += f", {data.num_pruned:,} pruned" if data.num_pruned else ""
    facts = f"{data.model} on {data.data_name} · {trials}{failed} · status {data.status} · {data.created}"
    return f'<h1>{escape(data.run_name)}</h1>\n<p class="lead">{escape(facts)}</p>'


def _notes(data: ReportData) -> str:
    notes = [*data.notes, *_own_notes(data)]
    if not notes:
        return ""
    return '<div class="notes" role="note"><ul>' + "".join(f"<li>{escape(n)}</li>" for n in notes) + "</ul></div>"


def _own_notes(data: ReportData) -> list[str]:
    """Notes derived from the numbers in the report."""
    notes = []
    headline = data.headline
    if headline.rows and not headline.is_verified:
        notes.append(
            f"{NOT_VERIFIED.capitalize()}: all accuracies are from {headline.chosen_split}, on which the routers were also chosen, "
            "and are therefore optimistic."
        )
    if data.num_test_openings > 1:
        notes.append(
            f"{headline.reported_split} was read {data.num_test_openings} times: "
            "results of choices made after the first time are optimistic."
        )
    if not data.num_completed and data.num_failed:
        notes.append(f"No trial completed; {plural(data.num_failed, 'trial')} failed.")
    if data.num_completed and data.num_infeasible == data.num_completed:
        notes.append(
            f"None of the {plural(data.num_completed, 'completed trial')} satisfies all constraints, so there is no front; "
            "'Search progress' lists how many trials violate each constraint."
        )
    num_collapsed = sum(row.is_collapsed for row in headline.rows)
    if num_collapsed:
        notes.append(
            f"{num_collapsed} of {plural(len(headline.rows), 'router')} on the front collapsed: one route classifies (nearly) "
            "all images, so that the router only adds cost to a static sub-network."
        )
    return notes


def _section(title: str, caption: str, content: str) -> str:
    """A section of the page; `caption` is escaped, `title` and `content` are HTML."""
    return f"<section><h2>{title}</h2>\n<p class='muted'>{escape(caption)}</p>\n{content}</section>"


def _empty(text: str) -> str:
    return f'<p class="empty">{escape(text)}</p>'


def _front_section(data: ReportData) -> str:
    caption = (
        "Top-1 against the mean MAdds per image. A router is useful only above the black static line, which a random mix of two "
        "static sub-networks reaches without a router. A gate decides before the rest of the network runs; a cascade runs a cheap "
        "route first, and a wider one too where the first answer is uncertain, and pays for both. Controls: random routing sends "
        "the same share of images to each route, at random; the confidence cascade has one threshold and needs no training; the "
        "reachable curve is the best router found that sees the outputs of all routes at no cost; the oracle knows the labels."
    )
    if data.front is None:
        return _section("The front", caption, _empty("No trial has finished yet."))
    if data.front.further is not None:
        caption += f" Colour on the front shows {metric_noun(data.front.further.metric)}, the objective beside top-1 and MAdds."
    if data.constraints:
        caption += " Grey crosses are trials that violate a constraint."
    if data.training_cost:
        caption += (
            f" All points share one training, which took about {data.training_cost}; compare methods at equal cost."
        )
    is_paired = data.front.reported is not None
    if is_paired:
        caption += (
            " Open marks on the right are the results of the same routers on the split on which they were chosen; the distance "
            "to the filled marks is the selection bias (winner's curse)."
        )
    return _section("The front", caption, chart("front", front_figure(data.front), is_wide=is_paired))


def _routers_section(data: ReportData) -> str:
    info = data.routers
    title = "Kinds of router at three budgets"
    if info is None or not info.results:
        return _section(title, "", _empty("Available after the front has been verified."))
    caption = (
        "For each kind of router and each budget of mean MAdds: the trial with the best top-1 on val within the budget, and its "
        f"result on {info.split}, computed on the routing table. The gain is top-1 minus that of the static line, with a paired "
        "95 % interval. The last columns give the gain as a share of the gap from the static line to the reachable curve and to "
        "the oracle; a share may exceed 100 %, because the reachable curve is an estimate, and is left out where the gap is "
        "within its noise. A kind without a trial within a budget is left out. About one interval in twenty excludes 0 by chance."
    )
    if any(result.is_collapsed for result in info.results):
        caption += " Collapsed: one route answers more than 99 % of the images."
    return _section(title, caption, chart("routers", routers_figure(info)) + routers_table(info))


def _speedups_section(data: ReportData) -> str:
    info = data.speedups
    title = "Accuracy over speed"
    if info is None or not info.panels:
        return _section(title, "", _empty("Available after the first trial."))
    caption = (
        "Speed-up: the time of the widest static sub-network over that of a router or of another static sub-network, on the same "
        "device and in the same engine. Of each kind of router, those trials are shown that are more accurate than all faster ones "
        f"on {info.split}. The static line is a random mix of two static sub-networks. A router's time is computed from the measured "
        "times of its parts and the routes that it takes; the table at the top has measured times of the front."
    )
    return _section(title, caption, chart("speedups", speedups_figure(info), is_wide=len(info.panels) > 1))


def _hypervolume_section(data: ReportData) -> str:
    info = data.hypervolume
    size = "volume" if info is not None and len(info.objectives) == 3 else "area"
    caption = (
        f"The hypervolume is the {size} between the reference point and the common front of static sub-networks and routers. If it "
        "still rises at the end, more trials would help."
        + (" Trials that violate a constraint do not count." if data.constraints else "")
    )
    content = _empty("No trial has finished yet.") if info is None else chart("hypervolume", hypervolume_figure(info))
    return _section("Search progress", caption, content + _constraints_table(data) + _endings_table(data))


def _constraints_table(data: ReportData) -> str:
    if not data.constraints:
        return ""
    rows = [
        (text, f"{num_broken:,} of {data.num_completed:,}", _share(num_broken, data.num_completed))
        for text, num_broken in data.constraints
    ]
    return _small_table(("Constraint", "Trials that violate it", "Share (%)"), rows)


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f}" if whole else "–"


def _endings_table(data: ReportData) -> str:
    if not data.endings:
        return ""
    ordered = sorted(data.endings, key=lambda ending: -ending[2])
    rows = [(reason, state, f"{number:,}") for state, reason, number in ordered[:MAX_ENDINGS]]
    others = ordered[MAX_ENDINGS:]
    if others:
        rows.append((f"{len(others):,} other reasons", "", f"{sum(number for _, _, number in others):,}"))
    return _small_table(("Reason for an early end", "State", "Trials"), rows)


def _small_table(heads: tuple[str, str, str], rows: Sequence[tuple[str, str, str]]) -> str:
    """HTML table of three columns; all cells are text, which is escaped."""
    kinds = ("", "number", "number")
    head = "".join(f'<th class="{kind}" scope="col">{escape(h)}</th>' for kind, h in zip(kinds, heads, strict=True))
    body = "".join(
        "<tr>" + "".join(f'<td class="{kind}">{escape(c)}</td>' for kind, c in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _routes_section(data: ReportData) -> str:
    caption = "The route that answers; a cascade has run a cheaper one before. A bar of one colour: the router always takes one route."
    info = data.routes
    if info is None or not info.gates:
        return _section("Routes", caption, _empty("No router on the front yet."))
    content = chart("routes", routes_figure(info))
    if info.class_counts is not None:
        gate = data.headline.knee if data.headline.knee in info.gates else info.gates[0]
        content += chart("routes-by-class", class_routes_figure(info, gate))
    return _section("Routes", caption, content)


def _classes_section(data: ReportData) -> str:
    """Section about the accuracy within each class; empty before there is a routing table."""
    info = data.classes
    if info is None:
        return ""
    caption = (
        f"Top-1 within each class on {info.split}, the lowest first. The mean over classes is the metric balanced_top1: in it "
        "rare classes count as much as frequent ones."
    )
    if len(info.classes) > MAX_CLASSES:
        caption += f" The table shows {MAX_CLASSES} of {len(info.classes):,} classes."
    return _section("Classes", caption, classes_table(info))


def _widths_section(data: ReportData) -> str:
    info = data.widths
    if info is None or not info.subnets:
        return _section("Static sub-networks", "", _empty("No sub-network has been measured yet."))
    caption = (
        "Accuracy and latency of the sub-networks without a router. No routing between them can be faster than the cheapest one. "
        "The latency axis is logarithmic; bars are interquartile ranges."
    )
    if info.latency:
        caption += (
            " The measure stage timed every sub-network by itself before the search. The speed-ups of routers at the top come from "
            "a later timing, by the verify stage, of the gates together with the widest and the cheapest sub-network. Hence the same "
            "sub-network has two times, which differ most if the machine was busy."
        )
    if data.naming:
        caption += f" {data.naming}"
    return _section(
        "Static sub-networks", caption, chart("widths", widths_figure(info), is_wide=True) + _widths_table(info)
    )


def _widths_table(info: WidthsInfo) -> str:
    heads = ["Sub-network", "MAdds (M)", "Parameters (M)", "Top-1 (%)", *(["Top-5 (%)"] if info.has_top5 else [])]
    heads += [f"Batch of {s.batch_size} (ms)" for s in info.latency]
    columns = [
        [significant(v) for v in info.madds_m],
        [significant(v) for v in info.params_m],
        [f"{100 * v:.1f}" for v in info.top1],
        *([[f"{100 * v:.1f}" for v in info.top5]] if info.has_top5 else []),
        *([significant(v) for v in s.median_ms] for s in info.latency),
    ]
    head = "".join(f'<th class="{"number" if k else ""}" scope="col">{escape(h)}</th>' for k, h in enumerate(heads))
    body = "".join(
        f"<tr><td>{escape(name)}</td>" + "".join(f'<td class="number">{column[k]}</td>' for column in columns) + "</tr>"
        for k, name in enumerate(info.subnets)
    )
    body += _ceiling_row(info)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _ceiling_row(info: WidthsInfo) -> str:
    """Table row of the ratios widest / cheapest: MAdds, parameters, and latency, which is the
    ceiling of any speed-up."""
    ratios = [info.madds_m[-1] / info.madds_m[0], info.params_m[-1] / info.params_m[0]]
    shown = [
        *(f"{r:.2f}x" for r in ratios),
        "",
        *([""] if info.has_top5 else []),
        *(f"{s.ceiling:.2f}x" for s in info.latency),
    ]
    cells = "".join(f'<td class="number">{text}</td>' for text in shown)
    return f'<tr class="baseline"><td>widest / cheapest</td>{cells}</tr>'


def _structure_section(data: ReportData) -> str:
    """Section about the choice of sub-networks; empty where the family declares them."""
    info = data.structure
    if info is None:
        return ""
    caption = "The share of channels that each sub-network has of every channel group; the name of a group is shown under the pointer."
    content = chart("channels", channels_figure(info), is_wide=True)
    if info.candidates:
        caption += (
            " Below, every sub-network that the search scored on images of train which its network had not seen. The chosen ones "
            "were chosen by these accuracies, which are therefore optimistic; those on val are above."
        )
        if info.chosen_before:
            caption += (
                " A sub-network that was chosen is marked twice where the network was fine-tuned during the search: open marks are "
                "its accuracies before, filled ones after the last fine-tuning."
            )
        content += chart("search", search_figure(info))
    return _section("Choice of sub-networks", caption, content)


def _training_section(data: ReportData) -> str:
    info = data.training
    content = (
        _empty("No training curve has been recorded.") if info is None else chart("training", training_figure(info))
    )
    return _section("Supernet training", "Training loss of each sub-network.", content)


def _commands(data: ReportData) -> str:
    if not data.commands:
        return ""
    content = "".join(f"<p>{escape(what)}</p><pre>{escape(command)}</pre>" for what, command in data.commands)
    return f"<section><h2>Next steps</h2>{content}</section>"


def _footer(data: ReportData) -> str:
    entries = (*data.making, *data.hardware, *data.seeds, *data.versions)
    return f"<h2>Reproducibility</h2>{definition_list(entries)}" if entries else ""
