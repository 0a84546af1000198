"""The static picture of a front: a PNG that shows each kind of point in its colour."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from dashboards.front import Curve, FrontInfo, FrontPanel
from dashboards.front_picture import front_picture
from dashboards.theme import BLUE, INK, SKY
from tests.dashboards.samples import make_front


def pixels_of(content: bytes, colour: str) -> int:
    """How many pixels have exactly this colour."""
    image = np.array(Image.open(io.BytesIO(content)).convert("RGB"))
    return int((image == np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)])).all(axis=2).sum())


def test_the_picture_shows_static_points_and_the_front_and_fits_mlflows_page() -> None:
    content = front_picture(make_front())
    image = Image.open(io.BytesIO(content))
    assert image.format == "PNG"
    assert image.width <= 640
    assert pixels_of(content, BLUE) > 50
    assert pixels_of(content, INK) > 50


@pytest.mark.slow
@pytest.mark.parametrize("colour", [BLUE, SKY])
def test_what_there_is_none_of_is_not_drawn(colour: str) -> None:
    info = make_front()
    bare = FrontInfo(chosen=replace(info.chosen, dynamic=()))
    assert pixels_of(front_picture(bare), colour) == 0


def test_a_run_without_any_point_still_gives_a_picture() -> None:
    empty = FrontPanel(split="val", num_images=0, static=(), static_line=Curve(), dynamic=())
    assert pixels_of(front_picture(FrontInfo(chosen=empty)), "#ffffff") > 1000
