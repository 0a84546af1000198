"""The layouts of image folders that people have, each written as it is published."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dsnet.data.image_folder import FolderListing, list_image_folder
from dsnet.data.settings import FileOptions
from dsnet.data.sources import StreamedFolder, load_source
from dsnet.data.splits import SPLIT_NAMES, splits_of
from dsnet.errors import DataError
from tests.dsnet.data.folders import fill

TILES = Path(__file__).parents[4] / "shared" / "data" / "magnetic-tiles"


def put(root: Path, *names: str) -> None:
    """Empty files: listing a folder opens none."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def many(folder: str, count: int, suffix: str = "jpg") -> list[str]:
    return [f"{folder}/{number:03d}.{suffix}" for number in range(count)]


def parts(listing: FolderListing) -> dict[str, list[str]]:
    """The files of each part, by the listing's own order."""
    end = len(listing.names) - (listing.num_test or 0)
    start = end - (listing.num_val or 0)
    found = {"train": listing.names[:start], "val": listing.names[start:end], "test": listing.names[end:]}
    return {part: names for part, names in found.items() if names}


def splits_by_folder(root: Path) -> dict[str, Counter[str]]:
    """For each split, the number of its files in each top folder."""
    source = StreamedFolder(list_image_folder(root), 8)
    splits = splits_of(source)
    names = source.listing.names
    return {split: Counter(Path(names[row]).parts[0] for row in splits[split]) for split in SPLIT_NAMES}


@pytest.mark.parametrize("val", ["val", "validation", "valid", "VAL"])
@pytest.mark.parametrize("train", ["train", "Train", "training"])
def test_a_validation_folder_is_val_beside_a_test_folder(tmp_path: Path, train: str, val: str) -> None:
    for folder, count in ((train, 40), (val, 6), ("Test", 5)):
        put(tmp_path, *many(f"{folder}/cat", count), *many(f"{folder}/dog", count))
    found = splits_by_folder(tmp_path)
    assert found == {"train": {train: 72}, "gate": {train: 8}, "val": {val: 12}, "test": {"Test": 10}}
    assert list_image_folder(tmp_path).in_words() == (
        "The data has parts: train (80) is divided into train and gate; validation (12) gives val; test (10) gives test.",
    )


def test_without_a_test_folder_the_validation_folder_is_divided_into_val_and_test(tmp_path: Path) -> None:
    """The layout of Imagenette."""
    for folder, count in (("train", 50), ("val", 11)):
        put(tmp_path, *many(f"imagenette2-160/{folder}/n01440764", count, "JPEG"))
        put(tmp_path, *many(f"imagenette2-160/{folder}/n02102040", count, "JPEG"))
    put(tmp_path, "imagenette2-160/noisy_imagenette.csv", "__MACOSX/imagenette2-160/._x.jpg")
    source = StreamedFolder(list_image_folder(tmp_path), 8)
    splits = splits_of(source)
    folder = {split: {Path(source.listing.names[row]).parts[1] for row in splits[split]} for split in SPLIT_NAMES}
    assert folder == {"train": {"train"}, "gate": {"train"}, "val": {"val"}, "test": {"val"}}
    assert [len(splits[split]) for split in SPLIT_NAMES] == [90, 10, 11, 11]
    assert source.class_names == ("n01440764", "n02102040")
    assert "is divided into val and test" in source.notes[0]
    assert any("imagenette2-160/" in note for note in source.notes)


def test_tiny_imagenet_is_read_as_it_is_published(tmp_path: Path) -> None:
    for name in ("n01", "n02"):
        put(
            tmp_path,
            *(f"train/{name}/images/{name}_{number}.JPEG" for number in range(20)),
            f"train/{name}/{name}_boxes.txt",
        )
    put(tmp_path, *(f"val/images/val_{number}.JPEG" for number in range(6)), *many("test/images", 4, "JPEG"))
    put(tmp_path, "wnids.txt", "words.txt")
    lines = [f"val_{number}.JPEG\tn0{1 + number % 2}\t0\t32\t44\t62\n" for number in range(6)]
    (tmp_path / "val" / "val_annotations.txt").write_text("".join(lines))
    listing = list_image_folder(tmp_path)
    assert listing.class_names == ("n01", "n02")
    assert (listing.num_val, listing.num_test, len(listing.files)) == (6, None, 46)
    labelled = dict(zip(listing.names, listing.labels, strict=True))
    assert [labelled[f"val/images/val_{number}.JPEG"] for number in range(6)] == [0, 1, 0, 1, 0, 1]
    assert any(note.startswith("test/ is not used (4 images)") for note in listing.notes)
    (tmp_path / "val" / "val_annotations.txt").write_text("".join(reversed(lines[:5])))
    with pytest.raises(DataError, match=r"val_annotations\.txt: images without a line in it: 1, such as val_5\.JPEG"):
        list_image_folder(tmp_path)


