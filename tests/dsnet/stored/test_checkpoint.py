"""Stored supernets: whole or not at all, and nothing is skipped while loading."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch

from dsnet.errors import CheckpointError
from dsnet.stored.checkpoint import load_exactly, load_supernet, load_tensors, save_supernet, save_tensors
from tests.dsnet.cases import FAMILIES
from tests.dsnet.samples import random_images, small_supernet


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stored_supernet_loads_bit_equal_in_eval_mode(tmp_path: Path, family: str) -> None:
    supernet = small_supernet(family)
    save_supernet(tmp_path / "net", supernet, {"note": 7})
    again, meta = load_supernet(tmp_path / "net")
    assert meta["note"] == 7
    assert not again.training
    assert again.subnets == supernet.subnets
    for subnet in supernet.subnets.all:
        assert torch.equal(again(random_images(2), subnet), supernet(random_images(2), subnet))


def test_nothing_temporary_is_left(tmp_path: Path) -> None:
    save_supernet(tmp_path / "net.v1", small_supernet())
    assert {path.name for path in tmp_path.iterdir()} == {"net.v1.json", "net.v1.safetensors"}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_tensors_can_be_read_by_whom_the_umask_allows(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        save_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(2)})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == mode


def test_missing_extra_and_misshapen_tensors_are_listed_together() -> None:
    supernet = small_supernet()
    tensors = dict(supernet.state_dict())
    del tensors["classifier.bias"]
    tensors["extra"] = torch.zeros(1)
    tensors["stem.weight"] = torch.zeros(1, 3, 3, 3)
    with pytest.raises(CheckpointError) as error:
        load_exactly(supernet, tensors, "here")
    message = str(error.value)
    assert message.startswith("here: the tensors do not fit ds_tiny")
    for part in ("missing classifier.bias (10,)", "unexpected extra", "stem.weight has shape (1, 3, 3, 3), expected"):
        assert part in message


@pytest.mark.parametrize("version", [0, 2, None])
def test_another_schema_version_is_refused(tmp_path: Path, version: int | None) -> None:
    save_supernet(tmp_path / "net", small_supernet())
    meta = json.loads((tmp_path / "net.json").read_text())
    (tmp_path / "net.json").write_text(json.dumps({**meta, "schema_version": version}))
    with pytest.raises(CheckpointError, match=r"net\.json: schema version"):
        load_supernet(tmp_path / "net")


def test_a_checkpoint_without_a_supernet_is_refused(tmp_path: Path) -> None:
    save_supernet(tmp_path / "net", small_supernet())
    meta = json.loads((tmp_path / "net.json").read_text())
    del meta["spec"]
    (tmp_path / "net.json").write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match="holds no supernet"):
        load_supernet(tmp_path / "net")


def test_tensors_without_a_recorded_hash_still_need_to_be_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(CheckpointError, match="no such file"):
        load_tensors(path)
    digest = save_tensors(path, {"x": torch.arange(4)})
    assert torch.equal(load_tensors(path, digest)["x"], torch.arange(4))
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(CheckpointError, match=r"x\.safetensors: cannot be read as safetensors"):
        load_tensors(path)
    with pytest.raises(CheckpointError, match="SHA-256"):
        load_tensors(path, digest)
