"""Import of a released checkpoint: its weights in our format, and a sweep file that skips Stage
I."""

from __future__ import annotations

import errno
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from dsnet.data.normalization import Normalization
from dsnet.data.settings import IMAGENET_VALUES
from dsnet.errors import CheckpointError, ConfigError
from dsnet.files import atomic_write_text, file_sha256, read_json, writing
from dsnet.image_size import ImageSize, size_in_words
from dsnet.network.supernet import Supernet
from dsnet.space.cost import subnet_cost
from dsnet.stored.checkpoint import save_supernet
from dsnet.stored.compat import load_dsnet_checkpoint
from dsnet.stored.names import FINAL
from dsnet.training.start import find_checkpoint
from orchestration.config.loading import load_source_text
from orchestration.config.yaml_source import parse_yaml

IMAGENET = Normalization.from_written(IMAGENET_VALUES)
"""The normalisation with which the released weights were trained: ImageNet's mean and deviation."""
SWEEP_FILE = "sweep.yaml"

_TEMPLATE = """\
# A sweep over imported weights: only gates are trained. Made by `dsnet-orch import-checkpoint`.
#
# data.path: a folder with a folder per class, in the order of the checkpoint's classes, of images that the weights were NOT trained on
# (for ImageNet: its validation images; on training images nearly everything is "easy"). `train` is not used, so it may be small.
# data.crop_fraction: published accuracies are usually measured like this (for 224 pixels: shorter side resized to 256, centre of 224 cut
# out); not verified for these weights. 1 keeps the whole shorter side.
version: 1
name: {name}
data:
  name: image_folder
  path: {data}
  image_size: {image_size}
  crop_fraction: 0.875
  splits: {{train: 0.02, gate: 0.3, val: 0.3, test: 0.38}}

supernet:
  model: checkpoint             # layout and sub-networks of init_from
  init_from: {stem}
  train: {{epochs: 0}}            # 0: keep the weights
  recalibration: {{images: 0}}    # 0: keep the BatchNorm statistics too
"""


@dataclass(frozen=True)
class Imported:
    """The files that an import wrote, and the imported network."""

    sweep: Path
    """The sweep file to launch."""
    stem: Path
    """The checkpoint in our format, as `supernet.init_from` takes it."""
    supernet: Supernet

    def summary(self) -> str:
        """One line about the checkpoint."""
        spec, subnets = self.supernet.spec, self.supernet.subnets
        madds = [subnet_cost(spec, subnet, spec.image_size).madds / 1e6 for subnet in subnets]
        return (
            f"{spec.family}: {len(subnets)} sub-networks of {min(madds):.1f} to {max(madds):.1f} M MAdds at "
            f"{size_in_words(spec.image_size)}, {spec.num_classes} classes"
        )


@dataclass(frozen=True, kw_only=True)
class ImportSettings:
    """Settings of an import."""

    name: str
    """Name of the sweep."""
    num_classes: int | None = None
    """Number of the checkpoint's classes; None reads it from the checkpoint."""
    image_size: ImageSize = 224
    """Size of the images, as data.image_size of sweep.yaml."""
    ema: bool = False
    """Whether to take the checkpoint's averaged weights."""
    data: str | None = None
    """Folder of the images; None leaves it to $DSNET_DATA or --data."""


def import_checkpoint(source: Path, out: Path, settings: ImportSettings) -> Imported:
    """Read a released DS-Net checkpoint and write it, with a sweep file, into the folder `out`.

    Raises:
        CheckpointError: the file is not a checkpoint of a released model, its tensors do not fit,
            or they contain NaN.
        ConfigError: `out` holds an import already, sweep.yaml does not allow a setting, or `source`
            is a checkpoint in our format.
        PreflightError: `out` cannot be used.
    """
    sweep = out / SWEEP_FILE
    text = _sweep_text(out / FINAL, settings)
    _check_settings(text, settings)
    _check_out(out)
    _refuse_own_format(source)
    supernet, _ = load_dsnet_checkpoint(source, settings.num_classes, ema=settings.ema, image_size=settings.image_size)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    origin = {"file": source.name, "sha256": file_sha256(source), "weights": "ema" if settings.ema else "student"}
    meta = {"run": {"normalization": IMAGENET.to_json(), "origin": origin}, "torch": torch.__version__}
    save_supernet(out / FINAL, supernet, meta)
    atomic_write_text(sweep, text)
    return Imported(sweep, out / FINAL, supernet)


def _sweep_text(stem: Path, settings: ImportSettings) -> str:
    return _TEMPLATE.format(
        name=_yaml_value(settings.name),
        data=_yaml_value(settings.data),
        image_size=json.dumps(settings.image_size),
        stem=_yaml_value(str(stem.absolute())),
    )


def _yaml_value(value: str | None) -> str:
    """The value as JSON, which is also YAML."""
    return json.dumps(value, ensure_ascii=False)


def _check_settings(text: str, settings: ImportSettings) -> None:
    """Check the sweep file as a launch would."""
    given = {"name": settings.name, "data.path": settings.data, "data.image_size": settings.image_size}
    load_source_text(parse_yaml(text, SWEEP_FILE), flags=given)


def _check_out(out: Path) -> None:
    with writing(out):
        if (out / SWEEP_FILE).exists():
            raise ConfigError(f"{out / SWEEP_FILE}: already exists; choose another --out, or remove it")
        if out.exists() and not out.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it is a file")


def _refuse_own_format(source: Path) -> None:
    try:
        stem = find_checkpoint(source)
        content = read_json(stem.with_name(f"{stem.name}.json"))
    except CheckpointError:
        return  # not our format: the reader of released checkpoints reports what is wrong
    if isinstance(content, dict) and "spec" in content:
        raise ConfigError(
            f"{source}: is a checkpoint of dsnet-orch and needs no import; use it as supernet.init_from of a sweep file"
        )
