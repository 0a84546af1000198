"""Defaults that depend on the data: they are filled in after the data are read, with reasons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import ValidationError

from dsnet.data.settings import Augmentation
from dsnet.data.sources import ImageSource
from dsnet.data.splits import Splits
from dsnet.errors import ConfigError
from dsnet.image_size import image_size_of, shorter_side
from dsnet.space.cost import subnet_cost
from dsnet.space.subnet_set import SubnetSet
from dsnet.training.data_defaults import DERIVED_KEYS, RECALIBRATION, DataDefault, DataFacts, data_defaults
from orchestration.config.space import is_of_supernet, rule_texts, supernet_with
from orchestration.config.supernet import FROM_DATA
from orchestration.config.sweep import SweepConfig

AUGMENT = "data.augment."


@dataclass(frozen=True)
class Derived:
    """A configuration with all defaults filled in, and the defaults that came from the data."""

    config: SweepConfig
    defaults: Mapping[str, DataDefault]
    """Value and reason by dotted key. `data.augment.crop_padding` and `flip` are listed if the file
    leaves them open, but stay null in `config`, because the augmentation itself derives them."""


def data_facts(image_set: ImageSource, splits: Splits, subnets: SubnetSet, is_pretrained: bool = False) -> DataFacts:
    """The facts about the data, the network and its start weights on which the defaults depend."""
    channels, size = image_set.image_shape[0], image_size_of(image_set.image_shape)
    num_classes = len(image_set.class_names)
    counts = np.bincount(image_set.labels.numpy()[splits.train], minlength=num_classes)
    return DataFacts(
        num_train=len(splits.train),
        num_classes=num_classes,
        smallest_class=int(counts.min()),
        image_size=size,
        channels=channels,
        can_mirror=Augmentation.for_images(image_set).flip,
        madds_m=subnet_cost(subnets.spec, subnets.largest, size).madds / 1e6,
        is_pretrained=is_pretrained,
    )


def with_data_defaults(
    config: SweepConfig, image_set: ImageSource, splits: Splits, subnets: SubnetSet, is_pretrained: bool = False
) -> Derived:
    """Fill in the settings that the configuration leaves to the data.

    Args:
        config: the configuration.
        image_set: the images.
        splits: their splits.
        subnets: the network.
        is_pretrained: whether training starts from the weights of a trained plain network.

    Raises:
        ConfigError: a derived default contradicts a setting that was written.
    """
    facts = data_facts(image_set, splits, subnets, is_pretrained)
    found = data_defaults(facts, subnets.spec.family, _written(config))
    supernet = {key: default.value for key, default in found.items() if is_of_supernet(key)}
    augment = {key.removeprefix(AUGMENT): each.value for key, each in found.items() if key.startswith(AUGMENT)}
    data = config.data.model_copy(update={"augment": config.data.augment.model_copy(update=augment)})
    try:
        filled = config.model_copy(update={"data": data, "supernet": supernet_with(config.supernet, supernet)})
    except ValidationError as error:
        reasons = "; ".join(f"{key} {found[key].value} follows from the data" for key in supernet)
        raise ConfigError(f"{'; '.join(rule_texts(error))} ({reasons}); write other values in the file") from error
    return Derived(filled, {**found, **_of_the_augmentation(config, image_set)})


def _written(config: SweepConfig) -> dict[str, Any]:
    """The written values among the settings that are derived from the data or that influence
    them."""
    written = {}
    for key in (*DERIVED_KEYS, "supernet.train.accumulate", "supernet.train.optimizer"):
        value: Any = config
        for name in key.split("."):
            value = getattr(value, name)
        is_open = value == FROM_DATA if key == RECALIBRATION else value is None
        if not is_open:
            written[key] = value
    return written


def _of_the_augmentation(config: SweepConfig, image_set: ImageSource) -> dict[str, DataDefault]:
    """The values of `data.augment.crop_padding` and `flip` where they are null."""
    written = config.data.augment
    if written.crop_scale is not None or config.data.stream:
        return {}
    made = Augmentation.for_images(image_set)
    size = image_size_of(image_set.image_shape)
    side = "" if isinstance(size, int) else "the shorter side, "
    found = {}
    if written.crop_padding is None:
        found[f"{AUGMENT}crop_padding"] = DataDefault(
            made.crop_padding, f"an eighth of {side}{shorter_side(size)} pixels"
        )
    if written.flip is None:
        reason = "mirroring does not change the class" if made.flip else "a mirrored digit is not a digit"
        found[f"{AUGMENT}flip"] = DataDefault(made.flip, reason)
    return found
