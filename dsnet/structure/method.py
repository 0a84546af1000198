"""The interface of a structure method, and the problem that it solves.

A method says which sub-networks a supernet has. What it trains beforehand, and the scores of
candidates on held-out images, are the caller's work: `bases` names the networks to train, and
`find` asks for scores, so that the same method runs in one process or with many scorers. This
module needs no torch.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from dsnet.errors import ConfigError
from dsnet.image_size import ImageSize
from dsnet.space.cost import subnet_cost
from dsnet.space.spec import IMAGE, Op, Subnet, SupernetSpec
from dsnet.space.subnet_set import SubnetSet, subnet_at
from dsnet.space.width_space import WidthSpace
from dsnet.structure.settings import MULTI_BASE, PROGRESSIVE, StructureSettings, without_unread

if TYPE_CHECKING:
    from dsnet.network.supernet import Supernet
    from dsnet.structure.filters import Batches
    from dsnet.training.settings import TrainSettings
    from dsnet.training.supernet_run import SupernetRun

Widths = tuple[int, ...]
"""A width for every channel group."""
LARGEST = "largest"
"""Name of the teacher of a set in which no member has all channels."""
TOLERANCE = 0.01
"""A member meets its target if its MAdds differ by at most this share of it."""


@dataclass(frozen=True)
class Target:
    """The MAdds that one member should have."""

    name: str
    """The member's name: the share of the widest's MAdds, or the millions with an M."""
    madds: float


@dataclass(frozen=True)
class StructureProblem:
    """What a method starts from."""

    subnets: SubnetSet
    """The sub-networks that the family declares, with the supernet's spec."""
    settings: StructureSettings
    run: SupernetRun
    """The joint training; networks that are trained beforehand derive their training from it."""
    image_size: ImageSize
    """Height and width in pixels for which MAdds count."""

    @property
    def spec(self) -> SupernetSpec:
        """The supernet's spec."""
        return self.subnets.spec

    @property
    def seed(self) -> int:
        """The seed of everything that is drawn."""
        return self.run.seed

    @property
    def widest(self) -> Widths:
        """All channels of every group."""
        return self.spec.max_widths

    @cached_property
    def targets(self) -> tuple[Target, ...]:
        """The targets, from the smallest to the largest."""
        shares, millions = self.settings.targets, self.settings.targets_m
        if shares:
            whole = self.madds(self.widest)
            return tuple(Target(f"{share:g}", share * whole) for share in sorted(shares))
        return tuple(Target(f"{value:g}M", value * 1e6) for value in sorted(millions))

    @property
    def sorted_by(self) -> str:
        """The order that the channels get: that of the settings, or where it is none, that of a
        method which sorts by a score of its own; `none` if they keep theirs."""
        settings = self.settings
        if settings.order != "none":
            return settings.order
        if settings.method == PROGRESSIVE and is_sortable(self):
            return settings.progressive.ranking
        return settings.score if settings.method == MULTI_BASE else "none"

    @cached_property
    def fixed(self) -> frozenset[int]:
        """Channel groups of which every member has all channels: those that the network pins, and
        with `pin: gate` those before the first gate."""
        shared = self.spec.num_prefix_groups(0) if self.spec.gates and self.settings.pin == "gate" else 0
        return frozenset(number for number, group in enumerate(self.spec.groups) if group.is_fixed or number < shared)

    def options(self, levels: int | None) -> tuple[Widths, ...]:
        """For every channel group its possible widths, in increasing order; a fixed group has one.

        Args:
            levels: largest number of widths of a group; None: as many as the step gives.
        """
        space = WidthSpace(self.settings.min_share, self.settings.step, levels)
        return tuple(
            options[-1:] if number in self.fixed else options for number, options in enumerate(space.options(self.spec))
        )

    def madds(self, widths: Sequence[int]) -> int:
        """MAdds of one image for a sub-network's widths."""
        return subnet_cost(self.spec, Subnet("", tuple(widths)), self.image_size).madds

    def share(self, madds: float) -> float:
        """MAdds as a share of the widest's."""
        return madds / self.madds(self.widest)

    def found(self, members: Sequence[Subnet], notes: Sequence[str] = ()) -> Found:
        """A result with these members; if none of them has all channels, the widest sub-network is
        the teacher, from which the others can learn."""
        has_widest = any(member.widths == self.widest for member in members)
        return Found(tuple(members), None if has_widest else Subnet(LARGEST, self.widest), notes=tuple(notes))

    def set_of(self, found: Found) -> SubnetSet:
        """The sub-networks of a result.

        Raises:
            ValueError: they do not fit the network.
        """
        return SubnetSet(self.spec, found.members, found.teacher)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that determines the result beside the start weights and images."""
        record = {
            "subnets": self.subnets.to_json(),
            "settings": without_unread(asdict(self.settings)),
            "seed": self.seed,
            "image_size": self.image_size,
        }
        return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Base:
    """A network that is trained before the search, on `train` without the hold-out."""

    name: str
    """The name of its folder."""
    subnets: SubnetSet
    run: SupernetRun
    follows: bool = True
    """Whether it starts from the weights of the network before it; else from those with which the
    sweep begins, so that it can be trained at the same time as the others."""


def _no_network(name: str) -> Supernet:
    raise KeyError(f"no network {name!r} was trained")


@dataclass(frozen=True, eq=False)
class Trained:
    """What a method may read beside the network of its search."""

    network: Callable[[str], Supernet] = _no_network
    """Function (name of a base) -> that network after its training, in eval mode; not to be
    changed."""
    batches: Callable[[], Batches] = tuple
    """Function () -> normalised images of `train` without the hold-out, with their labels."""


@dataclass(frozen=True, eq=False)
class Training:
    """The training of a network that a search asks for."""

    base: Base
    """Its `follows` is not read."""
    start: Supernet
    """The weights with which it starts."""


@dataclass(frozen=True)
class Trainings:
    """Networks that a search wants to be trained before it goes on, side by side where there is
    room; they are then read by `Trained.network`."""

    networks: tuple[Training, ...]


@dataclass(frozen=True, eq=False)
class ScoredBy:
    """The network by which later candidates are scored, instead of the one before it."""

    network: Supernet


@dataclass(frozen=True)
class Candidate:
    """A sub-network whose score a method asks for."""

    round: int
    widths: Widths
    madds: int


@dataclass(frozen=True)
class Choice:
    """A sub-network that a method has chosen, for the record."""

    round: int
    widths: Widths
    madds: int
    member: str = ""
    """The name of the member that it becomes; empty for a step on the way."""


@dataclass(frozen=True)
class Score:
    """A candidate's result on the hold-out."""

    num_correct: int
    num_images: int
    seconds: float = 0.0

    @property
    def accuracy(self) -> float:
        """Share of the images that are classified correctly."""
        return self.num_correct / self.num_images


