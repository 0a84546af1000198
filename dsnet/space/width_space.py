"""Every width that a sub-network may have, without a list of sub-networks: the space of universally
slimmable training and of searches for structures (docs/methods.md, section 7). Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dsnet.space.spec import ChannelGroup, SupernetSpec

ROUNDING = 1e-9
"""Rounding error of a share times a width, relative to the step, that does not count."""


@dataclass(frozen=True)
class WidthSpace:
    """The possible widths of every channel group, chosen independently: multiples of `step` from
    `min_share` of the group upwards, and the whole group.

    A group that is pinned keeps all channels. The size of a kernel changes by two pixels, whatever
    `step` and `levels` are. Heads and blocks are counted one by one. A group with choices has those
    of them that are large enough.
    """

    min_share: float
    """Smallest share of a group's channels, above 0 and at most 1."""
    step: int
    """Widths are multiples of this, at least 1; the width of a whole group need not be."""
    levels: int | None = None
    """Largest number of widths of one group: a wide group has, from its smallest width on, the
    smallest multiple of `step` that gives no more; None: every group has `step`."""

    def __post_init__(self) -> None:
        if not 0 < self.min_share <= 1:
            raise ValueError(f"min_share is {self.min_share!r}, but must be above 0 and at most 1")
        if isinstance(self.step, bool) or not isinstance(self.step, int) or self.step < 1:
            raise ValueError(f"step is {self.step!r}, but must be a whole number of at least 1")
        is_whole = isinstance(self.levels, int) and not isinstance(self.levels, bool)
        if self.levels is not None and not (is_whole and self.levels >= 1):
            raise ValueError(f"levels is {self.levels!r}, but must be a whole number of at least 1, or None")

    def to_json(self) -> dict[str, Any]:
        """A JSON-able mapping of the fields, without `levels` where it is None, so that records
        made before that field stay valid."""
        data = asdict(self)
        return data if self.levels is not None else {name: data[name] for name in ("min_share", "step")}

    def options(self, spec: SupernetSpec) -> tuple[tuple[int, ...], ...]:
        """For every channel group its possible widths, in increasing order; the last is all of
        it."""
        return tuple(self._of(group) for group in spec.groups)

    def _of(self, group: ChannelGroup) -> tuple[int, ...]:
        if group.is_fixed:
            return (group.max_width,)
        smallest = max(1, math.ceil(self.min_share * group.max_width - ROUNDING))
        if group.choices:
            return self._thinned([choice for choice in group.choices if choice >= smallest])
        if group.kind == "kernel":
            return tuple(size for size in range(smallest, group.max_width + 1) if (group.max_width - size) % 2 == 0)
        own_step = group.step(self.step)
        lowest = max(own_step, math.ceil(self.min_share * group.max_width / own_step - ROUNDING) * own_step)
        step, most = own_step, self.levels
        options = (*range(lowest, group.max_width, step), group.max_width)
        while most is not None and len(options) > max(most, 2):
            step += own_step
            options = (*range(lowest, group.max_width, step), group.max_width)
        return options[-1:] if most == 1 else options

    def _thinned(self, choices: Sequence[int]) -> tuple[int, ...]:
        """Choices of which no more than `levels` are left: every n-th, counted from the largest."""
        if self.levels == 1:
            return tuple(choices[-1:])
        every = 1 if self.levels is None else math.ceil(len(choices) / max(self.levels, 2))
        return tuple(reversed(choices[::-1][::every]))

    def smallest(self, spec: SupernetSpec) -> tuple[int, ...]:
        """The smallest width of every channel group."""
        return tuple(options[0] for options in self.options(spec))

    def draw(self, below: Callable[[int], int], spec: SupernetSpec) -> tuple[int, ...]:
        """Draw one width for every channel group, each of its options equally likely.

        Args:
            below: a function n -> a random whole number in 0..n - 1; it is called once for every
                group with several options, in the groups' order.
            spec: the supernet.
        """
        return tuple(options[below(len(options))] if len(options) > 1 else options[0] for options in self.options(spec))
