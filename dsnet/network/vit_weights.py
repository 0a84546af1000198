"""Weights of plain vision transformers: the names of torchvision, positions for other images, and
the order of heads and hidden channels.

The supernet has the names of timm (and of the DeiT releases), but for the classifier.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from dsnet.space.spec import Pair

POSITIONS = "pos_embed"
"""Name of the positions of tokens, [1, 1 + rows * columns, D], the class token's first."""
_OF_TORCHVISION = (
    (r"class_token", "cls_token"),
    (r"conv_proj\.(.*)", r"patch_embed.proj.\1"),
    (r"encoder\.pos_embedding", POSITIONS),
    (r"encoder\.layers\.encoder_layer_(\d+)\.ln_([12])\.(.*)", r"blocks.\1.norm\2.\3"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.in_proj_(.*)", r"blocks.\1.attn.qkv.\2"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.out_proj\.(.*)", r"blocks.\1.attn.proj.\2"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:0|linear_1)\.(.*)", r"blocks.\1.mlp.fc1.\2"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:3|linear_2)\.(.*)", r"blocks.\1.mlp.fc2.\2"),
    (r"encoder\.ln\.(.*)", r"norm.\1"),
    (r"heads\.head\.(.*)", r"classifier.\1"),
)
_OF_DISTILLED = ("dist_token", "head_dist.")
"""Beginnings of the names that only a distilled DeiT has."""
_OF_TIMM = ((r"head\.(.*)", r"classifier.\1"),)


def with_own_names(tensors: Mapping[str, Shaped[Tensor, "*_"]]) -> dict[str, Shaped[Tensor, "*_"]]:
    """The state dict of a ViT with the names that the supernet has, whether it has those of timm or
    of torchvision; a tensor with another name keeps it."""
    return {_own_name(name): value for name, value in tensors.items()}


def _own_name(name: str) -> str:
    for pattern, own in (*_OF_TIMM, *_OF_TORCHVISION):
        if (found := re.fullmatch(pattern, name)) is not None:
            return found.expand(own)
    return name


def check_one_class_token(tensors: Mapping[str, Shaped[Tensor, "*_"]]) -> None:
    """Check that a state dict is that of a transformer with one class token.

    Raises:
        ValueError: it is that of a distilled DeiT, which has two; the message completes the
            sentence "the file ...".
    """
    if any(name.startswith(_OF_DISTILLED) for name in tensors):
        raise ValueError(
            "is a distilled DeiT: it has a second class token (dist_token) with a classifier of its own (head_dist), and answers with "
            "the mean of both, but ds_vit has one class token and one classifier, so that its answers would be others; use the weights "
            "of the same network without distillation (in timm deit_tiny_patch16_224 in place of deit_tiny_distilled_patch16_224), or "
            "those of another ViT with one class token"
        )


def square_grid(positions: Shaped[Tensor, "*_"]) -> Pair | None:
    """Rows and columns of positions of unknown shape: as many of the one as of the other; None
    where that cannot be."""
    if positions.ndim != 3 or positions.shape[1] < 2:
        return None
    side = math.isqrt(positions.shape[1] - 1)
    return (side, side) if side**2 == positions.shape[1] - 1 else None


def resized_positions(
    positions: Float[Tensor, "1 tokens stream"], before: Pair, after: Pair
) -> Float[Tensor, "1 other_tokens stream"]:
    """Positions of another number of patches, by bicubic interpolation with antialiasing; that of
    the class token stays.

    Args:
        positions: [1, 1 + rows * columns, D].
        before: rows and columns of the patches.
        after: those wanted; the positions themselves where they are the same.
    """
    if before == after:
        return positions
    first, rest = positions[:, :1], positions[:, 1:]
    grid = rest.unflatten(1, before).permute(0, 3, 1, 2).float()
    resized = F.interpolate(grid, after, mode="bicubic", antialias=True).to(rest.dtype)
    return torch.cat([first, resized.flatten(2).transpose(1, 2)], 1)


def sorted_by_importance(
    tensors: Mapping[str, Shaped[Tensor, "*_"]], num_blocks: int, head_channels: int
) -> dict[str, Shaped[Tensor, "*_"]]:
    """The state dict of a ViT with the heads and hidden channels of every block sorted from the
    most important one, so that it computes the same.

    The importance of a hidden channel is the product of two sums of absolute weights: of those that
    write it and of those that read it. That of a head is the same product for its values. Equals
    keep their order.
    """
    found = dict(tensors)
    for block in range(num_blocks):
        _sort_hidden(found, f"blocks.{block}.mlp")
        _sort_heads(found, f"blocks.{block}.attn", head_channels)
    return found


def _sort_hidden(tensors: dict[str, Tensor], name: str) -> None:
    first, second = tensors[f"{name}.fc1.weight"], tensors[f"{name}.fc2.weight"]
    order = _falling(first.double().abs().sum(1) * second.double().abs().sum(0))
    tensors[f"{name}.fc1.weight"], tensors[f"{name}.fc1.bias"] = first[order], tensors[f"{name}.fc1.bias"][order]
    tensors[f"{name}.fc2.weight"] = second[:, order]


def _sort_heads(tensors: dict[str, Tensor], name: str, head_channels: int) -> None:
    qkv, proj = tensors[f"{name}.qkv.weight"], tensors[f"{name}.proj.weight"]
    by_head = qkv.unflatten(0, (3, -1, head_channels))  # [3, heads, channels of a head, D]
    written = by_head[2].double().abs().sum((1, 2))
    order = _falling(written * proj.double().abs().unflatten(1, (-1, head_channels)).sum((0, 2)))
    bias = tensors[f"{name}.qkv.bias"].unflatten(0, (3, -1, head_channels))
    tensors[f"{name}.qkv.weight"] = by_head[:, order].flatten(0, 2)
    tensors[f"{name}.qkv.bias"] = bias[:, order].flatten()
    tensors[f"{name}.proj.weight"] = proj.unflatten(1, (-1, head_channels))[:, order].flatten(1)


def _falling(importance: Float[Tensor, " parts"]) -> Int64[Tensor, " parts"]:
    return torch.argsort(importance, descending=True, stable=True)
