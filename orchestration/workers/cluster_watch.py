"""A watch over the processes of Ray without which no work can go on.

When its GCS (the process with the state of the cluster) is lost, Ray ends this process after 60 s
from C++, with exit code 1; when the raylet (the process that starts workers) is lost, work waits
for ever; and calls to a process that is stopped (SIGSTOP) never return. A thread therefore looks at
them twice a second. Code that waits for Ray does so in short steps, and calls `check_cluster`
between them.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from dsnet.errors import ClusterLostError, StorageError
from orchestration.runs.processes import ProcessLook, look_at
from orchestration.workers.cluster_processes import command_name, ended_children, kill_marked, marked_processes
from orchestration.workers.guards import AGENTS, Guard, agents_of
from orchestration.workers.joining import CLIENT

LOOK_EVERY_S = 0.5
STOPPED_S = 30.0
"""Seconds for which a process may be stopped (SIGSTOP) before the cluster counts as lost."""
TRY_EVERY_S = 2.5
UNREACHABLE_S = 40.0
"""Seconds for which the address of a cluster elsewhere may not answer before it counts as lost;
Ray itself would end this process after 60 s."""
CONNECT_S = 3.0
LONGEST_WAIT_S = 0.5
"""Longest single wait for Ray, in seconds: between two, stop requests and the loss of the cluster
are heard."""


RAYLET, GCS = "its raylet", "its GCS"
_COMMANDS = {"raylet": RAYLET, "gcs_server": GCS}
"""Commands of the processes without which no work can go on, and what a person calls them."""


@dataclass(frozen=True)
class Essential:
    """A process without which no work can go on."""

    name: str
    """What a person calls it."""
    pid: int
    start_time: int
    """Clock ticks between boot and its start: a pid alone may be reused."""


def essential(name: str, pid: int) -> list[Essential]:
    """The process to watch; none where there is no /proc to look at it."""
    seen = look_at(pid)
    return [] if seen is None else [Essential(name, pid, seen.start_time)]


@dataclass
class ClusterWatch:
    """What is watched of a cluster, and whether it was lost."""

    essentials: Sequence[Essential] = ()
    address: tuple[str, int] | None = None
    """Host and port of a cluster elsewhere, tried every few seconds; None for a local one."""
    mark: str | None = None
    """Mark of the processes of a local cluster."""
    look: Callable[[int], ProcessLook | None] = look_at
    answers: Callable[[tuple[str, int]], bool] = field(default=lambda address: _answers(address))
    clock: Callable[[], float] = time.monotonic
    lost: str | None = field(default=None, init=False)
    """What was lost, as a sentence; None while nothing is."""
    leaves_no_time: bool = field(default=False, init=False)
    """Whether Ray ends this process in less than a second, so that nothing ends in order."""
    _guard: Guard | None = field(default=None, init=False)
    _is_finished: bool = field(default=False, init=False)
    """Whether this process is ending the cluster itself, so that nothing is lost any more."""
    _is_started: bool = field(default=False, init=False)
    """Whether Ray has said which processes the cluster has."""
    _ended_before: frozenset[int] = field(default_factory=lambda: frozenset(ended_children()), init=False)
    """Pids of ended processes of an earlier cluster."""
    _since: dict[str, float] = field(default_factory=dict, init=False)
    """Since when something has been stopped or has not answered, by name."""

    def observe_session(self, address: str) -> None:
        """Watch the cluster to which Ray is connected now.

        Args:
            address: the address given to Ray.
        """
        if address.startswith(CLIENT):
            self.address = _host_and_port(address.removeprefix(CLIENT))
            return
        from ray._private.worker import _global_node as node

        if node is None:
            return
        if self.mark is None:
            self.essentials = _listener(node.raylet_socket_name, RAYLET)
            self.address = _host_and_port(node.gcs_address)
            return
        pids = [
            (name, info.process.pid) for kind, name in _COMMANDS.items() for info in node.all_processes.get(kind, ())
        ]
        self.essentials = [each for name, pid in pids for each in essential(name, pid)]
        self._is_started = True

    def _find_starting(self) -> None:
        """Also watch what has been started of a local cluster by now: Ray waits for a process of it
        that ends during the start, and ends this process after 60 s."""
        if self.mark is None or self._is_started:
            return
        known = {each.pid for each in self.essentials} | self._ended_before
        for pid in (*marked_processes(self.mark), *ended_children()):  # one may have ended between two looks
            name = _COMMANDS.get(command_name(pid))
            if name is not None and pid not in known:
                self.essentials = [*self.essentials, *essential(name, pid)]

    def finish(self) -> None:
        """Look for the last time: what ends from now on is ended by us."""
        self.update()
        self._is_finished = True
        self.end_guard()

    def end_guard(self) -> None:
        """End the guard, if there is one."""
        if self._guard is not None:
            self._guard.stop()

    def update(self) -> str | None:
        """Look at everything once; returns what was lost."""
        if self.lost is None and not self._is_finished:
            self._find_starting()
            problems = (self._problem_of(each) for each in self.essentials)
            found = next((problem for problem in problems if problem is not None), None)
            if not self._is_finished:
                self.lost = found
        return self.lost

    def try_address(self) -> str | None:
        """Connect to the address of a cluster elsewhere once; returns what was lost."""
        if self.lost is None and self.address is not None and not self._is_finished:
            host, port = self.address
            if self._for_s("address", is_bad=not self.answers(self.address)) >= UNREACHABLE_S:
                self.lost = f"the Ray cluster at {host}:{port} has not answered for {UNREACHABLE_S:g} s"
        return self.lost

    def guard(self, is_over: threading.Event) -> None:
        """Wait for the end of a process of this machine without which the cluster gives up; returns
        when that is known, or when the watch is over."""
        while Guard.is_possible() and not is_over.wait(LOOK_EVERY_S):
            raylet = next((each.pid for each in self.essentials if each.name == RAYLET), None)
            agents = {} if raylet is None else agents_of(raylet)
            if len(agents) == len(AGENTS):
                self._be_guarded(agents)
                return

    def _be_guarded(self, agents: dict[int, str]) -> None:
        names = agents | {each.pid: each.name for each in self.essentials}
        # The GCS first: it would tell this process that the node has ended.
        killed = [] if self.mark is None else sorted(names, key=lambda pid: names[pid] != GCS)
        self._guard = Guard(names, killed)
        if self._is_finished:
            self._guard.stop()
        sentence = self._guard.wait()
        if sentence is not None and not self._is_finished:
            self.lost = sentence
            self.leaves_no_time = self.mark is None and RAYLET not in sentence

    def _problem_of(self, each: Essential) -> str | None:
        seen = self.look(each.pid)
        if seen is None or seen.start_time != each.start_time or seen.has_ended:
            return f"{each.name} (process {each.pid}) has ended"
        if self._for_s(each.name, is_bad=seen.is_stopped) >= STOPPED_S:
            return f"{each.name} (process {each.pid}) has been stopped for {STOPPED_S:g} s (SIGSTOP)"
        return None

    def _for_s(self, name: str, *, is_bad: bool) -> float:
        """For how many seconds something has been bad."""
        if not is_bad:
            self._since.pop(name, None)
            return 0.0
        return self.clock() - self._since.setdefault(name, self.clock())

    def kill_cluster(self) -> None:
        """Kill what is left of a local cluster; nothing for one that was joined."""
        if self.mark is not None:
            kill_marked(self.mark)


_current: ClusterWatch | None = None


def current_watch() -> ClusterWatch | None:
    """The watch over the cluster of this process; None without one."""
    return _current


def check_cluster() -> None:
    """Raise if the cluster of this process was lost; to be called between short waits for Ray.

    Raises:
        ClusterLostError: the message says what was lost.
    """
    if _current is not None and (lost := _current.update()) is not None:
        raise ClusterLostError(lost_sentence(lost))


def lost_sentence(what: str) -> str:
    """The message about a lost cluster."""
    return f"Ray was lost: {what}. Finished work is kept"


@contextmanager
def watching(watch: ClusterWatch) -> Iterator[ClusterWatch]:
    """Watch a cluster for the length of the block, before it starts too; an error that comes after
    its loss is reported as the loss.

    Raises:
        ClusterLostError: the block raised another error after the cluster was lost.
    """
    global _current
    is_over = threading.Event()
    _start(watch.update, LOOK_EVERY_S, is_over)
    _start(watch.try_address, TRY_EVERY_S, is_over)
    threading.Thread(target=watch.guard, args=(is_over,), name="cluster-guard", daemon=True).start()
    before, _current = _current, watch
    try:
        yield watch
    except (ClusterLostError, StorageError):  # a full disk may end a part of Ray too
        raise
    except Exception as error:
        if (lost := watch.update()) is not None:
            raise ClusterLostError(lost_sentence(lost)) from error
        raise
    finally:
        _current = before
        is_over.set()
        watch.end_guard()


def _start(look: Callable[[], str | None], every_s: float, is_over: threading.Event) -> None:
    def run() -> None:
        while not is_over.wait(every_s) and look() is None:
            pass

    threading.Thread(target=run, name="cluster-watch", daemon=True).start()


def _host_and_port(address: str) -> tuple[str, int] | None:
    host, colon, port = address.rpartition(":")
    return (host.strip("[]"), int(port)) if colon and port.isdecimal() else None


def _listener(path: str, name: str) -> list[Essential]:
    """The process that listens at a Unix socket; none if that cannot be found out."""
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.settimeout(CONNECT_S)
        peer.connect(path)
        pid, _, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
        return essential(name, pid)
    return []


def _answers(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, CONNECT_S).close()
    except OSError:
        return False
    return True