@dataclass(frozen=True)
class Found:
    """The result of a method."""

    members: tuple[Subnet, ...]
    teacher: Subnet | None
    order: tuple[Widths, ...] | None = None
    """For every channel group a permutation of its channels, to be applied to the start weights;
    None: they stay in their order."""
    network: Supernet | None = None
    """The network with whose weights joint training begins, with its channels in the order
    `order`; None: that of the search's start."""
    notes: tuple[str, ...] = ()
    """Sentences about the result, such as a target that no sub-network meets."""


Search = Generator[Sequence[Candidate] | Choice | Trainings | ScoredBy, Sequence[Score], Found]
"""What `StructureMethod.find` returns: it yields candidates and gets their scores in the same
order, or yields a choice for the record, networks to train, or the network that is scored from then
on, and gets an empty sequence; its return value is the result."""


class StructureMethod(ABC):
    """A way to choose the sub-networks of a supernet; an object holds no state.

    Every result must depend on nothing but the arguments and the scores.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    """One sentence for the documentation."""

    @abstractmethod
    def check(self, problem: StructureProblem) -> None:
        """Check the settings against the network, before anything is trained.

        Raises:
            ConfigError: no result can fulfil them; the message says which setting, and a way out.
        """

    @abstractmethod
    def member_names(self, problem: StructureProblem) -> tuple[str, ...]:
        """The names of the members, without the teacher's, known beforehand; from the cheapest to
        the most expensive where there are targets."""

    def bases(self, problem: StructureProblem) -> tuple[Base, ...]:
        """The networks that are trained beforehand; the search starts from the last one's weights.
        None by default."""
        return ()

    def num_candidates(self, problem: StructureProblem) -> int:
        """The number of candidates whose scores the search asks for, at most; by default that of a
        way down if there are networks to train beforehand."""
        return most_candidates(problem.options(problem.settings.levels)) if self.bases(problem) else 0

    def later(self, problem: StructureProblem) -> tuple[Base, ...]:
        """The networks whose training the search may ask for, as many as an estimate of its cost
        should count; their sub-networks may be other ones of about the same size. None by
        default."""
        return ()

    def passes(self, problem: StructureProblem) -> tuple[tuple[str, Subnet], ...]:
        """Scores of channels that the search computes itself, by name (`dsnet.structure.settings.
        SCORES`), each with the sub-network whose channels they are. None by default."""
        return ()

    @abstractmethod
    def find(self, problem: StructureProblem, start: Supernet, trained: Trained) -> Search:
        """Search.

        Args:
            problem: as given to `check`; MAdds are those of channels in the order that they have in
                `start`.
            start: the network whose sub-networks are scored, with its channels in the order of the
                settings; not to be changed.
            trained: the networks that were trained beforehand, as they were trained.
        """


EPOCHS = 0.2
"""Share of the joint training's epochs for which a network is trained beforehand."""


