"""Image sources: the interface through which a run reads a data set, its evaluated splits and its
training split.

There are two kinds: all images in memory, or an image folder whose training split is streamed from
its files.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from dsnet.data.cache import ImageCache
from dsnet.data.image_folder import (
    FolderListing,
    decode_images,
    list_image_folder,
    load_image_folder,
    required_size,
)
from dsnet.data.images import ImageSet
from dsnet.data.normalization import Normalization
from dsnet.data.registry import DEFAULT_OPTIONS, IMAGE_FOLDER, check_source, load_images
from dsnet.data.settings import Augmentation, DataSettings, FileOptions, checked_image_size
from dsnet.data.splits import SPLIT_NAMES, Splits
from dsnet.data.tensors import Batch, TensorData
from dsnet.data.training_images import InMemoryImages, StreamedImages, TrainingImages
from dsnet.image_size import ImageSize, height_and_width
from dsnet.seeds import derive_seed

NUM_NORMALIZATION_IMAGES = 2048


class ImageSource(Protocol):
    """Interface of a data set that a run trains and evaluates on."""

    @property
    def name(self) -> str:
        """The data set's registered name."""

    @property
    def labels(self) -> Int64[Tensor, " images"]:
        """int64 [N]: the labels of all images."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per class, in label order."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""

    @property
    def official_test(self) -> Bool[np.ndarray, " images"] | None:
        """bool [N]: the images of the official test part; None where the data has none."""

    @property
    def official_val(self) -> Bool[np.ndarray, " images"] | None:
        """bool [N]: the images of the official validation part; None where the data has none."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about how the data was read: its parts, and files that are not used."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the network's input."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 that identifies the data's content; stage keys depend on it."""

    def tensor_data(self, splits: Splits, *, open_test: bool = False) -> TensorData:
        """The splits in memory; the test split only with `open_test` (verification, reports)."""

    def normalization(self, splits: Splits) -> Normalization:
        """Mean and standard deviation of the training split."""

    def training_images(self, splits: Splits, augmentation: Augmentation) -> TrainingImages:
        """The training split in the form that the training loop reads."""


@dataclass(frozen=True, eq=False)
class InMemorySource:
    """A data set whose images are all decoded into memory."""

    images: ImageSet

    @property
    def name(self) -> str:
        return self.images.name

    @property
    def labels(self) -> Int64[Tensor, " images"]:
        return self.images.labels

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.images.class_names

    @property
    def num_classes(self) -> int:
        return self.images.num_classes

    @property
    def official_test(self) -> Bool[np.ndarray, " images"] | None:
        return self.images.official_test

    @property
    def official_val(self) -> Bool[np.ndarray, " images"] | None:
        return self.images.official_val

    @property
    def notes(self) -> tuple[str, ...]:
        return self.images.notes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.images.image_shape

    @property
    def fingerprint(self) -> str:
        return self.images.fingerprint

    def tensor_data(self, splits: Splits, *, open_test: bool = False) -> TensorData:
        """See `ImageSource.tensor_data`; `train` is included."""
        return TensorData.from_images(self.images, splits, open_test=open_test)

    def normalization(self, splits: Splits) -> Normalization:
        """See `ImageSource.normalization`; computed from the whole training split."""
        return Normalization.from_images(self._train(splits)[0])

    def training_images(self, splits: Splits, augmentation: Augmentation) -> TrainingImages:
        """See `ImageSource.training_images`."""
        return InMemoryImages(*self._train(splits), augmentation)

    def _train(self, splits: Splits) -> tuple[Tensor, Tensor]:
        ids = torch.tensor(splits.train)
        return self.images.images.index_select(0, ids), self.images.labels.index_select(0, ids)


@dataclass(frozen=True, eq=False)
class StreamedFolder:
    """An image folder whose training split is streamed from its files; the other splits are decoded
    into memory."""

    listing: FolderListing
    image_size: ImageSize
    """Size of the images."""
    num_threads: int = 2
    """Decoding threads."""
    cache: ImageCache | None = None
    """Cache of the other splits' pixels; None: the user's cache folder."""
    crop_fraction: float = 1.0
    """Share of the image that evaluation keeps (`centre_crop`), (0, 1]; training uses random
    crops."""

    @property
    def name(self) -> str:
        return "image_folder"

    @cached_property
    def labels(self) -> Int64[Tensor, " images"]:
        return torch.tensor(self.listing.labels, dtype=torch.int64)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.listing.class_names

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def official_test(self) -> Bool[np.ndarray, " images"] | None:
        return self.listing.official_test

    @property
    def official_val(self) -> Bool[np.ndarray, " images"] | None:
        return self.listing.official_val

    @property
    def notes(self) -> tuple[str, ...]:
        return self.listing.in_words()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (self.listing.channels, *height_and_width(self.image_size))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over file names, sizes and modification times.

        A file with a new modification time counts as changed; a set in memory is hashed by its
        pixels instead.
        """
        crop = "" if self.crop_fraction == 1 else f"/{self.crop_fraction}"
        return hashlib.sha256(f"streamed/{self.image_size}{crop}/{self.listing.fingerprint}".encode()).hexdigest()

    def tensor_data(self, splits: Splits, *, open_test: bool = False) -> TensorData:
        """See `ImageSource.tensor_data`; `train` is left out.

        Raises:
            DataError: A file does not decode; the message names it.
        """
        names = [name for name in SPLIT_NAMES if name != "train" and (open_test or name != "test")]
        parts = {name: self._decoded(splits[name]) for name in names}
        return TensorData(MappingProxyType(parts), self.class_names, self.image_shape)

    def normalization(self, splits: Splits) -> Normalization:
        """Mean and standard deviation of up to 2,048 images, always the same for the same training
        split.

        Raises:
            DataError: A file does not decode; the message names it.
        """
        keys = np.random.PCG64(derive_seed(0, "normalization")).random_raw(len(splits.train))
        ids = np.sort(splits.train[np.argsort(keys, kind="stable")[:NUM_NORMALIZATION_IMAGES]])
        return Normalization.from_images(self._decoded(ids).images)

    def training_images(self, splits: Splits, augmentation: Augmentation) -> TrainingImages:
        """See `ImageSource.training_images`; nothing is decoded before iteration."""
        files = tuple(str(self.listing.files[row].absolute()) for row in splits.train.tolist())
        labels = self.labels.index_select(0, torch.tensor(splits.train))
        return StreamedImages(
            files,
            labels,
            self.image_size,
            augmentation,
            self.num_threads,
            crop_fraction=self.crop_fraction,
            channels=self.listing.channels,
        )

    def _decoded(self, ids: np.ndarray) -> Batch:
        images = decode_images(
            self.listing, ids, self.image_size, self.cache, self.num_threads, crop_fraction=self.crop_fraction
        )
        rows = torch.tensor(ids)
        return Batch(images, self.labels.index_select(0, rows), rows)


