"""The resolved settings of one training of a supernet, and their conversion to and from JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any

from dsnet.data.normalization import Normalization
from dsnet.data.settings import Augmentation, Balance, DataSettings
from dsnet.errors import ConfigError
from dsnet.settings import DEFAULT_SEED, NonNegativeInt, PositiveInt, Seed, SettingError, Settings
from dsnet.space.width_space import WidthSpace
from dsnet.training.settings import (
    BootstrapSettings,
    KeptWeights,
    RecalibrationSettings,
    Regime,
    SupernetSettings,
    TrainSettings,
    with_published,
    without_added,
    without_published,
)


@dataclass(frozen=True, kw_only=True)
class SupernetRun(Settings):
    """Everything beside architecture and data that determines a supernet's weights."""

    SECTION = "supernet"
    KEYS = MappingProxyType(
        {
            "seed": "seed",
            "balance": "data.balance",
            "recalibration_images": "supernet.recalibration.images",
            "recalibration_batch": "supernet.recalibration.batch_size",
        }
    )

    train: TrainSettings = field(default_factory=TrainSettings)
    regime: Regime = field(default_factory=Regime)
    bootstrapping: BootstrapSettings = field(default_factory=BootstrapSettings)
    augmentation: Augmentation
    normalization: Normalization
    seed: Seed = DEFAULT_SEED
    balance: Balance = DataSettings.balance
    """Weights or sampling for uneven classes; see `dsnet.training.balance`."""
    weights: KeptWeights = SupernetSettings.weights
    recalibration_images: NonNegativeInt | None = RecalibrationSettings.images
    """Images of the training split for BatchNorm recalibration; None takes all; 0 does not
    recalibrate."""
    recalibration_batch: PositiveInt = RecalibrationSettings.batch_size
    """Images per batch of recalibration."""
    keep_checkpoints: PositiveInt = SupernetSettings.keep_checkpoints
    width_space: WidthSpace | None = None
    """The sandwich's random sub-networks have any widths of this space, and its smallest has the
    smallest ones; None: they are declared sub-networks."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """Record of the start weights: the checkpoint's file name and SHA-256; empty for fresh
    weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width_space is not None and self.regime.widths != "sandwich":
            raise SettingError(
                f"supernet.train.widths is {self.regime.widths}, but only the sandwich draws widths from a width_space"
            )

    def to_json(self) -> dict[str, Any]:
        """A JSON-able mapping, saved with every checkpoint, that `from_json` turns back into an
        equal object."""
        data = {**asdict(self), "regime": self.regime.to_json()}
        del data["width_space"]
        if self.width_space is not None:
            data["width_space"] = self.width_space.to_json()
        if self.balance == DataSettings.balance:  # as in records from before this setting
            del data["balance"]
        data["train"] = without_added(data["train"])
        return {**data, "bootstrapping": without_published(data["bootstrapping"])}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SupernetRun:
        """Rebuild settings from the result of `to_json`.

        Raises:
            ConfigError: a field is unknown, missing or out of its range.
        """
        space = data.get("width_space")
        try:
            return cls(
                **{
                    **data,
                    "width_space": None if space is None else WidthSpace(**space),
                    "train": TrainSettings(**data["train"]),
                    "regime": Regime(**data["regime"]),
                    "bootstrapping": BootstrapSettings(**with_published(data["bootstrapping"])),
                    "augmentation": Augmentation(**data["augmentation"]),
                    "normalization": Normalization.from_json(data["normalization"]),
                }
            )
        except SettingError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"these are not the settings of a supernet's training: {error}") from error
