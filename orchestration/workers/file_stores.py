"""Where the files of a training are kept so that its worker can continue on another machine: at any
URL that fsspec reads, or in the run folder, through an actor on the driver's node.

A worker of a cluster that was joined may share no disk with the driver. `UrlStore` and
`DriverStore` give both sides the same few operations on whole files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

from dsnet.errors import PreflightError

Result = TypeVar("Result")
CALL_S = 120.0
"""Seconds that a file may take between a node and the driver's node."""
CLIENT_NEEDS_URL = (
    "ray.address: a client of a cluster (ray://) is on none of its nodes, so that workers cannot reach the run folder; set "
    "storage.artifacts to a URL that this machine and all nodes can read and write, or launch on a node"
)
"""The message for a client whose workers have nowhere to send their files."""


class FileStore(Protocol):
    """A flat folder of files that can be reached from every node; it can be pickled."""

    def sizes(self) -> dict[str, int]:
        """Name -> bytes of every file; empty if there is no folder yet."""
        ...

    def read(self, name: str) -> bytes | None:
        """The content of a file; None if there is none of this name."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Write a file, in place of an earlier one."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file, if there is one of this name."""
        ...


@dataclass(frozen=True)
class UrlStore:
    """A folder at a URL of fsspec, such as `s3://bucket/runs/a` or `file:///mnt/runs/a`."""

    url: str
    """Its URL, without a slash at the end. Passwords and keys belong into the environment or the
    configuration files of the file system, on every node."""

    @cached_property
    def _system(self) -> tuple[Any, str]:
        import fsspec

        try:
            system, path = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise PreflightError(f"storage.artifacts: {self.url} cannot be used: {error}") from error
        return system, path

    def __str__(self) -> str:
        return f"storage.artifacts: {self.url}"

    def sizes(self) -> dict[str, int]:
        """See `FileStore.sizes`."""

        def listed(system: Any, path: str) -> dict[str, int]:
            try:
                entries = system.ls(path, detail=True)
            except FileNotFoundError:
                return {}
            return {
                entry["name"].rstrip("/").rpartition("/")[2]: int(entry.get("size") or 0)
                for entry in entries
                if entry.get("type") == "file"
            }

        return self._do(listed)

    def read(self, name: str) -> bytes | None:
        """See `FileStore.read`."""

        def content(system: Any, path: str) -> bytes | None:
            try:
                return bytes(system.cat_file(f"{path}/{name}"))
            except FileNotFoundError:
                return None

        return self._do(content)

    def write(self, name: str, content: bytes) -> None:
        """See `FileStore.write`."""

        def written(system: Any, path: str) -> None:
            system.makedirs(path, exist_ok=True)
            system.pipe_file(f"{path}/{name}", content)

        self._do(written)

    def remove(self, name: str) -> None:
        """See `FileStore.remove`."""

        def removed(system: Any, path: str) -> None:
            try:
                system.rm_file(f"{path}/{name}")
            except FileNotFoundError:
                return

        self._do(removed)

    def put(self, name: str, file: Path) -> None:
        """Copy a local file there, in place of an earlier one."""

        def copied(system: Any, path: str) -> None:
            system.makedirs(path, exist_ok=True)
            system.put_file(str(file), f"{path}/{name}")

        self._do(copied)

    def get(self, name: str, file: Path) -> None:
        """Copy a file to a local path."""
        self._do(lambda system, path: system.get_file(f"{path}/{name}", str(file)))

    def _do(self, action: Callable[[Any, str], Result]) -> Result:
        """Run an operation; its errors name the URL.

        Raises:
            PreflightError: the file system cannot be reached, or refuses.
        """
        try:
            return action(*self._system)
        except OSError as error:
            raise PreflightError(
                f"storage.artifacts: {self.url} cannot be reached ({type(error).__name__}: {error}); driver and all nodes must be "
                "able to read and write it"
            ) from error


class Keeper:
    """An actor on the driver's node that reads and writes files of the driver's machine."""

    def __init__(self, folder: Path) -> None:
        self._store = UrlStore(folder.absolute().as_uri())

    def call(self, name: str, *arguments: Any) -> Any:
        """Run an operation of the store of its folder."""
        return getattr(self._store, name)(*arguments)


@dataclass(frozen=True)
class DriverStore:
    """A folder of the driver's machine, which workers reach through an actor on its node."""

    keeper: Any
    """Handle of the actor, a `Keeper`."""

    def __str__(self) -> str:
        return "the run folder"

    @classmethod
    def start(cls, folder: Path) -> DriverStore:
        """Start the actor on this process's node; it ends with the process.

        Raises:
            PreflightError: this process is not on a node of the cluster, but its client.
        """
        import ray
        from ray.util.client import ray as client
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if client.is_connected():
            raise PreflightError(CLIENT_NEEDS_URL)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        make = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Keeper)
        return cls(make.options(scheduling_strategy=here).remote(folder))

    def sizes(self) -> dict[str, int]:
        """See `FileStore.sizes`."""
        return dict(self._call("sizes"))

    def read(self, name: str) -> bytes | None:
        """See `FileStore.read`."""
        content: bytes | None = self._call("read", name)
        return content

    def write(self, name: str, content: bytes) -> None:
        """See `FileStore.write`."""
        self._call("write", name, content)

    def remove(self, name: str) -> None:
        """See `FileStore.remove`."""
        self._call("remove", name)

    def _call(self, name: str, *arguments: Any) -> Any:
        import ray
        from ray.exceptions import GetTimeoutError

        try:
            return ray.get(self.keeper.call.remote(name, *arguments), timeout=CALL_S)
        except GetTimeoutError as error:
            raise PreflightError(
                f"the driver's node did not answer within {CALL_S:g} s about a file of the run folder; it is overloaded, or the network "
                "between the nodes is"
            ) from error
