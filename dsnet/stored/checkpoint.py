"""Checkpoints: tensors in safetensors and everything else in JSON, without pickle.

A checkpoint `<stem>` is `<stem>.safetensors` and `<stem>.json`. The JSON file holds the SHA-256 of
the tensor file and is renamed into place last: a checkpoint whose JSON exists is complete.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Shaped
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsnet.errors import CheckpointError
from dsnet.families import rebuild
from dsnet.files import atomic_write_json, file_sha256, read_json, reading, replacing
from dsnet.network.supernet import Supernet, state_for_saving
from dsnet.space.spec import SupernetSpec
from dsnet.space.subnet_set import SubnetSet

SCHEMA_VERSION = 1


def save_tensors(path: Path, tensors: Mapping[str, Shaped[Tensor, "*_"]]) -> str:
    """Write a safetensors file atomically; returns its SHA-256.

    Raises:
        StorageError: the file cannot be written; an older file stays unchanged.
    """
    with replacing(path) as temporary:
        save_file(dict(tensors), temporary)
        return file_sha256(temporary)


def load_tensors(path: Path, sha256: str | None = None) -> dict[str, Shaped[Tensor, "*_"]]:
    """Read a safetensors file and check its hash if one is given.

    Raises:
        CheckpointError: the file is missing, truncated or does not match the hash.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if sha256 is not None and (met := file_sha256(path)) != sha256:
        raise CheckpointError(
            f"{path}: its SHA-256 is {met[:12]}..., but {sha256[:12]}... was recorded; the file is damaged or was replaced"
        )
    try:
        with reading(path):
            return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as safetensors ({error}); the file is damaged or truncated"
        ) from error


def save_checkpoint(stem: Path, tensors: Mapping[str, Shaped[Tensor, "*_"]], meta: Mapping[str, Any]) -> None:
    """Write a checkpoint; the JSON file is written last and makes it valid."""
    digest = save_tensors(stem.with_name(stem.name + ".safetensors"), tensors)
    atomic_write_json(stem.with_name(stem.name + ".json"), {"schema_version": SCHEMA_VERSION, "sha256": digest, **meta})


def load_checkpoint(stem: Path) -> tuple[dict[str, Shaped[Tensor, "*_"]], dict[str, Any]]:
    """Read a checkpoint: (tensors, meta).

    Raises:
        CheckpointError: a part is missing, damaged, or of another schema version.
    """
    meta = read_json(stem.with_name(stem.name + ".json"))
    if not isinstance(meta, dict):
        raise CheckpointError(
            f"{stem}.json: is not a JSON object, so it does not describe a checkpoint; restore the file"
        )
    if meta.get("schema_version") != SCHEMA_VERSION:
        raise CheckpointError(
            f"{stem}.json: schema version {meta.get('schema_version')!r}, but this release reads {SCHEMA_VERSION}; "
            "read it with the release that wrote it"
        )
    return load_tensors(stem.with_name(stem.name + ".safetensors"), meta.get("sha256")), meta


def supernet_meta(supernet: Supernet) -> dict[str, Any]:
    """The metadata that `load_supernet` needs beside the tensors: spec and sub-networks."""
    return {"spec": supernet.spec.to_json(), "subnets": supernet.subnets.to_json()}


def save_supernet(stem: Path, supernet: Supernet, meta: Mapping[str, Any] | None = None) -> None:
    """Store a supernet with its spec and its set of sub-networks."""
    save_checkpoint(stem, state_for_saving(supernet), {**supernet_meta(supernet), **(meta or {})})


def load_supernet(stem: Path) -> tuple[Supernet, dict[str, Any]]:
    """Read a stored supernet: (supernet in eval mode, meta).

    Raises:
        CheckpointError: the checkpoint is damaged, or its tensors do not fit its spec.
    """
    tensors, meta = load_checkpoint(stem)
    if "spec" not in meta or "subnets" not in meta:
        raise CheckpointError(f"{stem}.json: holds no supernet (no 'spec' and 'subnets')")
    return supernet_from(tensors, meta, str(stem)), meta


def supernet_from(tensors: Mapping[str, Shaped[Tensor, "*_"]], meta: Mapping[str, Any], where: str) -> Supernet:
    """Build a supernet, in eval mode, from its state dict and the result of `supernet_meta`.

    Raises:
        CheckpointError: the tensors do not fit the specification; the message begins with `where`.
    """
    subnets = SubnetSet.from_json(SupernetSpec.from_json(meta["spec"]), meta["subnets"])
    supernet = rebuild(subnets)
    load_exactly(supernet, tensors, where)
    return supernet.eval()


def load_exactly(supernet: Supernet, tensors: Mapping[str, Shaped[Tensor, "*_"]], where: str) -> None:
    """Load a state dict that must fit exactly.

    Raises:
        CheckpointError: tensors are missing, unexpected or of another shape; the message lists all
            of them.
    """
    expected = {name: tuple(value.shape) for name, value in supernet.state_dict().items()}
    problems = [f"missing {name} {shape}" for name, shape in expected.items() if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in expected]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if problems:
        raise CheckpointError(f"{where}: the tensors do not fit {supernet.spec.family}: " + "; ".join(problems))
    supernet.load_state_dict(dict(tensors))


def tensors_below(tensors: Mapping[str, Shaped[Tensor, "*_"]], prefix: str) -> dict[str, Shaped[Tensor, "*_"]]:
    """The tensors whose names begin with `prefix`, with the prefix removed from their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
