"""The settings of the images: where they come from, their splits and their augmentation. They need
no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, Literal, Protocol, cast

from annotated_types import Ge, Gt, Le, Len, Lt, MinLen

from dsnet.errors import ConfigError
from dsnet.image_size import ImageSize, image_size_of, normal_size, shorter_side, size_in_words
from dsnet.settings import Fraction, NonNegativeInt, PositiveFraction, PositiveInt, SettingError, Settings, fits
from dsnet.strict_json import check_known, read_strictly
from dsnet.wording import shown

MIN_IMAGE_SIZE, MAX_IMAGE_SIZE = 8, 512
ImageSide = Annotated[int, Ge(MIN_IMAGE_SIZE), Le(MAX_IMAGE_SIZE)]
"""Height or width in pixels that networks accept."""
WrittenSize = ImageSide | tuple[ImageSide, ImageSide]
"""An image size as it is written: the side of a square, or height and width."""
Colour = Literal["rgb", "grey"]
CHANNELS: Mapping[Colour, int] = {"rgb": 3, "grey": 1}
"""Number of channels of each value of `data.colour`."""
Balance = Literal["none", "weights", "sampling"]
Part = Literal["train", "val", "test"]
"""A part into which the people who published the data have divided it."""
MAX_OPERATIONS = 14
"""Number of different operations of RandAugment, `dsnet.data.randaugment.Operation`. More of them
per image would destroy it and cost memory and time."""
MAX_MAGNITUDE = 10.0
"""Largest magnitude of RandAugment's operations."""
OperationCount = Annotated[int, Ge(0), Le(MAX_OPERATIONS)]
Magnitude = Annotated[float, Ge(0), Le(MAX_MAGNITUDE)]
CropScale = Annotated[tuple[PositiveFraction, ...], Len(2, 2)]
SplitSize = Annotated[float, Gt(0), Lt(1)] | PositiveInt | None
"""A fraction (float), a number of images (int), or None for the default."""
FEW_IMAGES = 100
"""Below this many images in `val` or `test` one image is more than a percentage point of
accuracy, so that routers cannot be compared reliably."""


@dataclass(frozen=True)
class SplitSizes(Settings):
    """Size of each split.

    An integer is a number of images (>= 1), a float a fraction in (0, 1), None the default.
    Fractions refer to all images, or to those of a part if the data is published in parts:

    - without parts: 55/15/15/15 % of all images;
    - a test part: 80/10/10 % of the others for `train`, `gate` and `val`; `test` is the test part;
    - parts for validation and test: 90/10 % of the others for `train` and `gate`; `val` and `test`
      are the parts;
    - a validation part only: 90/10 % of the others for `train` and `gate`; the validation part is
      divided equally into `val` and `test`, so that both are images that no network has been
      trained on.
    """

    SECTION = "data.splits"

    train: SplitSize = None
    gate: SplitSize = None
    val: SplitSize = None
    test: SplitSize = None


@dataclass(frozen=True)
class Columns(Settings):
    """Names of columns, of a table of labels or of parquet files; None: found by their names."""

    SECTION = "data.columns"

    image: str | None = None
    """The images, or their paths."""
    label: str | None = None
    """The labels."""
    split: str | None = None
    """Tables of labels only: the part of each image, train, val or test."""


@dataclass(frozen=True, kw_only=True)
class FileOptions(Settings):
    """Which files of a data set are read, and what happens to broken ones."""

    SECTION = "data"

    include: str | None = None
    """Image folders only: pattern of the files that are images, such as `*.jpg`; None: every file
    with the suffix of an image."""
    colour: Colour | None = None
    """rgb: three channels; grey: one; None: rgb for image folders, as stored for parquet files."""
    labels: str | None = None
    """Image folders only: table (CSV or parquet) of paths and labels; None: the folders are the
    classes."""
    columns: Columns = Columns()
    skip_broken: NonNegativeInt = 0
    """Maximum number of images that may be broken, and are skipped."""

    @property
    def written(self) -> Mapping[str, Any]:
        """The options that differ from the defaults, JSON-able."""
        values = {each.name: (getattr(self, each.name), each.default) for each in fields(FileOptions)}
        return {
            name: asdict(value) if isinstance(value, Columns) else value
            for name, (value, default) in values.items()
            if value != default
        }

    @classmethod
    def from_written(cls, written: Mapping[str, Any]) -> FileOptions:
        """Rebuild options from `written`.

        Raises:
            ConfigError: a key is unknown, or a value has the wrong type.
        """
        return read_strictly(cls, written, cls.SECTION)


IMAGE_SIZE_RULE = f"the side of a square or [HEIGHT, WIDTH], in pixels from {MIN_IMAGE_SIZE} to {MAX_IMAGE_SIZE}"
"""Description of the allowed image sizes, as a phrase for a message."""


