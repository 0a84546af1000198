"""Problems of the choice of sub-networks that the tests share, and scorers for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from dsnet.families import create, layout, rebuild
from dsnet.network.supernet import Supernet
from dsnet.space.spec import CLASSES, IMAGE, IMAGE_CHANNELS, ChannelGroup, Op, Subnet, SupernetSpec
from dsnet.space.subnet_set import SubnetSet
from dsnet.structure.method import Candidate, Score, StructureProblem, Trained, Training, Trainings, Widths
from dsnet.structure.methods import structure_method
from dsnet.structure.order import transfer
from dsnet.structure.search import Facilities, Scorer, SortedStart, Structure, find_structure, sorted_start
from dsnet.structure.settings import StructureSettings
from dsnet.training.start import first_weights
from tests.dsnet.samples import SMALL_OPTIONS, random_images, random_labels, shaken, small_run, task

NET = "tests.dsnet.nets:Residual"


def problem_of(
    family: str = NET, norm: str | None = None, options: Mapping[str, Any] | None = None, **settings: Any
) -> StructureProblem:
    """A problem for a small network."""
    own = SMALL_OPTIONS.get(family, {}) if options is None else options
    subnets = layout(family, task(), own, norm)
    return StructureProblem(subnets, StructureSettings(**{"step": 2, **settings}), small_run(), 16)


def network(problem: StructureProblem, family: str = NET, seed: int = 0) -> Supernet:
    """Its network with fresh weights."""
    return create(family, task(), SMALL_OPTIONS.get(family, {}), norm=problem.spec.norm, seed=seed).eval()


def toy(*widths: int, **settings: Any) -> StructureProblem:
    """A chain of convolutions that only exists as a spec: enough for methods that read scores."""
    groups = tuple(ChannelGroup(f"g{number}", width) for number, width in enumerate(widths))
    reads, ops = IMAGE, []
    for number in range(len(widths)):
        ops.append(Op(f"conv{number}", "conv", reads, number - 1 if number else IMAGE_CHANNELS, number, kernel=3))
        reads = f"conv{number}"
    last = len(widths) - 1
    ops += [Op("pool", "pool", reads, last, last), Op("fc", "linear", "pool", last, CLASSES)]
    spec = SupernetSpec("toy", 10, 3, 8, groups, tuple(ops), ())
    subnets = SubnetSet(spec, (Subnet("all", tuple(widths)),))
    return StructureProblem(subnets, StructureSettings(**{"step": 1, "levels": None, **settings}), small_run(), 8)


def invented(widths: Sequence[int], *, num_images: int = 1000) -> Score:
    """A score that depends on the widths alone, rises with them on the whole, and has ties."""
    own = sum(((7 * number + 3) % 5 + 1) * 40 * (1 - 2.0 ** (-width / 3)) for number, width in enumerate(widths))
    return Score(min(num_images, round(own) + sum(widths) % 3), num_images)


class CountingScorer:
    """Scores candidates by a function of their widths, in groups as several workers would, and
    notes for what it was asked."""

    def __init__(self, num_workers: int = 1, of: Callable[[Widths], Score] = invented) -> None:
        self.num_workers = num_workers
        self.asked: list[Widths] = []
        self._of = of

    def __call__(self, candidates: Sequence[Candidate]) -> list[Score]:
        self.asked += [candidate.widths for candidate in candidates]
        found: dict[int, Score] = {}
        for worker in reversed(range(self.num_workers)):  # the last worker ends first
            for place in range(worker, len(candidates), self.num_workers):
                found[place] = self._of(candidates[place].widths)
        return [found[place] for place in range(len(candidates))]


def find(problem: StructureProblem, folder: Path, scorer: CountingScorer | None = None, **further: Any) -> Structure:
    """The result of a whole search."""
    start = further.pop("start", None) or sorted_start(problem, network(problem))
    invention = InventedTraining(problem)
    trained = further.pop("trained", None) or invention.trained
    facilities = invention.facilities(scorer or CountingScorer())
    if "train" in further:
        facilities = replace(facilities, train=further.pop("train"))
    found = find_structure(problem, start, facilities, folder=folder, trained=trained, **further)
    assert found is not None
    return found


class InventedTraining:
    """Networks that look trained: those of a method have fresh weights and random scales of norms;
    of those that its search asks for the scales are changed at random. Notes for what it was
    asked."""

    def __init__(self, problem: StructureProblem) -> None:
        self._bases = {base.name: base for base in structure_method(problem.settings.method).bases(problem)}
        self._further: dict[str, Supernet] = {}
        self.asked: list[Training] = []
        self.used: list[Supernet] = []
        """The networks that score, one after another."""
        self.trained = Trained(self._network, lambda: [(random_images(16), random_labels(16))])

    def facilities(self, scorer: Scorer) -> Facilities:
        """What a search may ask for, with a scorer for all networks."""
        return Facilities(scorer, self._train, self.used.append)

    def _train(self, trainings: Trainings) -> None:
        for each in trainings.networks:
            self.asked.append(each)
            made = rebuild(each.base.subnets)
            made.load_state_dict(each.start.state_dict())
            self._further[each.base.name] = shaken(made, len(each.base.name)).eval()

    def _network(self, name: str) -> Supernet:
        if name in self._further:
            return self._further[name]
        return shaken(first_weights(self._bases[name].subnets, 1)[0], len(name)).eval()


def untrained(problem: StructureProblem) -> Trained:
    """The networks of a method with fresh weights and random scales of norms, and images."""
    return InventedTraining(problem).trained


@torch.no_grad()
def masked_network(net: Supernet, kept: dict[int, list[int]]) -> Supernet:
    """A copy of the network with zero weights for all channels but the kept ones of each group."""
    other = transfer(net, net.subnets)
    axes = net.axes()
    for name, value in other.state_dict().items():
        for dimension, axis in enumerate(axes.get(name, ())):
            if axis is None or name.rpartition(".")[2].startswith(("mean_", "var_")):
                continue
            keep, start = torch.ones(value.shape[dimension]), 0
            for (group, repeat, present), stream in zip_longest(axis.parts, axis.streams):
                if stream is not None:
                    own = zip(stream.groups, stream.ids, strict=True)
                    alive = {ids[channel] for writer, ids in own for channel in kept[writer]}
                else:
                    alive = (
                        set().union(*(kept[each] for each in (group, *axis.union))) if group >= 0 else range(present)
                    )
                for channel in set(range(present)) - set(alive):
                    keep[start + channel * repeat : start + (channel + 1) * repeat] = 0
                start += repeat * present
            value.mul_(keep.reshape([-1 if each == dimension else 1 for each in range(value.ndim)]))
    return other


def way_down(problem: StructureProblem, score: Callable[[Widths], Score] = invented) -> list[Widths]:
    """The whole way of AutoSlim's search, computed independently of it: at every step all removals
    are tried."""
    options = problem.options(problem.settings.levels)
    current = list(problem.widest)
    way = [tuple(current)]
    while True:
        best: tuple[int, int] | None = None
        for group, possible in enumerate(options):
            smaller = [width for width in possible if width < current[group]]
            if smaller:
                trial = tuple(max(smaller) if number == group else width for number, width in enumerate(current))
                key = (-score(trial).num_correct, group)
                best = key if best is None or key < best else best
        if best is None:
            return way
        group = best[1]
        current[group] = max(width for width in options[group] if width < current[group])
        way.append(tuple(current))


__all__ = [
    "CountingScorer",
    "InventedTraining",
    "SortedStart",
    "find",
    "invented",
    "masked_network",
    "network",
    "problem_of",
    "toy",
    "untrained",
    "way_down",
]
