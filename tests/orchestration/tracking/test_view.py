"""The prepared page as MLflow stores it; that MLflow's own page shows it is tested in
test_server."""

import json
from urllib.parse import parse_qs

from orchestration.tracking.view import points_view, runs_path, view_path, view_tag

MAX_TAG_LENGTH = 5000
"""Longest value of an experiment's tag that MLflow accepts, in characters."""


def test_the_link_names_the_tag_that_holds_the_page_and_differs_between_sweeps() -> None:
    path, _, query = view_path("7", "digits/1234").partition("?")
    found = parse_qs(query)
    assert path == "/#/experiments/7/runs"
    assert found["workflowType"] == ["machine_learning"], "MLflow would open its view for GenAI"
    assert view_path("7", "digits/1234").startswith(runs_path("7"))
    assert found["compareRunsMode"] == ["CHART"]
    assert view_tag("digits/1234") == f"mlflow.sharedViewState.{found['viewStateShareKey'][0]}"
    assert view_tag("digits/1234") != view_tag("digits/1235")


def test_the_page_fits_a_tag_and_every_chart_lies_in_a_section() -> None:
    text = points_view("a-rather-long-name-of-a-sweep/123456789abc", is_outermost=True)
    view = json.loads(text)
    assert len(text) < MAX_TAG_LENGTH
    sections = {section["uuid"]: section["display"] for section in view["compareRunSections"]}
    assert [sections[chart["metricSectionId"]] for chart in view["compareRunCharts"]] == [True, True]
    assert [(chart["xaxis"]["key"], chart["yaxis"]["key"]) for chart in view["compareRunCharts"]] == [
        ("madds_m", "top1"),
        ("test/madds_m", "test/top1"),
    ]


def test_a_whole_sweep_shows_all_its_supernets_and_one_supernet_itself_alone() -> None:
    filters = [json.loads(points_view("s/1", is_outermost=outermost))["searchFilter"] for outermost in (True, False)]
    assert filters[0].startswith("tags.root = 's/1' AND")
    assert filters[1].startswith("tags.sweep = 's/1' AND")
