"""Scores of candidates of a structure search on Ray actors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsnet.arithmetic import fix_arithmetic
from dsnet.errors import DsnetError
from dsnet.storage_faults import storage_error
from dsnet.structure.method import Candidate, Score, Widths
from orchestration.workers.runtime import cluster_cpus
from orchestration.workers.supernet import root_cause

if TYPE_CHECKING:
    from dsnet.data.normalization import Normalization
    from dsnet.structure.search import Scorer

ACTOR_RETRIES = 2
"""Number of times that Ray starts a lost actor again, and repeats the score it was making."""

END_S = 5.0
"""Seconds that an actor may take for its last score when the search ends."""


@dataclass(frozen=True)
class ScoringJob:
    """Everything that a scorer needs; it can be pickled. Its files lie on storage that all workers
    share."""

    stem: Path
    """Stem of the checkpoint of the network that is scored."""
    images: Path
    """The hold-out: `images`, uint8 [N, C, H, W], and `labels`, int64 [N], in safetensors."""
    normalization: Normalization
    device: str


class ScoreWorker:
    """An actor that scores candidates on the hold-out with one thread, so that no score depends on
    the number of actors."""

    def __init__(self, job: ScoringJob) -> None:
        fix_arithmetic()
        import torch
        from safetensors.torch import load_file

        from dsnet.stored.checkpoint import load_supernet
        from dsnet.structure.scoring import HoldOutScorer

        torch.set_num_threads(1)
        supernet, _ = load_supernet(job.stem)
        held_out = load_file(job.images)
        self._scorer = HoldOutScorer(
            supernet, held_out["images"], held_out["labels"], job.normalization, device=job.device
        )

    def score(self, widths: Widths) -> Score:
        """The score of one candidate."""
        return self._scorer.score(widths)

    def finish(self) -> None:
        """Do nothing; it ends after the score that is being made."""


@contextmanager
def ray_scorer(job: ScoringJob, number: int | None) -> Iterator[Scorer]:
    """Scorer with actors of a connected Ray cluster, which start with the first candidate and end
    with the block.

    Args:
        job: the settings.
        number: largest number of actors; None: as many as the cluster has CPUs.

    Raises:
        DsnetError: an actor fails, or is lost more than `ACTOR_RETRIES` times.
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
        self._actors: list[Any] = []

    def score(self, candidates: Sequence[Candidate]) -> Iterator[Score]:
        """Score candidates; the scores come in their order."""
        from ray.exceptions import RayError, RayTaskError
        from ray.util import ActorPool

        pool = ActorPool(self._started(len(candidates)))
        widths: list[Any] = [candidate.widths for candidate in candidates]
        try:
            yield from pool.map(lambda actor, each: actor.score.remote(each), widths)
        except RayTaskError as error:
            if (fault := storage_error(error)) is not None:
                raise fault from error
            cause = error.cause
            if isinstance(cause, DsnetError):
                raise cause from error
            raise DsnetError(f"a candidate could not be scored: {type(cause).__name__}: {cause}") from error
        except RayError as error:
            raise DsnetError(f"a worker that scores candidates was lost: {root_cause(error)}") from error

    def _started(self, wanted: int) -> list[Any]:
        """The actors, as many as there is work for."""
        import ray

        on_gpu = self._job.device == "cuda"
        room = int(ray.cluster_resources().get("GPU", 1)) if on_gpu else cluster_cpus()
        number = min(room, self._number or room, wanted)
        options: dict[str, Any] = {"num_cpus": 1, "num_gpus": int(on_gpu)}
        options |= {"max_restarts": ACTOR_RETRIES, "max_task_retries": ACTOR_RETRIES}
        make = ray.remote(**options)(ScoreWorker)
        while len(self._actors) < number:
            self._actors.append(make.remote(self._job))
        return self._actors

    def close(self) -> None:
        """End the actors, after the scores that they are making: Ray would print errors about
        those."""
        import ray

        if self._actors:
            ends = [actor.finish.remote() for actor in self._actors]
            ray.wait(ends, num_returns=len(ends), timeout=END_S)
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []
