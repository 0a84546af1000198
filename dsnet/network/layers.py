"""Width-sliced layers, which hold parameters but no state about the current width.

A layer takes its input width from the tensor; only a layer that changes the number of channels is
given its output width. `cut` copies the slice that one sub-network uses into a plain torch module.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from dsnet.network.axes import Axes, Axis
from dsnet.network.slicing import corner
from dsnet.space.spec import CLASSES, SupernetSpec

BN_EPS = 1e-5
BN_MOMENTUM = 0.1


class SlicedConv2d(nn.Module):
    """Dense convolution without bias, sliced to the first `width` filters and the input's
    channels."""

    def __init__(self, max_in: int, max_out: int, kernel: int, stride: int, generator: torch.Generator) -> None:
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.empty(max_out, max_in, kernel, kernel))
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu", generator=generator)

    def forward(
        self, x: Float[Tensor, "batch channels height width"], width: int
    ) -> Float[Tensor, "batch {width} out_height out_width"]:
        """[B, c, H, W] -> [B, width, ceil(H / stride), ceil(W / stride)]."""
        weight = corner(self.weight, width, x.shape[1])
        return F.conv2d(x, weight, stride=self.stride, padding=weight.shape[-1] // 2)

    def cut(self, num_in: int, num_out: int) -> nn.Conv2d:
        """The slice as a plain convolution with its own contiguous weight."""
        return _plain_conv(self.weight[:num_out, :num_in], self.stride, groups=1)


class SlicedDepthwiseConv2d(nn.Module):
    """Depthwise convolution without bias, sliced to the input's channels, and to the centre of its
    kernels where a smaller kernel is asked for."""

    def __init__(self, max_channels: int, kernel: int, stride: int, generator: torch.Generator) -> None:
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.empty(max_channels, 1, kernel, kernel))
        nn.init.kaiming_normal_(self.weight, mode="fan_in", nonlinearity="relu", generator=generator)

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        scale: Float[Tensor, " channels"] | None = None,
        shift: Float[Tensor, " channels"] | None = None,
        *,
        kernel: int | None = None,
    ) -> Float[Tensor, "batch channels out_height out_width"]:
        """[B, c, H, W] -> [B, c, ceil(H / stride), ceil(W / stride)], then times `scale` plus
        `shift` (each [c]) where given.

        `kernel` is the size of the kernels in pixels, None for the whole ones.
        """
        num_channels = x.shape[1]
        weight = _centre(corner(self.weight, num_channels), kernel)
        if scale is not None:
            weight = weight * scale[:, None, None, None]
        return F.conv2d(x, weight, shift, stride=self.stride, padding=weight.shape[-1] // 2, groups=num_channels)

    def cut(self, num_channels: int, kernel: int | None = None) -> nn.Conv2d:
        """The slice as a plain depthwise convolution."""
        return _plain_conv(_centre(self.weight[:num_channels], kernel), self.stride, groups=num_channels)


def _centre(weight: Tensor, kernel: int | None) -> Tensor:
    """The centre of the kernels of a convolution, `kernel` pixels high and wide; all for None."""
    whole = weight.shape[-1]
    if kernel is None or kernel == whole:
        return weight
    edge = (whole - kernel) // 2
    return weight[..., edge : edge + kernel, edge : edge + kernel]


class SlicedLinear(nn.Module):
    """Linear classifier, sliced along its input features."""

    def __init__(self, max_in: int, num_out: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_out, max_in))
        self.bias = nn.Parameter(torch.zeros(num_out))
        nn.init.normal_(self.weight, std=0.01, generator=generator)

    def forward(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch outputs"]:
        """[B, c] -> [B, num_out]."""
        return F.linear(x, corner(self.weight, self.weight.shape[0], x.shape[1]), self.bias)

    @staticmethod
    def axes(features: Axis, spec: SupernetSpec) -> Mapping[str, Axes]:
        """The axes of the parameters, by name; `features` are those that it reads."""
        classes = Axis.of(((CLASSES, 1),), spec)
        return {"weight": (classes, features), "bias": (classes,)}

    def cut(self, num_in: int) -> nn.Linear:
        """The slice as a plain linear layer."""
        plain = nn.Linear(num_in, self.weight.shape[0])
        with torch.no_grad():
            plain.weight.copy_(self.weight[:, :num_in])
            plain.bias.copy_(self.bias)
        return plain


class UndeclaredWidthsError(KeyError):
    """A BatchNorm has no running statistics, or no affine pair of its own, for a sub-network that
    the supernet's set does not declare."""

    def __init__(self, what: str, widths: tuple[int, ...]) -> None:
        super().__init__(
            f"no BatchNorm {what} for the widths {widths}: declare the sub-network, that is, build the supernet with "
            "a set that holds it, and recalibrate"
        )

    def __str__(self) -> str:
        return str(self.args[0])


