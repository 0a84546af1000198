"""The headline section of a report: cards for the knee, and a table of the front with its controls.

Accuracies are fractions in the data and percent on the page, costs are millions of MAdds per image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import Final

from dashboards.theme import SIGN_KINDS, metric_value, percent, router_name, significant
from dsnet.metrics import metric_noun
from dsnet.wording import signed
from search.front.statistics import significant_sign

NOT_VERIFIED: Final = "not verified yet"
MAX_TIES: Final = 2
"""Maximum number of ties that a cell names; the others are counted."""


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval over images, as fractions; NaN bounds: no interval yet."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Latency:
    """Measured latency of a router's batch and of static ones, same device and batch size."""

    batch_size: int
    median_ms: float
    """Latency of the router."""
    widest_ms: float
    """Latency of the widest static sub-network."""
    cheapest_ms: float
    """Latency of the cheapest static sub-network; widest_ms / cheapest_ms is the ceiling of any
    speed-up."""

    @property
    def speedup(self) -> float:
        return self.widest_ms / self.median_ms

    @property
    def ceiling(self) -> float:
        return self.widest_ms / self.cheapest_ms


@dataclass(frozen=True)
class Scores:
    """Scores of a router or a static sub-network on one split, with the controls of a router."""

    top1: Estimate
    madds_m: float
    """Mean MAdds per image, in millions."""
    gain: Estimate | None = None
    """Top-1 minus that of the static line at the same mean MAdds, paired over images; None for the
    baseline, and outside the range of the static line."""
    random_top1: float | None = None
    """Top-1 of random routing with the same route histogram."""
    cascade_top1: float | None = None
    """Top-1 of a confidence cascade whose threshold is set on `val` to the same budget; None if it
    cannot be so cheap."""
    oracle_top1: float | None = None
    """Top-1 of the oracle at the same mean MAdds."""
    cascade_madds_m: float | None = None
    """Mean MAdds of that cascade on this split, in millions."""
    oracle_share: float | None = None
    """Gain as a share of the gap from the static line to the oracle; None where the gap is within
    its noise."""
    stability: float | None = None
    """Share of resamples in which no other router of the front dominates it; not a p-value."""
    reachable_top1: float | None = None
    """Top-1 at the same mean MAdds of the best router found that sees every route's output."""
    reachable_share: float | None = None
    """Gain as a share of the gap from the static line to `reachable_top1`; None where the gap is
    within its noise."""
    is_cascade_collapsed: bool = False
    """Whether that cascade runs its second route for no image or for all."""
    ties: tuple[str, ...] = ()
    """Names of the routers from which the images cannot distinguish it."""
    over_widest: Estimate | None = None
    """Top-1 minus that of the widest static sub-network, paired over images; None for the baseline,
    and if it is unknown."""


@dataclass(frozen=True)
class Row:
    """One line of the headline table."""

    name: str
    chosen: Scores
    """Scores on the split on which the front was chosen (val)."""
    reported: Scores | None = None
    """Scores on the sealed split (test); None before verification."""
    latency: Latency | None = None
    max_route_share: float | None = None
    """Share of the images, 0..1, that take the most frequent route."""
    is_collapsed: bool = False
    """Whether one route answers (nearly) all images, as a static sub-network would."""
    router: str | None = None
    """Kind of router; None for a static sub-network."""
    further: tuple[tuple[str, float], ...] = ()
    """Objectives beside top-1 and MAdds: (metric, value on the split on which the front was
    chosen)."""
    further_reported: tuple[tuple[str, float], ...] = ()
    """The objectives of `further` with a known value on the sealed split: (metric, value)."""
    supernet: str | None = None
    """Its supernet, in a sweep of several supernets."""

    @property
    def shown(self) -> Scores:
        """The reported scores if there are any, else those on the split on which the front was
        chosen."""
        return self.reported or self.chosen


@dataclass(frozen=True)
class Headline:
    """Content of the headline section."""

    baseline: Row | None = None
    """The widest static sub-network that routers may choose (determined on val)."""
    rows: tuple[Row, ...] = ()
    """The routers of the front, cheapest first."""
    knee: str | None = None
    """Name of the front's knee, one of `rows`."""
    optimism: Estimate | None = None
    """Mean top-1 of the rows on `chosen_split` minus that on `reported_split`, unpaired; None
    before verification."""
    warnings: tuple[str, ...] = ()
    """Sentences that put the cards into question, e.g. that a static sub-network is better than the
    knee; shown above them."""
    chosen_split: str = "val"
    reported_split: str = "test"

    @property
    def is_verified(self) -> bool:
        return any(row.reported is not None for row in self.rows)


