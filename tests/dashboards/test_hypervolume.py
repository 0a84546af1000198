"""Hypervolume over trials."""

from __future__ import annotations

import pytest

from dashboards.hypervolume import hypervolume_figure, hypervolume_info
from tests.dashboards.samples import FAILED, NUM_TRIALS, make_hypervolume


def test_the_line_is_the_running_hypervolume_in_steps() -> None:
    info = make_hypervolume()
    line = hypervolume_figure(info).data[0]
    assert list(line.x) == list(range(NUM_TRIALS))
    assert list(line.y) == list(info.hypervolume)
    assert line.line.shape == "hv"


def test_failed_trials_are_marked_on_the_line_with_their_reason() -> None:
    info = make_hypervolume()
    failed = next(t for t in hypervolume_figure(info).data if t.name == "failed trial")
    assert list(failed.x) == sorted(FAILED)
    assert list(failed.y) == [info.hypervolume[slot] for slot in sorted(FAILED)]
    assert "timed out after 120 s" in failed.text[0]


def test_the_static_subnetworks_are_drawn_as_what_is_to_be_beaten() -> None:
    static = next(t for t in hypervolume_figure(make_hypervolume()).data if t.name == "static sub-networks alone")
    assert set(static.y) == {0.745}


def test_subtitle_counts_trials_and_names_split_size_and_reference() -> None:
    subtitle = hypervolume_figure(make_hypervolume()).layout.title.subtitle.text
    for wanted in ("val (n = 270)", "64 trials", "2 failed", "reference top1 0, madds_m 1.07"):
        assert wanted in subtitle


def test_a_falling_hypervolume_is_refused() -> None:
    with pytest.raises(ValueError, match="falls"):
        hypervolume_info([0.5, 0.4], [None, None], "val", 10, (0.0, 1.0))


def test_uneven_inputs_are_refused_with_both_lengths() -> None:
    with pytest.raises(ValueError, match="2 trials, reasons 1"):
        hypervolume_info([0.5, 0.6], [None], "val", 10, (0.0, 1.0))


def test_a_reason_with_markup_is_escaped() -> None:
    info = hypervolume_info([0.0], ["<script>x</script>"], "val", 10, (0.0, 1.0))
    assert "<script>" not in hypervolume_figure(info).to_json()


def test_no_trial_gives_a_figure_that_says_so() -> None:
    figure = hypervolume_figure(hypervolume_info([], [], "val", 10, (0.0, 1.0), 0.5))
    assert len(figure.data) == 0
    assert figure.layout.annotations[0].text == "no trial has finished yet"
