"""Pruning of several base networks: SP-Net (docs/methods.md, section 9)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING

from dsnet.errors import ConfigError
from dsnet.import_path import is_model_path
from dsnet.space.spec import Subnet
from dsnet.space.subnet_set import SubnetSet
from dsnet.space.width_space import ROUNDING
from dsnet.structure.method import (
    TOLERANCE,
    Base,
    Choice,
    Search,
    StructureMethod,
    StructureProblem,
    Target,
    Trained,
    Widths,
    check_common,
    check_different,
    check_statistics,
    has_batch_norm,
    is_sortable,
    missed,
    shortened,
)
from dsnet.structure.methods import register
from dsnet.structure.methods.uniform import Ladder
from dsnet.structure.settings import BN_GAMMA, MULTI_BASE
from dsnet.training.settings import REGIMES

if TYPE_CHECKING:
    from dsnet.network.supernet import Supernet
    from dsnet.structure.pruning_scores import Scores


@register
class MultiBase(StructureMethod):
    """Prunes a network of its own for every target; only the numbers of channels leave it."""

    name = MULTI_BASE
    description = "SP-Net: a base network per target, pruned by one threshold for the scores of all its channels."

    def check(self, problem: StructureProblem) -> None:
        """See `StructureMethod.check`."""
        check_common(problem)
        check_statistics(problem, None)
        _check_norms(problem)
        if is_model_path(problem.settings.score):
            from dsnet.structure.pruning_scores import score_function

            score_function(problem.settings.score)
        for base, target in _pairs(problem):
            _check_target(problem, base, target)

    def member_names(self, problem: StructureProblem) -> tuple[str, ...]:
        """The targets' names."""
        return tuple(target.name for target in problem.targets)

    def bases(self, problem: StructureProblem) -> tuple[Base, ...]:
        """A network with one sub-network for every base width, from the narrowest to the widest."""
        spec = problem.spec
        gamma_l1 = problem.settings.bases.gamma_l1 if has_batch_norm(problem) else 0.0
        run = replace(
            problem.run,
            train=replace(shortened(problem), gamma_l1=gamma_l1),
            regime=replace(REGIMES["ce"], norm=problem.run.regime.norm),
        )
        return tuple(
            Base(_name(share), SubnetSet(spec, (Subnet(f"{share:g}", widths),)), run, follows=False)
            for share, widths in _base_widths(problem)
        )

    def num_candidates(self, problem: StructureProblem) -> int:
        """None: pruning reads weights."""
        return 0

    def passes(self, problem: StructureProblem) -> tuple[tuple[str, Subnet], ...]:
        """The score of the settings for every base."""
        return tuple((problem.settings.score, base.subnets.largest) for base in self.bases(problem))

    def find(self, problem: StructureProblem, start: Supernet, trained: Trained) -> Search:
        """Prune every base to its targets; the channels get the order of the widest base's scores,
        unless the settings name another order."""
        from dsnet.structure.order import orders_by, with_ids
        from dsnet.structure.pruning_scores import pruning_scores

        settings = problem.settings
        scores: dict[float, Scores] = {}
        members: list[Subnet] = []
        notes: list[str] = []
        for share, _ in _base_widths(problem):
            network = trained.network(_name(share))
            scores[share] = pruning_scores(network, settings.score, problem.seed, trained.batches())
        order = orders_by(start, scores[1.0]) if settings.order == "none" else None
        if order is not None:
            problem = replace(problem, subnets=with_ids(problem.subnets, start.spec, order))
        for (share, widths), target in _pairs(problem):
            listed = {group: values.tolist() for group, values in scores[share].items()}
            found = Pruning.of(problem, widths, listed).nearest(target)
            madds = problem.madds(found)
            members.append(Subnet(target.name, found))
            notes += missed(problem, target, madds)
            yield Choice(0, found, madds, target.name)
        check_different(problem, members)
        return replace(problem.found(members, notes), order=order)


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

    @classmethod
    def of(cls, problem: StructureProblem, widths: Widths, scores: Mapping[int, Sequence[float]]) -> Pruning:
        """The sub-networks of a base.

        Args:
            problem: the problem.
            widths: the base's width of every channel group.
            scores: for channel groups the scores of the base's channels; equal scores are ranked by
                the number of the group and then of the channel.

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
        return cls(problem, widths, tuple(group for _, group, _ in ranked))

    def kept(self, number: int) -> Widths:
        """The widths where the `number` channels with the highest scores are above the
        threshold."""
        scored, above = set(self.ranking), self.ranking[:number]
        share = Fraction(number, len(self.ranking))
        return tuple(
            nearest_width(self.problem, group, width, above.count(group) if group in scored else share * width)
            for group, width in enumerate(self.widths)
        )

    def nearest(self, target: Target) -> Widths:
        """The widths whose MAdds are nearest to a target; of two that are equally near, the
        smaller."""
        low, high = 0, len(self.ranking)
        while low < high:  # the fewest channels with at least the target's MAdds, or all
            middle = (low + high) // 2
            if self.problem.madds(self.kept(middle)) >= target.madds:
                high = middle
            else:
                low = middle + 1
        tried = [self.kept(number) for number in (low - 1, low) if number >= 0]
        return min(tried, key=lambda widths: abs(self.problem.madds(widths) - target.madds))


def nearest_width(problem: StructureProblem, group: int, width: int, count: int | Fraction) -> int:
    """The possible width of a channel group of a base that is nearest to a number of channels.

    Args:
        problem: the problem.
        group: the number of the channel group.
        width: its width in the base.
        count: channels above the threshold, 0 to `width`.
    """
    if group in problem.fixed or problem.spec.groups[group].is_kernel:
        return width
    step = problem.settings.step
    wanted = max(Fraction(count), Fraction(math.ceil(problem.settings.min_share * width - ROUNDING)))
    return min((*range(step, width, step), width), key=lambda each: (abs(each - wanted), -each))


def _name(share: float) -> str:
    """The name of a base."""
    return f"base_{share:g}"


def _base_widths(problem: StructureProblem) -> Iterator[tuple[float, Widths]]:
    """The share of every base, from the narrowest on, and its width of every channel group."""
    ladder = Ladder(problem)
    for share in sorted(problem.settings.bases.widths):
        yield share, ladder.widths(Fraction(share))


def _pairs(problem: StructureProblem) -> list[tuple[tuple[float, Widths], Target]]:
    """Every target with the base that is pruned for it: the smallest with the narrowest."""
    bases, targets = list(_base_widths(problem)), problem.targets
    return list(zip(bases * len(targets) if len(bases) == 1 else bases, targets, strict=True))


def _check_norms(problem: StructureProblem) -> None:
    """Check that channels can be scored and sorted.

    Raises:
        ConfigError: they cannot.
    """
    if not is_sortable(problem):
        raise ConfigError(
            f"supernet.structure.method {MULTI_BASE} sorts channels, but this network has GroupNorm, which normalises neighbouring "
            "channels together, so that another order would compute something else: use another supernet.train.bn"
        )
    if problem.settings.score == BN_GAMMA and not has_batch_norm(problem):
        raise ConfigError(
            f"supernet.structure.score is {BN_GAMMA}, but this network has no BatchNorm: use weight_l1, taylor or noise"
        )


def _check_target(problem: StructureProblem, base: tuple[float, Widths], target: Target) -> None:
    """Check that a target lies between the smallest sub-network of its base and the whole base.

    Raises:
        ConfigError: it does not, by more than the tolerance.
    """
    share, widths = base
    smallest = tuple(nearest_width(problem, group, width, 0) for group, width in enumerate(widths))
    low, high = problem.madds(smallest), problem.madds(widths)
    if low * (1 - TOLERANCE) <= target.madds <= high * (1 + TOLERANCE):
        return
    setting = "targets" if problem.settings.targets else "targets_m"
    way = (
        "a wider base in supernet.structure.bases.widths, or a smaller target"
        if target.madds > high
        else "a narrower base in supernet.structure.bases.widths, a larger target, or a lower min_share or step"
    )
    raise ConfigError(
        f"supernet.structure.{setting}: {target.name} is {target.madds / 1e6:.4g} M MAdds, but the base of width {share:g}, from "
        f"which it is pruned, has {low / 1e6:.4g} to {high / 1e6:.4g} M: use {way}"
    )
