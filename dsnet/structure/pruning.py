"""Pruning by one threshold for the scores of all channels of a network. It needs no torch."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from dsnet.errors import ConfigError
from dsnet.space.width_space import ROUNDING
from dsnet.structure.method import StructureProblem, Target, Widths


@dataclass(frozen=True)
class Pruning:
    """All sub-networks that one threshold for the scores of all channels can give.

    A channel group has as many channels as have a score above the threshold, but at least its
    floor, rounded to the nearest possible width: a multiple of the step, or all channels of the
    base; the wider one in the middle between two. A group without scores has the share of its
    channels that the others have on the whole. MAdds rise with the number of channels that are
    kept.
    """

    problem: StructureProblem
    widths: Widths
    """The base's width of every channel group."""
    ranking: tuple[int, ...]
    """The channel group of every scored channel, from the highest score to the lowest."""
    left: Widths
    """The width of every channel group that earlier prunings of the base have left."""

    @classmethod
    def of(
        cls,
        problem: StructureProblem,
        widths: Widths,
        scores: Mapping[int, Sequence[float]],
        left: Widths | None = None,
    ) -> Pruning:
        """The sub-networks of a base.

        Args:
            problem: the problem.
            widths: the base's width of every channel group.
            scores: for channel groups the scores of the channels that are left; equal scores are
                ranked by the number of the group and then of the channel.
            left: the width of every channel group that earlier prunings have left, one that they
                can give; None: the base's.

        Raises:
            ConfigError: no channel that can be removed has a score.
        """
        ranked = sorted(
            (-score, group, channel)
            for group, values in scores.items()
            if group not in problem.fixed
            for channel, score in enumerate(values)
        )
        if not ranked:
            raise ConfigError(
                f"supernet.structure.score {problem.settings.score}: no channel that can be removed has a score; use another score"
            )
        return cls(problem, widths, tuple(group for _, group, _ in ranked), widths if left is None else left)

    def kept(self, number: int) -> Widths:
        """The widths where the `number` channels with the highest scores are above the
        threshold."""
        scored, above = set(self.ranking), self.ranking[:number]
        share = Fraction(number, sum(self.widths[group] for group in scored))
        return tuple(
            min(
                left,
                nearest_width(self.problem, group, width, above.count(group) if group in scored else share * width),
            )
            for group, (width, left) in enumerate(zip(self.widths, self.left, strict=True))
        )

    def nearest(self, target: Target, taken: Collection[Widths] = ()) -> Widths:
        """The widths whose MAdds are nearest to a target; of two that are equally near, the
        smaller.

        Args:
            target: the target.
            taken: widths of members for larger targets. In place of one of them come the next
                smaller ones, if there are any.
        """
        numbers = range(len(self.ranking))
        # The fewest channels with at least the target's MAdds, or all.
        low = bisect_left(numbers, target.madds, key=lambda number: self.problem.madds(self.kept(number)))
        tried = [self.kept(number) for number in (low - 1, low) if number >= 0]
        found = min(tried, key=lambda widths: abs(self.problem.madds(widths) - target.madds))
        while found in taken and low > 0:
            low -= 1
            found = self.kept(low)
        return found


def nearest_width(problem: StructureProblem, group: int, width: int, count: int | Fraction) -> int:
    """The possible width of a channel group of a base that is nearest to a number of channels.

    Args:
        problem: the problem.
        group: the number of the channel group.
        width: its width in the base.
        count: channels above the threshold, 0 to `width`.
    """
    own = problem.spec.groups[group]
    if group in problem.fixed or own.is_size:
        return width
    step = own.step(problem.settings.step)
    wanted = max(Fraction(count), Fraction(math.ceil(problem.settings.min_share * width - ROUNDING)))
    below = step * (wanted // step)
    near = own.choices or (below, below + step)
    possible = (each for each in near if (own.choices or step <= each) and each < width)
    return min((*possible, width), key=lambda each: (abs(each - wanted), -each))