def checked_image_size(value: object, key: str = "data.image_size") -> ImageSize:
    """A written image size in its normal form.

    Args:
        value: A number, or a list of height and width.
        key: The setting that holds it, for the message.

    Raises:
        SettingError: It is none that networks accept.
    """
    if not fits(value, WrittenSize):
        raise SettingError(f"{key} is {shown(value)}, but must be {IMAGE_SIZE_RULE}")
    return normal_size(cast(ImageSize, value))


class ColumnNames(Protocol):
    """The fields of `Columns`."""

    @property
    def image(self) -> str | None: ...

    @property
    def label(self) -> str | None: ...

    @property
    def split(self) -> str | None: ...


class DescribedImages(Protocol):
    """Properties of a data set that determine an augmentation's defaults, as of an `ImageSet`."""

    @property
    def name(self) -> str:
        """The data set's registered name."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per class, in label order."""


def can_mirror(images: DescribedImages) -> bool:
    """Whether a mirrored image keeps its class: a mirrored 2 is not a 2."""
    are_digits = images.name == "parquet" and all(name.isdigit() for name in images.class_names)
    return images.name != "digits" and not are_digits


def crop_problem(crop_scale: Sequence[float] | None, crop_padding: int | None) -> tuple[str, str] | None:
    """The setting of a crop that is wrong or contradicts another one, and the problem as a phrase
    for a message; None if there is none."""
    if crop_scale is None:
        return None
    low, high = crop_scale
    if low > high:
        return "crop_scale", f"range {shown(crop_scale)} is the wrong way round; write {shown([high, low])}"
    if crop_padding:
        return (
            "crop_padding",
            f"{crop_padding} pixels cannot be combined with crop_scale, which crops already; remove one",
        )
    return None


@dataclass(frozen=True)
class Augmentation(Settings):
    """Settings of the augmentation of training images; the defaults switch everything off."""

    SECTION = "data.augment"

    crop_padding: NonNegativeInt = 0
    """Pixels by which the image is padded on each side before a crop of its own size is cut out at
    random: mirrored at the edge, or with zeros where the padding reaches the image's size."""
    flip: bool = False
    """Mirror left and right with probability 1/2."""
    cutout: NonNegativeInt = 0
    """Side in pixels of a square of zeros around a random pixel, clipped at the edges (DeVries &
    Taylor, 2017)."""

    randaugment_ops: OperationCount = 0
    """Number of operations per image (see `dsnet.data.randaugment`, after arXiv 1909.13719), 0..14;
    0 = none."""
    randaugment_magnitude: Magnitude = 9.0
    """Common magnitude of these operations, 0..10."""
    erasing: Fraction = 0.0
    """Probability, 0..1, that a rectangle of 2 to 33 % of the image becomes random pixels (arXiv
    1708.04896)."""
    crop_scale: CropScale | None = None
    """Smallest and largest area of a random resized crop as shares of the image, 0 < smallest <=
    largest <= 1. None = no such crop, but (0.08, 1) for images that are streamed from files. The
    crop's width / height is 3/4 to 4/3 of that of the network's input."""

    def __post_init__(self) -> None:
        if isinstance(self.crop_scale, list):  # a list where it comes from JSON
            object.__setattr__(self, "crop_scale", tuple(self.crop_scale))
        super().__post_init__()
        problem = crop_problem(self.crop_scale, self.crop_padding)
        if problem is not None:
            raise SettingError(f"data.augment.{problem[0]}: {problem[1]}")

    @classmethod
    def for_images(
        cls,
        images: DescribedImages,
        crop_padding: int | None = None,
        flip: bool | None = None,
        cutout: int = 0,
        **others: Any,
    ) -> Augmentation:
        """An augmentation with the defaults for a data set filled in.

        Args:
            images: The data set.
            crop_padding: None: an eighth of the image's shorter side, or 0 where `crop_scale` is
                given.
            flip: None: `can_mirror`.
            cutout: As the field.
            others: The other fields.

        Raises:
            ConfigError: A field is out of its range, or padding or cutout exceeds the image's
                shorter side.
        """
        size = image_size_of(images.image_shape)
        side = shorter_side(size)
        for name, pixels in (("crop_padding", crop_padding or 0), ("cutout", cutout)):
            if pixels > side:
                raise ConfigError(
                    f"data.augment.{name} is {pixels}, but the images of {images.name} have {size_in_words(size)}: write at most {side}"
                )
        if crop_padding is None:
            crop_padding = side // 8 if others.get("crop_scale") is None else 0
        if flip is None:
            flip = can_mirror(images)
        return cls(crop_padding, flip, cutout, **others)

    @property
    def needs_bytes(self) -> bool:
        """Whether an operation is on that requires pixel values 0..255."""
        return self.randaugment_ops > 0 or self.erasing > 0 or self.crop_scale is not None


