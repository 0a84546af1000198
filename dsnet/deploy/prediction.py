"""Answers for photos: files are decoded ahead on threads, and whole batches of them go through a classifier.

The classifier is anything that turns a batch of pixels into `Predictions`; a bundle is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dsnet.data.prefetch import in_order
from dsnet.errors import DataError

BATCH_SIZE = 64
_NUM_THREADS = 2


class Predictions(NamedTuple):
    """What a classifier answers, in the batch's order."""

    classes: Tensor
    """int64 [B] index into `class_names`."""
    probabilities: Tensor
    """float32 [B, num_classes]."""
    routes: Tensor
    """int64 [B] index into `route_names`."""
    madds: Tensor
    """int64 [B] MAdds spent on each image."""


@dataclass(frozen=True)
class PhotoPrediction:
    """What a classifier says about one photo."""

    file: Path
    class_name: str
    """The most probable class."""
    probability: float
    """Of that class, 0..1."""
    route: str
    """The sub-network whose answer this is."""
    madds: int
    """MAdds spent on the photo, those of the router included."""


@dataclass(frozen=True)
class Classifier:
    """A network for batches of pixels, and the names of what it answers."""

    classify: Callable[[Tensor], Predictions]
    """Takes uint8 [B, C, H, W]."""
    class_names: Sequence[str]
    route_names: Sequence[str]


def predict_photos(
    files: Sequence[Path],
    decode: Callable[[Path], Tensor],
    classifier: Classifier,
    on_error: Callable[[Path, DataError], None],
    batch_size: int = BATCH_SIZE,
) -> Iterator[PhotoPrediction]:
    """Classify photos, batch by batch, in their order.

    Args:
        files: The photos.
        decode: From a file to uint8 [C, H, W]; raises a `DataError` for a file that it cannot read. It is called on threads.
        classifier: Answers.
        on_error: Hears of each file that cannot be read; the others are answered.
        batch_size: Photos that go through the network together, >= 1.
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
    found = classifier.classify(torch.stack([pixels for _, pixels in photos]))
    sure = found.probabilities.gather(1, found.classes[:, None])[:, 0]
    rows = zip(found.classes.tolist(), sure.tolist(), found.routes.tolist(), found.madds.tolist(), strict=True)
    return [
        PhotoPrediction(file, classifier.class_names[label], probability, classifier.route_names[route], madds)
        for (file, _), (label, probability, route, madds) in zip(photos, rows, strict=True)
    ]
