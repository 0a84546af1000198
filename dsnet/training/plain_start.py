"""Start weights from a plain network: a state dict with the names of the module itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dsnet.errors import CheckpointError, ConfigError
from dsnet.files import file_sha256
from dsnet.finite import check_finite
from dsnet.network.plain import make_plain, own_options
from dsnet.network.supernet import Supernet
from dsnet.network.traced import BODY, TracedSupernet
from dsnet.wording import first_line, plural

SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PARALLEL = "module."
_COUNTER = "num_batches_tracked"
_NUM_LISTED = 3
"""Maximum number of tensors of each kind that a message about an unsuitable file names."""


@dataclass(frozen=True, eq=False)
class PlainStart:
    """Weights of a plain network from which the supernet of that network starts."""

    stem: Path
    """The file."""
    tensors: Mapping[str, Shaped[Tensor, "*_"]]
    """Its state dict, on the CPU, without counters of BatchNorm."""
    sha256: str
    """SHA-256 of the file."""

    normalization = None
    """A state dict does not record how the images were normalised."""

    def origin(self) -> dict[str, Any]:
        """The record for `SupernetRun.origin`, which identifies the file without its folder."""
        return {"file": self.stem.name, "sha256": self.sha256}

    def check_channels(self, in_channels: int) -> None:
        """Do nothing: the shapes of the tensors are compared when they are copied."""

    def apply(self, supernet: Supernet) -> list[str]:
        """Copy the weights into the supernet of the network; returns the names of the supernet's
        tensors that keep fresh values: those of the classifier, where the numbers of classes
        differ. What a plain network does not have, such as gates, keeps fresh values unnamed.

        Raises:
            ConfigError: the supernet is not one of a plain network.
            CheckpointError: tensors are missing, unexpected, or of another shape.
        """
        if isinstance(supernet, TracedSupernet):
            return self._apply_to_traced(supernet)
        try:
            state = supernet.plain_state(self.tensors)
        except ValueError as error:
            raise CheckpointError(f"supernet.init_from: {self.stem} {error}") from error
        if state is None:
            raise ConfigError(
                f"supernet.init_from: {self.stem} holds the weights of a plain network, but supernet.model "
                f"{supernet.spec.family} is not one; name the network itself, such as resnet50, or a checkpoint of a supernet"
            )
        whole = supernet.state_dict()
        expected = {name: tensor for name, tensor in whole.items() if name not in state.lacking}
        fresh = [name for name in supernet.class_tensors() if _has_other_rows(state.tensors.get(name), expected[name])]
        self._check(supernet.spec.family, state.tensors, expected, fresh)
        taken = {name: whole[name] if name in fresh else state.tensors[name] for name in expected}
        supernet.load_state_dict({**whole, **supernet.sorted_plain(taken)})
        return fresh

    def _apply_to_traced(self, supernet: TracedSupernet) -> list[str]:
        """Copy the weights into the supernet of a traced module; see `apply`."""
        spec = supernet.spec
        plain = make_plain(spec.layout["model"], spec.num_classes, spec.in_channels, 0, own_options(spec))
        expected = {name: tensor for name, tensor in plain.state_dict().items() if not name.endswith(_COUNTER)}
        rows = [name.removeprefix(BODY) for name in supernet.class_tensors()]
        fresh = [name for name in rows if _has_other_rows(self.tensors.get(name), expected[name])]
        self._check(spec.layout["model"], self.tensors, expected, fresh)
        plain.load_state_dict({name: self.tensors[name] for name in expected if name not in fresh}, strict=False)
        before = {name: supernet.get_parameter(BODY + name).detach().clone() for name in fresh}
        supernet.load_plain(plain)
        with torch.no_grad():
            for name, tensor in before.items():
                supernet.get_parameter(BODY + name).copy_(tensor)
        return [BODY + name for name in fresh]

    def _check(self, model: str, given: Mapping[str, Tensor], expected: Mapping[str, Tensor], fresh: list[str]) -> None:
        missing = [f"missing {name} {tuple(tensor.shape)}" for name, tensor in expected.items() if name not in given]
        unexpected = [f"unexpected {name} {tuple(own.shape)}" for name, own in given.items() if name not in expected]
        misshapen = [
            f"{name} has shape {tuple(given[name].shape)}, expected {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in given and name not in fresh and given[name].shape != tensor.shape
        ]
        kinds = [kind for kind in (missing, unexpected, misshapen) if kind]
        if not kinds:
            return
        listed = [problem for kind in kinds for problem in kind[:_NUM_LISTED]]
        others = sum(map(len, kinds)) - len(listed)
        raise CheckpointError(
            f"supernet.init_from: {self.stem} does not fit supernet.model {model} ({plural(len(missing), 'tensor')} missing, "
            f"{len(unexpected)} unexpected, {len(misshapen)} of another shape): {'; '.join(listed)}"
            + (f"; and {others} more" if others else "")
            + "; name the network whose state dict it is, or rename its tensors"
        )


def _has_other_rows(own: Tensor | None, expected: Tensor) -> bool:
    """Whether a tensor has another number of rows, and nothing else differs."""
    return own is not None and own.shape[:1] != expected.shape[:1] and own.shape[1:] == expected.shape[1:]


def is_plain(path: Path) -> bool:
    """Whether a file holds a state dict, as opposed to a checkpoint of a supernet, which has a JSON
    file beside it."""
    return path.suffix in SUFFIXES and path.is_file() and not path.with_suffix(".json").is_file()


def load_plain_start(path: Path) -> PlainStart:
    """Read the state dict of a plain network.

    Args:
        path: a file of `torch.save` (read without executing code in it) or safetensors; the state
            dict itself or under `state_dict`, `model_state_dict` or `model`, with or without the
            prefix `module.` of data-parallel training.

    Raises:
        CheckpointError: it cannot be read, holds no state dict, or holds NaN or infinity.
    """
    try:
        found: Any = load_file(path) if path.suffix == ".safetensors" else _torch_load(path)
    except (OSError, RuntimeError, ValueError, EOFError, SafetensorError, KeyError) as error:
        reason = first_line(error)
        raise CheckpointError(f"supernet.init_from: {path} cannot be read as a state dict: {reason}") from error
    for name in _WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
    if not isinstance(found, Mapping) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise CheckpointError(
            f"supernet.init_from: {path} holds {_described(found)}, not a state dict; save it with torch.save(model.state_dict(), ...)"
        )
    if all(str(name).startswith(_PARALLEL) for name in found):
        found = {str(name).removeprefix(_PARALLEL): value for name, value in found.items()}
    tensors = {str(name): value for name, value in found.items() if not str(name).endswith(_COUNTER)}
    check_finite(f"supernet.init_from: {path}", tensors)
    return PlainStart(path, tensors, file_sha256(path))


def _torch_load(path: Path) -> Any:
    import pickle

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            "it holds objects other than tensors, which could execute code; save the state dict alone"
        ) from error


def _described(found: object) -> str:
    if isinstance(found, Mapping):
        return f"a mapping with {', '.join(map(str, list(found)[:4]))}" if found else "an empty mapping"
    return type(found).__name__