class BatchNormBank(nn.Module):
    """BatchNorm with running statistics per prefix of widths, and shared or private affine pairs.

    The statistics of a layer depend on every width upstream of it, so they are keyed by that prefix
    (docs/methods.md, section 3, docs/definitions.md, SubnetSet). Sub-networks that agree up to this
    layer share one set, which makes a shared trunk possible.

    Only declared sub-networks, those of the supernet's set, have statistics. In training mode any
    other width is normalised by the statistics of the batch and leaves no trace, as universally
    slimmable training needs; in eval mode it is refused.
    """

    def __init__(
        self,
        max_features: int,
        prefixes: Iterable[tuple[int, ...]],
        *,
        private_affine: bool = False,
        tracks: bool = True,
        eps: float = BN_EPS,
        size_of: Callable[[tuple[int, ...]], int] = lambda prefix: prefix[-1],
    ) -> None:
        super().__init__()
        self.eps = eps
        self.momentum: float | None = BN_MOMENTUM
        """Weight of the newest batch; None: cumulative average, for recalibration; 0.0: statistics
        stay unchanged."""
        self.tracks = tracks
        """Whether training updates the statistics; if not, only recalibration does."""
        self.private_affine = private_affine
        known = sorted(set(prefixes))
        self.depth = len(known[0])
        """Number of channel groups in a prefix of this layer."""
        if not private_affine:
            self.weight = nn.Parameter(torch.ones(max_features))
            self.bias = nn.Parameter(torch.zeros(max_features))
        for prefix in known:
            suffix = key_suffix(prefix)
            if private_affine:
                self.register_parameter(f"weight_{suffix}", nn.Parameter(torch.ones(size_of(prefix))))
                self.register_parameter(f"bias_{suffix}", nn.Parameter(torch.zeros(size_of(prefix))))
            self.register_buffer(f"mean_{suffix}", torch.zeros(size_of(prefix)))
            self.register_buffer(f"var_{suffix}", torch.ones(size_of(prefix)))
            self.register_buffer(f"updates_{suffix}", torch.zeros((), dtype=torch.int64))
        # Used in every forward: building the names anew would cost 1 % of a training step.
        self._names = {
            prefix: tuple(f"{part}_{key_suffix(prefix)}" for part in ("mean", "var", "updates")) for prefix in known
        }

    def statistics(
        self, prefix: tuple[int, ...]
    ) -> tuple[Float[Tensor, " channels"], Float[Tensor, " channels"], Int64[Tensor, ""]]:
        """Running mean, running variance and the number of updates of one prefix.

        Raises:
            UndeclaredWidthsError: no sub-network of the supernet's set has this prefix.
        """
        sets = self._names.get(prefix)
        if sets is None:
            raise UndeclaredWidthsError("statistics", prefix)
        mean, var, updates = (self._buffers[name] for name in sets)
        assert mean is not None
        assert var is not None
        assert updates is not None
        return mean, var, updates

    def keys(self) -> tuple[tuple[int, ...], ...]:
        """The keys of all statistics, sorted."""
        return tuple(self._names)

    def num_updates(self, widths: tuple[int, ...]) -> int:
        """Number of updates of the statistics that a sub-network of these widths uses."""
        return int(self.statistics(self.key_of(widths))[2])

    def key_of(self, widths: tuple[int, ...]) -> tuple[int, ...]:
        """The key of the statistics that a sub-network of these widths uses."""
        return widths[: self.depth]

    def widths_of(self, key: tuple[int, ...]) -> Mapping[int, int]:
        """The width of every channel group that a key names, by the group's number."""
        return dict(enumerate(key))

    def affine(self, prefix: tuple[int, ...]) -> tuple[Float[Tensor, " channels"], Float[Tensor, " channels"]]:
        """Scale and shift of one prefix.

        Raises:
            UndeclaredWidthsError: every declared prefix has a pair of its own, and this one is not
                declared.
        """
        if self.private_affine:
            if prefix not in self._names:
                raise UndeclaredWidthsError("scale and shift", prefix)
            suffix = key_suffix(prefix)
            return self.get_parameter(f"weight_{suffix}"), self.get_parameter(f"bias_{suffix}")
        return corner(self.weight, prefix[-1]), corner(self.bias, prefix[-1])

    def scales(self) -> list[Float[Tensor, " _channels"]]:
        """The scale of the shared affine pair, or those of all private pairs."""
        if not self.private_affine:
            return [self.weight]
        return [self.get_parameter(f"weight_{key_suffix(prefix)}") for prefix in self._names]

    def forward(
        self, x: Float[Tensor, "batch channels height width"], prefix: tuple[int, ...]
    ) -> Float[Tensor, "batch channels height width"]:
        """Normalise [B, c, H, W] with the statistics of `prefix` (batch statistics while
        training).

        In training, undeclared widths are normalised by the batch alone, and so are all widths
        where the statistics stay unchanged.

        Raises:
            UndeclaredWidthsError: in eval mode the widths are not declared, or in training they
                would need a private affine pair.
        """
        if self.training and (prefix not in self._names or self.momentum == 0.0):
            return F.batch_norm(x, None, None, *self.affine(prefix), True, 0.0, self.eps)
        mean, var, updates = self.statistics(prefix)
        factor = self._count(updates)
        return F.batch_norm(x, mean, var, *self.affine(prefix), self.training, factor, self.eps)

    def scale_and_shift(self, prefix: tuple[int, ...]) -> tuple[Float[Tensor, " channels"], Float[Tensor, " channels"]]:
        """Scale and shift, each [c], that are equivalent to normalising by the running statistics
        of `prefix`."""
        mean, var, _ = self.statistics(prefix)
        weight, bias = self.affine(prefix)
        scale = weight * torch.rsqrt(var + self.eps)
        return scale, bias - mean * scale

    def forward_nested(
        self, x: Float[Tensor, "batch channels height width"], prefixes: Collection[tuple[int, ...]]
    ) -> Float[Tensor, "batch channels height width"]:
        """Normalise several nested sub-networks at once by batch statistics (training only, shared
        affine pair).

        The input of each narrower sub-network must be a prefix of the channels of `x`. Its output
        is then the same prefix of the result, since a channel's batch statistics do not depend on
        other channels. The running statistics of all declared `prefixes` are updated.

        Args:
            x: [B, c, H, W], where c is the largest width.
            prefixes: The widths of each sub-network up to this layer.

        Returns:
            [B, c, H, W].

        Raises:
            ValueError: the batch has fewer than two values per channel.
        """
        assert self.training
        assert not self.private_affine
        num_values = x.numel() // x.shape[1]
        if num_values < 2:
            raise ValueError(f"expected more than 1 value per channel when training, got input size {list(x.shape)}")
        widest = max(prefixes, key=lambda prefix: prefix[-1])
        mean, var, factor = None, None, 0.0
        if widest in self._names:
            mean, var, updates = self.statistics(widest)
            factor = self._count(updates)
        y, batch_mean, batch_inverse_deviation = torch.native_batch_norm(
            x, *self.affine(widest), mean, var, True, factor, self.eps
        )
        with torch.no_grad():
            biased = batch_inverse_deviation**-2 - self.eps
            batch_var = biased * (num_values / (num_values - 1))
            for prefix in self._names.keys() & set(prefixes) - {widest}:
                mean, var, updates = self.statistics(prefix)
                factor = self._count(updates)
                mean.lerp_(batch_mean[: prefix[-1]].to(mean.dtype), factor)
                var.lerp_(batch_var[: prefix[-1]].to(var.dtype), factor)
        return y

    def _count(self, updates: Tensor) -> float:
        """The newest batch's weight in the running statistics; increments `updates` where there is
        an update."""
        if not self.training or self.momentum == 0.0 or not (self.tracks or self.momentum is None):
            return 0.0
        updates += 1
        return 1.0 / float(updates) if self.momentum is None else self.momentum

    def reset_statistics(self) -> None:
        """Reset all running statistics to mean 0, variance 1 and no updates."""
        for name, buffer in self._buffers.items():
            if buffer is not None:
                buffer.fill_(1.0) if name.startswith("var_") else buffer.zero_()

    def cut(self, prefix: tuple[int, ...]) -> nn.BatchNorm2d:
        """The statistics of one prefix as a plain BatchNorm2d in eval mode."""
        mean, var, updates = self.statistics(prefix)
        weight, bias = self.affine(prefix)
        plain = nn.BatchNorm2d(len(mean), eps=self.eps, momentum=BN_MOMENTUM)
        with torch.no_grad():
            plain.weight.copy_(weight)
            plain.bias.copy_(bias)
        for target, source in (
            (plain.running_mean, mean),
            (plain.running_var, var),
            (plain.num_batches_tracked, updates),
        ):
            if target is not None:
                target.copy_(source)
        return plain.eval()