def shortened(problem: StructureProblem, epochs: int | None = None) -> TrainSettings:
    """The joint training's settings for a number of epochs, with its warm-up in proportion.

    Args:
        problem: the problem.
        epochs: None: those of a network that is trained beforehand.
    """
    train = problem.run.train
    epochs = epochs or problem.settings.epochs or max(1, round(EPOCHS * train.epochs))
    share = epochs / train.epochs if train.epochs else 0.0
    return replace(train, epochs=epochs, warmup_epochs=min(1.0, share) * train.warmup_epochs)


def is_sortable(problem: StructureProblem) -> bool:
    """Whether the channels can change their order without a change of what the network computes:
    GroupNorm normalises neighbouring channels together."""
    return problem.spec.norm != "group_norm" or not problem.spec.has_norms


def check_order(problem: StructureProblem) -> None:
    """Check that the channels can have the order of the settings.

    Raises:
        ConfigError: they cannot without a change of what the network computes, or there is nothing
            by which to sort.
    """
    wanted = problem.settings.order
    if wanted != "none" and not is_sortable(problem):
        raise ConfigError(
            f"supernet.structure.order is {wanted}, but this network has GroupNorm, which normalises neighbouring channels "
            "together, so that another order would compute something else: use order none, or another supernet.train.bn"
        )
    if wanted == "bn_gamma" and not problem.spec.has_norms:
        raise ConfigError(
            "supernet.structure.order is bn_gamma, but this network has no BatchNorm: use weight_l1, taylor or noise"
        )


def check_common(problem: StructureProblem) -> None:
    """Check what every method needs that chooses widths itself.

    Raises:
        ConfigError: a channel group is smaller than the step, or the members would differ before a
            gate.
    """
    spec, step = problem.spec, problem.settings.step
    for number, group in enumerate(spec.groups):
        if number not in problem.fixed and not group.choices and group.max_width < group.step(step):
            raise ConfigError(
                f"supernet.structure.step is {step}, but channel group {group.name!r} has only {group.max_width} channels: "
                f"use a step of at most {group.max_width}"
            )
    free = [group.name for number, group in enumerate(spec.groups) if number not in problem.fixed]
    if not free:
        raise ConfigError(
            f"supernet.structure.method {problem.settings.method}: every channel group of {spec.family} keeps all channels, "
            "so that there is nothing to choose; use method declared, or another network"
        )
    shared = spec.num_prefix_groups(0) if spec.gates else 0
    before = [group.name for number, group in enumerate(spec.groups[:shared]) if number not in problem.fixed]
    if before:
        raise ConfigError(
            f"all sub-networks of {spec.family} must agree on the channel groups before gate {spec.gates[0].name!r} "
            f"({', '.join(before)}), but supernet.structure.method {problem.settings.method} chooses their widths: "
            "set supernet.structure.pin to gate"
        )


