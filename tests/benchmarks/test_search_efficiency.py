"""The arithmetic of the efficiency table, and searches that look up results of the exhaustive
sweep. No test here depends on a duration."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from optuna.trial import TrialState

from benchmarks.ask_cost import SPACE, ask_seconds, finished_trials
from benchmarks.search_efficiency import (
    DEFAULTS,
    Contender,
    Effort,
    Exhaustive,
    Searched,
    Source,
    contenders,
    key_of,
    run_points,
    search,
    spaces,
    sweep_all,
)
from dsnet.gates.fit import fit_gate
from search.gate_trial import FIELDS, ROUTING_KEYS, gate_settings
from search.suggest.grid import Grid
from search.suggest.samplers import KNOWN_SAMPLERS, SamplerSettings
from search.suggest.space import check_point, parse_space

PLANE = parse_space({"gate.target": {"step": [0.0, 0.9, 0.1]}, "gate.sgs.t_easy": {"int": [0, 9]}})


def plane() -> Exhaustive:
    """Accuracy and cost rise with the target; the other dimension only costs accuracy. A fifth of
    the points fails."""
    grid = Grid(PLANE)
    points = [grid[k] for k in range(len(grid))]
    values = [
        (0.5 + 0.4 * float(p["gate.target"]) - 0.01 * float(p["gate.sgs.t_easy"]), 100.0 * float(p["gate.target"]))
        for p in points
    ]
    rows = np.array(values)
    rows[[point["gate.sgs.t_easy"] in (4, 5) for point in points]] = np.nan
    return Exhaustive(PLANE, rows, 0.0)


def test_the_reference_lies_a_tenth_of_the_front_behind_its_worst_values() -> None:
    # The front: t_easy = 0, from (0.5, 0) to (0.86, 90).
    assert plane().reference == pytest.approx((0.5 - 0.036, 90.0 + 9.0))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in KNOWN_SAMPLERS if name != "gp"])
def test_a_search_only_ever_gains_and_never_beats_the_exhaustive_sweep(name: str) -> None:
    found = search(plane(), Contender(name, SamplerSettings(name), 16, 64, 1), seed=3)
    assert len(found.shares) == 64
    assert (np.diff(found.shares) >= 0).all()
    assert 0 < found.shares[-1] <= 1 + 1e-12


def test_a_whole_grid_finds_everything_once() -> None:
    found = search(plane(), Contender("grid", SamplerSettings("grid"), 16, 500, 1), seed=0)
    assert len(found.shares) == 100
    assert found.num_repeated == 0
    assert found.shares[-1] == pytest.approx(1.0)


def test_trials_are_counted_from_one_and_never_is_infinite() -> None:
    found = Searched(np.array([0.2, 0.9, 0.9, 0.97]), 0.0, 0)
    assert [found.trials_until(share) for share in (0.1, 0.9, 0.95, 0.99)] == [1, 2, 4, np.inf]


def test_seeds_that_never_got_there_count_in_the_quartiles() -> None:
    assert Effort(np.array([10.0, 20.0, 30.0, 40.0])).text() == "20 [10, 30]"
    assert Effort(np.array([10.0, 20.0, np.inf, np.inf])).text() == "20 [10, -] 50 %"


def test_a_step_is_the_same_point_whatever_sum_led_to_it() -> None:
    assert key_of({"a": 0.1 + 0.2, "b": "x"}) == key_of({"b": "x", "a": 0.3})


def test_every_sampler_takes_part() -> None:
    assert {contender.settings.name for contender in contenders(100, 2, 10, 1)} == set(KNOWN_SAMPLERS)


def test_the_full_spaces_have_enough_points_and_their_settings_exist() -> None:
    for space in spaces(64, is_small=False).values():
        assert 1500 <= len(Grid(space)) <= 5000
        assert set(space.distributions) <= {*FIELDS, *ROUTING_KEYS}


@pytest.mark.slow
def test_an_exhaustive_sweep_is_what_each_point_gives_alone_and_is_kept(tmp_path: Path) -> None:
    source = Source(None, is_small=True, seed=0)
    gate, val = source.tables()
    space = parse_space(
        {
            "gate.router": {"choice": ["gate", "cascade"]},
            "gate.target": {"step": [0.2, 0.6, 0.2]},
            "gate.losses.sgs": {"choice": [0.0, 1.0], "when": {"gate.router": "gate"}},
        }
    )
    rows = run_points(source, space, range(9))
    for k in (0, 4, 8):
        metrics = fit_gate(gate, val, gate_settings(Grid(space)[k], DEFAULTS, gate, 0)).metrics
        assert rows[k] == (metrics["top1"], metrics["madds_m"])
    first = sweep_all(source, space, 1, tmp_path)
    (kept,) = tmp_path.iterdir()
    stamp = kept.stat().st_mtime_ns
    again = sweep_all(source, space, 1, tmp_path)
    assert kept.stat().st_mtime_ns == stamp
    assert np.array_equal(first.values, rows)
    assert np.array_equal(again.values, rows)


def test_the_made_up_trials_lie_in_their_space() -> None:
    space = parse_space(SPACE)
    trials = finished_trials(space, 40, seed=1)
    for trial in trials:
        check_point(space, trial.params)
        assert trial.state == TrialState.COMPLETE
    assert len({tuple(trial.params) for trial in trials}) == 2
    assert len({trial.params["gate.target"] for trial in trials}) == 40


def test_as_many_suggestions_are_timed_as_were_asked_for() -> None:
    for name in itertools.islice(KNOWN_SAMPLERS, 6):
        assert len(ask_seconds(SamplerSettings(name), 20, cohort=3)) == 3
