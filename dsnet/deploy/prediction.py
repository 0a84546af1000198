"""Classification of photo files: they are decoded ahead on threads and classified in batches.

A classifier is any function from a batch of pixels to `Predictions`; a bundle is one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from dsnet.data.prefetch import in_order
from dsnet.errors import DataError

BATCH_SIZE = 64
_NUM_THREADS = 2


class Predictions(NamedTuple):
    """Output of a classifier for a batch of B images, in the batch's order."""

    classes: Int64[Tensor, " batch"]
    """int64 [B] predicted class, an index into `class_names`."""
    probabilities: Float32[Tensor, "batch classes"]
    """float32 [B, num_classes] probability of each class."""
    routes: Int64[Tensor, " batch"]
    """int64 [B] route that gave the answer, an index into `route_names`."""
    madds: Int64[Tensor, " batch"]
    """int64 [B] MAdds spent on each image."""


@dataclass(frozen=True)
class PhotoPrediction:
    """Prediction for one photo."""

    file: Path
    class_name: str
    """The most probable class."""
    probability: float
    """Probability of that class, 0..1."""
    route: str
    """Name of the sub-network that gave the answer."""
    madds: int
    """MAdds spent on the photo, including those of the router."""
    milliseconds: float
    """Time of the classification of its batch, divided by the number of photos in it. Reading and
    decoding, which run ahead on threads, are not in it."""


@dataclass(frozen=True)
class Classifier:
    """A function that classifies batches of pixels, with the names of its classes and routes."""

    classify: Callable[[UInt8[Tensor, "batch channels height width"]], Predictions]
    """Function of uint8 [B, C, H, W]."""
    class_names: Sequence[str]
    route_names: Sequence[str]


def predict_photos(
    files: Sequence[Path],
    decode: Callable[[Path], UInt8[Tensor, "channels height width"]],
    classifier: Classifier,
    on_error: Callable[[Path, DataError], None],
    batch_size: int = BATCH_SIZE,
) -> Iterator[PhotoPrediction]:
    """Classify photos, batch by batch, in their order.

    Args:
        files: The photos.
        decode: Function from a file to uint8 [C, H, W], called on threads; it raises a `DataError`
            for a file that it cannot read.
        classifier: The classifier.
        on_error: Called with each file that cannot be read and its error; the other photos are
            classified.
        batch_size: Photos per batch, >= 1.
    """
    attempt = partial(_decoded_or_error, decode)
    with closing(in_order(attempt, files, num_threads=_NUM_THREADS, num_ahead=batch_size)) as decoded:
        pairs = zip(files, decoded, strict=True)
        while batch := list(islice(pairs, batch_size)):
            good: list[tuple[Path, Tensor]] = []
            for file, photo in batch:
                if isinstance(photo, DataError):
                    on_error(file, photo)
                else:
                    good.append((file, photo))
            if good:
                yield from _answers(good, classifier)


def _decoded_or_error(decode: Callable[[Path], Tensor], file: Path) -> Tensor | DataError:
    try:
        return decode(file)
    except DataError as error:
        return error


@torch.inference_mode()
def _answers(photos: Sequence[tuple[Path, Tensor]], classifier: Classifier) -> list[PhotoPrediction]:
    pixels = torch.stack([pixels for _, pixels in photos])
    started = time.perf_counter()
    found = classifier.classify(pixels)
    classes = found.classes.tolist()  # waits for a GPU
    milliseconds = 1e3 * (time.perf_counter() - started) / len(photos)
    sure = found.probabilities.gather(1, found.classes[:, None])[:, 0]
    rows = zip(classes, sure.tolist(), found.routes.tolist(), found.madds.tolist(), strict=True)
    return [
        PhotoPrediction(
            file, classifier.class_names[label], probability, classifier.route_names[route], madds, milliseconds
        )
        for (file, _), (label, probability, route, madds) in zip(photos, rows, strict=True)
    ]
