"""The whole of sweep.yaml as frozen, strict, typed objects; config_loading.py reads files into them.

Strict means: no unknown key, no silent conversion ("3" is not 3, 1 is not true), and every range checked when an object
is built. Only a whole number where a real one is wanted is taken as it is meant.
"""

from __future__ import annotations

import io
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PlainSerializer,
    PlainValidator,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import RoundTripRepresenter

from dsnet.errors import ConfigError
from orchestration.distribution import DISTRIBUTION_SCHEMA, REAL_KINDS, Distribution, Scalar
from orchestration.wording import did_you_mean, shown, way_out
from search.pareto import parse_pick

if TYPE_CHECKING:
    from dsnet.training.settings import Regime

Stage = Literal["supernet", "measure", "table", "search", "verify"]
KeyPath = tuple[str | int, ...]

NAME_PATTERN = r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$"
OBJECTIVE_GOALS: Mapping[str, str] = {
    "top1": "maximize",
    "top5": "maximize",
    "madds_m": "minimize",
    "p95_madds_m": "minimize",
    "params_m": "minimize",
    "latency_ms": "minimize",
}
"""Metrics that a sweep can optimise, with the only goal that makes sense for each."""
CHECKPOINT_MODEL = "checkpoint"
"""The `supernet.model` that takes layout and sub-networks from `supernet.init_from`."""


@dataclass(frozen=True)
class BrokenRule:
    """A rule between settings that does not hold; `path` is relative to the section that checks it."""

    path: KeyPath
    message: str
    others: tuple[KeyPath, ...] = ()
    """Further settings that it is about: whoever spoke last, of all of them, is told."""

    def __str__(self) -> str:
        return f"{'.'.join(map(str, self.path))}: {self.message}" if self.path else self.message


def _refuse(*rules: BrokenRule) -> None:
    """Report all broken rules of a section at once; config_loading finds the place in the file of each."""
    if rules:
        raise PydanticCustomError("broken_rules", "{text}", {"text": "; ".join(map(str, rules)), "rules": rules})


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError(f"{text!r} holds characters that cannot be printed")
    return text


Text = Annotated[str, StringConstraints(min_length=1), AfterValidator(_printable)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
LARGEST_RATE = 1e6
"""That of `dsnet.training.settings`, which needs torch."""
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
# YAML and JSON know lists only; the list becomes a tuple, its items stay strict.
IncreasingSizes = Annotated[tuple[PositiveInt, ...], Field(strict=False, min_length=1)]
CropScale = Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(strict=False, min_length=2, max_length=2)]
Device = Literal["auto", "cpu", "cuda"]
Router = Literal["gate", "evidence_gate", "gates", "evidence_gates", "cascade", "learned_cascade"]
"""`dsnet.routers.ROUTER_KINDS`, which need torch."""
END_TO_END_ROUTERS = ("gate", "gates")
"""Routers with a slimming head inside the network, which can be trained through it."""


def _version(value: object) -> object:
    if type(value) is not int or value != 1:
        raise ValueError(f"this release reads version 1; got {shown(value)}")
    return value


def _split_size(value: object) -> object:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_share = isinstance(value, float) and 0 < value < 1
    is_count = is_number and isinstance(value, int) and value >= 1
    if value is None or is_share or is_count:
        return value
    raise ValueError(f"expected a fraction between 0 and 1, a whole number of images, or null; got {shown(value)}")


SplitSize = Annotated[
    Annotated[float, Field(gt=0, lt=1)] | PositiveInt | None,
    BeforeValidator(_split_size),
]


SpaceEntry = Annotated[
    Distribution,
    PlainValidator(Distribution.parse),
    PlainSerializer(Distribution.written),
    WithJsonSchema(DISTRIBUTION_SCHEMA),
]


class Section(BaseModel):
    """Base of every section: frozen, strict, no unknown key, no NaN; docstrings under fields are their descriptions."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )


class AugmentConfig(Section):
    """What training images go through; evaluation never does."""

    crop_padding: NonNegativeInt | None = None
    """Pixels mirrored at each edge before a random crop back to size; null = image_size // 8."""
    flip: bool | None = None
    """Mirror half of the images left to right; null = yes, except for digits."""
    cutout: NonNegativeInt = 0
    """Side in pixels of one square set to zero; 0 = none."""
    crop_scale: CropScale | None = None
    """[low, high]: cut out low to high of the image's area and resize it; null = none, or [0.08, 1] for streamed images."""
    randaugment_ops: Annotated[int, Field(ge=0, le=14)] = 0
    """RandAugment: random operations per image, one after the other, at most 14; 0 = none."""
    randaugment_magnitude: Annotated[float, Field(ge=0, le=10)] = 9.0
    """RandAugment: strength of each operation, 0 to 10."""
    erasing: Fraction = 0.0
    """Share of images of which a random rectangle is filled with noise, [0, 1]."""

    @model_validator(mode="after")
    def _crops_one_way(self) -> AugmentConfig:
        if self.crop_scale is None:
            return self
        low, high = self.crop_scale
        if low > high:
            message = f"range {shown(self.crop_scale)} is the wrong way round; write {shown([high, low])}"
            _refuse(BrokenRule(("crop_scale",), message))
        if self.crop_padding:
            message = f"{self.crop_padding} pixels have no use beside crop_scale, which crops already; remove one"
            _refuse(BrokenRule(("crop_padding",), message))
        return self


