"""Machines of a cluster, each a network namespace with an address and a view of the disk of its
own, joined by a bridge. Needs Linux, root, and `ip` and `unshare`."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.hostile import REPOSITORY

PORT = 6379
RAY = (sys.executable, "-m", "ray.scripts.scripts")
HIDE = 'mount --make-rprivate / && mount -t tmpfs none "$0" && exec "$@"'
"""Shell script that hides a folder behind an empty one and starts a program."""


def why_not() -> str | None:
    """Why namespaces cannot be made here; None if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "network namespaces need the programs ip and unshare"
    name = f"dsnet-{secrets.token_hex(3)}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    try:
        bridge = ["ip", "-n", name, "link", "add", "hub", "type", "bridge"]
        hidden = ["unshare", "-m", "sh", "-c", HIDE, "/mnt", "true"]
        for command in [] if made.returncode else [bridge, hidden]:
            made = subprocess.run(command, capture_output=True, text=True) if made.returncode == 0 else made
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return None if made.returncode == 0 else f"this machine does not allow network namespaces: {made.stderr.strip()}"


class Machine:
    """A network namespace with a Ray node."""

    def __init__(self, name: str, address: str, variables: Mapping[str, str], hidden: Path | None) -> None:
        self.name = name
        self.address = address
        self._variables = dict(variables)
        self._hidden = hidden

    def within(self, *command: str) -> list[str]:
        """A command line that runs a command on this machine."""
        view = [] if self._hidden is None else ["unshare", "-m", "sh", "-c", HIDE, str(self._hidden)]
        return ["ip", "netns", "exec", self.name, *view, *command]

    def start(self, num_cpus: int, *, head: Machine | None, log: Path) -> None:
        """Start its Ray node: a new cluster, or one more node of the cluster of `head`. Returns
        when it runs, which takes more than one attempt on a busy machine."""
        for _ in range(3):
            process = self._start(num_cpus, head, log)
            while process.poll() is None and "Ray runtime started" not in log.read_text():
                time.sleep(0.2)
            if process.poll() is None:
                return
            log.write_text("")
        raise AssertionError(f"no Ray node on {self.name}")

    def _start(self, num_cpus: int, head: Machine | None, log: Path) -> subprocess.Popen[bytes]:
        place = (
            ["--head", f"--port={PORT}", "--include-dashboard=false"]
            if head is None
            else [f"--address={head.address}:{PORT}"]
        )
        if head is None:
            place += [f"--temp-dir={self._variables['RAY_TMPDIR']}"]
        options = [
            f"--node-ip-address={self.address}",
            f"--num-cpus={num_cpus}",
            "--object-store-memory=100000000",
            "--block",
        ]
        with open(log, "ab") as file:
            return subprocess.Popen(
                self.within(*RAY, "start", *place, *options),
                env={name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
                | self._variables,
                stdout=file,
                stderr=file,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def pids(self) -> list[int]:
        """Its processes."""
        told = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False)
        return [int(pid) for pid in told.stdout.split()]

    def runs(self, title: str) -> bool:
        """Whether one of its processes has this title, such as that of a task of Ray."""
        return any(title in _title(pid) for pid in self.pids())

    def kill(self) -> None:
        """Kill everything that runs on it, at once."""
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _title(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def newest_epoch(folder: Path) -> int:
    """The epoch of the newest checkpoint below a folder with a run folder; 0 if there is none."""
    return max((int(path.stem.partition("-")[2]) for path in folder.glob("runs/*/supernet/*/epoch-*.json")), default=0)


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 120.0) -> None:
    """Wait for a condition.

    Raises:
        AssertionError: it did not hold in time.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} within {timeout_s:g} s"
        time.sleep(0.2)


@contextmanager
def machines(number: int, variables: Mapping[str, str], hidden: Path) -> Iterator[Sequence[Machine]]:
    """Machines on one network; the first one sees `hidden`, the others an empty folder in its
    place.

    Args:
        number: number of machines, 2 to 200.
        variables: environment variables of their programs.
        hidden: a folder of the first machine.
    """
    mark, folder = secrets.token_hex(3), Path(f"/tmp/ds{secrets.token_hex(3)}")  # Ray's sockets need a short path
    environment = {
        "PYTHONPATH": str(REPOSITORY),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": str(folder),
        **variables,
    }
    made = [
        Machine(f"dsnet-{mark}-{index}", f"10.77.0.{index + 1}", environment, hidden if index else None)
        for index in range(number)
    ]
    hub = made[0].name
    folder.mkdir()
    try:
        for index, machine in enumerate(made):
            _ip("netns", "add", machine.name)
            _ip("-n", machine.name, "link", "set", "lo", "up")
            if index == 0:
                _ip("-n", hub, "link", "add", "hub", "type", "bridge")
                _ip("-n", hub, "addr", "add", f"{machine.address}/24", "dev", "hub")
                _ip("-n", hub, "link", "set", "hub", "up")
                continue
            port = f"port{index}"
            _ip("link", "add", port, "netns", hub, "type", "veth", "peer", "name", "net", "netns", machine.name)
            _ip("-n", hub, "link", "set", port, "master", "hub", "up")
            _ip("-n", machine.name, "addr", "add", f"{machine.address}/24", "dev", "net")
            _ip("-n", machine.name, "link", "set", "net", "up")
        yield made
    finally:
        for machine in made:
            machine.kill()
        for machine in made:
            subprocess.run(["ip", "netns", "del", machine.name], capture_output=True, check=False)
        shutil.rmtree(folder, ignore_errors=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
