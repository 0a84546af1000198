"""NSGA-II and NSGA-III samplers whose suggestions are functions of the finished trials, also for
search spaces with conditions."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseGASampler, NSGAIIISampler, NSGAIISampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial

from dsnet.seeds import derive_seed
from search.suggest.space import Space


class Inheritance:
    """Uniform crossover of two parents and mutation to random values, for spaces with conditional
    dimensions.

    A dimension that one parent lacks is taken from the other. Optuna's own crossover uses only
    dimensions that all parents have, so that conditional ones would never be inherited. For a space
    without conditions the method is the same.
    """

    def __init__(
        self,
        space: Space,
        seed: int,
        *,
        crossover_prob: float = 0.9,
        swapping_prob: float = 0.5,
        mutation_prob: float | None = None,
    ) -> None:
        """Create the strategy for one child.

        Args:
            space: the search space of the sweep.
            seed: seed of the child.
            crossover_prob: probability that there are two parents instead of one.
            swapping_prob: probability that a dimension comes from the second parent.
            mutation_prob: probability that a dimension is drawn at random; None = 1 / number of the
                child's dimensions.

        Raises:
            ValueError: a probability is outside 0..1.
        """
        shares = {"crossover_prob": crossover_prob, "swapping_prob": swapping_prob, "mutation_prob": mutation_prob}
        for name, share in shares.items():
            if share is not None and not 0.0 <= share <= 1.0:
                raise ValueError(f"{name} is {share}, but must lie in 0..1")
        self._names = list(space.free)
        self._rng = np.random.default_rng(seed)
        self._crossover_prob = crossover_prob
        self._swapping_prob = swapping_prob
        self._mutation_prob = mutation_prob

    def __call__(
        self, study: Study, search_space: dict[str, BaseDistribution], parents: list[FrozenTrial]
    ) -> dict[str, Any]:
        """The values that a child inherits; missing dimensions are drawn at random."""
        mother = self._winner(parents, study.directions)
        others = [trial for trial in parents if trial is not mother]
        father = mother
        if others and self._rng.random() < self._crossover_prob:
            father = self._winner(others, study.directions)
        child: dict[str, Any] = {}
        for name, is_fathers in zip(self._names, self._rng.random(len(self._names)) < self._swapping_prob, strict=True):
            first, second = (father, mother) if is_fathers else (mother, father)
            for parent in (first, second):
                if name in parent.params:
                    child.setdefault(name, parent.params[name])
        rate = 1.0 / max(1, len(child)) if self._mutation_prob is None else self._mutation_prob
        return {name: value for name, value in child.items() if self._rng.random() >= rate}

    def _winner(self, trials: Sequence[FrozenTrial], directions: Sequence[StudyDirection]) -> FrozenTrial:
        """Binary tournament: the better of two random trials, or the second if neither is."""
        first, second = (trials[int(self._rng.integers(len(trials)))] for _ in range(2))
        return first if beats(first, second, directions) else second


def beats(first: FrozenTrial, second: FrozenTrial, directions: Sequence[StudyDirection]) -> bool:
    """Whether the first trial dominates the second: constrained domination (Deb et al. 2002,
    definition 1).

    The smaller constraint violation wins; if both trials are feasible, Pareto dominance decides.
    """
    violations = [sum(max(0.0, value) for value in trial.constraints.values()) for trial in (first, second)]
    if any(violations):
        return violations[0] < violations[1]
    ours, theirs = _costs(first, directions), _costs(second, directions)
    return ours != theirs and all(a <= b for a, b in zip(ours, theirs, strict=True))


def _costs(trial: FrozenTrial, directions: Sequence[StudyDirection]) -> list[float]:
    return [
        -value if direction == StudyDirection.MAXIMIZE else value
        for value, direction in zip(trial.values, directions, strict=True)
    ]


class _Replayable(BaseGASampler):
    """Common base of both samplers, which makes the population of parents independent of
    interruptions.

    Optuna returns the parents of a generation in the order of selection when it selects them, but
    in the order of their numbers when it reads them from the study. Crossover draws parents by
    position, so that a resumed sweep would draw others; here they are always in the order of their
    numbers. Optuna also recurses through all generations, which exceeds the recursion limit in long
    sweeps; here it is a loop.
    """

    _free: dict[str, BaseDistribution]

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._free

    def get_parent_population(self, study: Study, generation: int) -> list[FrozenTrial]:
        noted = study._storage.get_study_system_attrs(study._study_id)
        first = generation
        while first > 1 and f"{self._get_parent_cache_key_prefix()}{first - 1}" not in noted:
            first -= 1
        for earlier in range(first, generation):
            super().get_parent_population(study, earlier)
        return sorted(super().get_parent_population(study, generation), key=lambda trial: trial.number)


class ReplayableNSGAII(_Replayable, NSGAIISampler):
    """NSGA-II whose suggestions depend only on finished trials, seed and slot, also in a resumed
    sweep."""

    def __init__(self, space: Space, population_size: int, seed: int, options: Mapping[str, Any]) -> None:
        # Optuna uses one seed for mutation and crossover; in a sampler that makes a single child,
        # mutated values would then depend on whether there was a crossover. Here the seeds differ.
        child = Inheritance(space, derive_seed(seed, "child"), **options)
        super().__init__(population_size=population_size, seed=seed, child_generation_strategy=child)
        self._free = space.free


class ReplayableNSGAIII(_Replayable, NSGAIIISampler):
    """NSGA-III whose suggestions depend only on finished trials, seed and slot, also in a resumed
    sweep.

    The random numbers of its selection depend on the sweep's seed and the generation, not on the
    first slot that needs the parents.
    """

    def __init__(
        self, space: Space, population_size: int, seed: int, options: Mapping[str, Any], *, base_seed: int
    ) -> None:
        selection = {name: options[name] for name in ("reference_points", "dividing_parameter") if name in options}
        mating = {name: value for name, value in options.items() if name not in selection}
        child = Inheritance(space, derive_seed(seed, "child"), **mating)
        super().__init__(population_size=population_size, seed=seed, child_generation_strategy=child)
        self._free = space.free
        self._selection = selection
        self._base_seed = base_seed
        self._size = population_size

    def select_parent(self, study: Study, generation: int) -> list[FrozenTrial]:
        candidates = self.get_population(study, generation - 1) + self.get_parent_population(study, generation - 1)
        by_number = {trial.number: trial for trial in candidates}
        seed = derive_seed(self._base_seed, "selection", generation) % 2**32
        chosen = _Selection(candidates, study.directions, self._size, seed, self._selection).chosen()
        return [by_number[trial.number] for trial in chosen]


class _Selection(NSGAIIISampler):
    """One selection of NSGA-III among given trials, with all objectives converted to costs.

    Optuna measures distances to the reference lines in the raw objectives, which is correct only if
    all are minimised: with an objective to maximise the lines would run along the front instead of
    across it.
    """

    def __init__(
        self,
        candidates: Sequence[FrozenTrial],
        directions: Sequence[StudyDirection],
        population_size: int,
        seed: int,
        options: Mapping[str, Any],
    ) -> None:
        lines = {"dividing_parameter": dividing_parameter(len(directions), population_size), **options}
        if lines.get("reference_points") is not None:
            lines["reference_points"] = np.asarray(lines["reference_points"], dtype=np.float64)
        super().__init__(population_size=population_size, seed=seed, **lines)
        self._candidates = [copy.copy(trial) for trial in candidates]
        for trial in self._candidates:
            trial.values = _costs(trial, directions)
        self._num_objectives = len(directions)

    def chosen(self) -> list[FrozenTrial]:
        study = optuna.create_study(directions=["minimize"] * self._num_objectives)
        return self.select_parent(study, generation=1)

    def get_population(self, study: Study, generation: int) -> list[FrozenTrial]:
        return self._candidates

    def get_parent_population(self, study: Study, generation: int) -> list[FrozenTrial]:
        return []


def dividing_parameter(num_objectives: int, population_size: int) -> int:
    """The finest division with at most as many reference lines as the population (Deb and Jain
    2014, section IV-A)."""
    parts = 1
    while math.comb(parts + num_objectives, num_objectives - 1) <= population_size:
        parts += 1
    return parts
