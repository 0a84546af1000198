"""Sweeps whose trials run in stages: the worse trials at a rung are pruned, and the same ones after
any interruption of the sweep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from search.conditions.constraints import ConstraintSet
from search.conditions.expressions import parse_comparison
from search.study.engine import Budget, ProgressStore, Search
from search.study.halving import ParetoHalving
from search.study.runner import PROGRESS, OneByOne, SerialRunner, TrialOutcome, TrialSpec, outcome_from
from search.study.study import Objective, StudyJournal, StudySettings, TrialRecord, load_records
from search.suggest.samplers import SamplerSettings
from search.suggest.space import parse_space

EPOCHS = 9
RUNGS = (1, 3)
HALVING = ParetoHalving(3, RUNGS)
COHORT = 6
TRIALS = 18
SPACE: dict[str, Any] = {"gate.target": {"uniform": [0.05, 0.9]}, "gate.optimizer.lr": {"loguniform": [1e-3, 0.3]}}
Arrays = dict[str, NDArray[Any]]


def settings(halving: ParetoHalving | None = HALVING, **changes: Any) -> StudySettings:
    fields: dict[str, Any] = {
        "name": "staged",
        "space": parse_space(SPACE),
        "objectives": (Objective("top1", "maximize"), Objective("madds_m", "minimize")),
        "sampler": SamplerSettings("tpe", {}, 6),
        "cohort": COHORT,
        "halving": halving,
    }
    return StudySettings(**fields | changes)


class Killed(BaseException):
    """An exception that no runner catches."""


@dataclass
class Staged:
    """A stand-in for training: a state that every epoch changes beyond recognition, so that a wrong
    start shows in the metrics.

    Attributes:
        epochs_left: how many epochs run before the process is killed.
        ran: (slot, epoch) in the order in which they ran.
        broken: slots that fail in epoch 2.
        shift: added to top-1, as if another machine computed otherwise.
    """

    epochs_left: float = math.inf
    ran: list[tuple[int, int]] = field(default_factory=list)
    broken: frozenset[int] = frozenset()
    shift: float = 0.0

    def __call__(self, spec: TrialSpec) -> tuple[dict[str, float], Arrays]:
        start = spec.progress.get(f"{PROGRESS}state")
        done, state = (0, spec.seed / 2**32) if start is None else (int(start[0]), float(start[1]))
        end = spec.until or EPOCHS
        assert done <= end
        for epoch in range(done + 1, end + 1):
            if self.epochs_left <= 0:
                raise Killed
            self.epochs_left -= 1
            self.ran.append((spec.slot, epoch))
            if epoch == 2 and spec.slot in self.broken:
                raise ValueError("the gate collapsed")
            state = (3.99 * state * (1 - state)) % 1.0
        target, lr = float(spec.params["gate.target"]), float(spec.params["gate.optimizer.lr"])
        top1 = (1 - math.exp(-3 * target)) * (1 - math.exp(-30 * lr * end)) + 0.02 * state + self.shift
        arrays: Arrays = {"weight": np.full(3, state)}
        if spec.until is not None:
            arrays[f"{PROGRESS}state"] = np.array([end, state])
        return {"top1": top1, "madds_m": 10 * target}, arrays


@dataclass(frozen=True)
class Backwards:
    """Runs trials one by one, the last first."""

    function: Staged

    @property
    def lanes(self) -> int:
        return 64

    def __call__(self, specs: Sequence[TrialSpec]) -> list[TrialOutcome]:
        return [outcome_from(self.function, spec) for spec in reversed(specs)]


def sweep(
    path: Path, function: Staged, trials: int = TRIALS, *, study: StudySettings | None = None, **options: Any
) -> list[TrialRecord]:
    """One launch: the study is read from its file, and nothing else is left of a launch before."""
    journal = StudyJournal.open(path, study or settings())
    options.setdefault("runner", SerialRunner(OneByOne(function)))
    return list(Search(journal=journal, **options).run(Budget(trials)).records)


def essence(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Everything of the records but how long they took."""
    return [replace(record, duration_s=0.0, finished_ms=0) for record in records]


