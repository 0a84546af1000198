"""The sections `supernet` and `supernets`: the network, how it is trained, and how a sweep of
several chooses among them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any, Final, Literal

from pydantic import (
    BeforeValidator,
    Field,
    JsonValue,
    model_validator,
)

from dsnet.settings import (
    Device,
    Fraction,
    FractionBelowOne,
    LearningRate,
    NonNegativeFloat,
    NonNegativeInt,
    NumThreads,
    PositiveFloat,
    PositiveInt,
    WeightDecay,
    fits,
)
from dsnet.space.spec import Norm
from dsnet.training.settings import (
    REGIMES,
    TEACHER_OF_MODE,
    BootstrapMode,
    BootstrapSettings,
    KeptWeights,
    Optimizer,
    Precision,
    RecalibrationSettings,
    Regime,
    RegimeName,
    Schedule,
    SupernetSettings,
    Teacher,
    TrainSettings,
    Trust,
    Views,
    Widths,
    ensemble_problem,
    sharing_problem,
    views_problem,
    warmup_problem,
)
from dsnet.wording import plural, shown
from orchestration.config.section import BrokenRule, Section, Text, refuse
from orchestration.config.structure import StructureConfig

CHECKPOINT_MODEL = "checkpoint"
"""Value of `supernet.model` that takes layout and sub-networks from `supernet.init_from`."""


def _recalibration_images(value: object) -> object:
    if value == FROM_DATA or fits(value, NonNegativeInt | None):
        return value
    raise ValueError(f"expected a whole number of images, {FROM_DATA}, or null; got {shown(value)}")


FROM_DATA: Final = "auto"
"""Value of a setting that is derived from the data, if null has another meaning."""
RecalibrationImages = Annotated[Literal["auto"] | NonNegativeInt | None, BeforeValidator(_recalibration_images)]


class TrainConfig(Section):
    """Stage I: training of the supernet."""

    widths: Widths | None = None
    """sandwich: largest, random ones and smallest | all: every width in every step; null = from
    supernet.regime."""
    num_random: NonNegativeInt | None = None
    """Random sub-networks of the sandwich; null = from supernet.regime."""
    teacher: Teacher | None = None
    """Teacher of the narrower sub-networks. none: labels only | inplace: the widest sub-network |
    ema: the widest sub-network of the EMA copy | ema_ensemble: the ensemble of the EMA copy; null =
    from the regime."""
    views: Views | None = None
    """same: the teacher sees the students' augmented images | own: an augmented view of its own,
    with an EMA teacher; null = from the regime."""
    bn: Norm | None = None
    """BatchNorm with statistics per width | and affine pairs per width | recalibrated | GroupNorm;
    null = the regime's or the family's."""
    epochs: NonNegativeInt | None = None
    """Passes over `train`; 0 keeps the weights of supernet.init_from; null = from the data."""
    batch_size: PositiveInt | None = None
    """Images per step, over all workers and micro-batches together; null = from the data."""
    accumulate: PositiveInt = TrainSettings.accumulate
    """Micro-batches per step, whose gradients are summed; BatchNorm normalises each one separately.
    """
    optimizer: Optimizer = TrainSettings.optimizer
    """sgd (Nesterov) | adamw."""
    lr: LearningRate | None = None
    """Peak learning rate, > 0, at most 1e6; null = from the batch size."""
    schedule: Schedule = TrainSettings.schedule
    """cosine: to 0 after the warm-up | one_cycle: up during the warm-up, down to lr / 250,000 |
    constant."""
    momentum: FractionBelowOne = TrainSettings.momentum
    """Momentum of sgd, [0, 1)."""
    weight_decay: WeightDecay | None = None
    """Weight decay, not applied to one-dimensional parameters; null = from learning rate and steps.
    """
    warmup_epochs: NonNegativeFloat | None = None
    """Epochs of linear warm-up, part of `epochs`; null = from the epochs."""
    label_smoothing: FractionBelowOne = TrainSettings.label_smoothing
    """Label smoothing, [0, 1), for sub-networks trained on labels: the widest, and with teacher
    none all."""
    soft_weight: Fraction = TrainSettings.soft_weight
    """Weight of the teacher's answer against the label for the narrower sub-networks, 0..1."""
    temperature: PositiveFloat = TrainSettings.temperature
    """Temperature of teacher and student in the loss to the teacher's answer, > 0; the loss is
    multiplied by its square."""
    gamma_l1: NonNegativeFloat = TrainSettings.gamma_l1
    """Factor of an L1 penalty on the scales (gamma) of every BatchNorm, >= 0."""
    grad_clip: PositiveFloat | None = TrainSettings.grad_clip
    """Largest norm of the gradient; null = no clipping."""
    precision: Precision = TrainSettings.precision
    """float32 | bf16: autocast to bfloat16; weights, statistics and optimiser stay float32."""
    channels_last: bool = TrainSettings.channels_last
    """Images and weights in NHWC memory order: often faster on a GPU."""
    checkpoint_every: PositiveInt = TrainSettings.checkpoint_every
    """Epochs between checkpoints."""

    @model_validator(mode="after")
    def _warm_up_ends(self) -> TrainConfig:
        problem = warmup_problem(self.epochs or 0, self.warmup_epochs or 0.0)
        if problem is not None:
            refuse(BrokenRule(("warmup_epochs",), problem))
        return self


