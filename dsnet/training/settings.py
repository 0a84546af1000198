"""Settings of Stage I: the sub-networks of a step, their teacher, and the optimisation.

They are plain values that are checked when an object is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any

from dsnet.data.augment import Augmentation
from dsnet.data.normalization import Normalization
from dsnet.errors import ConfigError
from dsnet.space.spec import NORMS
from dsnet.strict_json import NumberRange

WIDTHS = ("sandwich", "all")
TEACHERS = ("none", "inplace", "ema", "ema_ensemble")
OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("cosine", "one_cycle", "constant")
PRECISIONS = ("float32", "bf16")
TRUSTS = ("full", "label_probability")
KEPT_WEIGHTS = ("ema", "student")

_COUNT = NumberRange(lowest=1, is_whole=True)
_COUNT_FROM_0 = NumberRange(lowest=0, is_whole=True)
_POSITIVE = NumberRange(above=0)
_NOT_NEGATIVE = NumberRange(lowest=0)
LARGEST_RATE = 1e6
"""Largest learning rate and weight decay: far above any useful value; much larger ones overflow
float32 in the optimiser."""
_BELOW_ONE = NumberRange(lowest=0, below=1)


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name} is {value!r}; known: {', '.join(known)}")


def _check_ranges(section: str, settings: object, ranges: Mapping[str, NumberRange]) -> None:
    for name, allowed in ranges.items():
        allowed.check(f"{section}.{name}", getattr(settings, name))


def check_recalibration(images: int | None, batch_size: int) -> None:
    """Check the number of images and the batch size of BatchNorm recalibration.

    Raises:
        ConfigError: `images` is below 0 (None takes all), or `batch_size` below 1.
    """
    replace(_COUNT_FROM_0, is_optional=True).check("supernet.recalibration.images", images)
    _COUNT.check("supernet.recalibration.batch_size", batch_size)


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


@dataclass(frozen=True, kw_only=True)
class Regime:
    """The sub-networks of a step, the teacher of the smaller ones, and their normalisation
    (docs/methods.md, sections 3 and 7)."""

    widths: str = "sandwich"
    """`sandwich`: the largest, `num_random` random sub-networks and the smallest; `all`: every
    sub-network of the set and its teacher."""
    num_random: int = 3
    """Random sub-networks per step of the sandwich; the papers use 2, 3 is ours: the more take
    part, the better all of them train."""
    teacher: str = "ema"
    """`none`: all learn from labels; `inplace`: the others learn from the largest in the same step;
    `ema`: from the largest of the EMA copy (in-place bootstrapping); `ema_ensemble`: as `ema`, but
    the smallest learns from the mean over the largest and the random sub-networks of the EMA copy
    (IEB)."""
    norm: str | None = None
    """One of `dsnet.space.spec.NORMS`, or None for the family's default; it takes effect when the
    supernet is laid out."""

    def __post_init__(self) -> None:
        _check_choice("supernet.train.widths", self.widths, WIDTHS)
        _check_choice("supernet.train.teacher", self.teacher, TEACHERS)
        if self.norm is not None:
            _check_choice("supernet.train.bn", self.norm, NORMS)
        _COUNT_FROM_0.check("supernet.train.num_random", self.num_random)
        if self.teacher == "ema_ensemble" and self.widths == "sandwich" and self.num_random == 0:
            raise ConfigError(
                "supernet.train.num_random is 0, but teacher ema_ensemble averages random sub-networks: at least 1"
            )


REGIMES: Mapping[str, Regime] = MappingProxyType(
    {
        "ce": Regime(widths="all", num_random=0, teacher="none"),
        "s_net": Regime(widths="all", num_random=0, teacher="none", norm="private_affine"),
        "us_net": Regime(widths="sandwich", num_random=2, teacher="inplace", norm="recalibrate"),
        "ib": Regime(widths="sandwich", teacher="ema"),
        "ieb": Regime(widths="sandwich", teacher="ema_ensemble"),
    }
)
"""Named regimes: plain cross-entropy on every width; slimmable networks (all widths, fully private
BatchNorm); universally slimmable networks (sandwich of 4, in-place distillation, statistics
re-estimated after training); in-place bootstrapping; in-place ensemble bootstrapping. Random widths
are always drawn from the declared set of sub-networks; for `us_net` this is ours, the paper draws
any width (docs/methods.md, section 7)."""

TEACHER_OF_MODE: Mapping[str, str] = MappingProxyType(
    {"none": "none", "inplace_distillation": "inplace", "ib": "ema", "ieb": "ema_ensemble"}
)
"""`supernet.bootstrapping.mode` -> `Regime.teacher`."""
_TRAIN_RANGES: Mapping[str, NumberRange] = MappingProxyType(
    {
        "epochs": _COUNT_FROM_0,
        "batch_size": _COUNT,
        "accumulate": _COUNT,
        "lr": replace(_POSITIVE, highest=LARGEST_RATE),
        "momentum": _BELOW_ONE,
        "weight_decay": replace(_NOT_NEGATIVE, highest=LARGEST_RATE),
        "warmup_epochs": _NOT_NEGATIVE,
        "label_smoothing": _BELOW_ONE,
        "grad_clip": replace(_POSITIVE, is_optional=True),
        "checkpoint_every": _COUNT,
    }
)


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of the optimisation of Stage I."""

    epochs: int = 30
    """Passes over the training split; 0 keeps the start weights (e.g. of a checkpoint) and only
    recalibrates."""
    batch_size: int = 128
    """Images per step, over all workers and micro-batches."""
    accumulate: int = 1
    """Micro-batches per step: their gradients add up to that of the whole batch (BatchNorm
    normalises each one separately)."""
    optimizer: str = "sgd"
    """`sgd` (Nesterov) or `adamw`."""
    lr: float = 0.1
    """Peak learning rate, > 0, at most `LARGEST_RATE`."""
    schedule: str = "cosine"
    """`cosine`: linear warm-up, then half a cosine to 0; `one_cycle`: cosine up from lr / 25 over
    the warm-up, cosine down to lr / 250,000; `constant`: linear warm-up, then constant."""
    momentum: float = 0.9
    """Momentum of SGD, [0, 1)."""
    weight_decay: float = 1e-4
    """Weight decay, >= 0 and at most `LARGEST_RATE`; not applied to 1-d parameters."""
    warmup_epochs: float = 1.0
    """Epochs of warm-up, 0 to `epochs`; ignored where `epochs` is 0."""
    label_smoothing: float = 0.1
    """Smoothing of hard labels, [0, 1): for the largest sub-network, for all with teacher `none`,
    and in mixtures with soft labels."""
    grad_clip: float | None = None
    """Largest gradient norm, > 0; None does not clip."""
    precision: str = "float32"
    """`float32`, or `bf16`: autocast to bfloat16 (weights, statistics and optimiser stay
    float32)."""
    channels_last: bool = False
    """Whether images and weights have NHWC memory format: the same function, often faster."""
    checkpoint_every: int = 1
    """Epochs between checkpoints."""

    def __post_init__(self) -> None:
        _check_ranges("supernet.train", self, _TRAIN_RANGES)
        if 0 < self.epochs < self.warmup_epochs:
            raise ConfigError(
                f"supernet.train.warmup_epochs is {self.warmup_epochs}, but must be at most supernet.train.epochs, {self.epochs}"
            )
        problem = sharing_problem(self.batch_size, 1, self.accumulate)
        if problem is not None:
            raise ConfigError(f"supernet.train.batch_size: {problem}; supernet.train.accumulate says how many")
        _check_choice("supernet.train.optimizer", self.optimizer, OPTIMIZERS)
        _check_choice("supernet.train.schedule", self.schedule, SCHEDULES)
        _check_choice("supernet.train.precision", self.precision, PRECISIONS)


