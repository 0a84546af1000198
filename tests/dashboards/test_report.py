"""The report: offline, escaped, small, and explicit about missing parts."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plotly.offline import get_plotlyjs

from dashboards.front import Curve, FrontInfo, FrontPanel, StaticPoint
from dashboards.headline import Estimate, Headline, Latency, Row, Scores, headline_section, verdict
from dashboards.page import PLOTLY_MINUS, plotly_js, with_contents
from dashboards.report import ReportData, build_report
from tests.dashboards.samples import make_report

MAX_BYTES = 6_000_000
EVIL = "<script>alert(1)</script>"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FRESH = ReportData(run_name="fresh", status="running", created="now", data_name="digits", model="ds_tiny")


class Tags(HTMLParser):
    """Every start tag of a page, and every attribute that a browser would load from."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.loads: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.loads += [
            (k, v) for k, v in attrs if k in ("src", "href", "srcset", "action", "data", "poster", "background")
        ]


def tags(page: str) -> Tags:
    parser = Tags()
    parser.feed(page)
    return parser


def own_part(page: str) -> str:
    """The page without plotly.js, which mentions addresses that none of our charts uses."""
    assert page.count(plotly_js()) == 1, "plotly.js must be inlined exactly once"
    return page.replace(plotly_js(), "")


def chart_data(page: str) -> dict[str, dict[str, list[dict[str, object]]]]:
    found = re.findall(r'<script type="application/json" id="chart-([a-z-]+)-data">(.*?)</script>', page, re.S)
    return {key: json.loads(text) for key, text in found}


def test_the_report_refers_to_nothing_outside_itself() -> None:
    page = build_report(make_report())
    assert [each for each in tags(page).loads if not str(each[1]).startswith("#")] == []
    own = own_part(page)
    assert not re.search(r"https?:|//[a-z0-9-]+\.[a-z]", own)
    assert not re.search(r"@import|url\(", own)
    assert not {"link", "img", "iframe", "object", "embed"} & set(tags(page).names)


def test_the_contents_lead_to_every_heading() -> None:
    page = build_report(make_report())
    links = [str(address) for name, address in tags(page).loads if name == "href"]
    addresses = re.findall(r'<h2 id="([^"]+)">', page)
    assert links == [f"#{address}" for address in addresses]
    assert len(set(addresses)) == len(addresses) == page.count("<h2") > 5


def test_two_equal_headings_are_refused_for_a_link_would_be_ambiguous() -> None:
    with pytest.raises(ValueError, match="two headings 'A'"):
        with_contents("<h2>A</h2><h2>B</h2>", "<h2>A</h2>")


def test_plotlys_button_that_uploads_charts_is_off() -> None:
    assert 'showSendToCloud: false, plotlyServerURL: ""' in build_report(FRESH)


def test_the_report_stays_below_six_megabytes() -> None:
    assert len(build_report(make_report()).encode("utf-8")) < MAX_BYTES


def test_every_figure_of_the_issue_is_in_the_report_with_its_data() -> None:
    charts = chart_data(build_report(make_report()))
    assert set(charts) == {
        "front",
        "routers",
        "speedups",
        "hypervolume",
        "routes",
        "routes-by-class",
        "widths",
        "training",
    }
    assert all(chart["data"] for chart in charts.values())


@pytest.mark.slow
def test_names_from_outside_are_escaped_everywhere() -> None:
    data = make_report()
    assert data.front is not None
    assert data.routes is not None
    assert data.widths is not None
    rows = tuple(replace(r, name=EVIL + r.name) for r in data.headline.rows)
    evil = replace(
        data,
        run_name=EVIL,
        data_name=EVIL,
        model=EVIL,
        notes=(EVIL,),
        commands=((EVIL, EVIL),),
        versions=((EVIL, EVIL),),
        headline=replace(data.headline, rows=rows, chosen_split=EVIL, reported_split=EVIL),
        front=FrontInfo(replace(data.front.chosen, split=EVIL)),
        routes=replace(data.routes, routes=(EVIL,) * 6, gates=(EVIL,) * len(data.routes.gates)),
        widths=replace(data.widths, subnets=(EVIL,) * 6, device=EVIL),
    )
    page = build_report(evil)
    assert EVIL not in page
    assert tags(page).names.count("script") == tags(build_report(data)).names.count("script")


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(st.text(min_size=1, max_size=30))
def test_no_run_name_changes_the_structure_of_the_page(name: str) -> None:
    def structure(run_name: str) -> list[str]:
        data = replace(FRESH, run_name=run_name, notes=(run_name,), commands=((run_name, run_name),))
        return tags(build_report(data).replace(plotly_js(), "")).names

    assert structure(name) == structure("x")


