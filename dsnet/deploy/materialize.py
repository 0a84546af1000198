"""Conversion of a sub-network to a plain module with its own contiguous weights, for evaluation,
latency and export."""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsnet.deploy.inference_layout import lay_out_for_inference
from dsnet.network.blocks import fold_batch_norms
from dsnet.network.supernet import Supernet
from dsnet.space.spec import Subnet


class PlainSubnet(nn.Module):
    """One sub-network as a plain module (trunk and tail) without width arguments."""

    def __init__(self, trunk: nn.Module, tail: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.tail = tail

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """[B, C, H, W] -> logits [B, num_classes]."""
        return self.tail(self.trunk(images).features)


@torch.no_grad()
def materialize_trunk(supernet: Supernet, subnet: Subnet, *, fold_bn: bool = False) -> nn.Module:
    """The trunk of one sub-network as a plain module in eval mode: images -> TrunkOutput."""
    return _ready(supernet.cut_trunk(subnet), supernet, fold_bn)


@torch.no_grad()
def materialize_upto_gate(supernet: Supernet, gate: int, subnet: Subnet, *, fold_bn: bool = False) -> nn.Module:
    """One segment of a sub-network up to a gate, as a plain module in eval mode.

    It maps images (gate 0) or the features of the previous gate to a `TrunkOutput`.
    """
    return _ready(supernet.cut_upto_gate(gate, subnet), supernet, fold_bn)


@torch.no_grad()
def materialize_head(supernet: Supernet, subnet: Subnet, *, fold_bn: bool = False) -> nn.Module:
    """The last segment of a sub-network as a plain module in eval mode: features of the last gate
    -> logits."""
    return _ready(supernet.cut_head(subnet), supernet, fold_bn)


@torch.no_grad()
def materialize_tail(supernet: Supernet, subnet: Subnet, *, fold_bn: bool = False) -> nn.Module:
    """The tail of one sub-network as a plain module in eval mode: features -> logits."""
    return _ready(supernet.cut_tail(subnet), supernet, fold_bn)


def materialize(supernet: Supernet, subnet: Subnet, *, fold_bn: bool = False) -> PlainSubnet:
    """One sub-network as a plain module in eval mode; equal to `supernet(x, subnet)` in eval mode.

    Args:
        supernet: the supernet, whose weights are copied.
        subnet: a member of its set, or its teacher.
        fold_bn: fold BatchNorm into the convolutions (same function up to rounding).
    """
    trunk = materialize_trunk(supernet, subnet, fold_bn=fold_bn)
    return PlainSubnet(trunk, materialize_tail(supernet, subnet, fold_bn=fold_bn)).eval()


def _ready(module: nn.Module, supernet: Supernet, fold_bn: bool) -> nn.Module:
    if _shares(module, supernet):
        module = copy.deepcopy(module)
    module = module.to(next(supernet.parameters()).device).eval().requires_grad_(False)
    return lay_out_for_inference(fold_batch_norms(module)) if fold_bn else module


def _shares(module: nn.Module, supernet: Supernet) -> bool:
    """Whether a cut module has a part or memory of the supernet's; a copy takes as long as the
    cut."""
    parts = {id(part) for part in supernet.modules()}
    return any(id(part) in parts for part in module.modules()) or not _storages(module).isdisjoint(_storages(supernet))


def _storages(module: nn.Module) -> set[int]:
    tensors = (*module.parameters(), *module.buffers())
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}