class SplitsConfig(Section):
    """Size of each split: a fraction of the images in (0, 1), a number of images, or null for the default.

    Defaults: the data's own test split where it has one, else 55/15/15/15 %; CIFAR-10 40k/5k/5k/10k.
    """

    train: SplitSize = None
    """Trains the supernet."""
    gate: SplitSize = None
    """Held out of the supernet's training; trains the gates."""
    val: SplitSize = None
    """Calibrates and chooses."""
    test: SplitSize = None
    """Sealed until the front is frozen."""

    @model_validator(mode="after")
    def _fits(self) -> SplitsConfig:
        # `test` may be a share of the data's own test part; where it is not, make_splits refuses what does not fit.
        shares = {name: size for name, size in self if isinstance(size, float) and name != "test"}
        if sum(shares.values()) > 1 + 1e-9:
            written = " + ".join(f"{name} {share:g}" for name, share in shares.items())
            _refuse(BrokenRule((), f"fractions add up to more than 1: {written} = {sum(shares.values()):g}"))
        return self


class DataConfig(Section):
    """The images."""

    name: Literal["digits", "cifar10", "image_folder"]
    """digits: inside scikit-learn | cifar10: parquet or official batches | image_folder: root/class/*.png or *.jpg."""
    path: Text | None = None
    """Folder of the images; `~` and $VARIABLES are expanded, relative to the working directory. null = $DSNET_DATA."""
    image_size: Annotated[int, Field(ge=8, le=512)] | None = None
    """Side in pixels, 8 to 512; null = as stored. An image folder needs it."""
    crop_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Image folders only: share of the shorter side that the centre crop keeps, (0, 1]; 0.875 with 224 pixels: resize to 256, cut 224."""
    augment: AugmentConfig = AugmentConfig()
    splits: SplitsConfig = SplitsConfig()
    limit: PositiveInt | None = None
    """At most so many images per split, drawn evenly from the classes; null = all."""
    stream: bool = False
    """Image folders only: read `train` from disk while it trains, for sets that do not fit into memory."""

    @model_validator(mode="after")
    def _suits_the_source(self) -> DataConfig:
        if self.name == "image_folder" and self.image_size is None:
            _refuse(BrokenRule(("image_size",), "an image folder needs it: the side in pixels, 8 to 512"))
        if self.name != "image_folder" and self.crop_fraction != 1:
            message = f"only an image_folder is cropped; remove {shown(self.crop_fraction)}"
            _refuse(BrokenRule(("crop_fraction",), message))
        if self.name == "digits" and self.path is not None:
            message = f"digits comes with scikit-learn and takes no folder; remove {shown(self.path)}"
            _refuse(BrokenRule(("path",), message))
        if self.stream and self.name != "image_folder":
            _refuse(BrokenRule(("stream",), f"only an image_folder can be streamed; {self.name} fits into memory"))
        if self.stream and self.augment.crop_padding:
            message = (
                f"{self.augment.crop_padding} pixels have no use: streamed images are cropped by crop_scale; remove it"
            )
            _refuse(BrokenRule(("augment", "crop_padding"), message))
        return self


class TrainConfig(Section):
    """Stage I: how the supernet is trained."""

    widths: Literal["sandwich", "all"] | None = None
    """sandwich: largest, random ones and smallest | all: every width in every step; null = from supernet.regime."""
    num_random: NonNegativeInt | None = None
    """Random sub-networks of the sandwich; null = from supernet.regime."""
    teacher: Literal["none", "inplace", "ema", "ema_ensemble"] | None = None
    """none: labels | inplace: the widest | ema: the EMA copy's widest | ema_ensemble: its ensemble; null = from the regime."""
    bn: Literal["private_stats", "private_affine", "recalibrate", "group_norm"] | None = None
    """BatchNorm with statistics per width | and affine pairs per width | recalibrated | GroupNorm; null = the regime's or the family's."""
    epochs: NonNegativeInt = 30
    """Passes over `train`; 0 keeps the weights of supernet.init_from."""
    batch_size: PositiveInt = 128
    """Images per step, over all workers and micro-batches together."""
    accumulate: PositiveInt = 1
    """Micro-batches whose gradients add up to one step's; BatchNorm sees each one alone."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd (Nesterov) | adamw."""
    lr: Annotated[float, Field(gt=0, le=LARGEST_RATE)] = 0.1
    """Peak learning rate, > 0, at most 1e6."""
    schedule: Literal["cosine", "one_cycle", "constant"] = "cosine"
    """cosine: to 0 after the warm-up | one_cycle: up during the warm-up, down to lr / 250,000 | constant."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """For sgd, [0, 1)."""
    weight_decay: Annotated[float, Field(ge=0, le=LARGEST_RATE)] = 1.0e-4
    """Not on one-dimensional parameters."""
    warmup_epochs: NonNegativeFloat = 1.0
    """Epochs of linear warm-up, part of `epochs`."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """[0, 1), of whoever learns from labels: the widest, and with teacher none all."""
    grad_clip: PositiveFloat | None = None
    """Largest norm of the gradient; null = no clipping."""
    precision: Literal["float32", "bf16"] = "float32"
    """float32 | bf16: autocast to bfloat16; weights, statistics and optimiser stay float32."""
    channels_last: bool = False
    """Images and weights in NHWC memory order: often faster on a GPU."""
    checkpoint_every: PositiveInt = 1
    """Epochs between checkpoints."""

    @model_validator(mode="after")
    def _warm_up_ends(self) -> TrainConfig:
        if 0 < self.epochs < self.warmup_epochs:
            message = f"{self.warmup_epochs:g} epochs of warm-up do not fit into {self.epochs} epochs of training"
            _refuse(BrokenRule(("warmup_epochs",), message))
        return self


class BootstrappingConfig(Section):
    """Who teaches the narrower sub-networks (arXiv 2103.13258, section 3.3; arXiv 2109.10060)."""

    mode: Literal["none", "inplace_distillation", "ib", "ieb"] | None = None
    """The older way to name a teacher: none | inplace_distillation | ib | ieb; null = from supernet.regime."""
    num_random: NonNegativeInt | None = None
    """The older place of supernet.train.num_random; null = from supernet.regime."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.997
    """Decay of the EMA copy per step, [0, 1)."""
    ema_warmup: bool = True
    """Raise the decay as min(ema_decay, (1 + t) / (10 + t)): a short run needs it; false is the paper's."""
    soft_ramp_epochs: NonNegativeFloat = 0.0
    """Epochs over which soft labels replace the true ones; 0 = from the start, as in the paper."""
    teacher_min_updates: NonNegativeInt = 100
    """A teacher width with fewer updates of its statistics runs on those of the batch."""


