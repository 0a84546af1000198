"""Points of a scrambled Sobol sequence over a search space, by number."""

from __future__ import annotations

from dsnet.seeds import derive_seed
from search.suggest.space import Scalar, Space, at_share


def sobol_point(space: Space, seed: int, index: int) -> dict[str, Scalar]:
    """Point number `index` of the sequence scrambled by `seed`.

    Every free dimension has its own coordinate, including choices and conditional dimensions, so
    that its value does not depend on which other dimensions exist.

    Returns:
        Values of all free dimensions, including those whose conditions do not hold.
    """
    from scipy.stats.qmc import Sobol  # takes a third of a second to import, and only this sampler needs it

    free = space.free
    if not free:
        return {}
    sequence = Sobol(len(free), scramble=True, rng=derive_seed(seed, "qmc") % 2**32)
    if index:  # SciPy does not accept 0
        sequence.fast_forward(index)
    shares = sequence.random(1)[0]
    return {
        name: at_share(distribution, float(share))
        for (name, distribution), share in zip(free.items(), shares, strict=True)
    }
