"""The section `gate`: which router is trained, and how."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dsnet.gates.settings import (
    ComplexityForm,
    EndToEndSettings,
    GateOptimizer,
    GateSettings,
    Quality,
    RouterName,
    SgsTarget,
    Strategy,
)
from dsnet.routers.kinds import kind_names
from dsnet.settings import (
    Fraction,
    LearningRate,
    NonNegativeFloat,
    NonNegativeInt,
    NumThreads,
    PositiveFloat,
    PositiveInt,
    WeightDecay,
)
from orchestration.config.section import BrokenRule, Known, Section, refuse

Router = Annotated[RouterName, Known(kind_names)]


class RoutingConfig(Section):
    """Routes, the sub-networks that a router can choose: first, first + stride, ... up to last, in
    the order of the set (with beam: by MAdds)."""

    first: NonNegativeInt = 0
    """Index of the first route."""
    last: int = -1
    """Index of the last route, inclusive; negative numbers count from the end, -1 = the widest."""
    stride: PositiveInt = 1
    """Distance between two routes; 1 = every sub-network from first to last."""
    beam: Annotated[int, Field(ge=2)] | None = None
    """Number of sub-networks to keep: the cheapest, the widest, and those nearest to the upper
    envelope of (MAdds, top-1 on `gate`). first, last and stride then index the kept ones, cheapest
    first; null = all."""


class SgsConfig(Section):
    """Sandwich gate sparsification: labels of the gate (arXiv 2103.13258, section 3.4)."""

    t_easy: Fraction = GateSettings.t_easy
    """Easy iff the smallest is right and p(y) >= t_easy; 0 = the paper's rule."""
    t_hard: Fraction = GateSettings.t_hard
    """Hard iff the largest is wrong or p(y) < t_hard; 0 = the paper's rule."""
    strategy: Strategy = GateSettings.strategy
    """Hard images go to the largest (try_best) or to the smallest (give_up)."""
    target: SgsTarget = GateSettings.sgs_target
    """extremes: smallest or largest, as in the paper | cheapest: the cheapest sub-network that is
    right."""


class LossesConfig(Section):
    """Weights of the gate's loss terms; at least one is above 0."""

    cls: NonNegativeFloat = GateSettings.lambda_cls
    """Expected cross-entropy of the routed prediction."""
    sgs: NonNegativeFloat = GateSettings.lambda_sgs
    """Cross-entropy to the SGS labels."""
    complexity: NonNegativeFloat = GateSettings.lambda_complexity
    """Penalty on mean MAdds against the target."""
    form: ComplexityForm = GateSettings.complexity_form
    """hinge: only above the target | quadratic: both sides | paper, paper_raw: as published,
    without a target."""
    quality: NonNegativeFloat = GateSettings.lambda_quality
    """Half the squared difference between each route's score and the quality of its answer; with
    trainer table only."""
    quality_of: Quality = GateSettings.quality_of
    """Quality of an answer: correct: 1 or 0 | probability: the probability of the label."""


class GateOptimizerConfig(Section):
    """Stage II: training of one gate on the routing table."""

    name: GateOptimizer = GateSettings.optimizer
    """adam | sgd."""
    lr: LearningRate = GateSettings.lr
    """Learning rate, > 0, at most 1e6."""
    weight_decay: WeightDecay = GateSettings.weight_decay
    """Weight decay, >= 0, at most 1e6."""
    steps: PositiveInt = GateSettings.steps
    """Number of updates, with trainer table."""
    batch_size: PositiveInt = GateSettings.batch_size
    """Images per step; at most the size of the split `gate`."""


class TemperatureConfig(Section):
    """Softmax temperature of the gate, annealed over its steps."""

    start: PositiveFloat = GateSettings.temperature_start
    """Temperature at the first step, > 0."""
    end: PositiveFloat = GateSettings.temperature_end
    """Temperature at the last step, > 0."""


class PerceptronConfig(Section):
    """The small perceptron of the routers that have one: evidence_gate, evidence_gates,
    learned_cascade."""

    hidden_units: PositiveInt = GateSettings.hidden_units
    """Units of its hidden layer."""


class EndToEndConfig(Section):
    """Stage II through the network itself, as published; all other settings are those of
    gate.optimizer."""

    epochs: PositiveInt = EndToEndSettings.epochs
    """Epochs over the split `gate`; replaces gate.optimizer.steps."""
    augment: bool = False
    """Apply data.augment to the images."""
    threads: NumThreads = 1
    """Torch threads and CPUs of a trial. Results depend on this number through rounding."""


class GateConfig(Section):
    """Settings of the router: fixed values, and defaults of the parameters that `space` sweeps."""

    router: Router = GateSettings.router
    """gate: one decision, as published | evidence_gate: with richer evidence | gates,
    evidence_gates: one decision per gate of the network | cascade: a cheap route first, one wider
    where it is unsure | learned_cascade: a cheap route's output picks the next."""
    trainer: Literal["table", "end_to_end"] = "table"
    """table: training on the routing table, fractions of a second per trial | end_to_end: training
    through the network; routers gate and gates only."""
    target: Fraction = GateSettings.target
    """Target MAdds t in [0, 1]: MAdds_min + t * (MAdds_max - MAdds_min) over the whole set of
    sub-networks."""
    target_madds_m: PositiveFloat | None = GateSettings.target_madds_m
    """Target in million MAdds, > 0; replaces gate.target, which the default space then leaves out;
    null = use gate.target."""
    perceptron: PerceptronConfig = PerceptronConfig()
    routing: RoutingConfig = RoutingConfig()
    sgs: SgsConfig = SgsConfig()
    losses: LossesConfig = LossesConfig()
    optimizer: GateOptimizerConfig = GateOptimizerConfig()
    temperature: TemperatureConfig = TemperatureConfig()
    end_to_end: EndToEndConfig = EndToEndConfig()

    @model_validator(mode="after")
    def _can_route_and_learn(self) -> GateConfig:
        problems = []
        first, last = self.routing.first, self.routing.last
        if 0 <= last < first:
            problems.append(BrokenRule(("routing", "first"), f"{first} is above gate.routing.last {last}"))
        losses = self.losses
        if losses.cls == losses.sgs == losses.complexity == losses.quality == 0:
            message = (
                "cls, sgs, complexity and quality are all 0, so the gate would learn nothing; set one of them above 0"
            )
            problems.append(BrokenRule(("losses",), message))
        refuse(*problems)
        return self