def test_headline_numbers_stand_beside_their_controls() -> None:
    latency = Latency(64, 10.0, 20.0, 8.0)
    chosen = Scores(Estimate(0.97, 0.95, 0.99), 0.4, Estimate(0.02, 0.01, 0.03))
    reported = Scores(
        Estimate(0.95, 0.93, 0.97),
        0.5,
        Estimate(0.004, -0.006, 0.014),
        0.91,
        0.92,
        0.99,
        0.48,
        0.25,
        0.75,
        0.97,
        0.5,
        True,
        ties=("trial-0003", "trial-0011", "trial-0012", "trial-0013"),
    )
    widest = Scores(Estimate(0.96, 0.94, 0.98), 1.0)
    headline = Headline(
        baseline=Row("subnet-05", widest, widest),
        rows=(
            Row(
                "trial-0007",
                chosen,
                reported,
                latency,
                max_route_share=0.61,
                router="learned_cascade",
                further=(("latency_ms.server", 1.25), ("balanced_top1", 0.8125)),
                further_reported=(("balanced_top1", 0.75),),
                supernet="s1-0f3a",
            ),
        ),
        knee="trial-0007",
        optimism=Estimate(0.02, -0.008, 0.049),
    )
    text = headline_section(headline).replace("\N{NO-BREAK SPACE}", " ")
    for wanted in (
        "95.0 %",
        "97.0 % when it was chosen (-2.0 points)",
        "+0.4 points",
        "95 %: -0.6 to +1.4, paired",
        "no significant difference",
        "50 % below the widest static (1.00 M)",
        "-1.0 points for the router",
        "2.00x",
        "at most 2.50x",
        "random 91.0",
        "cascade 92.0 at 0.480 M (collapsed)",
        "reachable 97.0",
        "25 % of the oracle gap",
        "50 % of the reachable gap",
        "learned cascade",
        "on the front in 75 %",
        '<span class="sub">tied: trial-0003</span><span class="sub">trial-0011</span><span class="sub">and 2 more</span>',
        "0.400 → 0.500",
        "Mean MAdds (M), val → test",
        '<span class="sub">latency_ms.server</span><span class="sub">1.25 on val</span>',
        '<span class="sub">balanced top-1</span><span class="sub">81.2 % → 75.0 %</span>',
        "supernet s1-0f3a",
        "is +2.0 points in the mean of the router of the table (95 %: -0.8 to +4.9)",
        "(0 of 1 here; about 0.05 expected by chance)",
        "oracle 99.0",
        "largest route 61 %",
    ):
        assert wanted in text


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (0.01, 0.02, "better than the static line"),
        (-0.02, -0.01, "worse than the static line"),
        (-0.01, 0.01, "no significant difference"),
        (0.0, 0.0, "no significant difference"),
        (0.0004, 0.02, "no significant difference"),
        (-0.02, -0.0004, "no significant difference"),
    ],
)
def test_the_verdict_needs_an_interval_that_excludes_zero(low: float, high: float, text: str) -> None:
    assert verdict(Estimate((low + high) / 2, low, high)) == text


def test_the_percentage_of_a_gap_within_noise_is_left_out() -> None:
    scores = Scores(Estimate(0.97, 0.96, 0.98), 0.4, gain=Estimate(0.01, 0.002, 0.02), oracle_top1=0.975)
    text = headline_section(Headline(rows=(Row("trial-0001", scores),)))
    assert "oracle gap within noise" in text
    assert "reachable gap" not in text  # the reachable curve is unknown
    assert "% of the oracle gap" not in text


