"""The folder in which a training works: the stage's own where driver and worker are one machine,
else a temporary one on the worker's machine that is kept equal to a store.

The training itself (`dsnet.training.supernet`) reads and writes one local folder. `Workplace` is
that folder as the worker sees it, `JobFiles` as the driver does.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dsnet.errors import PreflightError
from dsnet.files import atomic_write_bytes, atomic_write_json
from dsnet.stored.names import FINAL, checkpoint_stems
from orchestration.runs.folder import CURVES
from orchestration.workers.file_stores import DriverStore, FileStore, UrlStore

OUTCOME = "outcome.json"
STOP = "stop"
LAUNCH = ".launch"
"""Name of a file by which a worker knows the driver's store."""
SYNC_S = 1.0
"""Seconds between two comparisons of a worker's folder with its store."""
_RESULT = (CURVES, f"{FINAL}.safetensors", f"{FINAL}.json", OUTCOME)
"""What the driver reads, in the order in which it must arrive: a checkpoint's JSON makes it valid,
and an outcome ends the training."""
_CHECKPOINT = re.compile(r"epoch-[\w-]+\.(safetensors|json)")


def _rank(name: str) -> tuple[int, str]:
    """The order in which files are sent: a checkpoint's JSON after its tensors, and the curves
    before the checkpoint that continues them."""
    if _CHECKPOINT.fullmatch(name):
        return (2 if name.endswith(".json") else 1), name
    return (0 if name == CURVES else 3 + _RESULT.index(name)), name


@dataclass(frozen=True)
class Place:
    """A folder for a training on the worker's machine."""

    folder: Path
    should_stop: Callable[[], bool]
    record: Callable[[Mapping[str, Any]], None]
    """Stores how the training ended, whoever of a group says so."""
    send: Callable[[], None]
    """Brings everything that has been written to where the driver finds it."""


class Workplace(Protocol):
    """The place of a training; it can be pickled."""

    def opened(self, *, is_writer: bool = True) -> AbstractContextManager[Place]:
        """The place, ready to continue from its newest checkpoint, for the length of a block.

        Args:
            is_writer: whether this process writes the files; in a group only the first does.
        """
        ...


@dataclass(frozen=True)
class SharedFolder:
    """The stage's own folder, on a disk that driver and worker share."""

    folder: Path
    stop_file: Path

    @contextmanager
    def opened(self, *, is_writer: bool = True) -> Iterator[Place]:
        """See `Workplace.opened`."""
        yield Place(
            self.folder,
            self.stop_file.exists,
            record=lambda facts: atomic_write_json(self.folder / OUTCOME, facts),
            send=lambda: None,
        )


@dataclass(frozen=True)
class MirroredFolder:
    """A temporary folder that begins with the files of a store, and whose files are sent there
    while the training writes them."""

    store: FileStore
    token: str
    """Content of the file `LAUNCH` that the driver has written there."""

    @contextmanager
    def opened(self, *, is_writer: bool = True) -> Iterator[Place]:
        """See `Workplace.opened`. At the end everything has been sent, or the block raises.

        Raises:
            PreflightError: the store is another place here than on the driver's machine.
        """
        if self.store.read(LAUNCH) != self.token.encode():
            raise PreflightError(
                f"{self.store} is another place on {socket.gethostname()} than on the driver's machine; set storage.artifacts to a "
                "URL that means the same on all nodes, such as a bucket or a shared disk"
            )
        with tempfile.TemporaryDirectory(prefix="dsnet-training-") as name:
            mirror = Mirror(Path(name), self.store, is_writer=is_writer)
            mirror.restore()
            mirror.start()
            try:
                yield Place(Path(name), mirror.should_stop, mirror.record, mirror.send)
            finally:
                mirror.finish()
            mirror.send()


class Mirror:
    """Sends what changes in a folder to a store, and hears from the store that training should
    stop, in a thread of its own."""

    def __init__(self, folder: Path, store: FileStore, *, is_writer: bool) -> None:
        self._folder = folder
        self._store = store
        self._is_writer = is_writer
        self._sent: dict[str, tuple[int, int]] = {}
        """Size and time of each file as it was sent."""
        self._one_sends = threading.Lock()
        self._stop = threading.Event()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="training-files", daemon=True)

    def restore(self) -> None:
        """Fetch the newest complete checkpoint and the curves up to it, and an outcome."""
        checkpoints = [name for name in self._store.sizes() if _CHECKPOINT.fullmatch(name)]
        # Those that are not fetched count as sent, so that they go when there are newer ones.
        self._sent = dict.fromkeys(checkpoints, (-1, -1))
        stems = sorted((name.removesuffix(".json") for name in checkpoints if name.endswith(".json")), reverse=True)
        newest = next((files for stem in stems if (files := self._whole(stem))), {})
        others = {name: content for name in (CURVES, OUTCOME) if (content := self._store.read(name)) is not None}
        for name, content in {**newest, **others}.items():
            atomic_write_bytes(self._folder / name, content)
            self._sent[name] = _state(self._folder / name)

    def _whole(self, stem: str) -> dict[str, bytes]:
        """The files of a checkpoint, by name; empty if one is missing or damaged, because a worker
        was lost while it sent them."""
        facts, tensors = self._store.read(f"{stem}.json"), self._store.read(f"{stem}.safetensors")
        if facts is None or tensors is None:
            return {}
        try:
            recorded = json.loads(facts)["sha256"]
        except (ValueError, LookupError, TypeError, RecursionError):
            return {}
        is_whole = hashlib.sha256(tensors).hexdigest() == recorded
        return {f"{stem}.safetensors": tensors, f"{stem}.json": facts} if is_whole else {}

    def should_stop(self) -> bool:
        """Whether the driver wants the training to stop."""
        return self._stop.is_set()

    def record(self, facts: Mapping[str, Any]) -> None:
        """Store an outcome at once."""
        atomic_write_json(self._folder / OUTCOME, facts)
        self._store.write(OUTCOME, (self._folder / OUTCOME).read_bytes())
        self._sent[OUTCOME] = _state(self._folder / OUTCOME)

    def start(self) -> None:
        """Begin to follow the folder."""
        self._thread.start()

    def finish(self) -> None:
        """Stop following it."""
        self._is_over.set()
        self._thread.join()

    def send(self) -> None:
        """Send every file that has changed, and remove those from the store that are gone."""
        if self._is_writer:
            with self._one_sends:
                self._send()

    def _send(self) -> None:
        here = {path.name: path for path in self._folder.iterdir() if _is_ours(path.name)}
        for name in sorted(here, key=_rank):
            try:
                state = _state(here[name])
                content = here[name].read_bytes() if state != self._sent.get(name) else None
            except FileNotFoundError:  # an older checkpoint was removed meanwhile
                continue
            if content is not None:
                self._store.write(name, content)
                self._sent[name] = state
        if any(_CHECKPOINT.fullmatch(name) for name in here):
            for name in sorted(self._sent.keys() - here.keys(), key=lambda name: not name.endswith(".json")):
                self._store.remove(name)
                del self._sent[name]

    def _follow(self) -> None:
        while not self._is_over.wait(SYNC_S):
            try:
                self.send()
                if STOP in self._store.sizes():
                    self._stop.set()
            except Exception:  # noqa: BLE001 - tried again; the last attempt, at the end, raises
                continue


