"""Frame of an offline HTML page: styles, plotly.js (once) and the data of charts.

The page's Content-Security-Policy forbids all connections, so that a part that needs the network
fails on every machine.
"""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from collections.abc import Iterable
from typing import Final

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

_HEADING = re.compile(r"<h2>(.*?)</h2>", re.DOTALL)

POLICY: Final = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)

STYLE: Final = """
:root { --ink: #1f2933; --muted: #5f6b7a; --line: #e1e5eb; --accent: #0072b2; --soft: #f6f8fa;
        --good: #00704f; --bad: #a84300; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; color: var(--ink); background: #fff; line-height: 1.5; font-size: 15px;
       font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main, header, footer { max-width: 1180px; margin: 0 auto; padding: 0 28px; }
header { padding-top: 36px; padding-bottom: 20px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 44px 0 6px; padding-top: 16px; border-top: 1px solid var(--line); }
p { margin: 0 0 12px; max-width: 80ch; }
nav ol { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 14px 0 0; padding: 0; font-size: 13.5px; }
nav a { color: var(--accent); text-decoration: none; }
nav a:hover { text-decoration: underline; }
.lead { color: var(--muted); margin: 0; }
.muted, .sub { color: var(--muted); }
.sub { display: block; font-size: 12.5px; line-height: 1.4; }
.cards { display: grid; grid-template-columns: repeat(4, 1fr); gap: 14px; margin: 8px 0 24px; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px; background: var(--soft); }
.card .name { font-size: 13px; color: var(--muted); }
.card .value { font-size: 26px; font-weight: 650; line-height: 1.3; font-variant-numeric: tabular-nums; }
.card .beside { font-size: 13px; line-height: 1.45; overflow-wrap: anywhere; }
.notes { border-left: 4px solid #e69f00; background: #fff8e8; padding: 10px 16px; margin: 0 0 20px;
         border-radius: 0 6px 6px 0; }
.notes ul { margin: 0; padding-left: 18px; }
.notes li { overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 8px 0 20px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-size: 12.5px; font-weight: 600; color: var(--muted); border-bottom: 2px solid var(--line);
     padding: 6px 12px 6px 0; vertical-align: bottom; }
td { border-bottom: 1px solid var(--line); padding: 8px 12px 8px 0; vertical-align: top; }
th.number, td.number { text-align: right; }
td.number, .name-cell { white-space: nowrap; }
tr.baseline td { background: var(--soft); }
tr.knee td:first-child { box-shadow: inset 3px 0 0 var(--accent); padding-left: 10px; }
.badge { display: inline-block; font-size: 11.5px; line-height: 1.5; padding: 0 7px; border-radius: 9px;
         margin-left: 5px; background: #e6f1f8; color: #00507e; white-space: nowrap; }
.badge.bad { background: #fdeee4; color: var(--bad); }
.good { color: var(--good); } .bad { color: var(--bad); }
.chart { width: 100%; margin: 8px 0 4px; }
.wide { min-width: 680px; }
.empty { border: 1px dashed #b8c0cc; border-radius: 8px; padding: 22px; color: var(--muted); text-align: center;
         max-width: none; }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: 6px; padding: 10px 14px; overflow-x: auto;
      font-size: 13px; margin: 4px 0 14px; white-space: pre-wrap; overflow-wrap: anywhere; }
footer { padding-top: 24px; padding-bottom: 48px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 18px; font-size: 13px; margin: 0; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 1000px) {
  .cards { grid-template-columns: repeat(2, 1fr); }
  table { font-size: 13.5px; } th, .sub { font-size: 12px; }
}
@media (max-width: 600px) {
  main, header, footer { padding-left: 16px; padding-right: 16px; }
  .card { padding: 10px 12px; } .card .value { font-size: 21px; }
}
@media print {
  @page { margin: 14mm; }
  body { font-size: 11px; }
  main, header, footer { max-width: none; padding-left: 0; padding-right: 0; }
  h2, h2 + p { break-after: avoid; } h2 { margin-top: 24px; }
  .modebar-container, nav { display: none; }
  .card .value { font-size: 18px; }
  .cards { grid-template-columns: repeat(4, 1fr); gap: 8px; }
  table, th { font-size: 10px; } .sub { font-size: 9px; }
  th, td { padding-right: 6px; }
  .scroll { overflow: visible; } .wide { min-width: 0; }
  .chart, .card, tr, pre, .notes { break-inside: avoid; }
}
"""

