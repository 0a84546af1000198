"""One tiny sweep, run to its end once in a process of its own, for all tests that only look at
it."""

from __future__ import annotations

import fcntl

import pytest

from tests.orchestration.samples import Finished, run_tiny_sweep


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The finished sweep; copy it before changing anything.

    If several processes run the suite, the first that needs it launches it, and the others wait.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if base.name.startswith("popen-") else base
    record = shared / "finished.json"
    with open(shared / "finished.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not record.exists():
            folder = shared / "finished"
            folder.mkdir(exist_ok=True)  # another process may have failed here
            run_tiny_sweep(folder).save(record)
    return Finished.load(record)
