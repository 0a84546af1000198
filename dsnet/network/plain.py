"""Plain modules by name: networks of `dsnet.zoo`, and functions of the user by import path."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from socket import gaierror
from typing import Any
from urllib.error import URLError

import torch
from jaxtyping import Float32
from torch import Tensor, nn

from dsnet.errors import ConfigError
from dsnet.image_size import ImageSize, height_and_width
from dsnet.import_path import is_model_path
from dsnet.space.spec import SupernetSpec
from dsnet.user_code import import_allowed
from dsnet.wording import way_out
from dsnet.zoo import ZOO

SETTING = "supernet.model"
OwnOptions = tuple[tuple[str, float], ...]
"""Options of a network by name, sorted."""


def example_image(channels: int, size: ImageSize) -> Float32[Tensor, "1 channels height width"]:
    """The image with which a network is traced."""
    return torch.zeros(1, channels, *height_and_width(size))


def make_plain(model: str, num_classes: int, in_channels: int, seed: int, options: OwnOptions = ()) -> nn.Module:
    """A plain module with fresh weights; equal seeds give equal weights.

    Args:
        model: a name of `dsnet.zoo`, or the import path `package.module:function` of a function
            (number of classes, channels of the image) -> module.
        num_classes: number of logits.
        in_channels: channels of the image.
        seed: seed of torch's generator while the module is made.
        options: the options of a network of the zoo that differ from their defaults
            (`dsnet.zoo.OPTIONS`).

    Raises:
        ConfigError: no network has this name, import paths are not allowed, the function cannot be
            imported, it raises, or it returns something else.
    """
    if model in ZOO:
        make: Callable[[int, int], Any] = partial(ZOO[model], **dict(options))
    elif is_model_path(model):
        make = _imported(model)
    else:
        raise ConfigError(f"unknown network {model!r}{way_out(model, list(ZOO))}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            module = make(num_classes, in_channels)
        except Exception as error:
            way = (
                "it seems to download weights, and is called again in every process: let it make the network without them, and name "
                "a file with their state dict in supernet.init_from"
                if _is_of_network(error)
                else f"it is called as function({num_classes}, {in_channels}), with the number of classes and the channels of the image"
            )
            raise ConfigError(f"{SETTING}: {model} raised {type(error).__name__}: {error}; {way}") from error
    if not isinstance(module, nn.Module):
        raise ConfigError(f"{SETTING}: {model} returned {type(module).__name__}, but must return a torch.nn.Module")
    return module


def _is_of_network(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, is that of a connection."""
    while error is not None:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if isinstance(error, ConnectionError | TimeoutError | URLError | gaierror) or "RequestException" in kinds:
            return True
        error = error.__cause__ or error.__context__
    return False


def own_options(spec: SupernetSpec) -> OwnOptions:
    """The options of the plain network of a spec that differ from their defaults."""
    return tuple(sorted(spec.layout.get("options", {}).items()))


def _imported(model: str) -> Callable[[int, int], Any]:
    """The function at an import path."""
    found = import_allowed(SETTING, model)
    if not callable(found):
        raise ConfigError(f"{SETTING}: {model!r} is {type(found).__name__}, but must be a function")
    return found