def headline_section(headline: Headline) -> str:
    """HTML of the cards and the table; without a router only the table with the baseline."""
    table = _table(headline) if headline.baseline or headline.rows else ""
    if not headline.rows:
        return f'<section><p class="empty">No router on the front yet.</p>{table}</section>'
    return f"<section>{_warnings(headline)}{_cards(headline)}{_optimism(headline)}{table}{_table_legend(headline)}</section>"


def _warnings(headline: Headline) -> str:
    if not headline.warnings:
        return ""
    return f'<div class="notes" role="note">{"<br>".join(map(escape, headline.warnings))}</div>'


def _optimism(headline: Headline) -> str:
    """A paragraph about the mean optimism of the split on which the front was chosen."""
    found = headline.optimism
    if found is None:
        return ""
    rows = "the router" if len(headline.rows) == 1 else f"the {len(headline.rows)} routers"
    text = (
        f"Optimism: top-1 on {headline.chosen_split}, on which the front was chosen, minus top-1 on {headline.reported_split} is "
        f"{signed(100 * found.value)} points in the mean of {rows} of the table (95 %: {_signed_interval(found)}). The two splits "
        "share no image, so the means are resampled separately and their intervals are combined as those of independent values."
    )
    return f"<p>{escape(text)}</p>"


def _cards(headline: Headline) -> str:
    row = next((r for r in headline.rows if r.name == headline.knee), headline.rows[0])
    role = "knee" if row.name == headline.knee else "cheapest router"
    split = headline.reported_split if row.reported else headline.chosen_split
    top1 = row.shown.top1
    cards = [
        _card(f"Top-1 on {split}, {role}", percent(top1.value), [f"95 %: {_interval(top1)}", *_shrinkage(row)]),
        _card("Gain over the static line", *_gain_lines(row.shown.gain)),
        _card("Mean MAdds per image", _millions(row.shown.madds_m), _saving_lines(row, headline.baseline)),
        _card("Measured speed-up", *_latency_lines(row.latency)),
    ]
    return f'<div class="cards">{"".join(cards)}</div>'


def _card(name: str, value: str, beside: list[str]) -> str:
    lines = "<br>".join(escape(line) for line in beside)
    return (
        f'<div class="card"><div class="name">{escape(name)}</div><div class="value">{escape(value)}</div>'
        f'<div class="beside">{lines}</div></div>'
    )


def _interval(estimate: Estimate) -> str:
    if math.isnan(estimate.low):
        return "no interval yet"
    return f"{100 * estimate.low:.1f} to {100 * estimate.high:.1f}"


def _signed_interval(estimate: Estimate) -> str:
    if math.isnan(estimate.low):
        return "no interval yet"
    return f"{signed(100 * estimate.low)} to {signed(100 * estimate.high)}"


def _millions(madds_m: float) -> str:
    return f"{significant(madds_m)}\N{NO-BREAK SPACE}M"


def _shrinkage(row: Row) -> list[str]:
    if row.reported is None:
        return [NOT_VERIFIED]
    change = 100 * (row.reported.top1.value - row.chosen.top1.value)
    return [f"{percent(row.chosen.top1.value)} when it was chosen ({signed(change)} points)"]


def _gain_lines(gain: Estimate | None) -> tuple[str, list[str]]:
    if gain is None:
        return "unknown", ["below the cost of the cheapest sub-network"]
    return f"{signed(100 * gain.value)} points", [f"95 %: {_signed_interval(gain)}, paired", verdict(gain)]


def verdict(gain: Estimate) -> str:
    """The conclusion that the paired interval allows, in words."""
    sign = significant_sign(gain.low, gain.high)
    if sign == 0:
        return "no significant difference"
    return f"{'better' if sign > 0 else 'worse'} than the static line"


def _saving_lines(row: Row, baseline: Row | None) -> list[str]:
    widest = _same_split(row, baseline)
    if widest is None:
        return ["no static baseline on this split"]
    saved = 1 - row.shown.madds_m / widest.madds_m
    side = "below" if saved >= 0 else "above"
    change = 100 * (row.shown.top1.value - widest.top1.value)
    found = row.shown.over_widest
    interval = "" if found is None else f" (95 %: {_signed_interval(found)}, paired)"
    return [
        f"{percent(abs(saved), 0)} {side} the widest static ({_millions(widest.madds_m)}),",
        f"which has {percent(widest.top1.value)} top-1: {signed(change)} points for the router{interval}",
    ]


