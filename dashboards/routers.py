"""Figure and table of the kinds of routers at a few budgets: gains over the static line and shares
of the possible gain."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

import plotly.graph_objects as go

from dashboards.theme import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    SIGN_KINDS,
    SKY,
    VERMILION,
    dressed,
    note,
    percent,
    plain,
    router_name,
    router_symbol,
    significant,
)
from dsnet.wording import signed
from search.front.statistics import significant_sign

COLOURS = (BLUE, GREEN, ORANGE, SKY, INK, MUTED)
"""Colours of the kinds; those of the two limits are not among them."""
SPREAD = 0.6
"""Share of the distance between two budgets over which the kinds are placed side by side."""


@dataclass(frozen=True)
class RouterResult:
    """The best trial of a kind of router at a budget; accuracies are fractions."""

    router: str
    """Kind of router."""
    budget_share: float
    """The budget as a share of the range of MAdds."""
    name: str
    """Name of the trial."""
    madds_m: float
    """Mean MAdds per image on the split, in millions."""
    top1: float
    static_top1: float | None
    """Top-1 of the static line at `madds_m`; None outside its range."""
    reachable_top1: float | None
    """Top-1 of the reachable curve at `madds_m`."""
    oracle_top1: float | None
    """Top-1 of the oracle at `madds_m`."""
    gain: tuple[float, float, float] | None
    """Gain over the static line: value, and lower and upper end of its 95 % interval."""
    reachable_share: float | None
    """Gain as a share of the gap from the static line to the reachable curve; None where the gap is
    within its noise."""
    oracle_share: float | None
    """Gain as a share of the gap from the static line to the oracle; None where the gap is within
    its noise."""
    is_collapsed: bool = False


@dataclass(frozen=True)
class RoutersInfo:
    """Results of all kinds of routers in a sweep, on one split."""

    split: str
    num_images: int
    results: tuple[RouterResult, ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of routers in order of first appearance."""
        return tuple(dict.fromkeys(result.router for result in self.results))

    @property
    def budget_shares(self) -> tuple[float, ...]:
        """Budgets as shares of the range of MAdds, rising."""
        return tuple(sorted({result.budget_share for result in self.results}))


def routers_figure(info: RoutersInfo) -> go.Figure:
    """Figure of the gain over the static line (points) by budget, with the kinds side by side.

    Dashes show the possible gain at the same cost, for the reachable curve and the oracle.
    """
    figure = go.Figure()
    figure.add_hline(y=0, line={"color": MUTED, "width": 1})
    for index, kind in enumerate(info.kinds):
        own = [result for result in info.results if result.router == kind and result.gain is not None]
        figure.add_trace(
            go.Scatter(
                x=[_place(info, result) for result in own],
                y=[100 * result.gain[0] for result in own if result.gain],
                name=plain(router_name(kind)),
                mode="markers",
                marker={"color": COLOURS[index % len(COLOURS)], "symbol": router_symbol(kind), "size": 10},
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": [100 * (r.gain[2] - r.gain[0]) for r in own if r.gain],
                    "arrayminus": [100 * (r.gain[0] - r.gain[1]) for r in own if r.gain],
                    "thickness": 1.2,
                    "width": 3,
                },
                text=[_hover(result) for result in own],
                hoverinfo="text",
            )
        )
    for name, field, colour in (("reachable", "reachable_top1", VERMILION), ("oracle", "oracle_top1", PURPLE)):
        figure.add_trace(_limit_trace(info, f"{name} at the same cost", field, colour))
    if not info.results:
        note(figure, "no router has a trial within a budget yet")
    shares = info.budget_shares
    figure.update_xaxes(
        tickvals=list(range(len(shares))),
        ticktext=[percent(share, 0) for share in shares],
        range=[-0.5, max(len(shares), 1) - 0.5],
        title_text="budget, as a share of the range of MAdds",
        showgrid=False,
        tickfont={"color": INK},
    )
    figure.update_yaxes(title_text="gain over the static line (points)")
    subtitle = f"{info.split} (n = {info.num_images:,}); bars are 95 % intervals over images, paired"
    return dressed(figure, "Gain of each kind of router", subtitle)


def _place(info: RoutersInfo, result: RouterResult) -> float:
    shift = (info.kinds.index(result.router) + 0.5) / len(info.kinds) - 0.5
    return info.budget_shares.index(result.budget_share) + SPREAD * shift


def _limit_trace(info: RoutersInfo, name: str, field: str, colour: str) -> go.Scatter:
    """A dash for each router at the gain of a limit at its cost."""
    known = [
        (result, getattr(result, field) - result.static_top1)
        for result in info.results
        if getattr(result, field) is not None and result.static_top1 is not None
    ]
    return go.Scatter(
        x=[_place(info, result) for result, _ in known],
        y=[100 * gain for _, gain in known],
        name=name,
        mode="markers",
        marker={"color": colour, "symbol": "line-ew", "size": 16, "line": {"width": 2, "color": colour}},
        hovertemplate="%{y:+.1f} points<extra>" + name + "</extra>",
    )


def _hover(result: RouterResult) -> str:
    gain, low, high = result.gain or (0.0, 0.0, 0.0)
    return (
        f"<b>{plain(router_name(result.router))}</b>, {plain(result.name)}<br>top-1 {percent(result.top1)} at "
        f"{significant(result.madds_m)} M MAdds<br>{signed(100 * gain)} points "
        f"(95 %: {signed(100 * low)} to {signed(100 * high)})"
    )


def routers_table(info: RoutersInfo) -> str:
    """The same numbers as an HTML table with a row for each budget and kind."""
    heads = ["Budget", "Router", "Mean MAdds (M)", "Top-1 (%)", "Gain over static line (points)"]
    heads += ["Share of the reachable gap", "Share of the oracle gap", "Static, reachable, oracle (%)"]
    head = "".join(f'<th class="{"number" if k > 1 else ""}" scope="col">{h}</th>' for k, h in enumerate(heads))
    order = sorted(info.results, key=lambda r: (r.budget_share, info.kinds.index(r.router)))
    body = "".join(_row(result) for result in order)
    return f'<div class="scroll"><table class="wide"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _row(result: RouterResult) -> str:
    badge = '<span class="badge bad">collapsed</span>' if result.is_collapsed else ""
    limits = (result.static_top1, result.reachable_top1, result.oracle_top1)
    cells = [
        f"<td>{percent(result.budget_share, 0)}</td>",
        f'<td>{escape(router_name(result.router))}{badge}<span class="sub">{escape(result.name)}</span></td>',
        _number(significant(result.madds_m)),
        _number(f"{100 * result.top1:.1f}"),
        _gain(result),
        _number(_share(result.reachable_share, result.reachable_top1)),
        _number(_share(result.oracle_share, result.oracle_top1)),
        _number(" / ".join("–" if value is None else f"{100 * value:.1f}" for value in limits)),
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _gain(result: RouterResult) -> str:
    if result.gain is None:
        return _number("–")
    gain, low, high = result.gain
    kind = SIGN_KINDS[significant_sign(low, high)]
    interval = f'<span class="sub">{signed(100 * low)} to {signed(100 * high)}</span>'
    return f'<td class="number"><span class="{kind}">{signed(100 * gain)}</span>{interval}</td>'


def _share(share: float | None, limit: float | None) -> str:
    """A share of the gap to a limit, in percent; it may be negative, or above 100 % if a router is
    better than the reachable curve."""
    if share is None:
        return "–" if limit is None else "within noise"
    return percent(share, 0)


def _number(text: str) -> str:
    return f'<td class="number">{escape(text)}</td>'
