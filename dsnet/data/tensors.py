"""The splits as tensors in memory, with a sealed test split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from dsnet.data.images import ImageSet
from dsnet.data.splits import SPLIT_NAMES, Splits


class Batch(NamedTuple):
    """A batch of B images with their labels and ids."""

    images: UInt8[Tensor, "batch channels height width"]
    """uint8 [B, C, H, W]."""
    labels: Int64[Tensor, " batch"]
    """int64 [B]."""
    ids: Int64[Tensor, " batch"]
    """int64 [B]: the images' indices in their `ImageSet`."""


@dataclass(frozen=True, eq=False)
class TensorData:
    """Splits of one image set, each contiguous and on one device.

    The test split is included only with `open_test=True`. `sealed()` removes it: it is absent
    rather than hidden, so that search code cannot reach it.
    """

    splits: Mapping[str, Batch]
    """Split name -> all of its images, in ascending order of their ids."""
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    """(channels, height, width)."""

    @classmethod
    def from_images(cls, image_set: ImageSet, splits: Splits, *, open_test: bool = False) -> TensorData:
        """Build the splits from an image set.

        Args:
            image_set: The images.
            splits: The ids of each split.
            open_test: Include the test split; only verification and reports may do so.
        """
        names = [name for name in SPLIT_NAMES if open_test or name != "test"]
        parts = {name: _take(image_set, torch.tensor(splits[name])) for name in names}
        return cls(MappingProxyType(parts), image_set.class_names, image_set.image_shape)

    def sealed(self) -> TensorData:
        """The same data without the test split."""
        parts = {name: part for name, part in self.splits.items() if name != "test"}
        return TensorData(MappingProxyType(parts), self.class_names, self.image_shape)

    def to(self, device: torch.device | str) -> TensorData:
        """The same data on another device."""
        parts = {name: Batch(*(tensor.to(device) for tensor in part)) for name, part in self.splits.items()}
        return TensorData(MappingProxyType(parts), self.class_names, self.image_shape)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def num_images(self, split: str) -> int:
        return len(self._part(split).labels)

    def images(self, split: str) -> UInt8[Tensor, "images channels height width"]:
        """uint8 [N, C, H, W]; the tensor itself, not a copy."""
        return self._part(split).images

    def labels(self, split: str) -> Int64[Tensor, " images"]:
        """int64 [N]."""
        return self._part(split).labels

    def ids(self, split: str) -> Int64[Tensor, " images"]:
        """int64 [N]: the images' indices in their `ImageSet`."""
        return self._part(split).ids

    def take(self, split: str, positions: Int64[Tensor, " batch"]) -> Batch:
        """The images at the given positions of a split (int64 [B], on any device)."""
        part = self._part(split)
        positions = positions.to(part.labels.device)
        return Batch(*(tensor.index_select(0, positions) for tensor in part))

    def batches(self, split: str, batch_size: int) -> Iterator[Batch]:
        """Iterate over all images in ascending order of ids; batches are views, and the last one
        may be smaller."""
        part = self._part(split)
        _check_batch_size(batch_size)
        for start in range(0, self.num_images(split), batch_size):
            yield Batch(*(tensor[start : start + batch_size] for tensor in part))

    def shuffled(
        self, split: str, batch_size: int, generator: torch.Generator, *, drop_last: bool = False
    ) -> Iterator[Batch]:
        """Iterate over one epoch in random order.

        Args:
            split: The split's name.
            batch_size: >= 1.
            generator: One permutation is drawn from it per call, when the first batch is taken.
            drop_last: Leave out a last batch that is smaller.
        """
        _check_batch_size(batch_size)
        order = torch.randperm(self.num_images(split), generator=generator, device=generator.device)
        for positions in order.split(batch_size):
            if len(positions) == batch_size or not drop_last:
                yield self.take(split, positions)

    def _part(self, split: str) -> Batch:
        if split in self.splits:
            return self.splits[split]
        if split == "test":
            raise ValueError("the test split is sealed: it is read only after the front is frozen (open_test=True)")
        raise ValueError(f"unknown split {split!r}; known: {', '.join(self.splits)}")


def _take(image_set: ImageSet, ids: Tensor) -> Batch:
    return Batch(image_set.images.index_select(0, ids), image_set.labels.index_select(0, ids), ids)


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, must be >= 1")
