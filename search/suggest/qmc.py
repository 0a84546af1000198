"""Scrambled Sobol points over a whole space, by their number."""

from __future__ import annotations

from dsnet.seeds import derive_seed
from search.suggest.space import Scalar, Space, at_share


def sobol_point(space: Space, seed: int, index: int) -> dict[str, Scalar]:
    """The `index`-th point of the sequence that `seed` scrambles.

    Every free dimension has a coordinate of its own, choices and conditional ones too, so that a point is the same whether or not
    another dimension exists beside it.

    Returns:
        all free dimensions, those too that do not exist beside the others.
    """
    from scipy.stats.qmc import Sobol  # a third of a second, which only this sampler needs

    free = space.free
    if not free:
        return {}
    sequence = Sobol(len(free), scramble=True, rng=derive_seed(seed, "qmc") % 2**32)
    if index:  # SciPy cannot move on by nothing
        sequence.fast_forward(index)
    shares = sequence.random(1)[0]
    return {
        name: at_share(distribution, float(share))
        for (name, distribution), share in zip(free.items(), shares, strict=True)
    }
