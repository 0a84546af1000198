"""The cache of decoded images: never trusted, never needed."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsnet.data.cache import ImageCache, default_cache_folder
from dsnet.data.images import ImageSet
from dsnet.errors import DataError
from tests.full_disk import FullDisk


class CountingSource:
    """Makes a small set and counts how often it was asked to."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self) -> ImageSet:
        self.num_calls += 1
        images = torch.arange(4 * 48, dtype=torch.uint8).reshape(4, 3, 4, 4)
        is_test = np.array([False, False, True, True])
        return ImageSet.create("small", images, torch.tensor([0, 1, 0, 1]), ("a", "b"), is_test)


def cached_file(folder: Path) -> Path:
    (file,) = folder.rglob("*.safetensors")
    return file


def assert_is_the_set(image_set: ImageSet) -> None:
    original = CountingSource()()
    assert image_set.fingerprint == original.fingerprint
    assert torch.equal(image_set.images, original.images)
    assert image_set.class_names == original.class_names
    assert image_set.official_test is not None
    assert image_set.official_test.dtype == np.bool_
    assert image_set.official_test.tolist() == [False, False, True, True]


def test_the_second_load_reads_what_the_first_decoded(tmp_path: Path) -> None:
    source = CountingSource()
    for _ in range(2):
        assert_is_the_set(ImageCache(tmp_path).load_or_make("small", "ab12", source))
    assert source.num_calls == 1


def test_another_key_is_another_entry(tmp_path: Path) -> None:
    source, cache = CountingSource(), ImageCache(tmp_path)
    cache.load_or_make("small", "ab12", source)
    cache.load_or_make("small", "cd34", source)
    assert source.num_calls == 2


def test_a_set_without_an_official_test_comes_back_without_one(tmp_path: Path) -> None:
    def make() -> ImageSet:
        return ImageSet.create("small", torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]), ("a", "b"))

    cache = ImageCache(tmp_path)
    cache.load_or_make("small", "ab12", make)
    assert cache.load_or_make("small", "ab12", make).official_test is None


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_made_again(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder, source = tmp_path_factory.mktemp("cache"), CountingSource()
    cache = ImageCache(folder)
    cache.load_or_make("small", "ab12", source)
    content = cached_file(folder).read_bytes()
    position = data.draw(st.integers(0, len(content) - 1))
    flipped = bytes([content[position] ^ data.draw(st.integers(1, 255))])
    damaged = data.draw(
        st.sampled_from([content[:position], content[:position] + flipped + content[position + 1 :], b""])
    )
    cached_file(folder).write_bytes(damaged)
    assert_is_the_set(cache.load_or_make("small", "ab12", source))
    assert_is_the_set(cache.load_or_make("small", "ab12", source))
    assert source.num_calls <= 2


def test_an_unwritable_folder_costs_only_the_decoding(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("a file where the folder should be")
    source = CountingSource()
    with caplog.at_level(logging.WARNING):
        assert_is_the_set(ImageCache(blocked / "cache").load_or_make("small", "ab12", source))
    assert "not cached" in caplog.text


@contextmanager
def nobody() -> Iterator[None]:
    """Be a user without rights for the length of a block, where this one is root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_home_folder_into_which_this_user_may_not_look_costs_only_the_decoding(tmp_path: Path) -> None:
    cache = ImageCache(tmp_path / "home" / ".cache")
    (tmp_path / "home").mkdir(mode=0)
    try:
        with nobody():
            with pytest.raises(PermissionError):
                os.stat(tmp_path / "home" / ".cache")
            assert_is_the_set(cache.load_or_make("small", "a" * 64, CountingSource()))
            assert cache.load_or_make_json("broken", "a" * 64, lambda: {"files": 3}) == {"files": 3}
    finally:
        (tmp_path / "home").chmod(0o700)
    assert list((tmp_path / "home").iterdir()) == []


@pytest.mark.parametrize("name", ["load_or_make", "load_or_make_json"])
def test_a_full_disk_costs_only_the_decoding(tmp_path: Path, name: str) -> None:
    cache = ImageCache(tmp_path)
    disk = FullDisk(tmp_path, 0)
    with disk.installed():
        if name == "load_or_make":
            assert_is_the_set(cache.load_or_make("small", "a" * 64, CountingSource()))
        else:
            assert cache.load_or_make_json("broken", "a" * 64, lambda: {"files": 3}) == {"files": 3}
    assert disk.failed
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    cache, source = ImageCache(tmp_path), CountingSource()
    target = tmp_path / "data" / "small-ab12.safetensors"
    target.mkdir(parents=True)  # a folder cannot be replaced by a file
    assert_is_the_set(cache.load_or_make("small", "ab12", source))
    assert list((tmp_path / "data").iterdir()) == [target]


def test_a_source_that_fails_is_not_cached(tmp_path: Path) -> None:
    def fail() -> ImageSet:
        raise DataError("broken.jpg: does not decode")

    with pytest.raises(DataError, match=r"broken\.jpg"):
        ImageCache(tmp_path).load_or_make("small", "ab12", fail)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("DSNET_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache_folder() == tmp_path / "home" / ".cache" / "dsnet-orch"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_folder() == tmp_path / "xdg" / "dsnet-orch"
    monkeypatch.setenv("DSNET_CACHE", str(tmp_path / "own"))
    assert default_cache_folder() == tmp_path / "own"
