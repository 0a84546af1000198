"""A small supernet in which the size of a kernel is a width: a smaller kernel is the centre of the
largest one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsnet.network.axes import Axes, Axis, prefixed, take
from dsnet.network.supernet import Supernet, TrunkOutput
from dsnet.network.traced import TracedNorm
from dsnet.space.spec import CLASSES, IMAGE, IMAGE_CHANNELS, ChannelGroup, Op, Subnet, SupernetSpec
from dsnet.space.subnet_set import SubnetSet

STEM, OUT, KERNEL = range(3)


def kernel_set() -> SubnetSet:
    """Sub-networks with kernels of 3, 5 and 7 pixels; two differ in nothing else."""
    groups = (ChannelGroup("stem", 8), ChannelGroup("out", 6), ChannelGroup("kernel", 7, kind="kernel"))
    ops = (
        Op("stem", "conv", IMAGE, IMAGE_CHANNELS, STEM),
        Op("stem_norm", "norm", "stem", STEM, STEM, depends=(STEM,)),
        Op("conv", "conv", "stem_norm", STEM, OUT, kernel_group=KERNEL),
        Op("norm", "norm", "conv", OUT, OUT, depends=(STEM, KERNEL, OUT)),
        Op("average", "pool", "norm", OUT, OUT),
        Op("classifier", "linear", "average", OUT, CLASSES),
    )
    spec = SupernetSpec("kernels", 10, 3, 16, groups, ops, ())
    widths = {"small": (4, 3, 3), "middle": (6, 3, 5), "same but 3": (6, 3, 3), "all": (8, 6, 7)}
    return SubnetSet(spec, tuple(Subnet(name, own) for name, own in widths.items()))


class Kernels(Supernet):
    """Two convolutions with norms, the second with a kernel of several sizes."""

    def __init__(self, spec: SupernetSpec, subnets: SubnetSet, generator: torch.Generator | None = None) -> None:
        super().__init__(spec, subnets)
        draw = generator if generator is not None else torch.Generator().manual_seed(1)
        stem, out, kernel = spec.max_widths
        self.stem = nn.Parameter(torch.randn(stem, spec.in_channels, 1, 1, generator=draw))
        self.conv = nn.Parameter(torch.randn(out, stem, kernel, kernel, generator=draw))
        self.classifier = nn.Parameter(torch.randn(spec.num_classes, out, generator=draw))
        self.bias = nn.Parameter(torch.randn(spec.num_classes, generator=draw))
        self._stem, self._out = (Axis.of(((group, 1),), spec) for group in (STEM, OUT))
        self._kernel = Axis.kernel(KERNEL, spec)
        plain = nn.BatchNorm2d(8)
        self.stem_norm = TracedNorm(plain, self._stem, spec.ops[1].depends, subnets)
        self.norm = TracedNorm(plain, self._out, spec.ops[3].depends, subnets)

    def own_upto_gate(self, gate: int, x: Tensor, subnet: Subnet) -> TrunkOutput:
        """There is no gate."""
        raise NotImplementedError

    def cut_own_upto_gate(self, gate: int, subnet: Subnet) -> nn.Module:
        """There is no gate."""
        raise NotImplementedError

    def own_head(self, features: Tensor, subnet: Subnet) -> Tensor:
        """The whole network."""
        widths, axes = subnet.widths, self.axes()
        x = F.relu(self.stem_norm(F.conv2d(features, take(self.stem, axes["stem"], widths)), widths))
        weight = take(self.conv, axes["conv"], widths)
        x = F.relu(self.norm(F.conv2d(x, weight, padding=weight.shape[-1] // 2), widths))
        return F.linear(x.mean((2, 3)), take(self.classifier, axes["classifier"], widths), self.bias)

    def cut_own_head(self, subnet: Subnet) -> nn.Module:
        """The whole network, as plain modules."""
        widths, axes = subnet.widths, self.axes()
        stem, out, kernel = widths
        first = nn.Conv2d(self.spec.in_channels, stem, 1, bias=False)
        second = nn.Conv2d(stem, out, kernel, padding=kernel // 2, bias=False)
        last = nn.Linear(out, self.spec.num_classes)
        first.weight = nn.Parameter(take(self.stem, axes["stem"], widths).clone())
        second.weight = nn.Parameter(take(self.conv, axes["conv"], widths).clone())
        last.weight, last.bias = nn.Parameter(take(self.classifier, axes["classifier"], widths).clone()), self.bias
        norms = [norm.cut(norm.key_of(widths)) for norm in (self.stem_norm, self.norm)]
        relu, pool = nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        return nn.Sequential(first, norms[0], relu, second, norms[1], relu, pool, nn.Flatten(), last)

    def axes(self) -> Mapping[str, Axes]:
        """The axes of all tensors with channels or with the kernel."""
        classes = Axis.of(((CLASSES, 1),), self.spec)
        return {
            "stem": (self._stem,),
            "conv": (self._out, self._stem, self._kernel, self._kernel),
            "classifier": (classes, self._out),
            "bias": (classes,),
            **prefixed("stem_norm", self.stem_norm.axes()),
            **prefixed("norm", self.norm.axes()),
        }


def kernels() -> Kernels:
    """The network in eval mode, in double precision."""
    subnets = kernel_set()
    return Kernels(subnets.spec, subnets).double().eval()
