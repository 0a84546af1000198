"""The section `supernet.structure`: which sub-networks the supernet has, and the order of its
channels."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from dsnet.errors import ConfigError
from dsnet.import_path import is_model_path
from dsnet.settings import (
    FractionBelowOne,
    NonNegativeFloat,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    SettingError,
)
from dsnet.structure.methods import structure_method
from dsnet.structure.settings import (
    BasesSettings,
    HoldOutShare,
    Order,
    Pin,
    ProgressiveSettings,
    Ranking,
    StartWith,
    StructureSettings,
)
from orchestration.config.section import FROM_LIST, BrokenRule, Section, Text, refuse

Widths = Annotated[tuple[PositiveInt, ...], FROM_LIST]
PREFIX = f"{StructureSettings.SECTION}."


class BasesConfig(Section):
    """The networks that method multi_base trains and prunes."""

    widths: Annotated[tuple[PositiveFraction, ...], FROM_LIST] | None = BasesSettings.widths
    """Shares of the channels of every group: one per target, the narrowest for the smallest; or
    [1.0], from which all targets are pruned; null = such that each base has 1.5 times its target's
    MAdds, and all channels for the largest target."""
    gamma_l1: NonNegativeFloat = BasesSettings.gamma_l1
    """Price of the absolute scales of BatchNorm in the loss of these networks."""
    rounds: PositiveInt = BasesSettings.rounds
    """Prunings of each network on the way to its smallest target, with a training of epochs /
    rounds between two of them."""


class ProgressiveConfig(Section):
    """The parts of the search of method progressive, each of which can be left out."""

    ranking: Ranking = ProgressiveSettings.ranking
    """Importance of channels: noise, how little trainable noise they tolerate | weight_l1 |
    bn_gamma | taylor | random."""
    threshold: FractionBelowOne | None = ProgressiveSettings.threshold
    """Fall of the accuracy on the hold-out since the last fine-tuning, as a share of the images,
    above which the network is fine-tuned; 0 = after every loss; null = never."""
    tuning_epochs: PositiveInt = ProgressiveSettings.tuning_epochs
    """Epochs of one fine-tuning."""
    reselection: bool = ProgressiveSettings.reselection
    """Whether sub-networks near each member are tried in its place."""


class StructureConfig(Section):
    """Where the sub-networks of the supernet come from, before it is trained."""

    method: Text = StructureSettings.method
    """declared: those of the family | uniform: one ratio for all channel groups | list: as written
    in `widths` | greedy: AutoSlim's search | multi_base: SP-Net's pruning of a network per target |
    progressive: a search by the importance of channels, with fine-tuning; or the import path of a
    method."""
    targets: Annotated[tuple[PositiveFraction, ...], FROM_LIST] = StructureSettings.targets
    """MAdds of the sub-networks as shares of the widest's, for example [0.25, 0.5, 1.0]."""
    targets_m: Annotated[tuple[PositiveFloat, ...], FROM_LIST] = StructureSettings.targets_m
    """MAdds of the sub-networks in millions, instead of `targets`."""
    widths: dict[str, Widths] | Annotated[tuple[Widths, ...], FROM_LIST] | None = None
    """For list: NAME -> one width per channel group; or a list of such lists, which are named by
    their share of the MAdds."""
    order: Order = StructureSettings.order
    """Order of the channels before they are sliced: none | random | weight_l1 | bn_gamma | taylor |
    noise; an exact permutation."""
    step: PositiveInt = StructureSettings.step
    """Widths are multiples of this."""
    levels: PositiveInt | None = StructureSettings.levels
    """Largest number of widths of one channel group in a search; null = as many as `step` gives."""
    min_share: PositiveFraction = StructureSettings.min_share
    """Smallest share of a channel group that a sub-network has."""
    pin: Pin = StructureSettings.pin
    """none | gate: all sub-networks have all channels before the first gate, a shared trunk."""
    holdout: HoldOutShare = StructureSettings.holdout
    """Share of `train`, stratified, on which candidates are scored."""
    start: StartWith = StructureSettings.start
    """Weights with which joint training begins if the method trains a network: trained: those of
    that network | fresh."""
    epochs: PositiveInt | None = StructureSettings.epochs
    """Epochs of a network that is trained for the search; null = a fifth of supernet.train.epochs.
    """
    bases: BasesConfig = BasesConfig()
    """For multi_base: the networks that are pruned."""
    score: Text = StructureSettings.score
    """For multi_base: importance of channels. bn_gamma | weight_l1 | taylor | random | noise; or
    the import path package.module:function of a function."""
    progressive: ProgressiveConfig = ProgressiveConfig()
    """For progressive: the parts of the search."""
    concurrent: PositiveInt | None = Field(default=None)
    """Candidates that are scored at the same time; null = as many as there are cores. Networks of
    multi_base that are trained at the same time; null = one."""

    @model_validator(mode="after")
    def _fits_together(self) -> StructureConfig:
        if not is_model_path(self.method):
            try:
                structure_method(self.method)
            except ConfigError as error:
                refuse(BrokenRule(("method",), str(error).removeprefix(f"{PREFIX}method: ")))
        try:
            self.settings()
        except SettingError as error:
            refuse(_placed(str(error)))
        return self

    def settings(self) -> StructureSettings:
        """The settings as the core's own type.

        Raises:
            SettingError: they contradict each other.
        """
        sections = {
            "bases": BasesSettings(**self.bases.model_dump()),
            "progressive": ProgressiveSettings(**self.progressive.model_dump()),
        }
        return StructureSettings(**{**self.model_dump(exclude={"concurrent"}), **sections})

    @property
    def is_chosen(self) -> bool:
        """Whether a stage of its own chooses the sub-networks or sorts the channels."""
        return self.settings().is_chosen


def _placed(message: str) -> BrokenRule:
    """A message of the core as a broken rule at the setting with which it begins."""
    name = message.removeprefix(PREFIX).partition(" ")[0].partition(".")[0]
    is_field = message.startswith(PREFIX) and name in StructureConfig.model_fields
    return BrokenRule((name,) if is_field else ("method",), message)
