"""Which data a bundle's claims are checked on. (What `verify` says of whole bundles is in test_export.)"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dsnet.data import SplitSizes, make_splits
from dsnet.errors import DataError
from dsnet.training.sources import load_source
from orchestration.bundle_check import _claimed_data


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DSNET_CACHE", str(tmp_path / "cache"))
    random = np.random.default_rng(0)
    for label in range(2):
        (tmp_path / "images" / f"class{label}").mkdir(parents=True)
        for number in range(8):
            pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / f"class{label}" / f"{number}.png")
    return tmp_path / "images"


@pytest.mark.parametrize("stream", [False, True])
def test_the_images_are_cut_as_they_were_when_the_claims_were_measured(folder: Path, stream: bool) -> None:
    source = load_source("image_folder", folder, 8, stream=stream, crop_fraction=0.5)
    splits = make_splits(source.labels.numpy(), source.official_test, SplitSizes(), 3, None)
    facts = {
        "name": "image_folder",
        "image_size": 8,
        "sizes": asdict(SplitSizes()),
        "seed": 3,
        "limit": None,
        "stream": stream,
        "crop_fraction": 0.5,
        "fingerprint": source.fingerprint,
        "splits": splits.hash,
    }
    claimed = _claimed_data(facts, str(folder))
    expected = source.tensor_data(splits, open_test=True)
    for split in ("val", "test"):
        assert torch.equal(claimed.images(split), expected.images(split))
    with pytest.raises(DataError, match="fingerprint differs"):
        _claimed_data({**facts, "crop_fraction": 1.0}, str(folder))
