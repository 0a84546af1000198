"""A Ray cluster for the length of a block: started here on 127.0.0.1, or joined by address.

Ray is imported inside functions: it takes a second, and reads part of its environment when it is
imported.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dsnet.arithmetic import MKL_MODE, users_mode
from dsnet.errors import ConfigError, PreflightError
from dsnet.import_path import WORKER_HOOK, child_variables
from orchestration.environment import prepare_environment
from orchestration.workers.cluster_processes import MARK, kill_marked, new_mark
from orchestration.workers.cluster_watch import ClusterWatch, watching
from orchestration.workers.joining import why_not_joined

LOCAL = "local"
SMALLEST_OBJECT_STORE_MIB = 75
SHUTDOWN_THREAD = "ray-shutdown"
SHUTDOWN_S = 4.0
"""Seconds that Ray may take to end its processes before they are killed."""
_ON_THIS_MACHINE = {
    # Seconds between Ray Train's checks for ended workers; the default, 2, is for large clusters.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    # No process that watches for a preemption of cloud machines.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Seconds between searches for new log files of workers, which nobody reads here. The default,
    # 0.5, takes 2 % of a core.
    "LOG_NAME_UPDATE_INTERVAL_S": "10",
}
"""Environment variables of Ray for a cluster that was started here, where the user has not set
them."""


@dataclass(frozen=True, kw_only=True)
class RaySettings:
    """Settings of the Ray cluster to start or join.

    Attributes:
        address: "local" starts one for this process; "auto" joins this machine's; else
            ray://HOST:PORT or HOST:PORT.
        num_cpus: CPUs of a local cluster; None = all that this process may use.
        object_store_mib: size of a local cluster's object store in MiB, >= 75. Ray's default is 30
            % of the memory.
    """

    address: str = LOCAL
    num_cpus: int | None = None
    object_store_mib: int = 200

    def __post_init__(self) -> None:
        if self.object_store_mib < SMALLEST_OBJECT_STORE_MIB:
            least = SMALLEST_OBJECT_STORE_MIB
            raise ConfigError(f"ray.object_store_mib is {self.object_store_mib}, but Ray needs {least} or more")
        if self.num_cpus is not None and self.num_cpus < 1:
            raise ConfigError(f"ray.num_cpus is {self.num_cpus}, but must be 1 or more")


@contextmanager
def ray_session(settings: RaySettings) -> Iterator[None]:
    """Connect to Ray for the length of the block; a cluster that was started for it is stopped at
    its end.

    Inside another session it uses that one and leaves it running.

    Raises:
        PreflightError: no cluster could be started, or none answers at the address.
        ClusterLostError: the block raised an error after the cluster was lost; see `check_cluster`.
    """
    if "ray" in sys.modules and "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in os.environ:
        raise RuntimeError("ray was imported before prepare_environment(): its listeners would be open to the network")
    prepare_environment()
    import ray

    if ray.is_initialized():
        yield
        return
    local = {name: os.environ.get(name, value) for name, value in _ON_THIS_MACHINE.items()}
    with variables_set(local if settings.address == LOCAL else {}):
        mark = new_mark() if settings.address == LOCAL else None
        try:
            with watching(ClusterWatch(mark=mark)) as watch:
                with _keeping_signal_handlers(), variables_set({} if mark is None else {MARK: mark}):
                    _connect(settings)
                _print_nothing()
                watch.observe_session(settings.address)
                yield
        finally:
            _shut_down(mark)


@contextmanager
def variables_set(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables inside the block; a local cluster and its workers inherit them."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _keeping_signal_handlers() -> Iterator[None]:
    """Restore the program's signal handlers after the block: with the handler that `ray.init` sets
    for SIGTERM, a sweep would end at once instead of stopping at its next step."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        if handler is not None:  # one that was not set by Python cannot be set again
            signal.signal(number, handler)


def _connect(settings: RaySettings) -> None:
    import ray
    from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR as HOOK
    from ray.exceptions import RayError

    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        if settings.address == LOCAL:
            # The hook of `runtime_env` is this variable; given as an option, it would keep Ray from
            # using the workers that it starts beforehand.
            with variables_set({**child_variables(), HOOK: WORKER_HOOK}):
                ray.init(
                    address=LOCAL,
                    num_cpus=settings.num_cpus or len(os.sched_getaffinity(0)),
                    object_store_memory=settings.object_store_mib * 2**20,
                    include_dashboard=False,
                    **quiet,
                )
        else:
            _check_reachable(settings.address)
            ray.init(address=settings.address, **_environment_of_workers(), **quiet)
    except (ConnectionError, RuntimeError, ValueError, OSError, RayError) as error:
        if settings.address != LOCAL:
            raise PreflightError(why_not_joined(settings.address, error)) from error
        first_line = str(error).strip().partition("\n")[0] or type(error).__name__
        raise PreflightError(f"Ray could not be started on this machine: {first_line}") from error


def _environment_of_workers(environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Options of `ray.init` for the workers of a cluster that is joined: a set-up hook, and MKL's
    mode if the user has set it here.

    Otherwise they have the environment of their own machine, and choose MKL's mode by its
    processor.
    """
    mode = users_mode(environ)
    variables = {} if mode is None else {"env_vars": {MKL_MODE: mode}}
    return {"runtime_env": {"worker_process_setup_hook": WORKER_HOOK, **variables}}


def _check_reachable(address: str, timeout_s: float = 5.0) -> None:
    """Raise OSError if nothing listens at HOST:PORT; Ray would end the whole process instead."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout_s).close()


def _print_nothing() -> None:
    """Keep Ray from printing on stdout, which is for data, that its raylet has ended; we say so."""
    from ray._private import worker

    worker._worker_logs_enabled = False


def _shut_down(mark: str | None) -> None:
    """Disconnect from Ray, and end all processes of a cluster that was started here. Ray's own call
    hangs if its GCS or raylet does; it then goes on in its thread."""
    import ray

    thread = threading.Thread(target=ray.shutdown, name=SHUTDOWN_THREAD, daemon=True)
    thread.start()
    thread.join(SHUTDOWN_S)
    if mark is not None:
        kill_marked(mark)
        thread.join(SHUTDOWN_S)


def shutdown_hangs() -> bool:
    """Whether Ray's shutdown has not returned; an orderly end of this process would wait for it."""
    return any(thread.name == SHUTDOWN_THREAD for thread in threading.enumerate())
