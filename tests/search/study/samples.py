"""Small studies: a space, cheap trial functions, a whole sweep, and one that kills itself."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from search.conditions.constraints import ConstraintSet
from search.conditions.expressions import Comparison, parse_comparison
from search.study.engine import Budget, Search
from search.study.journal_chain import ChainWriter, chain_path
from search.study.runner import OneByOne, SerialRunner, TrialFunction, TrialSpec
from search.study.study import Objective, StudyJournal, StudySettings, TrialRecord
from search.suggest.samplers import SamplerSettings
from search.suggest.space import parse_space

SPACE: dict[str, Any] = {
    "gate.target": {"uniform": [0.05, 0.9]},
    "gate.optimizer.lr": {"loguniform": [1e-3, 0.3]},
    "gate.routing.first": {"int": [0, 3]},
    "gate.sgs.strategy": {"choice": ["try_best", "give_up"]},
    "gate.losses.cls": 1.0,
}


def sampler_settings(name: str, startup: int = 6) -> SamplerSettings:
    return SamplerSettings(name, {"points": 4} if name == "grid" else {}, startup)


def study_settings(sampler: str | SamplerSettings = "tpe", **changes: Any) -> StudySettings:
    fields: dict[str, Any] = {
        "name": "digits",
        "space": parse_space(SPACE),
        "objectives": (Objective("top1", "maximize"), Objective("madds_m", "minimize")),
        "sampler": sampler_settings(sampler) if isinstance(sampler, str) else sampler,
    }
    return StudySettings(**fields | changes)


def trade_off(spec: TrialSpec) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """A cheap stand-in for a gate trial: accuracy saturates in cost; the noise comes from the
    trial's own seed."""
    target, lr, first = (float(spec.params[f"gate.{key}"]) for key in ("target", "optimizer.lr", "routing.first"))
    cost = target + 0.1 * first
    noise = np.random.default_rng(spec.seed).normal(0, 0.01)
    top1 = 1 - math.exp(-3 * cost) - 0.05 * abs(math.log10(lr) + 1.5) + noise
    return {"top1": top1, "madds_m": 10 * cost}, {"weight": np.full(3, target)}


def sometimes_broken(spec: TrialSpec) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    if spec.slot % 5 == 3:
        raise ValueError("the gate\ncollapsed")
    return trade_off(spec)


def sweep(
    path: Path,
    trials: int = 20,
    *,
    settings: StudySettings | None = None,
    function: TrialFunction = sometimes_broken,
    **options: Any,
) -> list[TrialRecord]:
    journal = StudyJournal.open(path, settings or study_settings())
    options.setdefault("runner", SerialRunner(OneByOne(function)))
    return list(Search(journal=journal, **options).run(Budget(trials)).records)


def essence(records: Sequence[TrialRecord]) -> list[tuple[Any, ...]]:
    """Everything of the records but how long they took."""
    return [(r.slot, r.number, r.state, r.params, r.values, r.metrics, r.reason, r.constraints) for r in records]


def comparison(text: str) -> Comparison:
    return parse_comparison(text, ["top1", "madds_m", "latency_ms"])


SLACK = ConstraintSet(soft=(comparison("madds_m <= 6"),))
POINT = {"gate.target": 0.5, "gate.sgs.strategy": "give_up"}
TRIALS_IN_KILLS = 14
HEADER_LINES = 3
"""Records of a study before its first trial."""


def die_in_slot(path: Path, slot: int, where: str) -> None:
    """Search until `slot` is being run, recorded, or half written; then end as by `kill -9`."""

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def run(spec: TrialSpec) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        if where == "run" and spec.slot == slot:
            die()
        return sometimes_broken(spec)

    def keep(kept_slot: int, arrays: Mapping[str, np.ndarray]) -> None:
        if kept_slot != slot:
            return
        if where == "torn":
            with path.open("ab") as file:
                file.write(b'{"op_code":4,"worker_id":"x","study_id":0,"datetime_st')
            path.with_name(path.name + ".lock").symlink_to(path)
        if where in ("keep", "torn"):
            die()

    _die_in_chain(path, slot, where)
    sweep(path, TRIALS_IN_KILLS, function=run, save_arrays=keep)


def _die_in_chain(path: Path, slot: int, where: str) -> None:
    """End when the journal has the record of `slot`, before its entry in the chain or within it."""
    if "chain" not in where:
        return
    whole_entry = ChainWriter.catch_up

    def catch_up(chain: ChainWriter) -> None:
        if path.read_bytes().count(b"\n") - HEADER_LINES < slot + 1:
            whole_entry(chain)
            return
        if where == "torn chain":
            with chain_path(path).open("ab") as file:
                file.write(b"12 0a1b2c")
        os.kill(os.getpid(), signal.SIGKILL)

    ChainWriter.catch_up = catch_up  # type: ignore[method-assign] # this process ends soon
