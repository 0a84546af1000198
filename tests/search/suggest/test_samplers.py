"""Every sampler keeps one contract: suggestions lie in the space, and they are a function of
history, seed and slot."""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import subprocess
import sys
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, create_trial

from dsnet.errors import ConfigError
from search.suggest.genetic import Inheritance, beats, dividing_parameter
from search.suggest.grid import Grid
from search.suggest.qmc import sobol_point
from search.suggest.samplers import (
    KNOWN_SAMPLERS,
    SamplerSettings,
    check_sampler,
    is_foreign,
    make_sampler,
    num_points,
    quiet_optuna,
    slot_seed,
)
from search.suggest.space import Scalar, check_point, parse_space, suggest
from tests.search.suggest.samples import CONDITIONAL, FLAT, FOREIGN, SIZE, SPACES, Sweep, outcome, settings_of


@functools.cache
def swept(
    name: str, space_name: str, num_objectives: int | None = None, is_constrained: bool = True
) -> tuple[Sweep, list[list[dict[str, Scalar]]]]:
    """A sweep that was run to its end, and its cohorts; only to be read. Where the number of
    objectives does not matter, it is the one that other tests use too."""
    if num_objectives is None:
        num_objectives, is_constrained = (3, False) if (name, space_name) == ("gp", "conditional") else (2, True)
        return swept(name, space_name, num_objectives, is_constrained)
    sweep = Sweep(settings_of(name), SPACES[space_name], num_objectives, is_constrained)
    return sweep, sweep.run()


@pytest.mark.parametrize("space_name", SPACES)
@pytest.mark.parametrize("name", [*KNOWN_SAMPLERS, FOREIGN])
class TestEverySampler:
    @pytest.mark.slow
    @pytest.mark.parametrize(("num_objectives", "is_constrained"), [(2, True), (3, True), (3, False)])
    def test_a_resumed_sweep_suggests_what_an_uninterrupted_one_does(
        self, name: str, space_name: str, num_objectives: int, is_constrained: bool
    ) -> None:
        if (num_objectives, space_name) == (3, "flat") or (name == "gp" and is_constrained != (space_name == "flat")):
            pytest.skip(
                "three objectives are tried in the conditional space, and the slow Gaussian process in two cases"
            )
        sweep, cohorts = swept(name, space_name, num_objectives, is_constrained)
        for slots, expected in list(zip(sweep.cohorts(), cohorts, strict=True))[1::2]:
            assert sweep.rebuilt(slots.start).ask(slots) == expected

    @pytest.mark.slow
    def test_suggestions_lie_in_the_space_and_name_exactly_what_exists(self, name: str, space_name: str) -> None:
        space = SPACES[space_name]
        _, cohorts = swept(name, space_name)
        for point in itertools.chain(*cohorts):
            check_point(space, point)
            assert list(point) == [key for key in space.distributions if space.has(key, point)]

    def test_slots_and_seeds_differ_and_repeat(self, name: str, space_name: str) -> None:
        space = SPACES[space_name]
        first, again, other = (Sweep(settings_of(name), space, seed=seed).ask(range(SIZE)) for seed in (1, 1, 2))
        assert first == again
        assert first != other
        assert len({json.dumps(point) for point in first}) > 1

    @pytest.mark.slow
    def test_a_point_that_is_fixed_in_part_is_completed(self, name: str, space_name: str) -> None:
        whole, cohorts = swept(name, space_name)
        sweep = whole.rebuilt(sum(map(len, cohorts)))
        fixed = {"gate.target": 0.5, **({"gate.router": "gate"} if space_name == "conditional" else {})}
        sweep.study.enqueue_trial(fixed)
        point = sweep.ask([100])[0]
        check_point(sweep.space, point)
        assert point.items() >= fixed.items()
        assert "gate.sgs.t_easy" in point or space_name == "flat"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tpe", "nsga2", "nsga3"])
@pytest.mark.parametrize("space_name", SPACES)
def test_what_is_learned_shows(name: str, space_name: str) -> None:
    """Objectives that only a small target serves: a model of them must propose smaller targets than
    chance does."""
    sweep = Sweep(settings_of(name), SPACES[space_name], is_constrained=False)
    targets = []
    for first in range(0, 12 * SIZE, SIZE):
        points = sweep.ask(range(first, first + SIZE))
        for slot, point in enumerate(points, first):
            sweep.study.tell(slot, [-float(point["gate.target"]), float(point["gate.target"])])
        targets += [float(point["gate.target"]) for point in points]
    assert np.mean(targets[-3 * SIZE :]) < np.mean(targets[:SIZE]) - 0.15


