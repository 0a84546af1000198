"""What a request may hold, and what is said of one that does not fit."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
import torch

from dsnet.deploy.bundle import Bundle, load_bundle
from dsnet.errors import ConfigError, DataError, DsnetError, NotFoundError
from orchestration.serving.requests import point_of, read_images
from orchestration.serving.served_bundle import opened
from orchestration.serving.settings import ServeSettings
from tests.dsnet.samples import random_pixels
from tests.orchestration.serving.samples import png, save_served

JSON = "application/json; charset=utf-8"
PIXELS = random_pixels(3, seed=4)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return load_bundle(save_served(tmp_path_factory.mktemp("served") / "bundle"))


def in_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


ALL = PIXELS.tolist()
RAW = [in_base64(image.numpy().tobytes()) for image in PIXELS]
FILES = [in_base64(png(image)) for image in PIXELS]


@pytest.mark.parametrize("content", [{"pixels": ALL}, {"pixels": RAW}, {"images": FILES}])
def test_every_kind_of_list_holds_the_same_pixels(bundle: Bundle, content: dict[str, Any]) -> None:
    sent = read_images(json.dumps(content).encode(), JSON, bundle)
    assert sent.is_list
    assert torch.equal(sent.pixels, PIXELS)
    assert sent.pixels.dtype == torch.uint8


def test_a_form_is_told_apart_from_a_file(bundle: Bundle) -> None:
    with pytest.raises(DataError, match=r"is a form .* curl -F .* --data-binary @FILE"):
        read_images(b"--x\r\n\r\n" + png(PIXELS[0]), "multipart/form-data; boundary=x", bundle)


def test_a_file_from_which_curl_removed_bytes_is_told(bundle: Bundle) -> None:
    cut = png(PIXELS[0]).translate(None, b"\r\n\0")
    with pytest.raises(DataError, match=r"does not decode: .*; curl -d removes bytes of the file: use --data-binary"):
        read_images(cut, "application/x-www-form-urlencoded", bundle)
    with pytest.raises(DataError) as raised:
        read_images(cut, "image/png", bundle)
    assert "curl" not in str(raised.value)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (png(PIXELS[0]), "image/png"),
        (png(PIXELS[0]), "application/x-www-form-urlencoded"),
        (json.dumps({"pixels": ALL[0]}).encode(), JSON),
        (json.dumps({"pixels": RAW[0]}).encode(), JSON),
    ],
)
def test_every_kind_of_image_holds_the_same_pixels(bundle: Bundle, body: bytes, kind: str) -> None:
    sent = read_images(body, kind, bundle)
    assert not sent.is_list
    assert torch.equal(sent.pixels, PIXELS[:1])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([], "must be a JSON object"),
        ({"pixels": ALL, "images": FILES}, "one of two keys"),
        ({"picture": 1}, "one of two keys"),
        ({"pixels": None}, "pixels is an array \\[\\] of object"),
        ({"pixels": []}, "pixels is an array \\[0\\]"),
        ({"pixels": [[]]}, "pixels is an array \\[1, 0\\]"),
        ({"pixels": [[[1.5]]]}, "\\[1, 1, 1\\] of float64"),
        ({"pixels": [*ALL, ALL[0][:2]]}, r"pixels\[3\] is an array \[2, 16, 16\]"),
        ({"pixels": [[[0] * 16] * 16, [[0] * 15] * 16, [[0] * 16] * 16]}, "differ in length"),
        ({"pixels": [[[True] * 16] * 16] * 3}, "of bool"),
        ({"pixels": [[[256] * 16] * 16] * 3}, "from 256 to 256"),
        ({"pixels": [[[-1] * 16] * 16] * 3}, "from -1 to -1"),
        ({"pixels": [[[10**30] * 16] * 16] * 3}, "of object"),
        ({"pixels": "%"}, "not base64"),
        ({"pixels": [RAW[0], RAW[1][:8]]}, r"pixels\[1\] has 6 bytes.*has 768"),
        ({"pixels": [RAW[0], 5]}, r"pixels\[1\] is an array"),
        ({"images": FILES[0]}, "must be a list"),
        ({"images": []}, "at least one"),
        ({"images": [FILES[0], 3]}, r"images\[1\] is not base64"),
        ({"images": [FILES[0], FILES[1][:40]]}, r"images\[1\].*does not decode"),
    ],
)
def test_json_that_holds_no_images_is_told_what_is_wrong(bundle: Bundle, content: Any, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        read_images(json.dumps(content).encode(), JSON, bundle)


@pytest.mark.parametrize(
    ("body", "kind", "reason"),
    [
        (b"", "image/png", "is empty"),
        (b"{", JSON, "not JSON"),
        (b"\xff", JSON, "not JSON"),
        (b"[" * 100_000, JSON, "not JSON"),
        (png(PIXELS[0])[:60], "", "does not decode"),
        (b"no picture", "image/png", "no image in a format that Pillow reads"),
    ],
)
def test_a_body_that_cannot_be_read_is_told_what_is_wrong(bundle: Bundle, body: bytes, kind: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        read_images(body, kind, bundle)


def test_a_query_chooses_the_point_that_the_bundle_chooses(bundle: Bundle) -> None:
    assert point_of({}, bundle) == "gate"
    for own in bundle.operating_points:
        assert point_of({"point": own.name}, bundle) == own.name
        assert own.madds_m is not None
        chosen = bundle.operating_points.choose(madds_m=own.madds_m).name
        assert point_of({"budget_madds": str(own.madds_m)}, bundle) == chosen
    assert point_of({"budget_latency": "1.5"}, bundle) == bundle.operating_points.choose(latency_ms=1.5).name


@pytest.mark.parametrize(
    ("query", "error", "reason"),
    [
        ({"budget": "1"}, ConfigError, "unknown parameter 'budget' in the query; did you mean 'budget_madds'"),
        ({"budget_madds": "1", "point": "gate"}, ConfigError, "budget_madds and point"),
        ({"budget_madds": "few"}, ConfigError, "'few', but must be a number"),
        ({"budget_madds": "nan"}, ConfigError, "must be above 0"),
        ({"budget_latency": "-1"}, ConfigError, "must be above 0"),
        ({"budget_madds": "1e-9"}, NotFoundError, "no operating point costs at most"),
        ({"point": "gato"}, NotFoundError, "gate"),
    ],
)
def test_a_query_that_no_point_fulfils_is_told_so(
    bundle: Bundle, query: dict[str, str], error: type[DsnetError], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        point_of(query, bundle)


def test_a_bundle_is_served_in_the_precision_that_was_asked_for(bundle: Bundle) -> None:
    assert opened(bundle.path, ServeSettings()).precision == "float32"
    with pytest.raises(ConfigError, match=r"precision int8: .* has no folder onnx_int8"):
        opened(bundle.path, ServeSettings(precision="int8"))
