"""Which trials are listed, and in which order."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from dsnet.errors import ConfigError
from orchestration.commands.terminal import show_trials
from orchestration.results.trial_list import WANTED, ListedTrial, Selection, TrialList, json_row
from search.study.runner import State
from search.study.study import TrialRecord


def trial(slot: int, state: State = "complete", **changes: Any) -> ListedTrial:
    fields: dict[str, Any] = {
        "slot": slot,
        "number": slot,
        "state": state,
        "params": {"gate.target": slot / 10},
        "values": None,
        "metrics": {} if state == "failed" else {"top1": 0.9 - 0.01 * slot, "madds_m": 100.0 - slot},
        "reason": None if state == "complete" else f"it is {state}",
        "duration_s": 1.0,
        **changes,
    }
    return ListedTrial(f"trial-{slot:04d}", TrialRecord(**fields), is_front=slot == 0)


CAP = "madds_m <= 98.5"
TRIALS = TrialList(
    (
        trial(0, constraints={CAP: 0.015}),
        trial(1, constraints={CAP: 0.005}, params={"gate.router": "cascade", "gate.target": 0.9}),
        trial(2, constraints={CAP: -0.01}, params={"gate.router": "gate", "gate.target": 0.2, "gate.sgs.t_easy": 0.5}),
        trial(3, "pruned", rungs={3: (0.87, 97.0)}),
        trial(4, "failed", params={"gate.router": "gate", "gate.target": 0.3}),
        trial(5, constraints={CAP: math.nan}, metrics={"top1": 0.5, "madds_m": math.nan}),
    ),
    (("top1", "maximize"), ("madds_m", "minimize")),
    lambda _: {"top1": 0.89, "madds_m": 120.0},
)


def slots(**asked: Any) -> list[int]:
    return [found.record.slot for found in TRIALS.select(Selection(**asked))]


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (None, [0, 1, 2, 3, 4, 5]),
        ("complete", [0, 1, 2, 5]),
        ("feasible", [2]),
        ("infeasible", [0, 1, 5]),  # a constraint of which nothing is known does not hold
        ("pruned", [3]),
        ("failed", [4]),
    ],
)
def test_a_state_chooses_its_trials(state: str | None, expected: list[int]) -> None:
    assert slots(state=state) == expected
    assert state is None or state in WANTED


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (["madds_m <= 98"], [2, 3]),
        (["top1 >= baseline.top1 - 0.005"], [0, 1]),
        (["gate.target <= 0.3", "top1 > 0.6"], [0, 2, 3]),
        (["gate.sgs.t_easy >= 0"], [2]),  # a parameter that a trial was not given holds nothing
        (["madds_m <= 0.83*baseline.madds_m"], [1, 2, 3]),
    ],
)
def test_conditions_over_metrics_parameters_and_the_baseline_must_all_hold(
    where: list[str], expected: list[int]
) -> None:
    assert slots(where=tuple(where)) == expected


@pytest.mark.parametrize(
    ("sort", "expected"),
    [
        ("top1", [0, 1, 2, 3, 5, 4]),  # more is better
        ("madds_m", [3, 2, 1, 0, 4, 5]),  # less is better; those without a value last, as they came
        ("gate.target", [0, 2, 3, 4, 5, 1]),
    ],
)
def test_sorting_puts_the_best_first_and_what_has_no_value_last(sort: str, expected: list[int]) -> None:
    assert slots(sort=sort) == expected
    assert slots(sort=sort, limit=2) == expected[:2]


def test_an_unknown_name_is_refused_with_the_one_that_may_be_meant() -> None:
    with pytest.raises(ConfigError, match=r"--sort madd_m: .* did you mean 'madds_m'"):
        slots(sort="madd_m")
    with pytest.raises(ConfigError, match="did you mean 'madds_m'"):
        slots(where=("madd_m <= 3",))


def test_a_baseline_is_only_measured_where_a_condition_reads_it() -> None:
    def unmeasured(supernet: str | None) -> dict[str, float]:
        raise AssertionError("nobody asked for it")

    trials = TrialList(TRIALS.trials, TRIALS.objectives, unmeasured)
    assert len(trials.select(Selection(where=("top1 >= 0.5",), sort="top1"))) == 5


def test_a_trial_is_compared_with_the_baseline_of_its_own_supernet() -> None:
    both = [ListedTrial(f"{name}/trial", TRIALS.trials[2].record, False, name) for name in ("s0", "s1")]
    trials = TrialList(tuple(both), TRIALS.objectives, lambda name: {"top1": 0.85 if name == "s0" else 0.95})
    chosen = trials.select(Selection(where=("top1 >= baseline.top1",)))
    assert [found.supernet for found in chosen] == ["s0"]


def test_json_holds_everything_and_no_number_that_json_does_not_know() -> None:
    rows = [json_row(found) for found in TRIALS.trials]
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert [row["is_feasible"] for row in rows] == [False, False, True, False, False, False]
    assert rows[0]["breaks"] == [CAP]
    assert rows[3]["rungs"] == {"3": [0.87, 97.0]}
    assert rows[5]["metrics"]["madds_m"] is None
    assert rows[5]["constraints"] == {CAP: None}


def test_the_table_tells_states_reasons_and_what_was_not_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    show_trials(TRIALS, Selection(), as_json=False)
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0].rstrip("*"): line.split() for line in lines[1:7]}
    assert lines[0].split() == ["trial", "state", "top-1", "%", "val", "MAdds", "M", "target", "router", "sgs.t_easy"]
    assert rows["trial-0000"] == ["trial-0000*", "infeasible", "90.0", "100", "0", "-", "-"]
    assert rows["trial-0002"] == ["trial-0002", "complete", "88.0", "98", "0.2", "gate", "0.5"]
    text = "\n".join(lines)
    assert f"trial-0001 infeasible: violates {CAP}" in text
    assert "trial-0004 failed: it is failed" in text
    assert "trial-0003 pruned: it is pruned" in text


def test_many_reasons_are_counted_rather_than_listed(capsys: pytest.CaptureFixture[str]) -> None:
    pruned = tuple(trial(slot, "pruned", reason="behind at epoch 3") for slot in range(20))
    show_trials(TrialList(pruned, TRIALS.objectives), Selection(state="pruned", limit=15), as_json=False)
    text = capsys.readouterr().out
    assert "15 pruned: behind at epoch 3" in text
    assert "15 of 20 trials" in text


def test_trials_of_several_supernets_say_where_they_come_from(capsys: pytest.CaptureFixture[str]) -> None:
    listed = ListedTrial("s0-3f/trial-0001", TRIALS.trials[1].record, False, "s0-3f")
    show_trials(TrialList((listed,), TRIALS.objectives), Selection(), as_json=False)
    head, row = capsys.readouterr().out.splitlines()[:2]
    assert head.split()[:3] == ["trial", "state", "supernet"]
    assert row.split()[:3] == ["s0-3f/trial-0001", "infeasible", "s0-3f"]
    assert json_row(listed)["supernet"] == "s0-3f"
