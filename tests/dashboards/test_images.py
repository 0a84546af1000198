"""Figures as files."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import plotly.graph_objects as go
import pytest

from dashboards.front import front_figure
from dashboards.images import write_figure
from dsnet.errors import ConfigError, PreflightError
from tests.dashboards.samples import make_front

HAS_KALEIDO = importlib.util.find_spec("kaleido") is not None
HAS_CHROMIUM = any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))


def figure() -> go.Figure:
    return go.Figure(go.Scatter(x=[1, 2], y=[3, 4], name="line"), go.Layout(title="A < B", height=300))


def test_json_reads_back_as_the_same_figure(tmp_path: Path) -> None:
    path = write_figure(figure(), tmp_path / "deep" / "figure.json")
    assert go.Figure(json.loads(path.read_text(encoding="utf-8"))) == figure()


def test_html_is_one_whole_offline_page(tmp_path: Path) -> None:
    text = write_figure(figure(), tmp_path / "figure.html").read_text(encoding="utf-8")
    assert "<title>A &lt; B</title>" in text
    assert text.count('class="chart"') == 1
    assert "default-src 'none'" in text


def test_nothing_but_the_figure_is_left_in_the_folder(tmp_path: Path) -> None:
    write_figure(figure(), tmp_path / "figure.json")
    assert [p.name for p in tmp_path.iterdir()] == ["figure.json"]


def test_an_unknown_suffix_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'figure\.bmp'.*\.html, \.json, \.png, \.svg"):
        write_figure(figure(), tmp_path / "figure.bmp")


def test_a_folder_that_is_a_file_is_a_preflight_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(PreflightError, match="cannot write the figure"):
        write_figure(figure(), tmp_path / "file" / "figure.json")


@pytest.mark.skipif(HAS_KALEIDO, reason="kaleido is installed")
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_images_without_kaleido_say_how_to_get_it_and_leave_no_file(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(PreflightError, match="pip install kaleido"):
        write_figure(figure(), tmp_path / f"figure.{suffix}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.browser
@pytest.mark.skipif(not (HAS_KALEIDO and HAS_CHROMIUM), reason="needs kaleido and Chromium")
def test_a_front_as_svg_is_a_picture_that_loads_nothing(tmp_path: Path) -> None:
    write_figure(front_figure(make_front()), tmp_path / "front.svg")
    text = (tmp_path / "front.svg").read_text(encoding="utf-8")
    assert text.startswith("<svg")
    assert 'href="http' not in text
    assert "front: gate" in text
    write_figure(go.Figure(go.Scatter(y=[-3, -1])), tmp_path / "negative.svg")
    drawn = (tmp_path / "negative.svg").read_text(encoding="utf-8")
    assert ">-3<" in drawn
    assert "\N{MINUS SIGN}" not in drawn