def test_a_child_takes_from_one_parent_what_the_other_does_not_have() -> None:
    study = optuna.create_study(directions=["maximize", "minimize"])
    points = [
        {"gate.router": "gate", "gate.target": 0.1, "gate.sgs.t_easy": 0.7},
        {"gate.router": "cascade", "gate.target": 0.2},
    ]
    distributions = [{name: CONDITIONAL.distributions[name] for name in point} for point in points]
    parents = [
        create_trial(values=[0.5, 1.0], params=point, distributions=d)
        for point, d in zip(points, distributions, strict=True)
    ]
    children = [
        Inheritance(CONDITIONAL, seed, crossover_prob=1.0, mutation_prob=0.0)(study, CONDITIONAL.free, parents)
        for seed in range(60)
    ]
    assert {child["gate.sgs.t_easy"] for child in children} == {0.7}
    assert {(child["gate.router"], child["gate.target"]) for child in children} == {
        (router, target) for router in ("gate", "cascade") for target in (0.1, 0.2)
    }
    assert all("gate.losses.sgs" not in child for child in children)


@pytest.mark.slow
def test_a_long_sweep_of_small_generations_can_be_resumed() -> None:
    """More generations than Python has frames to recurse through."""
    settings = SamplerSettings("nsga2", startup=2)
    with quiet_optuna():
        study = optuna.create_study(directions=["maximize", "minimize"])
        distributions, grid = dict(FLAT.distributions), Grid(FLAT)
        for number in range(3000):
            params = grid[number % len(grid)]
            notes = {"ReplayableNSGAII:generation": number // 2}
            study.add_trial(
                create_trial(values=outcome(params)[:2], params=params, distributions=distributions, system_attrs=notes)
            )
        study.sampler = make_sampler(settings, space=FLAT, base_seed=0, slot=3000)
        check_point(FLAT, suggest(study.ask(), FLAT))


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((0.5, 1.0, 0.0), (0.4, 1.0, 0.0), True),
        ((0.5, 1.0, 0.0), (0.5, 1.0, 0.0), False),
        ((0.5, 1.0, 0.0), (0.4, 0.9, 0.0), False),
        ((0.1, 9.0, 0.0), (0.9, 0.1, 0.2), True),
        ((0.1, 9.0, 0.1), (0.9, 0.1, 0.2), True),
        ((0.9, 0.1, 0.2), (0.1, 9.0, 0.0), False),
    ],
)
def test_constrained_domination(first: Any, second: Any, expected: bool) -> None:
    def trial(top1: float, madds: float, violation: float) -> FrozenTrial:
        return create_trial(values=[top1, madds], constraints={"a": violation, "b": -1.0})

    directions = optuna.create_study(directions=["maximize", "minimize"]).directions
    assert beats(trial(*first), trial(*second), directions) is expected


@pytest.mark.parametrize(("num_objectives", "size"), [(2, 2), (2, 16), (3, 16), (3, 64), (3, 2)])
def test_there_are_as_many_reference_lines_as_a_generation_affords(num_objectives: int, size: int) -> None:
    parts = dividing_parameter(num_objectives, size)
    num_lines = [
        sum(sum(digits) == total for digits in itertools.product(range(total + 1), repeat=num_objectives))
        for total in (parts, parts + 1)
    ]
    assert num_lines[1] > size
    assert num_lines[0] <= size or parts == 1


def test_nsga3_keeps_a_maximised_front_spread() -> None:
    """The parents' distances along a front must be even, whichever way its objectives point."""
    sampler = make_sampler(SamplerSettings("nsga3", startup=8), space=FLAT, base_seed=0, slot=200)
    rng = np.random.default_rng(0)
    costs = np.sort(rng.uniform(size=120))
    with quiet_optuna():
        study = optuna.create_study(directions=["maximize", "minimize"])
        for cost in costs:
            notes = {"ReplayableNSGAIII:generation": 0}
            study.add_trial(create_trial(values=[math.sqrt(cost), cost], system_attrs=notes))
        parents = sampler.get_parent_population(study, 1)  # type: ignore[attr-defined]
    chosen = sorted(trial.values[1] for trial in parents)
    assert len(chosen) == 8
    assert chosen[0] < 0.05
    assert chosen[-1] > 0.9
    assert max(np.diff(chosen)) < 0.5


