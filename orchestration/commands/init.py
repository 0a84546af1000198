"""A first sweep file for a folder of images; its comments say what was found and why values were
chosen."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsnet.data.cifar10 import CLASS_NAMES, IMAGE_SIZE, holds_cifar10
from dsnet.data.cifar100 import holds_cifar100
from dsnet.data.hub_parquet import parquet_files_below
from dsnet.data.registry import load_images
from dsnet.data.settings import FEW_IMAGES, MAX_IMAGE_SIZE, can_mirror
from dsnet.data.splits import Splits, make_splits, splits_of
from dsnet.data.survey import Survey, survey_folder
from dsnet.errors import ConfigError, DataError
from dsnet.families import Task, family_names, layout
from dsnet.files import atomic_write_text, writing
from dsnet.image_size import ImageSize, height_and_width, image_size_of, shorter_side, size_in_words
from dsnet.space.cost import subnet_cost
from dsnet.training.data_defaults import DataDefault, DataFacts, data_defaults
from dsnet.training.plain_start import is_plain
from dsnet.training.start import find_checkpoint
from dsnet.wording import plural
from orchestration.config.loading import load_source_text
from orchestration.config.yaml_source import parse_yaml

MODEL = "ds_resnet"
"""Default model: dense convolutions train several times faster on a CPU than depthwise ones, and to
a higher accuracy in short trainings."""
SIZES = (64, 48, 32)
"""Proposed image sizes (side in pixels); the largest that does not exceed the pictures is used."""
SIDE_STEP = 4
"""Sides that are proposed for other sizes are multiples of this number of pixels."""
LARGE_STEM_FROM = 48
"""Shorter side in pixels from which on the first layers reduce the resolution."""
UNEVEN = 3
"""Ratio of the largest to the smallest class from which on the classes are called unbalanced."""
MAX_CLASSES = 12
"""Largest number of classes whose image counts are listed."""
CIFAR10_TRAIN, CIFAR10_TEST = 50_000, 10_000


@dataclass(frozen=True)
class Network:
    """The network for which the file is written."""

    model: str = MODEL
    """Name of a family, or the import path of a network."""
    init_from: Path | None = None
    """Its trained weights."""
    targets: tuple[float, ...] = ()
    """MAdds of its sub-networks as shares of its own; empty: those that the family declares."""

    def options(self, size: ImageSize) -> dict[str, Any]:
        """The options that are proposed for images of this size."""
        return model_options(size) if self.model == MODEL else {}


@dataclass(frozen=True)
class Seen:
    """What was found in the image folder, from which the file is written."""

    data_name: str
    image_size: int | None
    """Image size for the file, side in pixels; None keeps the stored size."""
    lines: tuple[str, ...]
    """Findings, one sentence each."""
    size_reason: str
    facts: DataFacts
    splits: Splits
    oblong_size: ImageSize | None = None
    """Image size in the shape of the pictures, if all have one that is no square."""


def init_sweep(
    folder: Path, out: Path | None, name: str | None, network: Network | None = None, *, overwrite: bool = False
) -> tuple[Path, Seen]:
    """Look at the images and write a sweep file.

    Args:
        folder: folder of the images.
        out: the file; None = NAME.yaml in the working directory.
        name: name of the sweep; None = the folder's name.
        network: the network; None = the proposed one, from fresh weights.
        overwrite: replace a file that is there.

    Raises:
        ConfigError: the file is there already, or there is no such network.
        CheckpointError: there are no such weights.
        DataError: the images cannot be used as they lie there.
    """
    folder = folder.expanduser()
    name = name if name is not None else _name_of(folder)
    path = out if out is not None else Path(f"{name}.yaml")
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} already exists; choose another file with --out, or replace it with --force")
    network = network or Network()
    if network.init_from is not None:
        find_checkpoint(network.init_from)
    seen = _look(folder, network)
    text = sweep_text(folder.absolute(), name, seen, network)
    load_source_text(
        parse_yaml(text, str(path)), known_models=family_names()
    )  # raises if the written file is not valid
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, text)
    return path, seen


def _name_of(folder: Path) -> str:
    """The folder's name, changed into a valid name of a sweep."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.absolute().name).strip("-.")[:64]
    return name or "photos"


def _look(folder: Path, network: Network) -> Seen:
    if not folder.exists():
        raise DataError(f"{folder}: does not exist; set --data to the folder of the images")
    if holds_cifar10(folder):
        return _cifar10(network)
    if holds_cifar100(folder):
        return _of_fixed_size("cifar100", folder, network)
    if folder.is_dir() and parquet_files_below(folder):
        return _of_fixed_size("parquet", folder, network)
    return _photos(survey_folder(folder), network)


