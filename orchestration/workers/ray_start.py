"""The start of Ray, or of a connection to it, within a time limit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dsnet.errors import ClusterLostError, PreflightError
from orchestration.workers.cluster_watch import LONGEST_WAIT_S, check_cluster, current_watch
from orchestration.workers.ray_folder import (
    check_ray_folder,
    facts_for_message,
    mark_sessions,
    prune_sessions,
    ray_folder,
)

LIMIT = "ray.start_timeout_s"
START_THREAD, SESSION_THREAD = "ray-start", "ray-session"
"""Name of the thread that connects, before and after it has done so."""


@contextmanager
def started_in_time(connect: Callable[[], None], limit_s: float, object_store_mib: int | None) -> Iterator[None]:
    """Connect to Ray in a thread that lives as long as the block: Linux ends the processes that a
    thread of Ray's driver has started when that thread ends.

    Args:
        connect: starts Ray, or joins a cluster.
        limit_s: seconds that it may take.
        object_store_mib: size of the object store of a cluster that is started on this machine;
            None: one is joined.

    Raises:
        PreflightError: Ray cannot start on this machine, or the limit is over. The thread cannot be
            ended then; it, and what it started, end with this process.
        ClusterLostError: a part of the cluster has ended meanwhile.
        Exception: what `connect` raised.
    """
    is_done, is_over = threading.Event(), threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            connect()
        except BaseException as error:  # noqa: BLE001 - raised by the caller's thread
            failures.append(error)
        threading.current_thread().name = SESSION_THREAD
        is_done.set()
        if not failures:
            is_over.wait()

    folder, is_local = ray_folder(), object_store_mib is not None
    if object_store_mib is not None:
        prune_sessions(folder)
        check_ray_folder(folder, object_store_mib)
    threading.Thread(target=work, name=START_THREAD, daemon=True).start()
    try:
        is_in_time = _wait(is_done, limit_s)
        if is_local:
            mark_sessions(folder)
        if not is_in_time:
            raise PreflightError(_late(limit_s, is_local=is_local))
        if failures:
            _forget_start()
            raise failures[0]
        yield
    finally:
        is_over.set()


def _wait(is_done: threading.Event, limit_s: float) -> bool:
    """Wait until Ray has started; returns whether it did within the limit.

    Raises:
        ClusterLostError: a part of it has ended meanwhile.
    """
    deadline_s = time.monotonic() + limit_s
    while not is_done.wait(max(0.0, min(LONGEST_WAIT_S, deadline_s - time.monotonic()))):
        if time.monotonic() >= deadline_s:
            return False
        try:
            check_cluster()
        except ClusterLostError:
            if (watch := current_watch()) is not None:
                watch.kill_cluster()
            raise
    return True


def _late(limit_s: float, *, is_local: bool) -> str:
    way_out = f"Raise {LIMIT} (it is {limit_s:g}) if this machine is slow or busy."
    if is_local:
        return f"Ray did not start within {limit_s:g} s. {way_out} Else {facts_for_message(ray_folder())}"
    return f"ray.address: the Ray cluster did not answer within {limit_s:g} s. {way_out}"


def _forget_start() -> None:
    """End what a start that failed has left, so that Ray can be started again in this process."""
    import ray

    ray.shutdown()