class SlicedGroupNorm(nn.Module):
    """GroupNorm sliced to the input's channels (Wu & He, arXiv 1803.08494), without statistics.

    Groups have 16 channels, or 8 or 4 where the width is not a multiple of 16; a width that is not
    a multiple of 4 is one group (ours).
    """

    def __init__(self, max_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(max_features))
        self.bias = nn.Parameter(torch.zeros(max_features))

    def affine(self, prefix: tuple[int, ...]) -> tuple[Float[Tensor, " channels"], Float[Tensor, " channels"]]:
        """Scale and shift of the channels that a sub-network uses."""
        return corner(self.weight, prefix[-1]), corner(self.bias, prefix[-1])

    def forward(
        self, x: Float[Tensor, "batch channels height width"], prefix: tuple[int, ...]
    ) -> Float[Tensor, "batch channels height width"]:
        """Normalise each image of [B, c, H, W] independently; `prefix[-1]` is c."""
        weight, bias = self.affine(prefix)
        return F.group_norm(x, _num_norm_groups(len(weight)), weight, bias, BN_EPS)

    def cut(self, prefix: tuple[int, ...]) -> nn.GroupNorm:
        """The slice as a plain GroupNorm."""
        weight, bias = self.affine(prefix)
        plain = nn.GroupNorm(_num_norm_groups(len(weight)), len(weight), BN_EPS)
        with torch.no_grad():
            plain.weight.copy_(weight)
            plain.bias.copy_(bias)
        return plain


