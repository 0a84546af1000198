"""Where the training loop gets its images from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from dsnet.data.augment import Augmentation, augment


class TrainingImages(Protocol):
    """The training split, however it is stored."""

    @property
    def labels(self) -> Tensor:
        """int64 [N], on the CPU."""
        ...

    def augmented(self, batches: Iterable[tuple[Tensor, int]], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """For each (rows int64 [B], seed): uint8 images [B, C, H, W], augmented, and labels [B], on `device`.

        The same rows and seed give the same bits, whatever came before.
        """
        ...

    def clean(self, rows: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
        """For each rows int64 [B]: uint8 images [B, C, H, W] as evaluation sees them, on `device`."""
        ...


class InMemoryImages:
    """A set small enough to live on the device, augmented there in batches."""

    def __init__(self, images: Tensor, labels: Tensor, augmentation: Augmentation) -> None:
        self.images = images
        self.labels = labels
        self.augmentation = augmentation

    def augmented(self, batches: Iterable[tuple[Tensor, int]], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """See `TrainingImages.augmented`."""
        images, labels = self.images.to(device), self.labels.to(device)
        for rows, seed in batches:
            generator = torch.Generator(device).manual_seed(seed)
            here = rows.to(device)
            yield augment(images[here], generator, self.augmentation), labels[here]

    def clean(self, rows: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
        """See `TrainingImages.clean`."""
        images = self.images.to(device)
        return (images[part.to(device)] for part in rows)
