"""Loading by name, and the embedded digits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import datasets

from dsnet.data.images import ImageSet
from dsnet.data.registry import DataSet, check_source, data_set_names, find_data_set, load_images, register_data_set
from dsnet.data.settings import Augmentation, DataSettings, FileOptions
from dsnet.errors import ConfigError, DataError


def test_digits_are_the_scans_scaled_to_bytes() -> None:
    digits = load_images("digits")
    scans = datasets.load_digits()
    assert digits.image_shape == (1, 8, 8)
    assert digits.num_images == 1797
    assert digits.class_names == tuple("0123456789")
    assert digits.official_test is None
    assert np.array_equal(digits.labels.numpy(), scans.target)
    assert np.allclose(digits.images[:, 0].numpy() / 255 * 16, scans.images, atol=0.04)
    assert (int(digits.images.min()), int(digits.images.max())) == (0, 255)


def test_digits_are_the_same_where_scikit_learn_keeps_them_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load_images("digits").fingerprint
    monkeypatch.setattr("dsnet.data.digits._FILE", ("elsewhere",))
    assert load_images("digits").fingerprint == expected


def test_two_loads_of_digits_have_one_fingerprint() -> None:
    assert load_images("digits").fingerprint == load_images("digits").fingerprint


def test_digits_are_resized_on_demand() -> None:
    resized = load_images("digits", image_size=16)
    assert resized.image_shape == (1, 16, 16)
    assert resized.images.dtype == torch.uint8
    assert load_images("digits", image_size=8).fingerprint == load_images("digits").fingerprint


def test_digits_are_resized_to_a_size_that_is_no_square() -> None:
    whole = load_images("digits")
    wide = load_images("digits", image_size=[8, 24])  # type: ignore[arg-type]
    assert wide.image_shape == (1, 8, 24)
    assert Augmentation.for_images(wide).crop_padding == 1, "an eighth of the shorter side"
    assert torch.equal(wide.images.float().mean((2, 3)).round(), whole.images.float().mean((2, 3)).round())
    assert load_images("digits", image_size=(16, 16)).fingerprint == load_images("digits", image_size=16).fingerprint


def test_digits_refuse_a_path_that_they_would_ignore(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"embedded: remove data\.path"):
        load_images("digits", tmp_path)


def test_an_unknown_name_gets_a_suggestion_and_the_known_names() -> None:
    with pytest.raises(ConfigError, match=r"unknown data set 'cifar01'; did you mean 'cifar10'.*digits.*image_folder"):
        load_images("cifar01")


def test_a_name_like_no_other_gets_the_known_names() -> None:
    with pytest.raises(
        ConfigError, match="unknown data set 'zzz'; known: cifar10, cifar100, digits, image_folder, parquet"
    ):
        load_images("zzz")


@pytest.mark.parametrize("image_size", [0, 7, 513, -8, [8], [8, 8, 8], [8, 7], [513, 8], "8x16", True, [8.0, 16], []])
def test_an_image_size_out_of_range_is_refused(image_size: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"must be the side of a square or \[HEIGHT, WIDTH\], in pixels from 8 to 512"
    ):
        load_images("digits", image_size=image_size)


def test_a_taken_name_cannot_be_registered_again() -> None:
    digits = find_data_set("digits")
    assert register_data_set(digits) is digits
    with pytest.raises(ConfigError, match="'digits' is registered already"):
        register_data_set(replace(digits, native_size=9))
    assert data_set_names() == ("cifar10", "cifar100", "digits", "image_folder", "parquet")


def test_a_data_set_is_one_record_with_its_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsnet.data.registry._DATA_SETS", {})

    def load(path: str | Path | None, image_size: int | None, options: FileOptions) -> ImageSet:
        assert (path, options.colour) == ("somewhere", None)
        return ImageSet.create("mine", torch.zeros((4, 1, 9, 9), dtype=torch.uint8), torch.arange(4), "abcd")

    register_data_set(DataSet(name="mine", summary="made here", loader=load, native_size=9))
    assert load_images("mine", "somewhere", image_size=8).image_shape == (1, 8, 8)
    with pytest.raises(ConfigError, match=r"data\.skip_broken: the data set mine does not take it; remove it"):
        check_source(DataSettings(name="mine", skip_broken=1))


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "image_folder", "parquet"])
class TestWhereTheDataLies:
    def test_without_path_and_variable_both_ways_out_are_named(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("DSNET_DATA", raising=False)
        with pytest.raises(DataError, match=f"{name}.*data.path.*DSNET_DATA"):
            load_images(name, image_size=32)

    def test_a_missing_folder_is_named_with_where_it_was_configured(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DSNET_DATA", str(tmp_path / "gone"))
        with pytest.raises(DataError, match=r"gone .from the environment variable DSNET_DATA. does not exist"):
            load_images(name, image_size=32)
        with pytest.raises(DataError, match=r"elsewhere does not exist; give its folder with --data"):
            load_images(name, tmp_path / "elsewhere", image_size=32)

    def test_an_empty_folder_is_refused(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=str(tmp_path)):
            load_images(name, tmp_path, image_size=32)
