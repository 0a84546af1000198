"""CIFAR-10 in the hub's parquet layout, made by the tests: whole, in shards, broken, and the real
one where it lies."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dsnet.data.cache import ImageCache
from dsnet.data.cifar10 import CLASS_NAMES, load_cifar10
from dsnet.data.images import ImageSet
from dsnet.data.registry import load_images
from dsnet.errors import DataError

REAL_FOLDERS = (os.environ.get("DSNET_DATA", ""), Path(__file__).parents[4] / "shared" / "data")

Rows = list[dict]
Spoil = Callable[[Rows], None]


def noise(seed: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def make_rows(num_rows: int, first_seed: int = 0) -> Rows:
    """Lossless images of noise, one class after the other; the path names the class as the hub's
    files do."""
    return [
        {
            "img": {"bytes": encoded(noise(first_seed + row)), "path": f"{CLASS_NAMES[row % 10]}/{row:04d}.png"},
            "label": row % 10,
        }
        for row in range(num_rows)
    ]


def write(file: Path, rows: Rows, image_column: str = "img") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    columns = {image_column: [row["img"] for row in rows], "label": [row["label"] for row in rows]}
    pq.write_table(pa.table(columns), file)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    write(folder / "train.parquet", make_rows(20))
    write(folder / "test.parquet", make_rows(10, first_seed=100))
    return folder


def load(folder: Path) -> ImageSet:
    return load_cifar10(folder, ImageCache(folder.parent / "cache"))


def test_pixels_labels_and_the_official_test_part_are_read_in_order(folder: Path) -> None:
    image_set = load(folder)
    seeds = [*range(20), *range(100, 110)]
    expected = np.stack([noise(seed).transpose(2, 0, 1) for seed in seeds])
    assert np.array_equal(image_set.images.numpy(), expected)
    assert image_set.labels.tolist() == [row % 10 for row in range(20)] + list(range(10))
    assert image_set.official_test is not None
    assert image_set.official_test.tolist() == [False] * 20 + [True] * 10
    assert image_set.class_names == CLASS_NAMES


def test_shards_and_the_other_column_name_give_the_same_set(folder: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "hub" / "plain_text"
    rows = make_rows(20)
    write(sharded / "train-00000-of-00002.parquet", rows[:7], image_column="image")
    write(sharded / "train-00001-of-00002.parquet", rows[7:], image_column="image")
    write(sharded / "test-00000-of-00001.parquet", make_rows(10, first_seed=100), image_column="image")
    assert load(tmp_path / "hub").fingerprint == load(folder).fingerprint


def test_several_row_groups_and_small_label_types_are_read(folder: Path) -> None:
    expected = load(folder).fingerprint
    table = pq.read_table(folder / "train.parquet")
    table = table.set_column(1, "label", table.column("label").cast(pa.uint8()))
    pq.write_table(table, folder / "train.parquet", row_group_size=3)
    assert load(folder).fingerprint == expected


@pytest.mark.parametrize("subfolder", ["cifar10", "data", "plain_text", "cifar10/plain_text", "cifar10/data"])
def test_the_files_are_found_below_the_given_folder(folder: Path, tmp_path: Path, subfolder: str) -> None:
    above = tmp_path / "above" / subfolder
    above.parent.mkdir(parents=True)
    folder.rename(above)
    assert load(tmp_path / "above").num_images == 30


def test_the_folder_may_come_from_the_environment(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSNET_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("DSNET_DATA", str(folder))
    assert load_images("cifar10", image_size=16).image_shape == (3, 16, 16)


def test_files_that_name_no_classes_are_told(folder: Path) -> None:
    assert load(folder).notes == ()
    rows = make_rows(10, first_seed=100)
    for row in rows:
        row["img"]["path"] = None
    write(folder / "test.parquet", rows)
    for _ in range(2):  # the second time the pixels come from the cache
        (note,) = load(folder).notes
        assert note.startswith(
            "test.parquet: no names of classes, neither in the metadata nor in the paths of the images; those of CIFAR-10 are assumed "
            "(0 airplane, 1 automobile, "
        )
    named = {"info": {"features": {"label": {"names": list(CLASS_NAMES), "_type": "ClassLabel"}}}}
    table = pq.read_table(folder / "test.parquet").replace_schema_metadata({"huggingface": json.dumps(named)})
    pq.write_table(table, folder / "test.parquet")
    assert load(folder).notes == ()


def test_decoded_pixels_are_cached_and_follow_the_files_content(folder: Path) -> None:
    first = load(folder)
    (cached,) = (folder.parent / "cache").rglob("*.safetensors")
    written = cached.stat().st_mtime_ns
    assert load(folder).fingerprint == first.fingerprint
    assert cached.stat().st_mtime_ns == written
    write(folder / "train.parquet", make_rows(20, first_seed=50))
    assert load(folder).fingerprint != first.fingerprint


def truncated_jpeg(rows: Rows) -> None:
    rows[3]["img"]["bytes"] = encoded(noise(3), "JPEG")[:-150]


def no_image(rows: Rows) -> None:
    rows[3]["img"]["bytes"] = b"not an image"


def null_image(rows: Rows) -> None:
    rows[3]["img"]["bytes"] = None


def null_struct(rows: Rows) -> None:
    rows[3]["img"] = None


def other_size(rows: Rows) -> None:
    rows[3]["img"]["bytes"] = encoded(noise(3, size=28))


def label_too_large(rows: Rows) -> None:
    rows[3]["label"] = 10


def label_negative(rows: Rows) -> None:
    rows[3]["label"] = -1


def null_label(rows: Rows) -> None:
    rows[3]["label"] = None


def swapped_label(rows: Rows) -> None:
    rows[3]["label"] = 5  # its path says cat


@pytest.mark.parametrize("file", ["train.parquet", "test.parquet"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncated_jpeg, "the image does not decode"),
        (no_image, "the image does not decode"),
        (null_image, r"the image's bytes are missing \(null\)"),
        (null_struct, r"the image's bytes are missing \(null\)"),
        (other_size, "the image is 28x28, must be 32x32"),
        (label_too_large, r"label 10 is outside 0\.\.9"),
        (label_negative, r"label -1 is outside 0\.\.9"),
        (null_label, r"the label is missing \(null\)"),
        (swapped_label, "mislabelled: the path 'cat/0003.png' says 'cat', the label 5 says 'dog'"),
    ],
)
def test_a_broken_row_is_named_with_its_file(folder: Path, file: str, spoil: Spoil, message: str) -> None:
    rows = make_rows(10)
    spoil(rows)
    write(folder / file, rows)
    with pytest.raises(DataError, match=f"{file}, row 3: {message}"):
        load(folder)
    assert not list((folder.parent / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize("path", [None, "0003.png", "train/0003.png", "images/3.png"])
def test_a_path_that_names_no_class_says_nothing_about_the_label(folder: Path, path: str | None) -> None:
    rows = make_rows(20)
    expected = load(folder).fingerprint
    rows[3]["img"]["path"] = path
    write(folder / "train.parquet", rows)
    assert load(folder).fingerprint == expected


def test_files_whose_images_have_no_path_at_all_are_read(folder: Path) -> None:
    rows, expected = make_rows(20), load(folder).fingerprint
    for row in rows:
        row["img"]["path"] = None
    write(folder / "train.parquet", rows)
    assert load(folder).fingerprint == expected


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": [0, 1]}, r"no column 'img' or 'image' \(columns: label\)"),
        ({"img": [{"bytes": b"", "path": ""}] * 2}, r"no column 'label' \(columns: img\)"),
        ({"img": [b"", b""], "label": [0, 1]}, "column 'img' is binary, must be struct<bytes: binary, path: string>"),
        ({"img": [{"bytes": "x", "path": ""}] * 2, "label": [0, 1]}, "column 'img' is struct<bytes: string"),
        (
            {"img": [{"bytes": b"", "path": 7}] * 2, "label": [0, 1]},
            "column 'img' is struct<bytes: binary, path: int64>",
        ),
        ({"img": [{"bytes": b""}] * 2, "label": [0, 1]}, "column 'img' is struct<bytes: binary>, must be"),
        ({"img": [{"bytes": b"", "path": ""}] * 2, "label": ["cat", "dog"]}, "column 'label' is string"),
        ({"img": [{"bytes": b"", "path": ""}] * 2, "label": [0.0, 1.0]}, "column 'label' is double"),
        ({"img": pa.array([], pa.string()), "label": pa.array([], pa.int64())}, "holds no rows"),
    ],
)
def test_a_file_with_other_columns_is_named(folder: Path, columns: dict, message: str) -> None:
    pq.write_table(pa.table(columns), folder / "test.parquet")
    with pytest.raises(DataError, match=rf"test\.parquet: {message}"):
        load(folder)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_truncated_file_is_named(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("cifar") / "data"
    write(folder / "train.parquet", make_rows(2))
    content = (folder / "train.parquet").read_bytes()
    (folder / "test.parquet").write_bytes(content)
    (folder / "train.parquet").write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(DataError, match=r"train\.parquet: not a whole parquet file .*fetch it again"):
        load(folder)


@pytest.mark.parametrize(("missing", "found"), [("test", "train"), ("train", "test")])
def test_a_missing_split_is_named(folder: Path, missing: str, found: str) -> None:
    (folder / f"{missing}.parquet").unlink()
    with pytest.raises(DataError, match=rf"{found}\.parquet is there, but {missing}\*\.parquet is missing"):
        load(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "train.parquet").rename(folder / "train-00000-of-00002.parquet")
    with pytest.raises(DataError, match="shard 00001 of the train split is missing"):
        load(folder)


@pytest.mark.parametrize("second", ["train-00000-of-00001.parquet", "train-copy.parquet"])
def test_a_split_that_is_there_twice_is_refused(folder: Path, second: str) -> None:
    (folder / second).write_bytes((folder / "train.parquet").read_bytes())
    with pytest.raises(DataError, match=rf"(more than one train|train split is there more than once).*{second}"):
        load(folder)


def test_a_folder_without_cifar10_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no CIFAR-10 in .*cifar-10-batches-py.*train\*\.parquet.*DSNET_DATA"):
        load_cifar10(tmp_path)


def test_a_path_to_another_file_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"train\.parquet: neither a folder nor cifar-10-python\.tar\.gz"):
        load_cifar10(folder / "train.parquet")


def real_test_file() -> Path | None:
    candidates = [Path(folder) / "cifar10" / "test.parquet" for folder in REAL_FOLDERS if str(folder)]
    return next((file for file in candidates if file.exists()), None)


@pytest.mark.skipif(real_test_file() is None, reason="no cifar10/test.parquet in DSNET_DATA or ../shared/data")
def test_the_real_files_are_read(tmp_path: Path) -> None:
    file = real_test_file()
    assert file is not None
    rows = pq.ParquetFile(file).read_row_group(0).slice(0, 300)  # a part: decoding all 10,000 takes more than a second
    pq.write_table(rows, tmp_path / "train.parquet")
    pq.write_table(rows.slice(0, 100), tmp_path / "test.parquet")
    image_set = load_cifar10(tmp_path, ImageCache(tmp_path / "cache"))
    assert image_set.image_shape == (3, 32, 32)
    assert image_set.num_images == 400
    assert set(image_set.labels.tolist()) == set(range(10))
    assert 90 < float(image_set.images.float().mean()) < 150
