"""Check that a gate trial has the same result alone and together with others, on the given
processor and libraries.

The study is the same for every number of workers only if this holds, and it depends on the rounding
of the libraries that torch uses. Every worker therefore checks it before its first trial, in
milliseconds: by a few steps of training with products of the same shapes as in the trials.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dsnet.gates.cohort import LANES
from dsnet.gates.fit import train_heads
from dsnet.gates.settings import GateSettings
from dsnet.routers.head import Head
from dsnet.routing.routing_table import RoutingTable
from search.gate_trial import GateTrial, gate_settings
from search.suggest.space import Scalar, Space, at_share

NUM_POINTS = 48
"""Number of points of the search space from which trials of different shapes are taken."""
MAX_SHAPES = 8
NUM_STEPS = 3
"""Steps of training. A head that is initialised to zero has only its gradient in the first step;
its logits differ from zero from the second step on."""
SMALL_PROGRAM = 3
"""Lanes of a second, smaller program after one of `LANES`: the library may choose its kernel by the
number of lanes."""


@dataclass(frozen=True)
class Finding:
    """Result of a worker's check."""

    digest: str
    """Hash of all weights of the routers that were trained alone; equal on machines with the same
    rounding."""
    unequal: tuple[str, ...] = ()
    """Kinds of router whose weights differ when trained together with others."""


@dataclass(frozen=True)
class GateCheck:
    """The check for trials on routing tables; it is called in a worker with its trial function."""

    points: tuple[Mapping[str, Scalar], ...]
    """Trial parameters, as the search may suggest them."""

    @classmethod
    def of_space(cls, space: Space) -> GateCheck:
        """A check at random points of the whole space, which are the same in every call."""
        shares = np.random.default_rng(0)
        return cls(tuple(_point(space, shares) for _ in range(NUM_POINTS)))

    def __call__(self, trial: GateTrial) -> Finding:
        """Train routers of every shape alone and together with others, and compare their weights to
        the bit."""
        digest, unequal = hashlib.sha256(), set()
        for own in self.shapes(trial):
            try:
                alone, together = _trained(trial.gate_table, own)
            except ValueError:
                continue  # the router cannot use this routing space or table; such a trial fails too
            digest.update(b"".join(alone))
            if alone != together:
                unequal.add(own.router)
        return Finding(digest.hexdigest(), tuple(sorted(unequal)))

    def shapes(self, trial: GateTrial) -> list[GateSettings]:
        """Settings of one trial for each shape of a program, at most `MAX_SHAPES`: first one of
        every kind of router, then the second of each, and so on."""
        found: dict[tuple[object, ...], GateSettings] = {}
        for own in self._settings(trial):
            hidden = own.hidden_units if own.kind.head == "perceptron" else 0
            is_small = 2 * len(own.routes) <= trial.gate_table.num_routes
            found.setdefault((own.router, hidden, is_small, own.batch_size, own.optimizer), own)
        seen: Counter[str] = Counter()
        ranked = []
        for place, own in enumerate(found.values()):
            ranked.append((seen[own.router], place, own))
            seen[own.router] += 1
        return [own for *_, own in sorted(ranked, key=lambda item: item[:2])[:MAX_SHAPES]]

    def _settings(self, trial: GateTrial) -> Iterator[GateSettings]:
        """Settings at those points whose router is trained by the common training."""
        for params in self.points:
            try:
                own = gate_settings(params, trial.defaults, trial.gate_table, seed=0)
            except ValueError:
                continue  # the combination is impossible; such a trial fails too
            if own.kind.is_trained and own.kind.fit is None:
                yield own


def _point(space: Space, shares: np.random.Generator) -> dict[str, Scalar]:
    point: dict[str, Scalar] = {}
    for name, distribution in space.distributions.items():
        if space.has(name, point):
            point[name] = at_share(distribution, float(shares.random()))
    return point


def _trained(table: RoutingTable, settings: GateSettings) -> tuple[list[bytes], list[bytes]]:
    """Weights of some routers after a few steps: first each trained alone, then the same ones
    trained together with others."""
    table = _first_images(table, settings.batch_size)
    lanes = [
        replace(settings, steps=NUM_STEPS, lr=settings.lr * (1.0 + index / LANES), seed=index)
        for index in range(LANES + SMALL_PROGRAM)
    ]
    compared = (0, LANES - 1, LANES + SMALL_PROGRAM - 1)
    together = train_heads(table, lanes)
    alone = [train_heads(table, [lanes[index]])[0] for index in compared]
    return [_bytes(heads) for heads in alone], [_bytes(together[index]) for index in compared]


def _first_images(table: RoutingTable, batch_size: int) -> RoutingTable:
    """The table of one batch of images; more would only take longer."""
    count = min(batch_size, table.num_images)
    arrays = {name: array if name == "madds" else array[:count] for name, array in table.arrays().items()}
    return RoutingTable.from_arrays(arrays, table.meta())


def _bytes(heads: Sequence[Head]) -> bytes:
    """All weights of a router, as bytes."""
    return b"".join(part.numpy().tobytes() for head in heads for part in head.tensors("").values())
