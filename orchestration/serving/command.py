"""`dsnet-orch serve`: start Ray Serve with a bundle on 127.0.0.1, and end it at a signal."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from dsnet.deploy.bundle import check_bundle_examples
from dsnet.errors import ClusterLostError, NotFoundError, PreflightError
from orchestration.pipeline.signals import wait_for_stop
from orchestration.serving.served_bundle import opened
from orchestration.serving.settings import ServeSettings
from orchestration.tracking.server import LOOPBACK, free_port
from orchestration.workers.cluster_watch import LONGEST_WAIT_S, current_watch
from orchestration.workers.runtime import RaySettings, ray_session, side_thread

APPLICATION = "dsnet"
DEPLOYMENT = "classifier"
_PACKAGES = ("grpc", "grpc_reflection", "fastapi", "starlette", "uvicorn")
_NUM_FURTHER_CALLS = 32
"""Requests that a replica takes beside the images of its queue: to refuse them, and for its state
and its numbers."""
_STOP_S = 2.0
"""How long replicas may take to finish what they have begun."""
_END_S = 6.0
"""Seconds that Ray Serve may take to end the replicas."""
_MAX_ATTEMPTS = 3
"""How often a replica is started that fails at its start."""


def serve_until_stopped(path: Path, settings: ServeSettings, say: Callable[[str], None] = click.echo) -> None:
    """Serve a bundle until Ctrl-C, SIGTERM or SIGHUP, and print its address.

    Args:
        path: the bundle's folder.
        settings: address, batches, limits and budget.
        say: prints a line on stdout.

    Raises:
        ClusterLostError: Ray has ended.
        DsnetError: as `serving`.
    """
    click.echo("starting Ray Serve ...", err=True)
    with _sigterm_like_ctrl_c(), serving(path, settings) as url:
        example = f"curl --data-binary @photo.jpg {shlex.quote(url + '/predict')}"
        say(f"serving {path} at {url}   (try: {example}; stop it with Ctrl-C)")
        wait_for_stop(_check_ray)
        click.echo("stopping ...", err=True)


def _check_ray() -> None:
    """Raise ClusterLostError if Ray has ended under the server."""
    watch = current_watch()
    if watch is not None and (lost := watch.update()) is not None:
        raise ClusterLostError(f"Ray was lost: {lost}. The server has ended; start it again")


@contextmanager
def _sigterm_like_ctrl_c() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt, so that what was started is ended also while the server
    starts; by default Ray exits without waiting for its processes."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def serving(path: Path, settings: ServeSettings) -> Iterator[str]:
    """Serve a bundle for the length of the block.

    Args:
        path: the bundle's folder.
        settings: address, batches, limits and budget.

    Yields:
        The URL, once it answers.

    Raises:
        NotFoundError: no bundle there, or no operating point within the budget.
        ConfigError: two budgets, or one out of range.
        CheckpointError: the bundle cannot be read.
        VerificationError: it does not give the answers of its examples.
        PreflightError: packages are missing, or the server does not start.
    """
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise PreflightError(
            f"Ray Serve needs further packages ({', '.join(missing)}): pip install 'dsnet-orch[serve]'"
        )
    if not path.exists():
        raise NotFoundError(f"{path}: no such bundle; make one with: dsnet-orch export RUN --pick knee")
    check_bundle_examples(opened(path, settings))
    with ray_session(RaySettings(num_cpus=settings.replicas)):
        yield from _started(path.absolute(), settings)


def _started(path: Path, settings: ServeSettings) -> Iterator[str]:
    import ray
    from ray import serve

    from orchestration.serving.app import RETRY_AFTER_S, Classifier
    from orchestration.serving.metrics import Tally

    threads = settings.threads or max(1, len(os.sched_getaffinity(0)) // settings.replicas)
    port = free_port(settings.port)
    total = ray.remote(Tally).options(num_cpus=0, max_restarts=-1).remote()
    deployment: Any = serve.deployment(
        Classifier,
        name=DEPLOYMENT,
        num_replicas=settings.replicas,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=settings.max_queue + _NUM_FURTHER_CALLS,
        max_queued_requests=settings.max_queue,
        backpressure_config={"status_code": 503, "retry_after_s": RETRY_AFTER_S},
        graceful_shutdown_timeout_s=_STOP_S,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=2.0,
        max_constructor_retry_count=_MAX_ATTEMPTS,
    )
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    quiet = {"log_level": "ERROR", "enable_access_log": False}
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": LOOPBACK, "port": port}, logging_config=quiet)
        application = deployment.bind(path, settings, threads, total)
        serve.run(application, name=APPLICATION, route_prefix="/", logging_config=quiet)
    except RuntimeError as error:
        raise PreflightError(f"the server did not start: {error}") from error
    try:
        yield f"http://{LOOPBACK}:{port}"
    finally:
        _end_application()


def _end_application() -> None:
    """Let the replicas finish the requests that they have begun, unless Ray has ended or hangs; the
    end of its session ends the rest.

    `serve.shutdown` does the same, but lets Ray print an error about its own controller.
    """
    from ray import serve

    def end() -> None:
        with suppress(Exception):  # Ray has ended meanwhile, or ends now
            serve.delete(APPLICATION)

    watch = current_watch()
    deadline_s = time.monotonic() + _END_S
    thread = side_thread(end, "serve")
    if watch is None or watch.update() is None:
        thread.start()
    while thread.is_alive() and time.monotonic() < deadline_s and (watch is None or watch.update() is None):
        thread.join(LONGEST_WAIT_S)
