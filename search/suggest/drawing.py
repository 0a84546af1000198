"""Points of a search space drawn in advance, by samplers that need no results of trials."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import optuna
from optuna.storages import InMemoryStorage

from search.suggest.samplers import SamplerSettings, make_sampler, num_points, quiet_optuna
from search.suggest.space import Scalar, Space, suggest


def drawn_points(space: Space, settings: SamplerSettings, base_seed: int) -> Iterator[dict[str, Scalar]]:
    """Iterate over points of `space`, slot by slot; endless, except for a grid.

    Equal arguments give the same points, independent of how many are drawn.

    Args:
        space: the search space.
        settings: settings of a sampler that needs no results: random, grid or qmc.
        base_seed: seed of the sweep.
    """
    with quiet_optuna():
        study = optuna.create_study(storage=InMemoryStorage())
    limit = num_points(settings, space)
    for slot in count() if limit is None else range(limit):
        with quiet_optuna():
            study.sampler = make_sampler(settings, space=space, base_seed=base_seed, slot=slot)
            trial = study.ask()
            point = suggest(trial, space)
            study.tell(trial, 0.0)
        yield point
