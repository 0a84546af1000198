"""The sections of sweep.yaml, each with the rules between its own settings; config.py puts them together.

Strict means: no unknown key, no silent conversion ("3" is not 3, 1 is not true), and every range checked when an object
is built. Only a whole number where a real one is wanted is taken as it is meant.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Union, get_args, get_origin

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
    WithJsonSchema,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from dsnet.errors import ConfigError
from dsnet.wording import did_you_mean, plural, shown, way_out
from search.front.pareto import parse_pick

if TYPE_CHECKING:
    from dsnet.training.settings import Regime

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
"""Metrics that a sweep can optimise, with the only goal that makes sense for each; `goal_of` knows the latencies' longer names too."""
DEVICE_NAME_PATTERN = r"[A-Za-z_][A-Za-z0-9_]{0,31}"
"""Names of `measure.devices`: they become part of metrics' names, which stand in expressions."""
_LATENCY = re.compile(rf"latency_ms(_batch[1-9]\d*)?(\.{DEVICE_NAME_PATTERN})?")
CHECKPOINT_MODEL = "checkpoint"
"""The `supernet.model` that takes layout and sub-networks from `supernet.init_from`."""


def goal_of(metric: str) -> str | None:
    """Whether a metric is to maximize or to minimize; None for what can be no metric of any sweep."""
    return "minimize" if _LATENCY.fullmatch(metric) else OBJECTIVE_GOALS.get(metric)


@dataclass(frozen=True)
class BrokenRule:
    """A rule between settings that does not hold; `path` is relative to the section that checks it."""

    path: KeyPath
    message: str
    others: tuple[KeyPath, ...] = ()
    """Further settings that it is about: whoever spoke last, of all of them, is told."""

    def __str__(self) -> str:
        return f"{'.'.join(map(str, self.path))}: {self.message}" if self.path else self.message


def refuse(*rules: BrokenRule) -> None:
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


def _recalibration_images(value: object) -> object:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if value is None or value == FROM_DATA or is_count:
        return value
    raise ValueError(f"expected a whole number of images, {FROM_DATA}, or null; got {shown(value)}")


