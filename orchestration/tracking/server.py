"""MLflow's own web page over a run folder's store, on this machine only."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from dsnet.errors import ConfigError, PreflightError
from dsnet.import_path import child_variables
from orchestration.config.store_uri import absolute_uri, is_server, shown_uri
from orchestration.tracking.database import mend_artifact_locations
from orchestration.tracking.store import mlflow_environment

LOOPBACK = "127.0.0.1"
START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 8.0
_POLL_S = 0.2
_NUM_LOG_LINES = 8


@contextmanager
def serve_ui(store_uri: str, artifact_root: Path, port: int = 5000, host: str = LOOPBACK) -> Iterator[str]:
    """Run MLflow's server for the length of the block.

    Args:
        store_uri: The database, `sqlite:///...`.
        artifact_root: Folder for the artifacts of new experiments.
        port: The port to listen on; a free one is taken if it is in use, or if it is 0.
        host: Only 127.0.0.1. The page has no password.

    Yields:
        The page's URL, once it answers.

    Raises:
        ConfigError: Another host, or a store that is a server already.
        PreflightError: The server does not start; the message ends with its last output.
    """
    if host != LOOPBACK:
        raise ConfigError(
            f"host: {host!r} would open the page, which has no password, to others; only {LOOPBACK} is served. "
            f"From another machine use a tunnel: ssh -L {port}:{LOOPBACK}:{port} THIS_MACHINE"
        )
    if is_server(store_uri):
        raise ConfigError(f"tracking.uri: {shown_uri(store_uri)} is a server already; open it in a browser.")
    mend_artifact_locations(store_uri, artifact_root.absolute())
    port = free_port(port)
    url = f"http://{LOOPBACK}:{port}"
    # MLflow's workers put their working directory first on the import path, so it must not contain
    # modules of the user.
    with tempfile.TemporaryFile("w+b") as log, tempfile.TemporaryDirectory() as empty:
        process = _start(absolute_uri(store_uri), artifact_root, port, log, Path(empty))
        try:
            _wait_until_it_answers(process, url, log)
            yield url
        finally:
            _stop(process)


def free_port(wanted: int) -> int:
    """The wanted port if nothing listens on it on the loopback interface, else a free one that the
    system chooses."""
    for port in (wanted, 0):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise PreflightError(f"no free port on {LOOPBACK}.")


def _start(store_uri: str, artifact_root: Path, port: int, log: IO[bytes], folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", LOOPBACK, "--port", str(port)]
    command += ["--default-artifact-root", artifact_root.absolute().as_uri()]
    # A process group of its own: Ctrl-C reaches only this process, which ends server and workers.
    return subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        # Not on the command line, which other users see: it may hold a password.
        env={**os.environ, **child_variables(), **mlflow_environment(), "MLFLOW_BACKEND_STORE_URI": store_uri},
        start_new_session=True,
    )


def _wait_until_it_answers(process: subprocess.Popen[bytes], url: str, log: IO[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise PreflightError(f"the MLflow server ended with status {process.returncode}:\n{_last_lines(log)}")
        with suppress(urllib.error.URLError, OSError), direct.open(f"{url}/health", timeout=2.0):
            return
        time.sleep(_POLL_S)
    raise PreflightError(f"the MLflow server does not answer at {url} after {START_TIMEOUT_S:g} s:\n{_last_lines(log)}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    for how in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
            return


def _last_lines(log: IO[bytes]) -> str:
    log.seek(0)
    return "\n".join(log.read().decode("utf-8", errors="replace").splitlines()[-_NUM_LOG_LINES:])
