"""The section `data`: which images, how they are divided, and how they are augmented."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    Field,
    model_validator,
)

from dsnet.wording import shown
from orchestration.config.section import BrokenRule, Fraction, NonNegativeInt, PositiveInt, Section, Text, refuse

CropScale = Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(strict=False, min_length=2, max_length=2)]


def _split_size(value: object) -> object:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_share = isinstance(value, float) and 0 < value < 1
    is_count = is_number and isinstance(value, int) and value >= 1
    if value is None or is_share or is_count:
        return value
    raise ValueError(f"expected a fraction between 0 and 1, a whole number of images, or null; got {shown(value)}")


SplitSize = Annotated[
    Annotated[float, Field(gt=0, lt=1)] | PositiveInt | None,
    BeforeValidator(_split_size),
]


class AugmentConfig(Section):
    """Augmentation of the training images; evaluation uses none."""

    crop_padding: NonNegativeInt | None = None
    """Pixels mirrored at each edge before a random crop back to size; null = image_size // 8."""
    flip: bool | None = None
    """Mirror half of the images left to right; null = yes, except for digits."""
    cutout: NonNegativeInt = 0
    """Cutout: side in pixels of a random square that is set to zero; 0 = none."""
    crop_scale: CropScale | None = None
    """Random resized crop: [low, high] is the range of the cropped share of the image's area; null
    = no crop, or [0.08, 1] for streamed images."""
    randaugment_ops: Annotated[int, Field(ge=0, le=14)] | None = None
    """RandAugment: number of random operations per image, at most 14; 0 = none; null = from the
    data."""
    randaugment_magnitude: Annotated[float, Field(ge=0, le=10)] = 9.0
    """RandAugment: strength of each operation, 0 to 10."""
    erasing: Fraction = 0.0
    """Random erasing: share of the images in which a random rectangle is filled with noise, [0, 1].
    """

    @model_validator(mode="after")
    def _crops_one_way(self) -> AugmentConfig:
        if self.crop_scale is None:
            return self
        low, high = self.crop_scale
        if low > high:
            message = f"range {shown(self.crop_scale)} is the wrong way round; write {shown([high, low])}"
            refuse(BrokenRule(("crop_scale",), message))
        if self.crop_padding:
            message = f"{self.crop_padding} pixels have no use beside crop_scale, which crops already; remove one"
            refuse(BrokenRule(("crop_padding",), message))
        return self


class SplitsConfig(Section):
    """Size of each split: a fraction of the images in (0, 1), a number of images, or null for the
    default.

    Defaults: the data's own test split where it has one, else 55/15/15/15 %; CIFAR-10
    40k/5k/5k/10k.
    """

    train: SplitSize = None
    """Images that train the supernet."""
    gate: SplitSize = None
    """Images that train the gates; not used to train the supernet."""
    val: SplitSize = None
    """Images that calibrate the routers and choose the front."""
    test: SplitSize = None
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


class DataConfig(Section):
    """Images, their splits and their augmentation."""

    name: Literal["digits", "cifar10", "image_folder"]
    """digits: inside scikit-learn | cifar10: parquet or official batches | image_folder:
    root/class/*.png or *.jpg."""
    path: Text | None = None
    """Folder of the images; `~` and $VARIABLES are expanded, relative to the working directory.
    null = $DSNET_DATA."""
    image_size: Annotated[int, Field(ge=8, le=512)] | None = None
    """Side in pixels, 8 to 512; null = as stored. An image folder needs it."""
    crop_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Image folders only: share of the shorter side that the centre crop keeps, (0, 1]; 0.875 with
    224 pixels: resize to 256, cut 224."""
    augment: AugmentConfig = AugmentConfig()
    splits: SplitsConfig = SplitsConfig()
    limit: PositiveInt | None = None
    """Maximum number of images per split, drawn evenly from the classes; null = all."""
    stream: bool = False
    """Image folders only: read `train` from disk while it trains, for sets that do not fit into
    memory."""

    @model_validator(mode="after")
    def _suits_the_source(self) -> DataConfig:
        if self.name == "image_folder" and self.image_size is None:
            refuse(BrokenRule(("image_size",), "an image folder needs it: the side in pixels, 8 to 512"))
        if self.name != "image_folder" and self.crop_fraction != 1:
            message = f"only an image_folder is cropped; remove {shown(self.crop_fraction)}"
            refuse(BrokenRule(("crop_fraction",), message))
        if self.name == "digits" and self.path is not None:
            message = f"digits comes with scikit-learn and takes no folder; remove {shown(self.path)}"
            refuse(BrokenRule(("path",), message))
        if self.stream and self.name != "image_folder":
            refuse(BrokenRule(("stream",), f"only an image_folder can be streamed; {self.name} fits into memory"))
        if self.stream and self.augment.crop_padding:
            message = (
                f"{self.augment.crop_padding} pixels have no use: streamed images are cropped by crop_scale; remove it"
            )
            refuse(BrokenRule(("augment", "crop_padding"), message))
        return self
