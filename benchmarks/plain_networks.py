"""Plain networks for small images, which the benchmarks name by import path."""

from __future__ import annotations

from torch import Tensor, nn

from dsnet.zoo.resnet import BasicBlock


class SmallResNet(nn.Module):
    """A ResNet for small images (He et al., arXiv 1512.03385, section 4.2): a 3x3 stem, stages of
    basic blocks of which each after the first halves the resolution and doubles the channels,
    average pool, classifier."""

    def __init__(self, width: int, num_blocks: tuple[int, ...], *, is_large: bool, classes: int, channels: int) -> None:
        """Build it with fresh weights.

        Args:
            width: channels of the stem and of the first stage.
            num_blocks: blocks of each stage.
            is_large: whether the stem divides height and width by four, with a stride and a
                pooling, as networks for large images do.
            classes: number of classes.
            channels: channels of the image.
        """
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, 2 if is_large else 1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if is_large else nn.Identity()
        blocks = []
        num_in = width
        for stage, number in enumerate(num_blocks):
            for index in range(number):
                blocks.append(BasicBlock(num_in, width * 2**stage, 2 if index == 0 and stage > 0 else 1))
                num_in = width * 2**stage
        self.blocks = nn.Sequential(*blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(num_in, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, classes]."""
        x = self.blocks(self.maxpool(self.relu(self.bn1(self.conv1(images)))))
        return self.fc(self.avgpool(x).flatten(1))


def resnet8_digits(classes: int, channels: int) -> nn.Module:
    """8 layers of 8 to 32 channels, for images of 8 pixels."""
    return SmallResNet(8, (1, 1, 1), is_large=False, classes=classes, channels=channels)


def resnet8_cifar(classes: int, channels: int) -> nn.Module:
    """8 layers of 32 to 128 channels with a large stem, for images of 32 pixels: quick on a CPU."""
    return SmallResNet(32, (1, 1, 1), is_large=True, classes=classes, channels=channels)


def resnet18_cifar(classes: int, channels: int) -> nn.Module:
    """The 18 layers of ResNet-18, 64 to 512 channels, with a small stem, for images of 32
    pixels."""
    return SmallResNet(64, (2, 2, 2, 2), is_large=False, classes=classes, channels=channels)
