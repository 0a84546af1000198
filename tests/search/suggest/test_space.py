"""The search space reads what the configuration writes, and the samplers draw from exactly that."""

from __future__ import annotations

from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from dsnet.errors import ConfigError
from search.suggest.samplers import quiet_optuna
from search.suggest.space import at_share, check_point, nth_value, num_values, parse_space, suggest

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
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
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


CONDITIONAL: dict[str, Any] = {
    "gate.sgs.t_easy": {"uniform": [0.0, 0.9], "when": {"gate.router": "gate"}},
    "gate.router": {"choice": ["gate", "cascade"]},
    "gate.depth": {"int": [1, 3], "when": {"gate.router": ["gate", "cascade"]}},
    "gate.tail": {"loguniform": [0.1, 1.0], "when": {"gate.depth": [2, 3], "gate.router": "gate"}},
    "gate.flag": {"fixed": True, "when": {"gate.depth": 1}},
}


class TestConditions:
    def test_parents_come_first_and_the_rest_keeps_its_order(self) -> None:
        space = parse_space(CONDITIONAL)
        assert list(space.distributions) == ["gate.router", "gate.sgs.t_easy", "gate.depth", "gate.tail", "gate.flag"]

    def test_exactly_what_exists_is_drawn(self) -> None:
        points = [draw(CONDITIONAL, seed) for seed in range(60)]
        for point in points:
            is_gate = point["gate.router"] == "gate"
            assert ("gate.sgs.t_easy" in point) == is_gate
            assert ("gate.tail" in point) == (is_gate and point["gate.depth"] > 1)
            assert ("gate.flag" in point) == (point["gate.depth"] == 1)
        assert len({tuple(point) for point in points}) == 4

    def test_what_hangs_on_something_absent_is_absent(self) -> None:
        written = {
            "a": {"choice": [1, 2]},
            "b": {"choice": [1, 2], "when": {"a": 2}},
            "c": {"uniform": [0, 1], "when": {"b": [1, 2]}},
        }
        assert {tuple(draw(written, seed)) for seed in range(20)} == {("a",), ("a", "b", "c")}

    def test_dimensions_that_exist_together_are_one_group(self) -> None:
        written = {**CONDITIONAL, "gate.other": {"uniform": [0, 1], "when": {"gate.router": "gate"}}}
        assert parse_space(written).groups == (
            ("gate.router", "gate.depth"),
            ("gate.sgs.t_easy", "gate.other"),
            ("gate.tail",),
        )

    def test_a_condition_changes_the_hash(self) -> None:
        bare = {name: {k: v for k, v in entry.items() if k != "when"} for name, entry in CONDITIONAL.items()}
        assert parse_space(bare).hash != parse_space(CONDITIONAL).hash

    @pytest.mark.parametrize(
        ("extra", "message"),
        [
            ({"x": {"uniform": [0, 1], "when": {"gate.rooter": "gate"}}}, r"space.x: when names 'gate.rooter'.*mean 'gate.router'"),
            ({"x": {"uniform": [0, 1], "when": {"gate.router": "gates"}}}, "gate.router is 'gates', but it only takes 'gate', 'cascade'"),
            ({"x": {"uniform": [0, 1], "when": {"gate.depth": 4}}}, r"only takes whole numbers 1\.\.3"),
            ({"x": {"uniform": [0, 1], "when": {"gate.depth": 1.5}}}, "only takes whole numbers"),
            ({"x": {"uniform": [0, 1], "when": {"gate.tail": 1.0}}}, "needs a choice, fixed or int"),
            ({"x": {"uniform": [0, 1], "when": {"x": 1}}}, "needs a choice, fixed or int"),
            ({"x": {"choice": [0, 1], "when": {"x": 1}}}, "form a cycle: x -> x"),
            (
                {"x": {"choice": [0, 1], "when": {"y": 1}}, "y": {"choice": [0, 1], "when": {"x": 1}}},
                "form a cycle: x -> y -> x; remove one",
            ),
            ({"x": {"choice": [0, 1], "when": {"gate.router": []}}}, "lists no value of gate.router"),
            ({"x": {"choice": [0, 1], "when": "gate"}}, "write the condition as when:"),
            ({"x": {"choice": [0, 1], "when": {}}}, "write the condition as when:"),
            ({"x": {"when": {"gate.router": "gate"}}}, "expected one distribution"),
            (
                {"gate.sgs.flag": {"fixed": True, "when": {"gate.router": "gate"}},
                 "y": {"int": [0, 1], "when": {"gate.sgs.flag": True, "gate.router": "cascade"}}},
                "space.y: its conditions can never hold together: gate.sgs.flag is True and gate.router is cascade",
            ),
        ],
    )  # fmt: skip
    def test_a_condition_that_cannot_be_is_refused(self, extra: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            parse_space({**CONDITIONAL, **extra})

    def test_parents_with_too_many_values_are_refused(self) -> None:
        with pytest.raises(
            ConfigError, match="a, b, on which other dimensions depend, have more than 100,000 combinations"
        ):
            parse_space(
                {"a": {"int": [1, 10**9]}, "b": {"int": [0, 1]}, "c": {"uniform": [0, 1], "when": {"a": 1, "b": 1}}}
            )


class TestCheckPoint:
    @pytest.mark.parametrize(
        "point",
        [
            {},
            {"gate.tail": 0.5},
            {"gate.router": "gate", "gate.depth": 2, "gate.tail": 0.1},
            {"gate.depth": 3.0},
            {"gate.router": "cascade", "gate.flag": True},
        ],
    )
    def test_what_fits_passes_whole_or_in_part(self, point: dict[str, Any]) -> None:
        check_point(parse_space(CONDITIONAL), point)

    @pytest.mark.parametrize(
        ("point", "message"),
        [
            ({"gate.rooter": "gate"}, "'gate.rooter' is not in the space; did you mean 'gate.router'"),
            ({"gate.router": "gates"}, "gate.router = 'gates' is outside the space; it takes 'gate', 'cascade'"),
            ({"gate.depth": 2.5}, r"it takes whole numbers 1\.\.3"),
            ({"gate.depth": True}, "whole numbers"),
            ({"gate.sgs.t_easy": 0.95}, r"it takes 0\.\.0\.9"),
            ({"gate.sgs.t_easy": float("nan")}, "outside"),
            ({"gate.sgs.t_easy": "0.5"}, "outside"),
            (
                {"gate.router": "cascade", "gate.sgs.t_easy": 0.5},
                "only tried when gate.router is gate, which is not so in this point",
            ),
            ({"gate.depth": 1, "gate.tail": 0.5}, "only tried when gate.depth is 2 or 3"),
        ],
    )
    def test_what_does_not_is_refused(self, point: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            check_point(parse_space(CONDITIONAL), point)

    def test_a_grandparent_denies_too(self) -> None:
        space = parse_space(
            {
                "a": {"choice": [1, 2]},
                "b": {"choice": [1, 2], "when": {"a": 2}},
                "c": {"choice": [0, 1], "when": {"b": 1}},
            }
        )
        check_point(space, {"a": 2, "c": 0})
        with pytest.raises(ConfigError, match="c is only tried when a is 2"):
            check_point(space, {"a": 1, "c": 0})


@settings(max_examples=30, deadline=None)
@given(st.integers(-20, 20), st.integers(1, 5), st.integers(0, 30), st.integers(0, 2**31))
def test_steps_and_whole_numbers_are_listed_as_optuna_draws_them(low: int, step: int, number: int, seed: int) -> None:
    high = low + step * number
    written = {"i": {"int": [low, high, step]}, "f": {"step": [low / 10, high / 10, step / 10]}}
    space, point = parse_space(written), draw(written, seed)
    for name, distribution in space.distributions.items():
        values = [nth_value(distribution, k) for k in range(num_values(distribution))]
        assert len(values) == number + 1
        assert point[name] in values
        assert [at_share(distribution, (k + 0.5) / len(values)) for k in range(len(values))] == values