def _same_split(row: Row, baseline: Row | None) -> Scores | None:
    """The baseline's scores on the split of `row.shown`, since numbers of different splits must not
    be subtracted."""
    if baseline is None:
        return None
    return baseline.chosen if row.reported is None else baseline.reported


def _latency_lines(latency: Latency | None) -> tuple[str, list[str]]:
    if latency is None:
        return "not measured", ["the verify stage measures latency"]
    return f"{latency.speedup:.2f}x", [
        f"at most {latency.ceiling:.2f}x, with the cheapest static alone",
        f"{significant(latency.median_ms)} ms instead of {significant(latency.widest_ms)} ms, batch size {latency.batch_size},",
        "timed by the verify stage",
    ]


def _table(headline: Headline) -> str:
    heads = [
        ("Router", ""),
        (f"Top-1 {headline.chosen_split} (%)", "number"),
        (f"Top-1 {headline.reported_split} (%)", "number"),
        (_madds_head(headline), "number"),
        ("Gain over static line (points)", "number"),
        ("Controls at the same budget (%)", "number"),
        ("Latency (ms), speed-up (maximum)", "number"),
    ]
    head = "".join(f'<th class="{kind}" scope="col">{escape(name)}</th>' for name, kind in heads)
    rows = [] if headline.baseline is None else [_table_row(headline.baseline, headline, is_baseline=True)]
    rows += [_table_row(row, headline, is_baseline=False) for row in headline.rows]
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="scroll"><table class="wide">{body}</table></div>'


def _madds_head(headline: Headline) -> str:
    splits = f", {headline.chosen_split} → {headline.reported_split}" if headline.is_verified else ""
    return f"Mean MAdds (M){splits}"


def _madds_cell(row: Row, headline: Headline) -> str:
    value = significant(row.shown.madds_m)
    if row.reported is not None:
        value = f"{significant(row.chosen.madds_m)} → {value}"
    beside = [_share_of(row, headline.baseline)]
    reported = dict(row.further_reported)
    for name, number in row.further:
        chosen = metric_value(name, number, significant)
        text = f"{chosen} on {headline.chosen_split}"
        if name in reported:
            text = f"{chosen} → {metric_value(name, reported[name], significant)}"
        beside += [metric_noun(name), text]  # in two lines: the table must not become wider than the page
    return _number(value, *beside)


def _table_row(row: Row, headline: Headline, is_baseline: bool) -> str:
    kind = "baseline" if is_baseline else "knee" if row.name == headline.knee else ""
    cells = [
        f'<td class="name-cell">{_name_cell(row, headline, is_baseline)}</td>',
        _number(f"{100 * row.chosen.top1.value:.1f}", _interval(row.chosen.top1), *_rank_lines(row.chosen)),
        _reported_cell(row),
        _madds_cell(row, headline),
        _number("baseline", "widest static") if is_baseline else _gain_cell(row.shown),
        _number("") if is_baseline else _controls_cell(row.shown),
        _latency_cell(row.latency),
    ]
    return f'<tr class="{kind}">{"".join(cells)}</tr>'


def _number(value: str, *beside: str, kind: str = "") -> str:
    value = f'<span class="{kind}">{escape(value)}</span>' if kind else escape(value)
    return f'<td class="number">{value}{"".join(_sub(line) for line in beside)}</td>'


def _sub(line: str) -> str:
    return f'<span class="sub">{escape(line)}</span>'


def _name_cell(row: Row, headline: Headline, is_baseline: bool) -> str:
    badges = ""
    if row.name == headline.knee and not is_baseline:
        badges += '<span class="badge">knee</span>'
    if row.is_collapsed:
        badges += '<span class="badge bad">collapsed</span>'
    sub = "" if row.router is None else _sub(router_name(row.router))
    if row.supernet is not None:
        sub += _sub(f"supernet {row.supernet}")
    if row.max_route_share is not None:
        sub += _sub(f"largest route {percent(row.max_route_share, 0)}")
    return f"{escape(row.name)}{badges}{sub}"


def _reported_cell(row: Row) -> str:
    if row.reported is None:
        return _number("–", NOT_VERIFIED)
    return _number(f"{100 * row.reported.top1.value:.1f}", _interval(row.reported.top1), *_rank_lines(row.reported))


