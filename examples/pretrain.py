"""Trains a plain MobileNetV2 and writes its state dict, without anything of dsnet-orch.

    python examples/pretrain.py --data ~/data/cifar10 --epochs 10 --out net.pth

It needs PyTorch, and a reader of the images: Pillow for one folder per class, or pyarrow for the
parquet files of CIFAR-10. The parameters have the names that torchvision gives them. Images are
normalised with the mean and standard deviation of ImageNet, as for most published weights.
`examples/pretrained.yaml` goes on from the state dict.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""(expansion, channels, blocks, first stride) of each stage."""


def conv_norm(num_in: int, num_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, BatchNorm and ReLU6."""
    conv = nn.Conv2d(num_in, num_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(num_out), nn.ReLU6())


class Block(nn.Module):
    """Inverted residual: expansion, depthwise convolution, linear projection."""

    def __init__(self, num_in: int, num_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = num_in * expansion
        first = [conv_norm(num_in, hidden, 1)] if expansion > 1 else []
        project = [nn.Conv2d(hidden, num_out, 1, bias=False), nn.BatchNorm2d(num_out)]
        self.conv = nn.Sequential(*first, conv_norm(hidden, hidden, 3, stride, groups=hidden), *project)
        self.has_skip = stride == 1 and num_in == num_out

    def forward(self, x: Tensor) -> Tensor:
        """The block's output; with the input added where the shapes allow it."""
        return x + self.conv(x) if self.has_skip else self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 (arXiv 1801.04381)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [conv_norm(3, 32, 3, 2)]
        width = 32
        for expansion, channels, blocks, stride in STAGES:
            for number in range(blocks):
                layers.append(Block(width, channels, stride if number == 0 else 1, expansion))
                width = channels
        self.features = nn.Sequential(*layers, conv_norm(width, 1280, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images -> logits."""
        return self.classifier(self.features(images).mean((2, 3)))


def read_images(folder: Path, size: int | None) -> tuple[Tensor, Tensor, int]:
    """The training images as bytes, their labels, and the number of classes."""
    files = sorted(folder.glob("**/train*.parquet"))
    if files:
        return (*read_parquet(files), 10)
    root = folder / "train" if (folder / "train").is_dir() else folder
    classes = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    photos = [(path, label) for label, folder in enumerate(classes) for path in sorted(folder.glob("*.[jp][pn]*g"))]
    if not photos or size is None:
        raise SystemExit("a folder needs one folder of images per class, and --image-size")
    pixels = np.stack([read_photo(path, size) for path, _ in photos])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.tensor([label for _, label in photos]), len(classes)


def read_photo(path: Path, size: int) -> np.ndarray:
    """The centre square of a photo, resized."""
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size)))


def read_parquet(files: list[Path]) -> tuple[Tensor, Tensor]:
    """Images and labels of CIFAR-10's parquet files."""
    import pyarrow.parquet as parquet
    from PIL import Image

    pixels, labels = [], []
    for file in files:
        table = parquet.read_table(file)
        labels += table["label"].to_pylist()
        column = table["img" if "img" in table.column_names else "image"]
        pixels += [np.asarray(Image.open(io.BytesIO(each["bytes"])).convert("RGB")) for each in column.to_pylist()]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), torch.tensor(labels)


def augmented(images: Tensor) -> Tensor:
    """Images mirrored at random, and shifted by up to an eighth of the side, all by the same."""
    side = images.shape[-1]
    padding = side // 8
    top, left = torch.randint(0, 2 * padding + 1, (2,)).tolist()
    shifted = functional.pad(images, (padding,) * 4, mode="reflect")[..., top : top + side, left : left + side]
    return torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, shifted.flip(3), shifted)


def options() -> argparse.ArgumentParser:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=lambda text: Path(text).expanduser(), required=True, help="folder of the images")
    parser.add_argument("--image-size", type=int, help="side in pixels, for a folder of photos")
    parser.add_argument("--limit", type=int, help="largest number of images, chosen at random")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("net.pth"))
    return parser


def main() -> None:
    """Train, and write the state dict."""
    given = options().parse_args()
    torch.manual_seed(given.seed)
    images, labels, num_classes = read_images(given.data, given.image_size)
    kept = torch.randperm(len(labels))[: given.limit]
    images, labels = images[kept], labels[kept]
    net = MobileNetV2(num_classes)
    num_steps = given.epochs * (len(labels) // 64)
    optimizer = torch.optim.SGD(net.parameters(), given.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, given.lr, total_steps=num_steps)
    for epoch in range(given.epochs):
        num_right = 0
        batches = torch.randperm(len(labels))[: len(labels) // 64 * 64].view(-1, 64)
        for rows in batches:
            logits = net((augmented(images[rows].float() / 255) - MEAN) / STD)
            optimizer.zero_grad()
            functional.cross_entropy(logits, labels[rows]).backward()
            optimizer.step()
            schedule.step()
            num_right += int((logits.argmax(1) == labels[rows]).sum())
        print(f"epoch {epoch + 1}: {100 * num_right / batches.numel():.1f} % of the training images right", flush=True)
    torch.save(net.state_dict(), given.out)
    print(f"wrote {given.out}")


if __name__ == "__main__":
    main()