def check_targets(problem: StructureProblem, options: Sequence[Widths]) -> None:
    """Check that the targets lie between the smallest and the widest possible sub-network.

    Args:
        problem: the problem.
        options: the possible widths of every channel group.

    Raises:
        ConfigError: one does not, by more than the tolerance.
    """
    smallest = tuple(widths[0] for widths in options)
    low, high = problem.madds(smallest), problem.madds(problem.widest)
    for target in problem.targets:
        nearest = low if target.madds < low else high
        if not low * (1 - TOLERANCE) <= target.madds <= high * (1 + TOLERANCE):
            setting = "targets" if problem.settings.targets else "targets_m"
            further = " (or lower min_share or step)" if nearest == low else ""
            if nearest == low and problem.settings.pin == "gate":
                further += ", or another pin: the channel groups before the first gate keep all channels"
            raise ConfigError(
                f"supernet.structure.{setting}: no sub-network has {target.madds / 1e6:.4g} M MAdds ({target.name}); the nearest "
                f"possible one has {nearest / 1e6:.4g} M, a share of {problem.share(nearest):.4g}: change the target{further}"
            )


def check_statistics(problem: StructureProblem, sets: Sequence[SubnetSet] | None) -> None:
    """Check that no two members could share BatchNorm statistics although their inputs differ.

    Args:
        problem: the problem.
        sets: the possible results; None: members of any widths.

    Raises:
        ConfigError: two members could.
    """
    if problem.spec.norm == "group_norm":
        return
    for op, upstream in _late_inputs(problem.spec):
        if sets is None or any(_share(found, op, upstream) for found in sets):
            groups = problem.spec.groups
            raise ConfigError(
                f"supernet.structure.method {problem.settings.method}: sub-networks may have equal widths up to channel group "
                f"{groups[op.out_group].name!r}, but not up to {groups[upstream].name!r}, which its layers read; they would share "
                "BatchNorm statistics although their inputs differ; use one channel group per block "
                "(supernet.options.streams padded) or supernet.train.bn group_norm"
            )


def _late_inputs(spec: SupernetSpec) -> Iterator[tuple[Op, int]]:
    """The operations with a norm whose input depends on a channel group after the one that they
    write, with the last such group."""
    last = {IMAGE: -1}
    for op in spec.ops:
        read = max(last[op.reads], op.in_group, *op.in_union)
        if op.has_norm and not op.depends and read > op.out_group:
            yield op, read
        last[op.name] = max(read, op.out_group)


def _share(subnets: SubnetSet, op: Op, upstream: int) -> bool:
    """Whether two sub-networks have one key of statistics of an operation, but other inputs."""
    inputs: dict[Widths, set[Widths]] = {}
    for subnet in subnets.all:
        inputs.setdefault(subnet.prefix(op.out_group + 1), set()).add(subnet.prefix(upstream + 1))
    return any(len(each) > 1 for each in inputs.values())


def missed(problem: StructureProblem, target: Target, madds: int) -> Iterator[str]:
    """A sentence about a target that a member does not meet to within the tolerance; else
    nothing."""
    if abs(madds - target.madds) > TOLERANCE * target.madds:
        yield (
            f"{target.name}: {madds / 1e6:.4g} M MAdds (a share of {problem.share(madds):.4g}) are the nearest that the method "
            f"finds to {target.madds / 1e6:.4g} M; a smaller supernet.structure.step may come nearer"
        )


def check_different(problem: StructureProblem, members: Sequence[Subnet]) -> None:
    """Check that no two members are the same sub-network.

    Raises:
        ConfigError: two members have the same widths.
    """
    known: dict[Widths, str] = {}
    for member in members:
        other = known.setdefault(member.widths, member.name)
        if other != member.name:
            way = (
                "remove one of them"
                if problem.settings.method == "list"
                else "remove one target, or use a smaller step"
            )
            raise ConfigError(
                f"supernet.structure: {other!r} and {member.name!r} are the same sub-network, with widths "
                f"{list(member.widths)}: {way}"
            )


def candidate(problem: StructureProblem, number: int, widths: Sequence[int]) -> Candidate:
    """A candidate with its MAdds."""
    subnet_at(problem.spec, widths)  # raises where they do not fit
    return Candidate(number, tuple(widths), problem.madds(widths))


def most_candidates(options: Sequence[Sequence[int]]) -> int:
    """The number of candidates of a search that removes one step of one group at a time, down to
    the smallest sub-network: an upper bound."""
    steps = [len(widths) - 1 for widths in options]
    return max(1, sum(steps) * sum(step > 0 for step in steps))