def _is_ours(name: str) -> bool:
    return name in _RESULT or _CHECKPOINT.fullmatch(name) is not None


def _state(path: Path) -> tuple[int, int]:
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns


class JobFiles(Protocol):
    """The files of a training as the driver sees them; its results appear in the stage's folder."""

    @property
    def place(self) -> Workplace:
        """The place for the worker."""
        ...

    def begin(self) -> None:
        """Forget the outcome of an earlier launch, and its wish to stop."""
        ...

    def fetch(self, *, everything: bool = False) -> None:
        """Bring what the worker has written into the stage's folder.

        Args:
            everything: also what has the size that it had before; for the end.
        """
        ...

    def ask_to_stop(self) -> None:
        """Ask the worker to stop at its next step."""
        ...


@dataclass(frozen=True)
class SharedFiles:
    """Files that the worker writes into the stage's folder itself."""

    folder: Path
    stop_file: Path

    @property
    def place(self) -> Workplace:
        """See `JobFiles.place`."""
        return SharedFolder(self.folder, self.stop_file)

    def begin(self) -> None:
        """See `JobFiles.begin`; the stop file is the run's, which a launch removes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / OUTCOME).unlink(missing_ok=True)

    def fetch(self, *, everything: bool = False) -> None:
        """Do nothing: they are there."""

    def ask_to_stop(self) -> None:
        """See `JobFiles.ask_to_stop`."""
        self.stop_file.touch()


class StoredFiles:
    """Files that the worker sends to a store."""

    def __init__(self, folder: Path, store: FileStore, *, is_here: bool) -> None:
        """Wrap the store of a training.

        Args:
            folder: the stage's folder, on this machine.
            store: the store.
            is_here: whether the store's folder is the stage's folder.
        """
        self._folder = folder
        self._store = store
        self._is_here = is_here
        self._token = secrets.token_hex(8)
        self._fetched: dict[str, int] = {}

    @property
    def place(self) -> Workplace:
        """See `JobFiles.place`."""
        return MirroredFolder(self._store, self._token)

    def begin(self) -> None:
        """See `JobFiles.begin`. A checkpoint of this folder is sent to a store that has none, so
        that a training continues there which began on this machine."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for name in (OUTCOME, STOP):
            self._store.remove(name)
            (self._folder / name).unlink(missing_ok=True)
        self._store.write(LAUNCH, self._token.encode())
        stems = checkpoint_stems(self._folder)
        if self._is_here or not stems or any(map(_CHECKPOINT.fullmatch, self._store.sizes())):
            return
        newest = [f"{stems[-1].name}.safetensors", f"{stems[-1].name}.json"]
        for name in sorted({CURVES, *newest}, key=_rank):
            if (self._folder / name).exists():
                self._store.write(name, (self._folder / name).read_bytes())

    def fetch(self, *, everything: bool = False) -> None:
        """See `JobFiles.fetch`: curves, result and outcome; checkpoints stay in the store."""
        if self._is_here:
            return
        sizes = self._store.sizes()
        for name in _RESULT:
            if name not in sizes or (not everything and self._fetched.get(name) == sizes[name]):
                continue
            content = self._store.read(name)
            if content is not None:
                atomic_write_bytes(self._folder / name, content)
                self._fetched[name] = len(content)

    def ask_to_stop(self) -> None:
        """See `JobFiles.ask_to_stop`."""
        self._store.write(STOP, b"")


def job_files(folder: Path, stop_file: Path, *, is_local: bool, artifacts: str | None) -> JobFiles:
    """The files of a training.

    Args:
        folder: the stage's folder.
        stop_file: a file of this machine whose existence asks workers of this machine to stop.
        is_local: whether all workers run on this machine.
        artifacts: URL of a folder of this training that all nodes can read and write; None: the
            stage's folder, which other nodes reach through an actor on the driver's node.

    Raises:
        PreflightError: the URL cannot be used, or there is none and the driver is on no node.
    """
    if artifacts is not None:
        return StoredFiles(folder, UrlStore(artifacts), is_here=False)
    if is_local:
        return SharedFiles(folder, stop_file)
    return StoredFiles(folder, DriverStore.start(folder), is_here=True)
