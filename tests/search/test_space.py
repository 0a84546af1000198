"""The search space reads what the configuration writes, and the samplers draw from exactly that."""

from __future__ import annotations

from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from dsnet.errors import ConfigError
from search.samplers import KNOWN_SAMPLERS, make_sampler, slot_seed
from search.space import parse_space, suggest
from search.study import quiet_optuna

DIGITS: dict[str, Any] = {
    "gate.target": {"uniform": [0.05, 0.9]},
    "gate.optimizer.lr": {"loguniform": [1e-3, 0.3]},
    "gate.routing.first": {"int": [0, 3]},
    "gate.optimizer.steps": {"int": [100, 400, 100]},
    "gate.sgs.t_easy": {"step": [0.0, 0.9, 0.3]},
    "gate.sgs.strategy": {"choice": ["try_best", "give_up"]},
    "gate.losses.cls": {"fixed": 1.0},
    "gate.losses.form": "hinge",
}


def draw(written: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    with quiet_optuna():
        study = optuna.create_study(sampler=make_sampler("random", seed=seed))
    return suggest(study.ask(), parse_space(written))


def test_each_kind_becomes_its_distribution() -> None:
    assert dict(parse_space(DIGITS).distributions) == {
        "gate.target": FloatDistribution(0.05, 0.9),
        "gate.optimizer.lr": FloatDistribution(1e-3, 0.3, log=True),
        "gate.routing.first": IntDistribution(0, 3),
        "gate.optimizer.steps": IntDistribution(100, 400, step=100),
        "gate.sgs.t_easy": FloatDistribution(0.0, 0.9, step=0.3),
        "gate.sgs.strategy": CategoricalDistribution(("try_best", "give_up")),
        "gate.losses.cls": CategoricalDistribution((1.0,)),
        "gate.losses.form": CategoricalDistribution(("hinge",)),
    }


def test_a_suggestion_names_everything_in_the_order_of_the_file() -> None:
    params = draw(DIGITS)
    assert list(params) == list(DIGITS)
    assert params["gate.losses.cls"] == 1.0
    assert params["gate.losses.form"] == "hinge"


@pytest.mark.parametrize(
    ("entry", "ends"),
    [({"int": [2, 4]}, {2, 4}), ({"int": [0, 9, 3]}, {0, 9}), ({"step": [0.1, 0.3, 0.1]}, {0.1, 0.3})],
)
def test_both_ends_of_a_range_are_drawn(entry: Any, ends: set[float]) -> None:
    drawn = {draw({"gate.x": entry}, seed)["gate.x"] for seed in range(60)}
    assert ends <= {round(value, 9) for value in drawn}


@settings(max_examples=40, deadline=None)
@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e3), st.integers(0, 2**31))
def test_a_uniform_draw_stays_inside_its_range(low: float, width: float, seed: int) -> None:
    assert low <= draw({"gate.x": {"uniform": [low, low + width]}}, seed)["gate.x"] <= low + width


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"uniform": [0.9, 0.1]}, r"space\.gate\.x: uniform \[0.9, 0.1\] is the wrong way round; write \[0.1, 0.9\]"),
        ({"int": [3, 0]}, "wrong way round"),
        ({"int": [0, 1.5]}, "whole numbers"),
        ({"int": [0, 10, 3]}, "does not reach its end 10; end it at 9 or 12"),
        ({"step": [0.0, 1.0, 0.3]}, r"end it at 0\.9 or 1\.2"),
        ({"step": [0.0, 1.0, 0]}, "a step above 0"),
        ({"step": [0.0, 1.0]}, r"written step: \[low, high, step\]"),
        ({"loguniform": [0.0, 1.0]}, "above 0"),
        ({"uniform": [0.0, float("inf")]}, "finite"),
        ({"uniform": 3}, "finite"),
        ({"choice": []}, "takes a list"),
        ({"choice": ["a", None]}, "must be a number, text"),
        ({"choice": [1, True]}, "twice"),
        ({"uniformly": [0, 1]}, "unknown distribution 'uniformly'; did you mean 'uniform'"),
        ({"uniform": [0, 1], "int": [0, 1]}, "expected one distribution"),
        ([0, 1], "expected one distribution"),
        (None, "expected one distribution"),
    ],
)
def test_what_cannot_be_searched_is_refused_by_name(entry: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_space({"gate.x": entry})
    assert "space.gate.x" in str(caught.value)


def test_an_empty_space_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to search over"):
        parse_space({})


def test_the_hash_tells_ranges_and_order_apart() -> None:
    a, b = {"gate.a": {"uniform": [0, 1]}}, {"gate.b": {"uniform": [0, 1]}}
    spaces = [a | b, b | a, a, a | {"gate.b": {"uniform": [0, 2]}}]
    assert len({parse_space(space).hash for space in spaces}) == len(spaces)
    assert parse_space(a | b).hash == parse_space(dict(a | b)).hash


@pytest.mark.parametrize("name", KNOWN_SAMPLERS)
def test_every_sampler_repeats_itself_with_one_seed_and_differs_with_another(name: str) -> None:
    def first_draw(seed: int) -> dict[str, Any]:
        with quiet_optuna():
            study = optuna.create_study(directions=["maximize", "minimize"], sampler=make_sampler(name, seed=seed))
        return suggest(study.ask(), parse_space(DIGITS))

    assert first_draw(3) == first_draw(3)
    assert first_draw(3) != first_draw(4)


def test_an_unknown_sampler_is_refused_with_a_guess() -> None:
    with pytest.raises(ConfigError, match=r"unknown sampler 'nsga3'; did you mean 'nsga2'.* known: random, tpe, nsga2"):
        make_sampler("nsga3", seed=0)


def test_derived_seeds_are_pinned_and_differ_between_slots_and_streams() -> None:
    # A change here would change every published sweep.
    assert (slot_seed(0, 0, "sampler"), slot_seed(7, 42, "trial")) == (4256444179, 211370609)
    seeds = {slot_seed(base, slot, stream) for base in (0, 1) for slot in range(500) for stream in ("sampler", "trial")}
    assert len(seeds) == 2000
    assert all(0 <= seed < 2**32 for seed in seeds)