_BOOTSTRAP_RANGES: Mapping[str, NumberRange] = MappingProxyType(
    {
        "ema_decay": _BELOW_ONE,
        "soft_ramp_epochs": _NOT_NEGATIVE,
        "largest_first": _BELOW_ONE,
        "teacher_min_updates": _COUNT_FROM_0,
    }
)


@dataclass(frozen=True, kw_only=True)
class BootstrapSettings:
    """Settings of the EMA copy and of the soft labels."""

    ema_decay: float = 0.997
    """Decay of the EMA per step, [0, 1)."""
    ema_warmup: bool = True
    """Ours: start with a small decay (see `dsnet.network.ema.ema_decay`)."""
    soft_ramp_epochs: float = 0.0
    """Ours: epochs over which the weight of the soft labels rises from 0 to 1, >= 0."""
    trust: str = "label_probability"
    """Share of the soft label in an image's target: `full`, all of it, as published;
    `label_probability` (ours), the probability that the teacher gives to the image's label, with
    the hard label as the rest."""
    largest_first: float = 0.0
    """Ours: share of the steps, [0, 1), in which the largest sub-network trains alone before the
    others join."""
    teacher_min_updates: int = 100
    """Updates of its running statistics below which a width of the teacher normalises by the batch.
    Start weights keep their count; after recalibration it is the number of recalibration batches,
    to which training adds. With 0, every width uses its running statistics from the first step."""

    def __post_init__(self) -> None:
        _check_ranges("supernet.bootstrapping", self, _BOOTSTRAP_RANGES)
        _check_choice("supernet.bootstrapping.trust", self.trust, TRUSTS)


