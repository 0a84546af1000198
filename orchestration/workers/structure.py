"""Scores of candidates of a structure search on Ray actors."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dsnet.arithmetic import fix_arithmetic
from dsnet.errors import ClusterLostError, DsnetError, PreflightError, StoppedError
from dsnet.storage_faults import storage_error
from dsnet.structure.method import Candidate, Score, Widths
from orchestration.workers.cluster_watch import LONGEST_WAIT_S, check_cluster
from orchestration.workers.life import Listener, Pulse
from orchestration.workers.nodes import PLACE_TIMEOUT_S, Need, cluster_nodes, no_place, refuse_without_room, room
from orchestration.workers.sent_network import SentNetwork, network_arrays
from orchestration.workers.stalls import Stalls
from orchestration.workers.supernet import root_cause
from orchestration.workers.training_watch import StallRules

if TYPE_CHECKING:
    from torch import Tensor

    from dsnet.data.normalization import Normalization
    from dsnet.network.supernet import Supernet
    from dsnet.structure.search import Scorer

RETRIES = 2
"""Number of times that a score is made again if its actor was lost, and if it was silent."""
END_S = 5.0
"""Seconds that an actor may take for its last score when the search ends."""
END_WHEN_STOPPED_S = 1.0
"""The same after a stop request."""
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

    def score(self, widths: Widths, pulse: Pulse) -> Score:
        """The score of one candidate; `pulse` beats meanwhile."""
        with pulse.beating():
            return self._scorer.score(widths)

    def finish(self) -> None:
        """Do nothing; it ends after the score that is being made."""


def scorer_need(device: str) -> Need:
    """What the cluster must have for one actor."""
    each = {"CPU": 1.0, **({"GPU": 1.0} if device == "cuda" else {})}
    remedy = "add a node that has them, or change supernet.device"
    return Need(what="supernet.structure", number=1, each=each, remedy=remedy)


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
        job: the network, the hold-out, and how they are run.
        number: largest number of actors; None: as many as the nodes have room for.
        should_stop: called twice a second while a score is waited for; True ends the wait.
        stalls: how silent actors are noticed; their candidates are scored by others. None =
            `StallRules()`.

    Raises:
        PreflightError: no node has room for an actor.
        DsnetError: an actor fails, or a score loses its actor more than `RETRIES` times.
        StoppedError: a stop was requested.
        ClusterLostError: the cluster was lost.
    """
    actors = _Actors(job, number, should_stop, stalls if stalls is not None else StallRules())
    try:
        yield actors.score
    finally:
        actors.close()


@dataclass(frozen=True)
class _Todo:
    """A candidate that waits."""

    index: int
    """Its place among the candidates."""
    num_stalls: int = 0
    num_lost: int = 0


@dataclass(frozen=True)
class _Scoring:
    """A candidate that an actor scores now."""

    todo: _Todo
    actor: Any
    pulse: Pulse


