"""Hypervolume over trials."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dashboards.hypervolume import HypervolumeInfo, hypervolume_figure
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
    static = next(t for t in hypervolume_figure(make_hypervolume()).data if t.name == "static sub-networks")
    assert set(static.y) == {0.745}


def test_subtitle_counts_trials_and_names_split_size_and_reference() -> None:
    subtitle = hypervolume_figure(make_hypervolume()).layout.title.subtitle.text
    for wanted in ("val (n = 270)", "64 trials", "2 failed", "reference top1 0, madds_m 1.07"):
        assert wanted in subtitle


def info_of(*hypervolume: float, failures: tuple[tuple[int, str], ...] = ()) -> HypervolumeInfo:
    return HypervolumeInfo(tuple(range(len(hypervolume))), hypervolume, failures, "val", 10, (0.0, 1.0))


def test_a_falling_hypervolume_is_refused() -> None:
    with pytest.raises(ValueError, match="must never decrease"):
        info_of(0.5, 0.4)


def test_uneven_inputs_are_refused_with_both_lengths() -> None:
    with pytest.raises(ValueError, match="1 trials, slots 2"):
        HypervolumeInfo((0, 1), (0.5,), (), "val", 10, (0.0, 1.0))
    with pytest.raises(ValueError, match="3 values, but there are 2 objectives"):
        HypervolumeInfo((0,), (0.5,), (), "val", 10, (0.0, 1.0, 2.0))


def test_a_reason_with_markup_is_escaped() -> None:
    figure = hypervolume_figure(info_of(0.0, failures=((0, "<script>x</script>"),)))
    assert "<script>" not in figure.to_json()


def test_no_trial_gives_a_figure_that_says_so() -> None:
    figure = hypervolume_figure(replace(info_of(), static_hypervolume=0.5))
    assert len(figure.data) == 0
    assert figure.layout.annotations[0].text == "no trial has finished yet"


def test_pruned_trials_are_marked_apart_from_failed_ones_and_infeasible_ones_are_counted() -> None:
    info = replace(make_hypervolume(), pruned=((3, "24th of 64 after 3 epochs"), (9, "x")), num_infeasible=5)
    figure = hypervolume_figure(info)
    pruned = next(t for t in figure.data if t.name == "pruned trial")
    assert list(pruned.x) == [3, 9]
    assert list(pruned.y) == [info.hypervolume[3], info.hypervolume[9]]
    assert "24th of 64 after 3 epochs" in pruned.text[0]
    subtitle = figure.layout.title.subtitle.text
    assert "64 trials, 2 failed, 2 pruned, 5 violate a constraint" in subtitle


def test_three_objectives_are_named_with_their_reference() -> None:
    info = replace(make_hypervolume(), reference=(0.0, 1.07, 2.5), objectives=("top1", "madds_m", "latency_ms.server"))
    figure = hypervolume_figure(info)
    assert "reference top1 0, madds_m 1.07, latency_ms.server 2.5" in figure.layout.title.subtitle.text
    assert "top1 × madds_m × latency_ms.server" in figure.layout.yaxis.title.text


def test_the_trials_of_a_plateau_are_shaded_where_it_ended_the_sweep() -> None:
    figure = hypervolume_figure(replace(make_hypervolume(), plateau=20))
    (band,) = figure.layout.shapes
    assert (band.x0, band.x1) == (NUM_TRIALS - 20, NUM_TRIALS - 1)
    assert "plateau" in figure.layout.annotations[0].text
    assert not hypervolume_figure(make_hypervolume()).layout.shapes