def load_source(
    name: str,
    path: str | Path | None = None,
    image_size: ImageSize | None = None,
    *,
    stream: bool = False,
    num_threads: int = 2,
    crop_fraction: float = 1.0,
    options: FileOptions = DEFAULT_OPTIONS,
) -> ImageSource:
    """Open a data set.

    Args:
        name: A registered name.
        path: The folder that holds the data; None: the folder in the environment variable
            DSNET_DATA.
        image_size: Side of a square in pixels, or height and width, each 8..512; None: the data's
            own size.
        stream: Stream the training split from its files; image folders only.
        num_threads: Decoding threads of a streamed set, >= 1.
        crop_fraction: Share of the image that the centre crop keeps, (0, 1]; below 1 for image
            folders only. Where nothing is streamed, training uses the same crops as
            evaluation.
        options: Which files are read, and how many may be broken.

    Raises:
        ConfigError: The name is unknown, a number is out of range, the size is missing, or the set
            cannot be streamed or cropped.
        DataError: A file is missing, truncated or mislabelled; the message names it.
    """
    given = {each.name: getattr(options, each.name) for each in fields(FileOptions)}
    check_source(DataSettings(name=name, crop_fraction=crop_fraction, stream=stream, **given))
    if name != IMAGE_FOLDER:
        return InMemorySource(load_images(name, path, image_size, options))
    size = checked_image_size(required_size(image_size))
    if stream:
        return StreamedFolder(list_image_folder(path, options), size, num_threads, crop_fraction=crop_fraction)
    return InMemorySource(load_image_folder(path, size, crop_fraction=crop_fraction, options=options))