_PUBLISHED: Mapping[str, Any] = MappingProxyType({"trust": "full", "largest_first": 0.0})
"""Settings added after the first release, with the values that reproduce its training."""


def without_published(bootstrapping: Mapping[str, Any]) -> dict[str, Any]:
    """Remove newer settings with their published values, so that records and keys of the first
    release stay valid."""
    return {name: value for name, value in bootstrapping.items() if name not in _PUBLISHED or value != _PUBLISHED[name]}


def with_published(bootstrapping: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the settings of a record: settings that the first release lacks get their published
    values."""
    return {**_PUBLISHED, **bootstrapping}


def is_of_first_release(bootstrapping: Mapping[str, Any]) -> bool:
    """Whether exactly the settings of the first release are given, as its records do; a person
    omits defaults."""
    return bootstrapping.keys() == BootstrapSettings.__dataclass_fields__.keys() - _PUBLISHED.keys()


@dataclass(frozen=True, kw_only=True)
class SupernetRun:
    """Everything beside architecture and data that determines a supernet's weights."""

    train: TrainSettings = TrainSettings()
    regime: Regime = Regime()
    bootstrapping: BootstrapSettings = BootstrapSettings()
    augmentation: Augmentation
    normalization: Normalization
    seed: int = 0
    weights: str = "ema"
    """Weights that are kept at the end: `ema` or `student`."""
    recalibration_images: int | None = None
    """Images of the training split for BatchNorm recalibration; None takes all; 0 does not
    recalibrate."""
    recalibration_batch: int = 256
    """Images per batch of recalibration."""
    keep_checkpoints: int = 2
    """Training checkpoints that are kept, >= 1."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """Record of the start weights: the checkpoint's file name and SHA-256; empty for fresh
    weights."""

    def __post_init__(self) -> None:
        _check_choice("supernet.weights", self.weights, KEPT_WEIGHTS)
        _COUNT_FROM_0.check("seed", self.seed)
        _COUNT.check("supernet.keep_checkpoints", self.keep_checkpoints)
        check_recalibration(self.recalibration_images, self.recalibration_batch)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able mapping, saved with every checkpoint, that `from_json` turns back into an
        equal object."""
        data = asdict(self)
        return {**data, "bootstrapping": without_published(data["bootstrapping"])}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SupernetRun:
        """Rebuild settings from the result of `to_json`.

        Raises:
            ConfigError: a field is unknown, missing or out of its range.
        """
        try:
            return cls(
                **{
                    **data,
                    "train": TrainSettings(**data["train"]),
                    "regime": Regime(**data["regime"]),
                    "bootstrapping": BootstrapSettings(**with_published(data["bootstrapping"])),
                    "augmentation": Augmentation(**data["augmentation"]),
                    "normalization": Normalization.from_json(data["normalization"]),
                }
            )
        except (KeyError, TypeError) as error:
            raise ConfigError(f"these are not the settings of a supernet's training: {error}") from error
