"""Ray's folder on this machine: what a local cluster needs there, and the folders of earlier
clusters of ours.

Every cluster has a *session*, a folder with its sockets, logs and spilled objects, which Ray never
removes.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path

from dsnet.disk_room import MIB, free_bytes
from dsnet.errors import CheckpointError, ConfigError, PreflightError, StorageError
from dsnet.files import atomic_write_json, read_object
from dsnet.storage_faults import storage_error
from dsnet.strict_json import read_strictly
from orchestration.runs.lock import LockHolder

LEAST_ROOM_MIB = 32
"""A session has under 1 MiB at first; logs grow to some MiB."""
LONGEST_SOCKET_PATH = 107
"""Bytes of the path of a Unix socket on Linux."""
_LONGEST_SOCKET = "session_2026-01-31_23-59-59_123456_{pid}/sockets/plasma_store"
_SESSION = re.compile(r"session_[0-9-]{10}_[0-9-]{8}_[0-9]{6}_[0-9]+")
MARK = "dsnet-orch.json"
"""Name of the file in a session of ours that names the process which started it."""
KEPT_SESSIONS = 2
"""Number of ended sessions that stay, so that their logs can be read after a fault."""
MOST_PRUNED = 50
PRUNE_S = 3.0
"""Seconds after which no further session is removed by one launch."""
SHARED_MEMORY = Path("/dev/shm")
WAY_OUT = "set RAY_TMPDIR to a folder with a short path on a local disk with room, such as RAY_TMPDIR=/var/tmp"


def ray_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder in which Ray creates its sessions, by the rule of Ray; `prepare_environment` makes
    its variables absolute."""
    return Path(environ.get("RAY_TMPDIR") or environ.get("TMPDIR") or "/tmp").absolute() / "ray"


def check_ray_folder(folder: Path, object_store_mib: int) -> None:
    """Refuse to start Ray where it could not start or would end soon.

    Args:
        folder: Ray's folder; it is created.
        object_store_mib: size of the object store.

    Raises:
        PreflightError: the message says which limit was met, the folder, what is free there, and
            what to do.
    """
    longest = len(os.fsencode(folder / _LONGEST_SOCKET.format(pid=os.getpid())))
    if longest > LONGEST_SOCKET_PATH:
        raise PreflightError(
            f"Ray cannot start: the paths of its sockets below {folder} would have {longest} bytes, but Linux allows "
            f"{LONGEST_SOCKET_PATH}; {WAY_OUT}."
        )
    probe = folder / f".probe-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise PreflightError(f"Ray cannot start: {storage_error(error, folder, 'write')} Or {WAY_OUT}.") from error
    free = free_bytes(folder)
    if free is not None and free < LEAST_ROOM_MIB * MIB:
        raise PreflightError(
            f"Ray cannot start: its folder {folder} has {free // MIB} MiB free, but it needs {LEAST_ROOM_MIB} MiB for sockets and "
            f"logs. Make room there, or {WAY_OUT}."
        )
    shared = free_bytes(SHARED_MEMORY)
    if shared is not None and shared < object_store_mib * MIB and (free is None or free < object_store_mib * MIB):
        raise PreflightError(
            f"Ray cannot start: its object store needs {object_store_mib} MiB (ray.object_store_mib, or what the images need), but "
            f"{SHARED_MEMORY} has {shared // MIB} MiB free, and {folder}, which would be used instead, "
            f"{0 if free is None else free // MIB} MiB. Enlarge {SHARED_MEMORY} (docker run --shm-size), or {WAY_OUT}."
        )


def facts_for_message(folder: Path) -> str:
    """Ray's folder and memory with what is free there, and the way out, for a message about a start
    that failed."""
    parts = [(f"its folder is {folder}", folder), (f"its shared memory {SHARED_MEMORY}", SHARED_MEMORY)]
    rooms = [(text, free_bytes(path)) for text, path in parts]
    told = " and ".join(
        f"{text} ({'unknown room' if free is None else f'{free // MIB:,} MiB free'})" for text, free in rooms
    )
    return f"{told}. Its logs are in {folder}/session_latest/logs. If one of them is the reason, {WAY_OUT}."


@cache
def own_token() -> str:
    """A random token for the local clusters of this process, by which Ray lets its processes in."""
    return secrets.token_hex(32)


def token_variables(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Environment variables that give a local cluster a token of its own, unless the user has
    chosen one: Ray would store one in the home folder, which may not be writable."""
    chosen = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & environ.keys()
    return {} if chosen or environ.get("RAY_AUTH_MODE", "token").lower() != "token" else {"RAY_AUTH_TOKEN": own_token()}


def mark_sessions(folder: Path) -> None:
    """Mark the sessions of this process as ours, so that a later launch may remove them. One that
    cannot be marked stays for the user to remove."""
    for session in folder.glob(f"session_*_{os.getpid()}"):
        if _SESSION.fullmatch(session.name) and not (session / MARK).exists():
            holder = LockHolder.this_process("ray")
            try:
                atomic_write_json(session / MARK, asdict(holder))
            except StorageError:
                continue


def prune_sessions(folder: Path, *, kept: int = KEPT_SESSIONS) -> list[Path]:
    """Remove sessions of ours whose processes are gone, the oldest first; returns them.

    Sessions of other users, other programs and other machines stay, and so do those of which any
    process runs. It ends after `MOST_PRUNED` sessions or `PRUNE_S` seconds.

    Args:
        folder: Ray's folder.
        kept: number of ended sessions that stay, the newest.
    """
    deadline = time.monotonic() + PRUNE_S
    running = _command_lines()
    ended = [session for session in _own_sessions(folder) if session.name.encode() not in running]
    removed = []
    for session in ended[: max(0, len(ended) - kept)][:MOST_PRUNED]:
        if time.monotonic() > deadline:
            break
        shutil.rmtree(session, ignore_errors=True)
        removed.append(session)
    return removed


def _own_sessions(folder: Path) -> Iterator[Path]:
    """Sessions that a process of ours started which has ended, the oldest first."""
    try:
        found = sorted(folder.iterdir())
    except OSError:  # there is none yet, or it belongs to others
        return
    for session in found:
        mark = session / MARK
        if not _SESSION.fullmatch(session.name) or session.is_symlink() or not _is_mine(session) or not _is_mine(mark):
            continue
        try:
            holder = read_strictly(LockHolder, read_object(mark))
            is_running = holder.is_running()
        except (CheckpointError, ConfigError, StorageError, ValueError):
            continue
        if not is_running:
            yield session


def _is_mine(path: Path) -> bool:
    try:
        return path.lstat().st_uid == os.getuid()
    except OSError:
        return False


def _command_lines() -> bytes:
    """The command lines of all processes that this user may see: those of a cluster name its
    session."""
    lines = []
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if name.isdecimal():
            try:
                lines.append(Path(f"/proc/{name}/cmdline").read_bytes())
            except OSError:  # it has ended
                continue
    return b"\0".join(lines)
