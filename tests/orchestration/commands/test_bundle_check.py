"""The claims of a bundle that are checked, and the data used. (The command on whole bundles is
tested in test_export.)"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dsnet.data.settings import SplitSizes
from dsnet.data.sources import ImageSource, load_source
from dsnet.data.splits import Splits, make_splits
from dsnet.deploy.bundle import BundleContents, save_bundle
from dsnet.errors import DataError, VerificationError
from dsnet.families import Task, create
from dsnet.gates.fit import score_run
from dsnet.measure.evaluate import build_routing_table
from dsnet.network.batchnorm import recalibrate
from dsnet.routing.table_routing import run_on_table
from orchestration.commands.bundle_check import _claimed_data, _folder_of_the_run, check_bundle
from orchestration.pipeline.export import example_rows
from orchestration.runs.manifest import Manifest
from tests.dsnet.samples import ROUTER_KINDS, random_router
from tests.orchestration.samples import TINY, write_sweep


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


FACTS = {"name": "digits", "image_size": 8, "sizes": asdict(SplitSizes()), "seed": 3, "limit": 400}


@pytest.fixture(scope="module")
def source() -> ImageSource:
    return load_source("digits", None, 8)


@pytest.fixture(scope="module")
def splits(source: ImageSource) -> Splits:
    return make_splits(source.labels.numpy(), source.official_test, SplitSizes(), 3, 400)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ROUTER_KINDS)
def test_claims_of_every_router_are_found_again_on_the_data_and_better_ones_are_not(
    tmp_path: Path, source: ImageSource, splits: Splits, kind: str
) -> None:
    data, normalization = source.tensor_data(splits, open_test=True), source.normalization(splits)
    channels, size, _ = source.image_shape
    supernet = create("ds_tiny", Task(source.num_classes, channels, size), {"num_routes": 3}, seed=0)
    recalibrate(supernet, [normalization.apply(data.images("train"))])
    supernet.eval()
    table = build_routing_table(supernet, data, "val", normalization)
    router = random_router(kind, table)
    scores = score_run(run_on_table(router, table), table)
    honest = {
        "data": {**FACTS, "fingerprint": source.fingerprint, "splits": splits.hash},
        "val": {"top1": scores["top1"], "madds_m": scores["madds_m"]},
    }

    contents = BundleContents(
        supernet=supernet,
        router=router,
        normalization=normalization,
        class_names=source.class_names,
        examples=data.images("val")[torch.from_numpy(example_rows([router], table))],
    )

    def saved(claims: Mapping[str, Any]) -> Path:
        save_bundle(tmp_path / "bundle", contents, claims=claims, gate_yaml="")
        return tmp_path / "bundle"

    assert [check.name for check in check_bundle(saved(honest), "")] == ["files", "examples", "val"]
    tail_m = (table.madds.max() - table.trunk_madds) / 1e6
    for name, least in (("top1", 3 / table.num_images), ("madds_m", -3 * tail_m / table.num_images)):
        boasting = {**honest, "val": {**scores, name: scores[name] + least}}
        with pytest.raises(VerificationError, match=r"on val .* it reaches .* but claims"):
            check_bundle(saved(boasting), "")


def test_a_bundle_that_lies_in_its_run_finds_the_folder_of_the_images(tmp_path: Path) -> None:
    write_sweep(
        tmp_path, TINY.replace("name: digits", "name: image_folder, path: /photos, image_size: 32"), "sweep.yaml"
    )
    bundle = tmp_path / "export" / "trial-0001"
    bundle.mkdir(parents=True)
    assert _folder_of_the_run(bundle) == "", "a sweep file alone is no run"
    Manifest(tmp_path / "manifest.json").create(seed=0, hardware={})
    (tmp_path / "export" / "knee").symlink_to("trial-0001")
    assert _folder_of_the_run(tmp_path / "export" / "knee") == "/photos"
