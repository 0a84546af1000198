"""CIFAR-100's official python batches, and archives that would fill the memory."""

from __future__ import annotations

import io
import pickle
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from dsnet.data.cifar10 import load_cifar10
from dsnet.data.cifar100 import holds_cifar100, load_cifar100
from dsnet.errors import DataError

NAMES = [f"class {number:02d}" for number in range(100)]


def pixels_of(seed: int, number: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (number, 3072), dtype=np.uint8)


def write(folder: Path) -> Path:
    folder.mkdir(parents=True)
    parts = {"train": (0, [99, 3, 0]), "test": (1, [7, 42])}
    for name, (seed, labels) in parts.items():
        batch = {b"data": pixels_of(seed, len(labels)), b"fine_labels": labels, b"coarse_labels": [0] * len(labels)}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    meta = {b"fine_label_names": [name.encode() for name in NAMES], b"coarse_label_names": [b"x"]}
    (folder / "meta").write_bytes(pickle.dumps(meta, protocol=2))
    return folder


@pytest.mark.parametrize("place", ["", "cifar-100-python", "archive"])
def test_fine_labels_and_both_parts_are_read(tmp_path: Path, place: str) -> None:
    root = tmp_path / "data"
    folder = write(tmp_path / "unpacked" if place == "archive" else root / place)
    if place == "archive":
        root.mkdir()
        with tarfile.open(root / "cifar-100-python.tar.gz", "w:gz") as tar:
            tar.add(folder, "cifar-100-python")
    assert holds_cifar100(root)
    images = load_cifar100(root)
    assert images.class_names == tuple(NAMES)
    assert images.labels.tolist() == [99, 3, 0, 7, 42]
    expected = np.concatenate([pixels_of(0, 3), pixels_of(1, 2)]).reshape(-1, 3, 32, 32)
    assert np.array_equal(images.images.numpy(), expected)
    assert images.official_test is not None
    assert images.official_test.tolist() == [False] * 3 + [True] * 2


def test_what_is_missing_or_wrong_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no CIFAR-100 in .*cifar-100-python\.tar\.gz; set data\.path"):
        load_cifar100(tmp_path)
    folder = write(tmp_path / "c")
    (folder / "train").write_bytes(pickle.dumps({"data": pixels_of(0, 1), "fine_labels": [100]}, protocol=2))
    with pytest.raises(DataError, match=r"train, row 0: label 100 is outside 0\.\.99"):
        load_cifar100(folder)


def test_a_batch_that_is_a_device_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "c")
    (folder / "train").unlink()
    (folder / "train").symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"no CIFAR-100"):
        load_cifar100(folder)


def bomb(file: Path, name: str, num_bytes: int) -> None:
    """An archive whose header promises a member of this size; its content is zeros as far as they
    are written."""
    member = tarfile.TarInfo(name)
    member.size = num_bytes
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    with file.open("wb") as opened:
        opened.write(packer.compress(member.tobuf()))
        zeros = bytes(2**20)
        for _ in range(32):
            opened.write(packer.compress(zeros))
        opened.write(packer.flush())


@pytest.mark.parametrize("name", ["cifar-10-batches-py/data_batch_1", "something/else"])
def test_a_bomb_of_three_gigabytes_is_refused_before_it_is_unpacked(tmp_path: Path, name: str) -> None:
    file = tmp_path / "cifar-10-python.tar.gz"
    bomb(file, name, 3 * 2**30)
    start = time.process_time()
    with pytest.raises(
        DataError, match=r"has 3\.0 GiB, so that this is not the official archive of CIFAR-10 \(at most 256 MiB"
    ):
        load_cifar10(file)
    assert time.process_time() - start < 2


def test_many_small_members_are_refused_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsnet.data.cifar_batches.MAX_ARCHIVE_BYTES", 2**20)
    file = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(file, "w:gz", compresslevel=1) as tar:
        for number in range(3):
            member = tarfile.TarInfo(f"{number}")
            member.size = 400 * 2**10
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    with pytest.raises(DataError, match=r"2 has 400 KiB, .*1\.0 MiB in all"):
        load_cifar10(file)