class RecalibrationConfig(Section):
    """BatchNorm statistics, re-estimated for every width after training."""

    images: NonNegativeInt | None = None
    """Images of `train` to use; null = all; 0 keeps the statistics of supernet.init_from, and needs 0 epochs."""
    batch_size: PositiveInt = 256
    """Images per forward pass."""


class SupernetConfig(Section):
    """The network that holds all sub-networks, and its training."""

    model: Text
    """Architecture family, by its registered name; or checkpoint: layout and sub-networks of `init_from`."""
    options: dict[str, JsonValue] = Field(default_factory=dict)
    """Options of the family, which checks them: width, stem_stride, num_routes, ..."""
    init_from: Text | None = None
    """Start weights: a checkpoint, a run folder, or what `python -m dsnet.training` wrote; `~` and $VARIABLES are expanded."""
    regime: Literal["ce", "s_net", "us_net", "ib", "ieb"] | None = None
    """Who trains and who teaches, by name: ce | s_net | us_net | ib | ieb; null = in-place bootstrapping (ib)."""
    workers: PositiveInt = 1
    """Ray Train workers."""
    threads: PositiveInt | None = None
    """Torch threads per worker; null = cores // workers."""
    device: Device = "auto"
    """auto = cuda where there is one."""
    train: TrainConfig = TrainConfig()
    bootstrapping: BootstrappingConfig = BootstrappingConfig()
    weights: Literal["ema", "student"] = "ema"
    """Which weights are measured, tabled and exported."""
    recalibration: RecalibrationConfig = RecalibrationConfig()
    keep_checkpoints: PositiveInt = 2
    """Training checkpoints kept on disk."""

    @model_validator(mode="after")
    def _can_start_and_train(self) -> SupernetConfig:
        _refuse(*_batch_problems(self), *_number_problems(self), *_regime_problems(self), *_start_problems(self))
        return self


def _batch_problems(supernet: SupernetConfig) -> Iterator[BrokenRule]:
    from dsnet.training.settings import sharing_problem

    problem = sharing_problem(supernet.train.batch_size, supernet.workers, supernet.train.accumulate)
    if problem is not None:
        yield BrokenRule(("train", "batch_size"), problem, others=(("train", "accumulate"), ("workers",)))


def _start_problems(supernet: SupernetConfig) -> Iterator[BrokenRule]:
    """What needs a checkpoint to start from, or goes only with one."""
    if supernet.init_from is None:
        if supernet.model == CHECKPOINT_MODEL:
            yield BrokenRule(("model",), "checkpoint takes the network from supernet.init_from, which is not set")
        if supernet.train.epochs == 0:
            message = (
                "0 keeps the weights of supernet.init_from, which is not set; name a checkpoint, or train 1 or more"
            )
            yield BrokenRule(("train", "epochs"), message)
    if supernet.model == CHECKPOINT_MODEL and supernet.options:
        message = f"model checkpoint takes no options: the checkpoint has its own; remove {', '.join(supernet.options)}"
        yield BrokenRule(("options",), message)
    if supernet.recalibration.images == 0 and supernet.train.epochs > 0:
        message = (
            f"0 keeps the statistics of supernet.init_from, but {supernet.train.epochs} epochs of training outdate them"
        )
        yield BrokenRule(("recalibration", "images"), message)


def _regime_problems(supernet: SupernetConfig) -> Iterator[BrokenRule]:
    """Names that contradict each other, and an ensemble of nobody."""
    from dsnet.training.settings import REGIMES, TEACHER_OF_MODE

    regime, bootstrapping = supernet.regime, supernet.bootstrapping
    if regime is not None:
        named = REGIMES[regime]
        if bootstrapping.mode is not None and TEACHER_OF_MODE[bootstrapping.mode] != named.teacher:
            message = f"{bootstrapping.mode} contradicts supernet.regime {regime}, whose teacher is {named.teacher}; "
            yield BrokenRule(("bootstrapping", "mode"), message + "keep one of the two, the other null")
        is_sandwich = named.widths == "sandwich"
        if is_sandwich and bootstrapping.num_random not in (None, named.num_random):
            message = (
                f"{bootstrapping.num_random} contradicts supernet.regime {regime}, which draws {named.num_random}; "
            )
            yield BrokenRule(("bootstrapping", "num_random"), message + "write it as supernet.train.num_random")
    parts = _regime_parts(supernet)
    if (parts["teacher"], parts["widths"], parts["num_random"]) == ("ema_ensemble", "sandwich", 0):
        section = "bootstrapping" if supernet.train.num_random is None and bootstrapping.num_random == 0 else "train"
        message = "ieb averages the teacher with random sub-networks and needs at least 1; or choose regime ib"
        yield BrokenRule((section, "num_random"), message)


def _number_problems(supernet: SupernetConfig) -> Iterator[BrokenRule]:
    """One setting written under both of its names, with two values."""
    newer, older = supernet.train.num_random, supernet.bootstrapping.num_random
    if None not in (newer, older) and newer != older:
        message = f"{older} contradicts supernet.train.num_random {newer}, the newer name of this setting; remove one of the two"
        yield BrokenRule(("bootstrapping", "num_random"), message)


