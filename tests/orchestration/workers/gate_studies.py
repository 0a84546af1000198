"""A small search over real gate trials, run with different numbers of workers."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from orchestration.config.gate import GateConfig
from orchestration.runs.stages import canonical_settings
from orchestration.workers.gate_trials import MakeGateTrial
from orchestration.workers.runtime import RaySettings, ray_session
from orchestration.workers.self_check import StartCheck
from orchestration.workers.trials import Actors, RayRunner
from search.front.pareto import front_mask
from search.gate_check import Finding, GateCheck
from search.study.engine import Budget, Search
from search.study.runner import Runner
from search.study.study import Objective, StudyJournal, StudySettings
from search.suggest.samplers import SamplerSettings
from search.suggest.space import parse_space
from tests.dsnet.samples import random_table, small_set
from tests.search.samples import latency

SPACE: dict[str, Any] = {
    "gate.router": {"choice": ["gate", "cascade"]},
    "gate.target": {"uniform": [0.05, 0.9], "when": {"gate.router": "gate"}},
    "gate.sgs.t_easy": {"uniform": [0.0, 0.9], "when": {"gate.router": "gate"}},
    "gate.routing.first": {"int": [0, 2]},  # a cascade over one route is a trial that fails
    "gate.optimizer.lr": {"loguniform": [0.01, 0.3]},
}


def gate_study(folder: Path, runner: Runner) -> list[Any]:
    """A small sweep of real gate trials: every trial as JSON, and the slots of the front."""
    settings = StudySettings(
        name="gates",
        space=parse_space(SPACE),
        objectives=(Objective("top1", "maximize"), Objective("madds_m", "minimize")),
        sampler=SamplerSettings("tpe", startup=8),
        seed=3,
        cohort=8,
    )
    records = Search(journal=StudyJournal.open(folder, settings), runner=runner).run(Budget(24)).records
    complete = [record for record in records if record.values is not None]
    front = np.flatnonzero(front_mask([record.values or () for record in complete], ["maximize", "minimize"]))
    trials = [[r.slot, r.state, r.reason, dict(r.params), r.values, dict(r.metrics)] for r in records]
    return json.loads(json.dumps([trials, [complete[index].slot for index in front]]))


def gate_trials() -> tuple[MakeGateTrial, dict[str, np.ndarray]]:
    subnets = small_set("ds_tiny")
    tables = {
        name: random_table(size, len(subnets), seed=size, split=name) for name, size in (("gate", 80), ("val", 90))
    }
    defaults = canonical_settings({"gate": GateConfig().model_dump(mode="json")}) | {"gate.optimizer.steps": 40}
    make = MakeGateTrial({name: table.meta() for name, table in tables.items()}, subnets, latency(subnets), defaults)
    return make, {f"{name}/{key}": array for name, table in tables.items() for key, array in table.arrays().items()}


def studies_by_workers(folder: Path) -> dict[str, list[Any]]:
    """The same sweep with 1 and 3 actors, in a cluster of its own, and what the actors' checks
    came to."""
    make, arrays = gate_trials()
    studies = {}
    findings: list[Finding] = []
    check = StartCheck(GateCheck.of_space(parse_space(SPACE)), findings.append)
    with ray_session(RaySettings(num_cpus=4, object_store_mib=75)):
        for num_actors in (1, 3):
            with closing(RayRunner(make, arrays=arrays, actors=Actors(number=num_actors), check=check)) as runner:
                studies[str(num_actors)] = gate_study(folder / f"{num_actors}.log", runner)
    return {**studies, "findings": [[finding.digest, list(finding.unequal)] for finding in findings]}
