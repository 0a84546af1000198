"""Trials on Ray: persistent actors that read the routing tables from the object store without a
copy.

A trial that raises or takes too long fails and is not repeated. A lost worker (a crash, the
out-of-memory killer, a lost node) is a fault of the machine: the trial is run again on a new
worker, and fails with the reason after too many losses. So is a worker that gives no sign of life
(stopped, or its machine hangs): that is told, and after a while a new worker runs its trials.

An actor runs several trials in one program if the trial function can. If such a batch fails as a
whole, its trials are run again one by one, so that only the trial that causes the failure fails.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dsnet.arithmetic import fix_arithmetic
from dsnet.errors import ClusterLostError, PreflightError, StoppedError
from dsnet.storage_faults import disk_error
from dsnet.wording import plural
from orchestration.workers.cluster_watch import LONGEST_WAIT_S, check_cluster
from orchestration.workers.life import BEAT_S, Listener, Pulse
from orchestration.workers.nodes import Need, Node, cluster_nodes, no_place, refuse_without_room, room
from orchestration.workers.stalls import StallLimits, Stalls
from search.front.points import trial_name
from search.study.runner import CohortFunction, TrialOutcome, TrialSpec, describe_error, divide, run_batch

if TYPE_CHECKING:  # they import torch, which not every trial function needs
    from ray.exceptions import RayError

    from orchestration.workers.self_check import StartCheck
    from search.gate_check import Finding

logger = logging.getLogger(__name__)

MakeCohortFunction = Callable[[Mapping[str, NDArray[Any]]], CohortFunction]
"""Builds the trial function inside a worker, once, from the shared arrays (read-only views of the
object store). Must be picklable: a module-level function, a class, or functools.partial of one."""

START_TIMEOUT_S = 120.0
MAX_STARTS_LOST = 3
MAX_STARTS_LATE = 2
STOP_PATIENCE_S = 2.0
"""Seconds that trials may go on after a stop request; those that need longer are abandoned."""
SILENT_BEATS = 3
"""A worker that has missed so many signs of life when its trial has used up its time is to blame,
and not the trial."""
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class TrialWorker:
    """The class of an actor: one process with its computing threads and one trial function."""

    def __init__(
        self,
        make_function: MakeCohortFunction,
        arrays: Mapping[str, NDArray[Any]],
        num_threads: int,
        look: Callable[[CohortFunction], Finding] | None = None,
    ) -> None:
        fix_arithmetic()
        self._num_threads = num_threads
        self._make_function = make_function
        self._arrays = arrays
        self._look = look
        self._is_one_by_one = False

    def prepare(self) -> tuple[int, Finding | None]:
        """Build the trial function and check it; separate from the constructor, so that its errors
        reach the driver unchanged.

        Returns:
            the trial function's number of lanes, and the finding of the check.
        """
        self._function = self._make_function(self._arrays)
        # On two shared cores a gate trial took 12 s with torch's default threads and 1 s with one.
        # Where the function does not import torch, the variables of `_start_actor` hold.
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(self._num_threads)
        finding = None if self._look is None else self._look(self._function)
        self._is_one_by_one = finding is not None and bool(finding.unequal)
        return self._function.lanes, finding

    def run(self, specs: Sequence[TrialSpec], pulse: Pulse) -> list[TrialOutcome] | None:
        """See `run_batch`; trials are run one after the other if the check found that training them
        together changes their results. `pulse` beats meanwhile."""
        with pulse.beating():
            if not self._is_one_by_one:
                return run_batch(self._function, specs)
            return [outcome for spec in specs for outcome in run_batch(self._function, [spec]) or ()]


@dataclass(frozen=True)
class _Batch:
    """Trials of one call."""

    specs: tuple[TrialSpec, ...]
    num_lost: int = 0
    """Number of times that these trials have lost their worker while they ran alone."""
    num_stalls: int = 0
    """Number of workers that have stalled at these trials."""

    @property
    def what(self) -> str:
        """Its name in messages."""
        first, further = trial_name(self.specs[0].slot), len(self.specs) - 1
        return f"the worker of {first}" + (f" and {plural(further, 'other trial')}" if further else "")

    def alone(self) -> list[_Batch]:
        """Its trials one by one, with no loss counted, because it is not known which of them ended
        the batch."""
        return [_Batch((spec,)) for spec in self.specs]


@dataclass(frozen=True)
class _Job:
    """The current work of an actor: trials, or its own start if `batch` is None."""

    actor: Any
    batch: _Batch | None
    pulse: Pulse
    started_s: float
    num_starts_lost: int = 0
    """Number of failed starts of the actors that this one replaces."""
    num_starts_late: int = 0
    """Number of those actors that have not started in time."""


@dataclass(frozen=True, kw_only=True)
class Actors:
    """Number of a runner's actors, and the resources of each."""

    number: int | None = None
    """None = as many as the cluster has room for."""
    threads: int = 1
    """Threads of computation of an actor, and CPUs that it takes, >= 1."""
    resources: Mapping[str, float] = field(default_factory=dict)
    """Further resources of an actor, > 0, under Ray's names: "GPU" (a share, 0.5 = two actors on
    one), "memory" (bytes), or a custom resource of the cluster. Ray counts them, but does not
    enforce them as limits."""

    @property
    def each(self) -> dict[str, float]:
        """What one actor takes on its node."""
        return {"CPU": float(self.threads), **self.resources}

    def need(self) -> Need:
        """What the cluster must have at least: a place for every actor, or for one."""
        named = "ray.trial_actors" if self.number is None else f"ray.trial_actors {self.number}"
        threads = "" if self.threads == 1 else f" with gate.end_to_end.threads {self.threads}"
        lower = [
            *(["ray.trial_actors"] if self.number is not None and self.number > 1 else []),
            *(["gate.end_to_end.threads"] if self.threads > 1 else []),
            *(f"ray.trial_resources.{name}" for name in self.resources),
        ]
        more = "add a node that has them" if self.resources else "raise ray.num_cpus, or add a node"
        remedy = f"lower {' or '.join(lower)}, or {more}" if lower else more
        return Need(what=named + threads, number=self.number or 1, each=self.each, remedy=remedy)

    def places(self, nodes: Sequence[Node]) -> int:
        """Number of actors that these nodes run at the same time, at most `number`."""
        most = room(nodes, self.each)
        return most if self.number is None else min(most, self.number)


