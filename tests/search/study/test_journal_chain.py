"""A journal that was cut or edited is noticed by the chain beside it; a kill is no damage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from dsnet.errors import CheckpointError
from dsnet.files import file_sha256
from search.study.journal_chain import ChainWriter, chain_path, checked_lines, journal_state, mend_journal
from search.study.study import StudyJournal, TrialRecord, has_study, load_records
from tests.search.study.samples import HEADER_LINES, essence, study_settings, sweep

NUM_TRIALS = 10


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of ten trials; only to be read."""
    path = tmp_path_factory.mktemp("whole") / "study.journal"
    sweep(path, NUM_TRIALS)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where every example of a property writes its journal."""
    return tmp_path_factory.mktemp("place") / "study.journal"


@pytest.fixture
def path(whole: Path, tmp_path: Path) -> Path:
    """A copy of the study that a test may change."""
    shutil.copy(chain_path(whole), chain_path(tmp_path / whole.name))
    return Path(shutil.copy(whole, tmp_path))


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def written(place: Path, journal: bytes, chain: bytes) -> Path:
    place.write_bytes(journal)
    chain_path(place).write_bytes(chain)
    return place


def test_every_line_has_its_number_and_a_hash_over_all_lines_up_to_it(whole: Path) -> None:
    entries = chain_path(whole).read_text().splitlines()
    assert [entry.split()[0] for entry in entries] == [str(n) for n in range(1, HEADER_LINES + NUM_TRIALS + 1)]
    assert len({entry.split()[1] for entry in entries}) == len(entries)
    checked_lines(whole)


@given(data=st.data())
def test_every_cut_and_every_changed_bit_of_a_journal_is_noticed(whole: Path, place: Path, data: st.DataObject) -> None:
    content, chain = whole.read_bytes(), chain_path(whole).read_bytes()
    at = data.draw(st.integers(0, len(content) - 1), label="byte")
    bit = data.draw(st.integers(0, 7), label="bit")
    written(place, content[:at], chain)
    with pytest.raises(CheckpointError, match="of the 13 records that were written"):
        load_records(place)
    written(place, content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :], chain)
    with pytest.raises(CheckpointError, match=r"study\.journal (is not as it was written|has \d+ of the 13)"):
        load_records(place)
    assert journal_state(place).num_proven <= content[:at].count(b"\n")


@given(data=st.data())
def test_lines_that_are_dropped_swapped_or_repeated_are_noticed(whole: Path, place: Path, data: st.DataObject) -> None:
    lines, chain = lines_of(whole), chain_path(whole).read_bytes()
    at = data.draw(st.integers(0, len(lines) - 2))
    for changed in (
        lines[:at] + lines[at + 1 :],
        [*lines[:at], lines[at + 1], lines[at], *lines[at + 2 :]],
        [*lines[: at + 1], *lines[at:]],
    ):
        with pytest.raises(CheckpointError):
            load_records(written(place, b"".join(changed), chain))


@given(data=st.data())
def test_a_kill_between_any_two_writes_is_no_damage(whole: Path, place: Path, data: st.DataObject) -> None:
    """The bytes that a kill can leave: the journal up to anywhere in a line, and the chain up to
    anywhere in its entry of the line before, or of the last line if the journal ends with it."""
    lines, chain = lines_of(whole), lines_of(chain_path(whole))
    number = data.draw(st.integers(HEADER_LINES, len(lines) - 1), label="whole lines of both")
    torn = data.draw(st.integers(0, len(lines[number])), label="bytes of the next line")
    is_whole = torn == len(lines[number])
    of_chain = data.draw(st.integers(0, len(chain[number]) if is_whole else 0), label="bytes of its entry")
    written(
        place,
        b"".join(lines[:number]) + lines[number][:torn],
        b"".join(chain[:number]) + chain[number][:of_chain],
    )
    assert len(load_records(place)) == number - HEADER_LINES + is_whole
    StudyJournal.open(place, study_settings())
    checked_lines(place)
    assert len(lines_of(chain_path(place))) == number + is_whole, "what was written last is in the chain now"


def test_a_reader_beside_the_writer_sees_no_damage(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer goes on between the three reads of a check."""
    lines, path = lines_of(whole), tmp_path / "study.journal"
    path.write_bytes(b"".join(lines[:HEADER_LINES]))
    writer, reads = ChainWriter(path), 0
    left = lines[HEADER_LINES:]
    original = Path.read_bytes

    def read(self: Path) -> bytes:
        nonlocal reads
        content = original(self)
        reads += 1
        for _ in range(2 if left else 0):
            with open(path, "ab") as file:
                file.write(left.pop(0))
            if len(left) % 2 == 0:
                writer.catch_up()
        return content

    monkeypatch.setattr(Path, "read_bytes", read)
    while left:
        checked_lines(path)
    assert reads >= 5


