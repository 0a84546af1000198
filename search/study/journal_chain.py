"""A record of every line of a journal, in a file beside it, by which a journal that was cut or
edited is noticed.

Line n of `NAME.chain` holds n and a SHA-256 over the first n lines of `NAME`: each is the hash of
the one before and of the new line. The journal stays as Optuna writes it. A line of the chain is
written after the line of the journal, so that a kill between the two leaves a journal that is one
trial ahead of its chain, and never a chain that is ahead of its journal.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsnet.errors import CheckpointError
from dsnet.files import append_bytes, atomic_write_bytes, damaged_name, known_sha256, reading, replacing

CREATE_TRIAL = 4
"""Optuna's number of the operation that adds a trial, `op_code` in a line of a journal."""
MARK = "chain"
"""Key in the study's own attribute which says that the journal has a chain."""
_START = hashlib.sha256().hexdigest()


def chain_path(journal: Path) -> Path:
    """The path of a journal's chain."""
    return journal.with_name(f"{journal.name}.chain")


@dataclass(frozen=True)
class JournalState:
    """A journal compared with its chain.

    Attributes:
        num_lines: complete lines of the journal.
        num_proven: leading lines of the journal that are as they were written; all of them if it
            has no chain, as in earlier releases.
        num_recorded: lines in the chain; `num_lines` if there is none.
        damage: the end of a sentence about the journal; None if it is whole.
    """

    num_lines: int
    num_proven: int
    num_recorded: int
    damage: str | None = None


def journal_state(journal: Path) -> JournalState:
    """Compare a journal with its chain; may be called while another process writes both.

    Raises:
        CheckpointError: a file cannot be read.
    """
    return _compared(journal)[0]


def _compared(journal: Path) -> tuple[JournalState, list[bytes]]:
    """A journal compared with its chain, and its complete lines."""
    before = _entries(chain_path(journal))
    lines = _whole_lines(_content(journal))
    entries = _entries(chain_path(journal))  # again: the writer may have gone on in between
    if before is None and entries is None:
        lost = _is_marked(lines) and _num_trials(lines) > 0
        damage = f"cannot be checked, because {chain_path(journal).name} is missing" if lost else None
        return JournalState(len(lines), 0 if lost else len(lines), len(lines), damage), lines
    recorded, known = len(before or ()), entries or []
    hashes = running_hashes(lines)
    pairs = list(zip(hashes, known, strict=False))
    proven = next((number for number in range(len(pairs), 0, -1) if pairs[number - 1][0] == pairs[number - 1][1]), 0)
    state = JournalState(len(lines), proven, len(known))
    if len(lines) < recorded:
        return _damaged(state, f"has {len(lines)} of the {recorded} records that were written"), lines
    if proven < len(pairs):
        return _damaged(state, f"is not as it was written from record {proven + 1} on"), lines
    # Other programs, such as optuna-dashboard, may add notes; a kill leaves at most one trial.
    if _num_trials(lines[len(known) :]) > 1:
        damage = f"has more records than the {len(known)} that {chain_path(journal).name} lists"
        return _damaged(state, damage), lines
    return JournalState(len(lines), len(lines), len(known)), lines


def checked_lines(journal: Path) -> list[bytes]:
    """The complete lines of a journal, with their newlines, once they were compared with its chain;
    empty if there is no journal.

    Raises:
        CheckpointError: records are missing or were changed; the message names the file.
    """
    state, lines = _compared(journal)
    if state.damage is not None:
        raise CheckpointError(
            f"{journal} {state.damage}: it is damaged or was edited. Restore it and {chain_path(journal).name} from a copy; or "
            f"launch the sweep again, which keeps it as {journal.name}.damaged-1, continues from the {state.num_proven} records "
            "that are as they were written, and runs the other trials again."
        )
    return lines