@dataclass(frozen=True, kw_only=True)
class TrialLimits:
    """Time-out and number of retries of a trial."""

    timeout_s: float = 120.0
    """Seconds that one trial may take, > 0, and as many for each trial of a batch; its actor is
    then killed and replaced."""
    retries: int = 2
    """Number of times that a trial is run again if it lost its worker while alone, >= 0; so often
    too, if its worker stalled."""
    stalls: StallLimits = field(default_factory=StallLimits)
    """When the silence of a worker is told, and its trials given to another one."""

    @property
    def beat_s(self) -> float:
        """Seconds between two signs of life: several in the time of a trial."""
        return min(BEAT_S, self.timeout_s / (2 * SILENT_BEATS), self.stalls.tell_s / SILENT_BEATS)


class RayRunner:
    """Runs trials on Ray actors; to be used inside a `ray_session`.

    An actor has one batch at a time. Actors start with the first `run` and persist until `close`.
    """

    def __init__(
        self,
        make_function: MakeCohortFunction,
        *,
        arrays: Mapping[str, NDArray[Any]],
        actors: Actors | None = None,
        limits: TrialLimits | None = None,
        check: StartCheck | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        tell: Callable[[str], None] = logger.warning,
    ) -> None:
        """Keep the description of the work; nothing is started yet.

        Args:
            make_function: see `MakeCohortFunction`.
            arrays: put into the object store once and shared by all actors.
            actors: number and size of the actors; None = `Actors()`.
            limits: time-out and retries of a trial; None = `TrialLimits()`.
            check: check that every worker makes before its first trial; None = no check.
            should_stop: called twice a second while trials run; after True, trials that need longer
                than `STOP_PATIENCE_S` are abandoned.
            tell: called with a sentence about each stalled worker.
        """
        self._make_function = make_function
        self._arrays = arrays
        self._actors = actors if actors is not None else Actors()
        self._limits = limits if limits is not None else TrialLimits()
        self._check = check
        self._should_stop = should_stop
        self._tell = tell
        self._stalls = Stalls(self._limits.stalls, tell)
        self._listener: Listener | None = None
        self._arrays_ref: Any = None
        self._lanes: int | None = None
        """Lanes of the trial function; None until the first actor has built it."""
        self._idle: list[Any] = []
        self._jobs: dict[Any, _Job] = {}

    def run(self, specs: Sequence[TrialSpec]) -> Generator[TrialOutcome, None, None]:
        """Yield one outcome per spec as they come.

        Raises:
            PreflightError: the cluster has no room for the actors, or they fail to start.
            StorageError: a disk is full, read-only or failing; the trials that it ended have no
                outcome.
            StoppedError: a stop was requested, and the running trials need longer.
            ClusterLostError: the cluster was lost.
            Exception: the exception that `make_function` raised in a worker.
        """
        num_places, lanes = self._open()
        batches = (_Batch(batch) for batch in divide(specs, num_places, lanes))
        yield from self._work(deque(batches), None)

    def stream(self, take: Callable[[], Sequence[TrialSpec]]) -> Generator[TrialOutcome, None, None]:
        """Yield outcomes as they come, and give each free worker the trials that `take` returns;
        see `Runner.stream`.

        More trials than one program of the trial function takes are split into several batches,
        which are run before the next call of `take`. So are trials that lost their worker, and
        those of a batch that failed as a whole.

        Raises:
            PreflightError, StoppedError, ClusterLostError, Exception: as `run`.
        """
        _, lanes = self._open()
        yield from self._work(deque(), lambda: [_Batch(batch) for batch in divide(take(), 1, lanes)])

    def close(self) -> None:
        """Kill the actors and release the arrays."""
        import ray

        for actor in [*self._idle, *(job.actor for job in self._jobs.values())]:
            ray.kill(actor)
        self._idle.clear()
        self._jobs.clear()
        self._arrays_ref = None
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def _open(self) -> tuple[int, int]:
        """Start the actors and wait for the first; returns their number and the lanes of the trial
        function."""
        check_cluster()
        if self._listener is None:
            self._listener = Listener(self._limits.beat_s)
        num_places = self._fill_places()
        while self._lanes is None:
            self._wait(deque())
        return num_places, self._lanes

    def _work(
        self, waiting: deque[_Batch], take: Callable[[], Sequence[_Batch]] | None
    ) -> Generator[TrialOutcome, None, None]:
        """Run the waiting trials and those that `take` adds, until there are no more and nothing
        runs."""
        may_take = take is not None  # False after `take` returned nothing, until the next outcome
        try:
            while True:
                self._submit_waiting(waiting)
                while take is not None and may_take and self._idle:
                    waiting.extend(take())
                    may_take = bool(waiting)
                    self._submit_waiting(waiting)
                if not (waiting or may_take or any(job.batch is not None for job in self._jobs.values())):
                    return
                outcomes = self._wait(waiting)
                # Submit first, so that workers are busy while the caller handles the outcomes.
                self._submit_waiting(waiting)
                may_take = may_take or (take is not None and bool(outcomes))
                yield from outcomes
        finally:
            self._abandon_trials()

    def _fill_places(self) -> int:
        """Start the missing actors, and first put the arrays into the object store; returns the
        number of actors.

        Later calls have fewer actors where a node has left, and more where one was added.
        """
        import ray

        nodes = cluster_nodes()
        if self._arrays_ref is None:
            refuse_without_room(self._actors.need(), nodes)
            # numpy arrays are read where they lie in shared memory; torch tensors would be copied.
            self._arrays_ref = ray.put({name: np.ascontiguousarray(array) for name, array in self._arrays.items()})
        num_places = max(1, self._actors.places(nodes))
        for _ in range(num_places - self._num_actors()):
            self._start_actor()
        return num_places

    def _num_actors(self) -> int:
        return len(self._idle) + len(self._jobs)

    def _start_actor(self, num_starts_lost: int = 0, num_starts_late: int = 0) -> None:
        import ray

        variables = dict.fromkeys(_THREAD_VARIABLES, str(self._actors.threads))
        options = {
            "num_cpus": self._actors.threads,
            "max_restarts": 0,
            "max_task_retries": 0,
            "runtime_env": {"env_vars": variables},
            **_resource_options(self._actors.resources),
        }
        remote = ray.remote(TrialWorker).options(**options)
        actor: Any = remote.remote(
            self._make_function, self._arrays_ref, self._actors.threads, self._check and self._check.look
        )
        job = _Job(actor, None, Pulse.new(), time.monotonic(), num_starts_lost, num_starts_late)
        self._jobs[actor.prepare.remote()] = job

    def _start_another(self, num_starts_lost: int = 0) -> None:
        """Start an actor in place of one that is gone, if the nodes that are left have room for it:
        without its node, its successor would wait for ever."""
        if self._has_place():
            self._start_actor(num_starts_lost)
        else:
            self._tell(f"a machine has left the cluster; the trials go on with {plural(self._num_actors(), 'worker')}")

    def _has_place(self) -> bool:
        """Whether the nodes have room for one more actor; the only one may wait for it."""
        return self._num_actors() < max(1, self._actors.places(cluster_nodes()))

    def _submit_waiting(self, waiting: deque[_Batch]) -> None:
        while waiting and self._idle:
            actor, batch, pulse = self._idle.pop(), waiting.popleft(), Pulse.new(self._limits.beat_s)
            self._stalls.begin(pulse, batch.what, num_stalls=batch.num_stalls, size=len(batch.specs))
            if self._listener is not None:
                self._listener.add(pulse)
            self._jobs[actor.run.remote(batch.specs, pulse)] = _Job(actor, batch, pulse, time.monotonic())

    def _wait(self, waiting: deque[_Batch]) -> list[TrialOutcome]:
        """Wait for the next job to end, to stall or to run out of time; returns the outcomes that
        this decides.

        Raises:
            StoppedError: a stop was requested, and no job ended soon.
            ClusterLostError: the cluster was lost.
        """
        import ray

        stop_s: float | None = None
        while True:
            nearest_s = min(self._deadline_s(job) for job in self._jobs.values()) - time.monotonic()
            patience_s = max(0.0, min(LONGEST_WAIT_S, nearest_s))
            ended, _ = ray.wait(list(self._jobs), num_returns=1, timeout=patience_s)
            if ended:
                return self._finish(ended[0], waiting)
            check_cluster()
            if self._should_stop():
                stop_s = time.monotonic() if stop_s is None else stop_s
                if time.monotonic() - stop_s >= STOP_PATIENCE_S:
                    raise StoppedError("the search was stopped; its finished trials are kept")
            late = [ref for ref, job in self._jobs.items() if self._deadline_s(job) <= time.monotonic()]
            stalled = self._stalled(late)
            if late or stalled:
                found = [outcome for ref in stalled for outcome in self._replace_stalled(self._taken(ref), waiting)]
                timed_out = [ref for ref in late if ref not in stalled]
                return found + [outcome for ref in timed_out for outcome in self._time_out(self._taken(ref), waiting)]

    def _stalled(self, late: Sequence[Any]) -> list[Any]:
        """The jobs whose workers have been silent for too long; new stalls are told.

        Of the `late` jobs, which have used up their time, those whose workers are silent now.
        """
        for job in self._jobs.values():
            silent_s = None if self._listener is None else self._listener.silent_s(job.pulse)
            if silent_s is not None and job.batch is not None:
                self._stalls.hear(job.pulse, silent_s)
        overdue, silent_s = set(self._stalls.overdue()), SILENT_BEATS * self._limits.beat_s
        return [
            ref
            for ref, job in self._jobs.items()
            if job.pulse in overdue
            or (ref in late and job.batch is not None and self._stalls.silence_s(job.pulse) >= silent_s)
        ]

    def _taken(self, ref: Any, *, is_well: bool = False) -> _Job:
        """Remove a job; what it took counts if it ended well."""
        job = self._jobs.pop(ref)
        if self._listener is not None:
            self._listener.remove(job.pulse)
        if job.batch is not None:
            (self._stalls.end if is_well else self._stalls.drop)(job.pulse)
        return job

    def _deadline_s(self, job: _Job) -> float:
        if job.batch is None:
            return job.started_s + START_TIMEOUT_S
        return job.started_s + self._limits.timeout_s * len(job.batch.specs)

    def _finish(self, ref: Any, waiting: deque[_Batch]) -> list[TrialOutcome]:
        """Handle a job that ended, well or not; the result is empty if that decides no trial."""
        import ray
        from ray.exceptions import RayError

        job = self._jobs[ref]
        try:
            result = ray.get(ref)
        except RayError as error:
            return self._handle_error(self._taken(ref), error, waiting)
        self._taken(ref, is_well=True)
        self._idle.append(job.actor)
        if job.batch is None:
            self._lanes, finding = result
            if self._check is not None:
                self._check.hear(finding)
            return []
        if result is None:
            waiting.extendleft(reversed(job.batch.alone()))
            return []
        outcomes: list[TrialOutcome] = result
        return outcomes

    def _handle_error(self, job: _Job, error: RayError, waiting: deque[_Batch]) -> list[TrialOutcome]:
        """Handle a job that raised an exception, or lost its worker."""
        import ray
        from ray.exceptions import RayTaskError

        if (fault := disk_error(error)) is not None:  # also of Ray's folder and its object store
            raise fault from error
        if not isinstance(error, RayTaskError):
            check_cluster()
            return self._replace_lost(job, error, waiting)
        if job.batch is None:  # raised by Python code in a worker that keeps running
            ray.kill(job.actor)
            raise error.cause from error
        self._idle.append(job.actor)
        return self._fail(job, job.batch, describe_error(error.cause), waiting)

    def _fail(self, job: _Job, batch: _Batch, reason: str, waiting: deque[_Batch]) -> list[TrialOutcome]:
        """Handle a call without outcomes: a trial that ran alone has failed; the trials of a batch
        are queued one by one."""
        if len(batch.specs) > 1:
            waiting.extendleft(reversed(batch.alone()))
            return []
        return [TrialOutcome.failed(batch.specs[0].slot, reason, _seconds_of(job))]

    def _replace_lost(self, job: _Job, error: Exception, waiting: deque[_Batch]) -> list[TrialOutcome]:
        """Replace a lost actor, and queue its trials again; a trial that ran alone fails after its
        retries."""
        if job.batch is None:
            num_lost = job.num_starts_lost + 1
            if num_lost >= MAX_STARTS_LOST:
                raise PreflightError(
                    f"trial workers failed to start {num_lost} times in a row: {_cause_of_loss(error)}"
                )
            self._start_another(num_lost)
            return []
        self._start_another()
        num_lost = job.batch.num_lost + 1
        if len(job.batch.specs) == 1 and num_lost <= self._limits.retries:
            waiting.appendleft(_Batch(job.batch.specs, num_lost))
            return []
        return self._fail(job, job.batch, f"lost its worker {num_lost} times: {_cause_of_loss(error)}", waiting)

    def _replace_stalled(self, job: _Job, waiting: deque[_Batch]) -> list[TrialOutcome]:
        """Replace an actor that gives no sign of life, and queue its trials again; a trial that ran
        alone fails after its retries."""
        import ray

        assert job.batch is not None
        ray.kill(job.actor)  # its process is killed within seconds, stopped or not
        self._start_another()
        num_stalls = job.batch.num_stalls + 1
        if num_stalls <= self._limits.retries:
            waiting.appendleft(replace(job.batch, num_stalls=num_stalls))
            return []
        return self._fail(job, job.batch, f"its worker gave no sign of life {num_stalls} times", waiting)

    def _time_out(self, job: _Job, waiting: deque[_Batch]) -> list[TrialOutcome]:
        import ray

        ray.kill(job.actor)
        if job.batch is None:
            num_late = job.num_starts_late + 1
            has_room = self._num_actors() < self._actors.places(cluster_nodes())
            if num_late < MAX_STARTS_LATE and has_room:
                self._tell(f"a trial worker did not start within {START_TIMEOUT_S:g} s; another one is started")
                self._start_actor(job.num_starts_lost, num_late)
                return []
            if self._num_actors() > 0:
                self._tell(f"a trial worker found no place within {START_TIMEOUT_S:g} s; the others go on")
                return []
            told = no_place(self._actors.each, "a trial worker", START_TIMEOUT_S)
            if has_room:
                told = (
                    f"a trial worker did not start within {START_TIMEOUT_S:g} s, {num_late} times in a row: the cluster is full or "
                    "too slow; lower ray.trial_actors"
                )
            raise PreflightError(told) if self._lanes is None else ClusterLostError(told)
        self._start_another()
        return self._fail(job, job.batch, f"time-out after {self._limits.timeout_s:g} s", waiting)

    def _abandon_trials(self) -> None:
        """Kill the actors whose trials are no longer wanted; the next `run` starts new ones."""
        import ray

        for ref, job in list(self._jobs.items()):
            if job.batch is not None:
                self._taken(ref)
                ray.kill(job.actor)


def _resource_options(resources: Mapping[str, float]) -> dict[str, Any]:
    """Resources as options of an actor: Ray has options of their own for GPU and memory, and one
    for all others."""
    own = {"GPU": "num_gpus", "memory": "memory"}
    options: dict[str, Any] = {own[name]: amount for name, amount in resources.items() if name in own}
    named = {name: amount for name, amount in resources.items() if name not in own}
    return {**options, "resources": named} if named else options


def _seconds_of(job: _Job) -> float:
    return time.monotonic() - job.started_s


def _cause_of_loss(error: Exception) -> str:
    """The reason for the loss of a worker in one line, from Ray's long messages."""
    from ray.exceptions import NodeDiedError, OutOfMemoryError

    if isinstance(error, OutOfMemoryError) or "low on memory" in str(error):
        return "killed because the machine ran out of memory"
    if isinstance(error, NodeDiedError):
        return "its machine left the cluster"
    return f"its process ended unexpectedly ({type(error).__name__})"
