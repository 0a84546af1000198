"""Settings of Stage I: the sub-networks of a step, their teacher, and the optimisation. They need
no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from types import MappingProxyType
from typing import Any, Final, Literal

from dsnet.settings import (
    Fraction,
    FractionBelowOne,
    LearningRate,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SettingError,
    Settings,
    WeightDecay,
)
from dsnet.space.spec import Norm

Widths = Literal["sandwich", "all"]
Teacher = Literal["none", "inplace", "ema", "ema_ensemble"]
Views = Literal["same", "own"]
RegimeName = Literal["ce", "s_net", "us_net", "sp_net", "ib", "ieb", "mvco"]
BootstrapMode = Literal["none", "inplace_distillation", "ib", "ieb"]
Optimizer = Literal["sgd", "adamw"]
Schedule = Literal["cosine", "one_cycle", "constant"]
Precision = Literal["float32", "bf16"]
Trust = Literal["full", "label_probability"]
KeptWeights = Literal["ema", "student"]


EMA_TEACHERS: Final[tuple[Teacher, ...]] = ("ema", "ema_ensemble")
"""Teachers that run separately from the students."""


def sharing_problem(batch_size: int, workers: int, accumulate: int) -> str | None:
    """The problem of dividing a batch among workers and micro-batches, as a phrase for a message;
    None if there is none.

    Each micro-batch of each worker must get equally many images, at least 2: a step's gradient is
    the mean over equal shares, and BatchNorm needs 2 images.
    """
    shares = workers * accumulate
    if batch_size % shares == 0 and batch_size >= 2 * shares:
        return None
    among = f"{workers} workers" if workers > 1 else "1 worker"
    among += f" x {accumulate} micro-batches" if accumulate > 1 else ""
    return f"{batch_size} images cannot be shared equally among {among} with at least 2 each"


def warmup_problem(epochs: int, warmup_epochs: float) -> str | None:
    """The problem of a warm-up that is longer than the training, as a phrase for a message; None if
    there is none. Where nothing is trained, the warm-up is ignored."""
    if not 0 < epochs < warmup_epochs:
        return None
    return f"{warmup_epochs:g} epochs of warm-up do not fit into {epochs} epochs of training"


def penalty_problem(gamma_l1: float, has_batch_norm: bool) -> str | None:
    """The problem of a penalty on scales that the network does not have, as a phrase for a message;
    None if there is none."""
    if gamma_l1 == 0 or has_batch_norm:
        return None
    return f"supernet.train.gamma_l1 is {gamma_l1:g}, but this network has no BatchNorm, whose scales it penalises"


def ensemble_problem(widths: Widths, teacher: Teacher, num_random: int) -> str | None:
    """The problem of an ensemble without random sub-networks, as a phrase for a message; None if
    there is none."""
    if (widths, teacher, num_random) != ("sandwich", "ema_ensemble", 0):
        return None
    return "ieb averages the teacher with random sub-networks and needs at least 1; or choose regime ib"


def views_problem(views: Views, teacher: Teacher) -> str | None:
    """The problem of a view of its own for a teacher that does not run separately, as a phrase for
    a message; None if there is none."""
    if views == "same" or teacher in EMA_TEACHERS:
        return None
    known = " or ".join(EMA_TEACHERS)
    return f"teacher {teacher} sees no images of its own; choose teacher {known}, or views same"


@dataclass(frozen=True, kw_only=True)
class Regime(Settings):
    """The sub-networks of a step, the teacher of the smaller ones, and their normalisation
    (docs/methods.md, sections 3 and 7)."""

    SECTION = "supernet.train"
    KEYS = MappingProxyType({"norm": "supernet.train.bn"})

    widths: Widths = "sandwich"
    """`sandwich`: the largest, `num_random` random sub-networks and the smallest; `all`: every
    sub-network of the set and its teacher."""
    num_random: NonNegativeInt = 3
    """Random sub-networks per step of the sandwich; the papers use 2, 3 is ours: the more take
    part, the better all of them train."""
    teacher: Teacher = "ema"
    """`none`: all learn from labels; `inplace`: the others learn from the largest in the same step;
    `ema`: from the largest of the EMA copy (in-place bootstrapping); `ema_ensemble`: as `ema`, but
    the smallest learns from the mean over the largest and the random sub-networks of the EMA copy
    (IEB)."""
    norm: Norm | None = None
    """None: the family's default. It takes effect when the supernet is laid out."""
    views: Views = "same"
    """`same`: the teacher sees the students' augmented images; `own`: it sees the same images with
    an augmentation of its own (multi-view consistency), which needs an EMA teacher."""

    def __post_init__(self) -> None:
        super().__post_init__()
        problem = ensemble_problem(self.widths, self.teacher, self.num_random)
        if problem is not None:
            raise SettingError(f"supernet.train.num_random is {self.num_random}, but {problem}")
        problem = views_problem(self.views, self.teacher)
        if problem is not None:
            raise SettingError(f"supernet.train.views is {self.views}, but {problem}")

    def to_json(self) -> dict[str, Any]:
        """A JSON-able mapping of the fields; without `views` at its default, as in records from
        before this field."""
        data = asdict(self)
        if self.views == Regime.views:
            del data["views"]
        return data


