"""Building blocks of the families, sliced and plain: the separable block of DS-MBNet, the residual
block of DS-ResNet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dsnet.network.axes import Axes, Axis, prefixed
from dsnet.network.layers import (
    BatchNormBank,
    SlicedAttention,
    SlicedConv2d,
    SlicedDepthwiseConv2d,
    make_norm,
    norm_axes,
)
from dsnet.space.spec import Subnet, SupernetSpec
from dsnet.space.subnet_set import SubnetSet


def swish(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Swish, computed in place where gradients are off; the caller must not use `x` afterwards."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


@dataclass(frozen=True)
class BlockShape:
    """Channel groups, stride, kernel and attention size of a separable block."""

    in_group: int
    out_group: int
    stride: int
    hidden: int
    """Channels of the attention's hidden layer."""
    kernel: int = 3
    """Height and width in pixels of depthwise kernels that are never sliced."""
    kernel_group: int | None = None
    """The group whose width is the size of the kernel, which must come before `in_group`, so that
    the keys of all statistics contain it; None: `kernel` is."""

    def kernel_of(self, subnet: Subnet) -> int | None:
        """The size of the kernel in a sub-network; None for the whole one."""
        return None if self.kernel_group is None else subnet.widths[self.kernel_group]


class SeparableBlock(nn.Module):
    """Separable block: depthwise -> BN -> Swish -> attention | pw1x1 -> BN -> Swish
    (docs/methods.md, section 2).

    At `|` a gate may decide the width of the pointwise convolution.
    """

    def __init__(self, shape: BlockShape, subnets: SubnetSet, generator: torch.Generator) -> None:
        super().__init__()
        self.shape = shape
        groups, norm = subnets.spec.groups, subnets.spec.norm
        max_in, max_out = groups[shape.in_group].max_width, groups[shape.out_group].max_width
        kernel = shape.kernel if shape.kernel_group is None else groups[shape.kernel_group].max_width
        self.depthwise = SlicedDepthwiseConv2d(max_in, kernel, shape.stride, generator)
        self.depthwise_norm = make_norm(norm, max_in, subnets.prefixes(shape.in_group))
        self.attention = SlicedAttention(max_in, shape.hidden, generator)
        self.pointwise = SlicedConv2d(max_in, max_out, 1, 1, generator)
        self.pointwise_norm = make_norm(norm, max_out, subnets.prefixes(shape.out_group))

    def before_gate(
        self, x: Float[Tensor, "batch in_channels in_height in_width"], subnet: Subnet
    ) -> tuple[
        Float[Tensor, "batch channels height width"],
        Float[Tensor, "batch channels height width"],
        Float[Tensor, "batch hidden"],
    ]:
        """Run the first half: [B, c, H, W] -> (attended, attention's input, hidden vector)."""
        x = swish(self._normalised_depthwise(x, subnet))
        attended, hidden = self.attention(x)
        return attended, x, hidden

    def _normalised_depthwise(self, x: Tensor, subnet: Subnet) -> Tensor:
        """Depthwise convolution and norm, fused into one operation where statistics are fixed and
        gradients off."""
        norm, prefix = self.depthwise_norm, subnet.prefix(self.shape.in_group + 1)
        kernel = self.shape.kernel_of(subnet)
        if isinstance(norm, BatchNormBank) and not norm.training and not torch.is_grad_enabled():
            return self.depthwise(x, *norm.scale_and_shift(prefix), kernel=kernel)
        return norm(self.depthwise(x, kernel=kernel), prefix)

    def after_gate_nested(
        self, x: Float[Tensor, "batch channels height width"], prefixes: Sequence[tuple[int, ...]]
    ) -> Float[Tensor, "batch out_channels height width"]:
        """Run the pointwise half once for several sub-networks that read the same `x`, at the
        largest width (training only)."""
        norm = self.pointwise_norm
        assert isinstance(norm, BatchNormBank)
        return F.silu(norm.forward_nested(self.pointwise(x, max(prefix[-1] for prefix in prefixes)), prefixes))

    def before_attention_nested(
        self, x: Float[Tensor, "batch channels height width"], prefixes: Sequence[tuple[int, ...]]
    ) -> Float[Tensor, "batch channels out_height out_width"]:
        """Run depthwise convolution, BatchNorm and Swish once for several sub-networks (training
        only) whose kernels are whole.

        The input of each is a prefix of the channels of `x`.
        """
        norm = self.depthwise_norm
        assert isinstance(norm, BatchNormBank)
        return F.silu(norm.forward_nested(self.depthwise(x), prefixes))

    def after_gate(
        self, x: Float[Tensor, "batch channels height width"], subnet: Subnet
    ) -> Float[Tensor, "batch out_channels height width"]:
        """Run the pointwise half at the sub-network's output width."""
        prefix = subnet.prefix(self.shape.out_group + 1)
        return swish(self.pointwise_norm(self.pointwise(x, prefix[-1]), prefix))

    def forward(
        self, x: Float[Tensor, "batch channels height width"], subnet: Subnet
    ) -> Float[Tensor, "batch out_channels out_height out_width"]:
        """Run both halves: [B, c, H, W] -> [B, c', H', W']."""
        return self.after_gate(self.before_gate(x, subnet)[0], subnet)

    def axes(self, spec: SupernetSpec) -> Mapping[str, Axes]:
        """The axes of all tensors with channels, by name."""
        read, written = (Axis.of(((group, 1),), spec) for group in (self.shape.in_group, self.shape.out_group))
        group = self.shape.kernel_group
        sides: Axes = () if group is None else (None, *2 * (Axis.kernel(group, spec),))
        return {
            "depthwise.weight": (read, *sides),
            **prefixed("depthwise_norm", norm_axes(self.depthwise_norm, read)),
            **prefixed("attention", self.attention.axes(read)),
            "pointwise.weight": (written, read),
            **prefixed("pointwise_norm", norm_axes(self.pointwise_norm, written)),
        }

    def cut_before(self, subnet: Subnet) -> PlainBeforeGate:
        """The first half of one sub-network as a plain module."""
        prefix = subnet.prefix(self.shape.in_group + 1)
        depthwise = self.depthwise.cut(prefix[-1], self.shape.kernel_of(subnet))
        conv = ConvNormSwish(depthwise, self.depthwise_norm.cut(prefix))
        return PlainBeforeGate(conv, self.attention.cut(prefix[-1]))

    def cut_after(self, subnet: Subnet) -> ConvNormSwish:
        """The second half of one sub-network as a plain module."""
        prefix = subnet.prefix(self.shape.out_group + 1)
        conv = self.pointwise.cut(subnet.widths[self.shape.in_group], prefix[-1])
        return ConvNormSwish(conv, self.pointwise_norm.cut(prefix))