def test_numbers_have_the_plain_minus_also_where_plotly_writes_them() -> None:
    assert get_plotlyjs().count(PLOTLY_MINUS) == 1
    page = build_report(make_report())
    assert "\N{MINUS SIGN}" not in page
    assert "\\u2212" not in page


def test_an_unverified_run_says_so_and_claims_no_test_number() -> None:
    page = own_part(build_report(make_report(is_verified=False)))
    assert "Not verified yet: all accuracies are from val" in page
    assert "not verified yet</span>" in page
    assert "Top-1 on val, knee" in page
    assert "Top-1 on test" not in page


def test_an_interval_that_was_not_computed_is_not_shown_as_a_narrow_one() -> None:
    row = Row("trial-0001", Scores(Estimate(0.97, math.nan, math.nan), 0.4))
    text = headline_section(Headline(rows=(row,)))
    assert "no interval yet" in text
    assert "nan" not in text


def test_numbers_of_two_splits_are_never_subtracted() -> None:
    data = make_report()
    assert data.headline.baseline is not None
    headline = replace(data.headline, baseline=replace(data.headline.baseline, reported=None))
    assert "no static baseline on this split" in headline_section(headline)


@pytest.mark.slow
def test_a_test_split_read_twice_is_a_warning() -> None:
    assert "test was read 3 times" in build_report(replace(make_report(), num_test_openings=3))
    assert "was read" not in own_part(build_report(make_report()))


@pytest.mark.slow
def test_constraints_are_listed_with_how_many_trials_break_each_and_endings_with_their_reasons() -> None:
    data = replace(
        make_report(),
        num_pruned=9,
        num_infeasible=30,
        constraints=(("madds_m <= 0.5", 30), ("top1 >= baseline.top1 - 0.003", 0)),
        endings=(("failed", "timed out <after> 120 s", 2), *((("pruned", f"reason {k}", 1)) for k in range(13))),
    )
    page = own_part(build_report(data))
    assert "62 completed trials (30 infeasible), 2 failed, 9 pruned" in page
    assert '<td class="">madds_m &lt;= 0.5</td><td class="number">30 of 62</td><td class="number">48</td>' in page
    assert '<td class="number">0 of 62</td>' in page
    assert "timed out &lt;after&gt; 120 s" in page
    assert "2 other reasons" in page  # 12 are listed
    assert "Grey crosses" in page
    assert "Grey crosses" not in own_part(build_report(make_report()))


def test_a_sweep_in_which_nothing_is_feasible_says_why_it_has_no_front() -> None:
    page = build_report(replace(FRESH, num_completed=5, num_infeasible=5, constraints=(("madds_m <= 0.1", 5),)))
    assert "None of the 5 completed trials satisfies all constraints" in page
    assert "5 of 5" in page


def test_collapsed_gates_are_marked_and_counted() -> None:
    data = make_report()
    rows = (replace(data.headline.rows[0], is_collapsed=True), *data.headline.rows[1:])
    page = build_report(replace(data, headline=replace(data.headline, rows=rows)))
    assert f"1 of {len(rows)} routers on the front collapsed" in page
    assert '<span class="badge bad">collapsed</span>' in page
    assert "Collapsed: one route answers more than 99 % of the images" in page
    assert "Collapsed:" not in build_report(data), "a mark that is not there is not explained"


def test_warnings_about_the_knee_stand_above_its_cards_and_each_timing_is_named() -> None:
    data = make_report()
    headline = replace(data.headline, warnings=("The knee is worse than <path-111>.",))
    assert data.widths is not None
    page = own_part(build_report(replace(data, headline=headline, widths=replace(data.widths, has_top5=False))))
    assert page.index("The knee is worse than &lt;path-111&gt;.") < page.index('class="cards"')
    assert "timed by the verify stage" in page
    assert "The measure stage timed every sub-network by itself" in page
    assert "Top-5" not in page


