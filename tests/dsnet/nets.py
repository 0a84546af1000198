"""Small plain networks that the tests trace, as a user might write them."""

from __future__ import annotations

from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SqueezeExcite(nn.Module):
    """Weights of the channels from their means."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(width, width // 2, 1)
        self.expand = nn.Conv2d(width // 2, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.expand(F.relu(self.reduce(F.adaptive_avg_pool2d(x, 1))))
        return x * torch.sigmoid(weights)


class Block(nn.Module):
    """An inverted residual: expansion, depthwise convolution, squeeze and excite, projection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width), nn.SiLU())
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width, bias=False)
        self.norm = nn.BatchNorm2d(2 * width)
        self.attention = SqueezeExcite(2 * width)
        self.project = nn.Conv2d(2 * width, width, 1, bias=False)
        self.project_norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(F.relu6(self.norm(self.depthwise(self.expand(x)))))
        return x + self.project_norm(self.project(y))


class Residual(nn.Module):
    """A stem, a residual block, and a stage with a projection; ends with dropout."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.block = Block(8)
        self.pool = nn.MaxPool2d(3, 2, padding=1)
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.skip = nn.Conv2d(8, 16, 1, stride=2)
        self.norm = nn.BatchNorm2d(16)
        self.dropout = nn.Dropout(0.1)
        self.fc = nn.Linear(16, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.pool(self.block(F.relu(self.bn(self.stem(images)))))
        x = F.relu(self.norm(self.down(x)) + self.skip(x))
        return self.fc(self.dropout(x.mean((2, 3))))


class Dense(nn.Module):
    """Concatenated features, as in DenseNet and SqueezeNet, flattened for the classifier."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, 8, 3, stride=2, padding=1)
        self.left = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.right = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.norm = nn.BatchNorm2d(28)
        self.last = nn.Conv2d(28, 8, 3, stride=2, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.hidden = nn.Linear(32, 16)
        self.classifier = nn.Linear(16, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.first(images))
        x = torch.cat([x, self.left(x), self.right(x)], 1)
        x = self.pool(F.relu(self.last(self.norm(x))))
        return self.classifier(F.relu(self.hidden(x.view(x.size(0), -1))))


class Pinned(nn.Module):
    """A network with an operation that is not understood, and with a grouped convolution."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(in_channels, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.BatchNorm2d(8), nn.ReLU())
        self.third = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.SiLU())
        self.fc = nn.Linear(16, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.roll(self.first(images), 1, 1)
        return self.fc(self.third(self.second(x)).amax((2, 3)))


class Scaled(nn.Module):
    """A parameter and a buffer that no layer holds, both read in the first and in the second half,
    and a value that is changed in place."""

    scale: Tensor
    shift: Tensor

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, 8, 3, stride=2, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.scale = nn.Parameter(torch.full((1, 8, 1, 1), 0.5))
        self.register_buffer("shift", torch.full((1, 8, 1, 1), 0.25))
        self.fc = nn.Linear(12, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.act(self.first(images)) * self.scale + self.shift
        x = self.second(x) * self.scale + self.shift
        return self.fc(self.last(x).mean((2, 3)))


class AlongWidth(nn.Module):
    """Linear layers and a norm along the width of the features, of images of 16 pixels."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 8, 2, stride=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.wide = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(16)
        self.narrow = nn.Linear(16, 8)
        self.last = nn.Conv2d(8, 12, 3, padding=1)
        self.fc = nn.Linear(12, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        y = self.narrow(F.gelu(self.norm(self.wide(self.depthwise(x)))))
        return self.fc(F.relu(self.last(x + y)).mean((2, 3)))


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of [batch, channels, height, width]."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class Permute(nn.Module):
    """Dimensions in another order."""

    def __init__(self, dims: list[int]) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return torch.permute(x, self.dims)


class NextBlock(nn.Module):
    """A block of ConvNeXt, whose scale is [width, 1, 1] at its end, or [width] before the channels
    are moved back."""

    def __init__(self, width: int, hidden: int, *, scales_last: bool) -> None:
        super().__init__()
        self.scales_last = scales_last
        self.block = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, groups=width),
            Permute([0, 2, 3, 1]),
            nn.LayerNorm(width, eps=1e-6),
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Linear(hidden, width),
        )
        self.back = Permute([0, 3, 1, 2])
        self.layer_scale = nn.Parameter(0.5 + torch.rand((width,) if scales_last else (width, 1, 1)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        y = self.back(y * self.layer_scale) if self.scales_last else self.layer_scale * self.back(y)
        y += x
        return y


class ConvNext(nn.Module):
    """Two stages of ConvNeXt. `widths`: channels of the first stage and hidden ones of its block,
    then those of the second stage."""

    def __init__(self, num_classes: int, in_channels: int, widths: tuple[int, ...] = (8, 16, 12, 24)) -> None:
        super().__init__()
        first, first_hidden, second, second_hidden = widths
        self.features = nn.Sequential(
            nn.Sequential(nn.Conv2d(in_channels, first, 2, stride=2), LayerNorm2d(first)),
            nn.Sequential(NextBlock(first, first_hidden, scales_last=False)),
            nn.Sequential(LayerNorm2d(first), nn.Conv2d(first, second, 2, stride=2)),
            nn.Sequential(NextBlock(second, second_hidden, scales_last=True)),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(LayerNorm2d(second), nn.Flatten(1), nn.Linear(second, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(images)))


class Transformer(nn.Module):
    """One block of a transformer, of images of 16 pixels: positions, in part made by a layer from a
    table, attention of one head, and two linear layers."""

    table: Tensor

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(in_channels, 8, 4, stride=4)
        self.position = nn.Parameter(torch.randn(1, 16, 8))
        self.register_buffer("table", torch.rand(1, 16, 2))
        self.place = nn.Linear(2, 8)
        self.before = nn.LayerNorm(8)
        self.between = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.position + self.place(self.table)
        y = self.before(x)
        x = x + torch.softmax(y @ y.transpose(1, 2), 2) @ y
        x = x + self.down(F.gelu(self.up(self.between(x))))
        return self.fc(x.mean(1))


class Tokens(nn.Module):
    """A network none of whose channels can be sliced."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(in_channels, 8, 4, stride=4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        mixed, _ = self.attention(tokens, tokens, tokens)
        return self.fc(mixed.mean(1))


class Fixed(nn.Module):
    """A network for images of one size: it flattens its features."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 8, 3, stride=2, padding=1)
        self.fc = nn.Linear(8 * 8 * 8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(torch.flatten(F.relu(self.conv(images)), 1))


class TwoHeads(nn.Module):
    """Returns two tensors."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 8, 3)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv(images).mean((2, 3))
        return self.fc(x), x


class Branches(nn.Module):
    """Control flow that depends on the values of a tensor."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 8, 3)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(images)
        if x.sum() > 0:
            x = -x
        return self.fc(x.mean((2, 3)))


def raises(num_classes: int, in_channels: int) -> nn.Module:
    """A factory that fails."""
    raise RuntimeError(f"no network for {num_classes} classes")


def downloads(num_classes: int, in_channels: int) -> nn.Module:
    """A factory that fetches weights from a server that cannot be reached."""
    try:
        raise ConnectionRefusedError(111, "Connection refused")
    except OSError as error:
        raise URLError(error) from error


def wraps_a_download(num_classes: int, in_channels: int) -> nn.Module:
    """A factory whose own message hides that of the connection."""
    try:
        return downloads(num_classes, in_channels)
    except URLError as error:
        raise RuntimeError("no weights") from error


def no_module(num_classes: int, in_channels: int) -> str:
    """A factory that returns something else."""
    return "resnet50"


def one_channel(num_classes: int, in_channels: int) -> nn.Module:
    """A factory that is written for one kind of images."""
    return Residual(num_classes, 1)


class Kernels(nn.Module):
    """Depthwise kernels of 5 and 3 pixels: with a stride, a bias and a multiplier of the channels,
    dilated, and one without padding, which keeps its size."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.first = nn.Conv2d(8, 8, 5, stride=2, padding=2, groups=8, bias=False)
        self.first_norm = nn.BatchNorm2d(8)
        self.wide = nn.Sequential(nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.second = nn.Conv2d(12, 24, 3, padding=1, groups=12)
        self.mixed = nn.Sequential(nn.Conv2d(24, 12, 1, bias=False), nn.BatchNorm2d(12))
        self.third = nn.Conv2d(12, 12, 5, padding=4, dilation=2, groups=12)
        self.last = nn.Conv2d(12, 12, 3, groups=12)
        self.norm = nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.wide(F.relu6(self.first_norm(self.first(self.stem(images)))))
        x = F.relu(x + self.mixed(F.relu(self.second(x))))
        return self.fc(F.relu(self.norm(self.last(self.third(x)))).mean((2, 3)))


class Unpadded(nn.Module):
    """A depthwise kernel of 5 pixels that is padded by one pixel: enough for 3 pixels in its
    centre, and not for 1."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 8, 1)
        self.first = nn.Conv2d(8, 8, 5, padding=1, groups=8)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(F.relu(self.first(self.stem(images))).mean((2, 3)))


class Twice(nn.Module):
    """A depthwise convolution that runs in two places, and one that runs in one."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 8, 1)
        self.shared = nn.Conv2d(8, 8, 5, padding=2, groups=8)
        self.between = nn.Conv2d(8, 8, 1)
        self.middle = nn.Conv2d(8, 12, 1)
        self.own = nn.Conv2d(12, 12, 5, padding=2, groups=12)
        self.fc = nn.Linear(12, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.between(F.relu(self.shared(self.stem(images))))
        x = self.middle(F.relu(self.shared(x)))
        return self.fc(F.relu(self.own(x)).mean((2, 3)))


class Stream(nn.Module):
    """Residual streams with writers of every kind: a stem, blocks with and without a squeeze and
    excite, a difference, a norm and a depthwise convolution on the stream, a stage with a
    projection, and a concatenation of two streams, flattened for the classifier."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.block = Block(8)
        self.before = nn.BatchNorm2d(8)
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.minus = nn.Conv2d(8, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.skip = nn.Conv2d(8, 12, 1, stride=2)
        self.norm = nn.BatchNorm2d(12)
        self.last = nn.Conv2d(12, 12, 1)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.fc = nn.Linear(80, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(images)))
        x = self.block(x)
        x = x + self.branch(F.relu(self.before(x)))
        x = torch.sub(x, self.minus(x), alpha=0.5)
        y = F.relu(self.norm(self.down(self.depthwise(x))) + self.skip(x))
        y += self.last(y)
        return self.fc(torch.cat([self.pool(x), self.pool(y)], 1).flatten(1))
