"""Tables of paths and labels (`data.labels`): CSV and parquet, as people write them."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsnet.data.image_folder import FolderListing, list_image_folder
from dsnet.data.settings import Columns, FileOptions
from dsnet.data.sources import StreamedFolder
from dsnet.data.splits import splits_of
from dsnet.errors import ConfigError, DataError

ROWS = (("a/1.jpg", "dog"), ("b/2.jpg", "cat"), ("a/3.png", "dog"), ("b/4.webp", "cat"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with four images, whose folders are not their classes."""
    for name, _ in ROWS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def listing(root: Path, text: str, **columns: str) -> FolderListing:
    (root / "labels.csv").write_text(text)
    return list_image_folder(root, FileOptions(labels="labels.csv", columns=Columns(**columns)))


def labelled(found: FolderListing) -> dict[str, str]:
    return {name: found.class_names[label] for name, label in zip(found.names, found.labels, strict=True)}


@pytest.mark.parametrize("header", ["filename,label", "image,width,species", "a,b"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_columns_are_found_by_their_names_or_because_there_are_two(root: Path, header: str, delimiter: str) -> None:
    width = len(header.split(",")) - 2
    lines = [header, *(",".join([name, *["7"] * width, label]) for name, label in ROWS)]
    found = listing(root, "\n".join(lines).replace(",", delimiter) + "\n\n")
    assert labelled(found) == dict(ROWS)
    assert found.class_names == ("cat", "dog")
    assert (found.num_val, found.num_test) == (None, None)


def test_named_columns_and_other_ways_to_write_a_path(root: Path) -> None:
    text = f'nr,where,what\n1,./a/1,dog\n2,{root / "b" / "2.jpg"},cat\n3,a\\3.png,dog\n4,4,"cat"\n'
    assert labelled(listing(root, text, image="where", label="what")) == dict(ROWS)


def test_a_parquet_table_is_read_like_a_csv(root: Path) -> None:
    names, labels = zip(*ROWS, strict=True)
    pq.write_table(
        pa.table({"path": names, "label": [7 if label == "dog" else 10 for label in labels]}), root / "t.parquet"
    )
    found = list_image_folder(root, FileOptions(labels=str(root / "t.parquet")))
    assert found.class_names == ("7", "10")  # numbers in their order
    assert labelled(found)["a/3.png"] == "7"


def test_a_column_of_splits_gives_the_parts(root: Path) -> None:
    lines = ["path,label,split"]
    for part, count in (("train", 20), ("Validation", 3), ("test", 2)):
        for label in ("x", "y"):
            for number in range(count):
                (root / f"{part}{label}{number}.png").touch()
                lines.append(f"{part}{label}{number}.png,{label},{part}")
    source = StreamedFolder(listing(root, "\n".join(lines)), 8)
    splits = splits_of(source)
    names = source.listing.names
    assert {names[row][:10] for row in splits.val} == {"Validation"}
    assert {names[row][:4] for row in splits.test} == {"test"}
    assert {names[row][:5] for row in [*splits.train, *splits.gate]} == {"train"}
    assert source.notes[-2:] == (
        'Labels are those in labels.csv: column "path" for paths, "label" for labels, "split" for parts.',
        "Not used, because they have no row in labels.csv: 2 .jpg, 1 .png, 1 .webp.",
    )


def test_unknown_words_in_a_column_of_splits_are_refused(root: Path) -> None:
    text = "path,label,Split\na/1.jpg,dog,train\nb/2.jpg,cat,train\na/3.png,dog,holdout\nb/4.webp,cat,holdout\n"
    with pytest.raises(DataError) as refused:
        listing(root, text)
    assert str(refused.value) == (
        f"{root / 'labels.csv'}, row 4: column 'Split' gives the part of each image, but it holds unknown values: 'holdout' (2 rows). "
        "Known are train: train, training, trainset, train_set; val: val, valid, validation, dev, val_set; test: test, testing, "
        "testset, test_set. Write one of these words in each row, name another column with data.columns.split, or rename the column if "
        "it does not give parts"
    )
    with pytest.raises(
        DataError, match=r"column 'Split' .*: 'holdout' \(2 rows\), '' \(1 row\), 'x' \(1 row\)\. Known"
    ):
        listing(root, text.replace("dog,train", "dog,").replace("cat,train", "cat,x"))
    with pytest.raises(DataError, match=r"column 'part' .*: 'holdout' \(2 rows\)"):
        listing(root, text.replace("Split", "part"))
    with pytest.raises(DataError, match=r"column 'fold' .*: 'holdout' \(2 rows\)"):
        listing(root, text.replace("Split", "fold"), split="fold")


def test_a_column_of_splits_is_no_column_of_labels_unless_it_is_named(root: Path) -> None:
    text = "path,split\na/1.jpg,train\nb/2.jpg,test\na/3.png,train\nb/4.webp,test\n"
    with pytest.raises(DataError, match=r"which column is the label\? Its columns are path, split"):
        listing(root, text)
    found = listing(root, text, label="split")
    assert (found.class_names, found.num_test) == (("test", "train"), None)
    found = listing(root, text.replace("split", "part").replace("train", "wing").replace("test", "tail"))
    assert found.class_names == ("tail", "wing")


@pytest.mark.parametrize(
    ("column", "values", "note"),
    [
        (
            "fold",
            ("train", "train", "test", "test"),
            '"fold" is not used. Column "fold" holds names of parts (test, train): data.columns.split uses it.',
        ),
        ("fold", ("1", "2", "1", "2"), '"fold" is not used.'),
        ("part", ("wing", "tail", "wing", "tail"), '"part" is not used.'),
    ],
)
def test_columns_that_are_not_used_are_told(root: Path, column: str, values: tuple[str, ...], note: str) -> None:
    lines = [f"{name},{label},{value}" for (name, label), value in zip(ROWS, values, strict=True)]
    found = listing(root, "\n".join([f"path,label,{column}", *lines]))
    assert labelled(found) == dict(ROWS)
    assert (found.num_val, found.num_test) == (None, None)
    assert found.notes == (
        f'Labels are those in labels.csv: column "path" for paths, "label" for labels, none for parts; {note}',
    )


def test_of_many_columns_the_first_are_named_and_one_may_have_no_name(root: Path) -> None:
    names = [f"x{number}" for number in range(9)]
    text = "\n".join([",".join(["", "path", "label", *names]), *(f"0,{name},{label},7" for name, label in ROWS)])
    (note,) = listing(root, text).notes
    assert note.endswith(
        'none for parts; number 1 (without a name), "x0", "x1", "x2", "x3", "x4", "x5", "x6", 2 more are not used.'
    )


def test_images_that_the_pattern_leaves_out_are_told(root: Path) -> None:
    (root / "labels.csv").write_text("path,label\na/1.jpg,dog\nb/2.jpg,cat\n")
    found = list_image_folder(root, FileOptions(labels="labels.csv", include="*.jpg"))
    assert 'Not used, because data.include "*.jpg" leaves them out: 1 .png, 1 .webp.' in found.notes


def test_other_labels_are_another_fingerprint(root: Path) -> None:
    text = "path,label\n" + "".join(f"{name},{label}\n" for name, label in ROWS)
    prints = {listing(root, each).fingerprint for each in (text, text.replace("dog", "ape"), text + "\n")}
    assert len(prints) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "path,label\nz.jpg,dog\na/1.jpg,cat\n",
            r"labels\.csv: 1 of 2 rows name no image below .*: 'z\.jpg' \(row 2\)",
        ),
        ("path,label\na/1.jpg,dog\n./a/1.jpg,cat\n", r"labels\.csv, row 3: './a/1\.jpg' is in the table twice"),
        ("path,label\na/1.jpg,\n", r"labels\.csv, row 2: the image or its label is empty"),
        ("path,label\na/1.jpg,dog\n", r"all rows have the label 'dog'"),
        ("path,label\n", r"labels\.csv: no rows"),
        ("x,y,z\n1,2,3\n", r"which column is the image\? Its columns are x, y, z; name it with data\.columns\.image"),
        ('path,label\n"a/1.jpg,dog\n', r"labels\.csv: no CSV file"),
        ("path,label,split\na/1.jpg,dog,test\nb/2.jpg,cat,test\n", r"no row belongs to the part train"),
        ("path,label,split\na/1.jpg,dog,train\nb/2.jpg,cat,val\n", r"class 'cat' has no image in the part train"),
        ("path,label\n../secret.jpg,dog\n/etc/passwd,cat\n", r"2 of 2 rows name no image"),
    ],
)
def test_a_wrong_table_is_told_with_its_row(root: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        listing(root, text)


def test_a_wrong_column_or_file_is_told(root: Path) -> None:
    with pytest.raises(DataError, match=r"data\.columns\.label: no column 'labl'; did you mean 'label'"):
        listing(root, "path,label\na/1.jpg,dog\n", label="labl")
    with pytest.raises(DataError, match=r"gone\.csv: cannot be read"):
        list_image_folder(root, FileOptions(labels="gone.csv"))
    with pytest.raises(ConfigError, match=r"data\.skip_broken is -1"):
        FileOptions(skip_broken=-1)


@pytest.mark.parametrize("name", ["labels.csv", "labels.parquet"])
def test_a_table_that_would_never_end_is_refused(root: Path, name: str) -> None:
    (root / name).symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"cannot be read \(it is a device, not a file\)"):
        list_image_folder(root, FileOptions(labels=name))
    (root / name).unlink()
    os.mkfifo(root / name)
    with pytest.raises(DataError, match=r"cannot be read \(it is a named pipe, not a file\)"):
        list_image_folder(root, FileOptions(labels=name))