FROM_DATA: Final = "auto"
"""The value of a setting that follows from the data, where null has another meaning."""
RecalibrationImages = Annotated[Literal["auto"] | NonNegativeInt | None, BeforeValidator(_recalibration_images)]


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
    randaugment_ops: Annotated[int, Field(ge=0, le=14)] | None = None
    """RandAugment: random operations per image, one after the other, at most 14; 0 = none; null = from the data."""
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
            refuse(BrokenRule(("crop_scale",), message))
        if self.crop_padding:
            message = f"{self.crop_padding} pixels have no use beside crop_scale, which crops already; remove one"
            refuse(BrokenRule(("crop_padding",), message))
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
            refuse(BrokenRule((), f"fractions add up to more than 1: {written} = {sum(shares.values()):g}"))
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
            refuse(BrokenRule(("image_size",), "an image folder needs it: the side in pixels, 8 to 512"))
        if self.name != "image_folder" and self.crop_fraction != 1:
            message = f"only an image_folder is cropped; remove {shown(self.crop_fraction)}"
            refuse(BrokenRule(("crop_fraction",), message))
        if self.name == "digits" and self.path is not None:
            message = f"digits comes with scikit-learn and takes no folder; remove {shown(self.path)}"
            refuse(BrokenRule(("path",), message))
        if self.stream and self.name != "image_folder":
            refuse(BrokenRule(("stream",), f"only an image_folder can be streamed; {self.name} fits into memory"))
        if self.stream and self.augment.crop_padding:
            message = (
                f"{self.augment.crop_padding} pixels have no use: streamed images are cropped by crop_scale; remove it"
            )
            refuse(BrokenRule(("augment", "crop_padding"), message))
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
    epochs: NonNegativeInt | None = None
    """Passes over `train`; 0 keeps the weights of supernet.init_from; null = from the data."""
    batch_size: PositiveInt | None = None
    """Images per step, over all workers and micro-batches together; null = from the data."""
    accumulate: PositiveInt = 1
    """Micro-batches whose gradients add up to one step's; BatchNorm sees each one alone."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd (Nesterov) | adamw."""
    lr: Annotated[float, Field(gt=0, le=LARGEST_RATE)] | None = None
    """Peak learning rate, > 0, at most 1e6; null = from the batch size."""
    schedule: Literal["cosine", "one_cycle", "constant"] = "cosine"
    """cosine: to 0 after the warm-up | one_cycle: up during the warm-up, down to lr / 250,000 | constant."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """For sgd, [0, 1)."""
    weight_decay: Annotated[float, Field(ge=0, le=LARGEST_RATE)] | None = None
    """Not on one-dimensional parameters; null = from learning rate and steps."""
    warmup_epochs: NonNegativeFloat | None = None
    """Epochs of linear warm-up, part of `epochs`; null = from the epochs."""
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
        if self.epochs and self.warmup_epochs and self.epochs < self.warmup_epochs:
            message = f"{self.warmup_epochs:g} epochs of warm-up do not fit into {self.epochs} epochs of training"
            refuse(BrokenRule(("warmup_epochs",), message))
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
    trust: Literal["full", "label_probability"] = "label_probability"
    """Share of the soft label in an image's target. full: all, as in the paper | label_probability: what the teacher gives the label."""
    largest_first: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the steps, [0, 1), in which the largest sub-network trains alone before the others join."""
    teacher_min_updates: NonNegativeInt = 100
    """A teacher width with fewer updates of its statistics runs on those of the batch."""


class RecalibrationConfig(Section):
    """BatchNorm statistics, re-estimated for every width after training."""

    images: RecalibrationImages = FROM_DATA
    """Images of `train` to use: a number | null = all | auto = from the data. 0 keeps the statistics of supernet.init_from, and needs
    0 epochs."""
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
        refuse(*_batch_problems(self), *_number_problems(self), *_regime_problems(self), *_start_problems(self))
        return self


def _batch_problems(supernet: SupernetConfig) -> Iterator[BrokenRule]:
    from dsnet.training.settings import sharing_problem

    train = supernet.train
    if train.batch_size is None:
        return
    problem = sharing_problem(train.batch_size, supernet.workers, train.accumulate)
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
    epochs = supernet.train.epochs
    if supernet.recalibration.images == 0 and epochs != 0:
        training = "training outdates" if epochs is None else f"{plural(epochs, 'epoch')} of training outdate"
        message = f"0 keeps the statistics of supernet.init_from, but {training} them; write supernet.train.epochs 0, or auto here"
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
        refuse(*problems)
        return self


class MetricConfig(Section):
    """One objective of the sweep."""

    name: Text
    """One of top1, top5, madds_m, p95_madds_m, params_m, latency_ms, latency_ms_batchN, N > 1 of measure.batch_sizes; latencies also with
    `.NAME` of measure.devices at the end."""
    goal: Literal["maximize", "minimize"]
    """maximize (accuracies) | minimize (costs)."""
    ref: float | None = None
    """This coordinate of the hypervolume's reference point; null = 1.05 x the widest sub-network's."""

    @model_validator(mode="after")
    def _is_known(self) -> MetricConfig:
        wanted = goal_of(self.name)
        if wanted is None:
            message = f"unknown metric '{self.name}'{way_out(self.name, list(OBJECTIVE_GOALS))}"
            refuse(BrokenRule(("name",), message))
        if self.goal != wanted:
            refuse(BrokenRule(("goal",), f"{self.name} is a metric to {wanted}; got '{self.goal}'"))
        if self.goal == "maximize" and self.ref is not None and not 0 <= self.ref <= 1:
            refuse(BrokenRule(("ref",), f"{self.name} is a fraction from 0 to 1; got {shown(self.ref)}"))
        if self.goal == "minimize" and self.ref is not None and self.ref <= 0:
            message = f"no {self.name} is better than {shown(self.ref)}: every hypervolume would be 0; write what is too much, or null"
            refuse(BrokenRule(("ref",), message))
        return self


class HardConstraint(Section):
    """A condition that ends what breaks it at once."""

    hard: Text
    """An expression as any other of `constraints`."""


def _constraint(written: object) -> str | HardConstraint:
    if isinstance(written, HardConstraint) or (isinstance(written, str) and written):
        return written
    if isinstance(written, Mapping) and list(written) == ["hard"] and isinstance(written["hard"], str):
        return HardConstraint(hard=written["hard"])
    raise ValueError(f'expected a condition such as "madds_m <= 180", or {{hard: "..."}}; got {shown(written)}')


def _written_constraint(constraint: str | HardConstraint) -> JsonValue:
    return constraint if isinstance(constraint, str) else {"hard": constraint.hard}


Constraint = Annotated[
    str | HardConstraint,
    PlainValidator(_constraint),
    PlainSerializer(_written_constraint),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {
                    "type": "object",
                    "required": ["hard"],
                    "additionalProperties": False,
                    "properties": {"hard": {"type": "string", "minLength": 1}},
                },
            ]
        }
    ),
]


def _scalar(value: object) -> object:
    if isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"expected a number, text, true or false; got {shown(value)}")


PointValue = Annotated[
    bool | int | float | str,
    PlainValidator(_scalar),
    WithJsonSchema({"type": ["number", "string", "boolean"]}),
]


class SamplerConfig(Section):
    """Who suggests the trials."""

    name: Text = "tpe"
    """random | grid | qmc | tpe | nsga2 | nsga3 | gp, or the import path of a class of Optuna's kind."""
    options: dict[str, JsonValue] = Field(default_factory=dict)
    """Keyword arguments of the sampler's constructor; of grid `points`, how many each continuous dimension gets."""
    cohort: PositiveInt | None = None
    """Trials asked for, run and told together; results depend on it, and not on the number of actors.
    null = 64, or 8 with sampler gp or gate.trainer end_to_end."""
    startup: NonNegativeInt = 16
    """Random trials before tpe and gp start to model, and the size of a generation of nsga2 and nsga3."""
    order: Literal["cohorts", "asynchronous"] = "cohorts"
    """cohorts: reproducible, with any number of workers | asynchronous: no worker waits, but results depend on who finishes first."""
    enqueue: Annotated[tuple[dict[str, PointValue], ...], Field(strict=False)] | None = None
    """Points {key: value} that are tried first; keys that a point leaves out are drawn. [] = none; null = the published settings, as far
    as the space holds them (with grid: none)."""


