"""Settings of the choice of sub-networks. They need no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Gt, Lt

from dsnet.settings import (
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    SettingError,
    Settings,
    check_value,
)
from dsnet.wording import shown

DECLARED = "declared"
"""The method that keeps the sub-networks that the family declares."""
LIST = "list"
"""The method that takes the widths as written."""
BY_TARGETS = ("uniform", "greedy")
"""The methods of this package that make one sub-network per target."""

Order = Literal["none", "random", "weight_l1", "bn_gamma", "taylor", "noise"]
BY_IMAGES: tuple[Order, ...] = ("taylor", "noise")
"""The orders that need images with labels."""
Pin = Literal["none", "gate"]
StartWith = Literal["trained", "fresh"]
HoldOutShare = Annotated[float, Gt(0), Lt(1)]
WrittenWidths = Mapping[str, Any] | tuple[tuple[PositiveInt, ...], ...]
"""Widths of several sub-networks, one per channel group: by name, or in a list."""


@dataclass(frozen=True, kw_only=True)
class StructureSettings(Settings):
    """Where the sub-networks of a supernet come from (docs/methods.md, section 9)."""

    SECTION = "supernet.structure"

    method: str = DECLARED
    """`declared`: those of the family; `uniform`: one ratio for all channel groups; `list`: as
    written; `greedy`: AutoSlim's search; or the name of a registered method, or an import path
    `package.module:Class`."""
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
                "supernet.structure has targets and targets_m, which are alternatives to each other: "
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
        if self.method in (DECLARED, *BY_TARGETS) and self.widths is not None:
            yield (
                f"supernet.structure.widths is set, but method {self.method} does not read it: choose method list, or remove it"
            )
        self._check_widths()

    def _check_widths(self) -> None:
        """Check the widths that are given by name; those in a list are checked by their type."""
        if not isinstance(self.widths, Mapping):
            return
        for name, widths in self.widths.items():
            check_value("a name in supernet.structure.widths", name, str)
            check_value(f"supernet.structure.widths.{name}", widths, tuple[PositiveInt, ...])


def num_held_out(share: float, num_images: int) -> int:
    """Number of images of a training split that a share holds out."""
    return round(share * num_images)


def _repeated(name: str, values: Sequence[float]) -> Iterator[str]:
    if len(set(values)) < len(values):
        yield f"supernet.structure.{name} is {shown(list(values))}, in which a value stands twice: remove one of them"
