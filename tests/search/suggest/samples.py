"""Two small spaces, and a study in memory that asks a sampler as the engine does."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import optuna
from optuna.storages import InMemoryStorage
from optuna.study import Study
from optuna.trial import TrialState, create_trial

from search.suggest.samplers import (
    SamplerSettings,
    lasting_notes,
    make_sampler,
    quiet_optuna,
)
from search.suggest.space import Scalar, Space, parse_space, suggest

FLAT = parse_space(
    {
        "gate.target": {"uniform": [0.05, 0.9]},
        "gate.optimizer.lr": {"loguniform": [1e-3, 0.3]},
        "gate.routing.first": {"int": [0, 3]},
        "gate.sgs.t_hard": {"step": [0.0, 0.4, 0.1]},
        "gate.sgs.strategy": {"choice": ["try_best", "give_up"]},
        "gate.losses.cls": 1.0,
    }
)


CONDITIONAL = parse_space(
    {
        "gate.sgs.t_easy": {"uniform": [0.0, 0.9], "when": {"gate.router": "gate"}},
        "gate.router": {"choice": ["gate", "cascade", "gates"]},
        "gate.target": {"uniform": [0.05, 0.9]},
        "gate.losses.sgs": {"choice": [0, 1], "when": {"gate.router": ["gate", "gates"]}},
        "gate.sgs.t_hard": {"step": [0.0, 0.4, 0.1], "when": {"gate.losses.sgs": 1}},
        "gate.losses.form": {"fixed": "hinge", "when": {"gate.router": "gate"}},
    }
)


SPACES = {"flat": FLAT, "conditional": CONDITIONAL}
FOREIGN = "optuna.samplers.RandomSampler"
SIZE = 6


@dataclass
class Sweep:
    """A study in memory, asked and told in cohorts, as the engine does it."""

    settings: SamplerSettings
    space: Space
    num_objectives: int = 2
    is_constrained: bool = True
    seed: int = 5
    study: Study = field(init=False)
    notes: list[str] = field(default_factory=list)
    """System attributes that the samplers wrote on each trial when it was asked, as JSON."""

    def __post_init__(self) -> None:
        with quiet_optuna():
            directions = ["maximize", "minimize", "minimize"][: self.num_objectives]
            self.study = optuna.create_study(storage=InMemoryStorage(), directions=directions)

    def ask(self, slots: Sequence[int]) -> list[dict[str, Scalar]]:
        points = []
        with quiet_optuna():
            for slot in slots:
                self.study.sampler = make_sampler(self.settings, space=self.space, base_seed=self.seed, slot=slot)
                trial = self.study.ask()
                points.append(suggest(trial, self.space))
                self.notes.append(json.dumps(lasting_notes(self.study.trials[trial.number].system_attrs)))
        return points

    def tell(self, slots: Sequence[int], points: Sequence[Mapping[str, Scalar]]) -> None:
        with quiet_optuna():
            for slot, point in zip(slots, points, strict=True):
                trial = optuna.trial.Trial(self.study, self.study.trials[slot]._trial_id)
                state = {5: TrialState.FAIL, 3: TrialState.PRUNED}.get(slot % 11, TrialState.COMPLETE)
                values = outcome(point)[: self.num_objectives]
                if self.is_constrained:
                    trial.set_constraint("cheap", values[1] - 0.5)
                    trial.set_constraint("good", 0.3 - values[0])
                self.study.tell(trial, values if state == TrialState.COMPLETE else None, state=state)

    def run(self) -> list[list[dict[str, Scalar]]]:
        """A few cohorts, most of them beyond the random start."""
        cohorts = []
        for slots in self.cohorts():
            cohorts.append(self.ask(slots))
            self.tell(slots, cohorts[-1])
        return cohorts

    def cohorts(self) -> list[range]:
        """The slots of each cohort; few, because a Gaussian process takes half a second for
        each."""
        size, number = (3, 2) if self.settings.name == "gp" else (6, 7)
        return [range(first, first + size) for first in range(0, size * number, size)]

    def rebuilt(self, num_trials: int) -> Sweep:
        """Another process's sweep, made from this one's first trials as a journal keeps them."""
        other = Sweep(self.settings, self.space, self.num_objectives, self.is_constrained, self.seed)
        with quiet_optuna():
            for trial, notes in zip(self.study.trials[:num_trials], self.notes, strict=False):
                other.study.add_trial(
                    create_trial(
                        state=trial.state,
                        values=trial.values,
                        params=trial.params,
                        distributions=trial.distributions,
                        system_attrs=json.loads(notes),
                        constraints=trial.constraints,
                    )
                )
        return other


def outcome(point: Mapping[str, Scalar]) -> list[float]:
    """Three objectives at odds with each other; steps in them make ties."""
    target = float(point["gate.target"])
    bonus = sum(0.1 * float(point.get(name, 0.0)) for name in ("gate.sgs.t_hard", "gate.sgs.t_easy"))
    return [round(math.sqrt(target) - bonus, 2), target, round(bonus, 1)]


def settings_of(name: str) -> SamplerSettings:
    return SamplerSettings(name, startup=2 if name == "gp" else 5)
