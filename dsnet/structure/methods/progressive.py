"""Progressive search of sub-networks (arXiv 2009.05681), a reconstruction.

Published are the ideas: channels are ranked by trainable noise and removed in groups; the network
is fine-tuned when a removal costs more than a threshold; at the end dominated sub-networks are
dropped, and others are searched for near each target; the result is a chain of sub-networks, each
of which contains the next. The rules are ours: see docs/methods.md, section 9.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, islice, permutations, product
from typing import TYPE_CHECKING, TypeVar

from dsnet.errors import ConfigError
from dsnet.seeds import derive_seed
from dsnet.space.spec import Subnet, SupernetSpec
from dsnet.space.subnet_set import SubnetSet
from dsnet.space.width_space import ROUNDING
from dsnet.structure.method import (
    LARGEST,
    Base,
    Candidate,
    Choice,
    Score,
    ScoredBy,
    Search,
    StructureMethod,
    StructureProblem,
    Target,
    Trained,
    Training,
    Trainings,
    Widths,
    candidate,
    is_sortable,
    missed,
    shortened,
)
from dsnet.structure.methods import register
from dsnet.structure.methods.uniform import Ladder
from dsnet.structure.settings import BN_GAMMA, BY_IMAGES, PROGRESSIVE
from dsnet.structure.way import check_way, last_places, norm_of_search, num_steps, place_of, step_down, us_net
from dsnet.training.settings import Regime

if TYPE_CHECKING:
    from dsnet.network.supernet import Supernet
    from dsnet.structure.order import Orders

NEAR = 0.02
"""A member's MAdds differ from its target's by at most this share of it, if the steps of the
network's widths allow it."""
EXCHANGES = 8
"""Exchanges of channels that are tried in one round of the re-selection of a member."""
ROUNDS = 4
"""Rounds of the re-selection of a member, at most."""
SMALLEST = 1e-12
"""Smallest importance of a group, so that its logarithm is finite."""
EXPECTED_LOSS = 0.1
"""For estimates: the falls of accuracy that fine-tunings make up for, all together."""
PRUNED = "pruned"
"""In a fine-tuning the name of the sub-network that has lost too much."""

_Result = TypeVar("_Result")
_Part = Generator[Sequence[Candidate] | Choice | Trainings | ScoredBy, Sequence[Score], _Result]
"""A part of a search; see `dsnet.structure.method.Search`."""


@register
class Progressive(StructureMethod):
    """Removes the channels of least importance, fine-tunes on the way, and searches near the
    targets."""

    name = PROGRESSIVE
    description = (
        "Reconstruction of a progressive search: from the widest, remove the least important channels, and fine-tune "
        "whenever too much accuracy is lost."
    )

    def check(self, problem: StructureProblem) -> None:
        """See `StructureMethod.check`."""
        check_way(problem, _options(problem))
        if problem.settings.progressive.ranking == BN_GAMMA and not problem.spec.has_batch_norm:
            raise ConfigError(
                f"supernet.structure.progressive.ranking is {BN_GAMMA}, but this network has no BatchNorm: use noise, weight_l1 "
                "or taylor"
            )

    def member_names(self, problem: StructureProblem) -> tuple[str, ...]:
        """The targets' names."""
        return tuple(target.name for target in problem.targets)

    def bases(self, problem: StructureProblem) -> tuple[Base, ...]:
        """A universally slimmable network over every width that the search may choose."""
        sizes = {number for number, group in enumerate(problem.spec.groups) if group.is_size}
        return (us_net(problem, problem.fixed | sizes),)

    def num_candidates(self, problem: StructureProblem) -> int:
        """The sub-networks of the way, again those that a fine-tuned network scores, one for each
        target that the way misses, and the exchanges of the re-selection."""
        settings, steps = problem.settings.progressive, num_steps(_options(problem))
        tuned = 0 if settings.threshold is None else 2 * steps + 1
        per_target = 1 + (ROUNDS * EXCHANGES if settings.reselection else 0)
        return 1 + steps + tuned + per_target * len(problem.targets)

    def later(self, problem: StructureProblem) -> tuple[Base, ...]:
        """About as many fine-tunings as make up for `EXPECTED_LOSS`, of uniform sub-networks."""
        threshold, (base,) = problem.settings.progressive.threshold, self.bases(problem)
        if threshold is None:
            return ()
        steps, ladder = num_steps(_options(problem)), Ladder(problem)
        number = min(steps, round(EXPECTED_LOSS / threshold)) if threshold else steps
        smallest, whole = problem.targets[0].madds, problem.madds(problem.widest)
        sizes = [whole - (whole - smallest) * place / number for place in range(1, number + 1)]
        return tuple(
            _tuning(problem, base.subnets.spec, place, ladder.nearest(Target("", size)))
            for place, size in enumerate(sizes, start=1)
        )

    def passes(self, problem: StructureProblem) -> tuple[tuple[str, Subnet], ...]:
        """The ranking of the channels."""
        return ((problem.settings.progressive.ranking, Subnet(LARGEST, problem.widest)),)

    def find(self, problem: StructureProblem, start: Supernet, trained: Trained) -> Search:
        """Rank the channels, walk down from the widest, choose a member for every target, and try
        others near it."""
        ranking, order, network = _ranked(problem, start, trained)
        problem = ranking.problem
        if order is not None:
            yield ScoredBy(network)
        scoring = _Scoring(problem, trained, network)
        descent = _Descent(problem, _options(problem), ranking, scoring)
        way, places = yield from descent.walk()
        members = yield from descent.members(way, places)
        members = yield from descent.fitted(members)
        if problem.settings.progressive.reselection:
            members = yield from descent.reselected(members)
        targets = tuple(reversed(problem.targets))
        found: list[Subnet] = []
        notes: list[str] = []
        for target, widths in sorted(zip(targets, members, strict=True), key=lambda pair: pair[0].madds):
            madds = problem.madds(widths)
            yield Choice(scoring.round, widths, madds, target.name)
            found.append(Subnet(target.name, widths))
            notes += _missed(problem, target, madds)
        return replace(problem.found(found, notes), order=order, network=scoring.network)