class Forgetful(ProgressStore):
    """Loses everything at once."""

    def save(self, slot: int, rung: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        pass

    def load(self, slot: int, rung: int) -> Mapping[str, NDArray[Any]]:
        return {}

    def forget(self, slot: int) -> None:
        pass


def test_at_every_rung_those_go_on_whom_the_rule_lets_go_on(tmp_path: Path) -> None:
    function = Staged()
    records = sweep(tmp_path / "study", function)
    assert [record.slot for record in records] == list(range(TRIALS))
    for first in range(0, TRIALS, COHORT):
        alive = {record.slot: record for record in records[first : first + COHORT]}
        for rung in RUNGS:
            earlier = [record.rungs[rung] for record in records[:first] if rung in record.rungs]
            found = {slot: record.rungs[rung] for slot, record in alive.items()}
            going_on = HALVING.survivors(found, earlier, ("maximize", "minimize"))
            for slot in alive.keys() - going_on:
                assert (alive[slot].state, max(alive[slot].rungs)) == ("pruned", rung)
            alive = {slot: alive[slot] for slot in going_on}
        assert alive
        assert all(record.state == "complete" and set(record.rungs) == set(RUNGS) for record in alive.values())
    assert 0 < sum(record.state == "pruned" for record in records) < TRIALS


def test_a_pruned_trial_says_where_it_fell_behind_and_has_no_objectives(tmp_path: Path) -> None:
    records = sweep(tmp_path / "study", Staged())
    pruned = [record for record in records if record.state == "pruned"]
    for record in pruned:
        rung = max(record.rungs)
        assert record.values is None
        assert not record.is_feasible
        assert record.reason is not None
        assert str(rung) in record.reason
        assert (record.metrics["top1"], record.metrics["madds_m"]) == record.rungs[rung]


def test_a_complete_trial_is_the_trial_that_runs_at_once(tmp_path: Path) -> None:
    records = sweep(tmp_path / "study", Staged())
    whole = sweep(tmp_path / "whole", Staged(), COHORT, study=settings(None))
    complete = [record for record in records[:COHORT] if record.state == "complete"]
    assert complete
    for record in complete:
        assert (record.params, record.metrics) == (whole[record.slot].params, whole[record.slot].metrics)


def test_no_epoch_runs_twice_and_none_behind_the_rung_of_a_pruned_trial(tmp_path: Path) -> None:
    function = Staged()
    records = sweep(tmp_path / "study", function)
    ends = {record.slot: EPOCHS if record.state == "complete" else max(record.rungs) for record in records}
    assert sorted(function.ran) == [(slot, epoch) for slot, end in ends.items() for epoch in range(1, end + 1)]


def test_what_a_trial_goes_on_from_is_not_kept_with_its_arrays(tmp_path: Path) -> None:
    saved: dict[int, set[str]] = {}
    records = sweep(tmp_path / "study", Staged(), save_arrays=lambda slot, arrays: saved.update({slot: set(arrays)}))
    assert all(saved[record.slot] == {"weight"} for record in records if record.state == "complete")
    assert not any(name.startswith(PROGRESS) for names in saved.values() for name in names)


def test_lost_progress_costs_time_and_nothing_else(tmp_path: Path) -> None:
    kept, lost = Staged(), Staged()
    records = sweep(tmp_path / "kept", kept)
    assert essence(sweep(tmp_path / "lost", lost, progress=Forgetful())) == essence(records)
    assert len(lost.ran) > len(kept.ran)


def test_the_order_in_which_trials_finish_changes_nothing(tmp_path: Path) -> None:
    records = sweep(tmp_path / "forwards", Staged())
    backwards = sweep(tmp_path / "backwards", Staged(), runner=SerialRunner(Backwards(Staged())))
    assert essence(backwards) == essence(records)


@pytest.mark.slow
@pytest.mark.parametrize("pace", [1, 4, 7, 20])
def test_a_sweep_killed_again_and_again_prunes_the_same_trials(tmp_path: Path, pace: int) -> None:
    """Each launch gets some epochs further than what the study knows; the progress is lost with
    each."""
    whole = sweep(tmp_path / "whole", Staged())
    path, launches = tmp_path / "killed", 0
    allowance = pace
    while True:
        function = Staged(epochs_left=allowance)
        launches += 1
        known = _file_size(path)
        try:
            records = sweep(path, function)
        except Killed:
            # A stage is noted as a whole: where none was finished, the next launch gets more time.
            allowance = pace if _file_size(path) > known else allowance + pace
            continue
        break
    assert launches > 3
    assert essence(records) == essence(whole)


def _file_size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def test_a_rung_that_was_noted_is_read_and_not_run_again(tmp_path: Path) -> None:
    whole_function = Staged()
    whole = sweep(tmp_path / "whole", whole_function)
    # All of the first rung and a part of the next stage.
    with pytest.raises(Killed):
        sweep(tmp_path / "killed", Staged(epochs_left=COHORT + 1))
    assert load_records(tmp_path / "killed") == []
    # The machine on which it goes on computes otherwise: what the first rung decided stands.
    other = Staged(shift=-0.3)
    records = sweep(tmp_path / "killed", other, COHORT)
    first = RUNGS[0]
    pruned = [record.slot for record in whole[:COHORT] if max(record.rungs) == first]
    assert pruned
    assert [record.slot for record in records if max(record.rungs) == first] == pruned
    assert [record.rungs[first] for record in records] == [record.rungs[first] for record in whole[:COHORT]]
    assert not {slot for slot, _ in other.ran} & set(pruned)


def test_a_sweep_stopped_between_the_records_of_a_cohort_goes_on_to_the_same_study(tmp_path: Path) -> None:
    whole = sweep(tmp_path / "whole", Staged())
    path, told = tmp_path / "stopped", 0
    while told < TRIALS:
        before = told
        records = sweep(path, Staged(), should_stop=lambda before=before: len(load_records(path)) > before)
        told = len(records)
        assert told > before
        assert essence(records) == essence(whole[:told])


def test_a_point_enqueued_while_a_cohort_was_interrupted_takes_over_no_stage_of_another(tmp_path: Path) -> None:
    path = tmp_path / "study"
    with pytest.raises(Killed):
        sweep(path, Staged(epochs_left=3))  # three slots of the first cohort are noted at the first rung
    whole = sweep(tmp_path / "whole", Staged(), COHORT)
    records = sweep(path, Staged(), COHORT, queue=lambda: [{"gate.target": 0.25}])
    assert [record.params["gate.target"] == 0.25 for record in records].index(True) == 3
    for record, other in zip(records, whole, strict=True):
        assert record.metrics["madds_m"] == 10 * float(record.params["gate.target"])
        assert record.slot >= 3 or record.params == other.params
        for values in record.rungs.values():
            assert values[1] == 10 * float(record.params["gate.target"])


def test_a_trial_that_fails_at_a_rung_is_failed_and_compared_with_nobody(tmp_path: Path) -> None:
    whole = sweep(tmp_path / "whole", Staged(), COHORT)
    first, second = RUNGS
    broken = max((record for record in whole if second in record.rungs), key=lambda record: record.rungs[second])
    records = sweep(tmp_path / "study", Staged(broken=frozenset({broken.slot})), COHORT)
    assert (records[broken.slot].state, records[broken.slot].reason) == ("failed", "ValueError: the gate collapsed")
    assert set(records[broken.slot].rungs) == {first}
    found = {record.slot: record.rungs[second] for record in records if second in record.rungs}
    assert found
    assert broken.slot not in found
    complete = {record.slot for record in records if record.state == "complete"}
    assert complete == HALVING.survivors(found, [], ("maximize", "minimize"))


def test_where_all_fail_the_sweep_goes_on_with_the_next_cohort(tmp_path: Path) -> None:
    records = sweep(tmp_path / "study", Staged(broken=frozenset(range(TRIALS))))
    assert len(records) == TRIALS
    assert {record.state for record in records} == {"failed", "pruned"}


def test_a_hard_constraint_ends_a_trial_at_the_first_rung(tmp_path: Path) -> None:
    limit = parse_comparison("madds_m <= 5", ["top1", "madds_m"])
    function = Staged()
    records = sweep(tmp_path / "study", function, constraints=ConstraintSet(hard=(limit,)))
    broken = [record for record in records if record.metrics["madds_m"] > 5]
    assert broken
    for record in broken:
        assert record.state == "pruned"
        assert record.reason is not None
        assert record.reason.startswith("violates madds_m <= 5")
        assert record.rungs == {}
        assert [epoch for slot, epoch in function.ran if slot == record.slot] == [1]
    assert any(record.state == "complete" for record in records)
    # They are not compared: a cheap trial must not be pruned for one that may not exist.
    for first in range(0, TRIALS, COHORT):
        found = {record.slot: record.rungs[1] for record in records[first : first + COHORT] if 1 in record.rungs}
        earlier = [record.rungs[1] for record in records[:first] if 1 in record.rungs]
        going_on = {slot for slot in found if 3 in records[slot].rungs}
        assert going_on == HALVING.survivors(found, earlier, ("maximize", "minimize"))


def test_values_that_are_no_numbers_fail_at_their_rung(tmp_path: Path) -> None:
    records = sweep(tmp_path / "study", Staged(shift=math.nan), COHORT)
    assert {(record.state, record.reason) for record in records} == {("failed", "top1 is nan")}
    assert all(record.rungs == {} for record in records)