class TestGridAndQmc:
    def test_a_grid_holds_every_point_once_and_ends_there(self) -> None:
        written = {
            "b": {"uniform": [0.0, 1.0], "when": {"a": "x"}},
            "a": {"choice": ["x", "y", "z"]},
            "c": {"int": [1, 3], "when": {"a": ["x", "y"]}},
            "d": {"step": [0.0, 0.2, 0.1], "when": {"c": [2]}},
            "e": "fixed",
        }
        # Counted by hand: d is there for one c of three, so that c and d have 1 + 1 + 3 ways; x: 4
        # * 5, y: 5, z: 1.
        settings = SamplerSettings("grid", {"points": 4})
        space = parse_space(written)
        assert num_points(settings, space) == 26
        points = Sweep(settings, space).ask(range(26))
        assert len({json.dumps(point, sort_keys=True) for point in points}) == 26
        assert {point["b"] for point in points if "b" in point} == {0.0, 1 / 3, 2 / 3, 1.0}
        assert [point for point in points if point["a"] == "z"] == [{"a": "z", "e": "fixed"}]

    def test_a_grid_that_ends_early_is_spread(self) -> None:
        space = parse_space({"a": {"int": [0, 9]}, "b": {"int": [0, 9]}})
        points = Sweep(SamplerSettings("grid"), space).ask(range(30))
        assert len({point["a"] for point in points}) >= 8
        assert len({point["b"] for point in points}) >= 8

    def test_a_logarithmic_dimension_is_divided_by_ratio_and_keeps_its_ends(self) -> None:
        grid = Grid(parse_space({"lr": {"loguniform": [1e-3, 0.1]}}), num_continuous=3)
        assert [grid[k]["lr"] for k in range(3)] == [1e-3, pytest.approx(1e-2), 0.1]
        assert Grid(parse_space({"lr": {"loguniform": [1e-3, 0.1]}}), 1)[0]["lr"] == pytest.approx(1e-2)

    def test_a_grid_without_end_is_refused_before_it_is_made(self) -> None:
        space = parse_space({"a": {"int": [1, 10**9]}, "b": {"uniform": [0, 1]}})
        with pytest.raises(ConfigError, match=r"5,000,000,000 points, and at most 1,000,000 .*a \(1000000000\)"):
            num_points(SamplerSettings("grid"), space)

    def test_every_eight_sobol_points_lie_in_different_eighths(self) -> None:
        """What distinguishes the sequence from chance: each aligned block of 8 has one point in
        each eighth of every dimension."""
        space = parse_space(
            {
                "a": {"uniform": [0, 8]},
                "b": {"loguniform": [1, 256]},
                "c": {"choice": list("stuvwxyz")},
                "d": {"int": [0, 7]},
            }
        )
        for block in (0, 3):
            points = [sobol_point(space, 11, index) for index in range(8 * block, 8 * block + 8)]
            assert {int(float(point["a"])) for point in points} == set(range(8))
            assert {int(math.log2(float(point["b"]))) for point in points} == set(range(8))
            assert {point["c"] for point in points} == set("stuvwxyz")
            assert {point["d"] for point in points} == set(range(8))

    def test_only_a_grid_runs_out(self) -> None:
        assert [num_points(SamplerSettings(name), FLAT) for name in KNOWN_SAMPLERS if name != "grid"] == [None] * 6


class NeedsNoSeed(RandomSampler):
    def __init__(self) -> None:
        super().__init__()