def test_labels_that_names_do_not_tell_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    put(tmp_path, *many("train/a", 3), *many("train/b", 3), "val/images/1.jpg", "val/images/2.jpg")
    prints = []
    for labels in ("ab", "ba"):
        (tmp_path / "val" / "val_annotations.txt").write_text(f"1.jpg\t{labels[0]}\n2.jpg\t{labels[1]}\n")
        listing = list_image_folder(tmp_path)
        assert listing.names[-2:] == [
            f"val/images/{1 + labels.index('a')}.jpg",
            f"val/images/{1 + labels.index('b')}.jpg",
        ]
        prints.append(listing.fingerprint)
    assert prints[0] != prints[1]


def test_a_folder_around_everything_and_those_of_the_system_are_skipped(tmp_path: Path) -> None:
    put(
        tmp_path, *many("a/photos/cat", 3), *many("a/photos/dog", 3), "a/photos/cat/@eaDir/000.jpg", "a/.hidden/x/1.jpg"
    )
    put(tmp_path, "__MACOSX/a/photos/cat/1.jpg", "a/photos/cat/Thumbs.db", "a/README.txt")
    listing = list_image_folder(tmp_path)
    assert listing.class_names == ("cat", "dog")
    assert listing.names == [*many("a/photos/cat", 3), *many("a/photos/dog", 3)]
    assert listing.notes == (
        "The images are those in a/photos/, the only folder with images.",
        "Not used, because they are no images: 1 .txt.",
    )


def test_images_in_sub_folders_of_a_class_count(tmp_path: Path) -> None:
    put(tmp_path, "cat/1.jpg", "cat/indoors/2.jpg", "cat/indoors/night/3.jpg", "dog/cam1/1.jpg", "dog/cam2/1.jpg")
    listing = list_image_folder(tmp_path)
    assert dict(zip(listing.names, listing.labels, strict=True)) == {
        "cat/1.jpg": 0,
        "cat/indoors/2.jpg": 0,
        "cat/indoors/night/3.jpg": 0,
        "dog/cam1/1.jpg": 1,
        "dog/cam2/1.jpg": 1,
    }
    assert any("sub-folders of the classes count" in note for note in listing.notes)


def test_folders_that_may_be_one_level_too_high_are_said(tmp_path: Path) -> None:
    put(tmp_path, *(f"{fold}/{name}/1.jpg" for fold in ("fold1", "fold2") for name in ("cat", "dog")))
    listing = list_image_folder(tmp_path)
    assert listing.class_names == ("fold1", "fold2")
    assert any(
        f"If the classes are cat, dog instead, pass --data {tmp_path / 'fold1'}" in note for note in listing.notes
    )


def test_other_files_are_counted_by_suffix(tmp_path: Path) -> None:
    put(tmp_path, *many("cat", 2), *many("dog", 2, "webp"), *many("cat", 3, "heic"), "dog/notes", "list.csv", "top.png")
    put(tmp_path, "annotations/1.xml", "annotations/2.xml")
    listing = list_image_folder(tmp_path)
    assert len(listing.files) == 4
    assert listing.notes[-1] == "Not used, because they are no images: 3 .heic, 2 .xml, 1 without suffix, 1 .csv."
    assert any("belong to no class: 1 .png" in note for note in listing.notes)


def test_images_that_the_pattern_leaves_out_are_told_apart_from_other_files(tmp_path: Path) -> None:
    put(tmp_path, *many("cat", 2, "png"), *many("dog", 2, "png"), *many("cat", 3), "dog/notes.txt", "cat/1.JPEG")
    listing = list_image_folder(tmp_path, FileOptions(include="*.png"))
    assert listing.notes == (
        'Not used, because data.include "*.png" leaves them out: 3 .jpg, 1 .jpeg.',
        "Not used, because they are no images: 1 .txt.",
    )
    put(tmp_path, *many("cow", 2))
    with pytest.raises(
        DataError,
        match=r"cow: no file in this class folder matches data\.include '\*\.png' \(holds 2 \.jpg\); write another",
    ):
        list_image_folder(tmp_path, FileOptions(include="*.png"))


