"""The whole choice of sub-networks, from the networks that the method trains to the stored result.

Where networks are trained and candidates are scored is the caller's: in this process
(`dsnet.standalone`) or on Ray. Everything is kept in one folder, and a call continues there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing
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
from dsnet.stored.checkpoint import load_supernet, save_supernet
from dsnet.stored.names import FINAL
from dsnet.structure.data import held_out_images, num_held_out, order_batches, order_madds
from dsnet.structure.filters import Batches
from dsnet.structure.method import Base, Candidate, Score, StructureProblem, Trained, Trainings
from dsnet.structure.methods import structure_method
from dsnet.structure.scoring import split_holdout
from dsnet.structure.search import TRACE, Facilities, Scorer, find_structure, save_structure, sorted_start
from dsnet.structure.settings import BY_IMAGES
from dsnet.training.start import first_weights, load_start
from dsnet.training.train_cost import training_madds

BASES = "bases"
"""Folder of the networks that a method trains."""
START = "start"
"""End of the name of the start weights of a network that a search wants to be trained."""

HeldOut = tuple[UInt8[Tensor, "held_out channels height width"], Int64[Tensor, " held_out"]]


class _Scoring:
    """The scorer of the network that the search uses; it is set up when the first candidate is to
    be scored, and again when one is to be scored after its end."""

    def __init__(
        self,
        scorer: Callable[[Supernet, HeldOut], AbstractContextManager[Scorer]],
        network: Supernet,
        images: Callable[[], HeldOut],
    ) -> None:
        self._scorer = scorer
        self._network = network
        self._images = images
        self._context = ExitStack()
        self._score: Scorer | None = None

    def score(self, candidates: Sequence[Candidate]) -> Iterable[Score]:
        """Score candidates by the network."""
        if self._score is None:
            self._score = self._context.enter_context(self._scorer(self._network, self._images()))
        return self._score(candidates)

    def use(self, network: Supernet) -> None:
        """Score by another network."""
        self.close()
        self._network = network

    def close(self) -> None:
        """End the scorer; the next candidate sets up another one."""
        self._score = None
        self._context.close()


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
        if not num_held_out(self.problem, len(self.splits.train)):
            return self.splits, np.empty(0, dtype=np.int64)
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
        asked: list[Base] = []

        def images() -> HeldOut:
            return held_out_images(self.source, self.splits, held)

        with closing(_Scoring(self.scorer, start.supernet, images)) as scoring:

            def train(trainings: Trainings) -> None:
                scoring.close()  # its workers hold the cores on which the networks are trained
                asked.extend(each.base for each in trainings.networks)
                self._train_further(trainings, kept)

            facilities = Facilities(scoring.score, train, scoring.use)
            find = partial(find_structure, folder=self.folder, should_stop=self.should_stop)
            found = find(problem, start, facilities, fresh=fresh, trained=trained)
        if found is None:
            raise StoppedError("the search for sub-networks was stopped; its scores are kept")
        trainings = (*self.bases, *asked)
        costs = [training_madds(base.run, base.subnets, len(kept.train), problem.image_size) for base in trainings]
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
        self._train_side_by_side([(base, self.start) for base in self.bases], kept)

    def _train_further(self, trainings: Trainings, kept: Splits) -> None:
        """Train the networks that the search asks for, as far as they are not trained yet."""
        starts: list[tuple[Base, Path]] = []
        for each in trainings.networks:
            stem = self.folder / BASES / f"{each.base.name}-{START}"
            starts.append((each.base, stem))
            if not self._is_trained(each.base):
                stem.parent.mkdir(parents=True, exist_ok=True)
                save_supernet(stem, each.start)
        self._train_side_by_side(starts, kept)

    def _train_side_by_side(self, starts: Sequence[tuple[Base, Path | None]], kept: Splits) -> None:
        """Train networks, each from the stem of its start weights.

        Raises:
            NonFiniteLossError: trainings diverged; all the others are done.
        """
        with ThreadPoolExecutor(max(1, self.concurrent)) as pool:
            failures = list(pool.map(lambda start: self._failure(start[0], start[1], kept), starts))
        diverged = {base.name: failure for (base, _), failure in zip(starts, failures, strict=True) if failure}
        if diverged:
            told = "; ".join(f"{name}: {failure}" for name, failure in diverged.items())
            raise NonFiniteLossError(
                f"{told}. The other networks of the structure stage are trained, and a launch with the same settings does not train "
                "them again; lower supernet.train.lr"
            )

    def _train(self, base: Base, stem: Path | None, kept: Splits) -> Path:
        """Train one network unless it is trained; returns the stem of its weights."""
        folder = self.folder / BASES / base.name
        if not self._is_trained(base):
            self.train(base, folder, stem, kept)
        return folder / FINAL

    def _is_trained(self, base: Base) -> bool:
        return (self.folder / BASES / base.name / f"{FINAL}.json").is_file()

    def _failure(self, base: Base, stem: Path | None, kept: Splits) -> NonFiniteLossError | None:
        """Train one network; returns the error if it diverges, so that the others go on."""
        try:
            self._train(base, stem, kept)
        except NonFiniteLossError as error:
            return error
        return None