def _regime_parts(supernet: SupernetConfig) -> dict[str, Any]:
    """The fields of the regime."""
    # Imported here: the core's settings need torch, which `dsnet-orch schema` and --help do without.
    from dsnet.training.settings import REGIMES, TEACHER_OF_MODE

    train, bootstrapping = supernet.train, supernet.bootstrapping
    parts = asdict(REGIMES[supernet.regime or "ib"])
    if supernet.regime is None:
        teacher = None if bootstrapping.mode is None else TEACHER_OF_MODE[bootstrapping.mode]
        parts |= _given(teacher=teacher, num_random=bootstrapping.num_random)
    parts |= _given(widths=train.widths, num_random=train.num_random, teacher=train.teacher, norm=train.bn)
    if parts["widths"] == "all":
        parts["num_random"] = 0  # nothing is drawn, whatever was written: one regime, one stage key
    return parts


def _given(**settings: Any) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


REGIME_KEYS = frozenset({"widths", "num_random", "teacher", "bn"})
"""Settings below `supernet.train` that a regime gives; the core takes them resolved."""


def resolve_regime(supernet: SupernetConfig) -> Regime:
    """Which sub-networks a step trains and who teaches them.

    First wins: supernet.train.{widths, num_random, teacher, bn}, supernet.regime, supernet.bootstrapping.{mode, num_random}, ib.
    """
    from dsnet.training.settings import Regime

    return Regime(**_regime_parts(supernet))


class RoutingConfig(Section):
    """Which sub-networks the gate may pick: members first, first + stride, ... up to last, in the set's order (with beam: by MAdds)."""

    first: NonNegativeInt = 0
    """Index of the first route."""
    last: int = -1
    """Inclusive; negative counts from the end, -1 = the widest."""
    stride: PositiveInt = 1
    """1 = every sub-network from first to last."""
    beam: Annotated[int, Field(ge=2)] | None = None
    """Keep so many sub-networks, both extremes among them: those nearest below the upper envelope of (MAdds, top-1 on `gate`).
    first, last and stride then count in what is left, cheapest first; null = all."""


class SgsConfig(Section):
    """Sandwich gate sparsification: the labels that the gate learns from (arXiv 2103.13258, section 3.4)."""

    t_easy: Fraction = 0.0
    """Easy iff the smallest is right and p(y) >= t_easy; 0 = the paper's rule."""
    t_hard: Fraction = 0.0
    """Hard iff the largest is wrong or p(y) < t_hard; 0 = the paper's rule."""
    strategy: Literal["try_best", "give_up"] = "try_best"
    """Hard images go to the largest (try_best) or to the smallest (give_up)."""
    target: Literal["extremes", "cheapest"] = "extremes"
    """extremes: smallest or largest, as in the paper | cheapest: the cheapest sub-network that is right."""


class LossesConfig(Section):
    """Weights of the gate's loss terms; at least one is above 0."""

    cls: NonNegativeFloat = 1.0
    """Expected cross-entropy of the routed prediction."""
    sgs: NonNegativeFloat = 1.0
    """Cross-entropy to the SGS labels."""
    complexity: NonNegativeFloat = 0.5
    """Penalty on mean MAdds against the target."""
    form: Literal["hinge", "quadratic", "paper", "paper_raw"] = "hinge"
    """hinge: only above the target | quadratic: both sides | paper, paper_raw: as published, without a target."""
    quality: NonNegativeFloat = 0.0
    """Half the squared difference between each route's score and how good its answer is; with trainer table only."""
    quality_of: Literal["correct", "probability"] = "correct"
    """How good an answer is: correct 1 or 0 | the probability of the label."""


class GateOptimizerConfig(Section):
    """Stage II: how one gate is trained on the routing table."""

    name: Literal["adam", "sgd"] = "adam"
    """adam | sgd."""
    lr: Annotated[float, Field(gt=0, le=LARGEST_RATE)] = 0.05
    """> 0, at most 1e6."""
    weight_decay: Annotated[float, Field(ge=0, le=LARGEST_RATE)] = 0.0
    """>= 0, at most 1e6."""
    steps: PositiveInt = 200
    """Updates, with trainer table."""
    batch_size: PositiveInt = 512
    """Images per step; no more than `gate` holds are taken."""


class TemperatureConfig(Section):
    """Softmax temperature of the gate, annealed over its steps."""

    start: PositiveFloat = 1.0
    """At the first step, > 0."""
    end: PositiveFloat = 0.3
    """At the last step, > 0."""


class PerceptronConfig(Section):
    """The small perceptron of the routers that have one: evidence_gate, evidence_gates, learned_cascade."""

    hidden_units: PositiveInt = 32
    """Units of its hidden layer."""


class EndToEndConfig(Section):
    """Stage II through the network itself, as published; everything else, the batch size too, is gate.optimizer's."""

    epochs: PositiveInt = 30
    """Passes over `gate`; they take the place of gate.optimizer.steps."""
    augment: bool = False
    """Train on images that data.augment has changed."""
    threads: PositiveInt = 1
    """Torch threads of a trial, which takes as many CPUs; another number gives other last digits, hence other trials."""