def _num_norm_groups(width: int) -> int:
    return next((width // size for size in (16, 8, 4) if width % size == 0), 1)


def make_norm(kind: str, max_features: int, prefixes: Iterable[tuple[int, ...]]) -> BatchNormBank | SlicedGroupNorm:
    """Build the normalisation of one layer.

    Args:
        kind: one of `dsnet.space.spec.NORMS`.
        max_features: channels of the widest sub-network.
        prefixes: the widths of every sub-network up to this layer.
    """
    if kind == "group_norm":
        return SlicedGroupNorm(max_features)
    return BatchNormBank(max_features, prefixes, private_affine=kind == "private_affine", tracks=kind != "recalibrate")


def norm_axes(norm: BatchNormBank | SlicedGroupNorm, channels: Axis) -> dict[str, Axes]:
    """The axes of the tensors of a norm, by name; each set of statistics, and each private affine
    pair, has the channels of its key alone.

    Args:
        norm: the norm.
        channels: the axis of the channels that it normalises.
    """
    shared: dict[str, Axes] = {"weight": (channels,), "bias": (channels,)}
    if isinstance(norm, SlicedGroupNorm):
        return shared
    parts = ("weight", "bias", "mean", "var") if norm.private_affine else ("mean", "var")
    axes = {} if norm.private_affine else shared
    keys = norm.keys()
    for key in keys:
        own = channels.narrowed(norm.widths_of(key))
        axes |= {f"{part}_{key_suffix(key)}": (own,) for part in parts}
    return axes


class SlicedAttention(nn.Module):
    """Squeeze-and-excitation attention whose hidden layer is never sliced.

    In a gated block its hidden vector is also the input of the slimming head.
    """

    def __init__(
        self, max_channels: int, hidden: int, generator: torch.Generator, *, is_residual: bool = False
    ) -> None:
        super().__init__()
        self.is_residual = is_residual
        """False: x * sigmoid(a). True: x * (1 + tanh(a)), initially the identity (docs/methods.md,
        section 2, DS-ResNet)."""
        self.reduce_weight = nn.Parameter(torch.empty(hidden, max_channels))
        self.reduce_bias = nn.Parameter(torch.zeros(hidden))
        self.expand_weight = nn.Parameter(torch.zeros(max_channels, hidden))
        self.expand_bias = nn.Parameter(torch.zeros(max_channels))
        nn.init.kaiming_normal_(self.reduce_weight, mode="fan_in", nonlinearity="relu", generator=generator)
        if not is_residual:
            nn.init.kaiming_normal_(self.expand_weight, mode="fan_in", nonlinearity="relu", generator=generator)

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> tuple[Float[Tensor, "batch channels height width"], Float[Tensor, "batch hidden"]]:
        """[B, c, H, W] -> (attended [B, c, H, W], hidden vector [B, hidden])."""
        num_channels = x.shape[1]
        reduce = corner(self.reduce_weight, self.reduce_bias.shape[0], num_channels)
        hidden = F.relu(F.linear(x.mean((2, 3)), reduce, self.reduce_bias))
        logits = F.linear(hidden, corner(self.expand_weight, num_channels), corner(self.expand_bias, num_channels))
        scale = 1.0 + torch.tanh(logits) if self.is_residual else torch.sigmoid(logits)
        return x * scale[:, :, None, None], hidden

    @staticmethod
    def axes(channels: Axis) -> Mapping[str, Axes]:
        """The axes of the parameters that are sliced, by name; `channels` are those it weights."""
        return {"reduce_weight": (None, channels), "expand_weight": (channels,), "expand_bias": (channels,)}

    def cut(self, num_channels: int) -> SlicedAttention:
        """The slice with its own contiguous weights, as a full-width attention."""
        hidden = self.reduce_bias.shape[0]
        plain = SlicedAttention(num_channels, hidden, torch.Generator(), is_residual=self.is_residual)
        with torch.no_grad():
            plain.reduce_weight.copy_(self.reduce_weight[:, :num_channels])
            plain.reduce_bias.copy_(self.reduce_bias)
            plain.expand_weight.copy_(self.expand_weight[:num_channels])
            plain.expand_bias.copy_(self.expand_bias[:num_channels])
        return plain


def undecayed(module: nn.Module) -> frozenset[str]:
    """The names of a network's parameters that weight decay leaves alone although they have two or
    more dimensions: those that a part of it lists as `UNDECAYED`."""
    return frozenset(
        f"{name}.{leaf}" if name else leaf
        for name, part in module.named_modules()
        for leaf in getattr(type(part), "UNDECAYED", ())
    )


def key_suffix(prefix: tuple[int, ...]) -> str:
    """The end of the names of the tensors that a norm keeps for one key."""
    return "_".join(map(str, prefix))


def _plain_conv(weight: Tensor, stride: int, groups: int) -> nn.Conv2d:
    num_out, num_in, kernel, _ = weight.shape
    plain = nn.Conv2d(num_in * groups, num_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    plain.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    return plain
