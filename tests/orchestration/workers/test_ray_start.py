"""The start of Ray: what ends during it is noticed, and nothing waits for it."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from dsnet.errors import ClusterLostError
from orchestration.workers.cluster_processes import MARK, ended_children, new_mark
from orchestration.workers.cluster_watch import ClusterWatch, Essential, watching
from orchestration.workers.ray_start import started_in_time
from orchestration.workers.runtime import is_left_open

GCS = "import ctypes, time; ctypes.CDLL(None).prctl(15, b'gcs_server', 0, 0, 0); print(flush=True); time.sleep(60)"
"""A process with the name of Ray's GCS."""


def test_a_process_that_ends_while_ray_starts_ends_the_start() -> None:
    released = threading.Event()
    watch = ClusterWatch([Essential("its GCS", 11, 100)], look=lambda pid: None)
    began_s = time.monotonic()
    with (
        pytest.raises(ClusterLostError, match=r"its GCS \(process 11\) has ended"),
        watching(watch),
        started_in_time(lambda: released.wait() and None, 60.0, None),
    ):
        pytest.fail("Ray has not started")
    assert time.monotonic() - began_s < 5.0
    assert is_left_open(), "the call of Ray hangs: the process must end at once"
    released.set()
    while is_left_open():
        time.sleep(0.01)


def test_a_process_that_has_ended_between_two_looks_is_noticed_and_one_of_an_earlier_cluster_is_not() -> None:
    def ended_gcs() -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-c", GCS], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
        wait_until(lambda: process.pid in ended_children())
        return process

    with ended_gcs():
        watch = ClusterWatch(mark=new_mark())
        assert watch.update() is None
        with ended_gcs() as process:
            assert watch.update() == f"its GCS (process {process.pid}) has ended"


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20.0
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def test_processes_of_a_cluster_are_watched_as_soon_as_they_are_there() -> None:
    mark = new_mark()
    watch = ClusterWatch(mark=mark)
    assert watch.update() is None
    with subprocess.Popen([sys.executable, "-c", GCS], env={MARK: mark}, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            assert watch.update() is None
            assert [(each.name, each.pid) for each in watch.essentials] == [("its GCS", process.pid)]
        finally:
            process.kill()
    assert watch.update() == f"its GCS (process {process.pid}) has ended"
