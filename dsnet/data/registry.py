"""Registry of data sets by name: how each is read, and which settings it takes. Needs no torch.

A new data set is one file with a loader and one call of `register_data_set`, from inside or outside
of this package (`dsnet.plugins`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from dsnet.data.settings import ColumnNames, FileOptions, checked_image_size
from dsnet.errors import ConfigError
from dsnet.image_size import ImageSize
from dsnet.plugins import load_plugins
from dsnet.settings import SettingError
from dsnet.wording import shown, way_out

if TYPE_CHECKING:
    from dsnet.data.images import ImageSet

Loader = Callable[[str | Path | None, ImageSize | None, FileOptions], "ImageSet"]
"""Function (path, image_size, options) -> image set; it may leave the resizing to `load_images`."""
IMAGE_FOLDER = "image_folder"
DEFAULT_OPTIONS = FileOptions()


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A kind of data set."""

    name: str
    """The value of `data.name`."""
    summary: str
    """A short description of the data, as a phrase."""
    loader: Loader | str
    """Function that reads it, or its import path `package.module:function`."""
    native_size: ImageSize | None = None
    """Size of its images before any resizing; None: the loader decodes files at the
    requested size."""
    options: frozenset[str] = frozenset()
    """Names of the settings in the section `data` that only some data sets take: `stream`,
    `crop_fraction` and the fields of `FileOptions`."""
    has_folder: bool = True
    """Whether it lies in a folder that the user names."""
    needs_size: bool = False
    """Whether `data.image_size` must be given."""
    has_photos: bool = False
    """Whether its networks can classify photos."""

    def load(self, path: str | Path | None, image_size: ImageSize | None, options: FileOptions) -> ImageSet:
        """Read the data set; see `load_images`."""
        loader = self.loader
        if isinstance(loader, str):
            module, _, function = loader.partition(":")
            loader = cast(Loader, getattr(import_module(module), function))
        return loader(path, image_size, options)


_DATA_SETS: dict[str, DataSet] = {}


def register_data_set(data_set: DataSet) -> DataSet:
    """Register a data set under its name; returns it. To be called at import.

    Raises:
        ConfigError: The name is taken.
    """
    known = _DATA_SETS.setdefault(data_set.name, data_set)
    if known != data_set:
        raise ConfigError(f"data set {data_set.name!r} is registered already; choose another name")
    return data_set


def data_set_names() -> tuple[str, ...]:
    """All registered names, sorted."""
    load_plugins()
    return tuple(sorted(_DATA_SETS))


def find_data_set(name: str) -> DataSet:
    """The data set of this name.

    Raises:
        ConfigError: The name is unknown.
    """
    names = data_set_names()
    if name not in names:
        raise ConfigError(f"unknown data set {name!r}{way_out(name, names)}")
    return _DATA_SETS[name]


def native_image_size(name: str) -> ImageSize | None:
    """Size of a data set's images before any resizing.

    None where its files are decoded at the requested size, and for unknown names.
    """
    known = _DATA_SETS.get(name)
    return None if known is None else known.native_size


class SourceSettings(Protocol):
    """The settings of the section `data` that only some data sets take."""

    @property
    def name(self) -> str: ...

    @property
    def crop_fraction(self) -> float: ...

    @property
    def stream(self) -> bool: ...

    @property
    def include(self) -> str | None: ...

    @property
    def labels(self) -> str | None: ...

    @property
    def columns(self) -> ColumnNames: ...

    @property
    def colour(self) -> str | None: ...

    @property
    def skip_broken(self) -> int: ...


_ONLY_FOLDERS = {
    "crop_fraction": "only an image_folder is cropped; remove {value}",
    "stream": "only an image_folder can be streamed; {name} fits into memory",
}
_COLUMNS = ("image", "label", "split")


def source_problem(data: SourceSettings) -> tuple[str, str] | None:
    """A setting that the data set does not take, and the problem as a phrase for a message; None if
    there is none."""
    known = find_data_set(data.name)
    given = {
        "crop_fraction": data.crop_fraction != 1,
        "stream": data.stream,
        "include": data.include is not None,
        "labels": data.labels is not None,
        "columns": _named_column(data) is not None,
        "colour": data.colour is not None,
        "skip_broken": data.skip_broken > 0,
    }
    for key, is_given in given.items():
        if is_given and key not in known.options:
            default = "the data set {name} does not take it; remove it"
            text = _ONLY_FOLDERS.get(key, default).format(name=data.name, value=shown(getattr(data, key)))
            return key, text
    column = _named_column(data)
    if data.name == IMAGE_FOLDER and column is not None and data.labels is None:
        return f"columns.{column}", "names a column of a table of labels; write data.labels too, or remove it"
    return None


def _named_column(data: SourceSettings) -> str | None:
    return next((column for column in _COLUMNS if getattr(data.columns, column) is not None), None)


def load_images(
    name: str,
    path: str | Path | None = None,
    image_size: ImageSize | None = None,
    options: FileOptions = DEFAULT_OPTIONS,
) -> ImageSet:
    """Load a data set into memory, decoded.

    Args:
        name: A registered name: digits, cifar10, image_folder, ...
        path: The folder that holds the data; None: the folder in the environment variable
            DSNET_DATA (digits needs none).
        image_size: Side of a square in pixels, or (height, width), each 8..512, to which the images
            are resized once, here; None: the data's own size.
        options: Which files are read, and how.

    Raises:
        ConfigError: The name is unknown, or the size is out of range.
        DataError: A file is missing, truncated or mislabelled; the message names it.
    """
    data_set = find_data_set(name)
    if image_size is not None:
        image_size = checked_image_size(image_size)
    image_set = data_set.load(path, image_size, options)
    return image_set if image_size is None else image_set.resized(image_size)


def check_source(data: SourceSettings) -> None:
    """Check that a data set takes all settings that are given.

    Raises:
        ConfigError: It does not, or the name is unknown.
    """
    problem = source_problem(data)
    if problem is not None:
        raise SettingError(f"data.{problem[0]}: {problem[1]}")


register_data_set(
    DataSet(
        name="digits",
        summary="handwritten digits inside scikit-learn",
        loader="dsnet.data.digits:load",
        native_size=8,
        has_folder=False,
    )
)
register_data_set(
    DataSet(
        name="cifar10",
        summary="parquet files or official batches",
        loader="dsnet.data.cifar10:load",
        native_size=32,
        has_photos=True,
    )
)
register_data_set(
    DataSet(
        name="cifar100",
        summary="official batches",
        loader="dsnet.data.cifar100:load",
        native_size=32,
        has_photos=True,
    )
)
register_data_set(
    DataSet(
        name=IMAGE_FOLDER,
        summary="a folder for each class, also in train/, val/ and test/",
        loader="dsnet.data.image_folder:load",
        options=frozenset({"stream", "crop_fraction", "include", "labels", "columns", "colour", "skip_broken"}),
        needs_size=True,
        has_photos=True,
    )
)
register_data_set(
    DataSet(
        name="parquet",
        summary="any image data set of the Hugging Face Hub in parquet files",
        loader="dsnet.data.hub_parquet:load",
        options=frozenset({"columns", "colour"}),
        has_photos=True,
    )
)
