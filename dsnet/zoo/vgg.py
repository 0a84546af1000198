"""VGG with BatchNorm (Simonyan and Zisserman, arXiv 1409.1556): -11 and -16 with the parameter
names of torchvision, and the layout that slimmable networks use, with one linear layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

WIDEST = 512
"""Channels of the widest stages."""


def _features(num_convs: Sequence[int], in_channels: int, *, bias: bool) -> nn.Sequential:
    """Stages of 3x3 convolutions with a max pool after each; the first stage has 64 channels, each
    further one twice as many, at most `WIDEST`."""
    layers: list[nn.Module] = []
    num_in = in_channels
    for stage, number in enumerate(num_convs):
        width = min(64 * 2**stage, WIDEST)
        for _ in range(number):
            conv = nn.Conv2d(num_in, width, 3, padding=1, bias=bias)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            num_in = width
        layers.append(nn.MaxPool2d(2, 2))
    return nn.Sequential(*layers)


def _initialise(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


class VGG(nn.Module):
    """Stages of 3x3 convolutions with a max pool after each, and three linear layers."""

    def __init__(self, num_convs: Sequence[int], num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.features = _features(num_convs, in_channels, bias=True)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            nn.Linear(WIDEST * 49, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(4096, num_classes),
        )
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W], at least 32 pixels -> logits [B, num_classes]."""
        return self.classifier(self.avgpool(self.features(images)).flatten(1))


class PooledVGG(nn.Module):
    """Stages of 3x3 convolutions without bias with a max pool after each, global average pool, and
    one linear layer (arXiv 2212.03415 with 16 convolutions)."""

    def __init__(self, num_convs: Sequence[int], num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.features = _features(num_convs, in_channels, bias=False)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(WIDEST, num_classes)
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W], at least 32 pixels -> logits [B, num_classes]."""
        return self.classifier(self.avgpool(self.features(images)).flatten(1))
