"""The watch over the processes of a Ray cluster, with a table of processes made up here, and the
last resort."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from dsnet.errors import ClusterLostError, DsnetError, NonFiniteLossError, StoppedError, StorageError
from orchestration.runs.processes import ProcessLook, look_at
from orchestration.workers.cluster_processes import MARK, kill_marked, marked_processes, new_mark
from orchestration.workers.cluster_watch import (
    STOPPED_S,
    UNREACHABLE_S,
    ClusterWatch,
    Essential,
    check_cluster,
    current_watch,
    essential,
    watching,
)
from orchestration.workers.guards import Guard
from orchestration.workers.last_resort import LOST_S, STOP_S, Deadline
from tests.hostile import REPOSITORY


class Machine:
    """Processes, a network and a clock."""

    def __init__(self) -> None:
        self.processes = {11: ProcessLook(100, "S"), 22: ProcessLook(101, "S")}
        self.is_reachable = True
        self.now_s = 0.0
        self.watch = ClusterWatch(
            [Essential("its raylet", 11, 100), Essential("its GCS", 22, 101)],
            address=("10.0.0.1", 6379),
            look=self.processes.get,
            answers=lambda address: self.is_reachable,
            clock=lambda: self.now_s,
        )


@pytest.fixture
def machine() -> Machine:
    return Machine()


def test_a_full_disk_is_told_also_where_it_ended_a_part_of_ray(machine: Machine) -> None:
    machine.processes.clear()
    with pytest.raises(StorageError, match="the disk is full"), watching(machine.watch):
        raise StorageError("the disk is full")


def test_nothing_is_lost_while_all_processes_run(machine: Machine) -> None:
    for state in "SRDTS":
        machine.processes[11] = ProcessLook(100, state)
        machine.now_s += 10.0
        assert machine.watch.update() is None
        assert machine.watch.try_address() is None


@pytest.mark.parametrize(
    "now", [None, ProcessLook(100, "Z"), ProcessLook(100, "X"), ProcessLook(7, "S")], ids=["gone", "Z", "X", "reused"]
)
def test_a_process_that_has_ended_is_lost_for_good(machine: Machine, now: ProcessLook | None) -> None:
    machine.processes.pop(22)
    if now is not None:
        machine.processes[22] = now
    assert machine.watch.update() == "its GCS (process 22) has ended"
    machine.processes[22] = ProcessLook(101, "S")
    assert machine.watch.update() == "its GCS (process 22) has ended"


def test_a_process_that_is_stopped_for_long_is_lost_and_one_that_goes_on_is_not(machine: Machine) -> None:
    for state in "TS":
        machine.processes[11] = ProcessLook(100, state)
        assert machine.watch.update() is None
        machine.now_s += STOPPED_S
    machine.processes[11] = ProcessLook(100, "T")
    assert machine.watch.update() is None
    machine.now_s += STOPPED_S
    assert machine.watch.update() == "its raylet (process 11) has been stopped for 30 s (SIGSTOP)"


def test_a_cluster_elsewhere_is_lost_before_ray_ends_this_process(machine: Machine) -> None:
    machine.is_reachable = False
    assert machine.watch.try_address() is None
    machine.now_s += UNREACHABLE_S - 1
    assert machine.watch.try_address() is None
    machine.is_reachable = True
    assert machine.watch.try_address() is None
    machine.is_reachable = False
    assert machine.watch.try_address() is None
    machine.now_s += UNREACHABLE_S
    assert machine.watch.try_address() == "the Ray cluster at 10.0.0.1:6379 has not answered for 40 s"
    assert UNREACHABLE_S < 60.0


def raised_in(watch: ClusterWatch, error: BaseException | None) -> None:
    """Raise an error, or else check the cluster, under a watch."""
    with watching(watch):
        assert current_watch() is watch
        if error is not None:
            raise error
        check_cluster()


def test_every_error_after_a_loss_is_reported_as_the_loss(machine: Machine) -> None:
    before = current_watch()  # that of the tests' own cluster, if this process has one
    check_cluster()
    raised_in(machine.watch, None)
    with pytest.raises(DsnetError, match="its own reason"):
        raised_in(machine.watch, DsnetError("its own reason"))
    machine.processes.clear()
    for error in (DsnetError("a consequence"), None):
        with pytest.raises(
            ClusterLostError, match=r"^Ray was lost: its raylet \(process 11\) has ended\. Finished work"
        ):
            raised_in(machine.watch, error)
    with pytest.raises(KeyboardInterrupt):
        raised_in(machine.watch, KeyboardInterrupt())
    assert current_watch() is before
    assert issubclass(ClusterLostError, StoppedError)
    assert ClusterLostError.exit_code == 6


def test_the_end_of_a_session_is_no_loss(machine: Machine) -> None:
    with pytest.raises(DsnetError, match="its own reason"):
        ended_by_itself(machine, DsnetError("its own reason"))
    assert machine.watch.lost is None
    other = Machine()
    other.processes.clear()
    with pytest.raises(ClusterLostError):
        ended_by_itself(other, DsnetError("a consequence"))


def ended_by_itself(machine: Machine, error: Exception) -> None:
    """A session that ends its own processes on its way out of an error."""
    with watching(machine.watch):
        try:
            raise error
        finally:
            machine.watch.finish()
            machine.processes.clear()


@pytest.mark.slow
@pytest.mark.ray
def test_an_error_in_a_session_stays_what_it_is() -> None:
    code = """
