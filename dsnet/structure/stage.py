"""The whole choice of sub-networks, from the networks that the method trains to the stored result.

Where networks are trained and candidates are scored is the caller's: in this process
(`dsnet.standalone`) or on Ray. Everything is kept in one folder, and a call continues there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8
from torch import Tensor

from dsnet.data.sources import ImageSource
from dsnet.data.splits import Splits
from dsnet.errors import NonFiniteLossError, StoppedError
from dsnet.network.supernet import Supernet
from dsnet.stored.checkpoint import load_supernet
from dsnet.structure.data import held_out_images, order_batches, order_madds
from dsnet.structure.filters import Batches
from dsnet.structure.method import Base, StructureProblem, Trained
from dsnet.structure.methods import structure_method
from dsnet.structure.scoring import split_holdout
from dsnet.structure.search import TRACE, Scorer, find_structure, save_structure, sorted_start
from dsnet.structure.settings import BY_IMAGES
from dsnet.training.start import first_weights, load_start
from dsnet.training.supernet import FINAL
from dsnet.training.train_cost import training_madds

BASES = "bases"
"""Folder of the networks that a method trains."""

HeldOut = tuple[UInt8[Tensor, "held_out channels height width"], Int64[Tensor, " held_out"]]


@dataclass(frozen=True)
class StructureWork:
    """A choice of sub-networks, and the ways to train networks and to score candidates."""

    problem: StructureProblem
    source: ImageSource
    splits: Splits
    start: Path | None
    """The checkpoint of the weights with which the sweep begins; None for fresh ones."""
    folder: Path
    train: Callable[[Base, Path, Path | None, Splits], object]
    """Function (network, its folder, stem of its start weights or None, splits without the
    hold-out) that trains it; called only for networks whose folder has no final checkpoint."""
    scorer: Callable[[Supernet, HeldOut], AbstractContextManager[Scorer]]
    """Function (network, images and labels of the hold-out) -> a context with its scorer."""
    should_stop: Callable[[], bool]
    concurrent: int = 1
    """Number of networks that `train` trains at a time, where none starts from another one."""

    @cached_property
    def bases(self) -> tuple[Base, ...]:
        """The networks that the method trains."""
        return structure_method(self.problem.settings.method).bases(self.problem)

    @cached_property
    def _divided(self) -> tuple[Splits, Int64[np.ndarray, " held_out"]]:
        """The splits with the images of `train` that are not held out, and the ids of those that
        are."""
        labels = self.source.labels.numpy()[self.splits.train]
        kept, held = split_holdout(self.splits.train, labels, self.problem.settings.holdout, self.problem.seed)
        return replace(self.splits, train=kept), held

    def choose(self) -> Sequence[Path]:
        """Train what the method needs, search, and write the result; returns its files.

        Raises:
            StoppedError: it was stopped; another call continues.
            CheckpointError: the folder holds the work of another choice, or is damaged.
            ConfigError: the sub-networks that were found do not fit.
            NonFiniteLossError: the training of a network diverged; the message names it where
                there are several.
        """
        problem = self.problem
        kept, held = self._divided
        self._train_all(kept)

        def batches() -> Batches:
            return order_batches(self.source, kept, problem.run)

        network = self._trained(self.bases[-1].name) if self.bases else self._first()
        start = sorted_start(problem, network, batches() if problem.settings.order in BY_IMAGES else ())
        trained = Trained(self._trained, batches)
        fresh = self._first() if self.bases and problem.settings.start == "fresh" else None
        with self.scorer(start.supernet, held_out_images(self.source, self.splits, held)) as score:
            find = partial(find_structure, folder=self.folder, should_stop=self.should_stop)
            found = find(problem, start, score, fresh=fresh, trained=trained)
        if found is None:
            raise StoppedError("the search for sub-networks was stopped; its scores are kept")
        costs = [training_madds(base.run, base.subnets, len(kept.train), problem.image_size) for base in self.bases]
        costs.append(order_madds(problem, len(kept.train)))
        facts = {"train_madds": sum(costs), "origin": dict(problem.run.origin)}
        stem = save_structure(self.folder, replace(found, summary={**found.summary, **facts}))
        return [*(stem.with_name(stem.name + suffix) for suffix in (".safetensors", ".json")), self.folder / TRACE]

    def _first(self) -> Supernet:
        """The network with the weights with which the sweep begins."""
        start = None if self.start is None else load_start(self.start)
        return first_weights(self.problem.subnets, self.problem.seed, start)[0]

    def _trained(self, name: str) -> Supernet:
        """A network that the method has trained."""
        return load_supernet(self.folder / BASES / name / FINAL)[0].eval()

    def _train_all(self, kept: Splits) -> None:
        """Train the networks of the method that are not trained yet."""
        if any(base.follows for base in self.bases):
            stem = self.start
            for base in self.bases:
                stem = self._train(base, stem if base.follows else self.start, kept)
            return
        with ThreadPoolExecutor(max(1, self.concurrent)) as pool:
            failures = list(pool.map(lambda base: self._failure(base, kept), self.bases))
        diverged = {base.name: failure for base, failure in zip(self.bases, failures, strict=True) if failure}
        if diverged:
            told = "; ".join(f"{name}: {failure}" for name, failure in diverged.items())
            raise NonFiniteLossError(
                f"{told}. The other networks of the structure stage are trained, and a launch with the same settings does not train "
                "them again; lower supernet.train.lr"
            )

    def _train(self, base: Base, stem: Path | None, kept: Splits) -> Path:
        """Train one network unless it is trained; returns the stem of its weights."""
        folder = self.folder / BASES / base.name
        if not (folder / f"{FINAL}.json").is_file():
            self.train(base, folder, stem, kept)
        return folder / FINAL

    def _failure(self, base: Base, kept: Splits) -> NonFiniteLossError | None:
        """Train one network that starts as the sweep does; returns the error if it diverges, so
        that the others go on."""
        try:
            self._train(base, self.start, kept)
        except NonFiniteLossError as error:
            return error
        return None