PLOTLY_MINUS: Final = 'MINUS_SIGN:"\\u2212"'
"""Plotly.js labels axes with this constant and has no option for another one; a page has the plain
hyphen-minus everywhere, so that its numbers can be searched."""

# Plotly's button "share chart", which uploads the chart's data to a public service, is switched
# off. A printed page is narrower than the window, so charts are redrawn before and after printing.
SCRIPT: Final = """
(function () {
  const slots = Array.from(document.querySelectorAll(".chart"));
  for (const slot of slots) {
    const figure = JSON.parse(document.getElementById(slot.id + "-data").textContent);
    Plotly.newPlot(slot, figure.data, figure.layout, {
      responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: "",
      modeBarButtonsToRemove: ["select2d", "lasso2d"]
    });
  }
  window.addEventListener("beforeprint", () => slots.forEach(s => Plotly.relayout(s, {width: 680})));
  window.addEventListener("afterprint", () => slots.forEach(s => Plotly.relayout(s, {width: null, autosize: true})));
})();
"""


def chart(key: str, figure: go.Figure, is_wide: bool = False) -> str:
    """HTML of one chart with its data.

    Args:
        key: identifier of the chart, unique in the page, [a-z0-9-]+.
        figure: the figure; its layout's height is kept, its width follows the page.
        is_wide: whether narrow screens scroll the chart instead of squeezing it, as for two panels
            side by side.
    """
    height_px = int(figure.layout.height or 460)
    kind = "chart wide" if is_wide else "chart"
    return (
        f'<div class="scroll"><div class="{kind}" id="chart-{key}" style="height:{height_px}px"></div></div>\n'
        f'<script type="application/json" id="chart-{key}-data">{_inert_json(figure)}</script>\n'
    )


def _inert_json(figure: go.Figure) -> str:
    """The figure's JSON, escaped so that no text in it can end the script element."""
    text = str(figure.to_json())
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def with_contents(body: str, footer: str) -> tuple[str, str, str]:
    """Give every second-level heading an anchor, and make the table of contents.

    Returns:
        (contents, body, footer); the contents are empty for a page with fewer than two headings.

    Raises:
        ValueError: two headings are equal.
    """
    titles = _HEADING.findall(body) + _HEADING.findall(footer)
    repeated = [title for title, number in Counter(titles).items() if number > 1]
    if repeated:
        raise ValueError(f"the page has two headings {repeated[0]!r}; a link to one of them would be ambiguous")
    links = "".join(f'<li><a href="#{_address(title)}">{title}</a></li>' for title in titles)
    contents = f'<nav aria-label="Contents"><ol>{links}</ol></nav>' if len(titles) > 1 else ""
    return contents, _addressed(body), _addressed(footer)


def _addressed(part: str) -> str:
    return _HEADING.sub(lambda found: f'<h2 id="{_address(found[1])}">{found[1]}</h2>', part)


def _address(title: str) -> str:
    words = re.sub(r"<[^>]*>|&[a-z]+;", " ", title).lower()
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-")


def plotly_js() -> str:
    """plotly.js as a page embeds it."""
    return get_plotlyjs().replace(PLOTLY_MINUS, 'MINUS_SIGN:"-"').replace("</script", "<\\/script")


def page(title: str, header: str, body: str, footer: str = "") -> str:
    """A complete offline page; `title` is escaped, the other arguments are HTML."""
    contents, body, footer = with_contents(body, footer)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>{header}{contents}</header>
<main>
{body}
</main>
<footer>{footer}</footer>
<script>{plotly_js()}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""


def definition_list(pairs: Iterable[tuple[str, str]]) -> str:
    """HTML definition list of (name, value) pairs, which are escaped."""
    return "<dl>" + "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in pairs) + "</dl>"


def figure_page(figure: go.Figure, title: str) -> str:
    """An offline page with a single figure."""
    return page(title, "", chart("figure", figure))


def figure_json(figure: go.Figure) -> str:
    """The figure as Plotly's JSON with sorted keys, so that equal figures give equal files."""
    return json.dumps(json.loads(str(figure.to_json())), sort_keys=True, indent=1)
