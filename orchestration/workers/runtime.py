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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from dsnet.arithmetic import MKL_MODE, users_mode
from dsnet.errors import ConfigError, PreflightError
from dsnet.import_path import WORKER_HOOK, child_variables
from dsnet.wording import first_line
from orchestration.environment import prepare_environment
from orchestration.workers.cluster_processes import MARK, kill_marked, new_mark
from orchestration.workers.cluster_watch import ClusterWatch, watching
from orchestration.workers.joining import CLIENT, why_not_joined
from orchestration.workers.ray_folder import facts_for_message, ray_folder, token_variables
from orchestration.workers.ray_start import START_THREAD, started_in_time

LOCAL = "local"
SMALLEST_OBJECT_STORE_MIB = 75
SHUTDOWN_THREAD = "ray-shutdown"
SIDE_THREAD = "ray-side-"
"""Beginning of the names of the threads that call Ray beside the main thread."""
SIDE_THREAD_S = 1.0
"""Seconds that such a thread may take to end after its work was given up."""
SHUTDOWN_S = 2.5
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
        start_timeout_s: seconds that starting or joining it may take, > 0.
    """

    address: str = LOCAL
    num_cpus: int | None = None
    object_store_mib: int = 200
    start_timeout_s: float = 120.0

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
    local |= token_variables()
    with variables_set(local if settings.address == LOCAL else {}):
        is_local = settings.address == LOCAL
        mark, store_mib = (new_mark(), settings.object_store_mib) if is_local else (None, None)
        connect = partial(_connect, settings, mark)
        handlers = _signal_handlers()
        with (
            watching(ClusterWatch(mark=mark)) as watch,
            started_in_time(connect, settings.start_timeout_s, store_mib),
        ):
            _set_again(handlers)
            try:
                _print_nothing()
                watch.observe_session(settings.address)
                yield
            finally:
                watch.finish()
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


def _signal_handlers() -> dict[int, Any]:
    """The program's handlers of stop signals; empty outside of the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}


def _set_again(handlers: Mapping[int, Any]) -> None:
    """Set the handlers that were there before Ray started.

    Ray's own handler of SIGTERM, in C++, prints a stack, calls ours, and aborts the process three
    seconds later.
    """
    for number, handler in handlers.items():
        if handler is not None:  # one that was not set by Python cannot be set again
            signal.signal(number, handler)


def _connect(settings: RaySettings, mark: str | None = None) -> None:
    """Start or join a cluster; `mark` is that of the processes of one that is started."""
    import ray
    from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR as HOOK

    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        if settings.address == LOCAL:
            # The hook of `runtime_env` is this variable; given as an option, it would keep Ray from
            # using the workers that it starts beforehand.
            with variables_set({**child_variables(), HOOK: WORKER_HOOK, **({} if mark is None else {MARK: mark})}):
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
    except Exception as error:  # Ray raises plain exceptions too
        if settings.address != LOCAL:
            raise PreflightError(why_not_joined(settings.address, error)) from error
        facts = facts_for_message(ray_folder())
        message = f"Ray could not be started on this machine: {first_line(error).rstrip('.')}; {facts}"
        raise PreflightError(message) from error


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
    host, colon, port = address.removeprefix(CLIENT).rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout_s).close()


def _print_nothing() -> None:
    """Keep Ray from printing on stdout, which is for data, that its raylet has ended; we say so."""
    from ray._private import worker

    worker._worker_logs_enabled = False


def _shut_down(mark: str | None) -> None:
    """Disconnect from Ray, and end all processes of a cluster that was started here.

    Ray's own call hangs if its GCS or raylet does; it then goes on in its thread. While a side
    thread uses Ray it is not called at all: Ray would end this process, from C++, with exit code 1.
    """
    import ray

    if _side_threads():
        if mark is not None:
            kill_marked(mark)
        for side in _side_threads():
            side.join(SIDE_THREAD_S)
        if _side_threads():
            return
    thread = threading.Thread(target=ray.shutdown, name=SHUTDOWN_THREAD, daemon=True)
    thread.start()
    thread.join(SHUTDOWN_S)
    if mark is not None:
        kill_marked(mark)
        thread.join(SHUTDOWN_S)


def side_thread(target: Callable[[], None], name: str) -> threading.Thread:
    """A thread, not started yet, for a call of Ray that lasts as long as the work; it does not run
    in the main thread, where Ray would replace our handler of Ctrl-C."""
    return threading.Thread(target=target, name=f"{SIDE_THREAD}{name}", daemon=True)


def _side_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(SIDE_THREAD)]


def is_left_open() -> bool:
    """Whether Ray could not be started or shut down, because a call of it hangs; the process must
    then end without the interpreter's own end, which would wait for it."""
    hanging = (SHUTDOWN_THREAD, START_THREAD)
    return bool(_side_threads()) or any(thread.name in hanging for thread in threading.enumerate())
