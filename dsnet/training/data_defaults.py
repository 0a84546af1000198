"""Defaults of Stage I as a function of the training data; each comes with a reason."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from dsnet.image_size import ImageSize, shorter_side

MIN_BATCH, MAX_BATCH = 32, 128
"""Bounds of the default batch size, powers of two."""
MIN_STEPS_PER_EPOCH = 32
"""The batch is halved, down to `MIN_BATCH`, until an epoch has this many steps."""
MIN_BATCHES = 2
"""For tiny sets the batch is reduced below `MIN_BATCH` until an epoch has this many steps."""
MIN_STEPS = 3000
"""Smallest total number of steps; short trainings get more epochs to reach it."""
USUAL_EPOCHS = 30
"""Default number of epochs, unless it gives too few steps or takes too long."""
MIN_EPOCHS, MAX_EPOCHS = 10, 200
SENSIBLE_CPU_MINUTES = 30.0
"""Estimated minutes on two cores above which a training gets fewer than `USUAL_EPOCHS`, but at
least `MIN_EPOCHS` and `MIN_STEPS`."""
CPU_GMADDS_PER_S = 25.0
"""Training speed on two cores: MAdds of the widest sub-network's forward pass, in 10^9 per second,
that sandwich steps process."""
CPU_GMADDS_PER_S_OF_FAMILY: Mapping[str, float] = MappingProxyType(
    {"ds_mbnet": 3.0, "ds_tiny": 3.0, "ds_vit": 12.0, "mobilenet_v1": 3.0, "mobilenet_v2": 3.0}
)
"""The same for families that are slower: depthwise convolutions train about eight times slower per
MAdd on a CPU, and small vision transformers, with their norms, activations and softmax, about
twice."""
LR = 0.08
"""Peak learning rate of SGD at batch size `LR_BATCH`; it grows with the square root of the batch
size."""
ADAMW_LR = 0.0005
"""The same for AdamW."""
PRETRAINED_SHARE = 0.25
"""Learning rate for the weights of a trained plain network, as a share of that for fresh ones,
which would undo much of their training (benchmarks/RESULTS.md, pretrained)."""
LR_BATCH = 32
DECAY = 0.7
"""Product of SGD's weight decay, peak learning rate and steps: it fixes the share of a training
over which weights decay (arXiv
2405.13698)."""
MIN_DECAY, MAX_DECAY = 1e-4, 0.01
"""Bounds of SGD's weight decay; the lower one is the published value, for 400,000 steps
(docs/methods.md, section 3)."""
ADAMW_DECAY = 1e-4
WARMUP_SHARE = 0.05
"""Epochs of warm-up as a share of all epochs."""
RECALIBRATION_IMAGES = 4000
"""Default number of recalibration images; with more, means and variances of BatchNorm hardly
change."""
RANDAUGMENT_OPS = 0
"""RandAugment operations for natural images: those of at least `RANDAUGMENT_SIDE` pixels that may
be mirrored."""
RANDAUGMENT_SIDE = 32

EPOCHS = "supernet.train.epochs"
BATCH_SIZE = "supernet.train.batch_size"
RATE = "supernet.train.lr"
WARMUP = "supernet.train.warmup_epochs"
WEIGHT_DECAY = "supernet.train.weight_decay"
RECALIBRATION = "supernet.recalibration.images"
RANDAUGMENT = "data.augment.randaugment_ops"
DERIVED_KEYS = (BATCH_SIZE, EPOCHS, WARMUP, RATE, WEIGHT_DECAY, RECALIBRATION, RANDAUGMENT)
"""The settings that `data_defaults` gives, by their keys in sweep.yaml."""


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """Facts about the training data and the network on which the defaults depend."""

    num_train: int
    """Images of the training split, at least 1."""
    num_classes: int
    smallest_class: int
    """Training images of the rarest class."""
    image_size: ImageSize
    """Size of the images."""
    channels: int
    can_mirror: bool
    """Whether a mirrored image belongs to the same class."""
    madds_m: float
    """MAdds of one image through the widest sub-network, in millions."""
    is_pretrained: bool = False
    """Whether training starts from the weights of a trained plain network."""


@dataclass(frozen=True)
class DataDefault:
    """The default of one setting and the reason for its value."""

    value: Any
    reason: str
    """The reason as a phrase without a full stop."""


def data_defaults(facts: DataFacts, family: str, given: Mapping[str, Any] | None = None) -> dict[str, DataDefault]:
    """The defaults of the `DERIVED_KEYS` that are not given; each depends on the given settings and
    on earlier defaults.

    Args:
        facts: facts about the training data.
        family: the network's registered family; an unknown one is treated as dense.
        given: dotted key of sweep.yaml -> value that the user set. Beside `DERIVED_KEYS` it may
            hold `supernet.train.accumulate` and `supernet.train.optimizer`.

    Returns:
        dotted key -> default.
    """
    found: dict[str, DataDefault] = {}
    known = dict(given or {})

    def settle(key: str, default: DataDefault) -> None:
        if key not in known:
            found[key] = default
            known[key] = default.value

    settle(BATCH_SIZE, _batch(facts, known.get("supernet.train.accumulate", 1)))
    steps = max(1, facts.num_train // min(known[BATCH_SIZE], facts.num_train))
    settle(EPOCHS, _epochs(facts, family, steps, known.get(WARMUP, 0.0)))
    settle(WARMUP, _warmup(known[EPOCHS]))
    optimizer = known.get("supernet.train.optimizer", "sgd")
    settle(RATE, _rate(known[BATCH_SIZE], optimizer, facts.is_pretrained))
    settle(WEIGHT_DECAY, _weight_decay(known[RATE], steps * known[EPOCHS], optimizer))
    settle(RECALIBRATION, _recalibration(facts))
    settle(RANDAUGMENT, _randaugment(facts))
    return found


def _batch(facts: DataFacts, accumulate: int) -> DataDefault:
    num_train = facts.num_train
    batch = _power_of_two(num_train / MIN_STEPS_PER_EPOCH, MIN_BATCH, MAX_BATCH)
    reason = f"{_number(num_train, 'image')} would give only {_number(num_train // MAX_BATCH, 'step')} an epoch at {MAX_BATCH}"
    if batch == MAX_BATCH:
        reason = f"{_number(num_train, 'image')} give {_number(num_train // batch, 'step')} an epoch"
    if batch * MIN_BATCHES > num_train:
        batch = _power_of_two(num_train / MIN_BATCHES, 2, MAX_BATCH)
        reason = f"the largest power of two with {MIN_BATCHES} steps an epoch of {_number(num_train, 'training image')}"
    if batch % accumulate or batch < 2 * accumulate:
        batch = max(2, batch // accumulate) * accumulate
        reason += f"; rounded to a multiple of {accumulate} micro-batches"
    return DataDefault(batch, reason)


def _power_of_two(value: float, lowest: int, highest: int) -> int:
    """The largest power of two that is at most `value`, clipped to bounds that are powers of
    two."""
    return min(highest, max(lowest, 2 ** int(math.log2(max(1.0, value)))))


def _epochs(facts: DataFacts, family: str, steps_per_epoch: int, warmup: float) -> DataDefault:
    enough = math.ceil(MIN_STEPS / steps_per_epoch)
    speed = CPU_GMADDS_PER_S_OF_FAMILY.get(family, CPU_GMADDS_PER_S)
    minutes = facts.num_train * facts.madds_m / 1000 / speed / 60
    affordable = max(MIN_EPOCHS, int(SENSIBLE_CPU_MINUTES / max(minutes, 1e-9)))
    epochs = max(enough, min(USUAL_EPOCHS, affordable))
    if epochs > MAX_EPOCHS:
        epochs = MAX_EPOCHS
        reason = f"the largest default; {_number(steps_per_epoch, 'step')} an epoch, {steps_per_epoch * epochs:,} steps"
    elif epochs == enough and epochs > min(USUAL_EPOCHS, affordable):
        reason = f"for at least {MIN_STEPS:,} steps; an epoch has {steps_per_epoch:,}"
    elif epochs < USUAL_EPOCHS:
        reason = (
            f"{USUAL_EPOCHS} would take about {_duration(USUAL_EPOCHS * minutes)} on two CPU cores; set more for a GPU"
        )
    else:
        reason = f"the usual number; {_number(steps_per_epoch, 'step')} an epoch, {steps_per_epoch * epochs:,} steps"
    if warmup > epochs:
        epochs, reason = math.ceil(2 * warmup), f"twice the {warmup:g} epochs of warm-up that are set"
    return DataDefault(epochs, reason)


def _warmup(epochs: int) -> DataDefault:
    return DataDefault(round(WARMUP_SHARE * epochs, 2), f"{100 * WARMUP_SHARE:g} % of {_number(epochs, 'epoch')}")


def _rate(batch: int, optimizer: str, is_pretrained: bool) -> DataDefault:
    base, why = ADAMW_LR if optimizer == "adamw" else LR, ""
    if is_pretrained:
        base, why = (
            PRETRAINED_SHARE * base,
            f"; {base:g} for fresh weights, which would undo much of the training before",
        )
    rate = float(f"{base * math.sqrt(batch / LR_BATCH):.2g}")
    return DataDefault(rate, f"{base:g} at batch {LR_BATCH}, growing with the square root of the batch{why}")


def _weight_decay(rate: float, num_steps: int, optimizer: str) -> DataDefault:
    if optimizer == "adamw":
        return DataDefault(ADAMW_DECAY, "the usual value for adamw here")
    decay = DECAY / max(rate * num_steps, 1e-9)
    value = float(f"{min(MAX_DECAY, max(MIN_DECAY, decay)):.2g}")
    told = f"{DECAY:g} / (learning rate {rate:g} x {_number(num_steps, 'step')})"
    if not MIN_DECAY <= decay <= MAX_DECAY:
        told += f", within {MIN_DECAY:g} to {MAX_DECAY:g}"
    return DataDefault(value, f"{told}: short trainings on few images need more, against overfitting")


def _recalibration(facts: DataFacts) -> DataDefault:
    if facts.num_train <= RECALIBRATION_IMAGES:
        return DataDefault(None, f"all {_number(facts.num_train, 'training image')}")
    return DataDefault(
        RECALIBRATION_IMAGES, f"of {facts.num_train:,} training images; more would hardly change means and variances"
    )


def _randaugment(facts: DataFacts) -> DataDefault:
    is_natural = facts.can_mirror and shorter_side(facts.image_size) >= RANDAUGMENT_SIDE
    if not is_natural:
        return DataDefault(0, "the random crop is enough for small images and for those that must not be mirrored")
    if RANDAUGMENT_OPS == 0:
        return DataDefault(0, "random crops and mirroring are enough augmentation")
    return DataDefault(RANDAUGMENT_OPS, "in addition to random crops and mirroring")


def _duration(minutes: float) -> str:
    return f"{minutes:.0f} minutes" if minutes < 100 else f"{minutes / 60:,.0f} hours"


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "s")
