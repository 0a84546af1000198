"""The section `data`: which images, how they are divided, and how they are augmented."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Literal

from pydantic import BeforeValidator, JsonValue, WithJsonSchema, model_validator

from dsnet.data.registry import data_set_names, find_data_set, source_problem
from dsnet.data.settings import (
    IMAGE_SIZE_RULE,
    IMAGENET,
    Augmentation,
    Balance,
    Colour,
    CropScale,
    DataSettings,
    FileOptions,
    Magnitude,
    OperationCount,
    SplitSize,
    WrittenNormalization,
    WrittenSize,
    checked_image_size,
    crop_problem,
    written_normalization,
)
from dsnet.errors import ConfigError
from dsnet.settings import Fraction, NonNegativeInt, PositiveFraction, PositiveInt, fits
from dsnet.wording import shown
from orchestration.config.section import FROM_LIST, BrokenRule, Known, Section, Text, refuse


def _split_size(value: object) -> object:
    if fits(value, SplitSize):
        return value
    raise ValueError(f"expected a fraction between 0 and 1, a whole number of images, or null; got {shown(value)}")


def _image_size(value: object) -> object:
    if value is None:
        return None
    try:
        return checked_image_size(value)
    except ConfigError as error:
        raise ValueError(f"expected {IMAGE_SIZE_RULE}, or null; got {shown(value)}") from error


def _normalization(value: object) -> object:
    try:
        written_normalization(value)
    except ConfigError as error:
        raise ValueError(str(error).removeprefix("data.normalization").removeprefix(": ").lstrip(".")) from error
    return value


_CHANNELS = {"type": "array", "minItems": 1, "items": {"type": "number", "minimum": 0, "maximum": 1}}
NormalizationValue = Annotated[
    Literal["imagenet"] | dict[str, JsonValue] | None,
    BeforeValidator(_normalization),
    WithJsonSchema(
        {
            "anyOf": [
                {"const": IMAGENET, "type": "string"},
                {
                    "type": "object",
                    "properties": {"mean": _CHANNELS, "std": _CHANNELS},
                    "required": ["mean", "std"],
                    "additionalProperties": False,
                },
                {"type": "null"},
            ]
        }
    ),
]


WrittenSplitSize = Annotated[SplitSize, BeforeValidator(_split_size)]


DataName = Annotated[str, Known(data_set_names)]


class AugmentConfig(Section):
    """Augmentation of the training images; evaluation uses none."""

    crop_padding: NonNegativeInt | None = None
    """Pixels mirrored at each edge before a random crop back to size; null = image_size // 8 (the
    shorter side)."""
    flip: bool | None = None
    """Mirror half of the images left to right; null = yes, except for digits."""
    cutout: NonNegativeInt = Augmentation.cutout
    """Cutout: side in pixels of a random square that is set to zero; 0 = none."""
    crop_scale: Annotated[CropScale, FROM_LIST] | None = None
    """Random resized crop: [low, high] is the range of the cropped share of the image's area; null
    = no crop, or [0.08, 1] for streamed images. Its width / height is 3/4 to 4/3 of that of
    image_size."""
    randaugment_ops: OperationCount | None = None
    """RandAugment: number of random operations per image, at most 14; 0 = none; null = from the
    data."""
    randaugment_magnitude: Magnitude = Augmentation.randaugment_magnitude
    """RandAugment: strength of each operation, 0 to 10."""
    erasing: Fraction = Augmentation.erasing
    """Random erasing: share of the images in which a random rectangle is filled with noise, [0, 1].
    """

    @model_validator(mode="after")
    def _crops_one_way(self) -> AugmentConfig:
        problem = crop_problem(self.crop_scale, self.crop_padding)
        if problem is not None:
            refuse(BrokenRule((problem[0],), problem[1]))
        return self


class SplitsConfig(Section):
    """Size of each split: a fraction of the images in (0, 1), a number of images, or null for the
    default.

    Defaults: the data's own test split where it has one, else 55/15/15/15 %; CIFAR-10
    40k/5k/5k/10k.
    """

    train: WrittenSplitSize = None
    """Images that train the supernet."""
    gate: WrittenSplitSize = None
    """Images that train the gates; not used to train the supernet."""
    val: WrittenSplitSize = None
    """Images that calibrate the routers and choose the front."""
    test: WrittenSplitSize = None
    """Images for the final result; not read before the front is frozen."""

    @model_validator(mode="after")
    def _fits(self) -> SplitsConfig:
        # `test` may be a share of the data's own test part; where it is not, make_splits refuses
        # what does not fit.
        shares = {name: size for name, size in self if isinstance(size, float) and name != "test"}
        if sum(shares.values()) > 1 + 1e-9:
            written = " + ".join(f"{name} {share:g}" for name, share in shares.items())
            refuse(BrokenRule((), f"fractions add up to more than 1: {written} = {sum(shares.values()):g}"))
        return self


class ColumnsConfig(Section):
    """Names of columns, of a table of labels or of parquet files; null = found by their names."""

    image: Text | None = None
    """The images, or their paths."""
    label: Text | None = None
    """The labels."""
    split: Text | None = None
    """Tables of labels only: the part of each image, train, val or test."""


class DataConfig(Section):
    """Images, their splits and their augmentation."""

    name: DataName
    """digits: inside scikit-learn | cifar10: parquet or official batches | cifar100: official
    batches | image_folder: a folder for each class, also in train/, val/ and test/ | parquet: any
    image data set of the Hugging Face Hub."""
    path: Text | None = DataSettings.path
    """Folder of the images; `~` and $VARIABLES are expanded, relative to the working directory.
    null = $DSNET_DATA."""
    image_size: Annotated[WrittenSize | None, BeforeValidator(_image_size)] = DataSettings.image_size
    """Side of a square in pixels, or [HEIGHT, WIDTH], each 8 to 512; null = as stored. An image
    folder needs it."""
    crop_fraction: PositiveFraction = DataSettings.crop_fraction
    """Image folders only: share of the image that the centre crop keeps, (0, 1]; 0.875 with 224
    pixels: resize the shorter side to 256, cut 224."""
    augment: AugmentConfig = AugmentConfig()
    splits: SplitsConfig = SplitsConfig()
    limit: PositiveInt | None = DataSettings.limit
    """Maximum number of images per split, drawn evenly from the classes; null = all."""
    stream: bool = DataSettings.stream
    """Image folders only: read `train` from disk while it trains, for sets that do not fit into
    memory."""
    include: Text | None = DataSettings.include
    """Image folders only: pattern of the files that are images, such as "*.jpg"; null = every file
    with the suffix of an image."""
    labels: Text | None = DataSettings.labels
    """Image folders only: table (CSV or parquet) of paths and labels, relative to the folder; null
    = the folders are the classes."""
    columns: ColumnsConfig = ColumnsConfig()
    colour: Colour | None = DataSettings.colour
    """Channels of the images: rgb (three) | grey (one); null = rgb for image folders, as stored for
    parquet files."""
    skip_broken: NonNegativeInt = DataSettings.skip_broken
    """Image folders only: number of images that may be broken; they are skipped and named."""
    balance: Balance = DataSettings.balance
    """Uneven classes in the training of the supernet: none | weights (the loss of an image is
    weighted by the inverse frequency of its class) | sampling (every epoch has equally many images
    of each class, those of rare classes several times)."""
    normalization: NormalizationValue = None
    """Normalisation of the images: imagenet | {mean: [...], std: [...]}, one value per channel, for
    pixels in 0..1 as in torchvision; null = that of the checkpoint in supernet.init_from, else mean
    and deviation of `train`."""

    def file_options(self) -> FileOptions:
        """The settings of the files as the core's own type."""
        written = self.model_dump(include={each.name for each in fields(FileOptions)})
        return FileOptions.from_written(written)

    def written_normalization(self) -> WrittenNormalization | None:
        """The normalisation that is written; None for null."""
        return written_normalization(self.normalization)

    @model_validator(mode="after")
    def _suits_the_source(self) -> DataConfig:
        known = find_data_set(self.name)
        if known.needs_size and self.image_size is None:
            refuse(
                BrokenRule(
                    ("image_size",), "an image folder needs it: the side in pixels, 8 to 512, or [HEIGHT, WIDTH]"
                )
            )
        problem = source_problem(self)
        if problem is not None:
            refuse(BrokenRule(tuple(problem[0].split(".")), problem[1]))
        if not known.has_folder and self.path is not None:
            message = f"{self.name} comes with scikit-learn and takes no folder; remove {shown(self.path)}"
            refuse(BrokenRule(("path",), message))
        if self.stream and self.augment.crop_padding:
            message = (
                f"{self.augment.crop_padding} pixels have no use: streamed images are cropped by crop_scale; remove it"
            )
            refuse(BrokenRule(("augment", "crop_padding"), message))
        return self