class GateConfig(Section):
    """The gate: fixed settings, and defaults of what `space` sweeps."""

    router: Router = "gate"
    """gate: one decision, as published | evidence_gate: with richer evidence | gates, evidence_gates: one decision per gate
    of the network | cascade: a cheap route first, one wider where it is unsure | learned_cascade: a cheap route's output picks the next."""
    trainer: Literal["table", "end_to_end"] = "table"
    """table: exact losses on the routing table, fractions of a second | end_to_end: through the network; routers gate and gates only."""
    target: Fraction = 0.5
    """Target MAdds t in [0, 1]: MAdds_min + t * (MAdds_max - MAdds_min) over the whole set of sub-networks."""
    target_madds_m: PositiveFloat | None = None
    """The target in million MAdds, > 0, in place of gate.target, which the default space then leaves out; null = gate.target counts."""
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
        _refuse(*problems)
        return self


class MetricConfig(Section):
    """One objective of the sweep."""

    name: Text
    """One of top1, top5, madds_m, p95_madds_m, params_m, latency_ms."""
    goal: Literal["maximize", "minimize"]
    """maximize (accuracies) | minimize (costs)."""
    ref: float | None = None
    """This coordinate of the hypervolume's reference point; null = 1.05 x the widest sub-network's."""

    @model_validator(mode="after")
    def _is_known(self) -> MetricConfig:
        if self.name not in OBJECTIVE_GOALS:
            message = f"unknown metric '{self.name}'{way_out(self.name, list(OBJECTIVE_GOALS))}"
            _refuse(BrokenRule(("name",), message))
        if self.goal != OBJECTIVE_GOALS[self.name]:
            message = f"{self.name} is a metric to {OBJECTIVE_GOALS[self.name]}; got '{self.goal}'"
            _refuse(BrokenRule(("goal",), message))
        if self.goal == "maximize" and self.ref is not None and not 0 <= self.ref <= 1:
            _refuse(BrokenRule(("ref",), f"{self.name} is a fraction from 0 to 1; got {shown(self.ref)}"))
        return self


class SamplerConfig(Section):
    """Who suggests the trials."""

    name: Literal["random", "tpe", "nsga2"] = "tpe"
    """random | tpe | nsga2."""
    cohort: PositiveInt | None = None
    """Trials asked for, run and told together; results depend on it, and not on the number of actors.
    null = 64, or 8 with gate.trainer end_to_end."""
    startup: NonNegativeInt = 16
    """Random trials before tpe starts to model."""


class BudgetConfig(Section):
    """When the sweep ends."""

    trials: PositiveInt = 256
    """Number of trials, failed ones included."""
    time_s: PositiveFloat | None = None
    """Seconds of searching; null = no limit."""
    max_failed: Fraction = 0.5
    """Share of failed trials, [0, 1], above which the sweep counts as failed (exit code 4)."""
    verify: PositiveInt | None = 32
    """About so many gates of the front run for real on `test`, evenly along it; both ends, the knee and what export.picks
    names always. null = all."""


class TrialConfig(Section):
    """What one trial may cost."""

    timeout_s: PositiveFloat | None = None
    """Seconds, after which the trial has failed; null = 120, or 4 hours with gate.trainer end_to_end."""
    retries: NonNegativeInt = 2
    """New attempts after a lost worker; an error of the trial itself is not repeated."""


class MeasureConfig(Section):
    """How every sub-network's latency is measured."""

    device: Device = "cpu"
    """auto | cpu | cuda; auto = cuda where there is one."""
    threads: PositiveInt = 1
    """Torch threads while the clock runs."""
    batch_sizes: IncreasingSizes = (1, 64)
    """Images per call, increasing."""
    group_sizes: IncreasingSizes = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    """Group sizes at which trunk, decision and tails are timed, increasing from 1."""
    repeats: PositiveInt = 15
    """Timed repeats, interleaved over the sub-networks; the median counts."""
    warmup: NonNegativeInt = 3
    """Untimed repeats before them."""

    @model_validator(mode="after")
    def _sizes_increase(self) -> MeasureConfig:
        problems = []
        for name in ("batch_sizes", "group_sizes"):
            sizes = getattr(self, name)
            if list(sizes) != sorted(set(sizes)):
                ordered = shown(sorted(set(sizes)))
                problems.append(BrokenRule((name,), f"sizes must increase; got {shown(sizes)}, write {ordered}"))
        if self.group_sizes[0] != 1:
            problems.append(BrokenRule(("group_sizes",), f"must start at 1; got {shown(self.group_sizes)}"))
        _refuse(*problems)
        return self


class RayConfig(Section):
    """Where the work runs; never changes a result."""

    address: Text = "local"
    """local = a private cluster on 127.0.0.1 for this run; else the address of a running one."""
    num_cpus: PositiveInt | None = None
    """Cores of the local cluster; null = all."""
    object_store_mib: Annotated[int, Field(ge=75)] = 200
    """Shared memory in MiB, at least 75."""
    trial_actors: PositiveInt | None = None
    """Processes that run trials; null = one per core."""


class StorageConfig(Section):
    """Where runs are kept."""

    runs: Text = "runs"
    """Folder that holds one folder per run; `~` and $VARIABLES are expanded."""


class TrackingConfig(Section):
    """MLflow."""

    mlflow: bool = True
    """Record the sweep in MLflow while it runs; `sync` can do it later."""
    uri: Text | None = None
    """Tracking server or database; null = sqlite in the runs folder."""
    experiment: Text | None = None
    """null = the sweep's name."""


def _pick(text: str) -> str:
    try:
        pick = parse_pick(text, metrics=tuple(OBJECTIVE_GOALS))
    except ConfigError as error:
        raise ValueError(str(error)) from error
    if pick.kind == "name" and not re.fullmatch(r"trial-\d{4,}", text.strip()):
        hint = did_you_mean(text, ["knee", "all"])
        raise ValueError(
            f'pick {text!r}: neither a keyword nor trial-NNNN{hint}; e.g. knee, all, trial-0042, "max:top1"'
        )
    return text


