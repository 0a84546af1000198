"""Scores of candidates of a structure search on Ray actors."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsnet.arithmetic import fix_arithmetic
from dsnet.errors import DsnetError, StoppedError
from dsnet.storage_faults import storage_error
from dsnet.structure.method import Candidate, Score, Widths
from orchestration.workers.cluster_watch import LONGEST_WAIT_S, check_cluster
from orchestration.workers.life import Listener, Pulse
from orchestration.workers.runtime import cluster_cpus
from orchestration.workers.stalls import Stalls
from orchestration.workers.supernet import root_cause
from orchestration.workers.training_watch import StallRules

if TYPE_CHECKING:
    from dsnet.data.normalization import Normalization
    from dsnet.structure.search import Scorer

ACTOR_RETRIES = 2
"""Number of times that Ray starts a lost actor again, and repeats the score it was making."""

END_S = 5.0
"""Seconds that an actor may take for its last score when the search ends."""
END_WHEN_STOPPED_S = 1.0
"""The same after a stop request."""


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

    def score(self, widths: Widths, pulse: Pulse) -> Score:
        """The score of one candidate; `pulse` beats meanwhile."""
        with pulse.beating():
            return self._scorer.score(widths)

    def finish(self) -> None:
        """Do nothing; it ends after the score that is being made."""


@contextmanager
def ray_scorer(
    job: ScoringJob,
    number: int | None,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    stalls: StallRules | None = None,
) -> Iterator[Scorer]:
    """Scorer with actors of a connected Ray cluster, which start with the first candidate and end
    with the block.

    Args:
        job: the settings.
        number: largest number of actors; None: as many as the cluster has CPUs.
        should_stop: called twice a second while a score is waited for; True ends the wait.
        stalls: how silent actors are noticed; their candidates are scored by others. None =
            `StallRules()`.

    Raises:
        DsnetError: an actor fails, or is lost more than `ACTOR_RETRIES` times.
        StoppedError: a stop was requested.
        ClusterLostError: the cluster was lost.
    """
    actors = _Actors(job, number, should_stop, stalls if stalls is not None else StallRules())
    try:
        yield actors.score
    finally:
        actors.close()


@dataclass(frozen=True)
class _Scoring:
    """A candidate that an actor scores now."""

    index: int
    """Its place among the candidates."""
    actor: Any
    pulse: Pulse
    num_stalls: int


class _Actors:
    """The actors of one search."""

    def __init__(self, job: ScoringJob, number: int | None, should_stop: Callable[[], bool], rules: StallRules) -> None:
        self._job = job
        self._number = number
        self._should_stop = should_stop
        self._rules = rules
        self._stalls = Stalls(rules.limits, rules.tell)
        self._listener = Listener(rules.beat_s)
        self._idle: list[Any] = []
        self._running: dict[Any, _Scoring] = {}

    def score(self, candidates: Sequence[Candidate]) -> Iterator[Score]:
        """Score candidates; the scores come in their order."""
        check_cluster()
        self._start(len(candidates))
        waiting = deque((index, 0) for index in range(len(candidates)))
        scores: dict[int, Score] = {}
        try:
            for index in range(len(candidates)):
                while index not in scores:
                    while waiting and self._idle:
                        self._submit(*waiting.popleft(), candidates)
                    scores |= self._wait(waiting)
                yield scores.pop(index)
        finally:  # what is still running is not wanted any more; the actor does it before its next score
            self._idle += [scoring.actor for scoring in self._running.values()]
            self._running.clear()

    def _submit(self, index: int, num_stalls: int, candidates: Sequence[Candidate]) -> None:
        actor, pulse = self._idle.pop(), Pulse.new(self._rules.beat_s)
        widths: Any = candidates[index].widths
        self._stalls.begin(pulse, "a worker that scores candidates", num_stalls=num_stalls)
        self._listener.add(pulse)
        self._running[actor.score.remote(widths, pulse)] = _Scoring(index, actor, pulse, num_stalls)

    def _wait(self, waiting: deque[tuple[int, int]]) -> dict[int, Score]:
        """Wait a little for the next score; returns those that are there, by their places."""
        import ray

        ended, _ = ray.wait(list(self._running), num_returns=1, timeout=LONGEST_WAIT_S)
        if ended:
            return {self._running[ref].index: self._score_of(ref) for ref in ended}
        check_cluster()
        if self._should_stop():
            raise StoppedError("the search for sub-networks was stopped; its scores are kept")
        for scoring in self._running.values():
            if (silent_s := self._listener.silent_s(scoring.pulse)) is not None:
                self._stalls.hear(scoring.pulse, silent_s)
        overdue = set(self._stalls.overdue())
        for ref in [ref for ref, scoring in self._running.items() if scoring.pulse in overdue]:
            self._replace(ref, waiting)
        return {}

    def _score_of(self, ref: Any) -> Score:
        import ray
        from ray.exceptions import RayError, RayTaskError

        scoring = self._running[ref]
        try:
            score: Score = ray.get(ref)
        except RayTaskError as error:
            if (fault := storage_error(error)) is not None:
                raise fault from error
            cause = error.cause
            if isinstance(cause, DsnetError):
                raise cause from error
            raise DsnetError(f"a candidate could not be scored: {type(cause).__name__}: {cause}") from error
        except RayError as error:
            check_cluster()
            raise DsnetError(f"a worker that scores candidates was lost: {root_cause(error)}") from error
        del self._running[ref]
        self._listener.remove(scoring.pulse)
        self._stalls.end(scoring.pulse)
        self._idle.append(scoring.actor)
        return score

    def _replace(self, ref: Any, waiting: deque[tuple[int, int]]) -> None:
        """Give the candidate of a silent actor to a new one."""
        import ray

        scoring = self._running.pop(ref)
        self._listener.remove(scoring.pulse)
        self._stalls.drop(scoring.pulse)
        ray.kill(scoring.actor)
        if scoring.num_stalls >= ACTOR_RETRIES:
            raise DsnetError(
                f"{scoring.num_stalls + 1} workers that scored the same candidate gave no sign of life; look at the machines "
                "of the cluster, and launch again"
            )
        self._idle.append(self._make())
        waiting.appendleft((scoring.index, scoring.num_stalls + 1))

    def _start(self, wanted: int) -> None:
        """Start actors, as many as there is work and room for."""
        import ray

        room = int(ray.cluster_resources().get("GPU", 1)) if self._is_on_gpu else cluster_cpus()
        number = min(room, self._number or room, wanted)
        while len(self._idle) + len(self._running) < number:
            self._idle.append(self._make())

    @property
    def _is_on_gpu(self) -> bool:
        return self._job.device == "cuda"

    def _make(self) -> Any:
        import ray

        options: dict[str, Any] = {"num_cpus": 1, "num_gpus": int(self._is_on_gpu)}
        options |= {"max_restarts": ACTOR_RETRIES, "max_task_retries": ACTOR_RETRIES}
        make = ray.remote(**options)(ScoreWorker)
        return make.remote(self._job)

    def close(self) -> None:
        """End the actors, after the scores that they are making: Ray would print errors about
        those."""
        import ray

        self._listener.close()
        if self._idle:
            ends = [actor.finish.remote() for actor in self._idle]
            ray.wait(ends, num_returns=len(ends), timeout=END_WHEN_STOPPED_S if self._should_stop() else END_S)
        for actor in self._idle:
            ray.kill(actor)
        self._idle = []
