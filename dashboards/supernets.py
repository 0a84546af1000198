"""Report of a sweep of supernets: one front over all of them, and the state and training of each.

Accuracies are fractions in the data and percent on the page, costs are millions of MAdds per image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Final, Literal

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dashboards.front import Curve, DynamicPoint, FrontInfo, FrontPanel, ParamValue, StaticPoint
from dashboards.headline import Headline, headline_section
from dashboards.page import chart, definition_list, page
from dashboards.supernet_names import value_text, with_settings
from dashboards.theme import (
    INK,
    MIN_HEIGHT_PX,
    SERIES,
    SYMBOLS,
    dressed,
    note,
    percent,
    plain,
    router_name,
    significant,
)
from dsnet.wording import plural, prefixed

SupernetState = Literal["waiting", "trained", "stopped", "failed"]

STATE_WORDS: Final = {
    "waiting": "not trained yet",
    "trained": "trained",
    "stopped": "stopped early",
    "failed": "failed",
}
"""State of a supernet -> its text in figures and tables."""


@dataclass(frozen=True)
class SupernetInfo:
    """State and results of one supernet of the sweep."""

    name: str
    settings: tuple[tuple[str, ParamValue], ...]
    """Its values of the settings that the sweep varies."""
    state: SupernetState
    reason: str = ""
    """Why it was stopped or failed."""
    reports: tuple[tuple[int, float], ...] = ()
    """(epoch, hypervolume of its static sub-networks on val) as training reported them."""
    epochs: int = 0
    """Epochs of a complete training."""
    static_hypervolume: float | None = None
    """Hypervolume of the finished supernet's static sub-networks, in the objectives' units; None
    before it is measured."""
    choice_madds: float | None = None
    """MAdds that were spent to choose its sub-networks; None if unknown."""
    training_madds: float | None = None
    """MAdds of its own training; None if unknown."""
    num_trials: int = 0
    num_failed: int = 0
    """Trials that failed."""
    static: tuple[StaticPoint, ...] = ()
    """Its sub-networks on the split on which the front was chosen, by rising cost."""
    reported_static: tuple[StaticPoint, ...] = ()
    """The same on the sealed split, if its gates ran there."""
    chosen: tuple[DynamicPoint, ...] = ()
    """Its gates on the split on which the front was chosen; `is_front` refers to the front over all
    supernets."""
    reported: tuple[DynamicPoint, ...] = ()
    """Its gates that ran on the sealed split."""
    link: str | None = None
    """Path of its own report, relative to the page."""

    @property
    def num_front(self) -> int:
        """Number of its gates on the front over all supernets."""
        return sum(point.is_front for point in self.chosen)

    @property
    def short_name(self) -> str:
        """Its name without the digits of its key: s0-3fa29c01 -> s0."""
        return self.name.partition("-")[0]

    @property
    def label(self) -> str:
        """Its short name with its settings, where they are short: `s0 (uniform, lr 0.1)`."""
        return with_settings(self.short_name, dict(self.settings))


@dataclass(frozen=True)
class SupernetsInfo:
    """All supernets of a sweep, in the order in which they were drawn."""

    supernets: tuple[SupernetInfo, ...]
    num_chosen_images: int
    num_reported_images: int = 0
    """Number of images of the sealed split; 0 before anything ran on it."""
    chosen_split: str = "val"
    reported_split: str = "test"

    @property
    def num_front(self) -> int:
        """Number of gates on the front over all supernets."""
        return sum(supernet.num_front for supernet in self.supernets)


@dataclass(frozen=True)
class SupernetsReport:
    """Content of the report of a sweep of supernets."""

    run_name: str
    status: Literal["running", "stopped", "complete", "failed"]
    created: str
    data_name: str
    model: str
    info: SupernetsInfo
    headline: Headline = field(default_factory=Headline)
    """The gates of the front over all supernets; rows are named `supernet/trial`."""
    scheduler: str = "none"
    """Name of the scheduler that may stop supernets; `none` trains all of them to their end."""
    num_test_openings: int = 0
    objectives: tuple[str, ...] = ("top1", "madds_m")
    notes: tuple[str, ...] = ()
    commands: tuple[tuple[str, str], ...] = ()
    """(description, command)."""
    facts: tuple[tuple[str, str], ...] = ()
    """Seeds, hashes, versions, hardware: (name, value)."""


def supernets_front(info: SupernetsInfo) -> FrontInfo:
    """The points of all supernets as one front, for a picture that does not distinguish
    supernets."""
    supernets = info.supernets
    chosen = FrontPanel(
        split=info.chosen_split,
        num_images=info.num_chosen_images,
        static=tuple(point for supernet in supernets for point in supernet.static),
        static_line=Curve(),
        dynamic=tuple(point for supernet in supernets for point in supernet.chosen),
    )
    reported = FrontPanel(
        split=info.reported_split,
        num_images=info.num_reported_images,
        static=tuple(point for supernet in supernets for point in supernet.reported_static),
        static_line=Curve(),
        dynamic=tuple(point for supernet in supernets for point in supernet.reported),
    )
    return FrontInfo(chosen=chosen, reported=reported if info.num_reported_images else None)


def supernets_figure(info: SupernetsInfo) -> go.Figure:
    """Figure of top-1 (%) against mean MAdds (M), with a colour and symbol per supernet.

    Marks are filled for gates on the front over all supernets, faint for other trials and open for
    static sub-networks.
    """
    is_paired = info.num_reported_images > 0
    titles = [f"{info.chosen_split} (n = {info.num_chosen_images:,}): the front was chosen here"]
    if is_paired:
        titles.append(f"{info.reported_split} (n = {info.num_reported_images:,}): as reported")
    figure = make_subplots(
        rows=1,
        cols=len(titles),
        shared_yaxes=True,
        horizontal_spacing=0.04,
        subplot_titles=[plain(title) for title in titles],
    )
    figure.update_annotations(font={"size": 14, "color": INK})
    for index, supernet in enumerate(info.supernets):
        colour, symbol = _colour_and_symbol(index)
        traces = [
            (1, _static_trace(supernet, supernet.static, colour, symbol, info.chosen_split)),
            (1, _others_trace(supernet, colour, symbol, info.chosen_split)),
            (1, _front_trace(supernet, supernet.chosen, colour, symbol, info.chosen_split)),
        ]
        if is_paired:
            split = info.reported_split
            traces.append((2, _static_trace(supernet, supernet.reported_static, colour, symbol, split)))
            traces.append((2, _front_trace(supernet, supernet.reported, colour, symbol, split)))
        for column, trace in traces:
            if trace.x:
                is_first = trace.name not in {drawn.name for drawn in figure.data}
                figure.add_trace(
                    trace.update(legendgroup=trace.name, showlegend=is_first and trace.showlegend is not False),
                    row=1,
                    col=column,
                )
    if not figure.data:
        note(figure, "no supernet has been measured yet")
    figure.update_xaxes(title_text="mean MAdds per image (M)", matches="x")
    figure.update_yaxes(title_text="top-1 accuracy (%)", col=1)
    subtitle = (
        f"{plural(info.num_front, 'gate')} on one front over {plural(len(info.supernets), 'supernet')}, chosen on "
        f"{info.chosen_split}\nfilled: on the front; faint: other trials; lines: static sub-networks of each supernet"
    )
    return dressed(figure, "One front over all supernets", subtitle, height_px=620)


def _colour_and_symbol(index: int) -> tuple[str, str]:
    """Colour and symbol of a supernet; there are 8 x 8 combinations before they repeat."""
    return SERIES[index % len(SERIES)], SYMBOLS[(index + index // len(SERIES)) % len(SYMBOLS)]


def _static_trace(
    supernet: SupernetInfo, points: Sequence[StaticPoint], colour: str, symbol: str, split: str
) -> go.Scatter:
    return go.Scatter(
        x=[point.madds_m for point in points],
        y=[100 * point.top1 for point in points],
        name=f"{plain(supernet.label)}: static",
        mode="lines+markers",
        line={"color": colour, "width": 1.2, "dash": "dot"},
        marker={"color": colour, "symbol": f"{symbol}-open", "size": 7},
        text=[_hover(supernet, point, split) for point in points],
        hoverinfo="text",
    )


def _others_trace(supernet: SupernetInfo, colour: str, symbol: str, split: str) -> go.Scatter:
    points = [point for point in supernet.chosen if not point.is_front]
    return go.Scatter(
        x=[point.madds_m for point in points],
        y=[100 * point.top1 for point in points],
        name=f"{plain(supernet.label)}: other trials",
        showlegend=False,
        mode="markers",
        marker={"color": colour, "symbol": symbol, "size": 6, "opacity": 0.22},
        text=[_hover(supernet, point, split) for point in points],
        hoverinfo="text",
    )


def _front_trace(
    supernet: SupernetInfo, points: Sequence[DynamicPoint], colour: str, symbol: str, split: str
) -> go.Scatter:
    points = [point for point in points if point.is_front]
    ends = [point.interval or (point.top1, point.top1) for point in points]
    return go.Scatter(
        x=[point.madds_m for point in points],
        y=[100 * point.top1 for point in points],
        name=f"{plain(supernet.label)}: on the front",
        mode="markers",
        marker={"color": colour, "symbol": symbol, "size": 11, "line": {"color": "white", "width": 1}},
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [100 * (high - point.top1) for point, (_, high) in zip(points, ends, strict=True)],
            "arrayminus": [100 * (point.top1 - low) for point, (low, _) in zip(points, ends, strict=True)],
            "color": colour,
            "thickness": 1,
            "width": 3,
        },
        text=[_hover(supernet, point, split) for point in points],
        hoverinfo="text",
    )


def _hover(supernet: SupernetInfo, point: StaticPoint | DynamicPoint, split: str) -> str:
    lines = [f"<b>{plain(supernet.name)}/{plain(point.name)}</b> on {plain(split)}"]
    lines += [f"{plain(key)} = {plain(value_text(value))}" for key, value in supernet.settings]
    if isinstance(point, DynamicPoint):
        lines.append(plain(router_name(point.router)))
    lines += [f"top-1 {percent(point.top1)}", f"{point.madds_m:.4g} M MAdds"]
    return "<br>".join(lines)


def reports_figure(info: SupernetsInfo) -> go.Figure:
    """Figure of the hypervolume that each supernet reported during training, by which the scheduler
    may stop it."""
    figure = go.Figure()
    for index, supernet in enumerate(info.supernets):
        colour, symbol = _colour_and_symbol(index)
        if not supernet.reports:
            continue
        epochs = [epoch for epoch, _ in supernet.reports]
        is_stopped = supernet.state in ("stopped", "failed")
        figure.add_trace(
            go.Scatter(
                x=epochs,
                y=[value for _, value in supernet.reports],
                name=f"{plain(supernet.label)}, {STATE_WORDS[supernet.state]}",
                mode="lines+markers",
                line={"color": colour, "width": 1.8, "dash": "dash" if is_stopped else "solid"},
                marker={
                    "color": colour,
                    "symbol": ["x" if is_stopped and epoch == epochs[-1] else symbol for epoch in epochs],
                    "size": [11 if is_stopped and epoch == epochs[-1] else 7 for epoch in epochs],
                },
                hovertemplate=f"{plain(supernet.name)}<br>epoch %{{x}}: %{{y:.4g}}<extra></extra>",
            )
        )
    if not figure.data:
        note(figure, "no supernet has reported yet")
    figure.update_xaxes(title_text="epoch")
    figure.update_yaxes(title_text="static hypervolume")
    subtitle = f"of the static sub-networks, on {info.chosen_split}; a cross marks where training was stopped"
    return dressed(figure, "Training of the supernets", subtitle, height_px=MIN_HEIGHT_PX)


def supernets_table(info: SupernetsInfo) -> str:
    """HTML table with one row per supernet: settings, state, epochs, cost of the choice of its
    sub-networks and of its training, static hypervolume, trials, share of the front."""
    keys = list(dict.fromkeys(key for supernet in info.supernets for key, _ in supernet.settings))
    heads = [("Supernet", ""), *((key.removeprefix("supernet."), "") for key in keys), ("State", "")]
    numbers = ("Epochs", "Sub-networks (MAdds)", "Training (MAdds)", "Static hypervolume", "Trials", "On the front")
    heads += [(name, "number") for name in numbers]
    head = "".join(f'<th class="{kind}" scope="col">{escape(name)}</th>' for name, kind in heads)
    body = "".join(_table_row(supernet, keys, info.num_front) for supernet in info.supernets)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _table_row(supernet: SupernetInfo, keys: Sequence[str], num_front: int) -> str:
    settings = dict(supernet.settings)
    name = escape(supernet.name)
    if supernet.link is not None:
        name = f'<a href="{escape(supernet.link, quote=True)}">{name}</a>'
    reason = f'<span class="sub">{escape(supernet.reason)}</span>' if supernet.reason else ""
    share = f" ({percent(supernet.num_front / num_front, 0)})" if num_front else ""
    failed = f", {supernet.num_failed} failed" if supernet.num_failed else ""
    values = [value_text(settings[key]) if key in settings else "–" for key in keys]
    numbers = [
        _epochs(supernet),
        _madds(supernet.choice_madds),
        _madds(supernet.training_madds),
        "–" if supernet.static_hypervolume is None else significant(supernet.static_hypervolume),
        f"{supernet.num_trials}{failed}",
        f"{supernet.num_front}{share}",
    ]
    cells = f'<td class="name-cell">{name}</td>' + "".join(f"<td>{escape(value)}</td>" for value in values)
    cells += f"<td>{escape(STATE_WORDS[supernet.state])}{reason}</td>"
    cells += "".join(f'<td class="number">{escape(text)}</td>' for text in numbers)
    return f"<tr>{cells}</tr>"


def _madds(spent: float | None) -> str:
    return "–" if spent is None else prefixed(spent) if spent else "0"


def _epochs(supernet: SupernetInfo) -> str:
    if supernet.state == "trained":
        return str(supernet.epochs)
    reached = supernet.reports[-1][0] if supernet.reports else 0
    return f"{reached} of {supernet.epochs}" if supernet.epochs else "–"


def build_supernets_report(data: SupernetsReport) -> str:
    """Build the report as one self-contained HTML document."""
    info = data.info
    figure_caption = (
        "The gates of all supernets form one front; colour and symbol show the supernet of a point. The report of each supernet "
        "has its controls: the static line, random routing, the cascade, the reachable curve and the oracle. Sub-networks (MAdds) is "
        "the compute that was spent to choose a supernet's sub-networks, Training (MAdds) that of its training."
    )
    training_caption = "The settings of all supernets are drawn before training. "
    if data.scheduler == "none":
        training_caption += "Each is trained to its end, because the sweep has no scheduler."
    else:
        training_caption += (
            f"During training the scheduler {data.scheduler} compares the hypervolumes of their static sub-networks at equal epochs "
            "and stops the worse ones. A stopped supernet has no gates."
        )
    figure = chart("supernets", supernets_figure(info), is_wide=info.num_reported_images > 0)
    sections = [
        _notes(data),
        headline_section(data.headline),
        _section("The front", figure_caption, figure + supernets_table(info)),
        _section("Training", training_caption, chart("reports", reports_figure(info))),
        _commands(data),
    ]
    footer = f"<h2>Reproducibility</h2>{definition_list(data.facts)}" if data.facts else ""
    return page(f"{data.run_name} · dsnet-orch", _header(data), "\n".join(filter(None, sections)), footer)


def _header(data: SupernetsReport) -> str:
    supernets = data.info.supernets
    num_trained = sum(supernet.state == "trained" for supernet in supernets)
    num_trials = sum(supernet.num_trials for supernet in supernets)
    facts = (
        f"{data.model} on {data.data_name} · {plural(len(supernets), 'supernet')}, {num_trained} trained · "
        f"{plural(num_trials, 'trial')} · status {data.status} · {data.created}"
    )
    return f'<h1>{escape(data.run_name)}</h1>\n<p class="lead">{escape(facts)}</p>'


def _notes(data: SupernetsReport) -> str:
    notes = list(data.notes)
    headline = data.headline
    if headline.rows and not headline.is_verified:
        notes.append(
            f"Not verified yet: all accuracies are from {data.info.chosen_split}, on which the routers were also chosen, and are "
            "therefore optimistic."
        )
    if data.num_test_openings > 1:
        notes.append(
            f"{data.info.reported_split} was read {data.num_test_openings} times: results of choices made after the first "
            "time are optimistic."
        )
    if set(data.objectives) != {"top1", "madds_m"}:
        notes.append(
            f"The front was chosen by {' and '.join(data.objectives)}; the figure shows top-1 against mean MAdds."
        )
    if not notes:
        return ""
    return '<div class="notes" role="note"><ul>' + "".join(f"<li>{escape(text)}</li>" for text in notes) + "</ul></div>"


def _section(title: str, caption: str, content: str) -> str:
    return f"<section><h2>{title}</h2>\n<p class='muted'>{escape(caption)}</p>\n{content}</section>"


def _commands(data: SupernetsReport) -> str:
    if not data.commands:
        return ""
    content = "".join(f"<p>{escape(what)}</p><pre>{escape(command)}</pre>" for what, command in data.commands)
    return f"<section><h2>Next steps</h2>{content}</section>"