class ExportConfig(Section):
    """What is exported when a launch ends."""

    picks: Annotated[tuple[Annotated[Text, AfterValidator(_pick)], ...], Field(strict=False, min_length=1)] = ("knee",)
    """knee, all, trial-0042, "max:top1 where madds_m<=200", ...; each gate once."""
    """Points of the front, as --pick of `dsnet-orch export` takes them."""


def _default_space() -> dict[str, Distribution]:
    return {
        "gate.target": Distribution("uniform", (0.05, 0.9)),
        "gate.sgs.t_easy": Distribution("uniform", (0.0, 0.9)),
        "gate.sgs.t_hard": Distribution("uniform", (0.0, 0.5)),
        "gate.sgs.strategy": Distribution("choice", ("try_best", "give_up")),
        "gate.sgs.target": Distribution("choice", ("extremes", "cheapest")),
        "gate.optimizer.lr": Distribution("loguniform", (1.0e-3, 0.3)),
    }


def gives_absolute_target(settings: Mapping[str, Any]) -> bool:
    """Whether settings say gate.target_madds_m, which takes the place of the target that the default space sweeps."""
    gate = settings.get("gate")
    return isinstance(gate, Mapping) and gate.get("target_madds_m") is not None


def space_without_target() -> dict[str, Distribution]:
    """The default space of a sweep with an absolute target."""
    return {key: value for key, value in _default_space().items() if key != "gate.target"}


_DEFAULT_METRICS = (
    MetricConfig(name="top1", goal="maximize", ref=0.0),
    MetricConfig(name="madds_m", goal="minimize"),
)


class SweepConfig(Section):
    """A whole sweep. Only version, name, data.name and supernet.model have no default."""

    version: Annotated[Literal[1], BeforeValidator(_version)]
    """Version of this file's format."""
    name: Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
    """Name of the run and of its folder: 1 to 64 letters, digits, '.', '_' or '-', not starting with '.'."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """All randomness derives from it, 0 to 2^32 - 1."""
    data: DataConfig
    supernet: SupernetConfig
    gate: GateConfig = GateConfig()
    space: dict[str, SpaceEntry] = Field(default_factory=_default_space, min_length=1)
    """Dotted key below `gate.` -> distribution. A `space` in the file replaces the default one."""
    metrics: Annotated[tuple[MetricConfig, ...], Field(strict=False, min_length=2, max_length=2)] = _DEFAULT_METRICS
    """The two objectives: one to maximise, one to minimise."""
    sampler: SamplerConfig = SamplerConfig()
    budget: BudgetConfig = BudgetConfig()
    trial: TrialConfig = TrialConfig()
    measure: MeasureConfig = MeasureConfig()
    ray: RayConfig = RayConfig()
    storage: StorageConfig = StorageConfig()
    tracking: TrackingConfig = TrackingConfig()
    export: ExportConfig = ExportConfig()
    presets: dict[str, dict[str, JsonValue]] = Field(default_factory=dict)
    """Name -> settings laid over the file by --preset NAME. Empty in a resolved file."""

    @model_validator(mode="before")
    @classmethod
    def _absolute_target_takes_the_default_ones_place(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and "space" not in data and gives_absolute_target(data):
            return {**data, "space": space_without_target()}
        return data

    @model_validator(mode="after")
    def _objectives_and_space_fit(self) -> SweepConfig:
        problems = [
            BrokenRule(("space", key), message)
            for key, distribution in self.space.items()
            for message in _space_messages(key, distribution)
        ]
        if {metric.goal for metric in self.metrics} != {"maximize", "minimize"}:
            met = " and ".join(metric.name for metric in self.metrics)
            message = f"expected one metric to maximize and one to minimize; got {met}"
            problems.append(BrokenRule(("metrics",), message))
        if not problems:
            problems.extend(_empty_routing_problems(self.gate.routing, self.space))
            problems.extend(_target_problems(self.gate, self.space))
            problems.extend(_trainer_problems(self.gate, self.space))
        _refuse(*problems)
        return self


def section_class(annotation: object) -> type[Section] | None:
    """The annotation itself where it is a section, else None."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _walk_fields(section: type[Section], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}", field
        inner = section_class(field.annotation)
        if inner is not None:
            yield from _walk_fields(inner, f"{prefix}{name}.")


@cache
def known_fields() -> Mapping[str, FieldInfo]:
    """Every dotted key of sweep.yaml, sections included, with its field."""
    return types.MappingProxyType(dict(_walk_fields(SweepConfig, "")))


@cache
def sweepable_keys() -> tuple[str, ...]:
    """The dotted keys that `space` may hold."""
    sections = ("gate.trainer", "gate.end_to_end")  # how trials run: the same for all
    return tuple(
        key
        for key, field in known_fields().items()
        if key.startswith("gate.") and not key.startswith(sections) and not section_class(field.annotation)
    )


def is_nullable(field: FieldInfo) -> bool:
    """Whether null is a value of the field."""
    return get_origin(field.annotation) in (Union, types.UnionType) and type(None) in get_args(field.annotation)


@cache
def _leaf_adapter(key: str) -> TypeAdapter[Any]:
    field = known_fields()[key]
    annotated: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    return TypeAdapter(annotated, config=ConfigDict(strict=True, allow_inf_nan=False))


def _space_messages(key: str, distribution: Distribution) -> Iterator[str]:
    """What is wrong with one entry of `space`: the key is unknown, or values lie outside the field's own range."""
    known = sweepable_keys()
    if key not in known:
        nested = [name for name in known if name.endswith(f".{key.rpartition('.')[2]}")]
        hint = f"; did you mean '{nested[0]}'?" if nested else ""
        yield f"cannot be swept{way_out(key, known, 'keys that can', hint=hint)}"
        return
    for value in distribution.edge_values():
        try:
            _leaf_adapter(key).validate_python(value)
        except ValidationError as error:
            yield _edge_message(key, distribution, value, error)


