"""Training images for the training loop: a set kept on the device, or files that are decoded when
they are needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, tee
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor

from dsnet.data.augment import augment
from dsnet.data.boxes import BoxDraw, draw_boxes
from dsnet.data.decoding import planes, read_rgb
from dsnet.data.image_folder import decode_file
from dsnet.data.prefetch import in_order
from dsnet.data.resized_crop import CROP_SCALE, crop_boxes
from dsnet.data.settings import Augmentation
from dsnet.image_size import ImageSize, height_and_width
from dsnet.seeds import derive_seed


class TrainingImages(Protocol):
    """Interface of a training split, independent of how it is stored."""

    @property
    def labels(self) -> Int64[Tensor, " images"]:
        """int64 [N], on the CPU."""
        ...

    def augmented(
        self, batches: Iterable[tuple[Int64[Tensor, " _batch"], int]], device: torch.device
    ) -> Iterator[tuple[UInt8[Tensor, "batch channels height width"], Int64[Tensor, " batch"]]]:
        """For each (rows int64 [B], seed): augmented uint8 images [B, C, H, W] and labels [B], on
        `device`.

        The same rows and seed give bit-identical images on one kind of device, independent of
        earlier batches.
        """
        ...

    def clean(
        self, rows: Iterable[Int64[Tensor, " _batch"]], device: torch.device
    ) -> Iterator[UInt8[Tensor, "batch channels height width"]]:
        """For each rows int64 [B]: uint8 images [B, C, H, W] without augmentation, as in
        evaluation, on `device`."""
        ...


class InMemoryImages:
    """A training split that fits on the device: copied and augmented there."""

    def __init__(
        self,
        images: UInt8[Tensor, "images channels height width"],
        labels: Int64[Tensor, " images"],
        augmentation: Augmentation,
    ) -> None:
        """Wrap a training split.

        Args:
            images: uint8 [N, C, H, W], on the CPU.
            labels: int64 [N], on the CPU.
            augmentation: The augmentation of `augmented`.
        """
        self.images = images
        self.labels = labels
        self.augmentation = augmentation
        self._copies: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def augmented(
        self, batches: Iterable[tuple[Int64[Tensor, " _batch"], int]], device: torch.device
    ) -> Iterator[tuple[UInt8[Tensor, "batch channels height width"], Int64[Tensor, " batch"]]]:
        """See `TrainingImages.augmented`."""
        images, labels = self._on(device)
        for rows, seed in batches:
            here = rows.to(device, non_blocking=True)
            generator = torch.Generator(device).manual_seed(seed)
            yield augment(images.index_select(0, here), generator, self.augmentation), labels.index_select(0, here)

    def clean(
        self, rows: Iterable[Int64[Tensor, " _batch"]], device: torch.device
    ) -> Iterator[UInt8[Tensor, "batch channels height width"]]:
        """See `TrainingImages.clean`."""
        images, _ = self._on(device)
        for part in rows:
            yield images.index_select(0, part.to(device, non_blocking=True))

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._copies:
            self._copies[device] = (self.images.to(device), self.labels.to(device))
        return self._copies[device]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_copies": {}}


@dataclass(frozen=True, eq=False)
class StreamedImages:
    """Image files that need not fit in memory, decoded by threads a little ahead of the
    training step.

    A file's random resized crop is cut and resized (antialiased bilinear) right after decoding; the
    rest of the augmentation is done in batches on the device. Results do not depend on the number
    of threads. The object can be pickled: it holds paths and labels, no pixels.
    """

    files: tuple[str, ...]
    """Paths of the N files."""
    labels: Int64[Tensor, " images"]
    """int64 [N], on the CPU."""
    image_size: ImageSize
    """Size of the images that are returned."""
    augmentation: Augmentation
    """Its `crop_padding` is ignored: a random resized crop of `crop_scale`, by default (0.08, 1),
    takes its place."""
    num_threads: int = 2
    """Decoding threads of each iteration."""
    num_ahead: int = 512
    """Decoded images that may wait for the training step, a byte for each channel of a
    pixel; should be at least a batch."""
    crop_fraction: float = 1.0
    """Share of the image that the centre crop of `clean` keeps, (0, 1]."""
    channels: int = 3
    """Channels of the images: 3 is RGB, 1 grey."""

    def augmented(
        self, batches: Iterable[tuple[Int64[Tensor, " _batch"], int]], device: torch.device
    ) -> Iterator[tuple[UInt8[Tensor, "batch channels height width"], Int64[Tensor, " batch"]]]:
        """See `TrainingImages.augmented`; `batches` is consumed lazily, a little ahead.

        Raises:
            DataError: A file cannot be read or does not decode; the message names it.
        """
        on_device = replace(self.augmentation, crop_padding=0, crop_scale=None)
        to_decode, to_yield = tee(batches)
        scale = self.augmentation.crop_scale or CROP_SCALE
        decode = partial(_decode_crop, scale=scale, image_size=self.image_size, channels=self.channels)
        jobs = (job for rows, seed in to_decode for job in self._crops(rows, seed))
        with closing(in_order(decode, jobs, num_threads=self.num_threads, num_ahead=self.num_ahead)) as decoded:
            for rows, seed in to_yield:
                images = self._batch(decoded, len(rows), device)
                generator = torch.Generator(device).manual_seed(derive_seed(seed, "batch"))
                yield augment(images, generator, on_device), self.labels[rows].to(device, non_blocking=True)

    def clean(
        self, rows: Iterable[Int64[Tensor, " _batch"]], device: torch.device
    ) -> Iterator[UInt8[Tensor, "batch channels height width"]]:
        """See `TrainingImages.clean`; images are resized and their centre cropped, as for the
        other splits.

        Raises:
            DataError: A file cannot be read or does not decode; the message names it.
        """
        to_decode, to_yield = tee(rows)
        decode = partial(
            decode_file, image_size=self.image_size, crop_fraction=self.crop_fraction, channels=self.channels
        )
        files = (Path(self.files[row]) for part in to_decode for row in part.tolist())
        with closing(in_order(decode, files, num_threads=self.num_threads, num_ahead=self.num_ahead)) as decoded:
            for part in to_yield:
                yield self._batch(decoded, len(part), device)

    def _crops(self, rows: Tensor, seed: int) -> Iterator[tuple[Path, BoxDraw]]:
        draw = draw_boxes(len(rows), torch.Generator().manual_seed(derive_seed(seed, "crops")))
        for position, row in enumerate(rows.tolist()):
            yield Path(self.files[row]), draw[position]

    def _batch(self, decoded: Iterator[np.ndarray], num_images: int, device: torch.device) -> Tensor:
        """Collect the next images as uint8 [B, C, H, W].

        The copy to a GPU comes from pinned memory, so that it does not delay the training step.
        """
        shape = (num_images, self.channels, *height_and_width(self.image_size))
        batch = torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
        pixels = batch.numpy()
        for position, image in enumerate(islice(decoded, num_images)):
            pixels[position] = image
        return batch.to(device, non_blocking=True)


def _decode_crop(job: tuple[Path, BoxDraw], scale: Sequence[float], image_size: ImageSize, channels: int) -> np.ndarray:
    """Decode a file and cut its random resized crop: uint8 [channels, height, width]."""
    file, draw = job
    height, width = height_and_width(image_size)
    image = read_rgb(file)
    box = crop_boxes(draw, (image.height, image.width), scale, width / height)
    top, left = int(box.top), int(box.left)
    corners = (left, top, left + int(box.width), top + int(box.height))
    cropped = image.resize((width, height), Image.Resampling.BILINEAR, box=corners)
    return planes(cropped, channels)
