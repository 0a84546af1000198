"""Environment variables of Ray and its workers, to be set before anything imports Ray."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

from dsnet.arithmetic import fix_arithmetic

_ENVIRONMENT = {
    # Also on Linux, despite its name: binds every listener of a local cluster to 127.0.0.1. Ray
    # reads it when it is imported.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Otherwise workers run at nice 15, which distorts latency.
    "RAY_worker_niceness": "0",
    # After a session has ended, a thread of Ray Train or Ray Tune that goes on must not start
    # another cluster with its next call.
    "RAY_ENABLE_AUTO_CONNECT": "0",
    # Threads that wait must sleep, not spin: beside another busy process a training step of 0.3 s
    # took 3 s, and 0.6 s with this.
    "OMP_WAIT_POLICY": "PASSIVE",
}


def prepare_environment(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set environment variables of Ray and its workers that the user has not set; call it before
    anything imports Ray."""
    for name, value in _ENVIRONMENT.items():
        environ.setdefault(name, value)
    for name in ("RAY_TMPDIR", "TMPDIR"):
        if environ.get(name):
            environ[name] = os.path.abspath(environ[name])  # Ray's processes have other working directories
        else:
            environ.pop(name, None)  # Ray would take an empty one for the working directory
    fix_arithmetic(environ)