def _of_fixed_size(name: str, folder: Path, network: Network) -> Seen:
    """A data set that is read as a whole, in the size in which it is stored."""
    images = load_images(name, folder)
    labels = images.labels.numpy()
    splits = splits_of(images)
    channels, size = images.image_shape[0], image_size_of(images.image_shape)
    facts = _facts(labels, splits, images.num_classes, size, network, channels, can_mirror=can_mirror(images))
    line = f"{images.num_images:,} images of {size_in_words(size)} in {plural(images.num_classes, 'class', 'classes')}."
    return Seen(name, None, (line, *images.notes, *_few_images(splits)), "", facts, splits)


def _cifar10(network: Network) -> Seen:
    labels = np.tile(np.arange(len(CLASS_NAMES)), (CIFAR10_TRAIN + CIFAR10_TEST) // len(CLASS_NAMES))
    splits = make_splits(labels, np.arange(len(labels)) >= CIFAR10_TRAIN)
    lines = (
        f"CIFAR-10: {CIFAR10_TRAIN:,} training and {CIFAR10_TEST:,} test images of 32 x 32 pixels in 10 balanced classes.",
    )
    return Seen("cifar10", None, lines, "", _facts(labels, splits, len(CLASS_NAMES), IMAGE_SIZE, network), splits)


def _photos(survey: Survey, network: Network) -> Seen:
    labels = np.array(survey.listing.labels)
    try:
        splits = make_splits(
            labels,
            survey.listing.official_test,
            official_val=survey.listing.official_val,
            class_names=survey.listing.class_names,
        )
    except ConfigError as error:
        fewest = min(survey.class_sizes.items(), key=lambda item: item[1])
        raise DataError(
            f"{survey.listing.root}: too few images: class {fewest[0]!r} has {fewest[1]}; train, gate, val and test each need at least "
            f"one image of every class ({error})"
        ) from error
    size = next(
        (side for side in SIZES if side <= survey.short_side), max(8, survey.short_side // SIDE_STEP * SIDE_STEP)
    )
    reason = f"median shorter side of the pictures: {survey.short_side} pixels"
    if size < survey.short_side:
        reason += "; larger images may be more accurate, but slower"
    facts = _facts(labels, splits, len(survey.class_sizes), size, network)
    return Seen(
        "image_folder", size, (*_sentences(survey), *_few_images(splits)), reason, facts, splits, _oblong(survey, size)
    )


def _oblong(survey: Survey, size: int) -> ImageSize | None:
    """The image size in the shape of the pictures with `size` pixels on the shorter side, if all
    pictures have one shape that is no square and the longer side is possible."""
    shape = survey.oblong_shape
    if shape is None:
        return None
    height, width = (round(size * side / min(shape) / SIDE_STEP) * SIDE_STEP for side in shape)
    return image_size_of((height, width)) if max(height, width) <= MAX_IMAGE_SIZE else None


def _few_images(splits: Splits) -> Iterator[str]:
    """Warn if `val` or `test` has too few images to compare routers."""
    val, test = len(splits["val"]), len(splits["test"])
    if min(val, test) < FEW_IMAGES:
        yield (
            f"Few pictures: {val} in val and {test} in test, so that one picture changes accuracy by {100 / min(val, test):.1f} points; "
            f"at least {FEW_IMAGES} in each are needed to compare routers."
        )


def _sentences(survey: Survey) -> Iterator[str]:
    counts = survey.class_sizes
    fewest, most = min(counts.values()), max(counts.values())
    widths, heights = zip(*survey.sizes, strict=True)
    are_squares = widths == heights
    pixels = f"{_range(heights)} x {_range(widths)} pixels" + ("" if are_squares else " (height x width)")
    colour = "grey; they are read as three equal channels" if survey.is_grey else "in colour"
    yield f"{survey.num_images:,} pictures in {len(counts)} classes, {pixels}, {colour}."
    if len(set(survey.sizes)) > 1 or not are_squares:
        yield "Each picture is resized by its shorter side, and its centre square is used."
    if len(counts) <= MAX_CLASSES:
        yield f"Classes: {', '.join(f'{name} {count:,}' for name, count in counts.items())}."
    else:
        yield f"Pictures per class: {fewest:,} to {most:,}."
    if most >= UNEVEN * fewest:
        yield (
            f"The classes are unbalanced ({fewest:,} to {most:,} pictures): top1 is the mean over pictures, so that rare classes "
            "count little; the metric balanced_top1 is the mean over classes, and data.balance trains them evenly."
        )
    yield from survey.listing.in_words()


def _range(values: tuple[int, ...]) -> str:
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)} to {max(values)}"


