"""Settings of the choice of sub-networks. They need no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_args

from annotated_types import Gt, Lt

from dsnet.import_path import is_model_path
from dsnet.settings import (
    FractionBelowOne,
    NonNegativeFloat,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    SettingError,
    Settings,
    check_value,
)
from dsnet.wording import plural, shown, way_out

DECLARED = "declared"
"""The method that keeps the sub-networks that the family declares."""
LIST = "list"
"""The method that takes the widths as written."""
MULTI_BASE = "multi_base"
"""The method that prunes networks of several base widths."""
PROGRESSIVE = "progressive"
"""The method that removes channels by their importance, and fine-tunes on the way."""
BY_TARGETS = ("uniform", "greedy", MULTI_BASE, PROGRESSIVE)
"""The methods of this package that make one sub-network per target."""
OWN = frozenset((DECLARED, LIST, *BY_TARGETS))
"""The methods of this package."""

Order = Literal["none", "random", "weight_l1", "bn_gamma", "taylor", "noise"]
BY_IMAGES: tuple[Order, ...] = ("taylor", "noise")
"""The orders that need images with labels."""
BN_GAMMA = "bn_gamma"
Ranking = Literal["bn_gamma", "weight_l1", "taylor", "random", "noise"]
SCORES: tuple[str, ...] = get_args(Ranking)
"""The scores of channels by which `multi_base` prunes, beside functions of the user."""
Pin = Literal["none", "gate"]
StartWith = Literal["trained", "fresh"]
HoldOutShare = Annotated[float, Gt(0), Lt(1)]
WrittenWidths = Mapping[str, Any] | tuple[tuple[PositiveInt, ...], ...]
"""Widths of several sub-networks, one per channel group: by name, or in a list."""


@dataclass(frozen=True, kw_only=True)
class BasesSettings(Settings):
    """The networks that `multi_base` trains and prunes."""

    SECTION = "supernet.structure.bases"

    widths: tuple[PositiveFraction, ...] | None = None
    """Shares of the channels of every group: one for each target, of which the narrowest is for the
    smallest target; or 1.0 alone, from which all targets are pruned. None: for every target the
    narrowest base of hundredths with 1.5 times its MAdds, and all channels for the largest."""
    gamma_l1: NonNegativeFloat = 1e-5
    """Price of the absolute scales of BatchNorm in the loss of these networks; a network without
    BatchNorm has none."""
    rounds: PositiveInt = 1
    """Prunings of each of these networks on the way to its smallest target. After each but the last
    the network is trained on with the channels that are left, for the epochs of a network divided
    by this number, and its channels are scored anew."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.widths is None:
            return
        if len(set(self.widths)) < len(self.widths):
            raise SettingError(
                f"supernet.structure.bases.widths is {shown(list(self.widths))}, in which a width stands twice: remove one of them"
            )
        if 1.0 not in self.widths:
            raise SettingError(
                f"supernet.structure.bases.widths is {shown(list(self.widths))}, but must contain 1.0, the network by whose "
                "channels the supernet is sorted"
            )


@dataclass(frozen=True, kw_only=True)
class ProgressiveSettings(Settings):
    """The parts of the progressive search, each of which can be left out."""

    SECTION = "supernet.structure.progressive"

    ranking: Ranking = "noise"
    """How important a channel is: `noise`, how little trainable noise it tolerates; or `weight_l1`,
    `bn_gamma`, `taylor`, `random`."""
    threshold: FractionBelowOne | None = 0.05
    """Fall of the accuracy on the hold-out since the last fine-tuning, as a share of the images,
    [0, 1), above which the network is fine-tuned; 0: after every loss; None: never."""
    tuning_epochs: PositiveInt = 1
    """Epochs of one fine-tuning."""
    reselection: bool = True
    """Whether sub-networks near each member are tried in its place."""


