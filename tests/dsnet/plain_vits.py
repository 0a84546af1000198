"""Plain vision transformers as two well-known libraries name their tensors, written independently
of the supernet: the oracles of pretrained start weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TimmAttention(nn.Module):
    """Self-attention with one layer for queries, keys and values."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        heads = self.qkv(x).view(batch, tokens, 3, self.heads, dim // self.heads)
        mixed = []
        for head in range(self.heads):
            q, k, v = (heads[:, :, part, head] for part in range(3))
            scores = torch.einsum("bqc,bkc->bqk", q, k) / (dim // self.heads) ** 0.5
            mixed.append(torch.einsum("bqk,bkc->bqc", scores.softmax(-1), v))
        return self.proj(torch.cat(mixed, -1))


class TimmMlp(nn.Module):
    """The perceptron of a block."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class TimmBlock(nn.Module):
    """A pre-norm block."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = TimmAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = TimmMlp(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TimmPatches(nn.Module):
    """Patches as vectors."""

    def __init__(self, patch: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimmVit(nn.Module):
    """A ViT or DeiT with the names of timm."""

    def __init__(
        self, size: tuple[int, int], patch: int, dim: int, heads: int, depth: int, hidden: int, num_classes: int
    ) -> None:
        super().__init__()
        self.patch_embed = TimmPatches(patch, dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        number = size[0] // patch * (size[1] // patch)
        self.pos_embed = nn.Parameter(torch.randn(1, number + 1, dim))
        self.blocks = nn.ModuleList(TimmBlock(dim, heads, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class TorchvisionMlp(nn.Sequential):
    """The perceptron of a block, numbered with its dropouts."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__(nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(0), nn.Linear(hidden, dim), nn.Dropout(0))


class TorchvisionBlock(nn.Module):
    """A pre-norm block with torch's own attention."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = TorchvisionMlp(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.self_attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class TorchvisionEncoder(nn.Module):
    """Positions, blocks and the last norm."""

    def __init__(self, number: int, dim: int, heads: int, depth: int, hidden: int) -> None:
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.randn(1, number, dim))
        blocks = {f"encoder_layer_{index}": TorchvisionBlock(dim, heads, hidden) for index in range(depth)}
        self.layers = nn.ModuleDict(blocks)
        self.ln = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pos_embedding
        for block in self.layers.values():
            x = block(x)
        return self.ln(x)


class TorchvisionVit(nn.Module):
    """A ViT with the names of torchvision."""

    def __init__(
        self, size: tuple[int, int], patch: int, dim: int, heads: int, depth: int, hidden: int, num_classes: int
    ) -> None:
        super().__init__()
        self.conv_proj = nn.Conv2d(3, dim, patch, stride=patch)
        self.class_token = nn.Parameter(torch.randn(1, 1, dim))
        number = size[0] // patch * (size[1] // patch)
        self.encoder = TorchvisionEncoder(number + 1, dim, heads, depth, hidden)
        self.heads = nn.ModuleDict({"head": nn.Linear(dim, num_classes)})

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_proj(images).flatten(2).transpose(1, 2)
        x = self.encoder(torch.cat([self.class_token.expand(len(x), -1, -1), x], 1))
        return self.heads["head"](x[:, 0])


def with_older_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict as the files that torchvision releases have it: the layers of a perceptron
    have names in place of numbers."""
    pairs = ((".mlp.0.", ".mlp.linear_1."), (".mlp.3.", ".mlp.linear_2."))
    for number, name in pairs:
        state = {key.replace(number, name): value for key, value in state.items()}
    return state