@pytest.mark.parametrize(
    ("damage", "num_left"),
    [
        (lambda lines: lines[:7], 4),
        (lambda lines: [*lines[:5], lines[5].replace(b'"slot":2', b'"slot":3'), *lines[6:]], 2),
        (lambda lines: [], 0),
    ],
    ids=["cut", "edited", "emptied"],
)
def test_a_damaged_study_is_cut_back_kept_and_searched_to_the_same_end(
    path: Path, whole: Path, damage: Callable[[list[bytes]], list[bytes]], num_left: int
) -> None:
    damaged = b"".join(damage(lines_of(path)))
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"study\.journal\.damaged-1"):
        StudyJournal.open(path, study_settings())
    found = mend_journal(path)
    assert found is not None
    assert f"continues from the {num_left} trials" in found[0]
    assert found[1]
    assert path.with_name("study.journal.damaged-1").read_bytes() == damaged
    assert len(load_records(path)) == num_left
    assert mend_journal(path) is None
    assert essence(sweep(path, NUM_TRIALS)) == essence(load_records(whole))


def test_a_lost_journal_is_noticed_and_a_lost_chain_too(path: Path) -> None:
    sha256, chain = file_sha256(path), chain_path(path).read_bytes()
    chain_path(path).unlink()
    with pytest.raises(CheckpointError, match=r"study\.journal\.chain is missing"):
        load_records(path)
    found = mend_journal(path, sha256)
    assert found is not None
    assert not found[1], "the record of the finished stage proves the journal"
    assert chain_path(path).read_bytes() == chain
    path.unlink()
    assert has_study(path)
    with pytest.raises(CheckpointError, match="has 0 of the 13 records"):
        load_records(path)


def test_a_journal_of_an_earlier_release_is_taken_as_it_is_and_gets_a_chain(path: Path) -> None:
    chain = chain_path(path).read_bytes()
    chain_path(path).unlink()
    path.write_bytes(path.read_bytes().replace(b',"chain":true', b"", 1))
    assert len(load_records(path)) == NUM_TRIALS
    records = sweep(path, NUM_TRIALS + 2)
    assert len(records) == NUM_TRIALS + 2
    assert chain_path(path).read_bytes().count(b"\n") == chain.count(b"\n") + 2
    path.write_bytes(b"".join(lines_of(path)[:-1]))
    with pytest.raises(CheckpointError, match="of the 15 records"):
        load_records(path)


def test_notes_of_other_programs_are_no_damage(path: Path) -> None:
    storage = JournalStorage(JournalFileBackend(str(path)))
    (study,) = storage.get_all_studies()
    for text in ("a note", "another note", "a third"):
        storage.set_study_system_attr(study._study_id, f"dashboard:{text}", text)
    assert len(load_records(path)) == NUM_TRIALS
    assert len(sweep(path, NUM_TRIALS + 1)) == NUM_TRIALS + 1
    checked_lines(path)
    assert (
        len(optuna.load_study(study_name="digits", storage=JournalStorage(JournalFileBackend(str(path)))).trials) == 11
    )


def test_the_hash_of_the_arrays_is_kept_in_the_record_and_replaced_when_they_are_made_again(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    records: list[TrialRecord] = sweep(path, 3, save_arrays=lambda slot, arrays: f"sha-{slot}" if slot else None)
    assert [record.arrays_sha256 for record in records] == [None, "sha-1", "sha-2"]
    journal = StudyJournal.open(path, study_settings())
    journal.note_arrays(2, "other")
    journal.note_arrays(0, "first")
    assert [record.arrays_sha256 for record in load_records(path)] == ["first", "sha-1", "other"]