REGIMES: Mapping[RegimeName, Regime] = MappingProxyType(
    {
        "ce": Regime(widths="all", num_random=0, teacher="none"),
        "s_net": Regime(widths="all", num_random=0, teacher="none", norm="private_affine"),
        "us_net": Regime(widths="sandwich", num_random=2, teacher="inplace", norm="recalibrate"),
        "sp_net": Regime(widths="all", num_random=0, teacher="inplace", norm="private_stats"),
        "ib": Regime(widths="sandwich", teacher="ema"),
        "ieb": Regime(widths="sandwich", teacher="ema_ensemble"),
        "mvco": Regime(widths="sandwich", teacher="ema", views="own"),
    }
)
"""Named regimes: plain cross-entropy on every width; slimmable networks (all widths, fully private
BatchNorm); universally slimmable networks (sandwich of 4, in-place distillation, statistics
re-estimated after training); SP-Net (all widths, the others learn from the largest, separate
statistics); in-place bootstrapping; in-place ensemble bootstrapping; multi-view consistency of
DS-Net++ (in-place bootstrapping whose teacher sees another augmented view). Random widths are
always drawn from the declared set of sub-networks; for `us_net` this is ours, the paper draws any
width (docs/methods.md, section 7)."""

TEACHER_OF_MODE: Mapping[BootstrapMode, Teacher] = MappingProxyType(
    {"none": "none", "inplace_distillation": "inplace", "ib": "ema", "ieb": "ema_ensemble"}
)
"""`supernet.bootstrapping.mode` -> `Regime.teacher`."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Settings):
    """Settings of the optimisation of Stage I."""

    SECTION = "supernet.train"

    epochs: NonNegativeInt = 30
    """Passes over the training split; 0 keeps the start weights (e.g. of a checkpoint) and only
    recalibrates."""
    batch_size: PositiveInt = 128
    """Images per step, over all workers and micro-batches."""
    accumulate: PositiveInt = 1
    """Micro-batches per step: their gradients add up to that of the whole batch (BatchNorm
    normalises each one separately)."""
    optimizer: Optimizer = "sgd"
    """`sgd` (Nesterov) or `adamw`."""
    lr: LearningRate = 0.1
    """Peak learning rate, > 0, at most `dsnet.settings.LARGEST_RATE`."""
    schedule: Schedule = "cosine"
    """`cosine`: linear warm-up, then half a cosine to 0; `one_cycle`: cosine up from lr / 25 over
    the warm-up, cosine down to lr / 250,000; `constant`: linear warm-up, then constant."""
    momentum: FractionBelowOne = 0.9
    """Momentum of SGD, [0, 1)."""
    weight_decay: WeightDecay = 1e-4
    """Weight decay, >= 0 and at most `dsnet.settings.LARGEST_RATE`; not applied to 1-d
    parameters."""
    warmup_epochs: NonNegativeFloat = 1.0
    """Epochs of warm-up, 0 to `epochs`; ignored where `epochs` is 0."""
    label_smoothing: FractionBelowOne = 0.1
    """Smoothing of hard labels, [0, 1): for the largest sub-network, for all with teacher `none`,
    and in mixtures with soft labels."""
    soft_weight: Fraction = 1.0
    """Weight of the soft label in the target of a sub-network with a teacher, [0, 1]; the hard
    label has the rest. 1 is the published value of DS-Net, 0.9 that of SP-Net."""
    temperature: PositiveFloat = 1.0
    """Temperature of the soft labels, > 0: the probabilities of teacher and student are those of
    their logits divided by it, and this part of the loss is multiplied by its square."""
    gamma_l1: NonNegativeFloat = 0.0
    """Factor of the sum of the absolute scales (gamma) of all BatchNorms, which is added to the
    loss of a step, >= 0; with it, channels that matter little get a small scale."""
    grad_clip: PositiveFloat | None = None
    """Largest gradient norm, > 0; None does not clip."""
    precision: Precision = "float32"
    """`float32`, or `bf16`: autocast to bfloat16 (weights, statistics and optimiser stay
    float32)."""
    channels_last: bool = False
    """Whether images and weights have NHWC memory format: the same function, often faster."""
    checkpoint_every: PositiveInt = 1
    """Epochs between checkpoints."""

    def __post_init__(self) -> None:
        super().__post_init__()
        problem = warmup_problem(self.epochs, self.warmup_epochs)
        if problem is not None:
            raise SettingError(f"supernet.train.warmup_epochs: {problem}")
        problem = sharing_problem(self.batch_size, 1, self.accumulate)
        if problem is not None:
            raise SettingError(
                f"supernet.train.batch_size: {problem}; supernet.train.accumulate is the number of micro-batches"
            )


@dataclass(frozen=True, kw_only=True)
class BootstrapSettings(Settings):
    """Settings of the EMA copy and of the soft labels."""

    SECTION = "supernet.bootstrapping"

    ema_decay: FractionBelowOne = 0.997
    """Decay of the EMA per step, [0, 1)."""
    ema_warmup: bool = True
    """Ours: start with a small decay (see `dsnet.network.ema.ema_decay`)."""
    soft_ramp_epochs: NonNegativeFloat = 0.0
    """Ours: epochs over which the weight of the soft labels rises from 0 to
    `TrainSettings.soft_weight`, >= 0."""
    trust: Trust = "label_probability"
    """Share of the soft label in an image's target: `full`, all of it, as published;
    `label_probability` (ours), the probability that the teacher gives to the image's label, with
    the hard label as the rest."""
    largest_first: FractionBelowOne = 0.0
    """Ours: share of the steps, [0, 1), in which the largest sub-network trains alone before the
    others join."""
    teacher_min_updates: NonNegativeInt = 100
    """Updates of its running statistics below which a width of the teacher normalises by the batch.
    Start weights keep their count; after recalibration it is the number of recalibration batches,
    to which training adds. With 0, every width uses its running statistics from the first step."""


TRAIN_ADDED: Mapping[str, Any] = MappingProxyType({"soft_weight": 1.0, "temperature": 1.0, "gamma_l1": 0.0})
"""Fields of `TrainSettings` added after the first release, with the values that train as it did."""


def without_added(train: Mapping[str, Any]) -> dict[str, Any]:
    """Remove newer settings with the values that train as the first release did, so that its
    records and keys stay valid."""
    return {name: value for name, value in train.items() if name not in TRAIN_ADDED or value != TRAIN_ADDED[name]}


PUBLISHED: Mapping[str, Any] = MappingProxyType({"trust": "full", "largest_first": 0.0})
"""Fields of `BootstrapSettings` added after the first release, with the values that reproduce its
training."""


def without_published(bootstrapping: Mapping[str, Any]) -> dict[str, Any]:
    """Remove newer settings with their published values, so that records and keys of the first
    release stay valid."""
    return {name: value for name, value in bootstrapping.items() if name not in PUBLISHED or value != PUBLISHED[name]}


def with_published(bootstrapping: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the settings of a record: missing settings, which the first release did not have,
    get their published values."""
    return {**PUBLISHED, **bootstrapping}