def _options(problem: StructureProblem) -> tuple[Widths, ...]:
    """The possible widths of every channel group; kernels and depths, whose pixels and blocks have
    no importance, keep their size."""
    options = problem.options(problem.settings.levels)
    return tuple(
        widths[-1:] if group.is_size else widths for group, widths in zip(problem.spec.groups, options, strict=True)
    )


@dataclass(frozen=True)
class Ranking:
    """The importance of all channels, by their places in the network of the search."""

    problem: StructureProblem
    """Its MAdds are those of the network of the search."""
    importances: tuple[tuple[float, ...], ...]
    """For every channel group that of each channel, at least 0."""

    @classmethod
    def of(cls, problem: StructureProblem, scores: Mapping[int, Sequence[float]]) -> Ranking:
        """The ranking by scores; a channel of a group without scores has the mean of all others'.

        Args:
            problem: the problem.
            scores: for channel groups by number the importance of every channel.
        """
        known = [score for values in scores.values() for score in values]
        mean = sum(known) / len(known) if known else 1.0
        groups = problem.spec.groups
        return cls(
            problem, tuple(tuple(scores.get(number, [mean] * each.max_width)) for number, each in enumerate(groups))
        )

    def between(self, group: int, low: int, high: int) -> float:
        """Loss of a group from one width to a smaller one: the logarithm of the ratio of its
        importance at both. Summed over all groups, it is that of the product of their shares."""
        kept, whole = sum(self.importances[group][:low]), sum(self.importances[group][:high])
        return math.log(max(whole, SMALLEST) / max(kept, SMALLEST))

    def next(self, options: Sequence[Widths], widths: Widths) -> Widths | None:
        """The sub-network with one step of channels less, in the group that loses the least per
        MAdds that are saved, in the lower group if equal; None if all groups have their smallest
        width."""
        whole, found = self.problem.madds(widths), []
        for group in range(len(options)):
            if (smaller := step_down(options, widths, group)) is not None:
                lost = self.between(group, smaller[group], widths[group])
                found.append((lost / max(1, whole - self.problem.madds(smaller)), group, smaller))
        return min(found)[2] if found else None

    def exchanges(
        self, options: Sequence[Widths], widths: Widths, smallest: Widths, largest: Widths
    ) -> Iterator[Widths]:
        """The sub-networks in which one group gives channels and another one takes some, from the
        least loss on the whole: one step of the one, and as many of the other as
        come nearest to it in MAdds, each counted alone.

        Args:
            options: the possible widths of every channel group.
            widths: the present widths.
            smallest: the smallest width of every group.
            largest: the largest width of every group.
        """
        fewer = [
            self._changes(widths, group, [width for width in reversed(possible) if low <= width < own])
            for group, (possible, own, low) in enumerate(zip(options, widths, smallest, strict=True))
        ]
        more = [
            self._changes(widths, group, [width for width in possible if own < width <= high])
            for group, (possible, own, high) in enumerate(zip(options, widths, largest, strict=True))
        ]
        found = []
        for giver, taker in permutations(range(len(widths)), 2):
            for given, taken in _balanced(fewer[giver], more[taker]):
                lost = self.between(giver, given, widths[giver]) - self.between(taker, widths[taker], taken)
                found.append((lost, giver, taker, given, taken))
        for _, giver, taker, given, taken in sorted(found):
            changed = {giver: given, taker: taken}
            yield tuple(changed.get(group, width) for group, width in enumerate(widths))

    def _changes(self, widths: Widths, group: int, others: Sequence[int]) -> list[tuple[int, int]]:
        """Other widths of one group, each with the MAdds by which the sub-network differs then."""
        whole = self.problem.madds(widths)
        return [
            (width, abs(whole - self.problem.madds((*widths[:group], width, *widths[group + 1 :])))) for width in others
        ]


