"""Well-known networks as plain PyTorch modules, with the parameter names of their usual releases.

`make` builds one by name. The modules know nothing of sub-networks: family `traced`
(`dsnet.families.traced`) reads them as it reads a module of a user. Parameter names follow
torchvision where it has the network, so that a state dict of its releases loads as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from dsnet.zoo.mobilenet import MobileNetV1, MobileNetV2
from dsnet.zoo.resnet import BasicBlock, Bottleneck, ResNet
from dsnet.zoo.vgg import VGG

Factory = Callable[[int, int], nn.Module]
"""(number of classes, channels of the image) -> module with fresh weights."""

ZOO: Mapping[str, Factory] = {
    "resnet18": lambda classes, channels: ResNet(BasicBlock, (2, 2, 2, 2), classes, channels),
    "resnet34": lambda classes, channels: ResNet(BasicBlock, (3, 4, 6, 3), classes, channels),
    "resnet50": lambda classes, channels: ResNet(Bottleneck, (3, 4, 6, 3), classes, channels),
    "vgg11_bn": lambda classes, channels: VGG((1, 1, 2, 2, 2), classes, channels),
    "vgg16_bn": lambda classes, channels: VGG((2, 2, 3, 3, 3), classes, channels),
    "vgg19_bn": lambda classes, channels: VGG((2, 2, 4, 4, 4), classes, channels),
    "mobilenet_v1": lambda classes, channels: MobileNetV1(classes, channels),
    "mobilenet_v2": lambda classes, channels: MobileNetV2(classes, channels),
}
"""The networks by name."""