class BootstrappingConfig(Section):
    """Soft labels for the narrower sub-networks from a teacher (arXiv 2103.13258, section 3.3;
    arXiv 2109.10060)."""

    mode: BootstrapMode | None = None
    """Older setting for the teacher: none | inplace_distillation | ib | ieb; null = from
    supernet.regime."""
    num_random: NonNegativeInt | None = None
    """Older setting for supernet.train.num_random; null = from supernet.regime."""
    ema_decay: FractionBelowOne = BootstrapSettings.ema_decay
    """Decay of the EMA copy per step, [0, 1)."""
    ema_warmup: bool = BootstrapSettings.ema_warmup
    """Increase the decay as min(ema_decay, (1 + t) / (10 + t)), which short trainings need; false
    as in the paper."""
    soft_ramp_epochs: NonNegativeFloat = BootstrapSettings.soft_ramp_epochs
    """Epochs over which soft labels replace the true ones; 0 = from the start, as in the paper."""
    trust: Trust = BootstrapSettings.trust
    """Weight of the soft label in an image's target. full: 1, as in the paper | label_probability:
    the probability that the teacher gives to the label."""
    largest_first: FractionBelowOne = BootstrapSettings.largest_first
    """Share of the steps, [0, 1), at the beginning in which only the largest sub-network is
    trained."""
    teacher_min_updates: NonNegativeInt = BootstrapSettings.teacher_min_updates
    """Minimum number of updates of the teacher's BatchNorm statistics; with fewer, the teacher uses
    batch statistics."""


class RecalibrationConfig(Section):
    """BatchNorm statistics, re-estimated for every width after training."""

    images: RecalibrationImages = FROM_DATA
    """Images of `train` to use: a number | null = all | auto = from the data. 0 keeps the
    statistics of supernet.init_from, and needs 0 epochs."""
    batch_size: PositiveInt = RecalibrationSettings.batch_size
    """Images per forward pass."""


class SupernetConfig(Section):
    """The supernet, which contains all sub-networks, and its training."""

    model: Text
    """Architecture family, or a plain network: a registered name, or an import path
    package.module:function; or checkpoint: layout and sub-networks of `init_from`."""
    options: dict[str, JsonValue] = Field(default_factory=dict)
    """Options of the family, which checks them: width, stem_stride, num_routes, ..."""
    init_from: Text | None = SupernetSettings.init_from
    """Start weights: a checkpoint, a run folder, what `python -m dsnet.training` wrote, or the
    state dict of a plain network; `~` and $VARIABLES are expanded."""
    structure: StructureConfig = StructureConfig()
    regime: RegimeName | None = None
    """Training regime (widths, teacher, views and normalisation): ce | s_net | us_net | sp_net |
    ib | ieb | mvco; null = in-place bootstrapping (ib)."""
    workers: PositiveInt = 1
    """Workers that train the supernet; several are workers of Ray Train."""
    threads: NumThreads | None = None
    """Torch threads per worker; null = cores // workers."""
    device: Device = "auto"
    """auto | cpu | cuda; auto = cuda if available."""
    train: TrainConfig = TrainConfig()
    bootstrapping: BootstrappingConfig = BootstrappingConfig()
    weights: KeptWeights = SupernetSettings.weights
    """Weights that are measured, used for the routing tables, and exported."""
    recalibration: RecalibrationConfig = RecalibrationConfig()
    keep_checkpoints: PositiveInt = SupernetSettings.keep_checkpoints
    """Training checkpoints kept on disk."""

    @model_validator(mode="after")
    def _can_start_and_train(self) -> SupernetConfig:
        refuse(*_batch_problems(self), *_number_problems(self), *_regime_problems(self), *_start_problems(self))
        return self


def _batch_problems(supernet: SupernetConfig) -> Iterator[BrokenRule]:
    train = supernet.train
    if train.batch_size is None:
        return
    problem = sharing_problem(train.batch_size, supernet.workers, train.accumulate)
    if problem is not None:
        yield BrokenRule(("train", "batch_size"), problem, others=(("train", "accumulate"), ("workers",)))