def _rank_lines(scores: Scores) -> list[str]:
    """Lines on how certain a router's rank is: its stability on the front, its ties."""
    lines = [] if scores.stability is None else [f"on the front in {percent(scores.stability, 0)}"]
    if not scores.ties:
        return lines
    named = list(scores.ties[:MAX_TIES])
    more = [f"and {len(scores.ties) - MAX_TIES} more"] if len(scores.ties) > MAX_TIES else []
    # One line each, so that the column stays as narrow as an interval.
    return [*lines, f"tied: {named[0]}", *named[1:], *more]


def _share_of(row: Row, baseline: Row | None) -> str:
    widest = _same_split(row, baseline)
    return "" if widest is None else f"{percent(row.shown.madds_m / widest.madds_m, 0)} of widest"


def _gain_cell(scores: Scores) -> str:
    gain = scores.gain
    if gain is None:
        return _number("–", "outside the static line")
    kind = SIGN_KINDS[significant_sign(gain.low, gain.high)]
    beside = [_signed_interval(gain)]
    shares = (
        ("reachable", scores.reachable_share, scores.reachable_top1),
        ("oracle", scores.oracle_share, scores.oracle_top1),
    )
    for name, share, limit in shares:
        if share is not None:
            beside.append(f"{percent(share, 0)} of the {name} gap")
        elif limit is not None:
            beside.append(f"{name} gap within noise")
    if scores.over_widest is not None:
        over = scores.over_widest
        beside.append(f"over the widest: {signed(100 * over.value)} ({_signed_interval(over)})")
    return _number(signed(100 * gain.value), *beside, kind=kind)


def _controls_cell(scores: Scores) -> str:
    spent = "" if scores.cascade_madds_m is None else f" at {_millions(scores.cascade_madds_m)}"
    collapsed = " (collapsed)" if scores.is_cascade_collapsed else ""
    named = (
        ("random", scores.random_top1, ""),
        ("cascade", scores.cascade_top1, spent + collapsed),
        ("reachable", scores.reachable_top1, ""),
        ("oracle", scores.oracle_top1, ""),
    )
    return _number("", *(f"{name} {'–' if top1 is None else f'{100 * top1:.1f}{at}'}" for name, top1, at in named))


def _latency_cell(latency: Latency | None) -> str:
    if latency is None:
        return _number("–", "not measured")
    bound = f"{latency.speedup:.2f}x ({latency.ceiling:.2f}x)"
    return _number(significant(latency.median_ms), bound, f"batch {latency.batch_size}")


def _table_legend(headline: Headline) -> str:
    split = headline.reported_split if headline.is_verified else headline.chosen_split
    intervals = "bootstrap intervals over images" if headline.is_verified else "intervals over images (Wilson's)"
    text = (
        f"Numbers in small type are 95 % {intervals}. Gain and controls are measured on {split}. "
        "The gain is top-1 minus that of a random mix of two static sub-networks with the same mean MAdds, paired over images; "
        f"green and red mark gains whose interval excludes 0{_chance(headline)}. 'On the front in' is the share of resamples in "
        "which no other router of the table dominates this one. Two routers are tied if the paired interval of their "
        "difference in top-1 includes 0 and their mean MAdds differ by at most 1 %. Shares of a gap are left out where the gap is "
        "within its noise. All intervals are conditional on one trained supernet."
    )
    if any(row.latency is not None for row in headline.rows):
        text += (
            " The verify stage timed the gates and the two static sub-networks of the latencies here together; it is another timing than "
            "that of the measure stage, which is shown with the static sub-networks, and the times of the two may differ."
        )
    if any(row.is_collapsed for row in headline.rows):
        text += (
            " Collapsed: one route answers more than 99 % of the images, so that the router only adds its own cost to that static "
            "sub-network."
        )
    if any(row.shown.is_cascade_collapsed for row in headline.rows):
        text += (
            " A collapsed cascade, among the controls, runs its second route for nearly all images or for nearly none."
        )
    return f'<p class="sub">{escape(text)}</p>'


def _chance(headline: Headline) -> str:
    """A remark on how many intervals exclude 0, and how many would by chance."""
    gains = [row.shown.gain for row in headline.rows if row.shown.gain is not None]
    known = [gain for gain in gains if not math.isnan(gain.low)]
    if not known:
        return ""
    num_clear = sum(significant_sign(gain.low, gain.high) != 0 for gain in known)
    return f" ({num_clear} of {len(known)} here; about {0.05 * len(known):.1g} expected by chance)"
