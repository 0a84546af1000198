"""Pruning of several base networks: SP-Net (docs/methods.md, section 9)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING

from dsnet.errors import ConfigError
from dsnet.import_path import is_model_path
from dsnet.space.spec import Subnet
from dsnet.space.subnet_set import SubnetSet
from dsnet.structure.method import (
    TOLERANCE,
    Base,
    Choice,
    Search,
    StructureMethod,
    StructureProblem,
    Target,
    Trained,
    Trainings,
    Widths,
    check_common,
    check_different,
    check_statistics,
    is_sortable,
    missed,
    shortened,
)
from dsnet.structure.methods import register
from dsnet.structure.methods.uniform import Ladder
from dsnet.structure.pruning import nearest_width
from dsnet.structure.settings import BN_GAMMA, MULTI_BASE
from dsnet.training.settings import REGIMES

if TYPE_CHECKING:
    from dsnet.network.supernet import Supernet
    from dsnet.structure.pruning_rounds import PrunedBase
    from dsnet.training.supernet_run import SupernetRun

HEADROOM = 1.5
"""MAdds of a base relative to those of its target, where the settings name no widths, so that
pruning has something to remove."""


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
        gamma_l1 = problem.settings.bases.gamma_l1 if problem.spec.has_batch_norm else 0.0
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

    def later(self, problem: StructureProblem) -> tuple[Base, ...]:
        """The trainings between the rounds of pruning, for widths of one ratio."""
        ladder, spec = Ladder(problem), problem.spec
        return tuple(
            replace(
                base,
                name=_round_name(base.name, number),
                subnets=SubnetSet(spec, (Subnet(base.name, ladder.nearest(target)),)),
                run=_run_between(base.run, problem.settings.bases.rounds),
            )
            for base in self.bases(problem)
            for number, target in _ways(problem)[base.name].items()
        )

    def passes(self, problem: StructureProblem) -> tuple[tuple[str, Subnet], ...]:
        """The score of the settings for every base, and for what every round leaves of it."""
        scored = (*self.bases(problem), *self.later(problem))
        return tuple((problem.settings.score, base.subnets.largest) for base in scored)

    def find(self, problem: StructureProblem, start: Supernet, trained: Trained) -> Search:
        """Prune every base to its targets; the channels get the order of the widest base's scores,
        unless the settings name another order."""
        from dsnet.structure.order import with_ids
        from dsnet.structure.pruning_rounds import PrunedBase

        bases, pairs = self.bases(problem), _pairs(problem)
        pruned = {base.name: PrunedBase(problem, base, trained.network(base.name), trained.batches()) for base in bases}
        for number in range(1, problem.settings.bases.rounds):
            yield from _round(problem, number, {base.name: (base.run, pruned[base.name]) for base in bases}, trained)
        members: list[Subnet] = []
        notes: list[str] = []
        order = pruned[_name(1.0)].order if problem.settings.order == "none" else None
        if order is not None:
            problem = replace(problem, subnets=with_ids(problem.subnets, start.spec, order))
        for (share, _), target in reversed(pairs):
            number, found = pruned[_name(share)].member(target, problem, [member.widths for member in members])
            madds = problem.madds(found)
            members.insert(0, Subnet(target.name, found))
            notes += missed(problem, target, madds)
            yield Choice(number, found, madds, target.name)
        check_different(problem, members)
        return replace(problem.found(members, notes), order=order)


def _round(
    problem: StructureProblem, number: int, bases: Mapping[str, tuple[SupernetRun, PrunedBase]], trained: Trained
) -> Iterator[Choice | Trainings]:
    """One round: prune every base that still has a way to go, train what is left of them side by
    side, and score it."""
    ways, trainings = _ways(problem), {}
    for name, (run, base) in bases.items():
        if number in ways[name]:
            between = _run_between(run, problem.settings.bases.rounds)
            trainings[name] = base.prune(ways[name][number], _round_name(name, number), between)
            yield Choice(number, base.left, problem.madds(base.left))
    if trainings:
        yield Trainings(tuple(trainings.values()))
    for name, training in trainings.items():
        bases[name][1].trained(trained.network(training.base.name), trained.batches())


def _name(share: float) -> str:
    """The name of a base."""
    return f"base_{share:g}"


def _round_name(base: str, number: int) -> str:
    """The name of the training after a round of pruning of a base."""
    return f"{base}_round_{number}"


def _run_between(run: SupernetRun, rounds: int) -> SupernetRun:
    """The training between two rounds: that of a base for a part of its epochs, with its warm-up in
    proportion."""
    epochs = max(1, round(run.train.epochs / rounds))
    warmup = run.train.warmup_epochs * epochs / run.train.epochs
    return replace(run, train=replace(run.train, epochs=epochs, warmup_epochs=warmup))


def _ways(problem: StructureProblem) -> dict[str, dict[int, Target]]:
    """For every base by its name the MAdds that are left after each round but the last: a geometric
    sequence from the base to the smallest of its targets; none where no target is smaller than the
    base."""
    rounds = problem.settings.bases.rounds
    ways: dict[str, dict[int, Target]] = {}
    for (share, widths), target in reversed(_pairs(problem)):  # the last one of a base is its smallest target
        whole = problem.madds(widths)
        left = {number: whole * (target.madds / whole) ** (number / rounds) for number in range(1, rounds)}
        is_smaller = target.madds < whole
        ways[_name(share)] = {n: Target(f"{target.name}/{n}", madds) for n, madds in left.items() if is_smaller}
    return ways


def _bases_of_targets(problem: StructureProblem) -> list[tuple[float, Widths]]:
    """For every target, from the smallest on, the share of its base and the base's width of every
    channel group."""
    ladder, wanted, targets = Ladder(problem), problem.settings.bases.widths, problem.targets
    if wanted is None:
        shares = [*(_roomy_share(problem, ladder, target) for target in targets[:-1]), 1.0]
    else:
        shares = sorted(wanted) if len(wanted) > 1 else [*wanted] * len(targets)
    return [(share, ladder.widths(Fraction(share))) for share in shares]


def _roomy_share(problem: StructureProblem, ladder: Ladder, target: Target) -> float:
    """The smallest share, in hundredths, at which a base has `HEADROOM` times a target's MAdds, or
    1."""
    shares = [Fraction(hundredths, 100) for hundredths in range(1, 101)]
    place = bisect_left(shares[:-1], HEADROOM * target.madds, key=lambda share: problem.madds(ladder.widths(share)))
    return float(shares[place])


def _base_widths(problem: StructureProblem) -> Iterator[tuple[float, Widths]]:
    """The share of every base, from the narrowest on, and its width of every channel group."""
    yield from dict(_bases_of_targets(problem)).items()


def _pairs(problem: StructureProblem) -> list[tuple[tuple[float, Widths], Target]]:
    """Every target with the base that is pruned for it."""
    return list(zip(_bases_of_targets(problem), problem.targets, strict=True))


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
    if problem.settings.score == BN_GAMMA and not problem.spec.has_batch_norm:
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