def test_the_only_folder_with_images_and_a_pattern(tmp_path: Path) -> None:
    put(tmp_path, *many("all/cat", 2, "png"), *many("all/dog", 2, "png"), "other/1.jpg")
    listing = list_image_folder(tmp_path, FileOptions(include="*.png"))
    assert 'Not used, because data.include "*.png" leaves them out: 1 .jpg.' in listing.notes


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["train/1.jpg", "test/1.jpg"],
            r"test/ and train/ stand for parts of the data, but train/ has no class folders",
        ),
        (["val/a/1.jpg", "test/a/1.jpg"], r"test/ and val/ stand for parts .* no folder for train"),
        (
            ["train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "valid/a/1.jpg"],
            r"val/ and valid/ both stand for the val part",
        ),
        (["train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "val/c/1.jpg"], r"train/b: this class is missing in .*val"),
        (["a/1.jpg", "b/1.heic"], r"/b: this class folder holds no images, only 1 \.heic"),
        (["a/1.txt"], r"no images in it or below it \(holds 1 \.txt\)"),
        (["train/1.txt", "val/a/1.jpg"], r"found 1 class"),
    ],
)
def test_folders_without_classes_are_refused_and_train_is_never_to_be_removed(
    tmp_path: Path, names: list[str], message: str
) -> None:
    put(tmp_path, *names)
    with pytest.raises(DataError, match=message) as refused:
        list_image_folder(tmp_path)
    assert "remove" not in str(refused.value)


def test_a_folder_that_links_to_itself_ends(tmp_path: Path) -> None:
    put(tmp_path, "a/1.jpg", "b/1.jpg")
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    (tmp_path / "c").symlink_to(tmp_path / "b")
    assert list_image_folder(tmp_path).names == ["a/1.jpg", "b/1.jpg", "c/1.jpg"]


def save(file: Path, pixels: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)


def test_masks_beside_photos_are_said_and_not_taken(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("crack", "free"):
        for number in range(3):
            save(tmp_path / name / "Imgs" / f"{number}.jpg", rng.integers(0, 256, (20, 30), dtype=np.uint8))
            mask = np.zeros((20, 30), dtype=np.uint8)
            mask[:number, :5] = 255
            save(tmp_path / name / "Imgs" / f"{number}.png", mask)
    listing = list_image_folder(tmp_path)
    assert {Path(name).suffix for name in listing.names} == {".jpg"}
    assert any("6 .png files beside .jpg files of the same names look like masks" in note for note in listing.notes)
    only_masks = list_image_folder(tmp_path, FileOptions(include="*.PNG"))
    assert {Path(name).suffix for name in only_masks.names} == {".png"}
    assert [Path(name).parts[0] for name in list_image_folder(tmp_path, FileOptions(include="*/imgs/1.jpg")).names] == [
        "crack",
        "free",
    ]
    with pytest.raises(DataError, match=r"matches data\.include '\*\.gif' \(holds 6 \.jpg, 6 \.png\)"):
        list_image_folder(tmp_path, FileOptions(include="*.gif"))


def test_thumbnails_and_files_named_after_others_are_not_taken(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        photo = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
        (tmp_path / name / "masks").mkdir(parents=True)
        photo.save(tmp_path / name / "1.png")
        photo.resize((15, 10)).save(tmp_path / name / "1.webp")
        photo.save(tmp_path / name / "1_mask.png")
        photo.save(tmp_path / name / "masks" / "1.jpg")
        photo.save(tmp_path / name / "2_thumb.png")  # no image is called 2
    listing = list_image_folder(tmp_path)
    assert listing.names == ["a/1.png", "a/2_thumb.png", "b/1.png", "b/2_thumb.png"]
    assert any(
        "2 .webp files beside .png files of the same names look like thumbnails" in note for note in listing.notes
    )
    assert any("4 files named after another image" in note for note in listing.notes)


def test_photos_of_the_same_names_are_all_taken_and_said(tmp_path: Path) -> None:
    fill(tmp_path / "a", 2)
    fill(tmp_path / "b", 2)
    rng = np.random.default_rng(0)
    save(tmp_path / "a" / "0.jpg", rng.integers(0, 256, (9, 20, 3), dtype=np.uint8))
    listing = list_image_folder(tmp_path)
    assert len(listing.files) == 5
    assert any("Images with the names of other images (.jpg and .png): 1;" in note for note in listing.notes)


@pytest.mark.skipif(not TILES.is_dir(), reason="no magnetic-tiles in ../shared/data")
def test_the_magnetic_tiles_are_read_as_they_are_published() -> None:
    source = load_source("image_folder", TILES, 8, stream=True)
    files = list(TILES.rglob("*.jpg"))
    assert len(source.labels) == len(files) == 1344
    expected = Counter(file.parent.parent.name for file in files)
    counts = np.bincount(source.labels.numpy())
    assert {name: int(count) for name, count in zip(source.class_names, counts, strict=True)} == dict(expected)
    assert any("1,344 .png files beside .jpg files" in note for note in source.notes)