def _start_problems(supernet: SupernetConfig) -> Iterator[BrokenRule]:
    """Errors: settings that need a checkpoint to start from, or that are allowed only with one."""
    if supernet.init_from is None:
        if supernet.model == CHECKPOINT_MODEL:
            yield BrokenRule(
                ("model",),
                "checkpoint takes the network from supernet.init_from, which is not set; set it, or name a model",
            )
        if supernet.train.epochs == 0:
            message = (
                "0 keeps the weights of supernet.init_from, which is not set; name a checkpoint, or train 1 or more"
            )
            yield BrokenRule(("train", "epochs"), message)
    if supernet.model == CHECKPOINT_MODEL and supernet.options:
        message = f"model checkpoint takes no options: the checkpoint has its own; remove {', '.join(supernet.options)}"
        yield BrokenRule(("options",), message)
    if supernet.model == CHECKPOINT_MODEL and supernet.structure.is_chosen:
        message = (
            f"{supernet.structure.method} chooses sub-networks, but model checkpoint has its own; name the network itself "
            "and keep init_from, or remove supernet.structure"
        )
        yield BrokenRule(("structure", "method"), message, others=(("model",),))
    epochs = supernet.train.epochs
    if supernet.recalibration.images == 0 and epochs != 0:
        training = "training outdates" if epochs is None else f"{plural(epochs, 'epoch')} of training outdate"
        message = f"0 keeps the statistics of supernet.init_from, but {training} them; write supernet.train.epochs 0, or auto here"
        yield BrokenRule(("recalibration", "images"), message)


def _regime_problems(supernet: SupernetConfig) -> Iterator[BrokenRule]:
    """Errors: names that contradict the regime, and an ensemble without random sub-networks."""
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
    problem = ensemble_problem(parts["widths"], parts["teacher"], parts["num_random"])
    if problem is not None:
        section = "bootstrapping" if supernet.train.num_random is None and bootstrapping.num_random == 0 else "train"
        yield BrokenRule((section, "num_random"), problem)
    problem = views_problem(parts["views"], parts["teacher"])
    if problem is not None:
        yield BrokenRule(("train", "views"), problem, others=(("train", "teacher"), ("regime",)))


def _number_problems(supernet: SupernetConfig) -> Iterator[BrokenRule]:
    """Errors: the number of random sub-networks, written under both of its names with two
    values."""
    newer, older = supernet.train.num_random, supernet.bootstrapping.num_random
    if None not in (newer, older) and newer != older:
        message = f"{older} contradicts supernet.train.num_random {newer}, the newer name of this setting; remove one of the two"
        yield BrokenRule(("bootstrapping", "num_random"), message)


def _regime_parts(supernet: SupernetConfig) -> dict[str, Any]:
    """The fields of the resolved regime."""
    train, bootstrapping = supernet.train, supernet.bootstrapping
    parts = asdict(REGIMES[supernet.regime or "ib"])
    if supernet.regime is None:
        teacher = None if bootstrapping.mode is None else TEACHER_OF_MODE[bootstrapping.mode]
        parts |= _given(teacher=teacher, num_random=bootstrapping.num_random)
    parts |= _given(
        widths=train.widths, num_random=train.num_random, teacher=train.teacher, norm=train.bn, views=train.views
    )
    if parts["widths"] == "all":
        parts["num_random"] = 0  # nothing is drawn, whatever was written: one regime, one stage key
    return parts


def _given(**settings: Any) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


REGIME_KEYS = frozenset({"widths", "num_random", "teacher", "bn", "views"})
"""Settings below `supernet.train` that are part of a regime; the core takes them resolved."""


def resolve_regime(supernet: SupernetConfig) -> Regime:
    """The sub-networks that a step trains and their teacher.

    In order of precedence: supernet.train.{widths, num_random, teacher, views, bn},
    supernet.regime, supernet.bootstrapping.{mode, num_random}, ib.
    """
    return Regime(**_regime_parts(supernet))


class SupernetsConfig(Section):
    """Choice and training of several supernets; used only if `space` has supernet.* keys."""

    number: PositiveInt = 4
    """Number of distinct supernets; fewer if the space has fewer."""
    sampler: Literal["random", "grid", "qmc"] = "qmc"
    """random | grid | qmc: sampler of the supernet.* parameters; all supernets are drawn before
    training."""
    scheduler: Text = "asha"
    """none | asha | median | hyperband, or the import path of a Ray Tune scheduler: early stopping
    of the worse supernets."""
    options: dict[str, JsonValue] = Field(default_factory=dict)
    """Keyword arguments of the scheduler; of asha grace_period, reduction_factor, ... in epochs."""
    concurrent: PositiveInt = 1
    """Supernets that train at the same time."""
    report_every: PositiveInt = 1
    """Epochs between two reports of the static hypervolume on `val`, on which the scheduler
    decides."""
