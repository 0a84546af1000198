"""Small supernets, images and routing tables that the tests of the core share."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsnet.data.augment import Augmentation
from dsnet.data.normalization import Normalization
from dsnet.data.tensors import Batch, TensorData
from dsnet.families import Task, create, layout
from dsnet.layers import BatchNormBank
from dsnet.routing_table import RoutingTable
from dsnet.space import SubnetSet
from dsnet.supernet import Supernet
from dsnet.training.settings import TEACHER_OF_MODE, BootstrapSettings, Regime, SupernetRun, TrainSettings

SMALL_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "ds_mbnet": {"width": 0.25, "num_routes": 4, "stem_stride": 1},
    "ds_resnet": {"depth": 14, "width": 0.5, "ratios": [0.5, 1.0], "paths": [[0, 0, 0], [0, 1, 0], [1, 0, 1]]},
    "ds_tiny": {"width": 0.5, "num_routes": 3},
}
"""Options that make a family quick to run; a family without an entry is tested with its defaults."""
NORMALIZATION = Normalization((120.0, 130.0, 125.0), (60.0, 55.0, 65.0))


def task(num_classes: int = 10, image_size: int = 16) -> Task:
    """A task with colour images."""
    return Task(num_classes, 3, image_size)


def small_set(family: str, num_classes: int = 10, image_size: int = 16) -> SubnetSet:
    """The family's sub-networks, in small."""
    return layout(family, task(num_classes, image_size), SMALL_OPTIONS.get(family, {}))


def small_supernet(family: str = "ds_tiny", seed: int = 0, num_classes: int = 10, image_size: int = 16) -> Supernet:
    """A small supernet in eval mode, every parameter and statistic of which is away from its initial value."""
    supernet = create(family, task(num_classes, image_size), SMALL_OPTIONS.get(family, {}), seed=seed)
    return shaken(supernet, seed).eval()


@torch.no_grad()
def shaken(supernet: Supernet, seed: int = 0) -> Supernet:
    """The supernet itself, with random affine pairs, biases and running statistics and logits of order 1."""
    generator = torch.Generator().manual_seed(seed + 1000)
    for name, parameter in supernet.named_parameters():
        if parameter.ndim == 1:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        elif name == "classifier.weight":
            parameter.mul_(30.0)
    for norm in supernet.batch_norms():
        shake_statistics(norm, generator)
    return supernet


def shake_statistics(norm: BatchNormBank, generator: torch.Generator) -> None:
    """Random running statistics in every set of a bank."""
    for name, buffer in norm.named_buffers():
        if name.startswith("mean_"):
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
        elif name.startswith("var_"):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))


def random_images(count: int, size: int = 16, seed: int = 0) -> Tensor:
    """Normalised images, float32 [count, 3, size, size]."""
    return torch.randn((count, 3, size, size), generator=torch.Generator().manual_seed(seed))


def random_pixels(count: int, size: int = 16, seed: int = 0) -> Tensor:
    """Images as uint8 [count, 3, size, size]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def random_labels(count: int, num_classes: int = 10, seed: int = 0) -> Tensor:
    """int64 [count]."""
    return torch.randint(num_classes, (count,), generator=torch.Generator().manual_seed(seed + 1))


def tensor_data(count: int = 20, size: int = 16, num_classes: int = 10, split: str = "val") -> TensorData:
    """One split of random images whose ids are not their positions."""
    ids = torch.arange(count) * 3 + 7
    part = Batch(random_pixels(count, size), random_labels(count, num_classes), ids)
    names = tuple(f"class{index}" for index in range(num_classes))
    return TensorData(MappingProxyType({split: part}), names, (3, size, size))


def small_run(mode: str = "ib", **changes: Any) -> SupernetRun:
    """A training run of 4 epochs with everything switched on that draws random numbers."""
    train = TrainSettings(epochs=4, batch_size=16, lr=0.05, warmup_epochs=1.0)
    fields: dict[str, Any] = {
        "train": train,
        "regime": Regime(teacher=TEACHER_OF_MODE[mode], num_random=1),
        "bootstrapping": BootstrapSettings(teacher_min_updates=5, soft_ramp_epochs=1.0),
        "augmentation": Augmentation(crop_padding=1, flip=True, cutout=2),
        "normalization": NORMALIZATION,
        "seed": 3,
    }
    return SupernetRun(**{**fields, **changes})


def random_table(
    num_images: int = 60, num_routes: int = 4, *, seed: int = 0, hidden: int = 6, split: str = "gate"
) -> RoutingTable:
    """A table with consistent columns in which costlier routes tend to be right; its evidence holds a hidden vector alone."""
    rng = np.random.default_rng(seed)
    num_classes = 7
    labels = rng.integers(0, num_classes, num_images)
    difficulty = rng.random(num_images)
    skill = np.linspace(0.0, 3.0, num_routes)
    logits = rng.normal(size=(num_images, num_routes, num_classes))
    logits[np.arange(num_images), :, labels] += 2.5 + skill - 4.0 * difficulty[:, None]
    evidence = np.maximum(rng.normal(size=(num_images, hidden)) + difficulty[:, None] * np.linspace(-2, 2, hidden), 0)
    shifted = logits - logits.max(2, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(2, keepdims=True))
    p = np.sort(np.exp(log_p), axis=2)
    order = np.argsort(-logits, axis=2)
    return RoutingTable(
        split=split,
        routes=tuple(f"subnet-{k:02d}" for k in range(num_routes)),
        layout={"hidden": (0, hidden)},
        trunk_madds=500,
        image_ids=np.arange(num_images, dtype=np.int64),
        labels=labels.astype(np.int64),
        madds=(1000 + 700 * np.arange(num_routes) ** 2).astype(np.int64),
        ce=-log_p[np.arange(num_images), :, labels].astype(np.float32),
        predicted=order[:, :, 0].astype(np.int64),
        correct1=order[:, :, 0] == labels[:, None],
        correct5=(order[:, :, :5] == labels[:, None, None]).any(2),
        confidence=p[:, :, -1].astype(np.float32),
        margin=(p[:, :, -1] - p[:, :, -2]).astype(np.float32),
        entropy=(-(np.exp(log_p) * log_p).sum(2)).astype(np.float32),
        logits=logits.astype(np.float16),
        logit_classes=np.zeros((num_images, num_routes, 0), dtype=np.int32),
        evidence=evidence.astype(np.float32)[:, None, :],
    )
