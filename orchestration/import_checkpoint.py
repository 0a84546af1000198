"""A released checkpoint becomes a sweep that begins where Stage I would end: weights in our format, and the sweep file to launch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from dsnet.checkpoint import save_supernet
from dsnet.compat import load_dsnet_checkpoint
from dsnet.cost import subnet_cost
from dsnet.data.normalization import Normalization
from dsnet.errors import ConfigError
from dsnet.files import atomic_write_text, file_sha256
from dsnet.supernet import Supernet
from dsnet.training.supernet import FINAL

IMAGENET = Normalization((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
"""What the released weights were trained with: ImageNet's mean and deviation, in units of pixel values."""
SWEEP_FILE = "sweep.yaml"

_TEMPLATE = """\
# A sweep over imported weights: nothing is trained but gates. Made by `dsnet-orch import-checkpoint`.
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
    """What an import made."""

    sweep: Path
    """The sweep file to launch."""
    stem: Path
    """The checkpoint in our format, as `supernet.init_from` takes it."""
    supernet: Supernet

    def summary(self) -> str:
        """The checkpoint in one line."""
        spec, subnets = self.supernet.spec, self.supernet.subnets
        madds = [subnet_cost(spec, subnet, spec.image_size).madds / 1e6 for subnet in subnets]
        return (
            f"{spec.family}: {len(subnets)} sub-networks of {min(madds):.1f} to {max(madds):.1f} M MAdds at "
            f"{spec.image_size} pixels, {spec.num_classes} classes"
        )


@dataclass(frozen=True, kw_only=True)
class ImportSettings:
    """What an import is told."""

    name: str
    """Of the sweep."""
    num_classes: int = 1000
    image_size: int = 224
    """Side in pixels."""
    ema: bool = False
    """Take the checkpoint's averaged weights."""
    data: str | None = None
    """Folder of the images; None leaves it to $DSNET_DATA or --data."""


def import_checkpoint(source: Path, out: Path, settings: ImportSettings) -> Imported:
    """Read a released DS-Net checkpoint and write it, with a sweep file, into the folder `out`.

    Raises:
        CheckpointError: the file is none of a released model, or its tensors do not fit.
        ConfigError: `out` holds an import already.
    """
    sweep = out / SWEEP_FILE
    if sweep.exists():
        raise ConfigError(f"{sweep}: is there already; choose another --out, or remove it")
    supernet, _ = load_dsnet_checkpoint(source, settings.num_classes, ema=settings.ema, image_size=settings.image_size)
    out.mkdir(parents=True, exist_ok=True)
    origin = {"file": source.name, "sha256": file_sha256(source), "weights": "ema" if settings.ema else "student"}
    meta = {"run": {"normalization": IMAGENET.to_json(), "origin": origin}, "torch": torch.__version__}
    save_supernet(out / FINAL, supernet, meta)
    text = _TEMPLATE.format(  # a JSON value is a YAML value
        name=json.dumps(settings.name),
        data=json.dumps(settings.data),
        image_size=settings.image_size,
        stem=json.dumps(str((out / FINAL).absolute())),
    )
    atomic_write_text(sweep, text)
    return Imported(sweep, out / FINAL, supernet)
