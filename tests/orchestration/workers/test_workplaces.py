"""The files of a training that reach another machine and come back: by any URL of fsspec, in any
state in which a lost worker left them."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from dsnet.errors import PreflightError
from dsnet.stored.checkpoint import load_checkpoint, save_checkpoint
from orchestration.workers.file_stores import FileStore, Keeper, UrlStore
from orchestration.workers.workplaces import LAUNCH, Mirror, MirroredFolder, StoredFiles


class KeptHere:
    """A store that calls a `Keeper` as the actor does, without Ray."""

    def __init__(self, folder: Path) -> None:
        self._keeper = Keeper(folder)

    def __getattr__(self, name: str) -> Callable[..., object]:
        return lambda *arguments: self._keeper.call(name, *arguments)


@pytest.fixture(params=["memory", "file", "keeper"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FileStore]:
    """Each kind of store, empty."""
    folder = tmp_path / "kept here"
    if request.param == "memory":
        yield UrlStore(f"memory://{uuid.uuid4().hex}/a run")
    elif request.param == "file":
        yield UrlStore(folder.as_uri())
    else:
        yield KeptHere(folder)  # type: ignore[misc]


def write_checkpoint(folder: Path, epoch: int, value: float) -> None:
    save_checkpoint(folder / f"epoch-{epoch:05d}", {"weight": torch.full((3,), value)}, {"step": epoch})


def restored(store: FileStore, folder: Path) -> Path:
    folder.mkdir()
    Mirror(folder, store, is_writer=True).restore()
    return folder


def test_a_store_holds_whole_files(store: FileStore) -> None:
    assert store.sizes() == {}
    assert store.read("a") is None
    store.remove("a")
    store.write("a", b"12345")
    store.write("a", b"123")
    store.write("b", b"")
    assert store.sizes() == {"a": 3, "b": 0}
    assert (store.read("a"), store.read("b")) == (b"123", b"")
    store.remove("a")
    assert store.sizes() == {"b": 0}


def test_another_machine_continues_from_the_newest_checkpoint(store: FileStore, tmp_path: Path) -> None:
    first = tmp_path / "first"
    first.mkdir()
    mirror = Mirror(first, store, is_writer=True)
    mirror.restore()
    (first / "curves.jsonl").write_text('{"step": 1}\n')
    write_checkpoint(first, 1, 1.0)
    mirror.send()
    write_checkpoint(first, 2, 2.0)
    (first / ".epoch-00003.json.1-ab.tmp").write_text("half")
    (first / "notes.txt").write_text("of somebody else")
    for end in ("json", "safetensors"):
        (first / f"epoch-00001.{end}").unlink()
    mirror.send()
    assert set(store.sizes()) == {"curves.jsonl", "epoch-00002.json", "epoch-00002.safetensors"}
    second = restored(store, tmp_path / "second")
    assert (second / "curves.jsonl").read_text() == '{"step": 1}\n'
    tensors, meta = load_checkpoint(second / "epoch-00002")
    assert tensors["weight"].tolist() == [2.0] * 3
    assert meta["step"] == 2


@pytest.mark.parametrize("damage", ["no tensors", "half tensors", "half json", "other tensors"])
def test_a_checkpoint_that_was_being_sent_when_its_worker_was_lost_is_passed_over(
    store: FileStore, tmp_path: Path, damage: str
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for epoch in (1, 2):
        write_checkpoint(source, epoch, float(epoch))
    Mirror(source, store, is_writer=True).send()
    content = (source / "epoch-00002.safetensors").read_bytes()
    if damage == "no tensors":
        store.remove("epoch-00002.safetensors")
    elif damage == "half tensors":
        store.write("epoch-00002.safetensors", content[: len(content) // 2])
    elif damage == "half json":
        store.write("epoch-00002.json", (source / "epoch-00002.json").read_bytes()[:20])
    else:
        store.write("epoch-00002.safetensors", (source / "epoch-00001.safetensors").read_bytes())
    folder = restored(store, tmp_path / "folder")
    assert {path.name for path in folder.iterdir()} == {"epoch-00001.json", "epoch-00001.safetensors"}
    write_checkpoint(folder, 2, 2.0)  # made again, to the same bits
    mirror = Mirror(folder, store, is_writer=True)
    mirror.send()
    assert restored(store, tmp_path / "again").joinpath("epoch-00002.json").exists()


def test_a_json_is_never_there_before_its_tensors(tmp_path: Path) -> None:
    written: list[str] = []

    class Listening(UrlStore):
        def write(self, name: str, content: bytes) -> None:
            written.append(name)

    for name in ("final", "epoch-00001"):
        save_checkpoint(tmp_path / name, {"weight": torch.ones(1)}, {})
    for name in ("curves.jsonl", "outcome.json"):
        (tmp_path / name).write_text("{}")
    Mirror(tmp_path, Listening("memory://never"), is_writer=True).send()
    assert written == [
        "curves.jsonl",
        "epoch-00001.safetensors",
        "epoch-00001.json",
        "final.safetensors",
        "final.json",
        "outcome.json",
    ]


def test_of_a_group_only_the_first_sends_but_all_hear_the_stop_and_tell_their_error(
    store: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestration.workers.workplaces.SYNC_S", 0.01)
    files = StoredFiles(tmp_path / "stage", store, is_here=False)
    files.begin()
    with files.place.opened(is_writer=False) as place:
        write_checkpoint(place.folder, 1, 1.0)
        place.send()
        assert not place.should_stop()
        files.ask_to_stop()
        heard = threading.Event()
        for _ in range(1000):
            if place.should_stop() or heard.wait(0.01):
                break
        assert place.should_stop()
        place.record({"error": "ConfigError", "message": "no", "rank": 1})
    assert not any(name.startswith("epoch") for name in store.sizes())
    files.fetch(everything=True)
    assert json.loads((tmp_path / "stage" / "outcome.json").read_text())["message"] == "no"
    files.begin()
    assert set(store.sizes()) == {LAUNCH}, "the next launch is not stopped by the wish of the one before"


def test_the_driver_gets_curves_while_they_grow_and_the_result_at_the_end(store: FileStore, tmp_path: Path) -> None:
    stage = tmp_path / "stage"
    stage.mkdir()
    write_checkpoint(stage, 4, 4.0)  # of an earlier launch on this machine
    (stage / "curves.jsonl").write_text("old\n")
    files = StoredFiles(stage, store, is_here=False)
    files.begin()
    with files.place.opened() as place:
        assert load_checkpoint(place.folder / "epoch-00004")[1]["step"] == 4
        (place.folder / "curves.jsonl").write_text("old\nnew\n")
        place.send()
        files.fetch()
        assert (stage / "curves.jsonl").read_text() == "old\nnew\n"
        save_checkpoint(place.folder / "final", {"weight": torch.ones(2)}, {"step": 5})
        (place.folder / "curves.jsonl").write_text("old\nNEW\n")
    files.fetch(everything=True)
    assert load_checkpoint(stage / "final")[0]["weight"].tolist() == [1.0, 1.0]
    assert (stage / "curves.jsonl").read_text() == "old\nNEW\n"


def test_a_url_that_means_another_place_on_the_worker_is_refused(tmp_path: Path) -> None:
    files = StoredFiles(tmp_path / "stage", UrlStore((tmp_path / "driver").as_uri()), is_here=False)
    files.begin()
    place = files.place
    assert isinstance(place, MirroredFolder)
    elsewhere = MirroredFolder(UrlStore((tmp_path / "worker").as_uri()), place.token)
    with pytest.raises(PreflightError, match=r"storage\.artifacts: file://.* is another place on"), elsewhere.opened():
        pass


@pytest.mark.parametrize("url", ["nosuch://bucket/folder", "s4://bucket"])
def test_a_url_of_an_unknown_file_system_is_refused(url: str) -> None:
    with pytest.raises(PreflightError, match=rf"storage\.artifacts: {url} cannot be used"):
        UrlStore(url).sizes()


def test_a_store_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PreflightError, match=r"storage\.artifacts: file://.* cannot be reached"):
        UrlStore(f"{(tmp_path / 'file').as_uri()}/folder").write("a", b"1")