def _facts(
    labels: np.ndarray,
    splits: Splits,
    num_classes: int,
    size: ImageSize,
    network: Network,
    channels: int = 3,
    *,
    can_mirror: bool = True,
) -> DataFacts:
    task = Task(num_classes=num_classes, in_channels=channels, image_size=size)
    subnets = layout(network.model, task, network.options(size))
    return DataFacts(
        num_train=len(splits.train),
        num_classes=num_classes,
        smallest_class=int(np.bincount(labels[splits.train], minlength=num_classes).min()),
        image_size=size,
        channels=channels,
        can_mirror=can_mirror,
        madds_m=subnet_cost(subnets.spec, subnets.largest, size).madds / 1e6,
        is_pretrained=network.init_from is not None and is_plain(find_checkpoint(network.init_from)),
    )


def model_options(size: ImageSize) -> dict[str, Any]:
    """Options of `ds_resnet` that train well on a CPU at this image size."""
    return {
        "depth": 8,
        "width": 2.0,
        "ratios": [0.25, 0.5, 0.75, 1.0],
        "paths": "uniform",
        "stem": "large" if shorter_side(size) >= LARGE_STEM_FROM else "small",
    }


_OPTION_COMMENTS = {
    "depth": "blocks: 8, 14, 20, ...",
    "width": "factor on all channels",
    "ratios": "width ratios of the sub-networks",
    "paths": "uniform: one ratio in all stages | all: every combination of ratios",
    "stem": "large: reduces the resolution to a quarter, for larger images | small: keeps it",
}


def sweep_text(folder: Path, name: str, seen: Seen, network: Network) -> str:
    """The text of the sweep file."""
    lines = [
        "# Written by dsnet-orch init for these images:",
        *(f"#   {line}" for line in seen.lines),
        "#",
        "# All other settings have defaults: `dsnet-orch plan` shows their values, `dsnet-orch schema` their meanings.",
        "version: 1",
        f"name: {json.dumps(name)}",
        "",
        "data:",
        f"  name: {seen.data_name}",
        f"  path: {json.dumps(str(folder), ensure_ascii=False)}",
    ]
    if seen.image_size is not None:
        lines.append(f"  image_size: {seen.image_size}    # {seen.size_reason}")
    if seen.oblong_size is not None:
        lines.append(
            f"  # image_size: {list(height_and_width(seen.oblong_size))}    # [height, width]: the shape of all pictures, of which nothing "
            "is cut off then; a square shows their centre alone"
        )
    if network.init_from is not None:
        lines.append(
            "  normalization: null    # of the pixels, as in the training of the weights: imagenet, or {mean: [...], std: [...]} for "
            "pixels in 0..1; null: as the weights record it, else from your images"
        )
    sizes = ", ".join(f"{split} {len(seen.splits[split]):,}" for split in ("train", "gate", "val", "test"))
    lines += [f"  # splits: {sizes} (test is sealed until the end)", "", *_supernet_lines(seen, network), ""]
    return "\n".join(lines)


def _supernet_lines(seen: Seen, network: Network) -> Iterator[str]:
    yield "supernet:"
    why = "    # trains faster on a CPU than networks of depthwise convolutions" if network.model == MODEL else ""
    yield f"  model: {network.model}{why}"
    if network.init_from is not None:
        path = json.dumps(str(network.init_from.expanduser().absolute()), ensure_ascii=False)
        yield f"  init_from: {path}    # the weights with which training begins"
    options = network.options(seen.facts.image_size)
    if options:
        yield "  options:"
    for key, value in options.items():
        yield f"    {key}: {json.dumps(value) if not isinstance(value, str) else value}    # {_OPTION_COMMENTS[key]}"
    if network.targets:
        yield "  structure:"
        yield (
            "    method: uniform    # one ratio for all layers; widths of each layer are searched for by: multi_base, greedy, progressive "
            "(docs/your-network.md)"
        )
        yield f"    targets: {json.dumps(network.targets)}    # MAdds of the sub-networks as shares of the network's own"
        if network.init_from is not None:
            yield "    order: weight_l1    # narrow sub-networks keep the channels with the largest weights; none: the first ones"
    yield "  train:"
    yield "    channels_last: true    # memory order in which convolutions are faster; results differ only by rounding"
    yield "    # Derived from the images; remove the # to set another value:"
    defaults = data_defaults(seen.facts, network.model)
    train = {key.rpartition(".")[2]: each for key, each in defaults.items() if key.startswith("supernet.train.")}
    for key, default in train.items():
        yield f"    # {key}: {_written(default)}    # {default.reason}"
    yield "  # recalibration:"
    images = defaults["supernet.recalibration.images"]
    yield f"  #   images: {_written(images)}    # {images.reason}"


def _written(default: DataDefault) -> str:
    return json.dumps(default.value)
