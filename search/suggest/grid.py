"""Grid over a search space, also with conditions: its distinct points by number."""

from __future__ import annotations

import math
from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from dsnet.errors import ConfigError
from dsnet.seeds import derive_seed
from search.suggest.space import Scalar, Space, nth_value, num_values

MAX_POINTS = 1_000_000
DEFAULT_POINTS = 5
"""Default number of grid values of a dimension without steps."""


class Grid:
    """The points of a space in a fixed order.

    The parents of conditions split the space into branches. Within a branch the same dimensions
    exist, and its points are numbered as mixed-radix numbers.
    """

    def __init__(self, space: Space, num_continuous: int = DEFAULT_POINTS) -> None:
        """Create the grid of a space.

        Args:
            space: the search space.
            num_continuous: number of values of a dimension without steps, including both ends.

        Raises:
            ConfigError: the grid has more than `MAX_POINTS` points.
        """
        self._distributions = space.distributions
        self._num_continuous = num_continuous
        self._branches = space.branches
        parents = {name for branch in space.branches for name in branch}
        self._others = [
            [name for name in space.distributions if name not in parents and space.has(name, branch)]
            for branch in space.branches
        ]
        sizes = {name: num_values(distribution, num_continuous) for name, distribution in space.distributions.items()}
        self._sizes = sizes
        self._ends = list(accumulate(math.prod(sizes[name] for name in names) for names in self._others))
        if self._ends[-1] > MAX_POINTS:  # may exceed the range of `len`
            largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
            raise ConfigError(
                f"sampler.name grid: the space has {self._ends[-1]:,} points, and at most {MAX_POINTS:,} can be listed; give fewer values "
                f"to {', '.join(f'{name} ({sizes[name]})' for name in largest)}, set sampler.options.points lower than "
                f"{num_continuous} for dimensions without steps, or use another sampler"
            )

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Scalar]:
        """Point number `index`, with its dimensions in the order of the space."""
        if not 0 <= index < len(self):
            raise IndexError(f"point {index} of {len(self)}")
        place = bisect_right(self._ends, index)
        digits = index - (self._ends[place - 1] if place else 0)
        point = dict(self._branches[place])
        for name in reversed(self._others[place]):
            digits, digit = divmod(digits, self._sizes[name])
            point[name] = nth_value(self._distributions[name], digit, self._num_continuous)
        return {name: point[name] for name in self._distributions if name in point}

    def shuffled(self, seed: int) -> Shuffled:
        """The points in random order, so that the first n are spread over the space."""
        return Shuffled(self, seed)


class Shuffled:
    """A grid's points in a random order given by a seed."""

    def __init__(self, grid: Grid, seed: int) -> None:
        self._grid = grid
        self._order = _order(len(grid), seed)

    def __len__(self) -> int:
        return len(self._grid)

    def __getitem__(self, index: int) -> dict[str, Scalar]:
        """The `index`-th point of this order."""
        return self._grid[int(self._order[index])]


@lru_cache(maxsize=2)
def _order(length: int, seed: int) -> NDArray[np.int64]:
    """A random permutation of 0..length - 1, cached since every slot needs one entry."""
    order = np.random.default_rng(derive_seed(seed, "grid")).permutation(length)
    order.setflags(write=False)
    return order
