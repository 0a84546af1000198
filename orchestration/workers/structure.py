"""Scores of candidates of a structure search on Ray actors."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dsnet.arithmetic import fix_arithmetic
from dsnet.errors import DsnetError, PreflightError
from dsnet.structure.method import Candidate, Score, Widths
from orchestration.workers.nodes import PLACE_TIMEOUT_S, Need, cluster_nodes, no_place, refuse_without_room, room
from orchestration.workers.sent_network import SentNetwork, network_arrays
from orchestration.workers.supernet import root_cause

if TYPE_CHECKING:
    from torch import Tensor

    from dsnet.data.normalization import Normalization
    from dsnet.network.supernet import Supernet
    from dsnet.structure.search import Scorer

RETRIES = 2
"""Number of times that a score is made again whose actor was lost."""
END_S = 5.0
"""Seconds that an actor may take for its last score when the search ends."""
IMAGES, LABELS = "images", "labels"


@dataclass(frozen=True)
class ScoringJob:
    """The network that is scored, and the hold-out."""

    network: Supernet
    images: Tensor
    """uint8 [N, C, H, W], on the CPU."""
    labels: Tensor
    """int64 [N], on the CPU."""
    normalization: Normalization
    device: str

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What all actors share through the object store."""
        return {**network_arrays(self.network), IMAGES: self.images.numpy(), LABELS: self.labels.numpy()}


class ScoreWorker:
    """An actor that scores candidates on the hold-out with one thread, so that no score depends on
    the number of actors."""

    def __init__(
        self, network: SentNetwork, arrays: Mapping[str, NDArray[Any]], normalization: Normalization, device: str
    ) -> None:
        fix_arithmetic()
        self._make = (network, arrays, normalization, device)

    def prepare(self) -> None:
        """Build the network; separate from the constructor, so that its errors reach the driver
        unchanged."""
        import torch

        from dsnet.structure.scoring import HoldOutScorer

        torch.set_num_threads(1)
        network, arrays, normalization, device = self._make
        images, labels = (torch.from_numpy(np.array(arrays[name])) for name in (IMAGES, LABELS))
        self._scorer = HoldOutScorer(network.build(arrays), images, labels, normalization, device=device)

    def score(self, widths: Widths) -> Score:
        """The score of one candidate."""
        return self._scorer.score(widths)

    def finish(self) -> None:
        """Do nothing; it ends after the score that is being made."""


def scorer_need(device: str) -> Need:
    """What the cluster must have for one actor."""
    each = {"CPU": 1.0, **({"GPU": 1.0} if device == "cuda" else {})}
    return Need(
        what="supernet.structure", number=1, each=each, remedy="add a node that has them, or change supernet.device"
    )


@contextmanager
def ray_scorer(job: ScoringJob, number: int | None) -> Iterator[Scorer]:
    """Scorer with actors of a connected Ray cluster, which start with the first candidate and end
    with the block.

    Args:
        job: the network, the hold-out, and how they are run.
        number: largest number of actors; None: as many as the nodes have room for.

    Raises:
        PreflightError: no node has room for an actor.
        DsnetError: an actor fails, or a score loses its actor more than `RETRIES` times.
    """
    actors = _Actors(job, number)
    try:
        yield actors.score
    finally:
        actors.close()


class _Actors:
    """The actors of one search."""

    def __init__(self, job: ScoringJob, number: int | None) -> None:
        self._job = job
        self._number = number
        self._need = scorer_need(job.device)
        self._sent: tuple[Any, ...] | None = None
        self._actors: list[Any] = []
        self._idle: deque[Any] = deque()
        self._calls: dict[Any, tuple[Any, int | None, float]] = {}
        """Actor, position of the candidate that it scores (None while it starts), and the time of
        the call, by the call's reference."""

    def score(self, candidates: Sequence[Candidate]) -> Iterator[Score]:
        """Score candidates; the scores come in their order."""
        self._fill_places(len(candidates))
        waiting, lost = deque(range(len(candidates))), Counter[int]()
        found: dict[int, Score] = {}
        for position in range(len(candidates)):
            while position not in found:
                while self._idle and waiting:
                    actor, number = self._idle.popleft(), waiting.popleft()
                    self._call(actor, actor.score.remote(candidates[number].widths), number)
                ended = self._next_ended()
                if ended is None:
                    continue
                number, score = ended
                if score is not None:
                    found[number] = score
                    continue
                waiting.appendleft(number)
                lost[number] += 1
                if lost[number] > RETRIES:
                    raise DsnetError(f"a worker that scores candidates was lost {lost[number]} times in a row")
            yield found.pop(position)

    def _next_ended(self) -> tuple[int, Score | None] | None:
        """Wait for the next call to end: its candidate's position and score, None for the score if
        its actor was lost; None if an actor has started, or did not."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        starts_s = [began_s for _, number, began_s in self._calls.values() if number is None]
        patience_s = min(starts_s) + PLACE_TIMEOUT_S - time.monotonic() if starts_s else None
        ended, _ = ray.wait(
            list(self._calls), num_returns=1, timeout=None if patience_s is None else max(0.0, patience_s)
        )
        if not ended:
            self._give_up_starting()
            return None
        actor, number, _ = self._calls.pop(ended[0])
        try:
            score: Score | None = ray.get(ended[0])
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, DsnetError):
                raise cause from error
            raise DsnetError(f"a candidate could not be scored: {type(cause).__name__}: {cause}") from error
        except RayError as error:
            self._actors.remove(actor)
            if number is None and not self._actors:
                raise DsnetError(f"a worker that scores candidates did not start: {root_cause(error)}") from error
            self._fill_places(len(self._actors) + 1)
            return None if number is None else (number, None)
        self._idle.append(actor)
        return None if number is None else (number, score)

    def _call(self, actor: Any, ref: Any, number: int | None) -> None:
        self._calls[ref] = (actor, number, time.monotonic())

    def _give_up_starting(self) -> None:
        """Go on without the actors that found no place: their node has left, or others use it."""
        import ray

        for ref, (actor, number, _) in list(self._calls.items()):
            if number is None:
                del self._calls[ref]
                self._actors.remove(actor)
                ray.kill(actor)
        if not self._actors:
            raise PreflightError(no_place(self._need.each, "a worker that scores candidates", PLACE_TIMEOUT_S))

    def _fill_places(self, wanted: int) -> None:
        """Start actors, as many as there is work and room for, and at least one."""
        import ray

        nodes = cluster_nodes()
        if self._sent is None:
            refuse_without_room(self._need, nodes)
            job = self._job
            self._sent = (SentNetwork.of(job.network), ray.put(job.arrays()), job.normalization, job.device)
        places = room(nodes, self._need.each)
        number = max(1, min(places, self._number or places, wanted))
        options: dict[str, Any] = {"num_cpus": 1, "num_gpus": int(self._job.device == "cuda")}
        make: Any = ray.remote(**options, max_restarts=0, max_task_retries=0)(ScoreWorker)
        while len(self._actors) < number:
            actor: Any = make.remote(*self._sent)
            self._actors.append(actor)
            self._call(actor, actor.prepare.remote(), None)

    def close(self) -> None:
        """End the actors, after the scores that they are making: Ray would print errors about
        those."""
        import ray

        if self._actors:
            ends = [actor.finish.remote() for actor in self._actors]
            ray.wait(ends, num_returns=len(ends), timeout=END_S)
        for actor in self._actors:
            ray.kill(actor)
        self._actors, self._calls, self._sent = [], {}, None
        self._idle.clear()
