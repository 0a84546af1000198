"""CIFAR-10's official python batches, made by the tests as Python 2 and Python 3 write them, and
hostile ones."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsnet.data.cifar10 import CLASS_NAMES, load_cifar10
from dsnet.data.images import ImageSet
from dsnet.errors import DataError

NAMES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")
NUM_IMAGES = 4  # a batch; the official ones hold 10,000

Writer = Callable[[np.ndarray, list[int]], bytes]


def pixels_of(number: int, num_images: int = NUM_IMAGES) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (num_images, 3072), dtype=np.uint8)


def labels_of(number: int) -> list[int]:
    return [(number + row) % 10 for row in range(NUM_IMAGES)]


def by_python_2(data: np.ndarray, labels: list[int]) -> bytes:
    """The bytes that cPickle of Python 2 wrote for the official files, opcode by opcode: all
    strings are bytes (U, T)."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    raw = data.tobytes()
    shape = b"M" + struct.pack("<H", data.shape[0]) + b"M" + struct.pack("<H", data.shape[1]) + b"\x86"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + text(b"b") + b"tR(K\x01" + shape
        + b"cnumpy\ndtype\n(" + text(b"u1") + b"K\x00K\x01tR(K\x03" + text(b"|") + b"NNN" + 2 * b"J\xff\xff\xff\xff"
        + b"K\x00tb\x89T" + struct.pack("<i", len(raw)) + raw + b"tb"
    )  # fmt: skip
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    head = text(b"batch_label") + text(b"training batch 1 of 5")
    return b"\x80\x02}(" + head + text(b"labels") + numbers + text(b"data") + array + b"u."


def by_python_3(protocol: int) -> Writer:
    return lambda data, labels: pickle.dumps({b"data": data, b"labels": labels}, protocol=protocol)


def by_python_3_with_text_keys(data: np.ndarray, labels: list[int]) -> bytes:
    return pickle.dumps({"data": data, "labels": labels}, protocol=2)


def meta(label_names: object = CLASS_NAMES, num_images: int = NUM_IMAGES) -> bytes:
    names = list(label_names) if isinstance(label_names, tuple) else label_names
    return pickle.dumps({"label_names": names, "num_cases_per_batch": num_images, "num_vis": 3072}, protocol=2)


def write_all(folder: Path, writer: Writer = by_python_2) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(NAMES):
        (folder / name).write_bytes(writer(pixels_of(number), labels_of(number)))
    (folder / "batches.meta").write_bytes(meta())
    return folder


def archive_of(folder: Path, archive: Path) -> Path:
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, arcname="cifar-10-batches-py")
    return archive


def assert_is_the_set(image_set: ImageSet) -> None:
    expected = np.concatenate([pixels_of(number) for number in range(6)]).reshape(-1, 3, 32, 32)
    assert np.array_equal(image_set.images.numpy(), expected)
    assert image_set.labels.tolist() == [label for number in range(6) for label in labels_of(number)]
    assert image_set.official_test is not None
    assert image_set.official_test.tolist() == [False] * 20 + [True] * 4
    assert image_set.class_names == CLASS_NAMES


def test_the_python_2_batch_of_these_tests_is_what_pickle_itself_reads() -> None:
    batch = pickle.loads(by_python_2(pixels_of(0), labels_of(0)), encoding="bytes")  # noqa: S301 (our own bytes)
    assert np.array_equal(batch[b"data"], pixels_of(0))
    assert batch[b"labels"] == labels_of(0)


@pytest.mark.parametrize(
    "writer", [by_python_2, by_python_3(2), by_python_3(3), by_python_3(4), by_python_3_with_text_keys]
)
def test_batches_are_read_whoever_wrote_them(tmp_path: Path, writer: Writer) -> None:
    assert_is_the_set(load_cifar10(write_all(tmp_path / "cifar-10-batches-py", writer)))


