"""The depthwise-separable block of DS-MBNet, with its attention, in two halves: a gate may decide between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dsnet.layers import BatchNormBank, SlicedAttention, SlicedConv2d, SlicedDepthwiseConv2d
from dsnet.space import Subnet


@dataclass(frozen=True)
class BlockShape:
    """Where a block stands in its network."""

    in_group: int
    out_group: int
    stride: int
    hidden: int
    """Channels of the attention's hidden layer."""


class SeparableBlock(nn.Module):
    """dw3x3 -> BN -> Swish -> attention | pw1x1 -> BN -> Swish (METHODS 2); `|` is where a gate may decide the pointwise width."""

    def __init__(
        self, shape: BlockShape, subnets: tuple[Subnet, ...], widths: tuple[int, ...], generator: torch.Generator
    ) -> None:
        super().__init__()
        self.shape = shape
        max_in, max_out = widths[shape.in_group], widths[shape.out_group]
        self.depthwise = SlicedDepthwiseConv2d(max_in, 3, shape.stride, generator)
        self.depthwise_norm = BatchNormBank(max_in, [subnet.prefix(shape.in_group + 1) for subnet in subnets])
        self.attention = SlicedAttention(max_in, shape.hidden, generator)
        self.pointwise = SlicedConv2d(max_in, max_out, 1, 1, generator)
        self.pointwise_norm = BatchNormBank(max_out, [subnet.prefix(shape.out_group + 1) for subnet in subnets])

    def before_gate(self, x: Tensor, subnet: Subnet) -> tuple[Tensor, Tensor, Tensor]:
        """[B, c, H, W] -> (attended, the attention's input, its hidden vector)."""
        x = F.silu(self.depthwise_norm(self.depthwise(x), subnet.prefix(self.shape.in_group + 1)))
        attended, hidden = self.attention(x)
        return attended, x, hidden

    def after_gate(self, x: Tensor, subnet: Subnet) -> Tensor:
        """The pointwise half, at the sub-network's output width."""
        prefix = subnet.prefix(self.shape.out_group + 1)
        return F.silu(self.pointwise_norm(self.pointwise(x, prefix[-1]), prefix))

    def forward(self, x: Tensor, subnet: Subnet) -> Tensor:
        """Both halves."""
        return self.after_gate(self.before_gate(x, subnet)[0], subnet)

    def cut_before(self, subnet: Subnet) -> PlainBeforeGate:
        """The first half of one sub-network as a plain module."""
        prefix = subnet.prefix(self.shape.in_group + 1)
        conv = ConvNormSwish(self.depthwise.cut(prefix[-1]), self.depthwise_norm.cut(prefix))
        return PlainBeforeGate(conv, self.attention.cut(prefix[-1]))

    def cut_after(self, subnet: Subnet) -> ConvNormSwish:
        """The second half of one sub-network as a plain module."""
        prefix = subnet.prefix(self.shape.out_group + 1)
        conv = self.pointwise.cut(subnet.widths[self.shape.in_group], prefix[-1])
        return ConvNormSwish(conv, self.pointwise_norm.cut(prefix))


class ConvNormSwish(nn.Module):
    """Plain convolution, BatchNorm, Swish."""

    def __init__(self, conv: nn.Conv2d, norm: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """[B, c, H, W] -> [B, c', H', W']."""
        return F.silu(self.norm(self.conv(x)))


class PlainBeforeGate(nn.Module):
    """Plain first half of a block; returns what a gate and the second half need."""

    def __init__(self, conv: ConvNormSwish, attention: SlicedAttention) -> None:
        super().__init__()
        self.conv = conv
        self.attention = attention

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, c, H, W] -> (attended, the attention's input, its hidden vector)."""
        x = self.conv(x)
        attended, hidden = self.attention(x)
        return attended, x, hidden


class PlainBlock(nn.Module):
    """Both plain halves."""

    def __init__(self, before: PlainBeforeGate, after: ConvNormSwish) -> None:
        super().__init__()
        self.before = before
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        """[B, c, H, W] -> [B, c', H', W']."""
        return self.after(self.before(x)[0])


def fold_batch_norms(module: nn.Module) -> nn.Module:
    """Fold every plain BatchNorm into the convolution before it, in place (eval mode only); returns `module`."""
    for part in module.modules():
        if isinstance(part, ConvNormSwish) and isinstance(part.norm, nn.BatchNorm2d):
            part.conv = fuse_conv_bn_eval(part.conv.eval(), part.norm.eval())
            part.norm = nn.Identity()
    return module
