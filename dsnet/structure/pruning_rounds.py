"""A base that is pruned in several rounds, with a training after each of them but the last."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING

from dsnet.network.supernet import Supernet, restrict
from dsnet.space.spec import Subnet
from dsnet.space.subnet_set import SubnetSet
from dsnet.structure.filters import Batches
from dsnet.structure.method import Base, StructureProblem, Target, Training, Widths
from dsnet.structure.order import Orders, compose, no_order, orders_by, transfer
from dsnet.structure.pruning import Pruning
from dsnet.structure.pruning_scores import pruning_scores

if TYPE_CHECKING:
    from dsnet.training.supernet_run import SupernetRun


class PrunedBase:
    """A base network during its rounds of pruning.

    After every round the network has only the channels that are left, in the order of their scores.
    """

    def __init__(self, problem: StructureProblem, base: Base, network: Supernet, batches: Batches) -> None:
        """Begin with a whole base.

        Args:
            problem: the problem.
            base: the base.
            network: its network after its training; not changed.
            batches: see `pruning_scores`.
        """
        self._problem = problem
        self._base = base
        self._whole = self._network = restrict(network, [0])
        self._order = no_order(self._whole)
        self._prunings: list[Pruning] = []
        self._score(self._whole, batches)

    @property
    def left(self) -> Widths:
        """The width of every channel group that the rounds have left."""
        return self._network.spec.max_widths

    @property
    def order(self) -> Orders:
        """For every channel group of the base the place of each channel that the rounds and the
        last scores put there: those that stayed longest come first."""
        return compose(self._order, orders_by(self._whole, self._scores, self.left))

    def prune(self, target: Target, name: str, run: SupernetRun) -> Training:
        """Remove channels, and sort those that are left by their scores.

        Args:
            target: the MAdds that are left.
            name: the name of the training that follows.
            run: its settings.

        Returns:
            the training; `trained` takes its result.
        """
        widths = self._prunings[-1].nearest(target)
        own = orders_by(self._whole, self._scores, self.left)
        self._order = compose(self._order, own)
        order = tuple(each[:width] for each, width in zip(own, self.left, strict=True))
        pruned = SubnetSet(self._network.spec, (Subnet(self._base.subnets.largest.name, widths),))
        self._network = restrict(transfer(self._network, pruned, order), [0])
        return Training(replace(self._base, name=name, subnets=self._network.subnets, run=run), self._network)

    def trained(self, network: Supernet, batches: Batches) -> None:
        """Score the channels anew after the training of what is left.

        Args:
            network: the network that `prune` returned after its training; not changed.
            batches: see `pruning_scores`.
        """
        self._network = restrict(network, [0])
        self._score(self._network, batches)

    def member(self, target: Target, problem: StructureProblem, taken: Collection[Widths]) -> tuple[int, Widths]:
        """The last round after which the base is not smaller than a target, 0 for the whole base,
        and the widths to which the scores then prune it for the target.

        Args:
            target: the target.
            problem: the problem with the MAdds of the channels in their new order.
            taken: see `Pruning.nearest`.
        """
        sizes = [self._problem.madds(pruning.left) for pruning in self._prunings]
        last = max((number for number, size in enumerate(sizes) if size >= target.madds), default=0)
        return last, replace(self._prunings[last], problem=problem).nearest(target, taken)

    def _score(self, network: Supernet, batches: Batches) -> None:
        """Score the channels that are left."""
        problem = self._problem
        self._scores = pruning_scores(network, problem.settings.score, problem.seed, batches)
        listed = {group: values.tolist() for group, values in self._scores.items()}
        self._prunings.append(Pruning.of(problem, self._whole.spec.max_widths, listed, self.left))
