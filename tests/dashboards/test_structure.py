"""Figures of the choice of sub-networks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dashboards.structure import Scored, StructureInfo, channels_figure, search_figure

INFO = StructureInfo(
    method="greedy",
    subnets=("0.5", "<b>1"),
    madds_m=(1.5, 3.0),
    groups=("stem", "body"),
    widths=((4, 10), (8, 40)),
    max_widths=(8, 40),
    candidates=(Scored(1.5, 0.25), Scored(2.0, 0.5), Scored(3.0, 0.75)),
    chosen=(Scored(1.5, 0.25),),
    num_images=80,
)


def test_every_cell_is_the_share_of_channels() -> None:
    (cells,) = channels_figure(INFO).data
    assert [list(row) for row in cells.z] == [[50.0, 25.0], [100.0, 100.0]]
    assert "10 of 40 channels" in cells.text[0][1]
    assert list(cells.y) == ["0.5 (1.5 M)", "&lt;b&gt;1 (3 M)"]


def test_what_is_no_channel_is_called_what_it_is() -> None:
    figure = channels_figure(replace(INFO, units=("channels", "pixels")))
    (cells,) = figure.data
    assert "4 of 8 channels" in cells.text[0][0]
    assert "10 of 40 pixels" in cells.text[0][1]
    assert figure.layout.title.text == "Widths of each sub-network"
    assert channels_figure(INFO).layout.title.text == "Channels of each sub-network"


def test_the_search_shows_all_candidates_and_the_chosen_ones() -> None:
    candidates, chosen = search_figure(INFO).data
    assert (list(candidates.x), list(candidates.y)) == ([1.5, 2.0, 3.0], [25.0, 50.0, 75.0])
    assert (list(chosen.x), list(chosen.y)) == ([1.5], [25.0])
    assert "3 candidates on 80 images" in search_figure(INFO).layout.title.subtitle.text


def test_scores_before_and_after_a_fine_tuning_are_told_apart() -> None:
    info = replace(INFO, chosen=(Scored(1.5, 0.5),), chosen_before=(Scored(1.5, 0.25),))
    _, before, after = search_figure(info).data
    assert (list(before.y), list(after.y)) == ([25.0], [50.0])
    assert (before.name, after.name) == ("chosen, before fine-tuning", "chosen, after fine-tuning")
    assert before.marker.symbol != after.marker.symbol


@pytest.mark.parametrize(
    "changes", [{"widths": ((4, 10),)}, {"max_widths": (8,)}, {"madds_m": (1.5,)}, {"units": ("heads",)}]
)
def test_parts_of_other_lengths_are_refused(changes: dict) -> None:
    with pytest.raises(ValueError, match="needs one"):
        replace(INFO, **changes)
