"""Scores by which the channels of a whole network are compared with each other, for pruning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float64
from torch import Tensor

from dsnet.errors import ConfigError
from dsnet.network.supernet import Supernet, restrict
from dsnet.structure.filters import Batches
from dsnet.structure.order import channel_scores, mean_scales
from dsnet.structure.settings import BN_GAMMA, SCORES, Ranking
from dsnet.user_code import import_allowed

SETTING = "supernet.structure.score"

Scores = dict[int, Float64[Tensor, " _channels"]]
"""For channel groups by number the score of every channel."""
ScoreFunction = Callable[[Supernet, Batches, int], Mapping[int, Any]]
"""Function (network, normalised images with labels, seed) -> for channel groups by number the score
of every channel; scores of different groups are compared with each other, and groups that it leaves
out have none. The network has one sub-network and no channels beside it."""


def pruning_scores(network: Supernet, kind: str, seed: int, batches: Batches, *, setting: str = SETTING) -> Scores:
    """The importance of every channel of a network with one sub-network, comparable between groups.

    The sub-network is cut out before, so that no other weight has an influence. `bn_gamma` is the
    mean of the absolute scales of the norms on a channel, and leaves out channel groups without a
    norm. `weight_l1` and `taylor` are divided by the mean of their channel group, because their
    size depends on the size of a filter; other scores are taken as they are. Kernels and depths
    have none.

    Args:
        network: the network; not changed.
        kind: one of `dsnet.structure.settings.SCORES`, or an import path.
        seed: seed of `random` and `noise`.
        batches: normalised images with labels, for `taylor` and `noise` and functions of the user.
        setting: the dotted key of `kind`, for messages.

    Raises:
        ConfigError: a function of the user cannot be used, or there is no finite number for every
            channel.
    """
    own = restrict(network, [0])
    found: Mapping[int, Any]
    if kind == BN_GAMMA:
        found = mean_scales(own)
    elif kind in SCORES:
        found = channel_scores(own, kind, seed, batches)
    else:
        found = score_function(kind)(own, batches, seed)
    scores = {
        group: _checked(f"{setting} {kind}", own, group, values)
        for group, values in sorted(found.items())
        if not own.spec.groups[group].is_size
    }
    if kind in ("weight_l1", "taylor"):
        scores = {group: values / values.mean().clamp(min=torch.finfo().tiny) for group, values in scores.items()}
    return scores


def channel_importances(network: Supernet, kind: Ranking, seed: int, batches: Batches) -> Scores:
    """The importance of every channel as a number of at least 0, so that those of several channels
    can be added up, also over channel groups.

    They are the scores of `pruning_scores`, but for `noise`: there a channel that tolerates the
    noise alpha has log(1 + alpha**-2) / 2, the most that one of its weights can tell, in nats.

    Args:
        network: a network with one sub-network, that of all channels; not changed.
        kind: the importance.
        seed: seed of `random` and `noise`.
        batches: normalised images with labels, for `taylor` and `noise`.

    Raises:
        ConfigError: as `pruning_scores`.
    """
    scores = pruning_scores(network, kind, seed, batches, setting="supernet.structure.progressive.ranking")
    if kind != "noise":
        return scores
    return {group: F.softplus(2 * values) / 2 for group, values in scores.items()}


def score_function(path: str) -> ScoreFunction:
    """The function of the user at an import path `package.module:function`.

    Raises:
        ConfigError: import paths are not allowed, or it cannot be imported.
    """
    found = import_allowed(SETTING, path)
    if not callable(found):
        raise ConfigError(f"{SETTING}: {path!r} is no function (network, batches, seed) -> scores of channels")
    function: ScoreFunction = found
    return function


def _checked(key: str, network: Supernet, group: int, values: Any) -> Float64[Tensor, " _channels"]:
    """The scores of one group as finite numbers, one per channel."""
    scores = torch.as_tensor(values).detach().double().cpu()
    own = network.spec.groups[group]
    if scores.shape != (own.max_width,) or not bool(scores.isfinite().all()):
        raise ConfigError(
            f"{key}: channel group {own.name!r} needs {own.max_width} finite scores, one per channel, but has "
            f"{list(scores.shape)}: use another score"
        )
    return scores
