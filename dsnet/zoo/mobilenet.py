"""MobileNetV1 (Howard et al., arXiv 1704.04861) and MobileNetV2 (Sandler et al., arXiv 1801.04381).

MobileNetV2 has the parameter names of torchvision; MobileNetV1, which torchvision lacks, has names
of the same kind: `features.N.0` and `features.N.1` are the two convolutions of block N.
"""

from __future__ import annotations

from torch import Tensor, nn

V1_BLOCKS = (
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1),
)  # fmt: skip
"""(channels, stride) of each separable block of MobileNetV1."""
V2_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""(expansion, channels, blocks, first stride) of each stage of MobileNetV2."""


def _conv_norm(
    num_in: int, num_out: int, kernel: int, stride: int = 1, *, groups: int = 1, activation: type[nn.Module] = nn.ReLU6
) -> nn.Sequential:
    """Convolution, BatchNorm and activation."""
    conv = nn.Conv2d(num_in, num_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(num_out), activation(inplace=True))


def _initialise(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)


class MobileNetV1(nn.Module):
    """Stem, thirteen depthwise-separable blocks, global average pool, classifier."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        blocks = [_conv_norm(in_channels, 32, 3, 2, activation=nn.ReLU)]
        num_in = 32
        for width, stride in V1_BLOCKS:
            depthwise = _conv_norm(num_in, num_in, 3, stride, groups=num_in, activation=nn.ReLU)
            blocks.append(nn.Sequential(depthwise, _conv_norm(num_in, width, 1, activation=nn.ReLU)))
            num_in = width
        self.features = nn.Sequential(*blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(num_in, num_classes)
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, num_classes]."""
        return self.classifier(self.avgpool(self.features(images)).flatten(1))


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution and linear projection, with a skip connection where stride
    and width allow one."""

    def __init__(self, num_in: int, num_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = num_in * expansion
        layers: list[nn.Module] = [] if expansion == 1 else [_conv_norm(num_in, hidden, 1)]
        layers += [
            _conv_norm(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, num_out, 1, bias=False),
            nn.BatchNorm2d(num_out),
        ]
        self.conv = nn.Sequential(*layers)
        self.is_residual = stride == 1 and num_in == num_out

    def forward(self, x: Tensor) -> Tensor:
        """[B, c, H, W] -> [B, num_out, H / stride, W / stride]."""
        return x + self.conv(x) if self.is_residual else self.conv(x)


def _scaled(channels: int, width: float) -> int:
    """Channels times a factor, rounded to the nearest multiple of 8, up in the middle; one multiple
    more where that would take away over a tenth, as in torchvision."""
    scaled = max(8, int(channels * width + 4) // 8 * 8)
    return scaled + 8 if scaled < 0.9 * channels * width else scaled


class MobileNetV2(nn.Module):
    """Stem, seven stages of inverted residuals, a last 1x1 convolution, global average pool,
    classifier."""

    def __init__(self, num_classes: int, in_channels: int, width: float = 1.0) -> None:
        """Build it with fresh weights.

        Args:
            num_classes: number of logits.
            in_channels: channels of the image.
            width: factor of the numbers of channels; the last convolution has at least 1,280.
        """
        super().__init__()
        num_in, num_last = _scaled(32, width), _scaled(1280, max(1.0, width))
        blocks: list[nn.Module] = [_conv_norm(in_channels, num_in, 3, 2)]
        for expansion, channels, number, stride in V2_STAGES:
            num_out = _scaled(channels, width)
            for index in range(number):
                blocks.append(InvertedResidual(num_in, num_out, stride if index == 0 else 1, expansion))
                num_in = num_out
        blocks.append(_conv_norm(num_in, num_last, 1))
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(num_last, num_classes))
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, num_classes]."""
        return self.classifier(self.features(images).mean([2, 3]))
