"""The start of Ray, or of a connection to it, within a time limit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dsnet.errors import PreflightError
from orchestration.workers.ray_folder import (
    check_ray_folder,
    facts_for_message,
    mark_sessions,
    prune_sessions,
    ray_folder,
)

LIMIT = "ray.start_timeout_s"


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
        Exception: what `connect` raised.
    """
    is_done, is_over = threading.Event(), threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            connect()
        except BaseException as error:  # noqa: BLE001 - raised by the caller's thread
            failures.append(error)
        is_done.set()
        if not failures:
            is_over.wait()

    folder, is_local = ray_folder(), object_store_mib is not None
    if object_store_mib is not None:
        prune_sessions(folder)
        check_ray_folder(folder, object_store_mib)
    threading.Thread(target=work, name="ray-session", daemon=True).start()
    try:
        is_in_time = is_done.wait(limit_s)
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


def _late(limit_s: float, *, is_local: bool) -> str:
    way_out = f"Raise {LIMIT} (it is {limit_s:g}) if this machine is slow or busy."
    if is_local:
        return f"Ray did not start within {limit_s:g} s. {way_out} Else {facts_for_message(ray_folder())}"
    return f"ray.address: the Ray cluster did not answer within {limit_s:g} s. {way_out}"


def _forget_start() -> None:
    """End what a start that failed has left, so that Ray can be started again in this process."""
    import ray

    ray.shutdown()