class _Actors:
    """The actors of one search."""

    def __init__(self, job: ScoringJob, number: int | None, should_stop: Callable[[], bool], rules: StallRules) -> None:
        self._job = job
        self._number = number
        self._should_stop = should_stop
        self._rules = rules
        self._need = scorer_need(job.device)
        self._stalls = Stalls(rules.limits, rules.tell)
        self._listener = Listener(rules.beat_s)
        self._sent: tuple[Any, ...] | None = None
        self._idle: list[Any] = []
        self._starting: dict[Any, tuple[Any, float]] = {}
        """Actor and time of its start, by the reference of its preparation."""
        self._running: dict[Any, _Scoring] = {}
        self._has_started = False
        """Whether any actor has started."""

    def score(self, candidates: Sequence[Candidate]) -> Iterator[Score]:
        """Score candidates; the scores come in their order."""
        check_cluster()
        self._fill_places(len(candidates))
        waiting = deque(_Todo(index) for index in range(len(candidates)))
        scores: dict[int, Score] = {}
        try:
            for index in range(len(candidates)):
                while index not in scores:
                    while waiting and self._idle:
                        self._submit(waiting.popleft(), candidates)
                    scores |= self._wait(waiting)
                yield scores.pop(index)
        finally:  # what is still running is not wanted any more; the actor does it before its next score
            self._idle += [scoring.actor for scoring in self._running.values()]
            self._running.clear()

    def _submit(self, todo: _Todo, candidates: Sequence[Candidate]) -> None:
        actor, pulse = self._idle.pop(), Pulse.new(self._rules.beat_s)
        widths: Any = candidates[todo.index].widths
        self._stalls.begin(pulse, "a worker that scores candidates", num_stalls=todo.num_stalls)
        self._listener.add(pulse)
        self._running[actor.score.remote(widths, pulse)] = _Scoring(todo, actor, pulse)

    def _wait(self, waiting: deque[_Todo]) -> dict[int, Score]:
        """Wait a little for the next score; returns those that are there, by their places."""
        import ray

        ended, _ = ray.wait([*self._running, *self._starting], num_returns=1, timeout=LONGEST_WAIT_S)
        if ended and ended[0] in self._starting:
            self._hear_start(ended[0])
            return {}
        if ended:
            return self._score_of(ended[0], waiting)
        check_cluster()
        if self._should_stop():
            raise StoppedError("the search for sub-networks was stopped; its scores are kept")
        for scoring in self._running.values():
            if (silent_s := self._listener.silent_s(scoring.pulse)) is not None:
                self._stalls.hear(scoring.pulse, silent_s)
        overdue = set(self._stalls.overdue())
        for ref in [ref for ref, scoring in self._running.items() if scoring.pulse in overdue]:
            self._replace_silent(ref, waiting)
        self._give_up_late_starts()
        return {}

    def _hear_start(self, ref: Any) -> None:
        import ray
        from ray.exceptions import RayError

        actor, _ = self._starting.pop(ref)
        try:
            self._asked(ref)
        except RayError as error:
            check_cluster()
            if self._num_actors() == 0:
                raise DsnetError(f"a worker that scores candidates did not start: {root_cause(error)}") from error
            ray.kill(actor)
            return
        self._has_started = True
        self._idle.append(actor)

    def _score_of(self, ref: Any, waiting: deque[_Todo]) -> dict[int, Score]:
        """The score of an ended call by its place; nothing if its actor was lost, and the candidate
        waits again."""
        from ray.exceptions import RayError

        scoring = self._running[ref]
        try:
            score: Score = self._asked(ref)
        except RayError as error:
            check_cluster()
            self._forget(ref)
            lost = replace(scoring.todo, num_lost=scoring.todo.num_lost + 1)
            if lost.num_lost > RETRIES:
                raise DsnetError(f"a worker that scores candidates was lost: {root_cause(error)}") from error
            self._fill_places(self._num_actors() + 1)
            waiting.appendleft(lost)
            return {}
        self._stalls.end(scoring.pulse)
        self._forget(ref)
        self._idle.append(scoring.actor)
        return {scoring.todo.index: score}

    def _asked(self, ref: Any) -> Any:
        """The result of a call; errors of our code come as they are, those of Ray as RayError."""
        import ray
        from ray.exceptions import RayTaskError

        try:
            return ray.get(ref)
        except RayTaskError as error:
            if (fault := storage_error(error)) is not None:
                raise fault from error
            cause = error.cause
            if isinstance(cause, DsnetError):
                raise cause from error
            raise DsnetError(f"a candidate could not be scored: {type(cause).__name__}: {cause}") from error

    def _forget(self, ref: Any) -> _Scoring:
        scoring = self._running.pop(ref)
        self._listener.remove(scoring.pulse)
        self._stalls.drop(scoring.pulse)
        return scoring

    def _replace_silent(self, ref: Any, waiting: deque[_Todo]) -> None:
        """Give the candidate of a silent actor to another one."""
        import ray

        scoring = self._forget(ref)
        ray.kill(scoring.actor)
        silent = replace(scoring.todo, num_stalls=scoring.todo.num_stalls + 1)
        if silent.num_stalls > RETRIES:
            raise DsnetError(
                f"{silent.num_stalls} workers that scored the same candidate gave no sign of life; look at the machines "
                "of the cluster, and launch again"
            )
        self._fill_places(self._num_actors() + 1)
        waiting.appendleft(silent)

    def _give_up_late_starts(self) -> None:
        """Go on without the actors that found no place: their node has left, or others use it."""
        import ray

        now_s = time.monotonic()
        late = [ref for ref, (_, began_s) in self._starting.items() if now_s - began_s > PLACE_TIMEOUT_S]
        for ref in late:
            ray.kill(self._starting.pop(ref)[0])
        if late and self._num_actors() == 0:
            told = no_place(self._need.each, "a worker that scores candidates", PLACE_TIMEOUT_S)
            raise ClusterLostError(told) if self._has_started else PreflightError(told)

    def _num_actors(self) -> int:
        return len(self._idle) + len(self._starting) + len(self._running)

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
        for _ in range(number - self._num_actors()):
            actor: Any = make.remote(*self._sent)
            self._starting[actor.prepare.remote()] = (actor, time.monotonic())

    def close(self) -> None:
        """End the actors, after the scores that they are making: Ray would print errors about
        those."""
        import ray

        self._listener.close()
        if self._idle:
            ends = [actor.finish.remote() for actor in self._idle]
            ray.wait(ends, num_returns=len(ends), timeout=END_WHEN_STOPPED_S if self._should_stop() else END_S)
        for actor in [*self._idle, *(actor for actor, _ in self._starting.values())]:
            ray.kill(actor)
        self._idle, self._starting, self._sent = [], {}, None
