"""The hyperparameters of one router's training (Stage II)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dsnet.gates.losses import COMPLEXITY_FORMS
from dsnet.routers.kinds import RouterKind, kind_names, router_kind

QUALITIES = ("correct", "probability")


@dataclass(frozen=True, kw_only=True)
class GateSettings:
    """One router's hyperparameters."""

    router: str = "gate"
    """One of `dsnet.routers.kinds.kind_names()`."""
    target: float = 0.5
    """t in [0, 1]: MAdds_min + t (MAdds_max - MAdds_min) over the whole SubnetSet (the user's
    "target FLOPs")."""
    target_madds_m: float | None = None
    """The target in million MAdds, in place of `target`; None = not given."""
    routes: tuple[int, ...] = ()
    """The routing space: increasing ids of the SubnetSet; empty takes all."""
    t_easy: float = 0.0
    """SGS: an image is easy iff the smallest route is right with p(y) >= t_easy; 0 is the paper's
    rule."""
    t_hard: float = 0.0
    """SGS: an image is hard iff the largest route is wrong or has p(y) < t_hard."""
    strategy: str = "try_best"
    """Hard images go to the largest (`try_best`) or the smallest (`give_up`) route."""
    sgs_target: str = "extremes"
    """`extremes` as published, or `cheapest`: the cheapest right route (ours)."""
    lambda_cls: float = 1.0
    lambda_sgs: float = 1.0
    lambda_complexity: float = 0.5
    lambda_quality: float = 0.0
    """Weight of the quality loss: half the squared difference between each route's score and the
    quality of its answer (ours). The score is then an estimate of the route's accuracy on the
    image, and calibration trades accuracy for MAdds at one price."""
    quality_of: str = "correct"
    """Quality of an answer: `correct` (1 or 0), or the `probability` of the label."""
    complexity_form: str = "hinge"
    optimizer: str = "adam"
    """`adam` or `sgd` (Nesterov momentum 0.9)."""
    lr: float = 0.05
    weight_decay: float = 0.0
    steps: int = 200
    batch_size: int = 512
    temperature_start: float = 1.0
    temperature_end: float = 0.3
    """The softmax temperature falls geometrically, so that its expectation approaches the deployed
    argmax."""
    hidden_units: int = 32
    """Hidden units of the perceptron, for the kinds that have one."""
    seed: int = 0
    """Seed of a perceptron's initial weights, and of all that is random in end-to-end training. A
    linear head is initialised to zero."""

    def __post_init__(self) -> None:
        _check_choice("gate.router", self.router, kind_names())
        _check_choice("gate.sgs.strategy", self.strategy, ("try_best", "give_up"))
        _check_choice("gate.sgs.target", self.sgs_target, ("extremes", "cheapest"))
        _check_choice("gate.losses.quality_of", self.quality_of, QUALITIES)
        _check_choice("gate.losses.form", self.complexity_form, COMPLEXITY_FORMS)
        _check_choice("gate.optimizer.name", self.optimizer, ("adam", "sgd"))
        if self.target_madds_m is not None:
            _check_positive("gate.target_madds_m", self.target_madds_m)
        _check_positive("gate.temperature.start", self.temperature_start)
        _check_positive("gate.temperature.end", self.temperature_end)
        for name, share in (
            ("gate.target", self.target),
            ("gate.sgs.t_easy", self.t_easy),
            ("gate.sgs.t_hard", self.t_hard),
        ):
            if not 0.0 <= share <= 1.0:
                raise ValueError(f"{name} is {share}, but must lie in 0..1")
        for name, count in (
            ("gate.optimizer.steps", self.steps),
            ("gate.optimizer.batch_size", self.batch_size),
            ("gate.perceptron.hidden_units", self.hidden_units),
        ):
            if count < 1:
                raise ValueError(f"{name} is {count}, but must be at least 1")
        for name, weight in (
            ("gate.losses.cls", self.lambda_cls),
            ("gate.losses.sgs", self.lambda_sgs),
            ("gate.losses.complexity", self.lambda_complexity),
            ("gate.losses.quality", self.lambda_quality),
            ("gate.optimizer.lr", self.lr),
            ("gate.optimizer.weight_decay", self.weight_decay),
        ):
            if not 0.0 <= weight < math.inf:
                raise ValueError(f"{name} is {weight}, but must be finite and at least 0")

    @property
    def kind(self) -> RouterKind:
        """The record of the router's kind."""
        return router_kind(self.router)

    def wanted_madds(self, low: float, high: float) -> float:
        """The target in MAdds, for a set of sub-networks of `low` to `high` MAdds
        (docs/definitions.md, Target).

        It may lie outside the range of the routing space.
        """
        return low + self.target * (high - low) if self.target_madds_m is None else self.target_madds_m * 1e6

    def temperature(self, step: int) -> float:
        """Temperature of the softmax at a step of training, counted from 0."""
        ratio = step / max(1, self.steps - 1)
        return self.temperature_start * (self.temperature_end / self.temperature_start) ** ratio


def _check_positive(name: str, value: float) -> None:
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name} is {value}, but must be finite and above 0")


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")
