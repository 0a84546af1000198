"""The section `gate`: which router is trained, and how."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

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
    PositiveFloat,
    PositiveInt,
    WeightDecay,
)
from orchestration.config.section import BrokenRule, Section, refuse


class _KnownKind:
    """Names of the registered kinds of router, those of plugins too."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(cls._check, core_schema.str_schema(strict=True))

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"enum": list(kind_names()), "type": "string"}

    @staticmethod
    def _check(name: str) -> str:
        known = kind_names()
        if name not in known:
            expected = ", ".join(map(repr, known[:-1])) + f" or {known[-1]!r}"
            raise PydanticKnownError("literal_error", {"expected": expected})
        return name


Router = Annotated[RouterName, _KnownKind]


class RoutingConfig(Section):
    """Which sub-networks the gate may pick: members first, first + stride, ... up to last, in the
    set's order (with beam: by MAdds)."""

    first: NonNegativeInt = 0
    """Index of the first route."""
    last: int = -1
    """Inclusive; negative counts from the end, -1 = the widest."""
    stride: PositiveInt = 1
    """1 = every sub-network from first to last."""
    beam: Annotated[int, Field(ge=2)] | None = None
    """Keep so many sub-networks, both extremes among them: those nearest below the upper envelope
    of (MAdds, top-1 on `gate`). first, last and stride then count in what is left, cheapest first;
    null = all."""


class SgsConfig(Section):
    """Sandwich gate sparsification: the labels that the gate learns from (arXiv 2103.13258, section
    3.4)."""

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
    """Half the squared difference between each route's score and how good its answer is; with
    trainer table only."""
    quality_of: Quality = GateSettings.quality_of
    """How good an answer is: correct 1 or 0 | the probability of the label."""


class GateOptimizerConfig(Section):
    """Stage II: how one gate is trained on the routing table."""

    name: GateOptimizer = GateSettings.optimizer
    """adam | sgd."""
    lr: LearningRate = GateSettings.lr
    """> 0, at most 1e6."""
    weight_decay: WeightDecay = GateSettings.weight_decay
    """>= 0, at most 1e6."""
    steps: PositiveInt = GateSettings.steps
    """Updates, with trainer table."""
    batch_size: PositiveInt = GateSettings.batch_size
    """Images per step; no more than `gate` holds are taken."""


class TemperatureConfig(Section):
    """Softmax temperature of the gate, annealed over its steps."""

    start: PositiveFloat = GateSettings.temperature_start
    """At the first step, > 0."""
    end: PositiveFloat = GateSettings.temperature_end
    """At the last step, > 0."""


class PerceptronConfig(Section):
    """The small perceptron of the routers that have one: evidence_gate, evidence_gates,
    learned_cascade."""

    hidden_units: PositiveInt = GateSettings.hidden_units
    """Units of its hidden layer."""


class EndToEndConfig(Section):
    """Stage II through the network itself, as published; everything else, the batch size too, is
    gate.optimizer's."""

    epochs: PositiveInt = EndToEndSettings.epochs
    """Passes over `gate`; they take the place of gate.optimizer.steps."""
    augment: bool = False
    """Train on images that data.augment has changed."""
    threads: PositiveInt = 1
    """Torch threads of a trial, which takes as many CPUs; another number gives other last digits,
    hence other trials."""


class GateConfig(Section):
    """The gate: fixed settings, and defaults of what `space` sweeps."""

    router: Router = GateSettings.router
    """gate: one decision, as published | evidence_gate: with richer evidence | gates,
    evidence_gates: one decision per gate of the network | cascade: a cheap route first, one wider
    where it is unsure | learned_cascade: a cheap route's output picks the next."""
    trainer: Literal["table", "end_to_end"] = "table"
    """table: exact losses on the routing table, fractions of a second | end_to_end: through the
    network; routers gate and gates only."""
    target: Fraction = GateSettings.target
    """Target MAdds t in [0, 1]: MAdds_min + t * (MAdds_max - MAdds_min) over the whole set of
    sub-networks."""
    target_madds_m: PositiveFloat | None = GateSettings.target_madds_m
    """The target in million MAdds, > 0, in place of gate.target, which the default space then
    leaves out; null = gate.target counts."""
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
            problems.append(BrokenRule(("routing", "first"), f"{first} lies behind gate.routing.last {last}"))
        losses = self.losses
        if losses.cls == losses.sgs == losses.complexity == losses.quality == 0:
            message = "cls, sgs, complexity and quality are all 0: the gate would learn nothing"
            problems.append(BrokenRule(("losses",), message))
        refuse(*problems)
        return self