import sys
from dsnet.errors import NonFiniteLossError
from orchestration.workers.runtime import RaySettings, ray_session
try:
    with ray_session(RaySettings(num_cpus=1, object_store_mib=100)):
        raise NonFiniteLossError("its own reason")
except NonFiniteLossError as error:
    sys.exit(error.exit_code)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, check=False
    )
    assert done.returncode == NonFiniteLossError.exit_code


def test_a_thread_notices_the_loss_by_itself() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    watch = ClusterWatch(essential("its raylet", process.pid))
    with watching(watch):
        process.kill()  # it stays a zombie until it is waited for
        deadline = time.monotonic() + 10
        while watch.lost is None and time.monotonic() < deadline:
            time.sleep(0.05)
    process.wait()
    assert watch.lost == f"its raylet (process {process.pid}) has ended"


def test_the_processes_of_a_cluster_are_found_by_their_mark_and_killed_although_stopped() -> None:
    mark = new_mark()
    variables = {**os.environ, MARK: mark}
    processes = [
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env=environment)
        for environment in (variables, variables, {**os.environ, MARK: new_mark()})
    ]
    ours, other = processes[:2], processes[2]
    try:
        os.kill(ours[0].pid, signal.SIGSTOP)
        assert sorted(marked_processes(mark)) == sorted(process.pid for process in ours)
        kill_marked(mark)
        assert [process.wait(10) for process in ours] == [-signal.SIGKILL] * 2
        assert marked_processes(mark) == []
        seen = look_at(other.pid)
        assert seen is not None
        assert not seen.has_ended
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_stop_request_and_a_loss_have_their_time() -> None:
    now = [0.0]
    deadline = Deadline(lambda: now[0])
    assert not deadline.is_over(is_stopping=False, is_lost=False)
    now[0] = 1000.0
    assert not deadline.is_over(is_stopping=False, is_lost=True)
    now[0] += LOST_S - 1
    assert not deadline.is_over(is_stopping=True, is_lost=True)
    now[0] += 1
    assert deadline.is_over(is_stopping=True, is_lost=True)
    past = Deadline(lambda: now[0])
    assert not past.is_over(is_stopping=False, is_lost=True)
    now[0] += LOST_S
    assert not past.is_over(is_stopping=False, is_lost=False), "it is needed no more"
    assert not past.is_over(is_stopping=False, is_lost=True)
    stopping = Deadline(lambda: now[0])
    assert not stopping.is_over(is_stopping=True, is_lost=False)
    now[0] += STOP_S
    assert stopping.is_over(is_stopping=True, is_lost=False)
    assert STOP_S < 10.0 < LOST_S < 60.0


STUCK = """
import hashlib, os, signal, sys, threading
import orchestration.workers.last_resort as last_resort
from dsnet.stop_signals import stop_on_signals
last_resort.STOP_S = 0.3
requests = []

def tell(lost):
    print("told", lost)
    return requests[0].exit_code

with last_resort.ended_in_time(lambda: requests[0] if requests else None, tell):
    with stop_on_signals(lambda: False, lambda name: print("unheard")) as request:
        requests.append(request)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.{name})).start()
        while True:
            hashlib.pbkdf2_hmac("sha256", b"x", b"y", 2**31 - 1)  # minutes in C, where no handler runs
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 6), ("SIGHUP", 6)])
def test_a_process_that_hangs_in_c_hears_a_signal_and_ends(name: str, code: int) -> None:
    script = textwrap.dedent(STUCK).replace("{name}", name)
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, "told None\n", "")


def sleeping() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])


def test_a_guard_kills_all_when_one_ends_and_nothing_when_it_is_stopped() -> None:
    first, second = sleeping(), sleeping()
    try:
        guard = Guard({first.pid: "its dashboard agent", second.pid: "its raylet"}, [second.pid, first.pid])
        first.kill()
        assert guard.wait() == f"its dashboard agent (process {first.pid}) has ended"
        assert second.wait(10) == -signal.SIGKILL

        third = sleeping()
        guard = Guard({third.pid: "its raylet"}, [third.pid])
        guard.stop()
        assert guard.wait() is None
        assert third.poll() is None

        script = f"import os; from orchestration.workers.guards import Guard; Guard({{{third.pid}: ''}}, [{third.pid}]); os._exit(9)"
        assert subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=False).returncode == 9
        assert third.wait(10) == -signal.SIGKILL, "a program that was killed leaves nothing behind"
    finally:
        for process in (first, second, third):
            process.kill()
            process.wait()