@dataclass(frozen=True, kw_only=True)
class StructureSettings(Settings):
    """Where the sub-networks of a supernet come from (docs/methods.md, section 9)."""

    SECTION = "supernet.structure"

    method: str = DECLARED
    """`declared`: those of the family; `uniform`: one ratio for all channel groups; `list`: as
    written; `greedy`: AutoSlim's search; `multi_base`: SP-Net's pruning; `progressive`: a search by
    the importance of channels, with fine-tuning; or the name of a registered method, or an import
    path `package.module:Class`."""
    targets: tuple[PositiveFraction, ...] = ()
    """MAdds of the sub-networks as shares of the widest's, (0, 1]."""
    targets_m: tuple[PositiveFloat, ...] = ()
    """MAdds of the sub-networks in millions, instead of `targets`."""
    widths: WrittenWidths | None = None
    """For `list`: a width for every channel group, for each sub-network by its name; or a list of
    such lists, named by their share of the widest's MAdds."""
    order: Order = "none"
    """Order of the channels, from the most important one: `none` keeps it; `random`; `weight_l1`,
    the sum of the absolute weights of the filters that write a channel; `bn_gamma`, the absolute
    scale of the norms on it; `taylor`, the absolute product of weight and gradient; `noise`, how
    little noise on these filters it tolerates."""
    step: PositiveInt = 8
    """Widths are multiples of this; the width of a whole channel group need not be."""
    levels: PositiveInt | None = 10
    """Largest number of widths of one channel group in a search: a wide group has a multiple of
    `step`; AutoSlim divides a layer into 10 groups of channels. None: every group has `step`."""
    min_share: PositiveFraction = 0.1
    """Smallest share of a channel group that a sub-network has."""
    pin: Pin = "none"
    """`gate`: all sub-networks have all channels of the groups before the first gate, so that they
    share what is before it."""
    holdout: HoldOutShare = 0.1
    """Share of the images of `train`, stratified, on which candidates are scored and on which the
    networks that are trained for the search do not train."""
    start: StartWith = "trained"
    """Weights with which joint training begins where the method trains a network: `trained`, those
    of that network; `fresh`, those that training would have begun with without a search."""
    epochs: PositiveInt | None = None
    """Epochs of a network that is trained for the search; None: a fifth of the supernet's, at
    least 1 (ours)."""

    bases: BasesSettings = field(default_factory=BasesSettings)
    """For `multi_base`: the networks that are pruned."""
    score: str = BN_GAMMA
    """For `multi_base`: how important a channel is: `bn_gamma`, `weight_l1`, `taylor`, `random`,
    `noise`, or the import path `package.module:function` of a function of the user."""
    progressive: ProgressiveSettings = field(default_factory=ProgressiveSettings)
    """For `progressive`: the parts of the search."""

    @property
    def is_chosen(self) -> bool:
        """Whether sub-networks are chosen or channels sorted, so that the family's own set does not
        stay as it is."""
        return self.method != DECLARED or self.order != "none"

    def num_held_out(self, num_images: int) -> int:
        """Number of images of a training split that are held out."""
        return num_held_out(self.holdout, num_images)

    def __post_init__(self) -> None:
        super().__post_init__()
        for problem in self._problems():
            raise SettingError(problem)

    def _problems(self) -> Iterator[str]:
        """Problems between the settings, as whole messages."""
        has_targets = bool(self.targets or self.targets_m)
        if self.targets and self.targets_m:
            yield (
                "supernet.structure.targets_m is set beside targets, and they are alternatives to each other: "
                "remove one of them (targets are shares of the widest's MAdds, targets_m are millions of MAdds)"
            )
        for name in ("targets", "targets_m"):
            yield from _repeated(name, getattr(self, name))
        if self.method in BY_TARGETS and not has_targets:
            yield (
                f"supernet.structure.method is {self.method}, which makes one sub-network per target, but there is none: "
                "set supernet.structure.targets, such as [0.25, 0.5, 1.0], or targets_m"
            )
        if self.method in (DECLARED, LIST) and has_targets:
            yield (
                f"supernet.structure.{'targets' if self.targets else 'targets_m'} is set, but method {self.method} reads no targets: "
                f"choose a method that does ({', '.join(BY_TARGETS)}), or remove them"
            )
        if self.method == LIST and not self.widths:
            yield (
                "supernet.structure.method is list, but there are no widths: set supernet.structure.widths to the widths of "
                "every sub-network, one per channel group"
            )
        if self.method in OWN - {LIST} and self.widths is not None:
            yield (
                f"supernet.structure.widths is set, but method {self.method} does not read it: choose method list, or remove it"
            )
        yield from self._pruning_problems(len(self.targets or self.targets_m))
        self._check_widths()

    def _pruning_problems(self, num_targets: int) -> Iterator[str]:
        """Problems of the settings that `multi_base` reads."""
        if self.score not in SCORES and not is_model_path(self.score):
            yield f"supernet.structure.score is {self.score!r}{way_out(self.score, SCORES)}; or an import path package.module:function"
        num_bases = None if self.bases.widths is None else len(self.bases.widths)
        if self.method == MULTI_BASE and num_bases not in (None, 1, num_targets):
            yield (
                f"supernet.structure.bases.widths has {num_bases} widths for {plural(num_targets, 'target')}: give as many widths "
                "as targets, or [1.0] to prune all of them from one network"
            )

    def unread(self, methods: Collection[str]) -> Iterator[tuple[str, str]]:
        """Settings with another value than their default that none of some methods reads: the name
        of each, and the method that reads it. Methods of the user may read everything.

        Args:
            methods: names of the methods with which the settings are used.
        """
        if not set(methods) <= OWN:
            return
        for name, (reader, default) in _ADDED.items():
            if reader not in methods and getattr(self, name) != default:
                yield name, reader

    def _check_widths(self) -> None:
        """Check the widths that are given by name; those in a list are checked by their type."""
        if not isinstance(self.widths, Mapping):
            return
        for name, widths in self.widths.items():
            check_value("a name in supernet.structure.widths", name, str)
            check_value(f"supernet.structure.widths.{name}", widths, tuple[PositiveInt, ...])


_ADDED: Mapping[str, tuple[str, Any]] = MappingProxyType(
    {
        "bases": (MULTI_BASE, BasesSettings()),
        "score": (MULTI_BASE, BN_GAMMA),
        "progressive": (PROGRESSIVE, ProgressiveSettings()),
    }
)
"""Settings that only one method of this package and methods of the user read: the method, and the
default."""


def without_unread(structure: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as plain values without those that the method does not read, so that records and
    keys of other methods stay valid.

    Args:
        structure: all settings; lists and tuples are the same.
    """
    method = structure["method"]
    return {
        name: value
        for name, value in structure.items()
        if name not in _ADDED
        or method == _ADDED[name][0]
        or (method not in OWN and _plain(value) != _plain(_ADDED[name][1]))
    }


def _plain(value: Any) -> Any:
    """Settings as a mapping in which lists are tuples; other values as they are."""
    if not isinstance(value, Mapping | Settings):
        return value
    fields = value if isinstance(value, Mapping) else asdict(value)  # type: ignore[call-overload] # a dataclass
    return {name: tuple(each) if isinstance(each, list) else each for name, each in fields.items()}


def num_held_out(share: float, num_images: int) -> int:
    """Number of images of a training split that a share holds out."""
    return round(share * num_images)


def _repeated(name: str, values: Sequence[float]) -> Iterator[str]:
    if len(set(values)) < len(values):
        yield f"supernet.structure.{name} is {shown(list(values))}, in which a value stands twice: remove one of them"