class PlateauConfig(Section):
    """Stop when the front stands still."""

    trials: PositiveInt = 200
    """The last so many trials ..."""
    gain: Annotated[float, Field(gt=0, le=1)] = 0.001
    """... have added less than this share, (0, 1], to the hypervolume of the feasible ones."""


class BudgetConfig(Section):
    """When the sweep ends."""

    trials: PositiveInt = 256
    """Number of trials, failed ones included."""
    time_s: PositiveFloat | None = None
    """Seconds of searching; null = no limit."""
    plateau: PlateauConfig | None = None
    """{trials: 200, gain: 0.001}: stop when the last 200 trials have added less than 0.1 % to the hypervolume; null = never."""
    target: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """Conditions, written as constraints, that one trial must meet together: then the sweep ends. [] = never."""
    max_failed: Fraction = 0.5
    """Share of failed trials, [0, 1], above which the sweep counts as failed (exit code 4)."""
    verify: PositiveInt | None = 32
    """About so many gates of the front run for real on `test`, evenly along it; both ends, the knee and what export.picks
    names always. null = all."""


class PrunerConfig(Section):
    """Ends trials early that fall behind; for gate.trainer end_to_end, whose trials are long."""

    name: Literal["none", "pareto_halving"] = "none"
    """none | pareto_halving: at each rung the best 1/factor by Pareto rank goes on."""
    factor: Annotated[int, Field(ge=2)] = 3
    """Of each rung about one in so many goes on, at least 2."""
    first_epochs: PositiveInt = 3
    """Epochs of the first rung; the others lie at first_epochs * factor^k, below gate.end_to_end.epochs."""