def _edge_message(key: str, distribution: Distribution, value: Scalar, error: ValidationError) -> str:
    details = error.errors(include_url=False)[0]
    if details["type"] in ("int_type", "int_from_float") and distribution.kind in REAL_KINDS:
        return f"{key} takes whole numbers; write {{int: [low, high]}} in place of {distribution.kind}"
    return f"{distribution.kind} holds {shown(value)}, but {key} {requirement(details['type'], details.get('ctx', {}))}"


_REQUIREMENTS: Mapping[str, str] = {
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be above {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be below {lt}",
    "literal_error": "must be one of {expected}",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be text",
    "bool_type": "must be true or false",
    "string_too_short": "must not be empty",
}


def requirement(error_type: str, context: Mapping[str, Any]) -> str:
    """The rule that a pydantic error type stands for, in plain words."""
    limits = {name: f"{limit:g}" if isinstance(limit, float) else limit for name, limit in context.items()}
    return _REQUIREMENTS.get(error_type, "does not take this value").format(**limits)


def _empty_routing_problems(routing: RoutingConfig, space: Mapping[str, Distribution]) -> Iterator[BrokenRule]:
    """Refuse a space in which some trial's first route lies behind its last one."""
    firsts = _possible_values("gate.routing.first", routing.first, space)
    lasts = _possible_values("gate.routing.last", routing.last, space)
    counted_from_start = [last for last in lasts if last >= 0]
    if counted_from_start and max(firsts) > min(counted_from_start):
        key = "gate.routing.first" if "gate.routing.first" in space else "gate.routing.last"
        if key in space:
            message = f"first may be {max(firsts)} while last is {min(counted_from_start)}: no route would be left"
            yield BrokenRule(("space", key), message)


def _target_problems(gate: GateConfig, space: Mapping[str, Distribution]) -> Iterator[BrokenRule]:
    """Refuse a target that is given in both ways."""
    relative, absolute = "gate.target", "gate.target_madds_m"
    if relative in space and (absolute in space or gate.target_madds_m is not None):
        path: KeyPath = ("space", absolute) if absolute in space else ("gate", "target_madds_m")
        message = (
            f"{absolute} would win over {relative}, which space holds too; give {absolute} null, "
            f"or write a space without {relative}"
        )
        yield BrokenRule(path, message, others=(("space", relative),))


def _trainer_problems(gate: GateConfig, space: Mapping[str, Distribution]) -> Iterator[BrokenRule]:
    """Refuse routers and losses that end-to-end training does not have."""
    if gate.trainer == "table":
        return
    is_swept = "gate.losses.quality" in space
    qualities = space["gate.losses.quality"].edge_values() if is_swept else (gate.losses.quality,)
    if any(qualities):
        path: KeyPath = ("space", "gate.losses.quality") if is_swept else ("gate", "losses", "quality")
        message = "gate.trainer end_to_end knows the published losses only; set gate.losses.quality to 0, or choose gate.trainer table"
        yield BrokenRule(path, message, others=(("gate", "trainer"),))
    impossible = [router for router in possible_routers(gate, space) if router not in END_TO_END_ROUTERS]
    if impossible:
        path = ("space", "gate.router") if "gate.router" in space else ("gate", "router")
        message = (
            f"gate.trainer end_to_end trains {' and '.join(END_TO_END_ROUTERS)} only, not {', '.join(impossible)}; "
            "choose gate.trainer table, or another router"
        )
        yield BrokenRule(path, message, others=(("gate", "trainer"),))


def possible_routers(gate: GateConfig, space: Mapping[str, Distribution]) -> tuple[str, ...]:
    """The kinds of router that trials may have."""
    return tuple(map(str, space["gate.router"].edge_values())) if "gate.router" in space else (gate.router,)


def absolute_targets(gate: GateConfig, space: Mapping[str, Distribution]) -> tuple[float, ...]:
    """`gate.target_madds_m`, fixed or at the ends of its range; empty where it is not used."""
    if "gate.target_madds_m" in space:
        return tuple(float(value) for value in space["gate.target_madds_m"].edge_values())
    return () if gate.target_madds_m is None else (gate.target_madds_m,)


def _possible_values(key: str, fixed: int, space: Mapping[str, Distribution]) -> list[int]:
    values = space[key].edge_values() if key in space else (fixed,)
    return [value for value in values if isinstance(value, int)]


def resolve_cohort(config: SweepConfig) -> int:
    """`sampler.cohort`, or its default for the way in which trials are trained (CONTRACTS, Search)."""
    return config.sampler.cohort or (64 if config.gate.trainer == "table" else 8)


def resolve_timeout_s(config: SweepConfig) -> float:
    """`trial.timeout_s`, or its default for the way in which trials are trained."""
    return config.trial.timeout_s or (120.0 if config.gate.trainer == "table" else 4 * 3600.0)


def config_warnings(config: SweepConfig) -> list[str]:
    """What is allowed, but is probably not meant."""
    return [*_sampler_warnings(config), *_space_warnings(config), *_training_warnings(config.supernet)]


def _sampler_warnings(config: SweepConfig) -> Iterator[str]:
    sampler, trials, cohort = config.sampler, config.budget.trials, resolve_cohort(config)
    if sampler.name == "tpe" and sampler.startup >= trials:
        yield f"sampler.startup {sampler.startup} is not below budget.trials {trials}: all trials will be random"
    elif sampler.name != "random" and cohort >= trials:
        yield (
            f"sampler.cohort {cohort} is not below budget.trials {trials}: all trials will be random, as {sampler.name} "
            "learns from earlier cohorts; lower sampler.cohort or raise budget.trials"
        )


def _space_warnings(config: SweepConfig) -> Iterator[str]:
    gate, space = config.gate, config.space
    if all(distribution.kind == "fixed" for distribution in space.values()):
        (router,) = possible_routers(gate, space)
        # The images' order is the same for all trials; the seed draws a perceptron's first weights and end-to-end noise.
        if gate.trainer == "table" and router not in ("evidence_gate", "evidence_gates", "learned_cascade"):
            yield f"space holds fixed values only: all trials will be equal, as router {router} draws nothing from its seed"
        else:
            yield "space holds fixed values only: all trials differ by their seed alone"
    if gate.trainer == "end_to_end" and "gate.optimizer.steps" in space:
        yield "space.gate.optimizer.steps has no effect with gate.trainer end_to_end: gate.end_to_end.epochs counts"


def _training_warnings(supernet: SupernetConfig) -> Iterator[str]:
    regime = resolve_regime(supernet)
    for section in ("train", "bootstrapping"):
        number = getattr(supernet, section).num_random
        if number and regime.widths == "all":
            yield f"supernet.{section}.num_random {number} is not used: with widths all, every sub-network trains in every step"
    if supernet.train.precision == "bf16" and _trains_on_cpu(supernet.device):
        yield "supernet.train.precision bf16 on a CPU: slower than float32 below large batches"
    if regime.norm == "recalibrate" and regime.teacher in ("ema", "ema_ensemble"):
        yield (
            f"supernet.train.bn recalibrate with teacher {regime.teacher}: "
            "the EMA copy keeps no statistics while it trains, and always normalises by the batch"
        )


def _trains_on_cpu(device: Device) -> bool:
    if device == "auto":
        import torch

        return not torch.cuda.is_available()
    return device == "cpu"


# Settings of the supernet that say where and how safely it is trained, not what is trained; and those that stand
# for something else: the names of a regime for its parts, the path of a checkpoint for its tensors.
_NOT_IN_SUPERNET_KEY: dict[str, Any] = {
    "workers": True,
    "threads": True,
    "device": True,
    "keep_checkpoints": True,
    "init_from": True,
    "regime": True,
    "train": {"checkpoint_every", "widths", "num_random", "teacher", "bn"},
    "bootstrapping": {"mode", "num_random"},
}


def stage_subset(config: SweepConfig, stage: Stage) -> dict[str, JsonValue]:
    """The part of the configuration that a stage's result depends on and that enters its key, JSON-able.

    Parents, the fingerprints of the data and of the start weights (hence no `data.path`, `data.crop_fraction` or `supernet.init_from`)
    and the stage's version are the pipeline's to add.
    Ray, workers, the device of training, budget, tracking and export never enter: the same sweep done elsewhere, or
    for longer, is the same sweep.
    """
    if stage == "supernet":
        supernet = config.supernet.model_dump(mode="json", exclude=_NOT_IN_SUPERNET_KEY)
        return {
            "seed": config.seed,
            "data": config.data.model_dump(mode="json", exclude={"path", "crop_fraction"}),
            "supernet": {**supernet, "regime": asdict(resolve_regime(config.supernet))},
        }
    if stage == "measure":
        return {"measure": config.measure.model_dump(mode="json")}
    if stage == "search":
        return _search_subset(config)
    if stage == "verify":
        return {"measure": config.measure.model_dump(mode="json", exclude={"group_sizes"})}
    if stage == "table":
        return {}
    raise ValueError(f"unknown stage {stage!r}; known: {', '.join(get_args(Stage))}")


def _search_subset(config: SweepConfig) -> dict[str, JsonValue]:
    subset: dict[str, Any] = config.model_dump(mode="json", include={"seed", "gate", "space", "metrics", "sampler"})
    subset["sampler"]["cohort"] = resolve_cohort(config)
    if config.gate.trainer == "table":
        del subset["gate"]["end_to_end"]
    else:
        del subset["gate"]["end_to_end"]["threads"]
    return subset


def to_yaml(config: SweepConfig) -> str:
    """The configuration as a complete sweep.yaml, in the order of the schema; reading it back gives an equal object."""
    plain = config.model_dump(mode="json", exclude=set() if config.presets else {"presets"})
    writer = YAML(typ="rt", pure=True)
    writer.width = 120
    writer.allow_unicode = True
    writer.representer.add_representer(type(None), _null)
    stream = io.StringIO()
    writer.dump(_styled(plain), stream)
    return "# Resolved by dsnet-orch: every setting of this sweep.\n" + stream.getvalue()


def _null(representer: RoundTripRepresenter, value: None) -> ScalarNode:
    return representer.represent_scalar("tag:yaml.org,2002:null", "null")


def _styled(value: Any, *, is_top: bool = True) -> Any:
    """Block style for sections, flow style for lists and for mappings that hold a list only, such as distributions."""
    if isinstance(value, list):
        sequence = CommentedSeq(_styled(item, is_top=False) for item in value)
        if not any(isinstance(item, dict) for item in value):
            sequence.fa.set_flow_style()
        return sequence
    if isinstance(value, dict):
        mapping = CommentedMap((key, _styled(item, is_top=False)) for key, item in value.items())
        if not value or (not is_top and len(value) == 1 and isinstance(next(iter(value.values())), list)):
            mapping.fa.set_flow_style()
        return mapping
    return value


def json_schema() -> dict[str, Any]:
    """JSON Schema of sweep.yaml, for editors that complete and check while one types."""
    schema = SweepConfig.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "dsnet-orch sweep"}
