"""Trials on Ray: warm actors that read the routing tables from the object store without a copy.

Whose fault a failure is decides what happens. An exception, or a trial that takes too long, is the trial's own: it
fails and is not tried again. A lost worker (a crash, the out-of-memory killer, a lost node) is the machine's: the trial
is run again on a new worker, and fails with the reason when that has happened too often.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsnet.errors import PreflightError
from search.runner import TrialFunction, TrialOutcome, TrialSpec, describe_error, outcome_from

MakeTrialFunction = Callable[[Mapping[str, NDArray[Any]]], TrialFunction]
"""Builds the trial function inside a worker, once, from the shared arrays (read-only views of the object store). Must
be picklable: a module-level function, a class, or functools.partial of one."""

START_TIMEOUT_S = 120.0
MAX_STARTS_LOST = 3
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


class TrialWorker:
    """What runs inside an actor: one process, one thread of computation, one trial function."""

    def __init__(self, make_function: MakeTrialFunction, arrays: Mapping[str, NDArray[Any]]) -> None:
        # On two shared cores a gate trial took 12 s with torch's default threads and 1 s with one.
        import torch

        torch.set_num_threads(1)
        self._make_function = make_function
        self._arrays = arrays

    def prepare(self) -> None:
        """Build the trial function; apart from the constructor, so that its own errors reach the driver as they are."""
        self._function = self._make_function(self._arrays)

    def run(self, spec: TrialSpec) -> TrialOutcome:
        return outcome_from(self._function, spec)


@dataclass(frozen=True)
class _Job:
    """What an actor is busy with: a trial, or (spec is None) its own start."""

    actor: Any
    spec: TrialSpec | None
    num_lost: int
    """How often this trial, or the start of this place's actor, has lost its worker before."""
    started_s: float


@dataclass(frozen=True)
class _Waiting:
    spec: TrialSpec
    num_lost: int = 0


