"""The configuration of `python -m dsnet.training`: plain JSON with the sections and names of
sweep.yaml, fully written out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dsnet.data.normalization import Normalization
from dsnet.data.settings import DataSettings, DescribedImages
from dsnet.dotted import flatten
from dsnet.errors import CheckpointError, ConfigError
from dsnet.files import read_json
from dsnet.measure.settings import LatencySettings, without_default_engines
from dsnet.settings import DEFAULT_SEED, Seed, SettingError, Settings
from dsnet.strict_json import read_strictly
from dsnet.structure.settings import StructureSettings, without_unread
from dsnet.training.settings import SupernetSettings, is_of_first_release, with_published
from dsnet.training.supernet_run import SupernetRun

VERSION = 1
_WITHOUT_EFFECT = ("data.path", "supernet.init_from", "supernet.keep_checkpoints", "supernet.train.checkpoint_every")


@dataclass(frozen=True, kw_only=True)
class StandaloneSupernet(SupernetSettings):
    """The section `supernet` with the choice of sub-networks."""

    structure: StructureSettings = field(default_factory=StructureSettings)


@dataclass(frozen=True, kw_only=True)
class StandaloneConfig(Settings):
    """Everything except the device that determines the results of `python -m dsnet.training`."""

    version: int = VERSION
    seed: Seed = DEFAULT_SEED
    """Seed of the splits and of training, as in sweep.yaml."""
    data: DataSettings
    supernet: StandaloneSupernet
    measure: LatencySettings = field(default_factory=LatencySettings)
    """Each `device` may be auto, cpu or cuda."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.version != VERSION:
            raise SettingError(f"version is {self.version}, but this release reads {VERSION}")

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
            balance=self.data.balance,
            weights=supernet.weights,
            recalibration_images=supernet.recalibration.images,
            recalibration_batch=supernet.recalibration.batch_size,
            keep_checkpoints=supernet.keep_checkpoints,
            origin=dict(origin or {}),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values that `from_json` turns back into an equal object."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self), allow_nan=False))
        if not self.supernet.structure.is_chosen:
            del plain["supernet"]["structure"]
        else:
            plain["supernet"]["structure"] = without_unread(plain["supernet"]["structure"])
        if self.data.normalization is None:
            del plain["data"]["normalization"]
        plain["measure"] = without_default_engines(plain["measure"])
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
        keys = [key for key in {**mine, **theirs} if not key.startswith(_WITHOUT_EFFECT)]
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
        data = read_json(path)
    except CheckpointError as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error})") from error
    try:
        return StandaloneConfig.from_json(data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