class ConvNorm(nn.Module):
    """Plain convolution followed by normalisation."""

    def __init__(self, conv: nn.Conv2d, norm: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.norm = norm

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch out_channels out_height out_width"]:
        """[B, c, H, W] -> [B, c', H', W']."""
        return self.norm(self.conv(x))


class ConvNormSwish(ConvNorm):
    """Plain convolution followed by normalisation and Swish."""

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch out_channels out_height out_width"]:
        """[B, c, H, W] -> [B, c', H', W']."""
        return swish(super().forward(x))


class PlainBeforeGate(nn.Module):
    """Plain first half of a separable block, with the outputs for the gate and the second half."""

    def __init__(self, conv: ConvNormSwish, attention: SlicedAttention) -> None:
        super().__init__()
        self.conv = conv
        self.attention = attention

    def forward(
        self, x: Float[Tensor, "batch in_channels in_height in_width"]
    ) -> tuple[
        Float[Tensor, "batch channels height width"],
        Float[Tensor, "batch channels height width"],
        Float[Tensor, "batch hidden"],
    ]:
        """[B, c, H, W] -> (attended, the attention's input, its hidden vector)."""
        x = self.conv(x)
        attended, hidden = self.attention(x)
        return attended, x, hidden


class PlainBlock(nn.Module):
    """Plain separable block: both halves."""

    def __init__(self, before: PlainBeforeGate, after: ConvNormSwish) -> None:
        super().__init__()
        self.before = before
        self.after = after

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch out_channels out_height out_width"]:
        """[B, c, H, W] -> [B, c', H', W']."""
        return self.after(self.before(x)[0])


@dataclass(frozen=True)
class ConvShape:
    """Channel groups, kernel and stride of a dense convolution with normalisation."""

    in_groups: tuple[int, ...]
    """The channel groups that write its input, which has as many channels as the widest of them;
    empty: the image."""
    out_group: int
    kernel: int
    stride: int = 1
    upstream: int = 0
    """The last channel group on which its input depends."""

    def num_in(self, widths: Sequence[int], in_channels: int) -> int:
        """Number of input channels for one width per group; `in_channels` where it reads the
        image."""
        return max((widths[group] for group in self.in_groups), default=in_channels)

    def check_statistics(self, subnets: SubnetSet) -> None:
        """Check that sub-networks with the same prefix up to `out_group` also agree on all groups
        upstream.

        Raises:
            ValueError: two of them would share BatchNorm statistics although their inputs differ.
        """
        known: dict[tuple[int, ...], Subnet] = {}
        for subnet in subnets.all:
            other = known.setdefault(subnet.prefix(self.out_group + 1), subnet)
            if other.prefix(self.upstream + 1) != subnet.prefix(self.upstream + 1):
                groups = subnets.spec.groups
                own, upstream = groups[self.out_group].name, groups[self.upstream].name
                raise ValueError(
                    f"sub-networks {other.name!r} and {subnet.name!r} have equal widths up to channel group {own!r}, but not up to "
                    f"{upstream!r}, which the layers of {own!r} read: they would share BatchNorm statistics although their inputs "
                    "differ; use one channel group per block (supernet.options.streams padded) or supernet.train.bn group_norm"
                )


class SlicedConvNorm(nn.Module):
    """Sliced convolution and normalisation whose output is one channel group."""

    def __init__(self, shape: ConvShape, subnets: SubnetSet, generator: torch.Generator) -> None:
        super().__init__()
        self.shape = shape
        spec = subnets.spec
        if spec.norm != "group_norm":
            shape.check_statistics(subnets)
        widest = [group.max_width for group in spec.groups]
        self.in_channels = spec.in_channels
        num_in, num_out = shape.num_in(widest, spec.in_channels), widest[shape.out_group]
        self.conv = SlicedConv2d(num_in, num_out, shape.kernel, shape.stride, generator)
        self.norm = make_norm(spec.norm, num_out, subnets.prefixes(shape.out_group))
        self._inputs = {subnet.prefix(shape.upstream + 1) for subnet in subnets.all}

    def _key(self, subnet: Subnet) -> tuple[int, ...]:
        """The key of the norm's statistics; it ends with the output width.

        A sub-network that is not declared may have the key of a declared one and another input,
        from a group upstream that comes after `out_group`. It gets a longer key, which the norm
        does not know.
        """
        prefix = subnet.prefix(self.shape.out_group + 1)
        upstream = subnet.prefix(self.shape.upstream + 1)
        return prefix if len(upstream) <= len(prefix) or upstream in self._inputs else (*upstream, prefix[-1])

    def forward(
        self, x: Float[Tensor, "batch channels height width"], subnet: Subnet
    ) -> Float[Tensor, "batch out_channels out_height out_width"]:
        """[B, c, H, W] -> [B, width of its group, H', W']."""
        prefix = self._key(subnet)
        return self.norm(self.conv(x, prefix[-1]), prefix)

    def axes(self, spec: SupernetSpec) -> Mapping[str, Axes]:
        """The axes of all tensors with channels, by name."""
        written = Axis.of(((self.shape.out_group, 1),), spec)
        read = Axis.stream(self.shape.in_groups, spec) if self.shape.in_groups else None
        return {"conv.weight": (written, read), **prefixed("norm", norm_axes(self.norm, written))}

    def cut(self, subnet: Subnet) -> ConvNorm:
        """The slice of one sub-network as a plain module."""
        prefix = self._key(subnet)
        num_in = self.shape.num_in(subnet.widths, self.in_channels)
        return ConvNorm(self.conv.cut(num_in, prefix[-1]), self.norm.cut(prefix))


@dataclass(frozen=True)
class ResidualShape:
    """Channel groups, stride and kind of a residual block."""

    in_groups: tuple[int, ...]
    """The channel groups whose layers have written to the residual stream that it reads."""
    inner_group: int
    out_group: int
    stride: int
    is_bottleneck: bool
    projects: bool
    """Whether the shortcut is a 1x1 convolution, so that a new residual stream begins."""

    @property
    def convs(self) -> tuple[ConvShape, ...]:
        """The convolutions of the branch, in order; the first 3x3 convolution has the stride."""
        inner, out = self.inner_group, self.out_group
        upstream = max(self.in_groups)
        if self.is_bottleneck:
            return (
                ConvShape(self.in_groups, inner, 1, 1, upstream),
                ConvShape((inner,), inner, 3, self.stride, upstream),
                ConvShape((inner,), out, 1, 1, max(inner, upstream)),
            )
        return (
            ConvShape(self.in_groups, inner, 3, self.stride, upstream),
            ConvShape((inner,), out, 3, 1, max(inner, upstream)),
        )

    @property
    def projection(self) -> ConvShape:
        """The 1x1 convolution of the shortcut, for a block with `projects`."""
        return ConvShape(self.in_groups, self.out_group, 1, self.stride, max(self.in_groups))

    @property
    def stream(self) -> tuple[int, ...]:
        """The channel groups that have written to the residual stream after this block."""
        return tuple(dict.fromkeys((*(() if self.projects else self.in_groups), self.out_group)))


class ResidualBlock(nn.Module):
    """Residual block: relu(shortcut + branch).

    The branch is 3x3-3x3 (basic) or 1x1-3x3-1x1 (bottleneck), with a normalisation after each
    convolution.
    """

    def __init__(self, shape: ResidualShape, subnets: SubnetSet, generator: torch.Generator) -> None:
        super().__init__()
        self.convs = nn.ModuleList(SlicedConvNorm(conv, subnets, generator) for conv in shape.convs)
        self.projection = SlicedConvNorm(shape.projection, subnets, generator) if shape.projects else None

    def forward(
        self, x: Float[Tensor, "batch channels height width"], subnet: Subnet
    ) -> Float[Tensor, "batch out_channels out_height out_width"]:
        """Residual stream [B, c, H, W] -> residual stream after this block [B, c', H', W']."""
        branch = x
        for index, conv in enumerate(self.convs):
            branch = conv(F.relu(branch) if index else branch, subnet)
        return F.relu(add_streams(x if self.projection is None else self.projection(x, subnet), branch))

    def cut(self, subnet: Subnet) -> PlainResidualBlock:
        """The block of one sub-network as a plain module."""
        branch: list[nn.Module] = []
        for conv in self.convs:
            branch += [conv.cut(subnet), nn.ReLU()]  # type: ignore[operator]
        shortcut = nn.Identity() if self.projection is None else self.projection.cut(subnet)
        return PlainResidualBlock(nn.Sequential(*branch[:-1]), shortcut)


class PlainResidualBlock(nn.Module):
    """Plain residual block: branch and shortcut."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch out_channels out_height out_width"]:
        """[B, c, H, W] -> [B, c', H', W']."""
        return F.relu(add_streams(self.shortcut(x), self.branch(x)))


def add_streams(
    x: Float[Tensor, "batch x_channels height width"], y: Float[Tensor, "batch y_channels height width"]
) -> Float[Tensor, "batch channels height width"]:
    """x + y, [B, c, H, W] each; the narrower one is padded with zero channels (docs/methods.md,
    section 8, zero-padding match)."""
    missing = y.shape[1] - x.shape[1]
    if missing > 0:
        x = F.pad(x, (0, 0, 0, 0, 0, missing))
    elif missing < 0:
        y = F.pad(y, (0, 0, 0, 0, 0, -missing))
    return x + y


def fold_batch_norms(module: nn.Module) -> nn.Module:
    """Fold every plain BatchNorm into the convolution before it (eval mode only); returns the
    module, changed in place, or a new one for a traced graph."""
    if isinstance(module, fx.GraphModule):
        return fuse(module.eval(), no_trace=True)
    if isinstance(module, ConvNorm) and isinstance(module.norm, nn.BatchNorm2d):
        module.conv = fuse_conv_bn_eval(module.conv.eval(), module.norm.eval())
        module.norm = nn.Identity()
    for name, child in module.named_children():
        setattr(module, name, fold_batch_norms(child))
    return module
