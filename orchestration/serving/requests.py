"""Reading requests: from bodies to pixels, and from queries to an operating point."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from dsnet.deploy.bundle import Bundle
from dsnet.errors import ConfigError, DataError
from dsnet.wording import way_out

QUERY = ("point", "budget_madds", "budget_latency")
PIXELS = "pixels"
PHOTOS = "images"


@dataclass(frozen=True)
class RequestImages:
    """The images of a request."""

    pixels: UInt8[Tensor, "images channels height width"]
    """uint8 [N, C, H, W] of the bundle's image shape; N >= 1."""
    is_list: bool
    """Whether a list was sent, so that a list is answered."""


def read_images(body: bytes, content_type: str, bundle: Bundle) -> RequestImages:
    """The images of a request's body.

    Args:
        body: with the type application/json an object with `pixels` or `images`; with any other
            type the bytes of one image file.
        content_type: the header of this name.
        bundle: says the shape of its images, and how image files are decoded.

    Raises:
        DataError: the body holds no images that the bundle can take; the message says why.
        DsnetError: the bundle cannot decode image files.
    """
    if not body:
        raise DataError("the body is empty; send the bytes of an image file, or JSON with pixels")
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "application/json":
        return _read_json(body, bundle)
    if kind == "multipart/form-data":
        raise DataError(
            "the body is a form (multipart/form-data, as curl -F sends it); send the bytes of the image file alone, "
            "with curl --data-binary @FILE"
        )
    try:
        return RequestImages(bundle.photo_decoder.decode(body, "the body")[None], is_list=False)
    except DataError as error:
        if kind == "application/x-www-form-urlencoded" and _lacks_bytes(body):
            raise DataError(f"{error}; curl -d removes bytes of the file: use --data-binary") from error
        raise


def _lacks_bytes(body: bytes) -> bool:
    """Whether a body that is no text lacks all bytes that `curl -d` removes from a file."""
    return not body.isascii() and not any(byte in body for byte in b"\r\n\0")


def _read_json(body: bytes, bundle: Bundle) -> RequestImages:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise DataError(f"the body is not JSON: {error}") from error
    if not isinstance(content, dict) or len(content) != 1 or not content.keys() <= {PIXELS, PHOTOS}:
        raise DataError(
            f'the body must be a JSON object with one of two keys: "{PIXELS}" (arrays) or "{PHOTOS}" (a list of image files in base64)'
        )
    if PHOTOS in content:
        return _read_photos(content[PHOTOS], bundle)
    return _read_pixels(content[PIXELS], bundle.image_shape)


def _read_photos(photos: Any, bundle: Bundle) -> RequestImages:
    if not isinstance(photos, list) or not photos:
        raise DataError(f'"{PHOTOS}" must be a list of image files in base64, with at least one')
    decode = bundle.photo_decoder.decode
    decoded = [
        decode(_of_base64(each, f"{PHOTOS}[{number}]"), f"{PHOTOS}[{number}]") for number, each in enumerate(photos)
    ]
    return RequestImages(torch.stack(decoded), is_list=True)


def _read_pixels(pixels: Any, shape: tuple[int, int, int]) -> RequestImages:
    """One image or a list of images; an image is a nested list, or base64 of its bytes in the order
    [C, H, W]."""
    is_list = isinstance(pixels, list) and len(pixels) > 0 and (isinstance(pixels[0], str) or _depth(pixels) == 4)
    images = pixels if is_list else [pixels]
    arrays = [
        _pixels_of(each, shape, f"{PIXELS}[{number}]" if is_list else PIXELS) for number, each in enumerate(images)
    ]
    return RequestImages(torch.stack(arrays), is_list=is_list)


def _depth(value: Any) -> int:
    depth = 0
    while isinstance(value, list):
        depth, value = depth + 1, value[0] if value else None
    return depth


def _pixels_of(image: Any, shape: tuple[int, int, int], where: str) -> Tensor:
    if isinstance(image, str):
        content = _of_base64(image, where)
        if len(content) != np.prod(shape):
            raise DataError(f"{where} has {len(content)} bytes, but an image {list(shape)} has {np.prod(shape)}")
        return torch.frombuffer(bytearray(content), dtype=torch.uint8).reshape(shape)
    try:
        array = np.array(image)
    except (ValueError, OverflowError) as error:
        raise DataError(f"{where} is no array [C, H, W]: its lists differ in length") from error
    if array.shape != shape or array.dtype.kind not in "iu":
        raise DataError(
            f"{where} is an array {list(array.shape)} of {array.dtype}, but must be one of integers {list(shape)}"
        )
    if array.min() < 0 or array.max() > 255:
        raise DataError(f"{where} has values from {array.min()} to {array.max()}, but pixels are from 0 to 255")
    return torch.from_numpy(array.astype(np.uint8))


def _of_base64(text: Any, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise DataError(f"{where} is not base64: {error}") from error


def point_of(query: Mapping[str, str], bundle: Bundle) -> str:
    """Name of the operating point that a request asks for; without a query, the bundle's present
    one.

    Args:
        query: `budget_madds` in million MAdds, `budget_latency` in ms of batch 1, or `point`, a
            name; at most one.
        bundle: the bundle.

    Raises:
        ConfigError: a parameter is unknown, is no number, or is out of range, or there are two.
        NotFoundError: no point has this name or fulfils this budget.
    """
    for name in query:
        if name not in QUERY:
            raise ConfigError(f"unknown parameter {name!r} in the query{way_out(name, list(QUERY))}")
    if not query:
        return bundle.operating_point.name
    if len(query) > 1:
        raise ConfigError(f"the query has {' and '.join(query)}; give one of them")
    if "point" in query:
        return bundle.operating_points.named(query["point"]).name
    return bundle.operating_points.choose(
        madds_m=_number(query, "budget_madds"), latency_ms=_number(query, "budget_latency")
    ).name


def _number(query: Mapping[str, str], name: str) -> float | None:
    if name not in query:
        return None
    try:
        return float(query[name])
    except ValueError as error:
        raise ConfigError(f"{name} is {query[name]!r}, but must be a number") from error
