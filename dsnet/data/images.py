"""Labelled sets of images in memory, and their resizing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from dsnet.image_size import ImageSize, height_and_width

_RESIZE_CHUNK = 1024  # images held as float32 at a time while resizing


@dataclass(frozen=True, eq=False)
class ImageSet:
    """All images of one data set; the index of an image is its permanent id.

    Build it with `ImageSet.create`, which computes the fingerprint.
    """

    name: str
    images: UInt8[Tensor, "images channels height width"]
    """uint8 [N, C, H, W], contiguous, 0..255."""
    labels: Int64[Tensor, " images"]
    """int64 [N], each in 0..len(class_names) - 1."""
    class_names: tuple[str, ...]
    official_test: Bool[np.ndarray, " images"] | None
    """bool [N]: the images that the data's authors set aside for testing; None where there are
    none."""
    fingerprint: str
    """SHA-256 over pixels, labels, class names and the official parts; stage keys depend on it."""
    official_val: Bool[np.ndarray, " images"] | None = None
    """bool [N]: the images that the data's authors set aside for validation; None where there are
    none."""
    notes: tuple[str, ...] = ()
    """Sentences about how the data was read, for people."""

    def __post_init__(self) -> None:
        assert self.images.dtype == torch.uint8, self.images.dtype
        assert self.images.ndim == 4, tuple(self.images.shape)
        assert self.images.is_contiguous()
        assert self.labels.dtype == torch.int64, self.labels.dtype
        assert self.labels.shape == (self.num_images,), (tuple(self.labels.shape), self.num_images)
        for part in (self.official_val, self.official_test):
            assert part is None or part.shape == (self.num_images,)
        assert int(self.labels.min()) >= 0
        assert int(self.labels.max()) < self.num_classes

    @classmethod
    def create(
        cls,
        name: str,
        images: UInt8[Tensor, "images channels height width"],
        labels: Int64[Tensor, " images"],
        class_names: Sequence[str],
        official_test: Bool[np.ndarray, " images"] | None = None,
        official_val: Bool[np.ndarray, " images"] | None = None,
    ) -> ImageSet:
        """Build a set and compute its fingerprint.

        Args:
            name: The data set's registered name.
            images: uint8 [N, C, H, W], N >= 1.
            labels: int64 [N].
            class_names: One name per class, in label order.
            official_test: bool [N], or None where the data has no test split of its own.
            official_val: bool [N], or None where the data has no validation split of its own.
        """
        images = images.contiguous()
        fingerprint = _fingerprint(images, labels, class_names, official_test, official_val)
        return cls(name, images, labels, tuple(class_names), official_test, fingerprint, official_val)

    @property
    def num_images(self) -> int:
        return self.images.shape[0]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def resized(self, image_size: ImageSize) -> ImageSet:
        """The set resized to `image_size` (antialiased bilinear), whatever the shape of its images;
        itself if it has that size."""
        if self.image_shape[1:] == height_and_width(image_size):
            return self
        images = resize_images(self.images, image_size)
        resized = ImageSet.create(
            self.name, images, self.labels, self.class_names, self.official_test, self.official_val
        )
        return replace(resized, notes=self.notes)


def resize_images(
    images: UInt8[Tensor, "images channels height width"], image_size: ImageSize
) -> UInt8[Tensor, "images channels new_height new_width"]:
    """Resize uint8 [N, C, H, W] to `image_size`, antialiased bilinear, rounded."""
    size = height_and_width(image_size)
    channels = images.shape[1]
    resized = torch.empty((len(images), channels, *size), dtype=torch.uint8)
    for start in range(0, len(images), _RESIZE_CHUNK):
        chunk = images[start : start + _RESIZE_CHUNK].float()
        pixels = F.interpolate(chunk, size=size, mode="bilinear", antialias=True)
        resized[start : start + _RESIZE_CHUNK] = pixels.round_().clamp_(0, 255).to(torch.uint8)
    return resized


def _fingerprint(
    images: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    official_test: np.ndarray | None,
    official_val: np.ndarray | None,
) -> str:
    digest = hashlib.sha256()
    digest.update(json.dumps([list(images.shape), list(class_names), official_test is not None]).encode())
    digest.update(images.numpy().data)
    digest.update(labels.numpy().astype("<i8").data)
    if official_test is not None:
        digest.update(official_test.astype(np.uint8).data)
    if official_val is not None:
        digest.update(b"val")
        digest.update(official_val.astype(np.uint8).data)
    return digest.hexdigest()