@pytest.mark.parametrize("subfolder", ["cifar-10-batches-py", "cifar10", "cifar10/cifar-10-batches-py"])
def test_batches_are_found_below_the_given_folder(tmp_path: Path, subfolder: str) -> None:
    write_all(tmp_path / subfolder)
    assert_is_the_set(load_cifar10(tmp_path))


@pytest.mark.parametrize("given_path", ["", "cifar-10-python.tar.gz"])
def test_the_archive_is_read_without_unpacking_it(tmp_path: Path, given_path: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    archive_of(write_all(tmp_path / "source"), home / "cifar-10-python.tar.gz")
    assert_is_the_set(load_cifar10(home / given_path))
    assert os.listdir(home) == ["cifar-10-python.tar.gz"]


@pytest.mark.parametrize("missing", [*NAMES, "batches.meta"])
def test_a_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    folder = write_all(tmp_path / "cifar-10-batches-py")
    (folder / missing).unlink()
    with pytest.raises(DataError, match=f"{missing} is missing; unpack"):
        load_cifar10(folder)
    with pytest.raises(DataError, match=f"cifar.tar.gz: cifar-10-batches-py/{missing} is missing in it"):
        load_cifar10(archive_of(folder, tmp_path / "cifar.tar.gz"))


@pytest.mark.parametrize("kept", [0, 10, 1000, -1])
def test_a_truncated_archive_is_named(tmp_path: Path, kept: int) -> None:
    archive = archive_of(write_all(tmp_path / "source"), tmp_path / "cifar-10-python.tar.gz")
    archive.write_bytes(archive.read_bytes()[: kept if kept >= 0 else -5000])
    with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz: not a whole tar\.gz archive .*fetch it again"):
        load_cifar10(archive)


def broken_batch(**changes: object) -> bytes:
    return pickle.dumps({"data": pixels_of(0), "labels": labels_of(0), **changes}, protocol=3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a whole CIFAR-10 batch"),
        (by_python_2(pixels_of(0), labels_of(0))[:-3000], "not a whole CIFAR-10 batch"),
        (b"<html>404</html>", "not a whole CIFAR-10 batch"),
        (pickle.dumps([1, 2], protocol=2), "must hold a dictionary, holds list"),
        (broken_batch(data=None), "'data' must be an array of pixels, is NoneType"),
        (broken_batch(data=pixels_of(0).astype(np.float32)), "'data' must be a plain uint8 array"),
        (broken_batch(data=np.array([print], dtype=object)), "not a whole CIFAR-10 batch"),
        (broken_batch(data=np.array(["x", None], dtype=object)), "'data' must be a plain uint8 array"),
        (broken_batch(data=np.asfortranarray(pixels_of(0))), "'data' must be a plain uint8 array"),
        (broken_batch(data=pixels_of(0)[:, :784]), r"'data' has shape \(4, 784\), must be \(images, 3072\)"),
        (broken_batch(data=pixels_of(0)[:0], labels=[]), r"'data' has shape \(0, 3072\)"),
        (broken_batch(data=pixels_of(0)[:3]), "3 images and 4 labels, but batches.meta says 4"),
        (broken_batch(data=pixels_of(0)[:3], labels=[0, 1, 2]), "3 images and 3 labels, but batches.meta says 4"),
        (broken_batch(labels=None), "'labels' must be a list of integers"),
        (broken_batch(labels=[0, 1, "2", 3]), "'labels' must be a list of integers"),
        (broken_batch(labels=[0, 1, True, 3]), "'labels' must be a list of integers"),
        (broken_batch(labels=[0, 1, 10, 3]), r"row 2: label 10 is outside 0\.\.9"),
        (broken_batch(labels=[0, 1, 10**30, 3]), r"row 2: label 1000000000000000000000000000000 is outside 0\.\.9"),
        (broken_batch(labels=[0, -1, 2, 3]), r"row 1: label -1 is outside 0\.\.9"),
    ],
)
def test_a_broken_batch_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    folder = write_all(tmp_path / "cifar-10-batches-py")
    (folder / "data_batch_3").write_bytes(content)
    with pytest.raises(DataError, match=rf"data_batch_3[:,] {message}"):
        load_cifar10(folder)