class RayRunner:
    """Runs trials on actors of one CPU each; to be used inside a `ray_session`.

    An actor has one trial at a time, so that a time-out or a crash concerns one trial only. Actors start with the first
    `run` and stay warm until `close`.
    """

    def __init__(
        self,
        make_function: MakeTrialFunction,
        *,
        arrays: Mapping[str, NDArray[Any]],
        num_actors: int | None = None,
        timeout_s: float = 120.0,
        retries: int = 2,
    ) -> None:
        """Take the work's description; nothing is started yet.

        Args:
            make_function: see `MakeTrialFunction`.
            arrays: put into the object store once and shared by all actors.
            num_actors: None = one per CPU of the cluster.
            timeout_s: seconds that one trial may take, > 0; its actor is then killed and replaced.
            retries: how often a trial whose worker was lost is run again, >= 0.
        """
        self._make_function = make_function
        self._arrays = arrays
        self._num_actors = num_actors
        self._timeout_s = timeout_s
        self._retries = retries
        self._arrays_ref: Any = None
        self._idle: list[Any] = []
        self._jobs: dict[Any, _Job] = {}

    def run(self, specs: Sequence[TrialSpec]) -> Generator[TrialOutcome, None, None]:
        """Yield one outcome per spec as they come.

        Raises:
            PreflightError: the cluster has no room for the actors, or they die while they start.
            Exception: what `make_function` raised in a worker.
        """
        self._fill_places()
        waiting = deque(_Waiting(spec) for spec in specs)
        try:
            while waiting or any(job.spec is not None for job in self._jobs.values()):
                while waiting and self._idle:
                    self._submit(waiting.popleft())
                yield from self._wait(waiting)
        finally:
            self._abandon_trials()

    def close(self) -> None:
        """Kill the actors and release the arrays."""
        import ray

        for actor in [*self._idle, *(job.actor for job in self._jobs.values())]:
            ray.kill(actor)
        self._idle.clear()
        self._jobs.clear()
        self._arrays_ref = None

    def _fill_places(self) -> None:
        """Start the actors that are missing; the first time, put the arrays into the object store too."""
        import ray

        num_cpus = int(ray.cluster_resources().get("CPU", 0))
        num_actors = self._num_actors or num_cpus
        if not 1 <= num_actors <= num_cpus:
            raise PreflightError(
                f"ray.trial_actors is {num_actors}, but the cluster has {num_cpus} CPUs and each actor takes one; "
                "lower ray.trial_actors or raise ray.num_cpus"
            )
        if self._arrays_ref is None:
            # numpy arrays are read where they lie in shared memory; torch tensors would be copied.
            self._arrays_ref = ray.put({name: np.ascontiguousarray(array) for name, array in self._arrays.items()})
        for _ in range(num_actors - len(self._idle) - len(self._jobs)):
            self._start_actor(num_lost=0)

    def _start_actor(self, num_lost: int) -> None:
        import ray

        options = {"num_cpus": 1, "max_restarts": 0, "max_task_retries": 0, "runtime_env": {"env_vars": _ONE_THREAD}}
        actor: Any = ray.remote(TrialWorker).options(**options).remote(self._make_function, self._arrays_ref)
        self._jobs[actor.prepare.remote()] = _Job(actor, None, num_lost, time.monotonic())

    def _submit(self, waiting: _Waiting) -> None:
        actor = self._idle.pop()
        job = _Job(actor, waiting.spec, waiting.num_lost, time.monotonic())
        self._jobs[actor.run.remote(waiting.spec)] = job

    def _wait(self, waiting: deque[_Waiting]) -> Generator[TrialOutcome, None, None]:
        """Wait for the next job to end or to run out of time; yield what is decided by it."""
        import ray

        nearest_s = min(self._deadline_s(job) for job in self._jobs.values())
        ended, _ = ray.wait(list(self._jobs), num_returns=1, timeout=max(0.0, nearest_s - time.monotonic()))
        if ended:
            outcome = self._finish(ended[0], waiting)
            if outcome is not None:
                yield outcome
            return
        now_s = time.monotonic()
        for ref in [ref for ref, job in self._jobs.items() if self._deadline_s(job) <= now_s]:
            yield self._time_out(self._jobs.pop(ref))

    def _deadline_s(self, job: _Job) -> float:
        return job.started_s + (START_TIMEOUT_S if job.spec is None else self._timeout_s)

    def _finish(self, ref: Any, waiting: deque[_Waiting]) -> TrialOutcome | None:
        """Take in a job that ended, well or not; None where that decides no trial."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        job = self._jobs.pop(ref)
        try:
            outcome: TrialOutcome | None = ray.get(ref)
        except RayTaskError as error:  # raised by Python code in a worker that lives on
            if job.spec is None:
                ray.kill(job.actor)
                raise error.cause from error
            outcome = TrialOutcome.failed(job.spec.slot, describe_error(error.cause), _seconds_of(job))
        except RayError as error:
            return self._replace_lost(job, error, waiting)
        self._idle.append(job.actor)
        return outcome

    def _replace_lost(self, job: _Job, error: Exception, waiting: deque[_Waiting]) -> TrialOutcome | None:
        """Put a new actor in the place of a lost one, and its trial back in the queue, or fail it."""
        num_lost = job.num_lost + 1
        if job.spec is None:
            if num_lost >= MAX_STARTS_LOST:
                raise PreflightError(
                    f"trial workers die while they start, {num_lost} times now: {_cause_of_loss(error)}"
                )
            self._start_actor(num_lost)
            return None
        self._start_actor(num_lost=0)
        if num_lost <= self._retries:
            waiting.appendleft(_Waiting(job.spec, num_lost))
            return None
        return TrialOutcome.failed(
            job.spec.slot, f"lost its worker {num_lost} times: {_cause_of_loss(error)}", _seconds_of(job)
        )

    def _time_out(self, job: _Job) -> TrialOutcome:
        import ray

        ray.kill(job.actor)
        if job.spec is None:
            raise PreflightError(
                f"a trial worker did not start within {START_TIMEOUT_S:g} s: the cluster is full or too slow"
            )
        self._start_actor(num_lost=0)
        return TrialOutcome.failed(job.spec.slot, f"time-out after {self._timeout_s:g} s", _seconds_of(job))

    def _abandon_trials(self) -> None:
        """Kill the actors whose trial nobody waits for any more; the next `run` fills their places."""
        import ray

        for ref, job in list(self._jobs.items()):
            if job.spec is not None:
                del self._jobs[ref]
                ray.kill(job.actor)


def _seconds_of(job: _Job) -> float:
    return time.monotonic() - job.started_s


def _cause_of_loss(error: Exception) -> str:
    """One line on why a worker was lost, from Ray's page-long messages."""
    from ray.exceptions import NodeDiedError, OutOfMemoryError

    if isinstance(error, OutOfMemoryError) or "low on memory" in str(error):
        return "killed because the machine ran out of memory"
    if isinstance(error, NodeDiedError):
        return "its machine left the cluster"
    return f"the process died ({type(error).__name__})"
