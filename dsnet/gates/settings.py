"""The settings of Stage II: one router's hyperparameters, and those of training on images. They
need no torch."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Literal

from dsnet.data.settings import Augmentation
from dsnet.routers.kinds import RouterKind, kind_names, router_kind
from dsnet.settings import (
    Fraction,
    LearningRate,
    NonNegativeFloat,
    OneOf,
    PositiveFloat,
    PositiveInt,
    Seed,
    Settings,
    WeightDecay,
)

RouterName = Annotated[str, OneOf(kind_names)]
Strategy = Literal["try_best", "give_up"]
SgsTarget = Literal["extremes", "cheapest"]
Quality = Literal["correct", "probability"]
ComplexityForm = Literal["hinge", "quadratic", "paper", "paper_raw"]
GateOptimizer = Literal["adam", "sgd"]
COLLAPSE_SHARE = 0.99
"""A router that sends a larger share of the images down one route is flagged as collapsed."""


@dataclass(frozen=True, kw_only=True)
class GateSettings(Settings):
    """One router's hyperparameters."""

    SECTION = "gate"
    KEYS = MappingProxyType(
        {
            "router": "gate.router",
            "target": "gate.target",
            "target_madds_m": "gate.target_madds_m",
            "t_easy": "gate.sgs.t_easy",
            "t_hard": "gate.sgs.t_hard",
            "strategy": "gate.sgs.strategy",
            "sgs_target": "gate.sgs.target",
            "lambda_cls": "gate.losses.cls",
            "lambda_sgs": "gate.losses.sgs",
            "lambda_complexity": "gate.losses.complexity",
            "complexity_form": "gate.losses.form",
            "lambda_quality": "gate.losses.quality",
            "quality_of": "gate.losses.quality_of",
            "optimizer": "gate.optimizer.name",
            "lr": "gate.optimizer.lr",
            "weight_decay": "gate.optimizer.weight_decay",
            "steps": "gate.optimizer.steps",
            "batch_size": "gate.optimizer.batch_size",
            "temperature_start": "gate.temperature.start",
            "temperature_end": "gate.temperature.end",
            "hidden_units": "gate.perceptron.hidden_units",
        }
    )
    """The fields that sweep.yaml sets."""

    router: RouterName = "gate"
    target: Fraction = 0.5
    """t in [0, 1]: MAdds_min + t (MAdds_max - MAdds_min) over the whole SubnetSet (the user's
    "target FLOPs")."""
    target_madds_m: PositiveFloat | None = None
    """The target in million MAdds, in place of `target`; None = not given."""
    routes: tuple[int, ...] = ()
    """The routing space: increasing ids of the SubnetSet; empty takes all."""
    t_easy: Fraction = 0.0
    """SGS: an image is easy iff the smallest route is right with p(y) >= t_easy; 0 is the paper's
    rule."""
    t_hard: Fraction = 0.0
    """SGS: an image is hard iff the largest route is wrong or has p(y) < t_hard."""
    strategy: Strategy = "try_best"
    """Hard images go to the largest (`try_best`) or the smallest (`give_up`) route."""
    sgs_target: SgsTarget = "extremes"
    """`extremes` as published, or `cheapest`: the cheapest right route (ours)."""
    lambda_cls: NonNegativeFloat = 1.0
    lambda_sgs: NonNegativeFloat = 1.0
    lambda_complexity: NonNegativeFloat = 0.5
    lambda_quality: NonNegativeFloat = 0.0
    """Weight of the quality loss: half the squared difference between each route's score and the
    quality of its answer (ours). The score is then an estimate of the route's accuracy on the
    image, and calibration trades accuracy for MAdds at one price."""
    quality_of: Quality = "correct"
    """Quality of an answer: `correct` (1 or 0), or the `probability` of the label."""
    complexity_form: ComplexityForm = "hinge"
    optimizer: GateOptimizer = "adam"
    """`adam` or `sgd` (Nesterov momentum 0.9)."""
    lr: LearningRate = 0.05
    weight_decay: WeightDecay = 0.0
    steps: PositiveInt = 200
    batch_size: PositiveInt = 512
    temperature_start: PositiveFloat = 1.0
    temperature_end: PositiveFloat = 0.3
    """The softmax temperature falls geometrically, so that its expectation approaches the deployed
    argmax."""
    hidden_units: PositiveInt = 32
    """Hidden units of the perceptron, for the kinds that have one."""
    seed: Seed = 0
    """Seed of a perceptron's initial weights, and of all that is random in end-to-end training. A
    linear head is initialised to zero."""

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


@dataclass(frozen=True, kw_only=True)
class EndToEndSettings(Settings):
    """Settings that only training on images needs; the others, the batch size among them, are in
    `GateSettings`."""

    SECTION = "gate.end_to_end"

    epochs: PositiveInt = 30
    """Passes over the gate split; they take the place of `GateSettings.steps`."""
    augmentation: Augmentation | None = None
    """Augmentation of the training images; None = none."""