def test_a_run_with_nothing_done_yet_reports_each_missing_piece() -> None:
    page = own_part(build_report(FRESH))
    assert chart_data(page) == {}
    for wanted in (
        "No router on the front yet",
        "No trial has finished yet",
        "No trial has finished yet",
        "No training curve",
    ):
        assert wanted in page


def test_a_run_whose_trials_all_failed_says_so() -> None:
    page = build_report(replace(FRESH, num_failed=3))
    assert "No trial completed; 3 trials failed." in page


@pytest.mark.slow
@pytest.mark.parametrize("field", ["front", "hypervolume", "routes", "widths", "training"])
def test_any_single_piece_may_be_missing(field: str) -> None:
    missing = replace(make_report(), **{field: None})  # type: ignore[arg-type]
    assert not any(key.startswith(field) for key in chart_data(build_report(missing)))


def test_a_single_subnet_without_gates_is_reported() -> None:
    panel = FrontPanel("val", 9, (StaticPoint("only", 1.0, 0.9),), Curve((1.0,), (0.9,)), ())
    baseline = Row("only", Scores(Estimate(0.9, 0.8, 1.0), 1.0), latency=Latency(1, 2.0, 2.0, 2.0))
    page = build_report(replace(FRESH, front=FrontInfo(panel), headline=Headline(baseline)))
    assert "No router on the front yet." in page
    assert "widest static" in page
    assert set(chart_data(page)) == {"front"}


@pytest.mark.slow
def test_the_table_of_subnets_ends_with_what_the_widest_costs_over_the_cheapest() -> None:
    page = build_report(make_report())
    row = re.search(r"<td>widest / cheapest</td>(.*?)</tr>", page)
    assert row is not None
    assert re.findall(r"[\d.]+x", row.group(1)) == ["4.86x", "2.76x", "1.47x", "3.20x"]


@pytest.mark.slow
def test_resume_command_and_versions_are_in_the_report() -> None:
    page = build_report(make_report())
    assert "<pre>dsnet-orch launch examples/digits.yaml</pre>" in page
    assert "<dt>torch</dt><dd>2.13.0+cpu</dd>" in page


@pytest.mark.slow
def test_how_the_supernet_was_made_and_what_the_names_mean_are_in_the_report() -> None:
    made = (("supernet regime", "ib: widths sandwich, num_random 2, teacher ema"), ("start weights", "<fresh>"))
    page = build_report(replace(make_report(), making=made, naming="Names are <paths>."))
    assert "<dt>supernet regime</dt><dd>ib: widths sandwich, num_random 2, teacher ema</dd>" in page
    assert "<dt>start weights</dt><dd>&lt;fresh&gt;</dd>" in page
    assert page.count("Names are &lt;paths&gt;.") == 1


PROBE = """<script>
const seen = document.documentElement.dataset; seen.violations = 0; seen.errors = 0;
document.addEventListener("securitypolicyviolation", () => { seen.violations++; });
addEventListener("error", () => { seen.errors++; });
addEventListener("load", () => {
  seen.drawn = document.querySelectorAll(".chart .plot-container").length;
  seen.requests = performance.getEntriesByType("resource").length;
  seen.overflow = document.documentElement.scrollWidth - innerWidth;
});
</script><style>"""


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile of the browser; to make one takes longer than to draw the page."""
    return tmp_path_factory.mktemp("profile")


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width_px", [1280, 800, 500])
def test_chromium_without_a_network_draws_every_chart(profile: Path, tmp_path: Path, width_px: int) -> None:
    page = tmp_path / "report.html"
    page.write_text(build_report(make_report()).replace("<style>", PROBE, 1), encoding="utf-8")
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    command = [str(CHROMIUM), *options.split(), "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
    command += [
        f"--user-data-dir={profile}",
        f"--window-size={width_px},900",
        "--virtual-time-budget=5000",
    ]
    command += ["--proxy-server=http://127.0.0.1:9", "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom"]
    dom = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True).stdout
    seen = dict(re.findall(r'data-(\w+)="(-?\d+)"', dom[: dom.index("<head>")]))
    assert seen == {"violations": "0", "errors": "0", "drawn": "8", "requests": "0", "overflow": "0"}