def _balanced(fewer: Sequence[tuple[int, int]], more: Sequence[tuple[int, int]]) -> set[tuple[int, int]]:
    """Pairs of widths, one of the giver and one of the taker: the first of the one with the nearest
    in MAdds of the other; each width comes with its difference in MAdds, the nearest width
    first."""
    if not fewer or not more:
        return set()

    def nearest(changes: Sequence[tuple[int, int]], madds: int) -> int:
        return min(changes, key=lambda change: abs(change[1] - madds))[0]

    return {(fewer[0][0], nearest(more, fewer[0][1])), (nearest(fewer, more[0][1]), more[0][0])}


@dataclass(eq=False)
class _Scoring:
    """The network that scores candidates, with the scores that it has given."""

    problem: StructureProblem
    trained: Trained
    network: Supernet
    round: int = 0
    """The number of the round of candidates."""
    num_tunings: int = 0
    _known: dict[Widths, Score] = field(default_factory=dict)

    def scores(self, wanted: Sequence[Widths]) -> _Part[list[Score]]:
        """The scores of sub-networks by the present network; none is scored twice."""
        missing = [widths for widths in dict.fromkeys(wanted) if widths not in self._known]
        if missing:
            given = yield [candidate(self.problem, self.round, widths) for widths in missing]
            self._known |= zip(missing, given, strict=True)
        return [self._known[widths] for widths in wanted]

    def tune(self, widths: Widths) -> _Part[None]:
        """Fine-tune the network for a sub-network; it scores from then on."""
        from dsnet.structure.order import transfer

        self.num_tunings += 1
        base = _tuning(self.problem, self.network.spec, self.num_tunings, widths)
        yield Trainings((Training(base, transfer(self.network, base.subnets)),))
        self.network = self.trained.network(base.name)
        self._known.clear()
        yield ScoredBy(self.network)


