"""Scores of sub-networks on a hold-out: images of `train` on which no base is trained."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from dsnet.data.normalization import Normalization
from dsnet.data.splits import apportion
from dsnet.errors import ConfigError
from dsnet.network.batchnorm import batch_statistics
from dsnet.network.supernet import Supernet
from dsnet.seeds import derive_seed
from dsnet.space.spec import Subnet
from dsnet.structure.method import Score
from dsnet.structure.settings import num_held_out
from dsnet.wording import plural

BATCH = 256
"""Images per batch; their statistics normalise them."""
FEW_IMAGES = 100
"""With this many images or fewer, one image is a percentage point of accuracy or more."""


def split_holdout(
    rows: Int64[np.ndarray, " images"], labels: Int64[np.ndarray, " images"], share: float, seed: int
) -> tuple[Int64[np.ndarray, " kept"], Int64[np.ndarray, " held_out"]]:
    """Divide a split into images to train on and a stratified hold-out, both in rising order.

    Args:
        rows: int64 [N], the images' ids or positions.
        labels: int64 [N], their classes.
        share: share of the hold-out, above 0 and below 1.
        seed: decides which images are held out, never how many.

    Raises:
        ConfigError: one of the two parts would be empty.
    """
    count = num_held_out(share, len(rows))
    if not 0 < count < len(rows):
        raise ConfigError(
            f"supernet.structure.holdout is {share:g}, which comes to {count} of the {len(rows)} images of train: "
            "choose a share that leaves images on both sides"
        )
    keys = np.random.PCG64(derive_seed(seed, "holdout")).random_raw(len(rows))
    order = np.argsort(keys, kind="stable")
    classes = np.unique(labels)
    members = [order[labels[order] == label] for label in classes]
    quotas = apportion([len(member) for member in members], [count])[:, 0]
    held = np.concatenate([member[:quota] for member, quota in zip(members, quotas, strict=True)])
    is_held = np.zeros(len(rows), dtype=bool)
    is_held[held] = True
    return np.sort(rows[~is_held]), np.sort(rows[is_held])


def holdout_warning(num_images: int) -> str | None:
    """A warning where a hold-out cannot tell apart accuracies that differ by 1 %; else None."""
    if num_images > FEW_IMAGES:
        return None
    return (
        f"the hold-out of the structure search has {plural(num_images, 'image')}, so that one image is "
        f"{100 / num_images:.2g} % of accuracy: it chooses by chance between "
        "sub-networks that differ by less; raise supernet.structure.holdout, or use more data"
    )


class HoldOutScorer:
    """One network and the hold-out on a device.

    Norms use the statistics of the batch, so that any widths can be scored; no weight is copied and
    no statistics change. The batches are fixed: a score is a function of weights, images and
    widths.
    """

    def __init__(
        self,
        supernet: Supernet,
        images: UInt8[Tensor, "images channels height width"],
        labels: Int64[Tensor, " images"],
        normalization: Normalization,
        *,
        batch_size: int = BATCH,
        device: torch.device | str = "cpu",
    ) -> None:
        """Put the network and the images on a device.

        Args:
            supernet: the network that is scored.
            images: uint8 [N, C, H, W].
            labels: int64 [N].
            normalization: the one that the network is trained with.
            batch_size: largest number of images of a batch; batches are about equally large.
            device: the device.
        """
        self.supernet = supernet.to(device)
        self._normalization = normalization
        # The hold-out stands in the order of the images, which may be that of the classes: every
        # batch must have its share of each class.
        parts = math.ceil(len(labels) / batch_size)
        rows = [torch.arange(part, len(labels), parts) for part in range(parts)]
        self._batches = [(images[part].to(device), labels[part].to(device)) for part in rows]
        self.num_images = len(labels)

    @torch.no_grad()
    def score(self, widths: Sequence[int]) -> Score:
        """The number of images that a sub-network classifies correctly."""
        start = time.perf_counter()
        subnet = self.supernet.subnets.at(widths)
        num_correct = torch.zeros((), dtype=torch.int64, device=self._batches[0][1].device)
        with batch_statistics(self.supernet):
            for images, labels in self._batches:
                num_correct += self._count(images, labels, subnet)
        return Score(int(num_correct), self.num_images, time.perf_counter() - start)

    def _count(self, images: Tensor, labels: Tensor, subnet: Subnet) -> Tensor:
        logits = self.supernet(self._normalization.apply(images), subnet)
        return (logits.argmax(1) == labels).sum()