class OneObjective(BaseSampler):
    def __init__(self, seed: int, width: float = 1.0) -> None:
        self.width = width

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        raise ValueError("takes one objective only")

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> Any: ...

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: Any) -> Any: ...


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nsga4", {}, r"unknown sampler 'nsga4'; did you mean 'nsga\d'\?.* or an import path"),
        ("optuna.samplers.NoSuch", {}, r"cannot import 'optuna.samplers.NoSuch'"),
        ("no_such_module.Sampler", {}, "cannot import"),
        ("optuna.study.Study", {}, "must be a subclass of optuna.samplers.BaseSampler"),
        ("optuna.samplers.GridSampler", {}, "stores its position in the study.*use grid"),
        ("optuna.samplers.QMCSampler", {}, "use qmc instead"),
        ("optuna.samplers.BruteForceSampler", {}, "Optuna's own loop, which is not used here; use grid"),
        (f"{__name__}.NeedsNoSeed", {}, "takes no `seed`"),
        (f"{__name__}.OneObjective", {}, "ValueError: takes one objective only"),
        (f"{__name__}.OneObjective", {"widht": 2.0}, "did you mean 'width'"),
        (
            "tpe",
            {"n_ei_candidate": 10},
            r"sampler.options.n_ei_candidate: tpe has no such option; did you mean 'n_ei_candidates'",
        ),
        ("tpe", {"n_ei_candidates": "many"}, r"takes a value like 24; got 'many'"),
        ("tpe", {"n_ei_candidates": 0}, r"options \{'n_ei_candidates': 0\}"),
        ("tpe", {"prior_weight": -1.0}, "non-negative value"),
        ("nsga3", {"reference_points": "x"}, "could not convert"),
        ("nsga3", {"reference_points": [[1.0, 2.0, 3.0]]}, "must be the same as the number of objectives"),
        ("nsga3", {"dividing_parameter": 0}, "dividing_parameter is 0, but must be a whole number in 1..100"),
        ("nsga3", {"dividing_parameter": 10**6}, "must be a whole number in 1..100"),
        ("tpe", {"seed": 3}, "cannot be set here; every slot derives its own"),
        ("tpe", {"constraints_func": "f"}, "write `constraints`"),
        ("tpe", {"n_startup_trials": 3}, "set sampler.startup"),
        ("nsga2", {"population_size": 3}, "set sampler.startup, which is the size of a generation"),
        ("nsga2", {"crossover": "SBX"}, "takes a Python object"),
        ("nsga2", {"mutation_prob": 2.0}, r"mutation_prob is 2.0, but must lie in 0..1"),
        ("gp", {"independent_sampler": "random"}, "takes a Python object"),
        ("grid", {"points": 0}, "points is 0, but must be 1 or more"),
        ("grid", {"points": True}, "takes a value like 5; got True"),
        ("grid", {"point": 4}, "did you mean 'points'"),
        ("qmc", {"scramble": True}, "it has none"),
        ("random", {"points": 4}, "it has none"),
    ],
)
def test_what_cannot_be_used_is_refused_beforehand(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_sampler(SamplerSettings(name, options))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in KNOWN_SAMPLERS),
        ("tpe", {"n_ei_candidates": 12, "multivariate": False, "constant_liar": False}),
        ("nsga3", {"dividing_parameter": 5, "crossover_prob": 1}),
        ("nsga3", {"reference_points": [[1.0, 0.0], [0.0, 1.0]]}),
        ("gp", {"deterministic_objective": True}),
        ("optuna.samplers.NSGAIISampler", {"population_size": 8}),
        ("optuna.samplers.TPESampler", {"n_startup_trials": 4}),
    ],
)
def test_what_can_be_used_suggests(name: str, options: dict[str, Any]) -> None:
    settings = SamplerSettings(name, options, startup=5)
    check_sampler(settings)
    assert is_foreign(name) is (name not in KNOWN_SAMPLERS)
    space = parse_space({"gate.target": {"step": [0.1, 0.9, 0.1]}, "gate.sgs.t_easy": {"int": [0, 3]}})
    for point in itertools.chain(*Sweep(settings, space).run()):
        check_point(space, point)


def test_reference_points_have_as_many_coordinates_as_the_sweep_has_objectives() -> None:
    settings = SamplerSettings("nsga3", {"reference_points": [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]})
    check_sampler(settings, 3)
    with pytest.raises(ConfigError, match="number of objectives"):
        check_sampler(settings, 2)


@pytest.mark.slow
def test_suggestions_do_not_depend_on_the_order_of_sets() -> None:
    """Another process hashes strings differently."""
    code = (
        "import json\nfrom tests.search.suggest.samples import *\n"
        "for name in ('tpe', 'nsga2', 'nsga3'):\n    print(json.dumps(Sweep(settings_of(name), CONDITIONAL).run()))"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1
    assert printed.pop().count("\n") == 3


@pytest.mark.slow
def test_derived_seeds_are_pinned_and_differ_between_slots_and_streams() -> None:
    # A change here would change every published sweep.
    assert (slot_seed(0, 0, "sampler"), slot_seed(7, 42, "trial")) == (4256444179, 211370609)
    seeds = {slot_seed(base, slot, stream) for base in (0, 1) for slot in range(500) for stream in ("sampler", "trial")}
    assert len(seeds) == 2000
    assert all(0 <= seed < 2**32 for seed in seeds)