@dataclass(frozen=True, eq=False)
class _Descent:
    """The parts of the search, one after another."""

    problem: StructureProblem
    options: Sequence[Widths]
    ranking: Ranking
    scoring: _Scoring

    @property
    def _targets(self) -> tuple[Target, ...]:
        """The targets from the largest to the smallest."""
        return tuple(reversed(self.problem.targets))

    def walk(self) -> _Part[tuple[list[Widths], list[int]]]:
        """Walk down until every target has a place and the way has left the last one behind.

        Returns:
            The sub-networks of the way, and the places that are nearest to the targets, from the
            largest target.
        """
        problem, scoring = self.problem, self.scoring
        way, left = [problem.widest], list(self._targets)
        taken: list[tuple[Target, int]] = []
        (reference,) = yield from scoring.scores(way)
        while True:
            while left and (place := place_of(problem, way, left[0], taken)) is not None:
                taken.append((left.pop(0), place))
            following = self.ranking.next(self.options, way[-1])
            is_past = problem.madds(way[-1]) < (1 - NEAR) * problem.targets[0].madds
            if following is None or (is_past and not left):
                return way, [place for _, place in (*taken, *last_places(len(way), left, taken))]
            way.append(following)
            scoring.round += 1
            reference = yield from self._step(following, reference)

    def _step(self, widths: Widths, reference: Score) -> _Part[Score]:
        """Score a sub-network of the way, and fine-tune where it has lost too much; returns the
        score with which later ones are compared: its own after a fine-tuning.

        There is at most one fine-tuning per step, whatever it achieves, so that the search ends.
        """
        (score,) = yield from self.scoring.scores([widths])
        yield Choice(self.scoring.round, widths, self.problem.madds(widths))
        threshold = self.problem.settings.progressive.threshold
        fall = reference.num_correct - score.num_correct
        if threshold is None or fall <= threshold * score.num_images + ROUNDING:
            return reference
        yield from self.scoring.tune(widths)
        (score,) = yield from self.scoring.scores([widths])
        return score

    def members(self, way: Sequence[Widths], places: Sequence[int]) -> _Part[list[Widths]]:
        """The members for the targets, from the largest: of the sub-networks of the way near a
        target the most accurate by the present network, the cheaper one if equal, so that none
        dominates it; else the nearest.

        Args:
            way: the sub-networks of the way.
            places: for each target a place of its own, rising, which other targets leave free.
        """
        near = [
            [place for place, widths in enumerate(way) if self._is_near(widths, target)] for target in self._targets
        ]
        wanted = sorted({0, *places, *(place for each in near for place in each)})
        self.scoring.round += 1
        scores = yield from self.scoring.scores([way[place] for place in wanted])
        correct = {place: score.num_correct for place, score in zip(wanted, scores, strict=True)}
        found: list[int] = []
        for number, (target, own) in enumerate(zip(self._targets, places, strict=True)):
            first, end = (found[-1] + 1 if found else 0), (*places, len(way))[number + 1]
            free = [place for place in near[number] if first <= place < end] or [own]
            is_all = first == 0 and target.madds >= self.problem.madds(way[0])
            found.append(0 if is_all else max(free, key=lambda place: (correct[place], place)))
        return [way[place] for place in found]

    def fitted(self, members: Sequence[Widths]) -> _Part[list[Widths]]:
        """The members, with others in place of those that are not near their targets, because the
        steps of the way are too large for the network: sub-networks that differ in one or two
        groups and stay in the chain.

        Args:
            members: the members from the largest, each with at most the widths of the one before.
        """
        found = list(members)
        smallest = tuple(widths[0] for widths in self.options)
        for number, target in enumerate(self._targets):
            above, below = (self.problem.widest, *found)[number], (*found, smallest)[number + 1]
            if not self._is_near(found[number], target):
                found[number] = self._nearest(found[number], target, below, above)
        if changed := [widths for widths in found if widths not in members]:
            self.scoring.round += 1
            yield from self.scoring.scores(changed)
        return found

    def _nearest(self, widths: Widths, target: Target, below: Widths, above: Widths) -> Widths:
        """The sub-network within `NEAR` of the target whose removed channels have the least
        importance; if there is none, the one with the nearest MAdds.

        Of one changed group if one is enough, else of two.
        """
        levels = [
            [width for width in possible if low <= width <= high]
            for possible, low, high in zip(self.options, below, above, strict=True)
        ]
        best = widths
        for count in (1, 2):
            possible = {best}
            for groups in combinations(range(len(widths)), count):
                for chosen in product(*(levels[group] for group in groups)):
                    changed = dict(zip(groups, chosen, strict=True))
                    possible.add(tuple(changed.get(group, width) for group, width in enumerate(widths)))
            possible -= {below, above} - {widths}
            best = min(possible, key=lambda each: (*self._cost(each, target), each))
            if self._is_near(best, target):
                break
        return best

    def _cost(self, widths: Widths, target: Target) -> tuple[bool, float]:
        """The smaller, the better is a sub-network for a target."""
        if not self._is_near(widths, target):
            return True, abs(self.problem.madds(widths) - target.madds)
        groups = zip(range(len(widths)), widths, self.problem.widest, strict=True)
        return False, sum(self.ranking.between(group, own, whole) for group, own, whole in groups)

    def reselected(self, members: Sequence[Widths]) -> _Part[list[Widths]]:
        """Members that are at least as accurate: each, from the largest, moves by exchanges of
        channels between groups as long as one of those that lose the least importance is more
        accurate, without leaving its target or the chain."""
        found = list(members)
        smallest = tuple(widths[0] for widths in self.options)
        for number, target in enumerate(self._targets):
            above, below = (self.problem.widest, *found)[number], (*found, smallest)[number + 1]
            for _ in range(ROUNDS):
                better = yield from self._better(found[number], target, below, above)
                if better is None:
                    break
                found[number] = better
        return found

    def _better(self, widths: Widths, target: Target, below: Widths, above: Widths) -> _Part[Widths | None]:
        """The most accurate of the exchanges that are tried, the first one if equal; None if none
        is more accurate than the present sub-network."""
        allowed = max(NEAR * target.madds, abs(self.problem.madds(widths) - target.madds))
        possible = (
            each
            for each in self.ranking.exchanges(self.options, widths, below, above)
            if each not in (below, above) and abs(self.problem.madds(each) - target.madds) <= allowed
        )
        tried = [widths, *islice(possible, EXCHANGES)]
        self.scoring.round += 1
        scores = yield from self.scoring.scores(tried)
        best = max(range(len(tried)), key=lambda place: scores[place].num_correct)
        if best == 0:
            return None
        yield Choice(self.scoring.round, tried[best], self.problem.madds(tried[best]))
        return tried[best]

    def _is_near(self, widths: Widths, target: Target) -> bool:
        return abs(self.problem.madds(widths) - target.madds) <= NEAR * target.madds


