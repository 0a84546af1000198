"""Well-known networks as plain PyTorch modules, with the parameter names of their usual releases.

`make` builds one by name. The modules know nothing of sub-networks: family `traced`
(`dsnet.families.traced`) reads them as it reads a module of a user. Parameter names follow
torchvision where it has the network, so that a state dict of its releases loads as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn

from dsnet.zoo.mobilenet import MobileNetV1, MobileNetV2
from dsnet.zoo.resnet import BasicBlock, Bottleneck, ResNet
from dsnet.zoo.vgg import VGG, PooledVGG

Factory = Callable[..., nn.Module]
"""(number of classes, channels of the image, the network's own options by name) -> module with
fresh weights."""

ZOO: Mapping[str, Factory] = {
    "resnet18": lambda classes, channels: ResNet(BasicBlock, (2, 2, 2, 2), classes, channels),
    "resnet34": lambda classes, channels: ResNet(BasicBlock, (3, 4, 6, 3), classes, channels),
    "resnet50": lambda classes, channels: ResNet(Bottleneck, (3, 4, 6, 3), classes, channels),
    "vgg11_bn": lambda classes, channels: VGG((1, 1, 2, 2, 2), classes, channels),
    "vgg16_bn": lambda classes, channels: VGG((2, 2, 3, 3, 3), classes, channels),
    "vgg19_gap": lambda classes, channels: PooledVGG((2, 2, 4, 4, 4), classes, channels),
    "mobilenet_v1": lambda classes, channels: MobileNetV1(classes, channels),
    "mobilenet_v2": MobileNetV2,
}
"""The networks by name."""


@dataclass(frozen=True)
class NumberOption:
    """An option of a network whose value is a number."""

    default: float
    low: float
    high: float
    """Smallest and largest value."""


OPTIONS: Mapping[str, Mapping[str, NumberOption]] = MappingProxyType(
    {"mobilenet_v2": MappingProxyType({"width": NumberOption(1.0, 0.1, 4.0)})}
)
"""The options of networks that have some: `width` is a factor of the numbers of channels."""