@pytest.mark.parametrize("names", [(*CLASS_NAMES[1:], CLASS_NAMES[0]), (), None])
def test_class_names_in_another_order_are_refused(tmp_path: Path, names: object) -> None:
    folder = write_all(tmp_path / "cifar-10-batches-py")
    (folder / "batches.meta").write_bytes(meta(names))
    with pytest.raises(DataError, match=r"batches\.meta: label_names is .*not the official CIFAR-10"):
        load_cifar10(folder)


class Hostile:
    """A pickle of it runs a shell command when the ordinary unpickler reads it."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize("name", ["data_batch_2", "batches.meta"])
def test_a_hostile_pickle_is_refused_and_nothing_of_it_runs(tmp_path: Path, name: str) -> None:
    folder, trace = write_all(tmp_path / "cifar-10-batches-py"), tmp_path / "trace"
    hostile = pickle.dumps({"data": Hostile(os.system, f"touch {trace}"), "labels": []}, protocol=2)
    pickle.loads(hostile)  # noqa: S301 (shows that it would)
    assert trace.exists()
    trace.unlink()
    (folder / name).write_bytes(hostile)
    with pytest.raises(DataError, match=f"{name}: not a whole CIFAR-10 batch .*system, which is not allowed"):
        load_cifar10(folder)
    assert not trace.exists()


@pytest.mark.parametrize("function", [eval, exec, getattr, __import__, open, np.load, np.frombuffer, bytearray])
def test_no_function_but_an_arrays_own_is_reachable(tmp_path: Path, function: Callable) -> None:
    folder = write_all(tmp_path / "cifar-10-batches-py")
    content = pickle.dumps(Hostile(function, "1"), protocol=2)
    (folder / "test_batch").write_bytes(content)
    with pytest.raises(DataError, match="which is not allowed in a data file"):
        load_cifar10(folder)


def test_an_array_whose_bytes_do_not_fill_its_shape_is_refused(tmp_path: Path) -> None:
    folder = write_all(tmp_path / "cifar-10-batches-py")
    content = by_python_2(pixels_of(0), labels_of(0))
    shape, lie = b"M\x04\x00M\x00\x0c\x86", b"M\x05\x00M\x00\x0c\x86"
    assert content.count(shape) == 1
    (folder / "data_batch_1").write_bytes(content.replace(shape, lie))
    with pytest.raises(DataError, match=r"data_batch_1: the pixels do not fill the shape \(5, 3072\)"):
        load_cifar10(folder)


@pytest.mark.parametrize(
    "opcodes", [b"\x80\x02}r\xff\xff\xff\x7f.", b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b"abc."]
)
def test_a_few_damaged_bytes_cannot_ask_for_gigabytes(tmp_path: Path, opcodes: bytes) -> None:
    folder = write_all(tmp_path / "cifar-10-batches-py")
    (folder / "test_batch").write_bytes(opcodes)
    tracemalloc.start()
    with pytest.raises(DataError, match="test_batch"):
        load_cifar10(folder)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000_000


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_damaged_batch_is_read_or_is_a_data_error_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(by_python_2(pixels_of(0, num_images=1), [3]))
    for _ in range(data.draw(st.integers(0, 3))):
        # The head and the tail: between them lie pixels, where any byte is right.
        content[data.draw(st.integers(-30, 220))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    archive = tmp_path_factory.mktemp("fuzz") / "cifar.tar.gz"
    whole = by_python_2(pixels_of(0, num_images=1), [3])
    files = dict.fromkeys(NAMES, whole) | {"test_batch": bytes(content), "batches.meta": meta(num_images=1)}
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for name, file in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(file)
            tar.addfile(member, io.BytesIO(file))
    try:
        image_set = load_cifar10(archive)
    except DataError as error:
        assert "test_batch" in str(error)  # noqa: PT017 (either outcome is right)
    else:
        assert image_set.num_images == 6
