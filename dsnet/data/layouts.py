"""The layouts in which people keep labelled images, found from the names of folders and files.

A layout is one folder for each class, or such folders in a folder for each part of the data
(`train`, `val`, `test`). A folder around everything is skipped, and images in sub-folders of a
class belong to the class. Whatever is not used is counted and told.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from dsnet.data.decoding import read_regular_file
from dsnet.data.image_files import (
    SetAside,
    Tree,
    left_out_by,
    masks_and_thumbnails,
    notes_on_others,
    scan,
    suffix_counts,
)
from dsnet.data.settings import Part
from dsnet.errors import DataError
from dsnet.wording import plural

PART_NAMES: Mapping[Part, tuple[str, ...]] = {
    "train": ("train", "training", "trainset", "train_set"),
    "val": ("val", "valid", "validation", "dev", "val_set"),
    "test": ("test", "testing", "testset", "test_set"),
}
"""Names of the folders of each part, and of the parts in a table of labels, in small letters."""
EXPECTED = "a folder for each class (CLASS/x.jpg), or train/CLASS and test/CLASS, or train/CLASS and val/CLASS"
_NUM_NAMED = 3
_DOCUMENTS = frozenset(
    (
        *(".txt", ".md", ".rst", ".pdf", ".html", ".xml", ".json", ".jsonl", ".csv", ".tsv", ".yaml", ".yml"),
        *(".mat", ".py", ".ipynb", ".zip", ".gz", ".tgz", ".tar", ".parquet"),
    )
)
"""Suffixes of files that describe images; a folder with no others is not taken for an empty
class."""


@dataclass(frozen=True)
class Layout:
    """The images of each part and class, and what was found beside them."""

    parts: Mapping[Part, Mapping[str, Sequence[Path]]]
    """Part -> class -> its images in order. Without folders for parts everything is `train`. All
    parts have the same classes."""
    notes: tuple[str, ...]
    """Sentences about the layout and about files that are not used."""


@dataclass
class _Found:
    """Notes and unused files, collected during the walk through a folder."""

    include: str | None = None
    """As for `scan`."""
    notes: list[str] = field(default_factory=list)
    unused: list[Path] = field(default_factory=list)
    """Files that do not count as images."""


def part_of(name: str) -> Part | None:
    """The part that the name of a folder or a value in a table stands for; None for others."""
    return _parts_by_name().get(name.strip().lower())


@cache
def _parts_by_name() -> Mapping[str, Part]:
    return {name: part for part, names in PART_NAMES.items() for name in names}


def find_layout(root: Path, include: str | None = None) -> Layout:
    """Find the classes and parts below a folder.

    Args:
        root: The folder.
        include: As for `scan`.

    Raises:
        DataError: The images' classes cannot be told, a class has no images, or the parts differ in
            their classes.
    """
    if not root.is_dir():
        raise DataError(f"{root}: not a folder; data.path must be the folder that holds {EXPECTED}")
    tree = scan(root, include)
    if tree.num_images == 0:
        raise DataError(_without_images(tree, include))
    found = _Found(include)
    inner = _inner(tree, found)
    folders = _part_folders(inner)
    parts: dict[Part, dict[str, Tree]] = _parts(inner, folders, found) if folders else {"train": _classes(inner, found)}
    if len(parts["train"]) < 2:
        raise DataError(_too_few_classes(inner, parts["train"]))
    found.unused += inner.others
    aside = masks_and_thumbnails([each for classes in parts.values() for each in classes.values()])
    files: dict[Part, Mapping[str, Sequence[Path]]] = {
        part: {name: _kept(each, aside) for name, each in classes.items()} for part, classes in parts.items()
    }
    found.notes += notes_on_others(found.unused, include)
    return Layout(files, (*found.notes, *aside.notes))


def _without_images(tree: Tree, include: str | None) -> str:
    others = tree.all_others()
    held = f"holds {suffix_counts(others)}" if others else "holds no files"
    if include is not None:
        return f"{tree.path}: no file in it matches data.include {include!r} ({held}); write another pattern"
    return f"{tree.path}: no images in it or below it ({held}); expected {EXPECTED}"


def _inner(tree: Tree, found: _Found) -> Tree:
    """The folder that holds the classes or parts: the root, or the only folder with images below
    it."""
    inner = tree
    while not inner.images:
        filled = [folder for folder in inner.folders if folder.num_images]
        if len(filled) > 1 or not any(folder.num_images for folder in filled[0].folders):
            break
        if any(not folder.num_images and not folder.all_others() for folder in inner.folders):
            break  # beside an empty folder it is rather one of several classes
        found.unused += [file for file in inner.all_others() if filled[0].path not in file.parents]
        inner = filled[0]
    if inner is not tree:
        found.notes.append(f"The images are those in {_below(inner.path, tree.path)}, the only folder with images.")
    return inner


def _part_folders(tree: Tree) -> dict[Part, Tree]:
    """The folders of the parts; empty where the folders are classes.

    Raises:
        DataError: Two folders stand for one part, or `train` has no class folders.
    """
    folders: dict[Part, Tree] = {}
    others = []
    for folder in tree.folders:
        part = part_of(folder.name)
        if part is None:
            others.append(folder)
        elif part in folders:
            raise DataError(
                f"{tree.path}: {folders[part].name}/ and {folder.name}/ both stand for the {part} part; keep one of them, "
                "or move one somewhere else"
            )
        else:
            folders[part] = folder
    has_classes = {part for part, folder in folders.items() if any(each.num_images for each in folder.folders)}
    if "train" in has_classes and len(folders) > 1:
        return folders
    if len(folders) > 1 and not any(each.num_images for each in others):
        names = " and ".join(f"{folder.name}/" for folder in folders.values())
        lacking = (
            "there is no folder for train"
            if "train" not in folders
            else f"{folders['train'].name}/ has no class folders"
        )
        raise DataError(f"{tree.path}: {names} stand for parts of the data, but {lacking}; expected {EXPECTED}")
    return {}


def _parts(tree: Tree, folders: Mapping[Part, Tree], found: _Found) -> dict[Part, dict[str, Tree]]:
    """The classes of each part that has labels."""
    for folder in tree.folders:
        if folder not in folders.values() and folder.num_images:
            found.notes.append(
                f"{folder.name}/ beside {folders['train'].name}/ is not used ({plural(folder.num_images, 'image')})."
            )
    parts: dict[Part, dict[str, Tree]] = {"train": _classes(folders["train"], found)}
    for part in ("val", "test"):
        if part not in folders:
            continue
        classes = _labelled(folders[part], parts["train"], found)
        if classes is not None:
            _check_same(folders["train"], parts["train"], folders[part], classes)
            parts[part] = {name: classes[name] for name in parts["train"]}
    if len(parts) == 1:
        found.notes.append(
            f"{folders['train'].name}/ alone is divided into train, gate, val and test, because no other part has labels."
        )
    return parts


def _labelled(folder: Tree, train: Mapping[str, Tree], found: _Found) -> dict[str, Tree] | None:
    """The classes of a part beside `train`; None where its images have no labels."""
    annotated = next((file for file in folder.others if file.name.lower().endswith("_annotations.txt")), None)
    if annotated is not None:
        return _annotated(folder, annotated)
    filled = [each for each in folder.folders if each.num_images]
    if len(filled) > 1 or (filled and filled[0].name in train):
        return _classes(folder, found)
    found.notes.append(
        f"{folder.name}/ is not used ({plural(folder.num_images, 'image')}), because there are no class folders in it; "
        "a table of labels can be given with data.labels."
    )
    return None


def _annotated(folder: Tree, table: Path) -> dict[str, Tree]:
    """The classes of a part whose images lie together, from a table of file names and classes, such
    as `val_annotations.txt` of Tiny ImageNet."""
    by_name = {file.name: file for file in folder.all_images()}
    classes: dict[str, list[Path]] = {}
    try:
        lines = read_regular_file(table).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{table}: cannot be read as text ({error}); replace it") from error
    for number, line in enumerate(lines, 1):
        name, _, rest = line.partition("\t")
        label = rest.partition("\t")[0].strip()
        if not line.strip():
            continue
        if not label or name not in by_name:
            reason = "no label" if not label else "no such image in the folder"
            raise DataError(f"{table}, line {number}: {name!r}: {reason}; each line must be FILE<tab>CLASS")
        classes.setdefault(label, []).append(by_name.pop(name))
    if by_name:
        raise DataError(f"{table}: images without a line in it: {len(by_name):,}, such as {min(by_name)}; add them")
    return {label: Tree(folder.path / label, tuple(sorted(files)), (), ()) for label, files in sorted(classes.items())}


def _check_same(train: Tree, train_classes: Mapping[str, Tree], other: Tree, classes: Mapping[str, Tree]) -> None:
    differing = sorted(train_classes.keys() ^ classes.keys())
    if differing:
        name = differing[0]
        present, absent = (train, other) if name in train_classes else (other, train)
        raise DataError(
            f"{present.path / name}: this class is missing in {absent.path}; both need the same class folders "
            f"({plural(len(differing), 'class', 'classes')} in one of them only)"
        )


def _classes(tree: Tree, found: _Found) -> dict[str, Tree]:
    """Class name -> its folder, sorted by name."""
    classes = {}
    for folder in tree.folders:
        others = folder.all_others()
        found.unused += others
        if folder.num_images:
            classes[folder.name] = folder
        elif not others or any(file.suffix.lower() not in _DOCUMENTS for file in others):
            held = f", only {suffix_counts(others)}" if others else ""
            if left_out_by(others, found.include):
                raise DataError(
                    f"{folder.path}: no file in this class folder matches data.include {found.include!r} (holds {suffix_counts(others)}); "
                    "write another pattern, or move the folder somewhere else"
                )
            raise DataError(
                f"{folder.path}: this class folder holds no images{held}; "
                "put images of the class there, or move the folder somewhere else"
            )
    if not classes:
        raise DataError(
            f"{tree.path}: the images ({len(tree.images):,}) lie in the folder itself, so that their classes are unknown; expected "
            f"{EXPECTED}, or a table of labels (data.labels)"
        )
    found.notes += _about_images_beside(tree)
    found.notes += _about_subfolders(tree, classes)
    return classes


def _about_images_beside(tree: Tree) -> Iterator[str]:
    if tree.images:
        yield (
            f"Not used, because they lie beside the class folders in {tree.path} and belong to no class: {suffix_counts(tree.images)}."
        )


def _about_subfolders(tree: Tree, classes: Mapping[str, Tree]) -> Iterator[str]:
    """A sentence about images in sub-folders of classes, which may have been meant as classes."""
    deeper = {name: [each.name for each in folder.folders if each.num_images] for name, folder in classes.items()}
    if not any(deeper.values()):
        return
    name = next(name for name, below in deeper.items() if below)
    text = f"Images in sub-folders of the classes count, such as those in {name}/{deeper[name][0]}."
    if all(len(below) > 1 and not classes[one].images for one, below in deeper.items()):
        below = deeper[name]
        shown = ", ".join(below[:_NUM_NAMED]) + (", ..." if len(below) > _NUM_NAMED else "")
        text += f" If the classes are {shown} instead, pass --data {tree.path / name} (data.path)."
    yield text


def _too_few_classes(tree: Tree, classes: Mapping[str, Tree]) -> str:
    return f"{tree.path}: found {len(classes)} class folder(s) ({', '.join(classes)}), at least 2 are needed; expected {EXPECTED}"


def _kept(tree: Tree, aside: SetAside) -> list[Path]:
    return [file for file in tree.all_images() if file not in aside.files]


def _below(path: Path, root: Path) -> str:
    return f"{path.relative_to(root).as_posix()}/"