def is_of_first_release(bootstrapping: Mapping[str, Any]) -> bool:
    """Whether exactly the settings of the first release are given, as in its records; settings that
    people write usually leave out defaults."""
    return bootstrapping.keys() == {each.name for each in fields(BootstrapSettings)} - PUBLISHED.keys()


@dataclass(frozen=True, kw_only=True)
class RecalibrationSettings(Settings):
    """Settings of BatchNorm recalibration after training."""

    SECTION = "supernet.recalibration"

    images: NonNegativeInt | None = None
    """Number of images of `train`; None = all; 0 = keep the statistics of the start weights."""
    batch_size: PositiveInt = 256
    """Images per batch."""


@dataclass(frozen=True, kw_only=True)
class SupernetSettings(Settings):
    """The network and its training."""

    SECTION = "supernet"

    model: str
    """A registered family; or `checkpoint` for the network and sub-networks of `init_from`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the family."""
    init_from: str | None = None
    """Path of start weights (see `dsnet.training.start.load_start`); their normalisation is used
    too."""
    train: TrainSettings = field(default_factory=TrainSettings)
    regime: Regime = field(default_factory=Regime)
    bootstrapping: BootstrapSettings = field(default_factory=BootstrapSettings)
    weights: KeptWeights = "ema"
    """Weights that are kept at the end: `ema` or `student`."""
    recalibration: RecalibrationSettings = field(default_factory=RecalibrationSettings)
    keep_checkpoints: PositiveInt = 2
    """Training checkpoints that are kept, >= 1."""