class TrialConfig(Section):
    """What one trial may cost."""

    timeout_s: PositiveFloat | None = None
    """Seconds, after which the trial has failed; null = 120, or 4 hours with gate.trainer end_to_end."""
    retries: NonNegativeInt = 2
    """New attempts after a lost worker; an error of the trial itself is not repeated."""


class DeviceConfig(Section):
    """A further device on which everything is timed."""

    device: Device = "cpu"
    """auto | cpu | cuda; auto = cuda where there is one."""
    threads: PositiveInt = 1
    """Torch threads while the clock runs."""


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
    devices: dict[str, DeviceConfig] = Field(default_factory=dict)
    """NAME -> device: everything is timed there too, and gives the metrics latency_ms.NAME and latency_ms_batchN.NAME."""

    @model_validator(mode="after")
    def _sizes_increase_and_devices_have_names(self) -> MeasureConfig:
        problems = [
            BrokenRule(
                ("devices", name),
                f"'{name}' is no name of a device; use 1 to 32 letters, digits or '_', no digit at the start",
            )
            for name in self.devices
            if not re.fullmatch(DEVICE_NAME_PATTERN, name)
        ]
        for name in ("batch_sizes", "group_sizes"):
            sizes = getattr(self, name)
            if list(sizes) != sorted(set(sizes)):
                ordered = shown(sorted(set(sizes)))
                problems.append(BrokenRule((name,), f"sizes must increase; got {shown(sizes)}, write {ordered}"))
        if self.group_sizes[0] != 1:
            problems.append(BrokenRule(("group_sizes",), f"must start at 1; got {shown(self.group_sizes)}"))
        refuse(*problems)
        return self


class SupernetsConfig(Section):
    """How a sweep of supernets chooses and trains them; read only where `space` holds supernet.* keys."""

    number: PositiveInt = 4
    """Distinct supernets; fewer where the space has fewer."""
    sampler: Literal["random", "grid", "qmc"] = "qmc"
    """random | grid | qmc: draws the supernet.* part of the space, all of it beforehand."""
    scheduler: Text = "asha"
    """none | asha | median | hyperband, or the import path of a scheduler of Ray Tune's kind: who stops trainings that fall behind."""
    options: dict[str, JsonValue] = Field(default_factory=dict)
    """Keyword arguments of the scheduler; of asha grace_period, reduction_factor, ... in epochs."""
    concurrent: PositiveInt = 1
    """Supernets that train at the same time."""
    report_every: PositiveInt = 1
    """Epochs between two reports of the static hypervolume on `val`, on which the scheduler decides."""


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
    trial_resources: dict[Text, PositiveFloat] = Field(default_factory=dict)
    """What each of them takes beside its cores, under Ray's names: GPU (0.5 = two on one), memory (bytes), or one that the cluster has."""


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
        pick = parse_pick(text)
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


def section_class(annotation: object) -> type[Section] | None:
    """The annotation itself where it is a section, else None."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def walk_fields(section: type[Section], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    """Every dotted key below a section, sections included, with its field."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}", field
        inner = section_class(field.annotation)
        if inner is not None:
            yield from walk_fields(inner, f"{prefix}{name}.")


def is_nullable(field: FieldInfo) -> bool:
    """Whether null is a value of the field."""
    return get_origin(field.annotation) in (Union, types.UnionType) and type(None) in get_args(field.annotation)


def annotated_type(field: FieldInfo) -> Any:
    """The type of a field with its bounds, for a validator of its own."""
    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation


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
