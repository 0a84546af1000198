"""A bundle with a gate and static operating points that reads photos, and its images."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image
from torch import Tensor

from dsnet.data.photos import PhotoDecoder
from tests.dsnet.deploy.test_bundle import gate, save
from tests.dsnet.deploy.test_operating_points import claims, members_of
from tests.dsnet.samples import lively_supernet

IMAGE_SHAPE = (3, 16, 16)


def save_served(folder: Path) -> Path:
    """A bundle with the operating points `gate` (its own) and all sub-networks."""
    supernet = lively_supernet()
    save(
        folder,
        supernet,
        gate(supernet),
        claims=claims(0.9, 0.01),
        photos=PhotoDecoder.of_data("image_folder", IMAGE_SHAPE),
        point_name="gate",
        further_points=members_of(supernet),
    )
    return folder


def png(pixels: Tensor) -> bytes:
    """The bytes of a PNG file with these pixels, uint8 [3, H, W]."""
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, format="PNG")
    return file.getvalue()