def _tuning(problem: StructureProblem, spec: SupernetSpec, number: int, widths: Widths) -> Base:
    """A fine-tuning for one sub-network, with the widest as its teacher.

    Args:
        problem: the problem.
        spec: that of the network that is fine-tuned.
        number: counts the fine-tunings from 1.
        widths: the sub-network's.
    """
    run, name = problem.run, f"tuning_{number}"
    tuned = replace(
        run,
        train=shortened(problem, problem.settings.progressive.tuning_epochs),
        regime=Regime(widths="all", num_random=0, teacher="inplace", norm=norm_of_search(problem)),
        # The network is trained already: both learn together and fully from the first step on.
        bootstrapping=replace(run.bootstrapping, soft_ramp_epochs=0.0, largest_first=0.0),
        seed=derive_seed(run.seed, name) % 2**32,
    )
    subnets = SubnetSet(spec, (Subnet(PRUNED, widths),), Subnet(LARGEST, problem.widest))
    return Base(name, subnets, tuned)


def _ranked(problem: StructureProblem, start: Supernet, trained: Trained) -> tuple[Ranking, Orders | None, Supernet]:
    """The importance of the channels, their order if it sorts them, and the network of the search,
    which has that order.

    They are sorted unless the settings name another order or the network cannot be sorted; the last
    channels are removed first all the same.
    """
    from dsnet.structure.order import orders_by, transfer, with_ids
    from dsnet.structure.pruning_scores import channel_importances

    kind = problem.settings.progressive.ranking
    alone = SubnetSet(start.spec, (Subnet(LARGEST, problem.widest),))
    network = transfer(start, alone)
    scores = channel_importances(network, kind, problem.seed, trained.batches() if kind in BY_IMAGES else ())
    order = None
    if problem.settings.order == "none" and is_sortable(problem):
        order = orders_by(network, scores)
        network = transfer(network, alone, order)
        problem = replace(problem, subnets=with_ids(problem.subnets, start.spec, order))
    listed = {group: values.tolist() for group, values in scores.items()}
    if order is not None:
        listed = {group: [values[place] for place in order[group]] for group, values in listed.items()}
    return Ranking.of(problem, listed), order, network


def _missed(problem: StructureProblem, target: Target, madds: int) -> Iterator[str]:
    """A sentence about a target that a member does not meet to within 1 %; else nothing."""
    if abs(madds - target.madds) > NEAR * target.madds:
        yield from missed(problem, target, madds)
    elif any(missed(problem, target, madds)):
        yield (
            f"{target.name}: {madds / 1e6:.4g} M MAdds (a share of {problem.share(madds):.4g}), the most accurate that the method "
            f"finds within {100 * NEAR:g} % of {target.madds / 1e6:.4g} M"
        )