IMAGENET = "imagenet"
"""Value of `data.normalization` for the mean and deviation of ImageNet."""
LARGEST_PIXEL = 255
"""Pixels are whole numbers from 0 to this."""
ChannelValues = Annotated[tuple[float, ...], MinLen(1)]


def normalization_problem(mean: Sequence[float], std: Sequence[float]) -> tuple[str, str] | None:
    """The part of a written normalisation that is wrong, and the problem as a phrase for a message;
    None if there is none."""
    for name, values in (("mean", mean), ("std", std)):
        if max(values) > 1:
            in_shares = [round(value / LARGEST_PIXEL, 4) for value in values]
            return name, (
                f"{shown(list(values))} is not in the unit of this setting, in which pixels lie in 0..1, as in torchvision; values of "
                f"pixels in 0..255 are divided by 255: {shown(in_shares)}"
            )
    if min(mean) < 0:
        return "mean", f"{shown(list(mean))} has a value below 0, but pixels lie in 0..1"
    if min(std) <= 0:
        return "std", f"{shown(list(std))} has a value that is not above 0"
    if len(mean) != len(std):
        return "std", f"mean has {len(mean)} and std {len(std)} values; both need one for each channel of the images"
    return None


@dataclass(frozen=True, kw_only=True)
class WrittenNormalization(Settings):
    """Mean and standard deviation of each channel with which images are normalised, for pixels in
    0..1."""

    SECTION = "data.normalization"

    mean: ChannelValues
    std: ChannelValues

    def __post_init__(self) -> None:
        super().__post_init__()
        problem = normalization_problem(self.mean, self.std)
        if problem is not None:
            raise SettingError(f"data.normalization.{problem[0]}: {problem[1]}")

    def for_channels(self, channels: int) -> WrittenNormalization:
        """The normalisation itself, if the images have as many channels.

        Raises:
            SettingError: they have not.
        """
        if channels != len(self.mean):
            raise SettingError(
                f"data.normalization has {len(self.mean)} values each of mean and std, but the images have {channels} "
                f"channel{'s' if channels > 1 else ''}: write {{mean: [...], std: [...]}} with one value per channel, or null"
            )
        return self


IMAGENET_VALUES = WrittenNormalization(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def written_normalization(value: object) -> WrittenNormalization | None:
    """The normalisation that a value of `data.normalization` stands for; None for null.

    Raises:
        ConfigError: the value is of another kind, lacks mean or std, or has wrong values; the
            message begins with the key.
    """
    if value is None or isinstance(value, WrittenNormalization):
        return value
    if value == IMAGENET:
        return IMAGENET_VALUES
    if not isinstance(value, Mapping):
        raise SettingError(
            f"data.normalization: expected {IMAGENET}, {{mean: [...], std: [...]}} for pixels in 0..1, or null; got {shown(value)}"
        )
    return read_strictly(WrittenNormalization, value, "data.normalization")


@dataclass(frozen=True, kw_only=True)
class DataSettings(FileOptions):
    """The images, their splits and their augmentation."""

    name: str
    """A registered data set: digits, cifar10, image_folder, ..."""
    path: str | None = None
    """The data set's folder; null = the environment variable DSNET_DATA."""
    image_size: WrittenSize | None = None
    """Side of a square in pixels, or (height, width); null = the data's own size."""
    crop_fraction: PositiveFraction = 1.0
    """Image folders only: share of the image that the centre crop keeps of both sides, (0, 1]; see
    `dsnet.data.decoding.centre_crop`."""
    splits: SplitSizes = field(default_factory=SplitSizes)
    limit: PositiveInt | None = None
    """Maximum number of images per split; null = no limit."""
    augment: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `Augmentation`; fields that are null or absent take the data set's
    defaults."""
    stream: bool = False
    """Image folders only: stream `train` from its files during training."""
    balance: Balance = "none"
    """Weights or sampling for uneven classes in the training of the supernet; see
    `dsnet.training.balance`."""
    normalization: Literal["imagenet"] | Mapping[str, Any] | None = None
    """Normalisation of the images: `imagenet`, or the fields of `WrittenNormalization`; None: that
    of the checkpoint from which training starts, or mean and deviation of `train`."""

    def __post_init__(self) -> None:
        if self.image_size is not None:
            object.__setattr__(self, "image_size", checked_image_size(self.image_size))
        super().__post_init__()
        written_normalization(self.normalization)
        check_known(self.augment, (each.name for each in fields(Augmentation)), "data.augment")
        read_strictly(Augmentation, self._given(), "data.augment")

    def _given(self) -> dict[str, Any]:
        return {name: value for name, value in self.augment.items() if value is not None}

    def augmentation(self, images: DescribedImages) -> Augmentation:
        """The augmentation, with the defaults for the data set filled in."""
        return Augmentation.for_images(images, **self._given())
