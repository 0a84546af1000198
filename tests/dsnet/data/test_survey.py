"""Folders of images of all kinds: described correctly, or refused with a message that says what was
found and what is expected."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from dsnet.data.cifar10 import holds_cifar10
from dsnet.data.survey import survey_folder
from dsnet.errors import DataError
from tests.dsnet.data.folders import GREY, fill


def test_a_folder_is_told_by_its_classes_sizes_and_colours(tmp_path: Path) -> None:
    fill(tmp_path / "cats", 5)
    fill(tmp_path / "dogs", 2, size=(20, 50))
    (tmp_path / ".hidden").mkdir()
    survey = survey_folder(tmp_path)
    assert survey.class_sizes == {"cats": 5, "dogs": 2}
    assert (survey.num_images, survey.short_side, survey.is_grey) == (7, 30, False)
    assert set(survey.sizes) == {(40, 30), (20, 50)}


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ([(40, 30), (80, 60)], (30, 40)),
        ([(30, 60), (31, 61)], (60, 30)),
        ([(40, 30), (30, 40)], None),
        ([(40, 30), (40, 20)], None),
        ([(40, 39), (40, 39)], None),
    ],
)
def test_pictures_of_one_oblong_shape_are_seen_to_be_so(
    tmp_path: Path, sizes: Sequence[tuple[int, int]], shape: tuple[int, int] | None
) -> None:
    for name, size in zip(("cats", "dogs"), sizes, strict=True):
        fill(tmp_path / name, 2, size=size)
    assert survey_folder(tmp_path).oblong_shape == shape


def test_no_more_files_are_decoded_than_are_needed_and_they_lie_evenly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsnet.data.survey.MAX_OPENED", 4)
    fill(tmp_path / "a", 4)
    fill(tmp_path / "b", 3, size=(20, 50))
    survey = survey_folder(tmp_path)
    assert survey.sizes == ((40, 30), (40, 30), (20, 50), (20, 50))
    assert survey.num_images == 7


def test_grey_pictures_are_seen_to_be_grey(tmp_path: Path) -> None:
    fill(tmp_path / "a", 1, colour=GREY)
    fill(tmp_path / "b", 1, colour=GREY)
    assert survey_folder(tmp_path).is_grey


def test_a_folder_with_a_test_part_counts_both(tmp_path: Path) -> None:
    for part in ("train", "test"):
        fill(tmp_path / part / "a", 2)
        fill(tmp_path / part / "b", 1)
    assert survey_folder(tmp_path).class_sizes == {"a": 4, "b": 2}


def test_files_that_do_not_decode_are_named(tmp_path: Path) -> None:
    fill(tmp_path / "a", 2)
    fill(tmp_path / "b", 2)
    (tmp_path / "b" / "torn.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"1 of 5 opened images cannot be used:\s+.*torn\.jpg"):
        survey_folder(tmp_path)


@pytest.mark.parametrize(("place", "message"), [("", r"images \(1\) lie in the folder itself"), ("a", "found 1 class")])
def test_a_folder_without_classes_is_told(tmp_path: Path, place: str, message: str) -> None:
    fill(tmp_path / place, 1)
    with pytest.raises(DataError, match=message):
        survey_folder(tmp_path)


def test_an_empty_folder_and_no_folder_are_told(tmp_path: Path) -> None:
    for root, message in ((tmp_path, "no images in it or below it"), (tmp_path / "gone", "does not exist")):
        with pytest.raises(DataError, match=message):
            survey_folder(root)


@pytest.mark.parametrize("file", ["cifar-10-batches-py/data_batch_1", "cifar-10-python.tar.gz"])
def test_cifar10_is_known_by_its_batches(tmp_path: Path, file: str) -> None:
    assert not holds_cifar10(tmp_path)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    assert holds_cifar10(tmp_path)
