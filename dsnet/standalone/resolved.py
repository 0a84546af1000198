"""The configuration of `python -m dsnet.training`: plain JSON with the sections and names of
sweep.yaml, fully written out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dsnet.data import Augmentation, Normalization, SplitSizes
from dsnet.data.augment import DescribedImages
from dsnet.dotted import flatten
from dsnet.errors import ConfigError
from dsnet.measure.latency import DEVICES, LatencySettings
from dsnet.strict_json import check_known, read_strictly
from dsnet.training.settings import (
    BootstrapSettings,
    Regime,
    SupernetRun,
    TrainSettings,
    check_recalibration,
    is_of_first_release,
    with_published,
)

VERSION = 1
_HOUSEKEEPING = ("data.path", "supernet.init_from", "supernet.keep_checkpoints", "supernet.train.checkpoint_every")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The images and their splits."""

    name: str
    """A registered data set: digits, cifar10, image_folder, ..."""
    path: str | None = None
    """The data set's folder; null = the environment variable DSNET_DATA."""
    image_size: int | None = None
    """Height and width in pixels; null = the data's own size."""
    crop_fraction: float = 1.0
    """Image folders only: share of the shorter side that the centre crop keeps, (0, 1]."""
    splits: SplitSizes = field(default_factory=SplitSizes)
    limit: int | None = None
    """Maximum number of images per split; null = no limit."""
    augment: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `dsnet.data.Augmentation`; fields that are null or absent take the data set's
    defaults."""
    stream: bool = False
    """Image folders only: stream `train` from its files during training."""

    def __post_init__(self) -> None:
        check_known(self.augment, Augmentation.__dataclass_fields__, "data.augment")
        read_strictly(Augmentation, self._given(), "data.augment")

    def _given(self) -> dict[str, Any]:
        return {name: value for name, value in self.augment.items() if value is not None}

    def augmentation(self, images: DescribedImages) -> Augmentation:
        """The augmentation, with the defaults for the data set filled in."""
        return Augmentation.for_images(images, **self._given())


@dataclass(frozen=True, kw_only=True)
class RecalibrationSettings:
    """Settings of BatchNorm recalibration after training."""

    images: int | None = None
    """Number of images of `train`; null = all; 0 = keep the statistics of the start weights."""
    batch_size: int = 256
    """Images per batch."""

    def __post_init__(self) -> None:
        check_recalibration(self.images, self.batch_size)


@dataclass(frozen=True, kw_only=True)
class SupernetSettings:
    """The network and its training."""

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
    weights: str = "ema"
    recalibration: RecalibrationSettings = field(default_factory=RecalibrationSettings)
    keep_checkpoints: int = 2


@dataclass(frozen=True, kw_only=True)
class StandaloneConfig:
    """Everything except the device that determines the results of `python -m dsnet.training`."""

    version: int = VERSION
    seed: int = 0
    """Seed of the splits and of training, as in sweep.yaml."""
    data: DataSettings
    supernet: SupernetSettings
    measure: LatencySettings = field(default_factory=LatencySettings)
    """Each `device` may be auto, cpu or cuda."""

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise ConfigError(f"version is {self.version}, but this release reads {VERSION}")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}, but must be at least 0")
        named = {f"devices.{name}.device": own.device for name, own in self.measure.devices.items()}
        for key, device in {"device": self.measure.device, **named}.items():
            if device not in DEVICES:
                raise ConfigError(f"measure.{key} is {device!r}; known: {', '.join(DEVICES)}")

    def supernet_run(
        self, images: DescribedImages, normalization: Normalization, origin: Mapping[str, Any] | None = None
    ) -> SupernetRun:
        """The training settings for given data and start weights.

        Args:
            images: the data, for the defaults of its augmentation.
            normalization: normalisation of the training split, or of the start weights.
            origin: record of the start weights.

        Raises:
            ConfigError: a setting is out of its range.
        """
        supernet = self.supernet
        return SupernetRun(
            train=supernet.train,
            regime=supernet.regime,
            bootstrapping=supernet.bootstrapping,
            augmentation=self.data.augmentation(images),
            normalization=normalization,
            seed=self.seed,
            weights=supernet.weights,
            recalibration_images=supernet.recalibration.images,
            recalibration_batch=supernet.recalibration.batch_size,
            keep_checkpoints=supernet.keep_checkpoints,
            origin=dict(origin or {}),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values that `from_json` turns back into an equal object."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self), allow_nan=False))
        return plain

    @classmethod
    def from_json(cls, data: object) -> StandaloneConfig:
        """Read a configuration written by hand or by `to_json` of this or the first release.

        Raises:
            ConfigError: a key is unknown or missing, or a value has the wrong type or range.
        """
        return read_strictly(cls, _with_published(data))

    def changes(self, earlier: StandaloneConfig) -> list[str]:
        """The dotted keys that differ and affect results; the places of data and checkpoints do
        not."""
        mine, theirs = (
            {key: value for key, value in flatten(config.to_json()).items() if value != {}}
            for config in (self, earlier)
        )
        keys = [key for key in {**mine, **theirs} if not key.startswith(_HOUSEKEEPING)]
        return sorted(key for key in keys if mine.get(key) != theirs.get(key))


def _with_published(data: object) -> object:
    """Complete a file of the first release: newer settings get the values by which it trained;
    other files are unchanged."""
    supernet = data.get("supernet") if isinstance(data, Mapping) else None
    written = supernet.get("bootstrapping") if isinstance(supernet, Mapping) else None
    if not isinstance(written, Mapping) or not is_of_first_release(written):
        return data
    return {**data, "supernet": {**supernet, "bootstrapping": with_published(written)}}  # type: ignore[dict-item]


def read_config(path: Path) -> StandaloneConfig:
    """Read a configuration file.

    Raises:
        ConfigError: the file is missing, is not JSON, or its content is invalid.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error})") from error
    try:
        return StandaloneConfig.from_json(data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