def mend_journal(journal: Path, sha256: str | None = None) -> tuple[str, bool] | None:
    """Cut a damaged journal back to the records that are as they were written, and keep the damaged
    file and its chain beside it.

    Only for the process that holds the run's lock.

    Args:
        journal: the journal; it need not exist.
        sha256: the SHA-256 of the journal, if another record has it; a journal that fits it is
            whole, and its chain is written again.

    Returns:
        What was found, as a sentence, and whether records were lost; None if the journal is whole.
    """
    state = journal_state(journal)
    if state.damage is None:
        return None
    chain = chain_path(journal)
    kept = [_copied_aside(path) for path in (journal, chain) if path.exists()]
    told = f"{journal} {state.damage}" + (f"; kept as {' and '.join(kept)}" if kept else "")
    lines = _whole_lines(_content(journal))
    if sha256 is not None and journal.exists() and known_sha256(journal) == sha256:
        _write_chain(journal, running_hashes(lines))
        return f"{told}. The journal itself is whole; {chain.name} was written again", False
    proven = lines[: state.num_proven]
    # The journal first: after a kill in between, the chain is longer, and this is done again.
    atomic_write_bytes(journal, b"".join(proven))
    _write_chain(journal, running_hashes(proven))
    return (
        f"{told}. The search continues from the {_num_trials(proven)} trials before that, and runs the others again with the "
        "same seeds"
    ), True


def _copied_aside(path: Path) -> str:
    """Copy a file to its next free name for damaged files; returns the name."""
    copy = damaged_name(path)
    with replacing(copy) as temporary:
        shutil.copyfile(path, temporary)
    return copy.name


class ChainWriter:
    """Writes the chain of a journal that this process alone appends to.

    Args:
        journal: an undamaged journal without an incomplete last line; what its chain lacks is
            added.
    """

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        hashes = running_hashes(_whole_lines(_content(journal)))
        if _entries(chain_path(journal)) != hashes:
            _write_chain(journal, hashes)
        self._num_lines = len(hashes)
        self._last = hashes[-1] if hashes else _START
        self._offset = journal.stat().st_size

    def catch_up(self) -> None:
        """Add the lines that the journal has got since the last call; they are on disk when this
        returns.

        Raises:
            StorageError: it cannot be written.
        """
        with reading(self._journal), open(self._journal, "rb") as file:
            file.seek(self._offset)
            lines = _whole_lines(file.read())
        if not lines:
            return
        hashes = running_hashes(lines, self._last)
        append_bytes(chain_path(self._journal), _chain_text(hashes, self._num_lines))
        self._num_lines += len(lines)
        self._last = hashes[-1]
        self._offset += sum(map(len, lines))


def running_hashes(lines: Sequence[bytes], last: str = _START) -> list[str]:
    """For each line the SHA-256, in hex, of the hash before it and the line.

    Args:
        lines: lines with their newlines.
        last: the hash before the first.
    """
    hashes = []
    for line in lines:
        last = hashlib.sha256(last.encode() + line).hexdigest()
        hashes.append(last)
    return hashes


def _damaged(state: JournalState, damage: str) -> JournalState:
    return JournalState(state.num_lines, state.num_proven, state.num_recorded, damage)


def _content(path: Path) -> bytes:
    if not path.exists():
        return b""
    with reading(path):
        return path.read_bytes()


def _whole_lines(content: bytes) -> list[bytes]:
    """The lines with their newlines, without an incomplete last one."""
    return [line + b"\n" for line in content.split(b"\n")[:-1]]


def _entries(path: Path) -> list[str] | None:
    """The hashes in a chain, without an incomplete last line; None if there is no chain. An entry
    that cannot be read is one that fits no line."""
    if not path.exists():
        return None
    entries = []
    for number, line in enumerate(_whole_lines(_content(path)), start=1):
        count, _, sha256 = line.decode("ascii", errors="replace").strip().partition(" ")
        entries.append(sha256 if count == str(number) else "")
    return entries


def _chain_text(hashes: Sequence[str], num_before: int) -> bytes:
    lines = (f"{number} {sha256}\n" for number, sha256 in enumerate(hashes, start=num_before + 1))
    return "".join(lines).encode()


def _write_chain(journal: Path, hashes: Sequence[str]) -> None:
    atomic_write_bytes(chain_path(journal), _chain_text(hashes, 0))


def _num_trials(lines: Sequence[bytes]) -> int:
    """Number of trials in lines of a journal; lines that cannot be read are none."""
    return sum(_operation(line).get("op_code") == CREATE_TRIAL for line in lines)


def _is_marked(lines: Sequence[bytes]) -> bool:
    """Whether the study says that it has a chain."""
    notes = (_operation(line).get("user_attr") for line in lines)
    return any(
        MARK in note for each in notes if isinstance(each, dict) for note in each.values() if isinstance(note, dict)
    )


def _operation(line: bytes) -> dict[str, object]:
    try:
        operation = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return operation if isinstance(operation, dict) else {}
